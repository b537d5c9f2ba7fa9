"""The gRPC server: its options, its services, its health, and how it leaves."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from moltbot.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    chat_pb2,
    chat_pb2_grpc,
    delivery_pb2,
    delivery_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    plugin_pb2,
    plugin_pb2_grpc,
    route_pb2,
    route_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)

from moltbot_server.auth.keys import Authenticator
from moltbot_server.config import is_loopback
from moltbot_server.errors import AddressTaken
from moltbot_server.journal import Journal
from moltbot_server.metrics import Metrics
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.context import ContextWindow
from moltbot_server.models.manager import ModelManager
from moltbot_server.outbox import Deliveries
from moltbot_server.pipeline import TurnPipeline
from moltbot_server.reloading import Reloading
from moltbot_server.rpc import convert
from moltbot_server.rpc.cache import CacheService, ClearableCache
from moltbot_server.rpc.chat import ChatService
from moltbot_server.rpc.delivery import DeliveryService
from moltbot_server.rpc.inference import InferenceService
from moltbot_server.rpc.interceptors import Guard, GuardedServer
from moltbot_server.rpc.model import ModelService
from moltbot_server.rpc.peers import Peers
from moltbot_server.rpc.plugin import PluginService
from moltbot_server.rpc.reflection import SERVICE_NAME, ReflectionService
from moltbot_server.rpc.route import RouteService
from moltbot_server.rpc.session import SessionService
from moltbot_server.rpc.siblings import Siblings
from moltbot_server.rpc.usage import UsageService
from moltbot_server.sessions import Sessions
from moltbot_server.store import Store
from moltbot_server.usage import Ledger

log = logging.getLogger(__name__)

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (chat_pb2, "ChatService"),
        (session_pb2, "SessionService"),
        (model_pb2, "ModelService"),
        (inference_pb2, "InferenceService"),
        (plugin_pb2, "PluginService"),
        (usage_pb2, "UsageService"),
        (route_pb2, "RouteService"),
        (cache_pb2, "CacheService"),
        (delivery_pb2, "DeliveryService"),
    )
)


_STARTING = tuple(f"/{SERVICES[0]}/{method}" for method in ("StreamTurn", "RunTurn"))
_MOST_PENDING = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How a server shares its work with others of the same kind.

    Each of them listens on the same port, if `port` says so, and on a Unix socket of its own, `private`, where it goes
    on serving while it leaves. A connection is asked to end at an age of `age` seconds, so that those that come later
    get their share; the calls on it may go on for `grace` seconds. 0: it may stay for ever.
    """

    port: bool = False
    private: Path | None = None
    age: float = 0.0
    grace: float = 0.0


_ALONE = Sharing()
STORE_SERVICE = "moltbot.store"
"""What stands for the store of a core in its health service."""


class GrpcServer:
    """A gRPC server of ours on one address, or on two. `methods` names every RPC that it serves."""

    def __init__(
        self,
        *,
        host: str = "",
        port: int = 0,
        path: Path | None = None,
        max_message_bytes: int,
        tls: tuple[bytes, bytes] | None = None,
        sharing: Sharing = _ALONE,
    ) -> None:
        """`path` is a Unix socket in place of host and port. `tls` is a certificate chain and its private key, PEM.

        Port 0 takes any free one. On the Unix socket of `sharing` there is no TLS.
        """
        self._host, self._port, self._socket = host, port, path
        self._served: Sequence[str] = SERVICES
        self._tls = tls
        self._sharing = sharing
        options = _options(max_message_bytes)
        self._server = aio.server(options=list({**dict(options), **_shared(sharing)}.items()))
        self._private = aio.server(options=options) if sharing.private is not None else None
        self._closing: asyncio.Task[None] | None = None
        self._inference: InferenceService | None = None
        self._chat: ChatService | None = None
        self._health = health.aio.HealthServicer()
        self.methods: Sequence[str] = ()
        self.port = 0

    @property
    def address(self) -> str:
        """The address to dial, such as `127.0.0.1:50051` or `unix:/run/engine.sock`."""
        if self._socket is not None:
            return f"unix:{self._socket}"
        return f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"

    def register(
        self,
        *,
        authenticator: Authenticator,
        metrics: Metrics,
        pipeline: TurnPipeline,
        journal: Journal,
        sessions: Sessions[ContextWindow],
        store: Store,
        catalog: Catalog,
        manager: ModelManager,
        ledger: Ledger,
        reloading: Reloading,
        deliveries: Deliveries,
        caches: Sequence[ClearableCache],
        siblings: Siblings,
        peers: Peers,
        max_inline_bytes: int,
    ) -> None:
        """Add all services of a core, each method behind the guard."""
        gates = dict.fromkeys(_STARTING, pipeline.refusal_unread)
        guard = Guard(authenticator, metrics)
        reader = convert.Reader(max_inline_bytes=max_inline_bytes)
        chat, session = ChatService(pipeline, journal, reader, peers), SessionService(store, sessions, peers)
        model, inference = ModelService(catalog, manager, siblings), InferenceService(catalog, reader, metrics)
        self._inference, self._chat = inference, chat
        usage, route = UsageService(store, ledger), RouteService(reloading, catalog, siblings)
        cache = CacheService(caches, siblings)
        delivery = DeliveryService(deliveries)
        for server in filter(None, (self._private, self._server)):
            guarded: Any = GuardedServer(server, guard, gates)
            chat_pb2_grpc.add_ChatServiceServicer_to_server(chat, guarded)
            session_pb2_grpc.add_SessionServiceServicer_to_server(session, guarded)
            model_pb2_grpc.add_ModelServiceServicer_to_server(model, guarded)
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, guarded)
            plugin_pb2_grpc.add_PluginServiceServicer_to_server(PluginService(), guarded)
            usage_pb2_grpc.add_UsageServiceServicer_to_server(usage, guarded)
            route_pb2_grpc.add_RouteServiceServicer_to_server(route, guarded)
            cache_pb2_grpc.add_CacheServiceServicer_to_server(cache, guarded)
            delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(delivery, guarded)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, guarded)
            self._reflect(guarded)
            self.methods = tuple(guarded.methods)

    def register_engine(
        self, *, authenticator: Authenticator, metrics: Metrics, catalog: Catalog, manager: ModelManager
    ) -> None:
        """Add the services of the engine role, each method behind the guard."""
        guarded: Any = GuardedServer(self._server, Guard(authenticator, metrics))
        # Who calls is a core, which has read all of it within its own limits.
        reader = convert.Reader(max_inline_bytes=1 << 30)
        self._served = tuple(name for name in SERVICES if name.endswith((".InferenceService", ".ModelService")))
        self._inference = InferenceService(catalog, reader, metrics, trusted=True)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._inference, guarded)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(catalog, manager), guarded)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, guarded)
        self._reflect(guarded)
        self.methods = tuple(guarded.methods)

    def _reflect(self, guarded: Any) -> None:
        if self._socket is not None or is_loopback(self._host):
            # Who can reach the port learns the contract: fine on one's own machine, not beyond it.
            names = (*self._served, health.SERVICE_NAME, SERVICE_NAME)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionService(names), guarded)

    async def start(self) -> None:
        """Listen and serve.

        Raises:
            OSError: the address cannot be bound.
        """
        if self._private is not None and (private := self._sharing.private) is not None:
            _clear(private)
            _add_port(self._private, f"unix:{private}", None)
        wanted = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        if self._socket is not None:
            wanted = self.address
            _clear(self._socket)
        self.port = _add_port(self._server, wanted, self._tls)
        if self._private is not None:
            await self._private.start()
        await self._server.start()
        for service in ("", *self._served):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def tell_store(self, *, away: bool) -> None:
        """Tell health checkers whether the store can be used, under the name of a service of its own.

        The core itself serves while its store is away: turns under way can be followed, others hear why not and when.
        """
        known = health_pb2.HealthCheckResponse
        await self._health.set(STORE_SERVICE, known.NOT_SERVING if away else known.SERVING)

    async def tell_leaving(self) -> None:
        """Tell health checkers that no new work is wanted here; what comes all the same is still taken."""
        await self._health.enter_graceful_shutdown()

    async def retire(self, grace: float = 0.0) -> None:
        """Take nothing new, and tell health checkers so.

        A shared port is closed at once, so that callers go to the others that have it; calls under way may go on for
        `grace` seconds.
        """
        await self.tell_leaving()
        if self._inference is not None:
            self._inference.leave()
        if self._private is not None:
            self._closing = asyncio.create_task(self._server.stop(grace))

    async def stop(self, grace: float) -> None:
        """End the calls under way within `grace` seconds and close the port."""
        if self._chat is not None:
            self._chat.leave()
        if self._closing is None:
            await self._server.stop(grace)
        else:
            await self._closing
        if self._private is not None:
            await self._private.stop(grace)


def _add_port(server: aio.Server, wanted: str, tls: tuple[bytes, bytes] | None) -> int:
    try:
        if tls is None:
            return server.add_insecure_port(wanted)
        chain, key = tls
        return server.add_secure_port(wanted, grpc.ssl_server_credentials([(key, chain)]))
    except RuntimeError as error:
        if _is_taken(wanted):
            raise AddressTaken(f"{wanted} cannot be bound: another program listens there") from error
        raise OSError(f"{wanted} cannot be bound") from error


def _is_taken(wanted: str) -> bool:
    """Tell whether an address is another program's, of which gRPC says no more than that it cannot be had."""
    host, _, port = wanted.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, int(port)), family=family).close()
    except (OSError, ValueError) as problem:
        return isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
    return False


def _clear(path: Path) -> None:
    """Remove a socket that a killed process left behind.

    Raises:
        OSError: somebody listens there.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise AddressTaken(f"{path} cannot be bound: another process listens there")


def _options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Return the transport's options: bounded messages, metadata and streams; clients may ping every ten seconds."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.absolute_max_metadata_size", 32 * 1024),
        ("grpc.max_concurrent_streams", 1024),
        # Calls that the event loop has not come to yet. Beyond a thousand gRPC would end some of them by itself, with
        # nothing but CANCELLED; here they are refused with a reason when their turn comes.
        ("grpc.server.max_pending_requests", _MOST_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING),
        # A second server on the port is a mistake, unless `_shared` says otherwise.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # its own pings wait a minute, and keep-alive waits for them
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _shared(sharing: Sharing) -> dict[str, int]:
    """Return the options that come on top for a server that shares its work."""
    options = {"grpc.so_reuseport": 1} if sharing.port else {}
    if sharing.age:
        options["grpc.max_connection_age_ms"] = int(sharing.age * 1000)
        options["grpc.max_connection_age_grace_ms"] = int(sharing.grace * 1000)
    return options
