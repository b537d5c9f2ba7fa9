"""The checkout names no machine: it works wherever it is cloned and installs from whatever registry is set up there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkout import ROOT, tracked_files

TEXT = {".py", ".pyi", ".md", ".txt", ".in", ".toml", ".yaml", ".yml", ".json", ".proto", ".sh", ".js", ".css", ".html"}
REGISTRY = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|proxy\.golang\.org|deb\.debian\.org)")
KEY = re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----|\bsk-[A-Za-z0-9]{32,}|\bAKIA[0-9A-Z]{16}\b")


def findings(pattern: re.Pattern[str]) -> list[str]:
    own = [
        path for path in tracked_files() if path.suffix in TEXT or path.suffix == "" or path.parent.name == "scripts"
    ]
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in own
        if path.name != "test_strangers.py"
        for number, line in enumerate(path.read_text("utf-8", errors="ignore").splitlines(), 1)
        if (match := pattern.search(line))
    ]


@pytest.mark.parametrize("folder", sorted({ROOT.parent, Path.home()}), ids=str)
def test_no_file_names_a_folder_of_the_machine_it_is_on(folder: Path) -> None:
    if len(folder.parts) < 2 or folder == Path("/tmp"):
        pytest.skip(f"{folder} is no folder of one machine alone")

    assert findings(re.compile(rf"(?<![\w.~-]){re.escape(str(folder))}/")) == []


def test_no_file_names_a_package_registry() -> None:
    assert findings(REGISTRY) == []


def test_no_file_holds_what_looks_like_a_key() -> None:
    assert findings(KEY) == []
