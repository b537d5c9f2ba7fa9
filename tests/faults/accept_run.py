"""Has turns accepted by a core that strace looks at: each is written, then synced, then told (S14 of docs/faults.md).

`python tests/faults/accept_run.py --accepts 1000` ends with one line, and 1 when one was told too early.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fault_load import reason_of
from fault_nodes import Node, Setup
from fault_report import machine
from fault_tracing import calls, traced, why_not
from grpc import StatusCode, aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2

_TOGETHER = 10
# With the path of each file: what is written to the files of turns under way is told to nobody yet.
_WATCHED = ("-y", "-e", "trace=pwrite64,fdatasync,fsync,sendmsg,sendto,write,writev")
_JOURNAL = "moltbot.db-turns/"


class Caller:
    """Asks a core for turns."""

    def __init__(self, node: Node) -> None:
        self.channel = aio.insecure_channel(node.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.chat = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.metadata = (("authorization", f"Bearer {node.setup.key}"),)

    async def accepted(self, request: str) -> str:
        """Start a turn and return its name when it is acknowledged; leave it then."""
        turn = chat_pb2.TurnInput(parts=[message_pb2.Part(text="q1.1 long")], request_id=request)
        call = self.chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self.metadata)
        try:
            response = await call.read()
            if response is aio.EOF:
                raise AssertionError(await call.details())
            return str(response.event.accepted.turn)
        finally:
            call.cancel()

    async def refused(self, request: str) -> tuple[StatusCode, str]:
        """Start a turn that is not accepted, and return why."""
        try:
            turn = await self.accepted(request)
        except aio.AioRpcError as error:
            return error.code(), reason_of(error)
        raise AssertionError(f"{turn} was accepted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What a trace shows: acceptances that were written and told, how many syncs there were, and who was told early."""

    accepts: int
    written: int
    told: int
    syncs: int
    early: tuple[str, ...]


async def trace(node: Node, output: Path, accepts: int) -> Traced:
    """Have so many turns accepted, some at the same time, and return what the trace of the core shows."""
    caller = Caller(node)
    names = [f"accept-{number:05}-end" for number in range(accepts)]
    async with traced(node.process_id, output, *_WATCHED):
        for start in range(0, accepts, _TOGETHER):
            await asyncio.gather(*map(caller.accepted, names[start : start + _TOGETHER]))
    await caller.channel.close()
    return await asyncio.to_thread(_read, output, names)


def _read(output: Path, names: Sequence[str]) -> Traced:
    written: dict[str, int] = {}
    told: dict[str, int] = {}
    synced: list[tuple[int, int]] = []
    for call in calls(output):
        if call.name in ("fdatasync", "fsync") and not call.error:
            synced.append((call.began, call.ended))
        if "accept-" not in call.given:
            continue
        for name in {call.given[at : at + 16] for at in _places(call.given)}.intersection(names):
            if call.name == "pwrite64":
                written.setdefault(name, call.ended)
            elif call.name.startswith(("send", "write")) and _JOURNAL not in call.given.partition(",")[0]:
                told.setdefault(name, call.began)
    early = [
        name
        for name in names
        if name not in written
        or name not in told
        or not any(written[name] <= began and ended <= told[name] for began, ended in synced)
    ]
    return Traced(accepts=len(names), written=len(written), told=len(told), syncs=len(synced), early=tuple(early))


def _places(text: str) -> list[int]:
    found, at = [], text.find("accept-")
    while at >= 0:
        found.append(at)
        at = text.find("accept-", at + 1)
    return found


async def _run(accepts: int, folder: Path) -> Traced:
    setup = Setup(folder=folder)
    setup.prepare()
    node = Node(setup, "n0", lambda entry: None)
    await node.start()
    try:
        await node.ready()
        return await trace(node, folder / "trace.txt", accepts)
    finally:
        await node.end_all()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; return 1 when an acceptance was told too early, 2 where nothing can be traced."""
    parser = argparse.ArgumentParser(description="Trace acceptances: each is on the disk before it is told.")
    parser.add_argument("--accepts", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    flags = parser.parse_args(arguments)
    if problem := why_not():
        print(problem)
        return 2
    with tempfile.TemporaryDirectory(prefix="moltbot-accepts-") as folder:
        found = asyncio.run(_run(flags.accepts, Path(folder)))
    version = subprocess.run(["strace", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    if flags.json:
        report = {
            **asdict(found),
            "command": f"python tests/faults/accept_run.py --accepts {flags.accepts}",
            "machine": machine() | {"strace": version},
        }
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"accepts={found.accepts} written={found.written} told={found.told} syncs={found.syncs} "
        f"told_before_synced={len(found.early)}"
    )
    return 1 if found.early else 0


if __name__ == "__main__":
    sys.exit(main())
