"""`moltbot model tune`, and the measurement after a first start: what is kept, and what is better left alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from cli_process import Home
from cli_terminal import terminal
from moltbot_server.cli import first_tuning, tuning
from moltbot_server.cli.model_measuring import tune_model
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.models.measuring_plan import Outcome, Plan, Trial
from moltbot_server.models.tuning import Tuning, keep_tuning, measured_here, tuning_for
from moltbot_server.workspace import Workspace

FOUND = Tuning(replicas=3, batch=16)
OUTCOME = Outcome(best=FOUND, trials=(Trial(tuning=FOUND, tokens_per_second=9.0, first_token_ms=1.0),))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    for name in ("MODEL_TYPE", "MODEL_PATH", "CONTEXT_LENGTH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    place = Workspace(folder=tmp_path / "workspace")
    place.create()
    return place


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    plans: list[Plan] = []

    def measured(plan: Plan) -> Outcome | None:
        plans.append(plan)
        return OUTCOME

    monkeypatch.setattr(first_tuning, "measured_undisturbed", measured)
    return plans


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moltbot_server.cli", "model", "tune", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def first(workspace: Workspace) -> int:
    return first_tuning.main(["--workspace", str(workspace.folder)])


def test_tune_measures_keeps_and_says_what_was_tried(workspace: Workspace) -> None:
    done = run("--quick", "--json", "--workspace", str(workspace.folder))

    said = json.loads(done.stdout)
    best = Tuning(**said["tuning"])
    assert (done.returncode, done.stderr) == (0, "")
    assert said["trials"][0]["tuning"] == said["tuning"]
    assert said["tokens_per_second"] == said["trials"][0]["tokens_per_second"] > 0
    assert said["others"] >= 0
    assert tuning_for(workspace, ARTIFACT) == best


def test_tune_shows_a_table_and_the_next_step(workspace: Workspace) -> None:
    done = run("--quick", "--workspace", str(workspace.folder))

    assert done.returncode == 0
    assert "replicas  threads  batch" in done.stdout
    assert "tuning.json and used from the next start on:" in done.stdout
    assert "start --workspace" in done.stdout


async def test_ctrl_c_at_a_terminal_ends_the_measurement_with_one_line(tmp_path: Path) -> None:
    async with terminal(Home(tmp_path, {}), "tune", command="model") as screen:
        await screen.until("1 replica")
        screen.type("\x03")
        await screen.until("moltbot: stopped; what was kept before holds on.")
        async with asyncio.timeout(20):
            assert await screen.process.wait() == 130
    assert "Traceback" not in screen.shown


def test_ctrl_c_is_told_as_json_to_who_asked_for_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_measured", interrupt)
    given = Namespace(workspace=workspace.folder, name="", quick=True, json=True)
    assert tune_model(given) == 130
    said, err = capsys.readouterr()
    error = {"message": "stopped; what was kept before holds on.", "status": 130}
    assert (json.loads(said), err) == ({"error": error}, "")


def test_a_model_that_cannot_be_loaded_keeps_nothing_and_says_why(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "broken"
    model.mkdir()
    for file in ARTIFACT.iterdir():
        (model / file.name).write_bytes(file.read_bytes() if file.name != "model.bin" else b"no weights")
    monkeypatch.setenv("MODEL_PATH", str(model))

    done = run("--quick", "--workspace", str(workspace.folder))

    assert done.returncode == 1
    assert done.stderr.startswith("moltbot: ")
    assert "cannot be loaded" in done.stderr
    assert not (workspace.folder / "tuning.json").exists()


def test_after_a_first_start_the_model_is_measured_once(workspace: Workspace, asked: list[Plan]) -> None:
    assert (first(workspace), first(workspace)) == (0, 0)

    assert asked == [Plan(folder=str(ARTIFACT), type="moltbot-demo", quick=True)]
    assert tuning_for(workspace, ARTIFACT) == FOUND


@pytest.mark.parametrize(
    ("name", "value"),
    [("MOLTBOT_THREADS", "2"), ("MODEL_TYPE", "scripted"), ("MOLTBOT_ENGINE", "127.0.0.1:50099")],
)
def test_nothing_is_measured_unasked_where_it_would_not_be_used(
    workspace: Workspace, asked: list[Plan], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    assert first(workspace) == 0
    assert asked == []


def test_a_large_model_is_not_measured_unasked(
    workspace: Workspace, asked: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_tuning, "_LARGEST", 1 << 20)

    assert first(workspace) == 0
    assert asked == []


def test_what_others_disturbed_is_not_kept(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_tuning, "measured_undisturbed", lambda plan: None)

    assert first(workspace) == 0
    assert measured_here(workspace, ARTIFACT) is None


def test_what_was_measured_by_hand_stays(workspace: Workspace, asked: list[Plan]) -> None:
    keep_tuning(workspace, ARTIFACT, "moltbot-demo", Tuning(replicas=1))

    assert first(workspace) == 0
    assert asked == []
    assert tuning_for(workspace, ARTIFACT) == Tuning(replicas=1)


def test_a_wrong_configuration_ends_it_quietly(
    workspace: Workspace, asked: list[Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.config_file.write_text("port: many\n")

    assert first(workspace) == 1
    assert capsys.readouterr().err.startswith("moltbot: nothing was measured: ")
