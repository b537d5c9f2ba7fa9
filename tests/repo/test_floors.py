"""The floors hold, and the contracts that guard them notice what they are there for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

SOURCES = ("clients/python", "server", "adapters")


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Runs the contracts of pyproject.toml over the packages below `root`."""
    folders = os.pathsep.join(str(root / source) for source in SOURCES)
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_imports_go_down_and_core_and_adapters_meet_only_on_the_wire() -> None:
    result = lint(ROOT)

    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("server/moltbot_server/errors.py", "import moltbot_server.store", "The core's floors"),
        ("server/moltbot_server/homeless.py", "", "The core's floors"),
        ("server/moltbot_server/turns.py", "import grpc", "Only rpc and what stands above it know gRPC"),
        ("server/moltbot_server/turns.py", "import moltbot.v1.chat_pb2", "Only rpc and what stands above it know gRPC"),
        ("server/moltbot_server/app.py", "import moltbot_adapters", "Core and adapters meet only on the wire"),
        ("adapters/moltbot_adapters/bad.py", "import moltbot_server.errors", "Core and adapters meet only on the wire"),
        ("clients/python/moltbot/bad.py", "import moltbot_server.errors", "The client package stands alone"),
        ("adapters/moltbot_adapters/bad.py", "import moltbot_adapters.http", "No import cycle"),
    ],
)
def test_an_import_that_leaves_its_floor_is_noticed(tmp_path: Path, module: str, line: str, broken: str) -> None:
    for source in SOURCES:
        shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__", "*.bin"))
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    if broken == "No import cycle":
        with (tmp_path / "adapters/moltbot_adapters/http/__init__.py").open("a") as file:
            file.write("\nimport moltbot_adapters.bad\n")

    result = lint(tmp_path)

    assert result.returncode == 1
    assert f"{broken} BROKEN" in result.stdout
