"""The locks can be trusted: each package has hashes, no index is named, and every licence suits an Apache-2.0 work."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from checkout import ROOT

LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PACKAGE = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(\S+)")
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla|Zlib|CC0|Unlicense)", re.I
)
"""MPL-2.0 asks for the source of its own files only, and those packages are used as they are."""
COPYLEFT = re.compile(r"\b(A?L?GPL|GNU|SSPL|BUSL|Business Source|Commons Clause|Non-?Commercial)", re.I)


def packages(lock: Path) -> dict[str, set[str]]:
    """Answers the locked versions of each package; more than one where Pythons differ."""
    versions: dict[str, set[str]] = {}
    for match in filter(None, map(PACKAGE.match, lock.read_text("utf-8").splitlines())):
        versions.setdefault(match[1], set()).add(match[2])
    return versions


def licence(name: str) -> str:
    """Answers all that an installed package says about its licence, without the text of the licence itself."""
    fields = metadata.metadata(name)
    classifiers = [text for text in fields.get_all("Classifier") or [] if text.startswith("License")]
    return " | ".join([fields.get("License-Expression") or "", (fields.get("License") or "")[:200], *classifiers])


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_locked_package_has_a_hash(lock: Path) -> None:
    entries = lock.read_text("utf-8").replace("\\\n", " ").splitlines()
    required = [entry for entry in entries if entry and not entry.startswith("#")]

    assert required
    assert [entry for entry in required if not re.search(r"==\S+.*--hash=sha256:[0-9a-f]{64}", entry)] == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_no_lock_names_an_index_or_an_address(lock: Path) -> None:
    assert re.findall(r"https?:|--(?:extra-)?index-url|--find-links|@ \S+", lock.read_text("utf-8")) == []


def test_what_is_tested_is_what_runs() -> None:
    run, dev = (packages(ROOT / "requirements" / f"{name}.txt") for name in ("run", "dev"))

    assert {name: dev.get(name) for name in run} == run


def test_every_direct_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["server"] + extras["http"] + extras["cli"]
    names = {re.split(r"[<>=~!\[; ]", entry, maxsplit=1)[0].lower() for entry in wanted}

    assert names - set(packages(ROOT / "requirements" / "run.txt")) == set()


def test_a_program_that_only_calls_a_core_installs_what_the_call_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

    names = {re.split(r"[<>=~]", entry, maxsplit=1)[0] for entry in project["dependencies"]}
    assert names == {"googleapis-common-protos", "grpcio", "protobuf"}


def test_every_licence_of_an_installed_package_suits_an_apache_work() -> None:
    installed = {re.sub(r"[-_.]+", "-", name).lower() for dist in metadata.distributions() if (name := dist.name)}
    locked = set(packages(ROOT / "requirements" / "dev.txt")) & installed
    said = {name: licence(name) for name in sorted(locked)}

    assert locked
    assert {name: text for name, text in said.items() if COPYLEFT.search(text) or not PERMISSIVE.search(text)} == {}
