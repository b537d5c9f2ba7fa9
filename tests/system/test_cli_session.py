"""`moltbot session` as people run it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from cli_process import Home
from cli_terminal import answer_when_asked
from moltbot import MoltBot, MoltBotClientError
from moltbot_server.testing import RunningServer


@pytest.fixture
async def bot(core: RunningServer) -> AsyncIterator[MoltBot]:
    """A client of that core, which has talked as two people in three sessions."""
    async with MoltBot(core.address, core.key) as bot:
        for session, user, channel in (("one", "ada", "slack"), ("two", "bob", "slack"), ("three", "ada", "")):
            await bot.run_turn(f"Hello from {session}", session=session, user=user, channel=channel)
        yield bot


async def test_help_teaches_the_commands_by_example(home: Home) -> None:
    overview = (await home.run("session")).out
    assert overview == (await home.run("session", "--help")).out
    for name in ("list", "show", "reset", "delete"):
        assert f"\n    {name} " in overview
        told = (await home.run("session", name, "--help")).out
        assert f"\n  moltbot session {name}" in told
        assert "--json" in told


async def test_without_a_core_it_says_how_to_start_one(home: Home) -> None:
    await home.run("init")
    for words in (("list",), ("show", "one"), ("reset", "one"), ("delete", "--all", "--yes")):
        ended = await home.run("session", *words)
        assert (ended.status, ended.out) == (69, "")
        assert "start it with `" in ended.err
        assert (await home.run("session", *words, "--json")).json["error"]["status"] == 69


async def test_sessions_are_listed_the_last_used_first(home: Home, bot: MoltBot) -> None:
    lines = (await home.run("session", "list")).out.splitlines()
    assert lines[0].split() == ["NAME", "LAST", "USED", "MESSAGES", "USER", "CHANNEL", "TITLE"]
    rows = [line.split(maxsplit=5) for line in lines[1:]]
    assert [row[0] for row in rows] == ["sessions/three", "sessions/two", "sessions/one"]
    assert [row[2:] for row in rows] == [
        ["2", "ada", "-", "Hello from three"],
        ["2", "bob", "slack", "Hello from two"],
        ["2", "ada", "slack", "Hello from one"],
    ]
    told = (await home.run("session", "list", "--json", "--user", "ada", "--channel", "slack")).json
    assert told["more"] is False
    assert [(each["name"], each["messages"]) for each in told["sessions"]] == [("sessions/one", 2)]


async def test_that_there_are_more_than_were_asked_for_is_told(home: Home, bot: MoltBot) -> None:
    ended = await home.run("session", "list", "--limit", "2")
    assert len(ended.out.splitlines()) == 3
    assert ended.err == "There are more; --limit 20 lists up to so many.\n"
    assert (await home.run("session", "list", "--limit", "2", "--json")).json["more"] is True
    assert (await home.run("session", "list", "--limit", "3", "--json")).json["more"] is False


async def test_no_sessions_are_told_in_words(home: Home, bot: MoltBot) -> None:
    ended = await home.run("session", "list", "--user", "eve\x1b[2J", "--channel", "slack")
    assert (ended.status, ended.out) == (0, "There are no sessions of the user eve[2J of the channel slack.\n")
    ended = await home.run("session", "delete", "--all", "--user", "eve")
    assert ended.status == 0
    assert ended.out.startswith("There are no sessions of the user eve. Those of stateless callers are not listed")


async def test_what_was_said_is_shown(home: Home, bot: MoltBot) -> None:
    for name in ("one", "sessions/one"):
        lines = (await home.run("session", "show", name)).out.splitlines()
        assert lines[0].startswith("sessions/one: Hello from one, ada, slack, last used 20")
        assert lines[2].startswith("ada, 20")
        assert lines[3] == "Hello from one"
        assert lines[5].startswith("scripted, 20")
        assert lines[6] == "You said: Hello from one"
    told = (await home.run("session", "show", "one", "--json")).json
    assert told["session"]["user"] == "ada"
    assert [each["parts"][0]["text"] for each in told["messages"]] == ["Hello from one", "You said: Hello from one"]


async def test_a_session_that_is_not_there_is_told(home: Home, bot: MoltBot) -> None:
    for words in (("show", "none"), ("reset", "none"), ("delete", "none")):
        ended = await home.run("session", *words)
        assert (ended.status, ended.out) == (1, "")
        assert "SESSION_NOT_FOUND" in ended.err


async def test_one_that_is_not_there_keeps_no_other_from_being_deleted(home: Home, bot: MoltBot) -> None:
    ended = await home.run("session", "delete", "one", "none", "two", "nobody")
    assert (ended.status, ended.out) == (1, "2 sessions were deleted.\n")
    assert ended.err == "moltbot: there is no session none, nobody in this workspace (SESSION_NOT_FOUND)\n"
    assert [session.name async for session in bot.sessions()] == ["sessions/three"]
    ended = await home.run("session", "reset", "three", "none", "--json")
    assert (ended.status, ended.json) == (1, {"reset": ["three"], "missing": ["none"]})


async def test_sessions_are_reset_and_deleted_by_name(home: Home, bot: MoltBot) -> None:
    assert (await home.run("session", "reset", "one")).out == "1 session was reset.\n"
    assert [message async for message in bot.messages("one")] == []
    assert (await home.run("session", "delete", "sessions/one", "two", "--json")).json == {
        "deleted": ["sessions/one", "two"],
        "missing": [],
    }
    assert [session.name async for session in bot.sessions()] == ["sessions/three"]
    with pytest.raises(MoltBotClientError):
        await bot.get_session("one")


async def test_all_of_one_person_are_deleted_and_nobody_elses(home: Home, bot: MoltBot) -> None:
    ended = await home.run("session", "delete", "--all", "--user", "ada")
    assert ended.status == 2
    assert "2 sessions of the user ada would be deleted for good: say --yes if that is meant" in ended.err
    assert len([session async for session in bot.sessions()]) == 3

    assert (await home.run("session", "delete", "--all", "--user", "ada", "--yes")).out == "2 sessions were deleted.\n"
    assert [session.name async for session in bot.sessions()] == ["sessions/two"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("delete",), "name the sessions, as `"),
        (("reset", "one", "--all"), "name the sessions, as `"),
        (("delete", "one", "--user", "ada"), "--user and --channel go with --all"),
        (("delete", "--all", "--yes", "--user", ""), "it is empty, which names nobody"),
        (("reset", "--all", "--yes", "--channel", " "), "it is empty, which names nobody"),
        (("list", "--user", ""), "it is empty, which names nobody"),
        (("list", "--limit", "0"), "'0' is no number from 1 to 100000"),
    ],
)
async def test_what_makes_no_sense_is_wrong_usage(
    home: Home, core: RunningServer, words: tuple[str, ...], said: str
) -> None:
    ended = await home.run("session", *words)
    assert (ended.status, ended.out) == (2, "")
    assert said in ended.err


async def test_at_a_terminal_it_asks_whether_all_are_meant(home: Home, bot: MoltBot) -> None:
    for answer, left in (("n", 3), ("y", 0)):
        asked = "3 sessions, which is all that the workspace has, would be deleted for good. Go"
        await answer_when_asked(answer, asked, home, "delete", "--all", command="session")
        assert len([session async for session in bot.sessions()]) == left
