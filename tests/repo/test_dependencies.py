"""Each part declares what it imports and imports what it declares: nobody installs more or less than they need."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata

import pytest
from checkout import ROOT, own_python_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OWN = {"moltbot", "moltbot_server", "moltbot_adapters"}
PARTS = {
    "clients/python/moltbot": (),
    "adapters/moltbot_adapters": ("http",),
    "server/moltbot_server": ("server", "cli", "redis", "convert", "train"),
}
IMPORTED_BY_NAME = {"jax", "torch", "transformers"}
"""The recipe and the conversion import them by their names as texts, because type checkers run where they are not."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extras: Iterable[str]) -> set[str]:
    """Answers the distributions that a part may import: those of every program, and those of its extras."""
    entries = list(PROJECT["dependencies"])
    for extra in extras:
        entries += PROJECT["optional-dependencies"][extra]
    return {normal(re.split(r"[<>=~!\[; ]", entry, maxsplit=1)[0]) for entry in entries}


def imported(part: str) -> dict[str, set[str]]:
    """Answers the foreign packages that a part imports, each with the distributions that hold it."""
    names = set()
    for path in own_python_files():
        if path.is_relative_to(ROOT / part):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.partition(".")[0])
    holders = metadata.packages_distributions()
    return {name: set(map(normal, holders.get(name, []))) for name in names - OWN - set(sys.stdlib_module_names)}


@pytest.mark.parametrize(("part", "extras"), PARTS.items(), ids=PARTS)
def test_a_part_imports_nothing_that_it_does_not_declare(part: str, extras: tuple[str, ...]) -> None:
    allowed = declared(extras)

    assert {name for name, holders in imported(part).items() if not holders & allowed} - IMPORTED_BY_NAME == set()


@pytest.mark.parametrize(("part", "extras"), PARTS.items(), ids=PARTS)
def test_a_part_declares_nothing_that_it_does_not_import(part: str, extras: tuple[str, ...]) -> None:
    used = set().union(*imported(part).values())

    assert declared(extras) - used - IMPORTED_BY_NAME == set()
