"""What commands call themselves, and what they say where nothing can be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from moltbot_server.cli.tables import fitted
from moltbot_server.cli.terminal import command
from moltbot_server.workspace import Workspace


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command of an environment that is not activated."""
    program = Path(sys.prefix) / "bin" / "moltbot"
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    return program


def test_a_command_is_told_by_its_way_from_here(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(program.parents[2])
    assert command("status") == f"{program.parents[1].name}/bin/moltbot status"


def test_a_command_is_told_by_its_whole_way_to_services_which_run_in_the_root(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert command("status") == f"{program} status"


# A file system that can be read alone takes a right that tests do not have: its answer is put where it would come from.
_READ_ONLY = """
import errno, os, sys
from moltbot_server.cli import main
opened = os.open
def refused(path, flags, *more, **options):
    if flags & os.O_CREAT and str(path).endswith("run/lock"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    return opened(path, flags, *more, **options)
os.open = refused
main()
"""


def test_a_start_where_nothing_can_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    workspace = Workspace(folder=tmp_path / "bot")
    workspace.create()
    words = [sys.executable, "-c", _READ_ONLY, "start", "--workspace", str(workspace.folder)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    told = f"moltbot: cannot write {workspace.run / 'lock'}: Read-only file system\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", told)


def test_a_table_that_a_narrow_terminal_cannot_show_is_told_row_by_row_without_breaking_a_number() -> None:
    why = "it rests for a while after failures"
    rows = [("MODEL", "TOKENS", "WHY"), ("team-large-2026", "1,234,567", why), ("b", "", "")]
    lines = [f"{model:17}{tokens:11}{why}".rstrip() for model, tokens, why in rows]
    assert fitted(lines, rows, columns=30) == (
        "MODEL   team-large-2026\nTOKENS  1,234,567\nWHY     it rests for a while\n        after failures\n\nMODEL   b"
    )
    assert fitted(lines, rows, columns=12).startswith("MODEL   team-large-2026\nTOKENS  1,234,567\nWHY     it\n")
    whole = "\n".join(lines)
    assert fitted(lines[:1], rows[:1], columns=31) == lines[0], "it fits"
    assert fitted(lines, rows, columns=60) == whole, "a terminal of a usual width wraps the last column"
    assert fitted(lines, rows) == whole, "what is no terminal takes lines of any length"
