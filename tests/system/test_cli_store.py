"""`moltbot store` as people run it: with the database of a workspace, and with a Redis."""

from __future__ import annotations

import os
import resource
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from cli_process import ANY_PORTS, Home
from kept_turns import ended, tear
from moltbot_server.store import NewTurn, UsageRow
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.turns import SessionKey, TextPart, TurnKey
from redis.asyncio import Redis
from redis_process import KeepingRedis


async def fill(home: Home, turns: int = 3, text: str = "question", *, done: bool = False) -> None:
    """Make the workspace, and store turns in it, which wait to be carried on unless they are `done`."""
    assert (await home.run("init")).status == 0
    store = SqliteStore(home.workspace / "moltbot.db")
    await store.open()
    for number in range(1, turns + 1):
        key = TurnKey(session=SessionKey(workspace="default", session="s"), ordinal=number)
        said = (TextPart(text=f"{text} {number}"),)
        named = {"key": key, "request_id": f"r{number}", "digest": b"d", "title": "t"}
        turn = NewTurn(create_time=1e9 + number, question=said, **named)
        await store.accept(turn)
        if done:
            await store.finish(ended(turn))
    await store.add_usage([UsageRow(workspace="default", day="2026-01-01", model="m", turns=4)])
    await store.close()


async def test_a_workspace_without_a_store_says_what_to_do(home: Home) -> None:
    told = await home.run("store", "check")
    assert (told.status, "there is no database yet" in told.out) == (0, True)
    told = await home.run("store", "export", "x.jsonl")
    assert (told.status, " init`, or name" in told.err) == (78, True)
    assert (await home.run("init")).status == 0
    told = await home.run("store", "export", "x.jsonl")
    assert (told.status, "made by the first" in told.err) == (1, True)
    assert not (home.folder / "x.jsonl").exists()
    told = await home.run("store", "import", "x.jsonl")
    assert (told.status, told.err) == (2, "moltbot: there is no file x.jsonl.\n")


async def test_a_store_is_checked_exported_and_imported_into_another_workspace(home: Home) -> None:
    await fill(home)
    told = await home.run("store", "check", "--json")
    assert told.status == 0
    assert (told.json["ok"], told.json["store"]) == (True, "sqlite")

    file = home.folder / "all.jsonl"
    told = await home.run("store", "export", "all.jsonl")
    assert (told.status, told.out.startswith("5 records were written to all.jsonl")) == (0, True)
    assert "a line for each between a first line and a last one" in told.out
    assert told.err == ""
    async with home.started():
        beside = await home.run("store", "export", "beside.jsonl")
        assert (beside.status, beside.out.startswith("5 records were written to beside.jsonl")) == (0, True)
        assert beside.err.startswith(
            "moltbot: MoltBot runs meanwhile (~/.moltbot), and what is said from now on is not "
        )
        told = await home.run("store", "export", "beside2.jsonl", "--json")
        assert (told.err, told.json["beside_cores"]) == ("", True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    told = await home.run("store", "export", "all.jsonl", "--json")
    assert (told.status, "exists already" in told.json["error"]["message"]) == (2, True)
    assert file.read_bytes()

    told = await home.run("store", "import", "all.jsonl")
    assert (told.status, "--merge" in told.err) == (1, True)
    assert (await home.run("init", "-w", "other")).status == 0
    told = await home.run("store", "import", "all.jsonl", "-w", "other")
    assert (told.status, told.out) == (0, "5 of 5 records were imported.\n")
    told = await home.run("store", "import", "all.jsonl", "-w", "other", "--merge", "--json")
    assert (told.status, told.json["records"], told.json["new"]) == (0, 5, 0)
    file.write_bytes(file.read_bytes()[:-5])
    told = await home.run("store", "import", "all.jsonl", "-w", "other", "--merge")
    assert (told.status, "its end is missing" in told.err) == (1, True)


async def test_an_export_that_finds_no_room_names_its_file_and_leaves_none(home: Home) -> None:
    await fill(home, text="x" * 100_000)
    most = 1 << 16
    limited = await home.spawn(
        "store", "export", "all.jsonl", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    )
    out, err = await limited.communicate()
    assert (limited.returncode, out) == (1, b"")
    assert err.decode() == (
        "moltbot: all.jsonl cannot be written: File too large. Nothing was exported: make room, or name a file on "
        "another disk.\n"
    )
    assert not (home.folder / "all.jsonl").exists()


@pytest.mark.parametrize(
    ("version", "told_so"),
    [
        (4, "was written by an older release (schema 4, this one reads "),
        (99, "was written by a newer release (schema 99, this one reads "),
        (-3, "cannot be read: its schema is -3, which no release has written"),
    ],
)
async def test_an_export_leaves_a_database_of_another_release_as_it_is(home: Home, version: int, told_so: str) -> None:
    await fill(home)
    database = home.workspace / "moltbot.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = database.read_bytes()
    told = await home.run("store", "export", "all.jsonl")
    assert (told.status, told_so in told.err) == (1, True)
    assert database.read_bytes() == before
    assert not (home.folder / "all.jsonl").exists()


async def test_a_damaged_database_is_told_with_what_to_do(home: Home) -> None:
    await fill(home)
    (home.workspace / "moltbot.db").write_bytes(b"no database at all" * 100)
    told = await home.run("store", "check")
    assert told.status == 1
    assert "WRONG: it is damaged, or no database" in told.out


async def test_what_is_on_a_damaged_page_is_named_by_check_and_export(home: Home) -> None:
    await fill(home, turns=60, text="so many words of " * 10 + "turn")
    assert tear(home.workspace / "moltbot.db", "turn 30")
    told = await home.run("store", "check")
    assert (told.status, told.err) == (1, "")
    assert "WRONG: damaged: " in told.out
    assert "30, " in next(line for line in told.out.splitlines() if line.startswith("WRONG: turns "))
    assert "of session s in workspace default cannot be read" in told.out
    assert "note: put a backup in its place" in told.out
    told = await home.run("store", "export", "all.jsonl")
    assert (told.status, "cannot be used now" in told.err) == (1, False)
    assert "moltbot.db is damaged: turn " in told.err
    assert "of session s in workspace default cannot be read. `moltbot store check` names all that is lost" in told.err
    assert not (home.folder / "all.jsonl").exists()


async def test_a_workspace_moves_to_redis_where_a_core_serves_it_and_back(home: Home, tmp_path: Path) -> None:
    await fill(home)
    assert (await home.run("store", "export", "all.jsonl")).status == 0
    with KeepingRedis(tmp_path) as redis:
        home.variables |= {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(redis.port)}
        told = await home.run("store", "import", "all.jsonl")
        first, last = told.out.splitlines()
        assert (told.status, first) == (0, "5 of 5 records were imported.")
        assert last == "~/.moltbot/moltbot.db stays behind: it is not used any more, gets old, and may be moved away."
        assert "4" in (await home.run("usage", "--since", "2026-01-01", "--until", "2026-02-01")).out
        async with home.started():
            told = await home.run("chat", "--session", "s", "and now?")
            assert (told.status, "You said" in told.out) == (0, True)
            told = await home.run("store", "check")
            assert (told.status, "is there (" in told.out) == (0, True)
            told = await home.run("store", "import", "all.jsonl", "--merge")
            assert (told.status, "stop it first" in told.err) == (69, True)
            home.variables |= {"MOLTBOT_WORKSPACE": "elsewhere"}  # of a node on another machine, say
            assert (await home.run("init")).status == 0
            (home.folder / "elsewhere" / "key").write_bytes((home.workspace / "key").read_bytes())
            told = await home.run("store", "export", "beside.jsonl")
            assert (told.status, "MoltBot runs meanwhile (" in told.err) == (0, True)
            del home.variables["MOLTBOT_WORKSPACE"]
        assert (await home.run("store", "export", "back.jsonl")).status == 0
        home.variables |= {"MOLTBOT_STORE_TYPE": "sqlite"}
    told = await home.run("store", "import", "back.jsonl", "--merge", "--json")
    assert (told.status, told.json["new"]) == (0, 2)  # the turn of the chat, and its usage
    lines = (home.folder / "back.jsonl").read_bytes().splitlines()
    assert len([line for line in lines if b"and now?" in line]) == 1


async def test_a_way_back_from_redis_is_told_that_brings_nothing_deleted_back(home: Home, tmp_path: Path) -> None:
    await fill(home, done=True)
    assert (await home.run("store", "export", "all.jsonl")).status == 0
    with KeepingRedis(tmp_path) as redis:
        home.variables |= {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(redis.port)}
        assert (await home.run("store", "import", "all.jsonl")).status == 0
        store = RedisStore(host="127.0.0.1", port=redis.port)
        await store.open()
        assert await store.delete_session(SessionKey(workspace="default", session="s")) is True
        await store.add_usage([UsageRow(workspace="default", day="2026-01-01", model="m", turns=3)])
        await store.close()
        told = await home.run("store", "import", "all.jsonl")
        place = f"Redis at 127.0.0.1:{redis.port} has records under the prefix moltbot"
        assert (told.status, told.err.count(place)) == (1, 1)
        assert "another store.prefix" in told.err
        assert (await home.run("store", "export", "back.jsonl")).status == 0
        home.variables |= {"MOLTBOT_STORE_TYPE": "sqlite"}
    told = await home.run("store", "import", "back.jsonl")
    files = sorted(home.workspace.glob("moltbot.db*"))
    names = ", ".join(file.name for file in files)
    assert (told.status, told.out) == (1, "")
    assert f"move it away ({names}) and import again" in told.err
    assert told.err.index("move it away") < told.err.index("--merge")
    for file in files:
        file.rename(tmp_path / file.name)
    assert (await home.run("store", "import", "back.jsonl")).out == "1 of 1 records were imported.\n"
    assert "7" in (await home.run("usage", "--since", "2026-01-01", "--until", "2026-02-01")).out


async def test_a_redis_that_cannot_be_used_is_told_with_what_to_change(home: Home, tmp_path: Path) -> None:
    assert (await home.run("init")).status == 0
    home.variables |= {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": "1"}
    told = await home.run("store", "check")
    assert (told.status, "127.0.0.1:1" in told.err) == (69, True)
    with KeepingRedis(tmp_path, "--maxmemory-policy", "allkeys-lru") as redis:
        home.variables |= {"MOLTBOT_STORE_PORT": str(redis.port)}
        told = await home.run("store", "check")
        assert (told.status, "WRONG: maxmemory-policy is allkeys-lru" in told.out) == (1, True)
        told = await home.run("start", *ANY_PORTS)
        assert told.status != os.EX_OK
        assert "set maxmemory-policy noeviction" in told.err


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("maxmemory", "1mb", "its memory is used up, so it takes no writes (OOM): raise its maxmemory"),
        ("min-replicas-to-write", "1", "too few replicas follow it, so it takes no writes (NOREPLICAS): start those"),
    ],
)
async def test_a_redis_that_takes_no_writes_is_checked_and_exported_and_not_written(
    home: Home, tmp_path: Path, setting: str, value: str, problem: str
) -> None:
    await fill(home)
    assert (await home.run("store", "export", "all.jsonl")).status == 0
    with KeepingRedis(tmp_path) as redis:
        home.variables |= {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(redis.port)}
        assert (await home.run("store", "import", "all.jsonl")).status == 0
        async with Redis(host="127.0.0.1", port=redis.port, protocol=2) as client:
            await client.config_set(setting, value)
        told = await home.run("store", "check")
        assert (told.status, told.err) == (1, "")
        assert f"WRONG: {problem}" in told.out
        told = await home.run("store", "export", "again.jsonl")
        assert (told.status, told.err) == (0, "")
        assert told.out.startswith("5 records were written")
        assert (await home.run("usage", "--since", "2026-01-01", "--until", "2026-02-01")).status == 0
        for words in (["store", "import", "all.jsonl", "--merge"], ["start", *ANY_PORTS]):
            told = await home.run(*words)
            assert (told.status, problem in told.err, "does not answer" in told.err) == (69, True, False), told.err


async def test_a_store_that_may_lose_everything_is_not_said_to_be_without_fault(home: Home, tmp_path: Path) -> None:
    assert (await home.run("init")).status == 0
    with KeepingRedis(tmp_path, "--appendonly", "no") as redis:
        home.variables |= {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(redis.port)}
        told = await home.run("store", "check")
    assert (told.status, "warning: appendonly is no" in told.out) == (0, True)
    assert told.out.endswith(": it can be read, but there is 1 warning.\n")


async def test_sessions_that_nobody_has_used_for_the_days_of_retention_are_deleted(home: Home) -> None:
    await fill(home)
    home.variables |= {"MOLTBOT_RETENTION_DAYS": "30"}
    async with home.started() as started:
        await home.run("chat", "--session", "fresh", "hello")
        if "forgot sessions" not in started.said:
            await started.line("forgot sessions")
    told = await home.run("store", "export", "all.jsonl")
    assert told.status == 0
    text = (home.folder / "all.jsonl").read_text()
    assert "question 1" not in text
    assert "hello" in text


async def test_a_store_that_keeps_nothing_is_not_looked_after_and_leaves_nothing_behind(home: Home) -> None:
    home.variables["MOLTBOT_STORE_TYPE"] = "memory"
    async with home.started():
        assert (await home.run("chat", "--session", "s", "first words")).out == "You said: first words\n"
        assert (await home.run("chat", "--session", "s", "more")).status == 0
    assert not (home.workspace / "moltbot.db").exists()
    for words in (["check"], ["export", "all.jsonl"]):
        told = await home.run("store", *words)
        assert (told.status, "Nothing is kept" in told.err) == (69, True), told
