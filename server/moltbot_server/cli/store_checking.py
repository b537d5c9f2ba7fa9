"""What `moltbot store check` does: looks at the store that the configuration names, and tells what is wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
from collections.abc import Callable, Sequence

from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.progress import Progress
from moltbot_server.cli.running import is_held
from moltbot_server.cli.store_opening import open_redis, refuse_memory
from moltbot_server.cli.terminal import Exit, Failure, harmless, shown
from moltbot_server.store.findings import Finding
from moltbot_server.store.sqlite_check import check_database
from moltbot_server.store.sqlite_lock import DatabaseLock

_WORDS = {"grave": "WRONG", "warning": "warning", "note": "note"}


@told
def check_store(given: argparse.Namespace) -> int:
    """Print what is wrong with the store; return the exit status: 1 when something is."""
    models = Models.of(given)
    named = models.settings.store
    refuse_memory(models.settings)
    if named.type == "redis":
        place = f"Redis at {named.host}:{named.port}, names that begin with {named.prefix}"
        with Progress("Checking", quiet=given.json) as progress:
            findings = asyncio.run(_check_redis(models, progress))
    else:
        place = shown(models.workspace.database)
        findings = _check_sqlite(models, quiet=given.json)
    whole = all(finding.weight != "grave" for finding in findings)
    if given.json:
        told_findings = [{"weight": finding.weight, "text": finding.text} for finding in findings]
        print(json.dumps({"store": named.type, "place": place, "ok": whole, "findings": told_findings}))
    else:
        for finding in findings:
            print(f"{_WORDS[finding.weight]}: {harmless(finding.text)}")
        print(f"{place}: {_verdict(findings)}")
    return int(Exit.OK if whole else Exit.FAILED)


def _verdict(findings: Sequence[Finding]) -> str:
    """Return what all that was found comes to."""
    if any(finding.weight == "grave" for finding in findings):
        return "something is wrong."
    warnings = sum(finding.weight == "warning" for finding in findings)
    if warnings:
        return f"it can be read, but there {'is 1 warning' if warnings == 1 else f'are {warnings} warnings'}."
    return "nothing is wrong."


def _check_sqlite(models: Models, *, quiet: bool) -> Sequence[Finding]:
    path = models.workspace.database
    if not path.exists():
        return [Finding(text="there is no database yet; the first start makes it", weight="note")]
    findings: list[Finding] = []
    with Progress("Checking", quiet=quiet) as progress:
        try:
            in_use = is_held(models.workspace) or DatabaseLock(path, alone=True).is_held()
            findings += check_database(path, in_use=in_use, progress=_reach(progress))
            return findings
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "") or str(error)
            if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
                return [Finding(text=f"it is damaged, or no database ({name}): put a backup in its place")]
            if findings:  # SQLite reads nothing where it may not write what readers share
                return findings
            raise Failure(f"{shown(path)} cannot be read now ({name}).", Exit.UNAVAILABLE) from None


async def _check_redis(models: Models, progress: Progress) -> Sequence[Finding]:
    from moltbot_server.store.redis_check import check_redis  # late: only where Redis is the store

    async with open_redis(models.settings, fit=False) as store:
        return [finding async for finding in check_redis(store, progress=_reach(progress))]


def _reach(progress: Progress) -> Callable[[float, str], None]:
    return lambda share, what: progress.reach(share, f"Checking {what}")
