"""The ways to a core: channels whose keepalive finds a dead connection, to one address or to several."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from moltbot.v1 import chat_pb2_grpc, delivery_pb2_grpc, model_pb2_grpc, session_pb2_grpc

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # The core allows a ping every 10 s. Pings find a dead connection under a stream that is silent for long.
    ("grpc.keepalive_time_ms", 11_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # One that measures the connection may be under way already. It has a minute by default, and keepalive waits for it.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # How long an attempt to connect may take, whatever its name says: a way that swallows all is left after it.
    ("grpc.min_reconnect_backoff_ms", 3_000),
)
# Where there are several cores, one that is starting or leaving says so, and calls go to another one.
_WATCHED = json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}})


def open_channel(
    address: str,
    credentials: grpc.ChannelCredentials | None,
    *,
    watched: bool = False,
    options: Sequence[tuple[str, int | str]] = (),
) -> grpc.aio.Channel:
    """Return a channel to the address, with TLS when credentials are given. It connects with the first call.

    A `watched` one makes no call while the health service of the core does not say that it serves. `options` come on
    top of ours.
    """
    told = [*_OPTIONS, *options]
    if watched:
        told.append(("grpc.service_config", _WATCHED))
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=told)
    return grpc.aio.secure_channel(address, credentials, options=told)


def addresses(text: str) -> list[str]:
    """Return the addresses of a list such as `a:1,b:2` or `unix:/a,unix:/b`.

    What has another scheme (`ipv4:`, `dns:///`) is one for gRPC, which reads lists of its own there.
    """
    schemes = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:")
    if text.startswith("unix:"):
        return text.replace(",unix:", "\0unix:").split("\0")
    if text.startswith(schemes):
        return [text]
    return [each for part in text.split(",") if (each := part.strip())] or [text]


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A channel to one address, and the stubs on it."""

    address: str
    channel: grpc.aio.Channel
    chat: chat_pb2_grpc.ChatServiceAsyncStub
    sessions: session_pb2_grpc.SessionServiceAsyncStub
    models: model_pb2_grpc.ModelServiceAsyncStub
    deliveries: delivery_pb2_grpc.DeliveryServiceAsyncStub

    @property
    def is_there(self) -> bool:
        """True when it is connected, so that a call that failed on it was refused, or cut just now."""
        return self.channel.get_state() is grpc.ChannelConnectivity.READY


class Ways:
    """The channels to a core. Calls take the same address as long as it answers, and then the next one.

    Among several addresses the first one is drawn by lot, so that clients spread over the cores. Where calls are to be
    `spread`, each takes the next address that is connected and whose core says that it serves; those of one session
    take the same one, as long as it serves: what was said lately is at hand there.
    """

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None,
        *,
        copies: int = 1,
        options: Sequence[tuple[str, int | str]] = (),
        spread: bool = False,
    ) -> None:
        """`copies` is the number of channels to each address, over which calls are spread."""
        found = addresses(address)
        watched = len(found) > 1 or address.startswith("dns:")
        self._groups = [
            [_link(each, open_channel(each, credentials, watched=watched, options=options)) for _ in range(copies)]
            for each in found
        ]
        self._at = random.randrange(len(self._groups))
        self._turn = 0
        self._spread = spread and len(found) > 1
        self.answered = False
        """True when a core has answered once."""

    def __len__(self) -> int:
        """How many addresses there are."""
        return len(self._groups)

    def pick(self, session: str = "") -> Link:
        """Return the link for the next call, which may be of a session."""
        if self._spread:
            return self._next_ready(session)
        group = self._groups[self._at]
        self._turn += 1
        return group[self._turn % len(group)]

    def _next_ready(self, session: str) -> Link:
        """Return a link of the next address, or of the first one after it that is ready; all of them are kept so."""
        self._turn += 1
        count = len(self._groups)
        before = zlib.crc32(session.encode()) if session else self._at
        found: Link | None = None
        for step in range(1, count + 1):
            at = (before + step) % count
            link = self._groups[at][self._turn // count % len(self._groups[at])]
            ready = link.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY
            if ready or found is None:
                found, next_at = link, at
            if ready:
                break
        assert found is not None
        if not session:
            self._at = next_at
        return found

    def leave(self, link: Link) -> None:
        """Take the next address for the calls that follow, unless another call saw to that."""
        if not self._spread and link in self._groups[self._at]:
            self._at = (self._at + 1) % len(self._groups)

    async def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        for group in self._groups:
            for link in group:
                await link.channel.close()


def _link(address: str, channel: grpc.aio.Channel) -> Link:
    return Link(
        address,
        channel,
        chat_pb2_grpc.ChatServiceStub(channel),
        session_pb2_grpc.SessionServiceStub(channel),
        model_pb2_grpc.ModelServiceStub(channel),
        delivery_pb2_grpc.DeliveryServiceStub(channel),
    )
