"""What was measured on a machine is kept for that machine alone, and never stands in the way of a start."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.models.cpus import usable_cpus
from moltbot_server.models.tuning import (
    Tuning,
    default_tuning,
    keep_tuning,
    measured_here,
    tuning_for,
)
from moltbot_server.workspace import Workspace

FOUND = Tuning(replicas=3, threads=2, batch=16, compute_type="int8")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    place = Workspace(folder=tmp_path / "workspace")
    place.create()
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ARTIFACT, tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replicas": 0}, "replicas is 0; expected 1 to 64"),
        ({"threads": 257}, "threads is 257; expected 1 to 256"),
        ({"batch": -1}, "batch is -1; expected 1 to 256"),
        ({"compute_type": "int7"}, "compute_type is 'int7'; expected one of default, auto, int8"),
    ],
)
def test_a_tuning_out_of_its_bounds_cannot_be_made(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tuning(**changes)  # type: ignore[arg-type]


def test_without_a_measurement_the_default_stands(workspace: Workspace, folder: Path) -> None:
    assert tuning_for(workspace, folder) == tuning_for(None, folder) == default_tuning(usable_cpus())


@pytest.mark.parametrize(
    ("cpus", "small", "large"),
    [(1, 1, (1, 1)), (2, 2, (1, 1)), (4, 2, (3, 1)), (6, 3, (5, 1)), (16, 4, (7, 2)), (64, 4, (7, 8))],
)
def test_the_default_leaves_room_for_the_server(cpus: int, small: int, large: tuple[int, int]) -> None:
    assert default_tuning(cpus) == Tuning(replicas=small)
    assert default_tuning(cpus, 100_000_000) == Tuning(replicas=large[0], threads=large[1])


def test_hyper_threads_are_left_to_the_server() -> None:
    assert default_tuning(8, 100_000_000, cores=4) == Tuning(replicas=4)


def test_what_was_measured_is_used_from_then_on(workspace: Workspace, folder: Path) -> None:
    kept = keep_tuning(workspace, folder, "mine", FOUND, tokens_per_second=12.5, streams=16)

    assert measured_here(workspace, folder) == kept
    assert (kept.model, kept.tuning, kept.tokens_per_second, kept.streams) == ("mine", FOUND, 12.5, 16)
    assert tuning_for(workspace, folder) == FOUND


def test_threads_of_a_configuration_go_before_what_was_measured(workspace: Workspace, folder: Path) -> None:
    keep_tuning(workspace, folder, "mine", FOUND)

    assert tuning_for(workspace, folder, threads=5) == Tuning(replicas=5)


def test_measured_again_the_newer_stands(workspace: Workspace, folder: Path) -> None:
    keep_tuning(workspace, folder, "mine", FOUND)
    keep_tuning(workspace, folder, "mine", Tuning(replicas=2))

    assert tuning_for(workspace, folder) == Tuning(replicas=2)


def test_other_weights_are_another_model_even_under_the_same_path(workspace: Workspace, folder: Path) -> None:
    keep_tuning(workspace, folder, "mine", FOUND)
    weights = folder / "model.bin"
    found = weights.stat()
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns + 1))

    assert measured_here(workspace, folder) is None

    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    moved = folder.rename(folder.with_name("elsewhere"))

    assert tuning_for(workspace, moved) == FOUND


@pytest.mark.parametrize("field", ["processor", "processors", "ctranslate2"])
def test_what_was_measured_elsewhere_is_not_used(workspace: Workspace, folder: Path, field: str) -> None:
    keep_tuning(workspace, folder, "mine", FOUND)
    file = workspace.folder / "tuning.json"
    content = msgspec.json.decode(file.read_bytes())
    content["measured"][0][field] = 1000 if field == "processors" else "another"
    file.write_bytes(msgspec.json.encode(content))

    assert measured_here(workspace, folder) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"measured":[{"tuning":{"replicas":0}}]}', b'{"measured":[{"model":1}]}', b"\xff" * 100],
)
def test_a_broken_file_counts_as_none_and_is_mended_by_the_next_measurement(
    workspace: Workspace, folder: Path, content: bytes
) -> None:
    (workspace.folder / "tuning.json").write_bytes(content)

    assert measured_here(workspace, folder) is None

    keep_tuning(workspace, folder, "mine", FOUND)

    assert tuning_for(workspace, folder) == FOUND


def test_a_folder_without_weights_has_no_measurement(workspace: Workspace, tmp_path: Path) -> None:
    assert measured_here(workspace, tmp_path / "nothing") is None


def test_what_is_kept_can_be_read_by_the_owner_alone(workspace: Workspace, folder: Path) -> None:
    keep_tuning(workspace, folder, "mine", FOUND)

    assert (workspace.folder / "tuning.json").stat().st_mode & 0o777 == 0o600


def _keep(place: Path, folder: Path, number: int) -> None:
    os.utime(folder / "model.bin", ns=(0, number))
    keep_tuning(Workspace(folder=place), folder, f"model-{number}", Tuning(replicas=number + 1))


def test_processes_that_measure_at_the_same_time_lose_nothing_of_each_other(
    workspace: Workspace, tmp_path: Path
) -> None:
    folders = [Path(shutil.copytree(ARTIFACT, tmp_path / f"model-{number}")) for number in range(8)]
    fresh = multiprocessing.get_context("spawn")
    writers = [
        fresh.Process(target=_keep, args=(workspace.folder, folder, number)) for number, folder in enumerate(folders)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)

    assert [tuning_for(workspace, folder).replicas for folder in folders] == list(range(1, 9))
