"""Event streams as such: pings, readers that stop, draining, what is counted."""

import asyncio
import socket

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from running_adapter import RunningAdapter
from scripted_core import KEY
from sse_reader import frames

ASK = {"model": "moltbot", "messages": [{"role": "user", "content": "hello"}], "stream": True}
BEARER = {"Authorization": f"Bearer {KEY}"}


async def test_a_silent_stream_is_pinged_and_loses_nothing(settings, core, http):
    core.script.gate = asyncio.Event()
    lines = []
    async with (
        RunningAdapter(settings, ping_s=0.1) as adapter,
        http.post(f"{adapter.url}/v1/chat/completions", json=ASK, headers=BEARER) as answer,
    ):
        async for line in answer.content:
            lines.append(line)
            if line == b": ping\n":
                core.script.gate.set()
    assert b": ping\n" in lines
    assert lines[-2:] == [b"data: [DONE]\n", b"\n"]


async def test_headers_leave_even_when_no_word_comes_for_a_while(settings, core, http):
    core.script.gate, core.script.silent = asyncio.Event(), True
    async with (
        RunningAdapter(settings, hold_s=0.1) as adapter,
        http.post(f"{adapter.url}/v1/chat/completions", json=ASK, headers=BEARER) as answer,
    ):
        assert answer.status == 200
        core.script.gate.set()
        assert (await answer.text()).endswith("data: [DONE]\n\n")


async def test_nothing_between_us_and_the_reader_is_asked_to_hold_events_back(adapter, http):
    async with http.post("/v1/chat/completions", json=ASK, headers=BEARER) as answer:
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert "no-transform" in answer.headers["Cache-Control"]
        assert "Content-Encoding" not in answer.headers


async def test_a_reader_that_stops_reading_is_cut_off_and_its_turn_cancelled(settings, core):
    core.script.endless = True
    body = b'{"messages":[{"role":"user","content":"x"}],"stream":true}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    async with RunningAdapter(settings, stalled_s=0.5) as adapter:
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.setblocking(False)
            await loop.sock_connect(lazy, ("127.0.0.1", adapter.port))
            await loop.sock_sendall(lazy, head.encode() + body)
            async with asyncio.timeout(10):
                await core.begun.wait()
                await core.turns[0].cancelled.wait()


async def test_a_slow_reader_is_not_cut_off(settings, core, http):
    core.script.pieces = ("x" * 100_000,) * 20
    size = 0
    async with (
        RunningAdapter(settings, stalled_s=1.5) as adapter,
        http.post(f"{adapter.url}/v1/chat/completions", json=ASK, headers=BEARER) as answer,
    ):
        while piece := await answer.content.read(65536):
            size += len(piece)
            await asyncio.sleep(0.1)
    assert size > 2_000_000


async def test_a_leaving_process_lets_a_stream_end(settings, core, http):
    core.script.gate = asyncio.Event()
    async with RunningAdapter(settings) as adapter:
        async with http.post(f"{adapter.url}/v1/chat/completions", json=ASK, headers=BEARER) as answer:
            leaving = asyncio.create_task(adapter.runner.cleanup())
            await asyncio.sleep(0.1)  # the port closes first
            with pytest.raises(OSError, match="Connect call failed"):
                await asyncio.open_connection("127.0.0.1", adapter.port)
            core.script.gate.set()
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        async with asyncio.timeout(0.5):
            await leaving


async def test_a_leaving_process_tells_the_streams_that_it_cannot_wait_for(settings, core, http):
    core.script.gate = asyncio.Event()
    async with RunningAdapter(settings, drain_s=0.2) as adapter:
        async with http.post(f"{adapter.url}/v1/chat/completions", json=ASK, headers=BEARER) as answer:
            leaving = asyncio.create_task(adapter.runner.cleanup())
            text = await answer.text()
        await leaving
    assert '"code": "shutting_down"' in text
    assert "[DONE]" not in text


async def test_a_leaving_process_tells_whoever_waits_for_a_whole_answer(settings, core, http):
    core.script.gate = asyncio.Event()
    async with RunningAdapter(settings, drain_s=0.2) as adapter:
        asked = asyncio.create_task(
            http.post(f"{adapter.url}/v1/chat/completions", json=ASK | {"stream": False}, headers=BEARER)
        )
        await core.begun.wait()
        async with asyncio.timeout(1):
            await adapter.runner.cleanup()
        async with await asked as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert (await answer.json())["error"]["code"] == "shutting_down"


async def test_a_page_whose_adapter_left_resumes_at_another_worker(settings, core, browser):
    core.script.gate = asyncio.Event()
    say = {"session": "", "text": "hello", "request_id": "r-1", "model": ""}
    seen = []
    async with RunningAdapter(settings, drain_s=0.2) as adapter:
        async with browser.post(f"{adapter.url}/api/turns", json=say, headers={"Origin": adapter.url}) as answer:
            leaving = asyncio.create_task(adapter.runner.cleanup())
            seen += [frame.id async for frame in _until_cut(answer)]
        await leaving
    core.script.gate.set()
    async with browser.get(f"/api/sessions/s1/turns/t1/events?after={seen[-1]}") as answer:
        seen += [frame.id async for frame in frames(answer)]
    assert seen == list(range(1, 8))


async def _until_cut(answer):
    try:
        async for frame in frames(answer):
            yield frame
    except aiohttp.ClientPayloadError:
        return


async def _metrics(http) -> dict[str, dict[tuple[str, ...], float]]:
    async with http.get("/metrics") as answer:
        text = await answer.text()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.values()))] = sample.value
    return found


async def test_what_happens_is_counted_under_labels_that_are_bounded(http, core):
    async with http.post("/v1/chat/completions", json=ASK, headers=BEARER) as answer:
        await answer.read()
    for number, method in enumerate(("PURGE", "LINK", "MKCOL", "TRACE", "LOCK")):
        async with http.get(f"/nowhere/{number}") as answer:
            assert answer.status == 404
        async with http.request(method, "/health") as answer:
            assert answer.status == 405
        async with http.get(f"/v1/models/other{number}", headers=BEARER) as answer:
            assert answer.status == 404
    counted = await _metrics(http)
    requests = counted["moltbot_http_requests_total"]
    assert requests[tuple(sorted(("/v1/chat/completions", "POST", "200", "")))] == 1
    assert requests[tuple(sorted(("unknown", "GET", "404", "not_found")))] == 5
    assert requests[tuple(sorted(("unknown", "OTHER", "405", "method_not_allowed")))] == 5
    assert requests[tuple(sorted(("/v1/models/{model}", "GET", "404", "model_not_found")))] == 5
    assert counted["moltbot_http_tokens_total"] == {("input",): 7, ("output",): 4, ("cached_input",): 2}
    assert counted["moltbot_http_first_token_seconds_count"] == {("/v1/chat/completions",): 1}
    assert counted["moltbot_http_streams"] == {(): 0}


async def test_open_streams_and_clients_that_left_are_counted(http, core):
    core.script.gate = asyncio.Event()
    answer = await http.post("/v1/chat/completions", json=ASK, headers=BEARER)
    assert (await _metrics(http))["moltbot_http_streams"] == {(): 1}
    answer.close()
    await core.turns[0].cancelled.wait()
    counted = await _metrics(http)
    assert counted["moltbot_http_streams"] == {(): 0}
    left = tuple(sorted(("/v1/chat/completions", "POST", "499", "disconnected")))
    assert counted["moltbot_http_requests_total"][left] == 1
