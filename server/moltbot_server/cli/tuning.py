"""`moltbot model tune`: how a model runs best on this machine, measured, shown and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import psutil

from moltbot_server.cli.progress import Progress
from moltbot_server.cli.running import Running
from moltbot_server.cli.terminal import Exit, Failure, command, interrupted, shown
from moltbot_server.models.cpus import cpu_quota, processor_name, usable_cores, usable_cpus
from moltbot_server.models.encoder_folder import EncoderFolder
from moltbot_server.models.folder import ModelFolder
from moltbot_server.models.measuring_plan import STREAMS, Outcome, Plan
from moltbot_server.models.tuning import ENVIRONMENT, Measured, Tuning, keep_tuning
from moltbot_server.workspace import Workspace

QUIET = 0.3
"""Processors that other programs may keep busy without a measurement being taken for disturbed."""

_HEAD = ("replicas", "threads", "batch", "type", "tokens/s", "first token", "alone: tokens/s", "first token")


def tune(
    workspace: Workspace, folder: ModelFolder | EncoderFolder, *, quick: bool = False, as_json: bool = False
) -> int:
    """Measure how a model runs best here, keep it in the workspace and print it; return the exit status.

    It is used from the next load of the model on. `quick` tries little and takes about two seconds for a small model.

    Raises:
        Failure: the model cannot be measured, or the workspace cannot be written.
    """
    if not isinstance(folder, ModelFolder):
        raise Failure(f"{folder.id} writes no answers, so there is nothing to tune; it only turns texts into vectors.")
    if Running.read(workspace) is not None and not as_json:
        print("MoltBot runs here as well and takes its part of the processors.", file=sys.stderr)
    others = _Others()
    try:
        outcome = _measured(Plan(folder=str(folder.path), type=folder.family, quick=quick), folder.id, quiet=as_json)
    except KeyboardInterrupt:
        return interrupted("stopped; what was kept before holds on.", as_json=as_json)
    first = outcome.trials[0]
    try:
        kept = keep_tuning(
            workspace,
            folder.path,
            folder.id,
            outcome.best,
            tokens_per_second=first.tokens_per_second,
            streams=STREAMS,
        )
    except OSError as problem:
        raise Failure(f"the tuning cannot be kept in {shown(workspace.folder)}: {problem.strerror}.") from None
    busy = others.busy()
    if busy > QUIET and not as_json:
        print(
            f"Other programs kept {busy:.1f} processors busy meanwhile; measure again when they rest.", file=sys.stderr
        )
    print(json.dumps(_as_json(kept, outcome, busy)) if as_json else _table(workspace, kept, outcome))
    return int(Exit.OK)


def measured_undisturbed(plan: Plan) -> Outcome | None:
    """Measure without a word; None where other programs used the machine meanwhile.

    Raises:
        Failure: the model cannot be measured.
    """
    others = _Others()
    outcome = _measured(plan, "", quiet=True)
    return outcome if others.busy() <= QUIET else None


class _Others:
    """How many processors other programs keep busy from now on."""

    def __init__(self) -> None:
        self._began, self._idle, self._own = time.perf_counter(), self._idle_now(), self._own_now()

    def busy(self) -> float:
        """Return the processors; those of this process and of its children that have ended do not count."""
        passed = time.perf_counter() - self._began
        used = (psutil.cpu_count() or 1) * passed - (self._idle_now() - self._idle)
        return max(0.0, (used - (self._own_now() - self._own)) / passed)

    def _idle_now(self) -> float:
        times = psutil.cpu_times()
        return float(times.idle + getattr(times, "iowait", 0.0))

    def _own_now(self) -> float:
        return sum(os.times()[:4])


def _measured(plan: Plan, name: str, *, quiet: bool) -> Outcome:
    """Measure in a process of its own and show how far it is."""
    with Progress(f"Measuring {name}", quiet=quiet) as bar:
        for line in _lines(plan):
            if "problem" in line:
                raise Failure(line["problem"])
            if "trials" in line:
                return msgspec.convert(line, Outcome)
            bar.reach(line["done"], line["what"])
    raise Failure("the measurement broke off; nothing was kept.")


def _lines(plan: Plan) -> Iterator[dict[str, Any]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "moltbot_server.models.measuring"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT | os.environ,
        process_group=0,  # Ctrl-C is for this process, which ends that one
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as plans:
            plans.write(msgspec.json.encode(plan) + b"\n")
        yield from map(json.loads, process.stdout)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def _as_json(kept: Measured, outcome: Outcome, others: float) -> dict[str, Any]:
    said: dict[str, Any] = msgspec.to_builtins(kept)
    return said | {
        "prompt_tokens": outcome.prompt_tokens,
        "new_tokens": outcome.new_tokens,
        "trials": msgspec.to_builtins(outcome.trials),
        "notes": list(outcome.notes),
        "others": round(others, 2),
    }


def _table(workspace: Workspace, kept: Measured, outcome: Outcome) -> str:
    rows = [_HEAD]
    for trial in outcome.trials:
        alone = ("-", "-")
        if trial.lone_tokens_per_second:
            alone = (f"{trial.lone_tokens_per_second:,.0f}", f"{trial.lone_first_token_ms:,.0f} ms")
        many = (f"{trial.tokens_per_second:,.0f}", f"{trial.first_token_ms:,.0f} ms")
        rows.append((*_cells(trial.tuning), *many, *alone))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    quota = cpu_quota()
    limit = f", limited to {quota:g} by the container" if quota is not None else ""
    return "\n".join(
        [
            f"{kept.model} on {usable_cpus()} processors, {usable_cores()} cores ({processor_name()}){limit}:",
            f"{STREAMS} at a time, prompts of {outcome.prompt_tokens} tokens, answers of {outcome.new_tokens} at most",
            "",
            *lines,
            *(f"not tried: {note}" for note in outcome.notes),
            "",
            f"The first is kept in {shown(workspace.folder / 'tuning.json')} and used from the next start on:",
            f"  {command('start', workspace)}",
        ]
    )


def _cells(tuning: Tuning) -> tuple[str, str, str, str]:
    return str(tuning.replicas), str(tuning.threads), str(tuning.batch), tuning.compute_type
