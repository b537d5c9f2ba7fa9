"""What a user sees of a core that breaks off, restarts or is gone: as little as possible."""

import asyncio
import time

import grpc
import openai
import pytest
from moltbot_adapters.core_client import PATIENCE_S
from running_adapter import RunningAdapter
from scripted_core import KEY, Refusal
from sse_reader import all_frames

SAY = {"session": "", "text": "hello", "request_id": "r-1", "model": ""}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "cut",
    [
        Refusal(code=grpc.StatusCode.UNAVAILABLE),
        Refusal(code=grpc.StatusCode.UNAVAILABLE, reason="NOT_SERVING"),
        Refusal(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="SLOW_CONSUMER"),
        Refusal(code=grpc.StatusCode.CANCELLED),
        Refusal(code=grpc.StatusCode.INTERNAL),
    ],
    ids=lambda cut: f"{cut.code.name}-{cut.reason}",
)
async def test_a_stream_that_breaks_is_resumed_after_the_last_event(browser, core, cut):
    core.script.cut_with = cut
    core.script.cut_after = {1, 3, 4, 6}
    async with browser.post("/api/turns", json=SAY) as answer:
        heard = await all_frames(answer)
    assert [frame.id for frame in heard] == list(range(1, 8))
    assert core.names() == ["StreamTurn"] + ["ResumeTurn"] * 4
    assert len(core.turns) == 1


async def test_a_start_that_never_arrived_is_made_again_with_the_same_request_id(browser, core):
    core.script.refusals = [
        Refusal(code=grpc.StatusCode.UNAVAILABLE),
        Refusal(code=grpc.StatusCode.UNAVAILABLE, reason="NOT_SERVING"),
    ]
    async with browser.post("/api/turns", json=SAY) as answer:
        assert (await all_frames(answer))[-1].event == "completed"
    assert core.names() == ["StreamTurn"] * 3
    assert core.turns[0].input.request_id == "r-1"


async def test_a_core_that_restarts_between_two_turns_is_unseen(adapter, core):
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=0) as client:
        await client.chat.completions.create(model="moltbot", messages=HELLO)
        await core.stop()
        asking = asyncio.create_task(client.chat.completions.create(model="moltbot", messages=HELLO))
        streaming = asyncio.create_task(client.chat.completions.create(model="moltbot", messages=HELLO, stream=True))
        await asyncio.sleep(0.2)  # long enough for the calls to meet the closed port
        await core.start()
        assert (await asking).choices[0].message.content == "Hello, world!"
        assert "".join([c.choices[0].delta.content or "" async for c in await streaming]) == "Hello, world!"


async def test_a_refusal_with_a_reason_is_not_repeated(browser, core):
    core.script.refusals = [Refusal(code=grpc.StatusCode.UNAVAILABLE, reason="MODEL_UNAVAILABLE")]
    async with browser.post("/api/turns", json=SAY) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "model_unavailable")
    assert core.names() == ["StreamTurn"]


async def test_a_turn_that_a_restart_lost_is_told_to_the_openai_client(adapter, core):
    core.script.cut_after = {3}
    core.script.resume_refusals = [Refusal(code=grpc.StatusCode.NOT_FOUND, reason="TURN_NOT_FOUND")]
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=0) as client:
        stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
        heard = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        with pytest.raises(openai.APIError) as caught:
            await anext(stream)
    assert heard == ["", "Hello"]
    assert caught.value.code == "turn_interrupted"


async def test_an_openai_stream_goes_on_through_broken_connections_and_its_turn_is_not_ended_by_them(adapter, core):
    core.script.cut_after = {1, 4}
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=0) as client:
        stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
        heard = "".join([chunk.choices[0].delta.content or "" for chunk in await _all(stream)])
    assert heard == "Hello, world!"
    assert core.names() == ["StreamTurn", "ResumeTurn", "ResumeTurn"]
    assert not core.turns[0].input.cancel_on_disconnect


async def test_a_client_that_leaves_before_it_heard_anything_has_its_turn_cancelled_whole_or_streamed(http, core):
    core.script.gate, core.script.silent = asyncio.Event(), True
    for number, streamed in enumerate((False, True)):
        body = {"messages": HELLO, "stream": streamed}
        core.begun.clear()
        asking = asyncio.create_task(
            http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
        )
        async with asyncio.timeout(10):
            await core.begun.wait()
            asking.cancel()
            await core.turns[number].cancelled.wait()
    assert len(core.turns) == 2


async def test_a_request_that_is_named_runs_on_when_its_client_leaves(http, core):
    core.script.gate = asyncio.Event()
    headers = {"Authorization": f"Bearer {KEY}", "Idempotency-Key": "k-1"}
    async with http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True}, headers=headers) as answer:
        await answer.content.readline()
        answer.close()
    core.script.gate.set()
    async with http.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers) as answer:
        assert (await answer.json())["choices"][0]["message"]["content"] == "Hello, world!"
    assert len(core.turns) == 1
    assert "CancelTurn" not in core.names()


async def _all(stream) -> list:
    return [chunk async for chunk in stream]


async def test_a_lasting_fault_in_mid_stream_ends_the_pages_stream_and_the_resume_tells_it(browser, core):
    denied = Refusal(code=grpc.StatusCode.PERMISSION_DENIED, reason="PERMISSION_DENIED")
    core.script.cut_after = {3}
    core.script.resume_refusals = [denied, denied]
    async with browser.post("/api/turns", json=SAY) as answer:
        assert [frame.id for frame in await all_frames(answer)] == [1, 2, 3]
    async with browser.get("/api/sessions/s1/turns/t1/events?after=3") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "permission_denied")


async def test_a_core_that_is_gone_is_a_503_with_a_time_to_wait(settings, core):
    await core.stop()
    async with (
        RunningAdapter(settings) as adapter,
        openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            await client.models.list()
    assert (caught.value.status_code, caught.value.code) == (503, "core_unavailable")
    assert caught.value.response.headers["retry-after"] == "1"
    assert str(core.port) not in caught.value.message


async def test_unknown_faults_leak_no_text(http, core):
    core.script.refusals = [Refusal(code=grpc.StatusCode.UNKNOWN, message="secret /path")] * 10
    body = {"model": "moltbot", "messages": HELLO, "stream": True}
    async with http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}) as answer:
        text = await answer.text()
    assert answer.status == 500
    assert "secret" not in text
    assert answer.headers["X-Request-Id"].startswith("req_")


async def test_health_follows_the_core(http, core, settings):
    async with http.get("/health") as answer:
        assert (answer.status, (await answer.json())["status"]) == (200, "ok")
    await core.leave_serving()
    async with RunningAdapter(settings) as fresh, http.get(f"{fresh.url}/health") as answer:
        assert answer.status == 503
        assert (await answer.json())["core"] == {"status": "NOT_SERVING"}


async def test_a_store_that_is_away_is_told_by_health_and_to_the_page_and_keeps_no_balancer_away(http, browser, core):
    async with http.get("/health") as answer:
        assert (await answer.json())["store"] == "unknown"  # a core that does not say
    for away, status, store in ((True, "store away", "away"), (False, "ok", "ok")):
        await core.tell_store(away=away)
        told = {}
        async with asyncio.timeout(10):
            while told.get("store") != store:
                async with http.get("/health") as answer:
                    code, told = answer.status, await answer.json()
        assert (code, told["status"]) == (200, status)
        async with browser.get("/api/me") as answer:
            assert (await answer.json())["store_away"] is away


async def test_a_turn_of_the_page_is_refused_early_when_the_store_is_away(browser, core):
    away = Refusal(code=grpc.StatusCode.UNAVAILABLE, reason="STORAGE_UNAVAILABLE", message="no store now")
    core.script.refusals = [away] * 1000
    await core.tell_store(away=True)
    began = time.monotonic()
    async with browser.post("/api/turns", json=SAY) as answer:
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert (await answer.json())["error"]["code"] == "storage_unavailable"
    assert time.monotonic() - began < PATIENCE_S, "it was told before the core had been asked for that long"

    core.script.refusals = []
    await core.tell_store(away=False)
    async with browser.post("/api/turns", json=SAY) as answer:
        assert (answer.status, (await all_frames(answer))[-1].event) == (200, "completed")


async def test_a_resume_while_the_store_is_away_is_refused_at_once_and_not_opened(browser, core):
    await core.tell_store(away=True)
    resume = "/api/sessions/s1/turns/t1/events?after=3"
    async with asyncio.timeout(5):
        status = 0
        while status != 503:  # the adapter hears of it within a second
            async with browser.get(resume) as answer:
                status = answer.status
    async with browser.get(resume) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "storage_unavailable")


@pytest.mark.parametrize("way", ["start", "resume"])
async def test_a_stream_that_was_opened_while_the_store_was_waited_for_says_why_it_ends(browser, core, way):
    away = Refusal(code=grpc.StatusCode.UNAVAILABLE, reason="STORAGE_UNAVAILABLE", message="no store now")
    core.script.refusals = core.script.resume_refusals = [away] * 1000
    resume = "/api/sessions/s1/turns/t1/events?after=3"
    async with browser.post("/api/turns", json=SAY) if way == "start" else browser.get(resume) as answer:
        assert answer.status == 200  # it had to say something while it waited
        (frame,) = await all_frames(answer)
    assert (frame.event, frame.id, frame.data["status"]) == ("refused", 0, 503)
    assert frame.data["error"]["code"] == "storage_unavailable"
    assert frame.data["error"]["message"] == "no store now"
