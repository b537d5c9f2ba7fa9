"""Where a drill is played: mock providers in processes of their own, and a core of its own for each scene."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from google.protobuf.duration_pb2 import Duration
from moltbot.errors import MoltBotClientError, from_event, from_status
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2

from moltbot_server.app import Core
from moltbot_server.cli.failover_plan import Candidate, Drill, drill_name
from moltbot_server.config import Settings
from moltbot_server.config_models import Cache
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engines.scripted import Rule, ScriptedEngine
from moltbot_server.models.engines.scripted import Script as LocalScript
from moltbot_server.models.plan_check import LOCAL
from moltbot_server.workspace import Workspace

_LONGEST_TURN = 30.0
_STARTS_WITHIN = 20.0
_NOBODY = "drill-nobody"


@dataclass(slots=True)
class Heard:
    """What became of a turn, as a client sees it. Times in seconds since it was sent; `first_token` None for none."""

    shown: str = ""
    told: str = ""
    model: str = ""
    attempts: list[str] = field(default_factory=list)
    switches: int = 0
    resets: int = 0
    broke_off: bool = False
    first_token: float | None = None
    total: float = 0.0
    error: MoltBotClientError | None = None
    raw: str = ""

    def take(self, event: chat_pb2.Event, passed: float) -> None:
        """Take in an event that came so many seconds after the turn was sent."""
        self.raw += str(event)
        kind = event.WhichOneof("kind")
        if kind == "text_delta":
            if self.first_token is None and event.text_delta.text.strip():
                self.first_token = passed
            self.shown += event.text_delta.text
        elif kind == "reset":
            self.resets += 1
            self.shown = event.reset.text
        elif kind == "notice":
            self.switches += event.notice.code == "FAILOVER"
        elif kind == "completed":
            self.told, self.model = event.completed.text, event.completed.model.removeprefix("models/")
            self.broke_off = event.completed.finish_reason == message_pb2.FINISH_REASON_UPSTREAM_ERROR
            self._tried(event.completed.timings)
        elif kind == "failed":
            self.error = from_event(event.failed)
            self._tried(event.failed.timings)

    def _tried(self, timings: chat_pb2.Timings) -> None:
        tried = [each for each in timings.attempt_log if each.outcome != "SKIPPED"]
        names = [
            each.model.removeprefix("models/") for each in sorted(tried, key=lambda each: each.start.ToNanoseconds())
        ]
        self.attempts = names or ([self.model] if self.model else [])


class Mock:
    """A mock provider and its control. `key` is the one that opens it."""

    def __init__(self, candidate: Candidate, number: int, process: Process, session: aiohttp.ClientSession) -> None:
        self.candidate, self.number = candidate, number
        self.key = f"drill-key-{number}-0123456789abcdef"
        self.address = ""
        self._process, self._session = process, session

    async def ready(self) -> None:
        """Wait until it serves."""
        assert self._process.stdout is not None
        async with asyncio.timeout(_STARTS_WITHIN):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("a mock provider did not start")
        self.address = json.loads(line)["address"]

    async def follow(self, **script: Any) -> None:
        """Let it follow a script from now on."""
        whole = {"text": self.candidate.text, "keys": [self.key], **script}
        async with self._session.put(f"{self.address}/control/script", json=whole) as response:
            if response.status != 200:
                raise RuntimeError(f"a mock provider refused its script: {await response.text()}")

    async def calls(self) -> Sequence[Mapping[str, Any]]:
        """Return the calls since it forgot them: `time` in Unix seconds, `outcome`, and more."""
        async with self._session.get(f"{self.address}/control/calls") as response:
            found: Sequence[Mapping[str, Any]] = (await response.json())["calls"]
            return found

    async def forget(self) -> None:
        """Forget the calls so far."""
        async with self._session.delete(f"{self.address}/control/calls"):
            pass


class Scene:
    """A core that has just begun, whose route leads to the stand-ins; the first model is the one that fails."""

    def __init__(
        self, drill: Drill, mocks: Mapping[str, Mock], channel: grpc.aio.Channel, core: Core, key: str
    ) -> None:
        self.drill, self.mocks = drill, mocks
        self._core, self._key = core, key
        self._chat: Any = chat_pb2_grpc.ChatServiceStub(channel)

    @property
    def first(self) -> Candidate:
        """The model of which faults are told."""
        return self.drill.candidates[0]

    @property
    def ids(self) -> Mapping[str, Candidate]:
        """The candidates by the ids that events have for them."""
        (route,) = self._core.reloading.routes
        return {model.model: candidate for model, candidate in zip(route.models, self.drill.candidates, strict=True)}

    def secret(self, text: str) -> bool:
        """Tell whether a text holds one of the keys."""
        return any(mock.key in text for mock in self.mocks.values())

    async def ask(self, text: str = "How are you?") -> Heard:
        """Ask in a new session and return what was heard."""
        heard, began = Heard(), time.perf_counter()
        turn = chat_pb2.TurnInput(parts=[message_pb2.Part(text=text)], flush_interval=Duration())
        stream = self._chat.StreamTurn(
            chat_pb2.StreamTurnRequest(turn=turn),
            metadata=(("authorization", f"Bearer {self._key}"),),
            timeout=_LONGEST_TURN,
        )
        try:
            async for response in stream:
                heard.take(response.event, time.perf_counter() - began)
        except grpc.aio.AioRpcError as error:
            heard.error = from_status(error, "the core")
        heard.total = time.perf_counter() - began
        heard.raw += str(heard.error or "")
        return heard


class Rig:
    """The mock providers of a drill. Each scene has its own core: what one broke is not what the next one meets."""

    def __init__(self, drill: Drill, folder: Path, mocks: Mapping[str, Mock]) -> None:
        self.drill, self.mocks = drill, mocks
        self._folder = folder
        self._scenes = 0

    @asynccontextmanager
    async def scene(
        self, first: Mapping[str, Any], local: tuple[Rule, ...] = (), *, all_local: bool = False
    ) -> AsyncGenerator[Scene, None]:
        """Begin a scene: the first model follows the script `first`, or the rules `local` where it is a local one.

        `all_local`: every local model follows them.
        """
        for name, mock in self.mocks.items():
            await mock.forget()
            await mock.follow(**(first if name == self.drill.candidates[0].name else {}))
        self._scenes += 1
        workspace = Workspace(folder=self._folder / f"scene-{self._scenes}")
        workspace.create()
        environ = {
            f"{drill_name(mock.number).upper().replace('-', '_')}_API_KEY": mock.key for mock in self.mocks.values()
        }
        core = Core(
            self._settings(workspace),
            key=workspace.read_key(),
            catalog=self._catalog(local, everywhere=all_local),
            environ=environ,
        )
        async with AsyncExitStack() as stack:
            await core.start()
            stack.push_async_callback(core.stop, 0.0)
            # Without gRPC's own retries: what is told at once is to be seen at once.
            options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
            channel = grpc.aio.insecure_channel(core.server.address, options=options)
            stack.push_async_callback(channel.close)
            yield Scene(self.drill, self.mocks, channel, core, workspace.read_key())

    def _settings(self, workspace: Workspace) -> Settings:
        return Settings(
            workspace=workspace.folder, port=0, grpc_port=0, metrics_port=0,
            providers=tuple(mock.candidate.moved(mock.number, mock.address) for mock in self.mocks.values()),
            models=replace(self.drill.route, name=""),
            cache=Cache(answers="off"),
        )  # fmt: skip

    def _catalog(self, local: tuple[Rule, ...], *, everywhere: bool) -> Catalog:
        """Return scripted models for the local ones of the route; a core without any has one that nobody asks."""
        engines = []
        here = [each for each in self.drill.candidates if each.provider is None]
        # The first one is what a route means by `local`.
        for candidate in sorted(here, key=lambda each: each.name not in LOCAL):
            fails = everywhere or candidate is self.drill.candidates[0]
            rules = (*(local if fails else ()), Rule(template=candidate.text))
            engines.append(ScriptedEngine(LocalScript(id=candidate.name, rules=rules)))
        return Catalog(engines or [ScriptedEngine(LocalScript(id=_NOBODY))])


@asynccontextmanager
async def rig(drill: Drill) -> AsyncGenerator[Rig, None]:
    """Run the mock providers of a drill; at the end they and the folder are gone."""
    remote = [(at, each) for at, each in enumerate(drill.candidates, 1) if each.provider is not None]
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moltbot-failover-"))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        mocks = {}
        for number, candidate in remote:
            process = await _started()
            stack.push_async_callback(_ended, process)
            mocks[candidate.name] = Mock(candidate, number, process, session)
        for mock in mocks.values():
            await mock.ready()
        yield Rig(drill, Path(folder), mocks)


async def _started() -> Process:
    options = {"port": 0, "host": "127.0.0.1", "json": True, "script": {}}
    # It leaves when its standard input ends, and so with us however we end.
    module = ("moltbot_server.cli.tied", "moltbot_server.testing_provider")
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", *module, json.dumps(options), stdin=PIPE, stdout=PIPE
    )


async def _ended(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
    await process.wait()
