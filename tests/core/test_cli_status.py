"""What `moltbot status` makes of what several cores say."""

from __future__ import annotations

import os
import time
from pathlib import Path

from moltbot_server.cli.running import Running
from moltbot_server.cli.status import _Health, _store, _store_in_words, state, store_away
from moltbot_server.ops import OpsServer
from moltbot_server.workspace import Workspace

WELL = _Health(True, {"status": "ok", "store": "ok", "store_address": "sqlite"})
FULL = _Health(False, {"status": "store away", "store": "away: the disk is full", "store_address": "the database m.db"})
SILENT = _Health(False, {})


def test_one_core_that_cannot_write_is_enough_for_a_store_that_is_away() -> None:
    for cores in ((WELL, FULL), (FULL, WELL), (SILENT, FULL)):
        told = store_away({f"core-{number}": core for number, core in enumerate(cores)})
        assert told == "write to its store (the database m.db)"


def test_cores_that_are_well_or_silent_have_a_store_as_far_as_is_known() -> None:
    assert store_away({"core-1": WELL, "core-2": SILENT}) == ""
    assert store_away({"core-1": SILENT}) == ""


def test_what_a_store_has_lost_or_may_lose_is_told_below_it() -> None:
    lossy = _Health(True, {**WELL.said, "store_warnings": ["it came back empty", "appendonly is no"]})
    assert list(_store_in_words(_store(lossy)))[1:] == ["    ! it came back empty", "    ! appendonly is no"]
    assert len(list(_store_in_words(_store(WELL)))) == 1
    assert list(_store_in_words(_store(SILENT))) == []


def test_a_core_whose_default_model_cannot_answer_serves_all_the_same() -> None:
    assert [
        core.serves for core in (_Health(False, {"status": "model failed"}), _Health(False, {"status": "leaving"}))
    ] == [True, False]


def test_an_engine_is_asked_itself_while_no_core_says_how_it_is(tmp_path: Path) -> None:
    nobody, said = "http://127.0.0.1:1", {"status": "ok"}
    engine = OpsServer(host="127.0.0.1", port=0, metrics=lambda: b"", health=lambda: said)
    running = Running(
        pid=os.getpid(),
        started=time.time(),
        version="1",
        http=nobody,
        grpc="127.0.0.1:1",
        metrics=nobody,
        model="m",
        processes={},
        engine_metrics=f"http://{engine.address}",
    )
    try:
        found = state(Workspace(folder=tmp_path), running)
        assert (found["core"]["healthy"], found["engine"]["healthy"]) == (False, True)
        said["status"] = "model failed"
        assert not state(Workspace(folder=tmp_path), running)["engine"]["healthy"]
    finally:
        engine.close()
    assert not state(Workspace(folder=tmp_path), running)["engine"]["healthy"]
