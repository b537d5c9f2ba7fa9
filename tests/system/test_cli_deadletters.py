"""`moltbot deadletters` as people run it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from cli_process import Home
from cli_terminal import answer_when_asked
from moltbot import Delivery, MoltBot
from moltbot.v1.chat_pb2 import Place
from moltbot_server.store.outbox import DeadLetter
from moltbot_server.testing import RunningServer
from moltbot_server.workspace import Workspace


@pytest.fixture
async def bot(core: RunningServer) -> AsyncIterator[MoltBot]:
    """A client of that core."""
    async with MoltBot(core.address, core.key) as bot:
        yield bot


async def test_help_teaches_the_commands_by_example(home: Home) -> None:
    overview = (await home.run("deadletters")).out
    assert overview == (await home.run("deadletters", "--help")).out
    for name in ("list", "retry", "drop"):
        assert f"\n    {name} " in overview
        told = (await home.run("deadletters", name, "--help")).out
        assert f"\n  moltbot deadletters {name}" in told
        assert "--json" in told


async def test_an_empty_channel_is_none_and_not_all(home: Home) -> None:
    ended = await home.run("deadletters", "drop", "--all", "--channel", "")
    assert ended.status == 2
    assert "it is empty, which names nobody" in ended.err


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
            unsaid = await home.run("deadletters", "drop", "--all", "--channel", "slack")
            rest = await home.run("deadletters", "drop", "--all", "--channel", "slack", "--yes")
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
    assert (unsaid.status, unsaid.out) == (2, "")
    told = "1 dead letter of the channel slack would be deleted for good: say --yes if that is meant"
    assert told in unsaid.err
    assert (rest.status, rest.out) == (0, "1 dead letter was deleted.\n")
    assert [entry["name"] for entry in left] == [other.name]
    assert last.json == {"retried": [other.name]}


async def answered(bot: MoltBot, *addresses: str) -> list[str]:
    """Have a turn answered for each place of the channel slack; return what each answer says."""
    said = []
    for number, address in enumerate(addresses):
        outcome = await bot.run_turn(f"say {number}", reply_to=Place(channel="slack", address=address))
        said.append(outcome.text)
    return said


async def given_out(bot: MoltBot, count: int) -> list[tuple[str, str]]:
    """Confirm so many deliveries of the channel slack; return where each belongs and what it says, as they came."""
    came: list[tuple[str, str]] = []
    async with asyncio.timeout(10):
        async for delivery in bot.deliveries("slack"):
            came.append((delivery.address, delivery.text))
            await delivery.confirm()
            if len(came) == count:
                break
    return came


async def test_all_that_are_retried_come_oldest_first_in_each_place(home: Home, bot: MoltBot) -> None:
    said = await answered(bot, "C0", "C1", "C0", "C1")
    left = len(said)
    async for delivery in bot.deliveries("slack"):
        await delivery.reject("the token was revoked", permanent=True)
        left -= 1
        if not left:
            break
    assert (await home.run("deadletters", "retry", "--all", "--channel", "slack")).status == 0
    came = await given_out(bot, 4)
    assert [text for address, text in came if address == "C0"] == [said[0], said[2]]
    assert [text for address, text in came if address == "C1"] == [said[1], said[3]]


async def test_those_that_died_at_one_moment_are_retried_in_the_order_of_their_answers(
    home: Home, core: RunningServer, bot: MoltBot
) -> None:
    said = await answered(bot, *["C0"] * 6)
    assert await core.core.store.outbox.prune(keep=0, delivered=60) == 6
    ended = await home.run("deadletters", "retry", "--all")
    assert ended.out == "6 dead letters will be delivered again.\n"
    assert [text for _, text in await given_out(bot, 6)] == said


async def test_a_dead_letter_that_somebody_else_took_meanwhile_holds_the_others_up_no_more(
    home: Home, core: RunningServer, bot: MoltBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = await answered(bot, *["C0"] * 3)
    outbox = core.core.store.outbox
    assert await outbox.prune(keep=0, delivered=60) == 3
    listed = outbox.list_dead

    async def list_and_drop(*arguments: Any, **options: Any) -> Sequence[DeadLetter]:
        found = await listed(*arguments, **options)
        second = next(letter.delivery for letter in found if letter.delivery.ending.text == said[1])  # type: ignore[union-attr]
        assert await outbox.drop(second.turn.session.workspace, second.id)
        return found

    monkeypatch.setattr(outbox, "list_dead", list_and_drop)
    ended = await home.run("deadletters", "retry", "--all")
    assert (ended.status, ended.out) == (0, "2 dead letters will be delivered again.\n")
    assert [text for _, text in await given_out(bot, 2)] == [said[0], said[2]]


async def test_at_a_terminal_it_asks_whether_all_are_meant(home: Home, core: RunningServer, bot: MoltBot) -> None:
    await answered(bot, "C0", "C1")
    assert await core.core.store.outbox.prune(keep=0, delivered=60) == 2
    for answer, left in (("n", 2), ("y", 0)):
        asked = "2 dead letters, of all channels, would be deleted for good. Go"
        await answer_when_asked(answer, asked, home, "drop", "--all", command="deadletters")
        assert len((await home.run("deadletters", "list", "--json")).json["dead_letters"]) == left


async def test_a_channel_without_dead_letters_is_said_to_have_none_beside_those_that_have_some(
    home: Home, core: RunningServer, bot: MoltBot
) -> None:
    empty = await home.run("deadletters", "drop", "--all", "--channel", "nosuch")
    assert (empty.status, empty.out) == (0, "There are no dead letters.\n")
    assert (await home.run("deadletters", "retry", "--all")).out == "There are no dead letters.\n"
    for channel in ("slack", "discord", "slack"):
        await bot.run_turn("say it", reply_to=Place(channel=channel, address="C0"))
    assert await core.core.store.outbox.prune(keep=0, delivered=60) == 3

    for words in (("drop", "--all"), ("retry", "--all"), ("list",)):
        ended = await home.run("deadletters", *words, "--channel", "nosuch")
        assert ended.status == 0
        assert ended.out == "There are no dead letters of the channel nosuch; there are some of discord, slack.\n"
    told = await home.run("deadletters", "drop", "--all", "--channel", "nosuch", "--json")
    assert (told.status, told.json) == (0, {"dropped": [], "channels": ["discord", "slack"]})
    assert len((await home.run("deadletters", "list", "--json")).json["dead_letters"]) == 3
