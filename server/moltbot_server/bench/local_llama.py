"""llama.cpp's server beside, for who has built one: the same shape of model, the same load, through its HTTP API.

The model is a GGUF file of random weights with the sizes of `random_model.STANDARD`, in Q8_0. Prompts are token ids,
all different, and no cache of prompts is used, so that each answer pays for the whole of its prompt, as those of a
MoltBot do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop

from moltbot_server.bench.local_prompts import Workload
from moltbot_server.bench.local_rig import Busy, Counted
from moltbot_server.models.meter import Answer, Window
from moltbot_server.turns import Value

_WORDS = Workload(shortest=128, longest=128, new=64)
_SLOTS = 16
_READY = 60.0
_FIRST_ID, _IDS = 300, 30_000


class Llama(Value, frozen=True, kw_only=True):
    """The program `llama-server`, a GGUF file, and how many threads it computes with."""

    server: Path
    gguf: Path
    threads: int


class LlamaServer:
    """A llama.cpp server that runs until `stack` ends."""

    def __init__(self, stack: contextlib.ExitStack, llama: Llama) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}"
        context = _SLOTS * 2 * (_WORDS.longest + _WORDS.new)
        given = ("-m", str(llama.gguf), "-t", str(llama.threads), "-np", str(_SLOTS), "-c", str(context), "-cb")
        self._process = subprocess.Popen(
            [str(llama.server), *given, "--host", "127.0.0.1", "--port", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        stack.callback(self._end)
        uvloop.run(self._ready())

    def streamed(self, streams: int, seconds: float) -> Counted:
        """Count what it streams to so many at a time."""
        busy = Busy({"llama": psutil.Process(self._process.pid), "client": psutil.Process()})
        return uvloop.run(self._count(streams, seconds)) | {"processors": busy.read()}

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait()

    async def _ready(self) -> None:
        async with asyncio.timeout(_READY), aiohttp.ClientSession() as http:
            while self._process.poll() is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"{self._address}/health") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.1)  # it has no other sign
        raise RuntimeError(f"llama-server ended early, with exit code {self._process.returncode}")

    async def _count(self, streams: int, seconds: float) -> Counted:
        over = asyncio.Event()
        window = Window(streams, seconds=seconds, warm=1.0, over=over.set)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # it closes each connection after an answer

        async def work(worker: int) -> None:
            chance = random.Random(worker)
            while True:
                window.ended(worker, await self._turn(http, chance))

        async with aiohttp.ClientSession(connector=connector) as http:
            try:
                async with asyncio.TaskGroup() as group:
                    workers = [group.create_task(work(worker)) for worker in range(streams)]
                    await over.wait()
                    for task in workers:
                        task.cancel()
            except ExceptionGroup as failed:
                raise RuntimeError(f"llama-server failed: {failed.exceptions[0]}") from failed
        return window.counted()

    async def _turn(self, http: aiohttp.ClientSession, chance: random.Random) -> Answer:
        body = {
            "prompt": [1, *(_FIRST_ID + chance.randrange(_IDS) for _ in range(_WORDS.longest - 1))],
            "n_predict": _WORDS.new,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        asked, first, tokens = time.perf_counter(), 0.0, 0
        async with http.post(f"{self._address}/completion", json=body) as answer:
            answer.raise_for_status()
            async for event in _events(answer):
                if not event.get("stop"):
                    first = first or time.perf_counter()
                    tokens += len(event["tokens"])
        if tokens < _WORDS.new - 1:
            raise RuntimeError(f"an answer had {tokens} tokens; expected {_WORDS.new}")
        return Answer(asked, first, time.perf_counter(), tokens)


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
