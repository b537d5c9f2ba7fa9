"""Conversations listed, read, reset and deleted; pages that stay true while the list grows."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from moltbot.v1 import message_pb2, session_pb2
from moltbot_server.auth.keys import Authenticator
from moltbot_server.testing import RunningServer, running_server
from moltbot_server.turns import Principal
from rpc_calls import Api, WatchedEngine, drained, kinds, reason_of, refused, turn


async def listed(api: Api, **fields: Any) -> session_pb2.ListSessionsResponse:
    request = session_pb2.ListSessionsRequest(**fields)
    answer: session_pb2.ListSessionsResponse = await api.sessions.ListSessions(request, metadata=api.metadata)
    return answer


async def paged(api: Api, **fields: Any) -> list[str]:
    """Return the names of all sessions, page by page."""
    names, token = [], ""
    while True:
        page = await listed(api, page_token=token, **fields)
        assert len(page.sessions) <= fields.get("page_size", 50)
        names += [session.name for session in page.sessions]
        token = page.next_page_token
        if not token:
            return names


async def reset(api: Api, name: str) -> session_pb2.Session:
    request = session_pb2.ResetSessionRequest(name=name)
    answer: session_pb2.ResetSessionResponse = await api.sessions.ResetSession(request, metadata=api.metadata)
    return answer.session


async def delete(api: Api, name: str) -> None:
    await api.sessions.DeleteSession(session_pb2.DeleteSessionRequest(name=name), metadata=api.metadata)


async def test_sessions_are_listed_last_used_first_over_pages_of_any_size(api: Api) -> None:
    for number in range(11):
        await api.run(turn(session=f"sessions/{number}"))
    await api.run(turn(session="sessions/3"))
    expected = [f"sessions/{number}" for number in (3, 10, 9, 8, 7, 6, 5, 4, 2, 1, 0)]

    for size in (1, 2, 3, 10, 11, 12, 200):
        assert await paged(api, page_size=size) == expected
    assert await paged(api) == expected


async def test_pages_repeat_and_miss_nothing_while_sessions_are_used_and_made(api: Api) -> None:
    for number in range(12):
        await api.run(turn(session=f"sessions/{number}"))
    first = await listed(api, page_size=4)
    seen = [session.name for session in first.sessions]
    token = first.next_page_token
    await asyncio.gather(*(api.run(turn(session=f"sessions/{name}")) for name in ("new", "11", "10", "9", "8")))
    while token:
        page = await listed(api, page_size=4, page_token=token)
        seen += [session.name for session in page.sessions]
        token = page.next_page_token

    assert seen == [f"sessions/{number}" for number in range(11, -1, -1)]


async def test_sessions_are_listed_by_user_and_by_channel(api: Api) -> None:
    for number in range(6):
        spoken = turn(
            session=f"sessions/{number}", user=f"user {number % 2}", channel=("web", "cli", "slack")[number % 3]
        )
        await api.run(spoken)

    assert await paged(api, user="user 1", page_size=1) == ["sessions/5", "sessions/3", "sessions/1"]
    assert await paged(api, channel="web") == ["sessions/3", "sessions/0"]
    assert await paged(api, channel="web", user="user 1") == ["sessions/3"]
    assert await paged(api, user="nobody") == []


async def test_messages_are_listed_oldest_first_over_pages_of_any_size(api: Api) -> None:
    for number in range(5):
        await api.run(turn(f"question {number}", session="sessions/s"))
    await api.events(turn("#1 fail=0", session="sessions/s"))
    whole = await api.messages("sessions/s")
    assert len(whole) == 11

    for size in (1, 2, 3, 10, 11, 500):
        read: list[message_pb2.Message] = []
        token = ""
        while True:
            request = session_pb2.ListMessagesRequest(parent="sessions/s", page_size=size, page_token=token)
            page = await api.sessions.ListMessages(request, metadata=api.metadata)
            read += page.messages
            token = page.next_page_token
            if not token:
                break
        assert read == whole


async def test_a_stored_answer_says_whether_it_is_whole(api: Api) -> None:
    await api.run(turn("#3", session="sessions/s"))
    await api.run(turn("#30", session="sessions/s", options=message_pb2.GenerationOptions(max_output_tokens=2)))
    call = api.stream(turn("#1000 pace=0.01", session="sessions/s"))
    while not (await call.read()).event.HasField("text_delta"):
        pass
    assert await api.cancel("sessions/s/turns/3")
    await drained(call)

    ends = [message_pb2.FinishReason.Name(message.finish_reason) for message in await api.messages("sessions/s")]
    asked = "FINISH_REASON_UNSPECIFIED"
    assert ends[::2] == [asked] * 3
    assert ends[1::2] == ["FINISH_REASON_STOP", "FINISH_REASON_LENGTH", "FINISH_REASON_CANCELLED"]


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "ü",
        "W10",
        "A" * 5000,
        "\x00",
        *(
            base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
            for text in ("[]", "{}", "null", "[1,2]", '["a",-1,0]', '["a",1e400,"s"]', "[9999999999999999999999,0]")
        ),
    ],
)
async def test_a_token_that_no_list_gave_is_refused(api: Api, token: str) -> None:
    await api.run(turn(session="sessions/s"))
    calls: list[Any] = [
        api.sessions.ListSessions(session_pb2.ListSessionsRequest(page_token=token), metadata=api.metadata),
        api.sessions.ListMessages(
            session_pb2.ListMessagesRequest(parent="sessions/s", page_token=token), metadata=api.metadata
        ),
    ]
    for call in calls:
        error = await refused(call)
        assert (error.code().name, reason_of(error)) == ("INVALID_ARGUMENT", "INVALID_PAGE_TOKEN")


async def test_a_token_of_another_list_is_refused(api: Api) -> None:
    for name in ("a", "b"):
        for _ in range(2):
            await api.run(turn(session=f"sessions/{name}", user="ada"))
    of_sessions = (await listed(api, page_size=1)).next_page_token
    request = session_pb2.ListMessagesRequest(parent="sessions/a", page_size=1)
    of_messages = (await api.sessions.ListMessages(request, metadata=api.metadata)).next_page_token
    wrong = [
        session_pb2.ListSessionsRequest(page_token=of_messages),
        session_pb2.ListSessionsRequest(page_token=of_sessions, user="ada"),
        session_pb2.ListMessagesRequest(parent="sessions/a", page_token=of_sessions),
        session_pb2.ListMessagesRequest(parent="sessions/b", page_token=of_messages),
    ]

    for asked in wrong:
        method = (
            api.sessions.ListSessions
            if isinstance(asked, session_pb2.ListSessionsRequest)
            else api.sessions.ListMessages
        )
        assert reason_of(await refused(method(asked, metadata=api.metadata))) == "INVALID_PAGE_TOKEN"


async def test_a_page_size_is_bounded_and_never_negative(api: Api) -> None:
    assert reason_of(await refused(listed(api, page_size=-1))) == "INVALID_FIELD"
    assert len((await listed(api, page_size=2**31 - 1)).sessions) == 0


async def test_a_session_tells_the_turn_that_runs_in_it(api: Api) -> None:
    call = api.stream(turn("#100 pace=0.01", session="sessions/s", request_id="mine"))
    name = (await call.read()).event.accepted.turn

    active = (await api.session("sessions/s")).active_turn
    assert (active.name, active.request_id) == (name, "mine")
    assert active.last_sequence >= 1
    assert (await listed(api)).sessions[0].active_turn.name == name
    await api.cancel(name)
    assert not (await api.session("sessions/s")).HasField("active_turn")


async def test_a_reset_session_forgets_what_was_said_and_keeps_its_name(api: Api, engine: WatchedEngine) -> None:
    await api.run(turn("secret", session="sessions/s", user="ada"))
    session = await reset(api, "sessions/s")
    again = await reset(api, "sessions/s")

    assert (session.name, session.message_count, session.title, session.user) == ("sessions/s", 0, "", "ada")
    assert session.create_time == again.create_time
    assert await api.messages("sessions/s") == []
    after = await api.run(turn("fresh", session="sessions/s"))
    assert after.turn == "sessions/s/turns/2"
    assert engine.read[-1] == ["fresh"]
    assert (await api.session("sessions/s")).title == "fresh"


async def test_a_session_that_was_reset_before_a_restart_gets_a_title_after_it(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        await api.run(turn("before", session="sessions/s"))
        await reset(api, "sessions/s")
        await api.channel.close()
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        await reset(api, "sessions/s")
        assert (await api.run(turn("after", session="sessions/s"))).turn == "sessions/s/turns/2"
        assert (await api.session("sessions/s")).title == "after"
        await api.channel.close()


async def test_a_session_is_not_reset_under_a_running_turn(api: Api) -> None:
    call = api.stream(turn("#50 pace=0.01", session="sessions/s"))
    await call.read()
    error = await refused(reset(api, "sessions/s"))

    assert (error.code().name, reason_of(error)) == ("FAILED_PRECONDITION", "SESSION_BUSY")
    assert kinds(await drained(call))[-1] == "completed"
    assert (await reset(api, "sessions/s")).message_count == 0


async def test_a_deleted_session_is_gone_with_its_messages_and_turns(api: Api) -> None:
    first = await api.run(turn("hello", session="sessions/s", request_id="one"))
    await delete(api, "sessions/s")

    for call in (
        api.session("sessions/s"),
        api.messages("sessions/s"),
        delete(api, "sessions/s"),
        reset(api, "sessions/s"),
    ):
        assert reason_of(await refused(call)) == "SESSION_NOT_FOUND"
    assert reason_of(await refused(api.resumed(first.turn))) == "TURN_NOT_FOUND"
    assert (await listed(api)).sessions == []
    again = await api.run(turn("other", session="sessions/s", request_id="two"))
    assert again.turn == "sessions/s/turns/1"


@pytest.mark.parametrize("forget", [delete, reset])
async def test_an_event_that_comes_again_after_its_session_was_deleted_or_reset_is_not_answered_again(
    api: Api, forget: Callable[[Api, str], Awaitable[Any]]
) -> None:
    event = turn("hello", session="sessions/s", request_id="one")
    await api.run(event)
    await forget(api, "sessions/s")

    for _ in range(2):
        error = await refused(api.run(event))
        assert (error.code().name, reason_of(error)) == ("ALREADY_EXISTS", "TURN_DELETED")
    assert reason_of(await refused(api.stream(event))) == "TURN_DELETED"
    assert await api.run(turn("hello", session="sessions/s", request_id="two"))


async def test_deleting_a_session_cancels_what_runs_and_waits_in_it(api: Api, engine: WatchedEngine) -> None:
    calls = [api.stream(turn("#1000 pace=0.01", session="sessions/s")) for _ in range(4)]
    for call in calls:
        await call.read()
    await asyncio.wait_for(delete(api, "sessions/s"), 5)

    assert engine.running == 0
    for call in calls:
        last = (await drained(call))[-1]
        assert last.completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    assert reason_of(await refused(api.session("sessions/s"))) == "SESSION_NOT_FOUND"


async def test_turns_begun_while_a_session_is_deleted_or_reset_have_a_session_afterwards(api: Api) -> None:
    async def unless_missing(call: Any) -> None:
        with contextlib.suppress(aio.AioRpcError):
            await call

    for round_ in range(15):
        await asyncio.gather(
            *(api.events(turn(f"#2 pace=0.00{n}", session="sessions/s")) for n in range(4)),
            unless_missing(delete(api, "sessions/s")),
            unless_missing(reset(api, "sessions/s")),
            *(api.events(turn("late", session="sessions/s")) for _ in range(3)),
        )
        answer = await api.run(turn(f"round {round_}", session="sessions/s"))
        assert (await api.said("sessions/s"))[-2:] == [f"round {round_}", f"You said: round {round_}"]
        assert [session.name for session in (await listed(api)).sessions] == ["sessions/s"]
        assert (await api.resumed(answer.turn))[-1].completed == answer.completed


@pytest.mark.parametrize(
    "name", ["", "s", "sessions/", "sessions/a b", "sessions/" + "x" * 129, "sessions/ü", "sessions/s/"]
)
async def test_a_name_that_is_none_is_refused_everywhere(api: Api, name: str) -> None:
    calls: list[Any] = [api.session(name), api.messages(name), reset(api, name), delete(api, name)]
    if name:
        calls.append(api.run(turn(session=name)))

    for call in calls:
        error = await refused(call)
        assert (error.code().name, reason_of(error)) == ("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_a_session_of_another_workspace_is_answered_like_one_that_does_not_exist(
    api: Api, core: RunningServer
) -> None:
    mine = await api.run(turn("canary", session="sessions/s", request_id="one"))
    stranger = Principal(workspace="other", key_id="other", role="owner")
    core.core.authenticator._principals.update(Authenticator({"key of another": stranger})._principals)
    other = Api(api.channel, (("authorization", "Bearer key of another"),))

    for call in (
        other.session("sessions/s"),
        other.messages("sessions/s"),
        reset(other, "sessions/s"),
        delete(other, "sessions/s"),
    ):
        assert reason_of(await refused(call)) == "SESSION_NOT_FOUND"
    assert reason_of(await refused(other.resumed(mine.turn))) == "TURN_NOT_FOUND"
    assert reason_of(await refused(other.cancel(mine.turn))) == "TURN_NOT_FOUND"
    assert (await listed(other)).sessions == []
    theirs = await other.run(turn("something else", session="sessions/s", request_id="one"))
    assert theirs.completed.text == "You said: something else"
    assert await api.said("sessions/s") == ["canary", "You said: canary"]


async def test_a_page_of_long_messages_fits_a_client_that_takes_four_mebibytes(api: Api) -> None:
    long = "word " * 60_000
    for _ in range(6):
        await refused(api.run(turn(long, session="sessions/long")))
    seen, token = 0, ""
    while True:
        page = await api.sessions.ListMessages(
            session_pb2.ListMessagesRequest(parent="sessions/long", page_token=token), metadata=api.metadata
        )
        assert page.ByteSize() < 2 << 20
        seen += len(page.messages)
        token = page.next_page_token
        if not token:
            break
    assert seen == 6
