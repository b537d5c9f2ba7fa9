"""The adapter as a process: its ready line, its exit statuses, what it logs."""

import asyncio
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from moltbot_adapters.http import process
from moltbot_adapters.http.settings import parse
from scripted_core import KEY

ASK = {"model": "moltbot", "messages": [{"role": "user", "content": "planted words"}], "stream": True}
BEARER = {"Authorization": f"Bearer {KEY}"}


@asynccontextmanager
async def _process(
    settings, *more: str, env: dict[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moltbot_adapters", "http", "--key-file", str(settings.key_file),
        "--state", str(settings.state), "--core", settings.core, "--log-json", *more,
        stderr=asyncio.subprocess.PIPE, env={**os.environ, **(env or {})},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _ready(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(20):
        line = json.loads(await process.stderr.readline())
    assert line["message"] == "listening"
    return f"http://127.0.0.1:{line['port']}"


async def _end(process: asyncio.subprocess.Process) -> tuple[int, str]:
    async with asyncio.timeout(20):
        said = (await process.stderr.read()).decode()
        return await process.wait(), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_says_when_it_listens_and_leaves_with_status_0(settings, number):
    async with _process(settings, "--port", "0") as process:
        url = await _ready(process)
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as answer:
            assert answer.status == 200
        process.send_signal(number)
        assert (await _end(process))[0] == 0


async def test_a_stream_that_runs_is_let_end_before_it_leaves(settings, core):
    core.script.gate = asyncio.Event()
    async with _process(settings, "--port", "0") as process, aiohttp.ClientSession() as session:
        url = await _ready(process)
        async with session.post(f"{url}/v1/chat/completions", json=ASK, headers=BEARER) as answer:
            process.send_signal(signal.SIGTERM)
            while json.loads(await process.stderr.readline())["message"] != "leaving":
                pass
            core.script.gate.set()
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        assert (await _end(process))[0] == 0


async def test_a_second_signal_cuts_the_grace_short(settings, core):
    core.script.gate = asyncio.Event()
    async with _process(settings, "--port", "0") as process, aiohttp.ClientSession() as session:
        url = await _ready(process)
        answer = await session.post(f"{url}/v1/chat/completions", json=ASK, headers=BEARER)
        process.send_signal(signal.SIGTERM)
        while json.loads(await process.stderr.readline())["message"] != "leaving":
            pass
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(2):
            assert (await _end(process))[0] == 0
        answer.close()


async def test_it_answers_on_a_socket_of_its_own_while_it_runs_whatever_the_core_does(settings, core, tmp_path):
    core.script.gate = asyncio.Event()
    path = tmp_path / "http.sock"
    async with _process(settings, "--port", "0", "--pulse", str(path)) as process, aiohttp.ClientSession() as session:
        url = await _ready(process)
        async with session.post(f"{url}/v1/chat/completions", json=ASK, headers=BEARER) as answer:
            assert (await _asked(path)).startswith(b"HTTP/1.0 200 OK\r\n")
            process.send_signal(signal.SIGTERM)
            while json.loads(await process.stderr.readline())["message"] != "leaving":
                pass
            assert (await _asked(path)).endswith(b'{"status": "ok"}\n')  # it leaves, and does not stand still
            core.script.gate.set()
            await answer.read()
        assert (await _end(process))[0] == 0
    assert not path.exists()


async def _asked(path: Path) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET /health HTTP/1.0\r\n\r\n")
    said = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return said


async def test_a_place_for_its_socket_that_cannot_be_used_is_told_with_status_78(settings, tmp_path):
    async with _process(settings, "--port", "0", "--pulse", str(tmp_path / "nowhere" / "http.sock")) as process:
        status, said = await _end(process)
    assert status == 78
    assert said.startswith(f"moltbot http: the socket {tmp_path}/nowhere/http.sock cannot be made")


@pytest.mark.parametrize("what", ["build_app", "pulse.listen"])
async def test_a_full_disk_is_told_with_status_69_which_services_try_again(settings, monkeypatch, capsys, what):
    def full(*_):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "place")
        except OSError as error:
            raise (OSError("a socket cannot be made") if "pulse" in what else error) from error

    monkeypatch.setattr(f"moltbot_adapters.http.process.{what}", full)
    words = ["--key-file", str(settings.key_file), "--state", str(settings.state), "--pulse", "socket"]
    assert await process.serve(parse([*words, "--core", settings.core])) == 69
    assert capsys.readouterr().err == "moltbot http: the disk is full: make room, and start it again\n"


async def test_a_port_in_use_is_one_clear_line_and_status_1(settings):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with _process(settings, "--port", port) as process:
            status, said = await _end(process)
    assert status == 1
    assert said == f"moltbot http: port {port} on 127.0.0.1 is in use; choose another one with --port\n"


async def test_two_workers_can_share_a_port(settings):
    async with _process(settings, "--port", "0", "--reuse-port") as first:
        port = (await _ready(first)).rpartition(":")[2]
        async with _process(settings, "--port", port, "--reuse-port") as second:
            assert (await _ready(second)).endswith(port)
        async with _process(settings, "--port", port) as third:
            assert (await _end(third))[0] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "refusing to listen on 0.0.0.0"),
        (("--host", "::"), "name its address with --trusted-proxy"),
        (("--key-file", "/nowhere/key"), "/nowhere/key"),
        (("--key-file", "/dev/null"), "holds no key"),
        (("--state", "/dev/null/x"), "/dev/null"),
    ],
)
async def test_settings_that_cannot_be_used_are_told_in_one_line_with_status_78(settings, arguments, said):
    async with _process(settings, *arguments) as process:
        status, line = await _end(process)
    assert status == 78
    assert said in line
    assert line.count("\n") == 1


async def test_a_declared_proxy_opens_the_port(settings):
    async with _process(
        settings, "--host", "0.0.0.0", "--port", "0", "--trusted-proxy", "10.0.0.0/8", "192.168.0.1"
    ) as process:
        await _ready(process)


async def test_an_unknown_adapter_is_a_usage_error():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moltbot_adapters", "telex", stderr=asyncio.subprocess.PIPE
    )
    assert (await _end(process))[0] == 64


async def test_the_log_holds_neither_words_nor_keys_nor_cookies(settings, core):
    async with _process(settings, "--port", "0", "--log-level", "debug") as process, aiohttp.ClientSession() as session:
        url = await _ready(process)
        async with session.post(f"{url}/v1/chat/completions", json=ASK, headers=BEARER) as answer:
            await answer.read()
        async with session.get(f"{url}/login?code=planted-code%0aforged") as answer:
            await answer.read()
        headers = {"X-MoltBot": "1", "Origin": url}
        async with session.post(f"{url}/api/login", json={"key": KEY}, headers=headers) as answer:
            cookie = answer.headers["Set-Cookie"].partition("=")[2].partition(";")[0]
        async with session.get(f"{url}/planted%0apath", headers={"User-Agent": "planted agent"}) as answer:
            assert answer.status == 404
        process.send_signal(signal.SIGTERM)
        status, said = await _end(process)
    assert status == 0
    entries = [json.loads(line) for line in said.splitlines()]
    assert next(entry["route"] for entry in entries if entry["message"] == "request") == "/v1/chat/completions"
    for secret in ("planted", KEY, cookie, "forged", "Hello"):
        assert secret not in said


async def test_workers_count_together(settings, tmp_path):
    shared = tmp_path / "metrics"
    shared.mkdir()
    env = {"PROMETHEUS_MULTIPROC_DIR": str(shared)}
    async with (
        _process(settings, "--port", "0", env=env) as first,
        _process(settings, "--port", "0", env=env) as second,
        aiohttp.ClientSession() as session,
    ):
        urls = [await _ready(first), await _ready(second)]
        for url in urls:
            async with session.get(f"{url}/v1/models", headers=BEARER) as answer:
                assert answer.status == 200
        async with session.get(f"{urls[0]}/metrics") as answer:
            text = await answer.text()
    line = 'moltbot_http_requests_total{method="GET",reason="",route="/v1/models",status="200"} 2.0'
    assert line in text.splitlines()
