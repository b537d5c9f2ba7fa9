"""`moltbot cache` as people run it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home folder in which nothing is configured: the built-in model answers."""
    (tmp_path / "home").mkdir()
    return Home(tmp_path / "home", variables={})


async def test_help_teaches_the_commands_by_example(home: Home) -> None:
    overview = (await home.run("cache")).out
    assert overview == (await home.run("cache", "--help")).out
    for name in ("list", "clear"):
        assert f"\n    {name} " in overview
        told = (await home.run("cache", name, "--help")).out
        assert f"\n  moltbot cache {name}" in told
        assert "--json" in told


async def test_without_a_core_it_says_how_to_start_one(home: Home) -> None:
    await home.run("init")
    for name in ("list", "clear"):
        ended = await home.run("cache", name)
        assert (ended.status, ended.out) == (69, "")
        assert "start it with `" in ended.err
        assert (await home.run("cache", name, "--json")).json["error"]["status"] == 69


async def test_a_question_asked_again_is_served_and_counted_until_the_cache_is_cleared(home: Home) -> None:
    async with home.started():
        told = [(await home.run("chat", "--json", "What can you do?")).json for _ in range(2)]
        listed = {cache["name"]: cache for cache in (await home.run("cache", "list", "--json")).json["caches"]}
        table = (await home.run("cache", "list")).out.splitlines()
        cleared = await home.run("cache", "clear", "answers")
        again = await home.run("cache", "clear", "answers", "--json")
        wrong = await home.run("cache", "clear", "nonsense")
        nearly = await home.run("cache", "clear", "answer")

    assert told[0]["text"] == told[1]["text"] != ""
    answers = listed["answers"]
    assert (answers["backend"], answers["hits"], answers["misses"], answers["entries"]) == ("memory", 1, 1, 1)
    assert (answers["ttl"], answers["max_bytes"]) == (3600.0, 64 << 20)
    assert table[0].split()[:2] == ["NAME", "KEPT"]
    assert [line.split()[0] for line in table[1:]] == ["answers", "sessions", "metadata"]
    assert (cleared.status, cleared.out) == (0, "1 entry was forgotten.\n")
    assert again.json == {"cleared": 0}
    there = "there are answers, sessions, metadata; without a name all are cleared"
    assert (wrong.status, wrong.err) == (2, f"moltbot: there is no cache 'nonsense'; {there}\n")
    assert (nearly.status, nearly.err) == (2, "moltbot: there is no cache 'answer'; did you mean answers?\n")


async def test_nothing_is_kept_where_the_environment_says_off(home: Home) -> None:
    home.variables["MOLTBOT_CACHE_ANSWERS"] = "off"
    async with home.started():
        for _ in range(2):
            await home.run("chat", "What can you do?")
        listed = (await home.run("cache", "list", "--json")).json["caches"]

    assert (listed[0]["hits"], listed[0]["misses"], listed[0]["entries"]) == (0, 0, 0)
