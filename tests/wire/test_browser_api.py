"""The API of the chat page: turns as event streams, past chats."""

import asyncio

import grpc
from google.protobuf.duration_pb2 import Duration
from moltbot.v1 import chat_pb2, message_pb2, session_pb2
from scripted_core import Refusal
from sse_reader import all_frames, frames

SAY = {"session": "", "text": "hello", "request_id": "r-1", "model": ""}
TIMINGS = {
    "accept_ms": 0,
    "queue_ms": 0,
    "first_token_ms": 0,
    "generation_ms": 0,
    "total_ms": 12.5,
    "trimmed_messages": 0,
    "history_messages": 3,
    "attempts": 1,
}


async def test_a_turn_streams_every_event(browser, core):
    core.script.pieces = ("你好\u2028", "!")
    async with browser.post("/api/turns", json=SAY) as answer:
        heard = await all_frames(answer)
    assert [(frame.id, frame.event) for frame in heard] == [
        (1, "accepted"),
        (2, "routed"),
        (3, "text_delta"),
        (4, "text_delta"),
        (5, "completed"),
    ]
    assert heard[0].data == {"sequence": 1, "turn": "t1", "session": "s1", "message": "m1", "request_id": "r-1"}
    assert heard[1].data == {"sequence": 2, "model": "demo", "reason": "default"}
    assert heard[2].data == {"sequence": 3, "text": "你好\u2028"}
    assert heard[4].data == {
        "sequence": 5,
        "text": "你好\u2028!",
        "finish_reason": "stop",
        "usage": {"input_tokens": 7, "output_tokens": 4, "cached_input_tokens": 2},
        "timings": TIMINGS,
        "model": "demo",
        "message": "m2",
        "attachments": [],
        "reasoning": "",
        "cached": False,
    }
    turn = core.turns[0].input
    assert (turn.user, turn.channel, turn.request_id, turn.cancel_on_disconnect) == ("owner", "web", "r-1", False)


async def test_events_that_are_rare_have_their_shape(browser, core):
    turn = await _finished_turn(browser, core)
    core.turns[0].events[1:] = []
    events = [
        {"queued": chat_pb2.Queued(position=2)},
        {"routed": chat_pb2.Routed(plugin="plugins/clock", reason="pattern")},
        {"reset": chat_pb2.Reset(text="a", reason="again")},
        {"attachment": chat_pb2.Attachment(part=_picture())},
        {"tool_started": chat_pb2.ToolStarted(call=message_pb2.ToolCall(call_id="c", tool="t", arguments_json="{}"))},
        {
            "tool_finished": chat_pb2.ToolFinished(
                result=message_pb2.ToolResult(call_id="c", tool="t", output="o", is_error=True),
                duration=Duration(nanos=1_500_000),
            )
        },
        {"notice": chat_pb2.Notice(code="FAILOVER", **{"from": "models/a"}, to="models/b", reason="slow")},
        {},
        {
            "failed": chat_pb2.Failed(
                code=8, reason="QUEUE_FULL", message="m", retryable=True, retry_delay=Duration(seconds=2)
            )
        },
    ]
    for event in events:
        await core.turns[0].tell(**event)
    async with browser.get(f"{turn}/events?after=1") as answer:
        heard = await all_frames(answer)
    assert [(frame.event, {k: v for k, v in frame.data.items() if k != "timings"}) for frame in heard] == [
        ("queued", {"sequence": 2, "position": 2}),
        ("routed", {"sequence": 3, "plugin": "clock", "reason": "pattern"}),
        ("reset", {"sequence": 4, "text": "a", "reason": "again"}),
        (
            "attachment",
            {
                "sequence": 5,
                "part": {
                    "kind": "image",
                    "media_type": "image/png",
                    "filename": "",
                    "size_bytes": 2,
                    "alt_text": "",
                    "data": "aGk=",
                },
            },
        ),
        ("tool_started", {"sequence": 6, "call_id": "c", "tool": "t", "arguments": "{}"}),
        (
            "tool_finished",
            {"sequence": 7, "call_id": "c", "tool": "t", "output": "o", "is_error": True, "duration_ms": 1.5},
        ),
        ("notice", {"sequence": 8, "code": "FAILOVER", "from": "a", "to": "b", "reason": "slow"}),
        (
            "failed",
            {
                "sequence": 10,
                "code": "RESOURCE_EXHAUSTED",
                "reason": "QUEUE_FULL",
                "message": "m",
                "retryable": True,
                "retry_after_ms": 2000,
            },
        ),
    ]


def _picture() -> message_pb2.Part:
    return message_pb2.Part(image=message_pb2.Media(data=b"hi", media_type="image/png"))


async def _finished_turn(browser, core) -> str:
    async with browser.post("/api/turns", json=SAY) as answer:
        await all_frames(answer)
    return f"/api/sessions/{core.turns[0].session.removeprefix('sessions/')}/turns/t1"


async def test_thoughts_models_asked_and_a_kept_answer_reach_the_page(browser, core):
    call = message_pb2.ToolCall(call_id="c", tool="clock", arguments_json="{}")
    core.script.thoughts = ("Hm.",)
    core.script.completion = chat_pb2.Completed(
        model="models/openai/gpt",
        attachments=[_picture(), message_pb2.Part(tool_call=call)],
        reasoning="Hm.",
        cached=True,
        timings=chat_pb2.Timings(attempt_log=[chat_pb2.Attempt(model="models/openai/gpt", outcome="ANSWERED")]),
    )
    async with browser.post("/api/turns", json={**SAY, "model": "openai/gpt"}) as answer:
        heard = await all_frames(answer)
    assert core.turns[0].input.model == "models/openai/gpt"
    assert heard[1].data["model"] == "openai/gpt"
    assert (heard[2].event, heard[2].data) == ("reasoning_delta", {"sequence": 3, "text": "Hm."})
    end = heard[-1].data
    assert (end["model"], end["reasoning"], end["cached"]) == ("openai/gpt", "Hm.", True)
    assert [part["kind"] for part in end["attachments"]] == ["image", "tool_call"]
    assert [(each["model"], each["outcome"]) for each in end["timings"]["attempt_log"]] == [("openai/gpt", "ANSWERED")]


async def test_a_reload_in_mid_answer_resumes_the_turn(browser, core):
    core.script.gate = asyncio.Event()
    async with browser.post("/api/turns", json=SAY) as answer:
        seen = []
        async for frame in frames(answer):
            seen.append(frame)
            if frame.event == "text_delta":
                break
    async with browser.get("/api/sessions/s1/turns/t1/events", headers={"Last-Event-ID": str(seen[-1].id)}) as answer:
        core.script.gate.set()
        seen += await all_frames(answer)
    assert [frame.id for frame in seen] == list(range(1, 8))
    assert "".join(frame.data["text"] for frame in seen if frame.event == "text_delta") == "Hello, world!"
    assert not core.turns[0].cancelled.is_set()


async def test_a_finished_turn_can_be_replayed_and_after_its_end_nothing_is_to_be_asked_for(browser, core):
    turn = await _finished_turn(browser, core)
    async with browser.get(f"{turn}/events") as answer:
        assert [frame.id for frame in await all_frames(answer)] == list(range(1, 8))
    async with browser.get(f"{turn}/events?after=7") as answer:
        assert (answer.status, await answer.read()) == (204, b"")


async def test_a_stream_that_is_asked_for_again_goes_on_after_the_event_that_was_seen_last(browser, core):
    for last in range(1, 7):
        async with browser.post("/api/turns", json=SAY, headers={"Last-Event-ID": str(last)}) as answer:
            assert [frame.id for frame in await all_frames(answer)] == list(range(last + 1, 8))
    async with browser.post("/api/turns", json=SAY, headers={"Last-Event-ID": "7"}) as answer:
        assert answer.status == 204
    assert len(core.turns) == 1
    unnamed = {**SAY, "request_id": ""}
    async with browser.post("/api/turns", json=unnamed, headers={"Last-Event-ID": "3"}) as answer:
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, "request_id")


async def test_an_event_source_is_told_to_come_back_soon(browser, core):
    async with browser.post("/api/turns", json=SAY) as answer:
        lines = (await answer.text()).splitlines()
    assert [line for line in lines if line.startswith("retry:")] == lines[:1] == ["retry: 500"]


async def test_a_repeated_request_follows_the_same_turn(browser, core):
    for _ in range(2):
        async with browser.post("/api/turns", json=SAY) as answer:
            assert (await all_frames(answer))[-1].event == "completed"
    assert len(core.turns) == 1


async def test_a_turn_can_be_stopped(browser, core):
    core.script.gate = asyncio.Event()
    async with browser.post("/api/turns", json=SAY) as answer:
        stream = frames(answer)
        async for frame in stream:
            if frame.event == "text_delta":
                break
        async with browser.post("/api/sessions/s1/turns/t1/cancel") as stopped:
            assert await stopped.json() == {"cancelled": True}
        last = [frame async for frame in stream][-1]
    assert (last.event, last.data["finish_reason"], last.data["text"]) == ("completed", "cancelled", "Hello")
    async with browser.post("/api/sessions/s1/turns/t1/cancel") as stopped:
        assert await stopped.json() == {"cancelled": False}


async def test_a_turn_that_is_refused_has_a_status(browser, core):
    core.script.refusals = [
        Refusal(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_s=1),
        Refusal(code=grpc.StatusCode.INVALID_ARGUMENT, reason="EMPTY_MESSAGE"),
    ]
    async with browser.post("/api/turns", json=SAY) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    async with browser.post("/api/turns", json=SAY) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (400, "empty_message")
        assert set(error) == {"message", "type", "param", "code"}


async def test_an_unknown_turn_is_not_found(browser):
    for path in ("/api/sessions/none/turns/none/events", "/api/sessions/a%20b/turns/c/events"):
        async with browser.get(path) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "turn_not_found") or "a%20b" in path
            assert answer.status == 404


async def test_who_is_signed_in(browser):
    async with browser.get("/api/me") as answer:
        me = await answer.json()
    assert me.pop("version")
    demo = {"id": "demo", "display_name": "MoltBot demo"}
    assert me == {"user": "owner", "default_model": demo, "models": [demo], "store_away": False}


async def test_chats_are_listed_page_by_page(browser, core):
    core.sessions.append(session_pb2.Session(name="sessions/second", title="二", user="owner", channel="web"))
    core.sessions.append(session_pb2.Session(name="sessions/other", user="owner", channel="slack"))
    async with browser.get("/api/sessions") as answer:
        first = await answer.json()
    assert first == {
        "sessions": [
            {
                "id": "first",
                "title": "A first chat",
                "update_time": "2023-11-14T22:13:20Z",
                "message_count": 2,
                "active_turn": {"id": "t9", "last_sequence": 5},
            }
        ],
        "next_page_token": "page-2",
    }
    async with browser.get("/api/sessions", params={"page_token": "page-2"}) as answer:
        second = await answer.json()
    assert [(chat["id"], chat["active_turn"]) for chat in second["sessions"]] == [("second", None)]
    async with browser.get("/api/sessions", params={"page_token": "forged"}) as answer:
        assert answer.status == 400


async def test_messages_are_listed_oldest_first_without_the_rules(browser):
    async with browser.get("/api/sessions/first/messages") as answer:
        page = await answer.json()
    assert page == {
        "messages": [
            {
                "id": f"m{number}",
                "role": role,
                "text": f"text {number}",
                "create_time": "2023-11-14T22:13:20Z",
                "turn": "t1",
                "model": model,
                **end,
            }
            for number, role, model, end in ((1, "user", "", {}), (2, "assistant", "demo", {"finish_reason": "length"}))
        ],
        "next_page_token": "",
    }


async def test_a_chat_can_be_deleted_once(browser, core):
    async with browser.delete("/api/sessions/first") as answer:
        assert answer.status == 204
    assert core.sessions == []
    async with browser.delete("/api/sessions/first") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "session_not_found")


async def test_a_workspace_key_that_the_core_refuses_is_not_the_browsers_fault(browser, core):
    core.key = "another"
    async with browser.get("/api/sessions") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "workspace_key_refused")
