"""What streams leave behind, whole ones and ones broken off: in a core, and in a bare grpc.aio server.

`python tests/faults/broken_streams.py --streams 100000` prints by how many bytes a stream the native memory in use grew
(glibc's own count, after a collection of Python's garbage), and the resident memory, for each server and kind.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import uvloop
from grpc import aio
from moltbot.v1 import chat_pb2, message_pb2
from moltbot_server.testing import running_server

_AT_ONCE = 32
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
_KINDS = ("whole", "broken off")
_COUNTS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
"""What `mallinfo2` tells, in its order."""


class _MallocState(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _COUNTS)


def memory() -> dict[str, int]:
    """Return how many bytes of native memory are in use, Python's small objects left out, and how many are resident."""
    gc.collect()
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _MallocState
    state = ask()
    return {"native": state.uordblks + state.hblkhd, "resident": psutil.Process().memory_info().rss}


# --- the servers, each a process of its own --------------------------------------------------------------------------


class _Bare(grpc.GenericRpcHandler):
    """Answers a stream of three words, or a word and silence."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return the handler of a method."""
        return grpc.unary_stream_rpc_method_handler(_silent if "Silent" in details.method else _whole)


async def _whole(request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
    for _ in range(3):
        yield b"word"


async def _silent(request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
    yield b"word"
    await asyncio.Event().wait()  # until the caller leaves


async def _serve_bare() -> None:
    server = aio.server(handlers=[_Bare()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await _tell({"address": f"127.0.0.1:{port}", "key": ""}, lambda: 0)


async def _serve_core() -> None:
    with tempfile.TemporaryDirectory(prefix="moltbot-streams-") as folder:
        async with running_server(Path(folder) / "w") as server:
            await _tell({"address": server.address, "key": server.key}, lambda: len(server.core.journal))


async def _tell(where: dict[str, str], under_way: Callable[[], int]) -> None:
    """Say where the server is, and what its memory is each time that somebody asks; return when nobody will."""
    print(json.dumps(where), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps({"under_way": under_way(), **memory()}), flush=True)


# --- the callers -----------------------------------------------------------------------------------------------------


async def _read(call: Any, kind: str) -> None:
    """Read a stream to its end, or to its first word."""
    while (response := await call.read()) is not aio.EOF:
        if kind == "broken off" and (isinstance(response, bytes) or response.event.HasField("text_delta")):
            call.cancel()
            await call.code()
            return


def _asks_bare(channel: aio.Channel, key: str) -> Callable[[str], Awaitable[None]]:
    methods = {"whole": channel.unary_stream("/bare/Whole"), "broken off": channel.unary_stream("/bare/Silent")}
    return lambda kind: _read(methods[kind](b""), kind)


def _asks_core(channel: aio.Channel, key: str) -> Callable[[str], Awaitable[None]]:
    # Without what is generated for services: those stubs are no easier on memory, and say less.
    method = channel.unary_stream(
        "/moltbot.v1.ChatService/StreamTurn",
        request_serializer=chat_pb2.StreamTurnRequest.SerializeToString,
        response_deserializer=chat_pb2.StreamTurnResponse.FromString,
    )
    metadata = (("authorization", f"Bearer {key}"),)
    turns = {
        kind: chat_pb2.TurnInput(
            parts=[message_pb2.Part(text=text)], transcript=chat_pb2.Transcript(), cancel_on_disconnect=True
        )
        for kind, text in zip(_KINDS, ("#3", "#100 pace=0.2"), strict=True)
    }
    return lambda kind: _read(method(chat_pb2.StreamTurnRequest(turn=turns[kind]), metadata=metadata), kind)


async def _make(ask: Callable[[str], Awaitable[None]], kind: str, streams: int) -> None:
    left = iter(range(streams))

    async def one_by_one() -> None:
        for _ in left:
            await ask(kind)

    await asyncio.gather(*(one_by_one() for _ in range(_AT_ONCE)))


@asynccontextmanager
async def _server(what: str) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    environ = {**os.environ, "MALLOC_ARENA_MAX": "2"}  # as `moltbot start` has it
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", what, stdin=PIPE, stdout=PIPE, env=environ
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()  # nobody asks any more
        await process.wait()


async def _measure(what: str, kinds: Sequence[str], streams: int, rounds: int) -> None:
    async with _server(what) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        where = json.loads(await process.stdout.readline())

        async def now() -> dict[str, int]:
            while True:
                process.stdin.write(b"\n")
                told = json.loads(await process.stdout.readline())
                if not told.pop("under_way"):  # turns whose callers have left end soon
                    return dict(told)

        async with aio.insecure_channel(where["address"], options=_OPTIONS) as channel:
            ask = (_asks_bare if what == "bare" else _asks_core)(channel, where["key"])
            for kind in kinds:
                await _make(ask, kind, streams // 5)  # which fills what is kept at hand
                before = await now()
                for _ in range(rounds):
                    await _make(ask, kind, streams)
                    after = await now()
                    grown = {name: round((after[name] - before[name]) / streams, 2) for name in after}
                    print(json.dumps({"server": what, "kind": kind, "streams": streams, "grown": grown}), flush=True)
                    before = after


async def _run(flags: argparse.Namespace) -> None:
    if flags.serve:
        await (_serve_bare() if flags.serve == "bare" else _serve_core())
        return
    for what in flags.servers:
        await _measure(what, flags.kinds, flags.streams, flags.rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="Look what streams leave behind, in a bare server and in a core.")
    parser.add_argument("--streams", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=1, help="of so many streams each; a leak is in all of them")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS)
    parser.add_argument("--servers", nargs="+", choices=("bare", "core"), default=("bare", "core"))
    parser.add_argument("--serve", choices=("bare", "core"), help=argparse.SUPPRESS)
    uvloop.run(_run(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
