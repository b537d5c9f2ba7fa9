"""`moltbot deadletters` as people run it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cli_process import Home
from moltbot import Delivery, MoltBot
from moltbot.v1.chat_pb2 import Place
from moltbot_server.workspace import Workspace


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home folder in which the scripted model answers."""
    (tmp_path / "home").mkdir()
    return Home(tmp_path / "home")


async def test_help_teaches_the_commands_by_example(home: Home) -> None:
    overview = (await home.run("deadletters")).out
    assert overview == (await home.run("deadletters", "--help")).out
    for name in ("list", "retry", "drop"):
        assert f"\n    {name} " in overview
        told = (await home.run("deadletters", name, "--help")).out
        assert f"\n  moltbot deadletters {name}" in told
        assert "--json" in told


async def test_without_a_core_it_says_how_to_start_one(home: Home) -> None:
    await home.run("init")
    for words in (("list",), ("retry", "--all"), ("drop", "--all")):
        ended = await home.run("deadletters", *words)
        assert (ended.status, ended.out) == (69, "")
        assert "start it with `" in ended.err
        assert "A core that was started by itself is named by MOLTBOT_ADDRESS." in ended.err
        assert (await home.run("deadletters", *words, "--json")).json["error"]["status"] == 69


@pytest.mark.parametrize("words", [(), ("--all", "deliveries/x"), ("deliveries/x", "--channel", "slack")])
async def test_what_is_meant_has_to_be_said_clearly(home: Home, words: tuple[str, ...]) -> None:
    await home.run("init")
    for name in ("retry", "drop"):
        ended = await home.run("deadletters", name, *words)
        assert (ended.status, ended.out) == (2, "")
        assert "--all" in ended.err


async def buried(bot: MoltBot, number: int, channel: str = "slack") -> Delivery:
    """Have an answer given up."""
    await bot.run_turn(f"say {number}", reply_to=Place(channel=channel, address=f"place {number}"))
    async for delivery in bot.deliveries(channel):
        assert await delivery.reject(f"the channel was archived, {'so ' * 20}{number}", permanent=True)
        return delivery
    raise AssertionError("nothing was delivered")


async def test_dead_letters_are_listed_retried_and_dropped(home: Home) -> None:
    async with home.started() as started:
        key = Workspace(folder=home.workspace).read_key()
        async with MoltBot(started.told()["grpc"], key) as bot:
            nothing = await home.run("deadletters", "list")
            letters = [await buried(bot, number) for number in range(3)]
            other = await buried(bot, 3, "discord")
            table = (await home.run("deadletters", "list")).out.splitlines()
            listed = (await home.run("deadletters", "list", "--json", "--channel", "slack")).json["dead_letters"]
            few = (await home.run("deadletters", "list", "--json", "--limit", "1")).json["dead_letters"]
            retried = await home.run("deadletters", "retry", letters[0].name)
            again = await asyncio.wait_for(anext(bot.deliveries("slack")), 10)
            dropped = await home.run("deadletters", "drop", "--json", letters[1].name.removeprefix("deliveries/"))
            unknown = await home.run("deadletters", "drop", letters[1].name)
            wrong = await home.run("deadletters", "drop", "nonsense")
            rest = await home.run("deadletters", "drop", "--all", "--channel", "slack")
            left = (await home.run("deadletters", "list", "--json")).json["dead_letters"]
            last = await home.run("deadletters", "retry", "--all", "--json")

    assert nothing.out == "There are no dead letters.\n"
    assert table[0].split() == ["NAME", "GIVEN", "UP", "ATTEMPTS", "PLACE", "WHY", "TEXT"]
    assert [line.split()[0] for line in table[1:]] == [other.name, *(letter.name for letter in letters[::-1])]
    assert "slack place 2" in table[2]
    assert "…" in table[2]
    assert [entry["name"] for entry in listed] == [letter.name for letter in letters[::-1]]
    entry = listed[0]
    assert (entry["channel"], entry["address"], entry["attempts"], entry["failed"]) == ("slack", "place 2", 1, "")
    assert (entry["turn"], entry["text"]) == (letters[2].turn, letters[2].text)
    assert entry["reason"].startswith("the channel was archived")
    assert entry["time"].endswith("Z")
    assert [entry["name"] for entry in few] == [other.name]
    assert (retried.status, retried.out) == (0, "1 dead letter will be delivered again.\n")
    assert (again.name, again.attempt) == (letters[0].name, 2)
    assert dropped.json == {"dropped": [letters[1].name]}
    assert (unknown.status, unknown.out) == (1, "")
    assert "no such dead letter" in unknown.err
    assert (wrong.status, wrong.out) == (2, "")
    assert "'nonsense' is no name of a dead letter: `" in wrong.err
    assert "deadletters list` tells them" in wrong.err
    assert "such as deliveries/1f0c5a90be2d4c7781a03a6e" in wrong.err
    assert (rest.status, rest.out) == (0, "1 dead letter was deleted.\n")
    assert [entry["name"] for entry in left] == [other.name]
    assert last.json == {"retried": [other.name]}
