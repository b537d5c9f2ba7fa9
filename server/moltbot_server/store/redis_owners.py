"""Which key the cores on one Redis know, told by fingerprints: installations with different keys are no installation.

A fingerprint is a hash of the workspace's key with a salt of the Redis' own. The key, of 256 bits, cannot be found from
it, and the same key on another Redis has another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from moltbot_server.errors import StorageUnavailable

log = logging.getLogger(__name__)

Ask = Callable[..., Awaitable[list[Any]]]
"""Returns what Redis replies to commands; it raises `StorageUnavailable` when Redis does not answer."""

REMEDY = (
    "copy the file `key` of one workspace to the others, or give each installation a store.prefix of its own "
    "(docs/nodes.md)"
)
"""What to do about cores that share a Redis and know different keys."""
_CHANGED = "if the key was changed, stop all cores that have the old one first"

_LOOK = 0.1
"""Seconds between two looks at the leases of strangers; one that lives renews its own several times in three."""
_LATER = 20
"""Milliseconds by which a lease that was renewed ends later than before at least; Redis rounds both its clocks."""


class Stranger(NamedTuple):
    """A node with another key: its name, when its lease ends (milliseconds, by Redis' clock), what that tells."""

    node: str
    ends: int
    lease: str


async def enter(join: Callable[[], Awaitable[Sequence[Stranger]]], *, redis: str, prefix: str) -> None:
    """Call `join` until no strangers keep it from joining: a lease may be all that a core left behind that was killed.

    `redis` and `prefix` are for whoever starts the core.

    Raises:
        StorageUnavailable: one of them lives, for it has renewed its lease; or Redis does not answer.
    """
    ends: dict[str, int] = {}
    while strangers := await join():
        if any(each.ends >= ends.get(each.node, each.ends) + _LATER for each in strangers):
            places = ", ".join(sorted({each.lease.partition(" ")[0] for each in strangers}))
            raise StorageUnavailable(
                f"Redis at {redis} has cores of another key under the prefix {prefix} (on {places}), and callers' keys "
                f"would be good at some cores alone: {REMEDY}; {_CHANGED}"
            )
        if not ends:
            fields = {"prefix": prefix, "others": _told(each.lease for each in strangers)}
            log.warning("cores of another key were on this Redis just now; waiting whether they are gone", extra=fields)
        ends = {each.node: each.ends for each in strangers} | ends
        await asyncio.sleep(_LOOK)


async def fingerprint(ask: Ask, prefix: str, key: str) -> str:
    """Return what a key is told as among the nodes of a Redis; empty without a key.

    Raises:
        StorageUnavailable: Redis does not answer.
    """
    if not key:
        return ""
    place = f"{prefix}:salt"
    _, salt = await ask(("SET", place, secrets.token_hex(16), "NX"), ("GET", place))
    return hashlib.blake2b(key.encode("utf-8"), key=salt[:64], digest_size=16, person=b"moltbot-owner").hexdigest()


async def fingerprints(ask: Ask, prefix: str) -> Mapping[str, tuple[str, str]]:
    """Return the fingerprints of the nodes that are there and tell one, each with what the lease of its node says.

    Raises:
        StorageUnavailable: Redis does not answer.
    """
    (known,) = await ask(("SMEMBERS", f"{prefix}:nodes"))
    names = sorted(name.decode() for name in known)
    if not names:
        return {}
    leases = (("GET", f"{prefix}:node:{name}") for name in names)
    told = await ask(*leases, *(("GET", owner_of(prefix, name)) for name in names))
    found = zip(names, told[: len(names)], told[len(names) :], strict=True)
    return {name: (mark.decode(), lease.decode()) for name, lease, mark in found if lease and mark}


def owner_of(prefix: str, node: str) -> str:
    """Return the name under which a node keeps its fingerprint, as long as its lease."""
    return f"{prefix}:owner:{node}"


async def warn_of_others(ask: Ask, prefix: str, *, mine: str) -> None:
    """Warn when other nodes know another key: a caller's is good at some of them alone, and all see its sessions.

    Raises:
        StorageUnavailable: Redis does not answer.
    """
    if not mine:
        return
    marked = (await fingerprints(ask, prefix)).values()
    others = [lease for mark, lease in marked if mark != mine]
    if others:
        log.warning(
            f"other cores on this Redis have another key, and share its sessions all the same: {REMEDY}",
            extra={"prefix": prefix, "others": _told(others)},
        )


def _told(leases: Iterable[str]) -> str:
    """Return what leases tell for people: hosts and processes."""
    return ", ".join(sorted(" ".join(lease.split(" ")[:2]) for lease in leases))
