"""The wheel holds what a machine without this checkout needs: code, types, page, model tables, licence; and no more."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, tracked_files

PACKAGES = {
    "moltbot": "clients/python/moltbot",
    "moltbot_server": "server/moltbot_server",
    "moltbot_adapters": "adapters/moltbot_adapters",
}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that is built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = Path(folder).glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_tracked_file_of_a_package(members: set[str], package: str) -> None:
    folder = ROOT / PACKAGES[package]
    tracked = {f"{package}/{path.relative_to(folder).as_posix()}" for path in tracked_files() if folder in path.parents}

    assert f"{package}/py.typed" in tracked
    assert tracked - members == set()


def test_the_wheel_holds_the_licence_and_nothing_from_elsewhere(members: set[str]) -> None:
    tops = {name.split("/")[0] for name in members}
    (record,) = tops - set(PACKAGES)

    assert record.endswith(".dist-info")
    assert f"{record}/licenses/LICENSE" in members
