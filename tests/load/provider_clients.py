"""Compares clients of model providers by what a call and a streamed chunk cost in CPU time of the calling process.

The mock provider runs in a process of its own and sends each chunk by itself (`pace`), so that no client gets by with
one read for many. Each arm is a process of its own on uvloop: `--streams` calls at the same time, again and again,
once with answers of one chunk and once with answers of `--chunks`. The first gives the cost of a call, the difference
that of a chunk. Rounds go through the arms in turn, so that the drift of a shared machine falls on all of them.

    python tests/load/provider_clients.py --rounds 5 --out result.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

ARMS = ("ours-openai", "aiohttp-openai", "sdk-openai", "ours-anthropic", "sdk-anthropic")
WORD = "a word "
Ask = Callable[[], Awaitable[str]]


def main() -> None:
    """Runs one arm if asked to, else all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arm", choices=ARMS, help="measure one arm in this process and print it")
    parser.add_argument("--address", default="", help="of the mock provider, for --arm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--calls", type=int, default=480, help="calls of each arm in each part of a round")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(uvloop.run(measured(options.arm, options.address, options.streams, options.calls))))
        return
    result = compared(options.rounds, options.streams, options.chunks, options.calls)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n", "utf-8")
    print(text)


def compared(rounds: int, streams: int, chunks: int, calls: int) -> dict[str, Any]:
    """Answers the median of each arm over the rounds, in microseconds of CPU time."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            with mock(chunks=1) as address:
                short = child(arm, address, streams, calls)
            with mock(chunks=chunks) as address:
                long = child(arm, address, streams, calls)
            chunk = (long["cpu_us"] - short["cpu_us"]) / (chunks - 1)
            call = short["cpu_us"] - chunk
            found[arm].append({"call_us": call, "chunk_us": chunk, **{f"long_{key}": long[key] for key in long}})
    medians = {
        arm: {key: round(statistics.median(each[key] for each in trials), 2) for key in trials[0]}
        for arm, trials in found.items()
    }
    settings = {
        "rounds": rounds,
        "streams": streams,
        "chunks": chunks,
        "calls": calls,
        "python": platform.python_version(),
    }
    settings["python"] = platform.python_version()
    return {"settings": settings, "arms": medians, "imports": {arm: imports(arm) for arm in ARMS}}


def child(arm: str, address: str, streams: int, calls: int) -> dict[str, float]:
    """Runs one arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--address", address, "--streams", str(streams)]
    done = subprocess.run([*command, "--calls", str(calls)], check=True, capture_output=True, timeout=300)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@contextmanager
def mock(chunks: int) -> Iterator[str]:
    """A mock provider that sends so many chunks, each by itself."""
    script = {"text": WORD * chunks, "chunks": chunks, "pace": "5ms", "first_token": "5ms", "seed": 1}
    options = json.dumps({"host": "127.0.0.1", "port": 0, "json": True, "script": script})
    command = [sys.executable, "-m", "moltbot_server.testing_provider", options]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["address"]
        finally:
            process.terminate()


def imports(arm: str) -> dict[str, float]:
    """Answers what the import of an arm's client costs: seconds, and megabytes beyond those of Python alone."""
    modules = {
        "ours": "moltbot_server.models.providers.engine",
        "aiohttp": "aiohttp, moltbot_server.models.providers.events",
        "sdk-openai": "openai",
        "sdk-anthropic": "anthropic",
    }
    name = next(module for key, module in modules.items() if arm.startswith(key))
    code = (
        "import asyncio, json, resource, time, uvloop, msgspec;"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024;"
        f"m, t = rss(), time.process_time(); import {name};"
        "print(json.dumps({'cpu_s': round(time.process_time() - t, 3), 'mb': round(rss() - m, 1)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


async def measured(arm: str, address: str, streams: int, calls: int) -> dict[str, float]:
    """Answers the CPU time of a call, and its time to the first text and to the end, as this process sees them."""
    ask, close = await CLIENTS[arm](address)
    await asyncio.gather(*(ask() for _ in range(streams)))  # connections are made, imports done
    left = calls
    lengths: set[int] = set()

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            lengths.add(len(await ask()))

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(streams)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    await close()
    assert len(lengths) == 1, lengths
    assert min(lengths) % len(WORD) == 0, lengths
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_us": cpu / calls * 1e6, "wall_ms": wall / calls * 1e3 * streams, "rss_mb": rss}


Client = Callable[[str], Awaitable[tuple[Ask, Callable[[], Awaitable[None]]]]]


def ours(dialect: str) -> Client:
    """The client of this project."""

    async def made(address: str) -> tuple[Ask, Callable[[], Awaitable[None]]]:
        from moltbot_server.config_models import Provider, ProviderModel
        from moltbot_server.models.engine import Finished
        from moltbot_server.models.providers import ProviderEngine, ProviderKey
        from moltbot_server.turns import GenerationOptions, Message, Role, TextPart

        class OneKey:
            def keys(self, provider: str) -> Sequence[ProviderKey]:
                return (ProviderKey(id="one", text="a-key"),)

        class Heard:
            def __init__(self) -> None:
                self.pieces: list[str] = []
                self.end: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()

            def wrote(self, text: str, tokens: int) -> None:
                self.pieces.append(text)

            def queued(self, position: int) -> None:
                pass

            def thought(self, text: str) -> None:
                pass

            def noted(self, what: object) -> None:
                pass

            def ended(self, end: Finished | Exception) -> None:
                if isinstance(end, Exception):
                    self.end.set_exception(end)
                else:
                    self.end.set_result(end)

        provider = Provider(name="mock", dialect=dialect, base_url=address)  # type: ignore[arg-type]
        engine = ProviderEngine(provider, ProviderModel(name="mock-model"), keys=OneKey())
        await engine.start()
        messages = (Message(role=Role.USER, parts=(TextPart(text="Say it"),)),)

        async def ask() -> str:
            heard = Heard()
            engine.begin(messages, GenerationOptions(max_output_tokens=100), heard)
            await heard.end
            return "".join(heard.pieces)

        return ask, engine.close

    return made


async def on_aiohttp(address: str) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    """Our readers of the dialect on aiohttp's client."""
    import aiohttp
    import msgspec
    from moltbot_server.models.providers.events import EventLines
    from moltbot_server.models.providers.openai_reading import OpenAIReading

    session = aiohttp.ClientSession(headers={"Authorization": "Bearer a-key"})

    class Heard(list[str]):
        def wrote(self, text: str, tokens: int) -> None:
            self.append(text)

    async def ask() -> str:
        body = msgspec.json.encode(
            {
                "model": "mock-model",
                "messages": [{"role": "user", "content": "Say it"}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": 100,
            }
        )
        heard = Heard()
        reading, lines = OpenAIReading(heard, ()), EventLines()  # type: ignore[arg-type]
        url, headers = f"{address}/v1/chat/completions", {"Content-Type": "application/json"}
        async with session.post(url, data=body, headers=headers) as response:
            async for data in response.content.iter_any():
                reading.read(lines.feed(data))
        return "".join(heard)

    return ask, session.close


async def openai_sdk(address: str) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    """The official client of OpenAI."""
    import openai

    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="a-key", max_retries=0)

    async def ask() -> str:
        stream = await client.chat.completions.create(
            model="mock-model",
            messages=[{"role": "user", "content": "Say it"}],
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=100,
        )
        pieces = []
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
        return "".join(pieces)

    return ask, client.close


async def anthropic_sdk(address: str) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    """The official client of Anthropic."""
    import anthropic

    client = anthropic.AsyncAnthropic(base_url=address, api_key="a-key", max_retries=0)

    async def ask() -> str:
        stream = await client.messages.create(
            model="mock-model", messages=[{"role": "user", "content": "Say it"}], max_tokens=100, stream=True
        )
        pieces = []
        async for event in stream:
            if event.type == "content_block_delta" and event.delta.type == "text_delta":
                pieces.append(event.delta.text)
        return "".join(pieces)

    return ask, client.close


CLIENTS: dict[str, Client] = {
    "ours-openai": ours("openai"),
    "aiohttp-openai": on_aiohttp,
    "sdk-openai": openai_sdk,
    "ours-anthropic": ours("anthropic"),
    "sdk-anthropic": anthropic_sdk,
}


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
