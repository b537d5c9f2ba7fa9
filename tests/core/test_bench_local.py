"""The benchmark of the local engine runs whole, with a small model, and says what it compared."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from moltbot_server.bench.local import FIGURES, Figure, bench_local
from moltbot_server.bench.local_command import local_table
from moltbot_server.bench.local_prompts import QUESTIONS, Workload
from moltbot_server.bench.local_rig import INLINE, Rig
from moltbot_server.bench.random_model import Shape, random_model
from moltbot_server.models.tuning import Tuning

SMALL = Shape(layers=2, width=64, heads=4, feed=128, vocabulary=2000, context_length=256)
WORDS = Workload(shortest=16, longest=24, new=8, vocabulary=2000)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = random_model(SMALL, cache=tmp_path_factory.mktemp("cache"))
    with contextlib.ExitStack() as stack:
        yield Rig(stack, folder, Tuning(replicas=2), INLINE)


def test_streams_through_grpc_are_counted_with_their_stages_and_processors(rig: Rig) -> None:
    counted = rig.streamed(WORDS, 4, 0.2)

    assert counted["tokens_per_second"] > 0
    assert counted["answers"] > 0
    assert 0 < counted["first_token_ms"]["p50"] <= counted["whole_ms"]["p50"]
    assert set(counted["stages_ms"]) == {"accept", "queue", "first_token", "generation", "total"}
    assert counted["stages_ms"]["total"] > 0
    assert {"core", "client"} <= set(counted["processors"])


@pytest.mark.parametrize(("way", "rows"), [("sorted", 4), ("told", 4), ("mixed", 8), ("one", 4)])
def test_ctranslate2_by_itself_is_counted_each_way(rig: Rig, way: str, rows: int) -> None:
    counted = rig.bare(way, WORDS, rows, 0.1)

    assert counted["tokens_per_second"] > 0
    assert counted["rows"] == rows


def test_a_load_that_is_not_the_planned_one_breaks_off(rig: Rig) -> None:
    longer_than_the_context = Workload(shortest=300, longest=300, new=8, vocabulary=2000)

    with pytest.raises(RuntimeError, match="a process of the benchmark ended early"):
        rig.streamed(longer_than_the_context, 2, 0.1)


def test_prompts_are_as_long_as_planned_and_the_same_in_every_run() -> None:
    ask, again = WORDS.asking(7), WORDS.asking(7)
    asked = [ask() for _ in range(50)]

    assert asked == [again() for _ in range(50)]
    assert {len(text.split()) + 3 for text, _ in asked} == set(range(16, 25))
    assert {limit for _, limit in asked} == {8}
    questions = Workload().asking(1)
    assert {questions() for _ in range(200)} == {(text, 0) for text in QUESTIONS}


def test_a_figure_compares_tokens_or_first_tokens() -> None:
    slices = {
        "a": {"tokens_per_second": 30.0, "first_token_ms": {"p50": 10.0}},
        "b": {"tokens_per_second": 20.0, "first_token_ms": {"p50": 50.0}},
    }
    faster = Figure(scene="s", of="a", to="b", bar=1, what="")
    sooner = Figure(scene="s", of="a", to="b", bar=1, what="", sooner=True)

    assert (faster.ratio(slices), sooner.ratio(slices)) == (1.5, 5.0)


def test_the_built_in_model_is_measured_in_a_whole_installation() -> None:
    told: list[float] = []

    report = bench_local(
        only=["builtin_ceiling_ratio"], rounds=2, seconds=0.2, progress=lambda done, what: told.append(done)
    )

    detail = report["builtin_ceiling_detail"]
    assert 0 < detail["lowest"] <= report["builtin_ceiling_ratio"] <= detail["highest"]
    assert set(report["scenes"]) == {"builtin"}
    assert set(report["scenes"]["builtin"]["slices"]) == {"streamed", "ceiling"}
    assert len(report["scenes"]["builtin"]["rounds"]) == 2
    assert {"processor", "processors", "ctranslate2", "grpcio", "commit", "load_before"} <= set(report["machine"])
    assert told == sorted(told)
    assert 0 <= told[0] <= told[-1] < 1
    assert "builtin_ceiling_ratio" in local_table(report)


def test_the_command_refuses_what_it_does_not_know() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moltbot_server.bench", "local", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    unknown = run("--only", "speed")
    assert unknown.returncode == 2
    assert "invalid choice: 'speed'" in unknown.stderr
    half = run("--gguf", "model.gguf")
    assert half.returncode == 1
    assert "--llama-server and --gguf are given together" in half.stderr
    for name in FIGURES:
        assert name in run("--help").stdout
