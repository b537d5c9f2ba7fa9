"""A backup as docs/operations.md tells people to make one, put into another folder."""

from __future__ import annotations

import asyncio
import re
import shutil
import stat
from pathlib import Path

import pytest
from cli_process import Home

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## Back up and restore$(.*?)^## ", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def recipes() -> list[str]:
    """Return what is to be typed: the backup, the database's copy by Python, the restore."""
    section = SECTION.search((ROOT / "docs" / "operations.md").read_text("utf-8"))
    assert section is not None
    backup, by_python, restore = FENCE.findall(section[1])
    return [backup, by_python, restore]


async def typed(home: Home, text: str) -> tuple[int, str]:
    """Type something as a person with an ordinary umask does; return its status and what it complained of."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f"umask 022\n{text}"),
        cwd=home.folder,
        env=home.environ,
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
