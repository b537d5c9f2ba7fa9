"""What a Redis has to be set to, so that it keeps what it is given."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence

from moltbot_server.errors import StorageUnavailable
from moltbot_server.store.findings import Finding
from moltbot_server.store.redis_line import Call, RedisLine, parse_info
from moltbot_server.store.redis_presence import why_no_writes
from moltbot_server.store.redis_probe import probe

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_OLDEST = (6, 2)
_LEVELS = {"grave": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}
_NAMES = ("appendonly", "appendfsync", "maxmemory-policy")


class Fitness:
    """Judges a Redis when a store is opened, and again when it has been away: it may have been started otherwise.

    The log hears of what is wrong when it begins. Turns go on meanwhile: to refuse them would lose more than it keeps.
    """

    def __init__(self, line: RedisLine, prefix: str, address: str) -> None:
        self._line = line
        self._prefix = prefix
        self._address = address
        self._data = ""
        self._told: frozenset[str] = frozenset()
        self._lost: Sequence[str] = ()
        self._risks: Sequence[str] = ()
        self._judging: asyncio.Task[None] | None = None

    @property
    def warnings(self) -> Sequence[str]:
        """What of it was lost while this store was open, and may be, as it is set."""
        return (*self._lost, *self._risks)

    async def require(self) -> None:
        """Refuse a Redis that would lose what it is given, and warn of one that may. Nothing is written.

        Raises:
            StorageUnavailable: with what to change.
        """
        findings = await judge(self._line, self._prefix)
        grave = [finding.text for finding in findings if finding.weight == "grave"]
        if grave:
            raise StorageUnavailable(f"Redis at {self._address} cannot be the store: {'; '.join(grave)}")
        self._tell(findings)

    def watch(self, data: str) -> None:
        """Judge it again whenever its line is connected again, from now on; `data` is what `claim` has told."""
        self._data = data
        self._line.when_connected(self._judge_soon)

    async def end(self) -> None:
        """Judge it no more."""
        if self._judging is not None:
            self._judging.cancel()
            await asyncio.wait([self._judging])

    def _judge_soon(self) -> None:
        if self._judging is None or self._judging.done():
            self._judging = asyncio.create_task(self._judge_again())

    async def _judge_again(self) -> None:
        try:
            findings = await judge(self._line, self._prefix)
            data = await _name_data(self._line, self._prefix)
        except StorageUnavailable:
            return  # it is away again, and judged when it is back
        known, self._data = self._data, data or self._data
        if known and self._data != known:
            advice = "to have again what was kept, stop MoltBot and put a backup in its place"
            log.error("Redis has come back empty", extra={"at": self._address, "problem": advice})
            self._lost = (f"it came back empty at {time.strftime('%Y-%m-%d %H:%M:%S')}: {advice}",)
        self._tell(findings)

    def _tell(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            if finding.text not in self._told:
                fields = {"at": self._address, "problem": finding.text}
                log.log(_LEVELS[finding.weight], "Redis may lose turns", extra=fields)
        self._told = frozenset(finding.text for finding in findings)
        self._risks = tuple(finding.text for finding in findings if finding.weight != "note")


async def claim(line: RedisLine, prefix: str, address: str) -> str:
    """Write down the version of what is kept, unless there is one; return a name of this data, by which it is known.

    Raises:
        StorageUnavailable: a newer release was there first; or Redis takes no writes.
    """
    place = f"{prefix}:schema"
    _, schema = await line.put(Call(("SET", place, SCHEMA_VERSION, "NX"), ("GET", place), read=list))
    for finding in _of_schema(schema):
        raise StorageUnavailable(f"Redis at {address} cannot be the store: {finding.text}")
    return await _name_data(line, prefix)


async def _name_data(line: RedisLine, prefix: str) -> str:
    """Return the name of the data that is there, empty where it cannot be told; what has none yet is given one."""
    version, place = ("SET", f"{prefix}:schema", SCHEMA_VERSION, "NX"), f"{prefix}:data"
    naming = ("SET", place, secrets.token_hex(8), "NX")
    *_, name = await line.put(Call(version, naming, ("GET", place), read=list, tolerant=True))
    return name.decode() if isinstance(name, bytes) else ""


async def judge(line: RedisLine, prefix: str) -> list[Finding]:
    """Return what is wrong with how a Redis is set up. Nothing is written.

    Raises:
        StorageUnavailable: it does not answer.
    """
    found = await line.put(Call(*(("CONFIG", "GET", name) for name in _NAMES), read=list, tolerant=True))
    told = all(isinstance(reply, list) and len(reply) == 2 for reply in found)
    settings = {name: reply[1].decode() for name, reply in zip(_NAMES, found, strict=True)} if told else None
    (text,) = await line.put(Call(("INFO",), read=list))
    findings = [*_of_server(parse_info(text)), *_of_settings(settings)]
    if any(finding.weight == "grave" for finding in findings):
        return findings
    (schema,) = await line.put(Call(("GET", f"{prefix}:schema"), read=list, tolerant=True))
    return [*findings, *_of_schema(schema or b"0")]


async def refusals(line: RedisLine, prefix: str) -> list[Finding]:
    """Return why a Redis takes no writes, where it takes none; nothing is changed.

    Raises:
        StorageUnavailable: it does not answer.
    """
    (reply,) = await line.put(Call(probe(prefix), read=list, tolerant=True))
    if not isinstance(reply, Exception):
        return []
    return [Finding(text=why_no_writes(reply) or f"it refuses writes: {str(reply)[:200]}")]


def _of_server(info: Mapping[str, str]) -> Iterator[Finding]:
    version = info.get("redis_version", "0")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < _OLDEST:
        yield Finding(text=f"it is version {version}, and 6.2 or newer is needed")
    if info.get("role", "master") != "master":
        yield Finding(text="it is a replica, which takes no writes; name the one that it copies")
    if info.get("cluster_enabled") == "1":
        yield Finding(text="it is a node of a cluster, which this release does not speak to; name a single Redis")


def _of_settings(settings: Mapping[str, str] | None) -> Iterator[Finding]:
    if settings is None:
        text = (
            "it does not tell its settings (CONFIG GET): make sure of appendonly yes, appendfsync always and "
            "maxmemory-policy noeviction"
        )
        yield Finding(text=text, weight="warning")
        return
    if settings["maxmemory-policy"] != "noeviction":
        text = f"maxmemory-policy is {settings['maxmemory-policy']}, and it would throw turns away when memory is short"
        yield Finding(text=f"{text}: set maxmemory-policy noeviction")
    if settings["appendonly"] != "yes":
        text = "appendonly is no, and all is lost when it stops: set appendonly yes and appendfsync always"
        yield Finding(text=text, weight="warning")
    elif settings["appendfsync"] == "no":
        text = "appendfsync is no, and half a minute is lost with a power failure: set appendfsync always"
        yield Finding(text=text, weight="warning")
    elif settings["appendfsync"] == "everysec":
        text = "appendfsync is everysec, and a second is lost with a power failure; with always, nothing is"
        yield Finding(text=text, weight="note")


def _of_schema(told: bytes | Exception) -> Iterator[Finding]:
    if isinstance(told, Exception) or not told.isdigit():
        yield Finding(
            text="its key for the schema is another program's: choose another store.prefix, or delete that key"
        )
    elif (schema := int(told)) > SCHEMA_VERSION:
        text = f"its data was written by a newer release (schema {schema}, this one reads {SCHEMA_VERSION})"
        yield Finding(text=text)
