"""The code keeps its shape: short files, short functions, honest names, nothing left half done."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from checkout import ROOT, functions, own_python_files

LONGEST_FILE = 500
LONG_FUNCTION = 45
LONG_FUNCTIONS_ALLOWED = 0.05
DOOR = 30
"""Most lines of an `__init__.py`: it is empty or a door."""
VAGUE = re.compile(r"(Manager|Helper|Utils?|Base|Impl|Data|Info)(?=[A-Z]|$)")
VAGUE_ALLOWED = {"BasePlugin", "ModelManager"}
VAGUE_MODULES = {"utils", "util", "common", "helpers", "misc"}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|unittest\.mock|MagicMock")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_python_file_is_too_long_to_read() -> None:
    lengths = {named(path): len(path.read_text("utf-8").splitlines()) for path in own_python_files()}

    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_nearly_every_function_fits_on_a_screen() -> None:
    lengths = [(lines, f"{named(path)}:{name}") for path in own_python_files() for name, lines in functions(path)]
    too_long = sorted((lines, name) for lines, name in lengths if lines >= LONG_FUNCTION)

    assert len(too_long) <= LONG_FUNCTIONS_ALLOWED * len(lengths), too_long


def test_a_package_door_is_short() -> None:
    doors = [path for path in own_python_files() if path.name == "__init__.py"]

    assert {named(path) for path in doors if len(path.read_text("utf-8").splitlines()) > DOOR} == set()


def test_no_class_or_module_has_a_name_that_says_nothing() -> None:
    classes = {
        f"{named(path)}:{node.name}"
        for path in own_python_files()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef) and VAGUE.search(node.name) and node.name not in VAGUE_ALLOWED
    }
    modules = {named(path) for path in own_python_files() if path.stem in VAGUE_MODULES}

    assert classes | modules == set()


def test_nothing_is_left_for_later_or_mocked() -> None:
    found = {
        f"{named(path)}:{number}: {line.strip()}"
        for path in own_python_files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if UNFINISHED.search(line)
    }

    assert found == set()
