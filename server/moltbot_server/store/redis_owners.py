"""Which key the cores on one Redis know, told by fingerprints: installations with different keys are no installation.

A fingerprint is a hash of the workspace's key with a salt of the Redis' own. The key, of 256 bits, cannot be found from
it, and the same key on another Redis has another one.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

log = logging.getLogger(__name__)

Ask = Callable[..., Awaitable[list[Any]]]
"""Returns what Redis replies to commands; it raises `StorageUnavailable` when Redis does not answer."""

REMEDY = (
    "copy the file `key` of one workspace to the others, or give each installation a store.prefix of its own "
    "(docs/nodes.md)"
)
"""What to do about cores that share a Redis and know different keys."""


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
    others = [_host_and_process(lease) for mark, lease in marked if mark != mine]
    if others:
        log.warning(
            f"other cores on this Redis have another key, and share its sessions all the same: {REMEDY}",
            extra={"prefix": prefix, "others": ", ".join(others)},
        )


def _host_and_process(lease: str) -> str:
    """Return what a lease tells for people."""
    return " ".join(lease.split(" ")[:2])
