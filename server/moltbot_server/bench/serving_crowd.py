"""Load processes that act as one, and the figures of what they bring home."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any

import grpc
import msgspec
from moltbot.v1 import session_pb2, session_pb2_grpc

from moltbot_server.bench.installation import Installation, spread
from moltbot_server.bench.processes import Child
from moltbot_server.bench.serving_calls import Ended
from moltbot_server.bench.serving_load import Haul, Job, Plan

HEAD_START = 0.2
"""Seconds until a job begins, so that every process has heard of it."""


class Crowd:
    """Processes that make one load together, each with its share."""

    def __init__(
        self, stack: contextlib.ExitStack, installation: Installation, processes: int, *, engine: bool = False
    ) -> None:
        """Start them; the stack ends them. `engine`: they ask the engine role and not the core."""
        self._children = [stack.enter_context(Child("moltbot_server.bench.serving_load")) for _ in range(processes)]
        address = installation.engine if engine else installation.grpc
        key = installation.workspace.read_key()
        for number, child in enumerate(self._children):
            child.tell(_line(Plan(address=address, key=key, engine=engine, seed=number)))
        for child in self._children:
            child.read()
        self._endless = False

    def begin(self, job: Job) -> float:
        """Let a job begin, its rate and streams shared out; return when it does, on `perf_counter`."""
        count = len(self._children)
        begin = job.begin or time.perf_counter() + HEAD_START
        self._endless = not job.seconds
        for number, child in enumerate(self._children):
            share = msgspec.structs.replace(
                job,
                begin=begin,
                rate=job.rate / count,
                streams=job.streams // count + (number < job.streams % count),
                conversations=-(-job.conversations // count),
            )
            child.tell(_line(share))
        return begin

    def end(self) -> Haul:
        """Wait for the end of the job, or tell it to end if it has none of its own; return what became of it."""
        if self._endless:
            for child in self._children:
                child.tell("")
        hauls = [msgspec.convert(child.read(), Haul) for child in self._children]
        return Haul(
            ended=[call for haul in hauls for call in haul.ended],
            sessions={name: count for haul in hauls for name, count in haul.sessions.items()},
        )

    def run(self, job: Job) -> Haul:
        """Do a job that has an end; return what became of it."""
        self.begin(job)
        return self.end()

    def cpu_seconds(self) -> float:
        """Return the processor time that the processes have used."""
        return sum(child.cpu_seconds() for child in self._children)


def good(calls: Iterable[Ended]) -> list[Ended]:
    """Return the calls that were answered."""
    return [call for call in calls if call.status == "OK"]


def failures(calls: Iterable[Ended]) -> dict[str, Any]:
    """Count the calls that were not answered by status, reason and whether they had become a turn, with an example."""
    found: dict[str, list[str]] = {}
    for call in calls:
        if call.status != "OK":
            kind = f"{call.status} {call.reason}{' after accepted' * call.accepted}".strip()
            found.setdefault(kind, []).append(call.text)
    return {kind: {"calls": len(said), "example": said[0]} for kind, said in found.items()}


def times(calls: list[Ended], *, since_due: bool = False) -> dict[str, Any]:
    """Return the first token and the whole answer of answered calls in milliseconds, since sent or since due."""
    began = [call.due if since_due else call.sent for call in calls]
    return {
        "first_token_ms": spread([call.first - at for call, at in zip(calls, began, strict=True)]),
        "full_response_ms": spread([call.ended - at for call, at in zip(calls, began, strict=True)]),
    }


def lateness(calls: list[Ended]) -> dict[str, float]:
    """Return how late the load itself was, in milliseconds."""
    return spread([call.sent - call.due for call in calls])


def missing_messages(installation: Installation, sessions: dict[str, int], most: int = 200) -> int:
    """Return how many messages of completed turns are not in their sessions, looking at up to `most` of those."""
    step = max(1, len(sessions) // most)
    missing = 0
    with grpc.insecure_channel(installation.grpc) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        for name, turns in list(sessions.items())[::step]:
            if turns:
                request = session_pb2.GetSessionRequest(name=name)
                found = stub.GetSession(request, metadata=(("authorization", installation.bearer),), timeout=10)
                missing += max(0, 2 * turns - found.session.message_count)
    return missing


def bar(value: float | None, relation: str, limit: float) -> dict[str, Any]:
    """Return a figure beside what it has to be: `<`, `<=` or `>=` a limit. What could not be measured is not met."""
    met = value is not None and {"<": value < limit, "<=": value <= limit, ">=": value >= limit}[relation]
    return {"value": value, "bar": f"{relation} {limit:g}", "met": met}


def _line(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()
