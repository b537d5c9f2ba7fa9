"""The guard of the contract notices a break, and says what it compared with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

BUF = Path(sys.executable).parent / "buf"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout with the contract and its guard, committed on a branch called main, then left on another branch."""
    if not BUF.exists():
        pytest.skip("buf is not installed: type  make check")
    for name in ("proto", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    accept = [str(BUF), "build", "--as-file-descriptor-set", "--exclude-source-info", "-o", "proto/accepted.binpb"]
    subprocess.run(accept, cwd=tmp_path, check=True)
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "A contract")
    git(tmp_path, "checkout", "--quiet", "-b", "change")
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    identity = {
        f"GIT_{who}_{what}": "test@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    subprocess.run(["git", *arguments], cwd=folder, env={**os.environ, **identity}, check=True)


def guard(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scripts/breaking"],
        cwd=folder,
        env={**os.environ, "BUF": str(BUF)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


def change(folder: Path, old: str, new: str) -> None:
    file = folder / "proto/moltbot/v1/chat.proto"
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), "utf-8")


def test_a_removed_field_is_a_break_even_where_history_is_missing(clone: Path) -> None:
    shutil.rmtree(clone / ".git")
    change(clone, "string channel = 9;", "reserved 9;")

    result = guard(clone)

    assert result.returncode != 0
    assert "channel" in result.stdout


def test_a_new_field_breaks_nobody(clone: Path) -> None:
    change(clone, "string channel = 9;", "string channel = 9;\n  // A field of tomorrow.\n  string tomorrow = 99;")

    result = guard(clone)

    assert result.returncode == 0, result.stdout
    assert "nothing breaks the accepted contract" in result.stdout
    assert "nothing breaks main at" in result.stdout


def test_a_field_that_is_on_main_but_not_yet_promised_is_guarded_on_a_branch(clone: Path) -> None:
    git(clone, "checkout", "--quiet", "main")
    change(clone, "string channel = 9;", "string channel = 9;\n  // A field of tomorrow.\n  string tomorrow = 99;")
    git(clone, "commit", "--quiet", "--all", "--message", "Add a field")
    git(clone, "checkout", "--quiet", "-B", "change")
    change(clone, "string tomorrow = 99;", "int32 tomorrow = 99;")

    result = guard(clone)

    assert result.returncode != 0
    assert "tomorrow" in result.stdout
