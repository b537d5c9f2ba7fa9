"""People with streams: they ask, read, think, lose the line and go on, until all that they asked is answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

from fault_history import Closed, Entry, Opened, Told
from fault_nodes import TAILS, Node
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2

# A client that comes back soon after its core does: gRPC itself waits longer and longer, up to two minutes.
_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]
_MOST_TRIES = 5000
"""So often that people outstay any number of deaths: a run waits for them at its end, and not longer than it says."""
_AGAIN = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"}


class Lines:
    """The connections of some people to the nodes: a channel to each."""

    def __init__(self, nodes: Sequence[Node], key: str, *, sticky: bool = False) -> None:
        """`sticky`: each session has a node of its own, and asks no other."""
        self.nodes = nodes
        self._sticky = sticky
        self.metadata = (("authorization", f"Bearer {key}"),)
        self._channels = {node.address: aio.insecure_channel(node.address, options=_OPTIONS) for node in nodes}

    def chat(self, dice: random.Random, session: str) -> chat_pb2_grpc.ChatServiceStub:
        """Return the service at the session's node, or at any, rather one that serves."""
        serving = [node for node in self.nodes if node.serving.is_set()] or self.nodes
        node = self.nodes[crc32(session.encode()) % len(self.nodes)] if self._sticky else dice.choice(serving)
        return chat_pb2_grpc.ChatServiceStub(self._channels[node.address])

    async def close(self) -> None:
        """Hang up."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))


class Load:
    """Sessions in which people ask and follow, each until its turns have ended. `history` has what they were told."""

    def __init__(
        self,
        seed: int,
        nodes: Sequence[Node],
        key: str,
        *,
        sessions: int,
        kinds: Sequence[str],
        sticky: bool = False,
        follower: type[Follower] | None = None,
        lines: Callable[[], Any] | None = None,
    ) -> None:
        """`kinds` are the kinds of questions: names in `TAILS`, or none when a real model answers.

        `follower` reads what `lines` lead to; without them it is gRPC at the nodes. `sticky`: see `Lines`.
        """
        self.history: list[Entry] = []
        self.turns = 0
        self.failed = 0
        self.stopping = asyncio.Event()
        self._dice = random.Random(seed)
        self._kinds = kinds
        self._streams = 0
        self._follower = follower or Follower
        make = lines or (lambda: Lines(nodes, key, sticky=sticky))
        self._lines = [make() for _ in range(max(1, min(8, sessions // 4)))]
        self._sessions = sessions
        self._people: list[asyncio.Task[None]] = []

    def note(self, entry: Entry) -> None:
        """Take note of something."""
        self.history.append(entry)

    def begin(self) -> None:
        """Let everybody begin."""
        self._people = [asyncio.create_task(self._talk(number)) for number in range(self._sessions)]

    async def finish(self) -> None:
        """Let nobody ask anything more, and wait until all that was asked is answered."""
        self.stopping.set()
        await asyncio.gather(*self._people)
        await asyncio.gather(*(lines.close() for lines in self._lines))

    async def _talk(self, number: int) -> None:
        """Ask in one session: now one question after the other, now several at once that queue up."""
        lines = self._lines[number % len(self._lines)]
        dice = random.Random(f"{self._dice.random()}/{number}")
        session, asked = f"s{number}", 0
        await asyncio.sleep(dice.random())
        while not self.stopping.is_set():
            waiting = []
            for _ in range(dice.choice((1, 1, 1, 2, 3))):
                asked += 1
                waiting.append(asyncio.create_task(self._ask(lines, dice, session, f"q{number}.{asked}")))
                await asyncio.sleep(dice.random() * 0.1)
            await asyncio.gather(*waiting)
            await asyncio.sleep(dice.random() * 0.5)  # thinks

    async def _ask(self, lines: Any, dice: random.Random, session: str, name: str) -> None:
        kind = dice.choice(self._kinds) if self._kinds else ""
        question = f"{name} {kind}".strip() if self._kinds else f"{name} Tell me about gRPC, please."
        answer = f"said {question}{TAILS[kind]}" if kind else ""
        self.turns += 1
        for attempt in range(5):
            follower = self._follower(self, lines, dice, f"{name}/{attempt}", session, question, answer)
            if await follower.follow():
                return
        self.failed += 1

    async def ask_after(self, name: str) -> None:
        """Ask for one more turn of the history by its name, and read it from the start, as a late reader does."""
        follower = self._follower(self, self._lines[0], self._dice, f"late {name}", "", "", "")
        follower.turn = name
        await follower.follow()

    def stream(self) -> int:
        """Return the number of a new stream."""
        self._streams += 1
        return self._streams


class Follower:
    """One reader of one request."""

    def __init__(
        self, load: Load, lines: Any, dice: random.Random, name: str, session: str, question: str, answer: str
    ) -> None:
        self.load, self.lines, self.dice = load, lines, dice
        self.name, self.session, self.question, self.answer = name, session, question, answer
        self.turn = ""
        self.seen = 0
        self.ended = ""
        self.retryable = False

    async def follow(self) -> bool:
        """Stay until the end is told; tell whether that is all there is to it, or the turn is worth another try."""
        for _ in range(_MOST_TRIES):
            code = await self._read()
            if self.ended:
                return self.ended == "completed" or not self.retryable
            if code not in _AGAIN:
                return True
            await asyncio.sleep(0.02 + self.dice.random() * 0.2)
        return True

    async def _read(self) -> str:
        """Read one stream to its end or break, and return its status."""
        load = self.load
        stream = load.stream()
        if self.turn and self.dice.random() < 0.1:
            self.turn, self.seen = "", 0  # repeats its call instead, and is told everything again
        load.note(
            Opened(
                at=time.monotonic(),
                follower=self.name,
                stream=stream,
                request=self.question,
                session=self.session,
                question=self.question,
                turn=self.turn,
                after=self.seen,
                answer=self.answer,
            )
        )
        code, reason = await self.listen(stream)
        load.note(Closed(at=time.monotonic(), stream=stream, code=code, reason=reason))
        return code

    async def listen(self, stream: int) -> tuple[str, str]:
        """Hear one stream to its end, and return the status and the reason of its break; empty where it ended well."""
        try:
            async for response in self._call():
                self.hear(told(stream, response.event))
        except aio.AioRpcError as error:
            return error.code().name, reason_of(error)
        return "", ""

    def _call(self) -> aio.UnaryStreamCall:  # type: ignore[type-arg]
        session = self.turn.split("/")[1] if self.turn else self.session
        chat, metadata = self.lines.chat(self.dice, session), self.lines.metadata
        if self.turn:
            resume = chat_pb2.ResumeTurnRequest(name=self.turn, after_sequence=self.seen)
            return chat.ResumeTurn(resume, metadata=metadata)  # type: ignore[return-value]
        turn = chat_pb2.TurnInput(
            parts=[message_pb2.Part(text=self.question)],
            session=f"sessions/{self.session}",
            request_id=self.question,
        )
        return chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=metadata)  # type: ignore[return-value]

    def hear(self, entry: Told) -> None:
        """Take an event in."""
        self.load.note(entry)
        self.seen = entry.sequence
        self.turn = entry.turn or self.turn
        if entry.kind in ("completed", "failed"):
            self.ended, self.retryable = entry.kind, entry.retryable


def told(stream: int, event: chat_pb2.Event) -> Told:
    """Return what an event on the wire tells."""
    kind = str(event.WhichOneof("kind"))
    value = getattr(event, kind)
    return Told(
        at=time.monotonic(),
        stream=stream,
        sequence=event.sequence,
        kind=kind,
        turn=value.turn if kind == "accepted" else "",
        text=value.text if kind in ("text_delta", "reset", "completed") else "",
        code=value.reason if kind == "failed" else "",
        retryable=kind == "failed" and value.retryable,
    )


def reason_of(error: aio.AioRpcError) -> str:
    """Return the reason of an error of ours; empty for one of gRPC's own."""
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return ""


def pauses(history: Sequence[Entry], what: Callable[[str], bool]) -> tuple[list[float], list[float]]:
    """Return how long each stream that a fault broke was without a word: from the fault to the next event.

    Those whose new core was ended too before it said anything count from the last fault. Those during which a core
    stood still, which others cannot know, come apart, as the second list.
    """
    from fault_history import Fault

    fault, owner = 0.0, dict[int, str]()
    waiting: dict[str, float] = {}
    still, beside = set[str](), set[str]()
    found: tuple[list[float], list[float]] = [], []
    for entry in history:
        if isinstance(entry, Fault) and entry.what == "stop":
            still.add(entry.node)
            beside |= waiting.keys()
        elif isinstance(entry, Fault) and entry.what == "go_on":
            still.discard(entry.node)
        elif isinstance(entry, Fault) and what(entry.what):
            fault = entry.at
            still.discard(entry.node)
            waiting = dict.fromkeys(waiting, fault)
            beside = set(waiting) if still else set()
        elif isinstance(entry, Opened):
            owner[entry.stream] = entry.follower
        elif isinstance(entry, Closed) and entry.code and fault:
            waiting.setdefault(owner[entry.stream], fault)
            if still:
                beside.add(owner[entry.stream])
        elif isinstance(entry, Told) and (since := waiting.pop(owner[entry.stream], None)) is not None:
            found[owner[entry.stream] in beside].append(entry.at - since)
            beside.discard(owner[entry.stream])
    return found
