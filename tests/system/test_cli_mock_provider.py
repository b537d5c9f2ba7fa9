"""`moltbot mock-provider` as people run it: its help, its ready line, its script, its end."""

import asyncio
import json
import signal
import socket
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import openai
import pytest
from cli_process import Home

ASK = [{"role": "user", "content": "Say it"}]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home folder."""
    return Home(tmp_path)


@asynccontextmanager
async def provider(home: Home, *arguments: str) -> AsyncIterator[tuple[Process, str]]:
    """Run the command until it tells its address; it is ended at the end if it still runs."""
    process = await home.spawn("mock-provider", "--json", *arguments)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        yield process, json.loads(line)["address"]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.communicate()


async def test_its_help_teaches_with_examples_and_names_every_fault(home: Home) -> None:
    told = (await home.run("mock-provider", "--help")).out

    assert "moltbot mock-provider --port" in told
    assert "--workspace" not in told
    kinds = (
        "error rate_limit hang hang_after_first cut broken_sse split_utf8 slow empty endless huge "
        "wrong_content_type unauthorized"
    )
    assert [kind for kind in kinds.split() if kind not in told] == []


async def test_it_says_its_address_with_an_example_that_keeps_the_key(home: Home) -> None:
    process = await home.spawn("mock-provider", "--key", "a-secret-key")
    assert process.stdout is not None
    async with asyncio.timeout(30):
        said = [(await process.stdout.readline()).decode() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    await process.communicate()

    assert "ready on http://127.0.0.1:" in said[0]
    assert "curl -N http://127.0.0.1:" in said[1]
    assert "a-secret-key" not in "".join(said)
    assert process.returncode == 0


async def test_a_flag_goes_before_the_file(home: Home) -> None:
    (home.folder / "drill.yaml").write_text(
        "text: from the file\npace: 1ms\nfaults:\n  - {kind: error, status: 503, until: 1 call}\n"
    )
    async with (
        provider(home, "--script", "drill.yaml", "--text", "from the flag", "--usage", "3", "4") as (_, address),
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="m", messages=ASK)  # type: ignore[arg-type]
        answer = await client.chat.completions.create(model="m", messages=ASK)  # type: ignore[arg-type]
        async with aiohttp.ClientSession() as session, session.get(f"{address}/control/script") as shown:
            script = await shown.json()

    assert answer.choices[0].message.content == "from the flag"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 7
    assert script["pace"] == "0.001s"


async def test_ctrl_c_cuts_streams_and_leaves_in_peace(home: Home) -> None:
    async with provider(home, "--fault", "hang_after_first") as (process, address):
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0) as client:
            stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)  # type: ignore[call-overload]
            await anext(stream)
            process.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIConnectionError):
                [part async for part in stream]
        out, err = await process.communicate()

    assert (process.returncode, out, err) == (0, b"", b"")


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--host", "0.0.0.0"], 2, "loopback alone"),
        (["--fault", "explode"], 78, "faults[0].kind: must be one of error"),
        (["--pace", "soon"], 78, "pace: must be a duration such as 20ms"),
        (["--script", "missing.yaml"], 78, "missing.yaml"),
        (["--port", "70000"], 2, "must be a port from 0 to 65535"),
    ],
)
async def test_what_cannot_be_done_is_told_with_its_status(
    home: Home, arguments: list[str], status: int, told: str
) -> None:
    ended = await home.run("mock-provider", *arguments)

    assert ended.status == status
    assert told in ended.err
    assert "Traceback" not in ended.err


async def test_a_taken_port_is_told_with_the_way_out(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = await home.run("mock-provider", "--port", str(taken.getsockname()[1]))

    assert ended.status == 69
    assert "try --port 0" in ended.err
