"""What `moltbot status` makes of what several cores say."""

from __future__ import annotations

from moltbot_server.cli.status import _Health, store_away

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


def test_a_core_whose_default_model_cannot_answer_serves_all_the_same() -> None:
    assert [
        core.serves for core in (_Health(False, {"status": "model failed"}), _Health(False, {"status": "leaving"}))
    ] == [True, False]
