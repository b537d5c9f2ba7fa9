"""`moltbot bench chat`: a whole installation as `moltbot start` runs it, with the built-in model and real processes.

Measured are the time to serve and to a first answer, the first token of a first chat through gRPC and through HTTP, the
memory of all processes after that, and many sessions that each speak every few seconds (open loop: a late answer delays
no question, so waiting is not hidden).
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2

from moltbot_server.bench.core import machine
from moltbot_server.bench.installation import Installation, spread, started, step_aside
from moltbot_server.workspace import Workspace

QUESTIONS = (
    "hello",
    "你好",
    "what can you do?",
    "how do I add a model?",
    "讲个笑话",
    "怎么接入钉钉?",
    "what is 7 times 8?",
)


def bench_chat(
    *,
    sessions: int = 200,
    every: float = 5.0,
    seconds: float = 60.0,
    chats: int = 100,
    cpus: set[int] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmark and return its figures; `cpus` are the processors of the installation, None for all."""
    report: dict[str, Any] = {"machine": machine(), "cpus": sorted(cpus) if cpus else "all"}
    progress("starting, with a first question")
    with tempfile.TemporaryDirectory(prefix="moltbot-bench-") as folder:
        workspace = Workspace(folder=Path(folder))
        with started("--first-question", "hello", workspace=workspace, until="answer", cpus=cpus) as installation:
            report["first_answer_s"] = round(installation.seconds_to["answer"], 3)
        with started(workspace=workspace, cpus=cpus) as installation:
            report["serving_s"] = round(installation.seconds_to["serving"], 3)
            step_aside(cpus)
            client = _Client(installation)
            report.update(asyncio.run(client.measure(chats, sessions, every, seconds, progress)))
    return report


class _Client:
    """Talks to an installation through gRPC and HTTP, and times it."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._grpc, self._http = installation.grpc, installation.http
        self._bearer = installation.bearer
        self._metadata = (("authorization", self._bearer),)
        self._random = random.Random(1)

    async def measure(
        self, chats: int, sessions: int, every: float, seconds: float, progress: Callable[[str], None]
    ) -> dict[str, Any]:
        """Return the figures of an installation that serves."""
        channels = [aio.insecure_channel(self._grpc) for _ in range(4)]
        self._stubs: list[Any] = [chat_pb2_grpc.ChatServiceStub(channel) for channel in channels]
        progress(f"{chats} first chats through gRPC, then {chats} through HTTP")
        through_grpc = [await self._through_grpc(f"first-{number}") for number in range(chats)]
        async with aiohttp.ClientSession() as http:
            through_http = [await self._through_http(http) for _ in range(chats)]
        figures: dict[str, Any] = {
            "first_token_grpc_ms": spread(through_grpc),
            "first_token_http_ms": spread(through_http),
            "memory_mb": self._installation.memory(),
        }
        if sessions:
            progress(f"{sessions} sessions, each speaking every {every:g} s, for {seconds:g} s")
            figures["sessions"] = await self._many(sessions, every, seconds)
            figures["memory_after_sessions_mb"] = self._installation.memory()
        for channel in channels:
            await channel.close()
        return figures

    async def _through_grpc(self, session: str) -> float:
        turn = chat_pb2.TurnInput(
            session=f"sessions/{session}", parts=[message_pb2.Part(text=self._random.choice(QUESTIONS))]
        )
        stub = self._stubs[hash(session) % len(self._stubs)]
        began = time.perf_counter()
        first = 0.0
        async for response in stub.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self._metadata):
            kind = response.event.WhichOneof("kind")
            if kind == "text_delta" and not first:
                first = time.perf_counter() - began
            if kind == "failed":
                raise RuntimeError(f"a turn failed: {response.event.failed.message}")
        if not first:
            raise RuntimeError("a turn had no text")
        return first

    async def _through_http(self, http: aiohttp.ClientSession) -> float:
        body = {
            "model": "default",
            "stream": True,
            "messages": [{"role": "user", "content": self._random.choice(QUESTIONS)}],
        }
        began = time.perf_counter()
        url = f"{self._http}/v1/chat/completions"
        first = 0.0
        async with http.post(url, json=body, headers={"Authorization": self._bearer}) as response:
            response.raise_for_status()
            async for line in response.content:
                if not first and line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if choices and choices[0]["delta"].get("content"):
                        first = time.perf_counter() - began
        if not first:
            raise RuntimeError("an answer had no text")
        return first

    async def _many(self, sessions: int, every: float, seconds: float) -> dict[str, Any]:
        """Let each session speak every `every` seconds from a place of its own in time on."""
        loop = asyncio.get_running_loop()
        latencies: list[float] = []
        errors: list[str] = []
        start = loop.time() + 0.5

        async def speak(session: str) -> None:
            try:
                latencies.append(await self._through_grpc(session))
            except (grpc.RpcError, RuntimeError) as error:
                errors.append(str(error))

        async def live(number: int) -> None:
            async with asyncio.TaskGroup() as turns:
                at = start + every * number / sessions
                while at < start + seconds:
                    await asyncio.sleep(at - loop.time())
                    turns.create_task(speak(f"many-{number}"))
                    at += every

        await asyncio.gather(*(live(number) for number in range(sessions)))
        return {
            "sessions": sessions,
            "every_s": every,
            "seconds": seconds,
            "turns": len(latencies),
            "errors": len(errors),
            "first_error": errors[0] if errors else "",
            "first_token_ms": spread(latencies),
        }
