"""`moltbot failover test`: plays every scene, shows how far it is, and prints the table or JSON."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import uvloop

from moltbot_server.cli.failover_plan import Drill, plan
from moltbot_server.cli.failover_rig import Rig, rig
from moltbot_server.cli.failover_scenes import CASES, Row, play
from moltbot_server.cli.failover_waits import WAITS
from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.progress import Progress
from moltbot_server.cli.route_check import check_routes
from moltbot_server.cli.terminal import Exit, Failure, command, harmless
from moltbot_server.config import ConfigError

_ORDER = ("S19", "S20", "S21", "S22", "S23", "S24", "S25")


@told
def failover_test(given: argparse.Namespace) -> int:
    """Play the drill; return the exit status."""
    models = Models.of(given)
    place = models.workspace
    # Who names none may try before there is one.
    if not place.folder.is_dir() and (given.workspace or os.environ.get("MOLTBOT_WORKSPACE")):
        init = command("init", place)
        text = f"there is no workspace in {place.folder}: make one with `{init}`, or name one with --workspace."
        raise Failure(text, Exit.CONFIG)
    try:
        check_routes(models.settings)
    except ConfigError as problem:
        raise Failure(str(problem), Exit.CONFIG) from None
    local = {model.name for model in models.all} | {models.at_start}
    drill = plan(models.settings, given.route, local - {""})
    # What the core of the drill has to say of faults is no news to anybody.
    logging.getLogger().addHandler(logging.NullHandler())
    began = time.monotonic()
    with Progress("Playing faults", quiet=given.json) as progress:
        rows = uvloop.run(_played(drill, progress))
    report = _report(drill, rows, time.monotonic() - began)
    print(json.dumps(report, ensure_ascii=False) if given.json else _table(drill, rows, report))
    return int(Exit.FAILED if report["failed"] else Exit.OK)


async def _played(drill: Drill, progress: Progress) -> Sequence[Row]:
    """Play all scenes, one after the other, and return their lines in the order of the scenarios."""
    async with rig(drill) as stage:
        scenes: list[Callable[[Rig], Awaitable[Row]]] = [partial(_play, case=case) for case in CASES]
        rows = []
        for at, scene in enumerate([*scenes, *WAITS]):
            row = await scene(stage)
            rows.append(row)
            progress.reach((at + 1) / (len(scenes) + len(WAITS)), f"{row.scenario} {row.fault}")
    return sorted(rows, key=lambda row: _ORDER.index(row.scenario))


async def _play(stage: Rig, case: Any) -> Row:
    return await play(stage, case)


def _report(drill: Drill, rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("pass", "FAIL", "skipped")}
    return {
        "route": drill.route.name or "default",
        "sample": drill.is_sample,
        "models": [candidate.name for candidate in drill.candidates],
        "notes": list(drill.notes),
        "passed": counts["pass"],
        "failed": counts["FAIL"],
        "skipped": counts["skipped"],
        "seconds": round(seconds, 1),
        "scenarios": [
            {
                "scenario": row.scenario,
                "fault": row.fault,
                "seen": row.seen,
                "asked": list(row.asked),
                "first_token_ms": None if row.first_token is None else round(row.first_token * 1000, 1),
                "result": row.verdict.lower(),
                "why": row.why,
            }
            for row in rows
        ],
    }


def _table(drill: Drill, rows: Sequence[Row], report: dict[str, Any]) -> str:
    names = " → ".join(report["models"])
    head = [f"Faults of {drill.candidates[0].name}, the first model of {drill.title}: {names}", *drill.notes, ""]
    cells = [("", "FAULT", "THE USER SAW", "MODELS ASKED", "FIRST WORD", "RESULT")]
    for row in rows:
        first = "-" if row.first_token is None else f"{row.first_token * 1000:,.0f} ms"
        result = f"{row.verdict}: {row.why}" if row.why else row.verdict
        cells.append((row.scenario, row.fault, row.seen or "-", ", ".join(row.asked) or "-", first, result))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    skipped = f", {report['skipped']} skipped" if report["skipped"] else ""
    end = f"{report['passed']} passed, {report['failed']} failed{skipped}, in {report['seconds']:.0f} s."
    return harmless("\n".join([*head, *lines, "", end]))
