"""The other workers of a machine: what changes all of it is carried to them by the one that was asked.

A worker that is being started reads the configuration by itself, and is not missed; see `Core.start`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc import aio

from moltbot_server.errors import MoltBotError, NotServing
from moltbot_server.rpc.interceptors import Call
from moltbot_server.rpc.remote_errors import error_of

log = logging.getLogger(__name__)

FORWARDED = "moltbot-forwarded"
"""The metadata of a call that another node has made for its caller: it is answered here and goes no further."""

_LONGEST = 120.0  # seconds that a sibling may take, which may have to load a model first
_LONGEST_LOOK = 2.0  # seconds that it may take to say what it has seen
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))

A = TypeVar("A")
Ask = Callable[[aio.Channel, Mapping[str, Any]], Awaitable[A]]
"""Makes a call on a channel, with what every call is made with (`metadata`, `timeout`)."""


def is_forwarded(call: Call) -> bool:
    """Tell whether another node has made this call for its caller."""
    return any(key == FORWARDED for key, _ in call.context.invocation_metadata() or ())


class Siblings:
    """The workers beside this one, by the names of their processes."""

    def __init__(self, sockets: Mapping[str, Path], key: str) -> None:
        """`key` opens them: all workers have the same one."""
        self._sockets = dict(sockets)
        self._metadata = (("authorization", f"Bearer {key}"), (FORWARDED, "1"))

    def __len__(self) -> int:
        """How many there are when all of them run."""
        return len(self._sockets)

    async def carry(self, call: Call | None, ask: Ask[A], *, fine: Collection[str] = ()) -> list[A]:
        """Make a call at all of them at the same time, and return what they answered.

        Those that do not run are left out, and so are those that refuse for a reason that is `fine`. A `call` that was
        carried here goes no further; without one it is this worker's own wish.

        Raises:
            NotServing: some of them could not do it; the message names them, and the others have done it.
        """
        if call is not None and is_forwarded(call):
            return []
        names = list(self._sockets)
        outcomes = await self._ask_all(ask, _LONGEST)
        failed = {
            name: outcome
            for name, outcome in zip(names, outcomes, strict=True)
            if isinstance(outcome, MoltBotError) and outcome.reason not in fine
        }
        if failed:
            told = "; ".join(f"{name}: {error.message}" for name, error in failed.items())
            log.error("some workers have not done what others have", extra={"problem": told})
            raise NotServing(f"done, but not by all workers; repeat the call ({told})", retry_after=1.0)
        return [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, MoltBotError)]

    async def hear(self, call: Call, ask: Ask[A]) -> list[A]:
        """Ask all of them what they know, and return what they answered; one that does not answer soon is left out."""
        if is_forwarded(call):
            return []
        outcomes = await self._ask_all(ask, _LONGEST_LOOK)
        return [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, MoltBotError)]

    async def _ask_all(self, ask: Ask[A], within: float) -> list[A | MoltBotError | None]:
        """Return what each of them answered, or why not, in their order."""
        return await asyncio.gather(*(self._ask(socket, ask, within) for socket in self._sockets.values()))

    async def _ask(self, socket: Path, ask: Ask[A], within: float) -> A | MoltBotError | None:
        """Return what a worker answered or why it refused; None if it does not run."""
        if not await _listens(socket):
            return None
        async with aio.insecure_channel(f"unix:{socket}", options=_OPTIONS) as channel:
            try:
                return await ask(channel, {"metadata": self._metadata, "timeout": within})
            except aio.AioRpcError as problem:
                if problem.code() is grpc.StatusCode.UNAVAILABLE and not await _listens(socket):
                    return None  # it has ended meanwhile, and reads everything anew when it comes back
                return error_of(problem, "the worker")


async def _listens(socket: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    writer.close()
    return True
