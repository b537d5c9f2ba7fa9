"""What make sets up stays inside the checkout, and `make clean` takes it away again."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from checkout import ROOT

GO = """#!/bin/sh
[ "$1" = install ] || { echo go version go1.25.0 any/any; exit; }
env > "$GOBIN/env"
"""
"""A Go that builds nothing and writes down where it would have written."""


def test_clean_takes_environments_tools_and_compiled_python_away_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = tmp_path / "server" / "code.py"
    compiled = ("server/__pycache__", "tests/core/__pycache__", ".git/__pycache__")  # the last is git's own matter
    for made in (".venv/bin", ".tools/gopath", "build", *compiled):
        (tmp_path / made).mkdir(parents=True)
        (tmp_path / made / "file").touch()
    kept.touch()

    subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, check=True)

    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"Makefile", "server/code.py", ".git/__pycache__/file"}


def test_all_that_go_writes_while_tools_are_built_stays_in_the_checkout(tmp_path: Path) -> None:
    for name, text in {
        "scripts/tools": (ROOT / "scripts" / "tools").read_text(),
        "scripts/apt": "#!/bin/sh\n",
        "bin/go": GO,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])

    subprocess.run([tmp_path / "scripts" / "tools", "grpcurl"], env={**os.environ, "PATH": path}, check=True)

    lines = (tmp_path / ".tools" / "bin" / "env").read_text().splitlines()
    told = dict(line.split("=", 1) for line in lines if "=" in line)
    for name in ("GOPATH", "GOMODCACHE", "GOCACHE", "GOBIN"):
        assert Path(told[name]).is_relative_to(tmp_path / ".tools")
    assert "-modcacherw" in told["GOFLAGS"].split()
