"""How a model runs best is measured with real engines, and what chance favours is not taken for better."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from moltbot_server.models import measuring
from moltbot_server.models.cpus import usable_cores, usable_cpus
from moltbot_server.models.folder import read_folder
from moltbot_server.models.measuring import better_first, described, layouts, measure
from moltbot_server.models.measuring_plan import Outcome, Trial
from moltbot_server.models.tuning import ENVIRONMENT, Tuning, default_tuning
from tiny_model import make_tiny_model

DEFAULT = Tuning(replicas=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("measuring") / "tiny", endless=True)


def trial(replicas: int, many: float, alone: float = 0.0) -> Trial:
    return Trial(
        tuning=Tuning(replicas=replicas), tokens_per_second=many, first_token_ms=1.0, lone_tokens_per_second=alone
    )


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 6, 8, 16, 48, 64, 256])
def test_no_layout_takes_more_than_the_cores_and_few_are_tried(cores: int) -> None:
    usual = default_tuning(cores, 1 << 30)
    tried = layouts(cores, usual)

    assert tried[0] == usual
    assert len(set(tried)) == len(tried) <= 24
    assert all(tuning.processors <= cores for tuning in tried)
    assert any(tuning.processors == cores for tuning in tried)


def test_four_cores_are_shared_in_every_way_that_makes_sense() -> None:
    pairs = [(tuning.replicas, tuning.threads) for tuning in layouts(4, DEFAULT)]

    assert pairs == [(3, 1), (4, 1), (2, 1), (1, 1), (2, 2), (1, 2), (1, 3), (1, 4)]


def test_another_tuning_must_be_clearly_better_than_the_first() -> None:
    usual, chance, better = trial(2, 100.0), trial(3, 102.0), trial(4, 120.0)

    assert better_first([usual, chance], 1.03) == [usual, chance]
    assert better_first([usual, chance, better], 1.03) == [better, chance, usual]


def test_one_answer_alone_counts_for_a_third() -> None:
    many, alone = trial(3, 100.0, alone=10.0), trial(1, 80.0, alone=20.0)

    assert better_first([many, alone], 1.0) == [alone, many]
    assert better_first([many, trial(1, 60.0, alone=20.0)], 1.0)[0] == many


def test_a_tuning_is_told_in_words() -> None:
    assert described(Tuning(replicas=1, threads=2)) == "1 replica of 2 threads, batches of 8, default"


def test_a_quick_measurement_tries_the_default_and_its_neighbours(tiny: Path) -> None:
    lines = measured({"folder": str(tiny), "quick": True})
    outcome = msgspec.convert(lines[-1], Outcome)
    done = [line["done"] for line in lines[:-1]]

    assert outcome.best == outcome.trials[0].tuning
    assert 1 <= len(outcome.trials) <= 3
    assert all(trial.tokens_per_second > 0 and trial.first_token_ms > 0 for trial in outcome.trials)
    assert (outcome.prompt_tokens, outcome.new_tokens) == (64, 64)
    assert done == sorted(done)
    assert all(line["what"] for line in lines[:-1])


async def test_a_thorough_measurement_tries_layouts_batches_and_the_number_types_that_fit_into_memory(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SHORTEST_SLICE", 0.02)
    weights = (tiny / "model.bin").stat().st_size
    monkeypatch.setattr(measuring, "available_memory", lambda: (64 << 20) + 3 * weights)

    outcome = await measure(read_folder(tiny))

    tried = [trial.tuning for trial in outcome.trials]
    cores = usable_cores()
    assert outcome.best == tried[0]
    assert {tuning.batch for tuning in tried} == {4, 8, 16}
    assert {tuning.compute_type for tuning in tried} >= {"default", "int8"}
    assert {(tuning.replicas, tuning.threads) for tuning in tried} == {
        (tuning.replicas, tuning.threads) for tuning in layouts(cores, default_tuning(usable_cpus(), 1, cores))
    }
    assert all(trial.lone_tokens_per_second > 0 for trial in outcome.trials)
    assert "float32" not in {tuning.compute_type for tuning in tried}
    assert len(outcome.notes) == 1
    assert "float32: tiny would take about" in outcome.notes[0]


def test_what_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    assert "expected the folder of a CTranslate2 model" in measured({"folder": str(tmp_path / "no")})[-1]["problem"]


def measured(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a measurement as the command does, in a process of its own, and return what it says."""
    process = subprocess.run(
        [sys.executable, "-m", "moltbot_server.models.measuring"],
        input=json.dumps(plan) + "\n",
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT | os.environ,
        timeout=240,
    )
    return [json.loads(line) for line in process.stdout.splitlines()]
