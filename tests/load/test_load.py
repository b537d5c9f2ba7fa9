"""The load scenarios run: ghz drives a core that they start, every call is a turn of its own, and the table says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run import ROOT, SCENARIOS, ghz

SCENARIO_FILES = sorted(SCENARIOS.glob("*.json"))


@pytest.mark.parametrize("file", SCENARIO_FILES, ids=lambda file: file.stem)
def test_a_scenario_is_bounded_and_repeats_no_request(file: Path) -> None:
    scenario = json.loads(file.read_text("utf-8"))
    turn = scenario["data"]["turn"]

    assert turn["request_id"] == "{{newUUID}}"
    assert "{{" in turn["session"], "one session would answer one turn at a time"
    assert scenario["connections"] >= 4
    assert 0 < int(scenario["duration"].removesuffix("s")) <= 60
    assert int(scenario["timeout"].removesuffix("s")) <= 20


def test_ghz_drives_unary_and_streaming_turns_without_an_error(tmp_path: Path) -> None:
    try:
        ghz()
    except SystemExit as missing:
        pytest.skip(str(missing))
    names = ["run_turn_scripted", "stream_turn_scripted"]

    result = subprocess.run(
        [sys.executable, "tests/load/run.py", "--seconds", "2", "--out", str(tmp_path), "--only", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert [row["name"] for row in summary["scenarios"]] == names
    for row in summary["scenarios"]:
        assert row["count"] > 50
        assert row["statuses"] == {"OK": row["count"]}
        assert 0 < row["p50"] <= row["p95"] <= row["p99"]
        assert row["name"] in result.stdout
    assert set(summary["machine"]) >= {"cores", "grpcio", "ghz", "commit"}
    assert "mb_live_" not in "".join(file.read_text("utf-8") for file in tmp_path.glob("*.json"))
