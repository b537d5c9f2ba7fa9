"""Calls that belong to another node: made there for their callers, and passed through as they come.

The other node sees the caller's own credential and deadline; what it answers or refuses is told as if it had been said
here. When it is gone, also when it only stands still and its lease is over, the call ends with UNAVAILABLE: whoever
asks again finds the turn where it goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from moltbot.v1 import chat_pb2_grpc, session_pb2_grpc

from moltbot_server import tasks
from moltbot_server.errors import MoltBotError, NotServing
from moltbot_server.metrics import Metrics
from moltbot_server.rpc.interceptors import Call, PassedOn
from moltbot_server.rpc.peer_trust import distrust, prove
from moltbot_server.rpc.remote_errors import error_of, was_lost, was_told
from moltbot_server.rpc.siblings import FORWARDED
from moltbot_server.store import Store

log = logging.getLogger(__name__)

_LOOK_EVERY = 1.0
_KEPT_IDLE = 60.0
"""Seconds that a connection is kept without a call."""
_RETRY_AFTER = 0.3
_OWN = frozenset({FORWARDED, "user-agent", "content-type", "te"})
"""Metadata that belongs to one connection, and is not handed on."""
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # how long an attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 11_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.enable_retries", 0),  # who asks again, and when, is decided by the caller
)


class Peers:
    """The other nodes, and the connections to those that were asked something lately."""

    def __init__(self, store: Store, metrics: Metrics, *, tls: bool = False, ca: Path | None = None) -> None:
        """Nodes on other machines are spoken to encrypted if `tls`, and proved by `ca` or by what gRPC brings."""
        self._store = store
        self._counts = metrics.forwarded
        self._tls, self._ca = tls, ca
        self._peers: dict[str, _Peer] = {}

    async def unary(self, method: str, request: Any, call: Call, elsewhere: NotServing) -> Any:
        """Return what another node answers to a call; `elsewhere` says which one has to be asked.

        Raises:
            NotServing: it cannot be asked, or is gone; or `elsewhere` itself, where the call goes no further.
            PassedOn: it refused.
        """
        peer = await self._peer(method, call, elsewhere)
        made = peer.method(method)(request, metadata=_metadata(call), timeout=call.context.time_remaining())
        with self._counted(method, peer, made):
            return await made

    async def stream(self, method: str, request: Any, call: Call, elsewhere: NotServing) -> AsyncGenerator[Any, None]:
        """Yield what another node streams; raises what `unary` does."""
        peer = await self._peer(method, call, elsewhere)
        made = peer.method(method)(request, metadata=_metadata(call), timeout=call.context.time_remaining())
        with self._counted(method, peer, made):
            while (response := await made.read()) is not aio.EOF:
                yield response

    async def prove(self, bound: str, advertised: str) -> None:
        """Warn where other nodes would not trust this one, which listens at `bound` and is reached at `advertised`."""
        if self._tls and not bound.startswith("unix:"):
            await prove(bound, advertised, self._roots())

    async def close(self) -> None:
        """End the calls under way, and the connections."""
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            await peer.close()

    @contextmanager
    def _counted(self, method: str, peer: _Peer, made: Any) -> Iterator[None]:
        """Tell how a call ends, count it, and end it with its caller."""
        outcome = "CANCELLED"
        peer.begin(made)
        try:
            yield
            outcome = "OK"
        except aio.AioRpcError as problem:
            outcome = problem.code().name
            if was_lost(problem) or (problem.code() is grpc.StatusCode.CANCELLED and not was_told(problem)):
                outcome = "LOST"
                peer.lost(problem)
                raise _lost() from None
            if was_told(problem):
                raise PassedOn(problem) from None
            raise error_of(problem, "the other core") from None
        except asyncio.CancelledError:
            if not peer.gone:
                raise
            outcome = "LOST"
            raise _lost() from None
        finally:
            made.cancel()
            peer.end(made)
            self._counts.add(method, outcome)

    async def _peer(self, method: str, call: Call, elsewhere: NotServing) -> _Peer:
        """Return the node to ask.

        Raises:
            NotServing: it is gone, or the call goes no further.
        """
        node, hops = elsewhere.node, _hops(call)
        address = await self._store.address_of(node) if node else ""
        # Of a machine with several workers anyone may be reached from outside, and knows the way to the others.
        if not node or hops > 1 or (hops and not address.startswith("unix:")):
            raise elsewhere
        if not address:
            self._counts.add(method, "GONE")
            raise _lost()
        peer = self._peers.get(node)
        if peer is None:
            await self._forget_idle()
            peer = self._peers[node] = _Peer(self._store, node, address, self._channel(address))
        return peer

    def _channel(self, address: str) -> aio.Channel:
        if address.startswith("unix:") or not self._tls:
            return aio.insecure_channel(address, options=_OPTIONS)
        return aio.secure_channel(address, grpc.ssl_channel_credentials(self._roots()), options=_OPTIONS)

    def _roots(self) -> bytes | None:
        return self._ca.read_bytes() if self._ca is not None else None

    async def _forget_idle(self) -> None:
        until = time.monotonic() - _KEPT_IDLE
        idle = [node for node, peer in self._peers.items() if peer.idle_since < until]
        for node in idle:
            await self._peers.pop(node).close()


class _Peer:
    """A node, the calls that are made there, and whoever looks whether it is still there."""

    def __init__(self, store: Store, node: str, address: str, channel: aio.Channel) -> None:
        self._store, self._node, self._address, self._channel = store, node, address, channel
        self._stubs = (chat_pb2_grpc.ChatServiceStub(channel), session_pb2_grpc.SessionServiceStub(channel))
        self._calls: set[Any] = set()
        self._watch: asyncio.Task[None] | None = None
        self._idle_since = time.monotonic()
        self._distrusted = ""
        self.gone = False

    @property
    def idle_since(self) -> float:
        """Since when nothing was asked, on `time.monotonic`; infinity while something is."""
        return float("inf") if self._calls else self._idle_since

    def method(self, name: str) -> Any:
        """Return what makes a call of a method."""
        return next(getattr(stub, name) for stub in self._stubs if hasattr(stub, name))

    def begin(self, made: Any) -> None:
        """Take note of a call."""
        self._calls.add(made)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look())

    def end(self, made: Any) -> None:
        """Take note that a call is over."""
        self._calls.discard(made)
        self._idle_since = time.monotonic()

    def lost(self, problem: aio.AioRpcError) -> None:
        """Take note that a call broke off; what a setting is to blame for is told once."""
        why = distrust(problem)
        if why and why != self._distrusted:
            log.warning("another core is not trusted", extra={"address": self._address, "problem": why})
        self._distrusted = why or self._distrusted

    async def close(self) -> None:
        """End the calls and the connection."""
        self.gone = True
        if self._watch is not None:
            await tasks.end(self._watch)
        for made in tuple(self._calls):
            made.cancel()  # a channel that is closed lets them go on
        await self._channel.close()

    async def _look(self) -> None:
        """End the calls when the node is gone: one that was stopped ends none by itself, and others have its turns."""
        while self._calls:
            await asyncio.sleep(_LOOK_EVERY)
            try:
                self.gone = await self._store.address_of(self._node) != self._address
            except MoltBotError as error:
                log.debug("cannot see whether another node is there", extra={"problem": error.message})
            if self.gone:
                for made in tuple(self._calls):
                    made.cancel()


def _lost() -> NotServing:
    text = "the core that has this turn cannot be reached; another one carries it on: ask again"
    return NotServing(text, retry_after=_RETRY_AFTER, handed_over=True)


def _hops(call: Call) -> int:
    """Return how often a call was made anew on its way here."""
    told = next((value for key, value in call.context.invocation_metadata() or () if key == FORWARDED), "0")
    return int(told) if isinstance(told, str) and told.isascii() and told.isdigit() and len(told) < 3 else 2


def _metadata(call: Call) -> tuple[tuple[str, str | bytes], ...]:
    """Return what a call carries on: all that its caller has said."""
    told = call.context.invocation_metadata() or ()
    said = tuple((key, value) for key, value in told if key not in _OWN and not key.startswith(("grpc-", ":")))
    return (*said, (FORWARDED, str(_hops(call) + 1)))
