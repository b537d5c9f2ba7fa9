"""A backup as docs/operations.md tells people to make one, put into another folder."""

from __future__ import annotations

import asyncio
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
from cli_process import Home
from moltbot_server.testing import free_port
from redis_process import KeepingRedis

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## Back up and restore$(.*?)^## ", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def recipes(store: str = "SQLite") -> list[str]:
    """Return what is to be typed where the store is SQLite: the backup, the database's copy by Python, the restore.

    Where it is Redis: the backup by MoltBot and its restore, and the same by Redis itself.
    """
    section = SECTION.search((ROOT / "docs" / "operations.md").read_text("utf-8"))
    assert section is not None
    ways = dict(re.findall(r"^### Where the store is (\w+)$(.*?)(?=^### |\Z)", section[1], re.MULTILINE | re.DOTALL))
    return FENCE.findall(ways[store])


async def typed(home: Home, text: str) -> tuple[int, str]:
    """Type something as a person with an ordinary umask does; return its status and what it complained of."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f"umask 022\n{text}"),
        cwd=home.folder,
        env={**home.environ, "PATH": f"{Path(sys.executable).parent}:{ROOT / '.tools' / 'bin'}:{home.environ['PATH']}"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, err.decode()


@pytest.fixture
async def home(tmp_path: Path) -> Home:
    """A home whose workspace holds a conversation."""
    (tmp_path / "home").mkdir()
    home = Home(tmp_path / "home")
    async with home.started():
        assert (await home.run("chat", "--session", "kept", "Hello")).status == 0
    return home


@pytest.mark.parametrize("way", ["sqlite3", "python3"])
async def test_a_backup_is_for_its_owner_alone_and_holds_what_was_said(home: Home, way: str) -> None:
    if not shutil.which("sqlite3"):
        pytest.skip("the program sqlite3 is not installed")
    backup, by_python, restore = recipes()
    assert "moltbot.db" in by_python
    copies, restored = home.folder / "moltbot-backup", home.folder / "restored"
    (home.workspace / ".env").write_text("WORKERS=1\n")
    (home.workspace / ".env").chmod(0o600)
    assert await typed(home, backup) == (0, "")
    if way == "python3":
        (copies / "moltbot.db").unlink()
        assert await typed(home, by_python) == (0, "")
    assert {path.name for path in copies.iterdir()} == {"key", "moltbot.yaml", "moltbot.db", ".env"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in copies.iterdir()} == {0o600}

    put_back = [line for line in restore.splitlines() if "vault.key" not in line and "moltbot start" not in line]
    assert await typed(home, "\n".join(put_back)) == (0, "")
    assert (restored / "key").read_text() == (home.workspace / "key").read_text()
    exported = await home.run("store", "export", "was.jsonl", "--workspace", str(home.workspace), "--json")
    again = await home.run("store", "export", "is.jsonl", "--workspace", str(restored), "--json")
    assert exported.json["records"] == again.json["records"] > 2


async def test_a_backup_that_cannot_be_made_says_so(home: Home) -> None:
    if not shutil.which("sqlite3"):
        pytest.skip("the program sqlite3 is not installed")
    (home.workspace / "moltbot.db").unlink()
    (home.workspace / "moltbot.db").mkdir()  # SQLite cannot open a folder, whoever asks
    status, why = await typed(home, recipes()[0])
    assert (status != 0, why != "") == (True, True)


async def test_a_database_that_is_not_the_store_or_not_there_is_not_copied(home: Home) -> None:
    if not shutil.which("sqlite3"):
        pytest.skip("the program sqlite3 is not installed")
    backup, by_python, _ = recipes()
    copies = home.folder / "moltbot-backup"
    home.variables["MOLTBOT_STORE_TYPE"] = "memory"  # as good as Redis: the database is left from before
    status, why = await typed(home, backup)
    assert (status, "no store in SQLite" in why, copies.exists()) == (1, True, False)
    del home.variables["MOLTBOT_STORE_TYPE"]
    (home.workspace / "moltbot.db").unlink()
    for way in (backup, by_python):
        copies.mkdir(exist_ok=True)
        status, why = await typed(home, way)
        assert (status != 0, why != "") == (True, True)
        assert not (home.workspace / "moltbot.db").exists()
        assert not (copies / "key").exists()


def at(port: int, recipe: str) -> str:
    """Return a recipe for the Redis at a port."""
    return recipe.replace("redis-cli", f"redis-cli -p {port}").replace("redis-server", f"redis-server --port {port}")


@pytest.mark.parametrize("way", ["export", "rdb"])
async def test_a_backup_of_redis_holds_what_was_said_and_can_be_put_into_another_one(tmp_path: Path, way: str) -> None:
    if not all(shutil.which(name) for name in ("redis-cli", "redis-check-rdb")):
        pytest.skip("the programs redis-cli and redis-check-rdb are not installed")
    export, take_in, dump, load = recipes("Redis")
    for name in ("home", "before", "after"):
        (tmp_path / name).mkdir()
    home = Home(tmp_path / "home")
    home.variables |= {"MOLTBOT_STORE_TYPE": "redis"}
    copies, after = home.folder / "moltbot-backup", tmp_path / "after"
    with KeepingRedis(tmp_path / "before") as redis:
        home.variables["MOLTBOT_STORE_PORT"] = str(redis.port)
        async with home.started():
            assert (await home.run("chat", "--session", "kept", "Hello")).status == 0
            if way == "rdb":
                assert (await typed(home, at(redis.port, dump)))[0] == 0
        if way == "export":
            assert (await typed(home, export))[0] == 0
            assert {path.name for path in copies.iterdir()} == {"key", "moltbot.yaml", "conversations.jsonl"}
        was = (await home.run("store", "export", "was.jsonl", "--json")).json["records"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in copies.iterdir()} == {0o600}
    if way == "rdb":
        (copies / "dump.rdb").rename(after / "dump.rdb")
        assert await typed(home, f"cd {after}\n{at(free_port(), load)}") == (0, "")
    with KeepingRedis(after) as redis:
        home.variables["MOLTBOT_STORE_PORT"] = str(redis.port)
        if way == "export":
            assert (await typed(home, take_in))[0] == 0
        assert (await home.run("store", "export", "is.jsonl", "--json")).json["records"] == was > 2
        async with home.started():
            assert (await home.run("chat", "--session", "kept", "Hello again")).status == 0
