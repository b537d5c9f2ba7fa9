"""The composition root: makes the parts of a core from its settings, starts them in order and stops them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from moltbot.v1 import model_pb2

from moltbot_server.auth.keys import Authenticator
from moltbot_server.auth.policy import OWNER
from moltbot_server.auth.provider_keys import ProviderKeys
from moltbot_server.config import INLINE, Settings
from moltbot_server.errors import ModelUnavailable, MoltBotError, NotServing, Unauthenticated
from moltbot_server.journal import Journal
from moltbot_server.metrics import Metrics
from moltbot_server.models.boards import Boards
from moltbot_server.models.caching.building import Caches
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.context import ContextWindow
from moltbot_server.models.lineup import Lineup
from moltbot_server.models.manager import Loader, ModelManager
from moltbot_server.models.providers import ProviderKey
from moltbot_server.models.routing import RouteEngine
from moltbot_server.ops import OpsServer
from moltbot_server.outbox import Deliveries
from moltbot_server.pipeline import TurnPipeline
from moltbot_server.reloading import Reloading, Reread
from moltbot_server.rpc.peers import Peers
from moltbot_server.rpc.remote_engine import EngineLink, RemoteEngine
from moltbot_server.rpc.route import reload_others
from moltbot_server.rpc.server import GrpcServer, Sharing
from moltbot_server.rpc.siblings import Siblings
from moltbot_server.sessions import Sessions
from moltbot_server.store.building import build_store
from moltbot_server.turns import Message, Principal
from moltbot_server.usage import Ledger
from moltbot_server.workspace import Workspace, parse_key

log = logging.getLogger(__name__)

WORKSPACE = "default"
_EMPTY: Mapping[str, str] = MappingProxyType({})
_KEEP_EPHEMERAL = 24 * 3600.0
_PRUNE_EVERY = 600.0
_LOOK_EVERY = {"redis": 0.3, "sqlite": 0.1}  # seconds, which come on top of the three of a lease in Redis
_AFTER_GRACE = 1.0
_ENGINE_START = 60.0
_SHORTEST_AT_HAND = 60.0
_STORE_TOLD_EVERY = 0.5


class Core:
    """A running core: gRPC, its turns, its store, its model."""

    def __init__(
        self,
        settings: Settings,
        *,
        key: str,
        catalog: Catalog | None = None,
        reread: Reread | None = None,
        environ: Mapping[str, str] = _EMPTY,
        worker: int = 0,
    ) -> None:
        """`key` is the workspace's own; `catalog` stands in for the configured model.

        `reread` reads the settings again, for a reload; `environ` may have keys of providers. `worker` counts from 1
        the cores that share this machine's work; 0 is a core by itself.
        """
        self.settings = settings
        self.metrics = Metrics()
        self._worker = worker
        private = Workspace(folder=settings.workspace).core_socket(worker) if worker else None
        self.store = build_store(settings, address=f"unix:{private}" if private else "", key=key)
        self.ledger = Ledger(self.store, settings.budgets, currency=settings.currency, metrics=self.metrics)
        self.journal = Journal(self.store)
        self.deliveries = Deliveries(lambda: self.store.outbox, settings.outbox, self.metrics)
        self.catalog, self._link, loader = _models(settings, key, catalog)
        self.caches = Caches.of(settings)
        self.sessions = Sessions(
            self.store,
            self._window,
            size_of=lambda window: window.size,
            max_bytes=settings.cache.max_bytes,
            ttl=max(settings.cache.ttl, _SHORTEST_AT_HAND),
        )
        self.keys = ProviderKeys(Workspace(folder=settings.workspace), environ, make=ProviderKey)
        self.lineup = Lineup(
            self.catalog,
            self.keys,
            exhausted=lambda model: self.ledger.exhausted(WORKSPACE, model),
            metadata=self.caches.metadata,
            boards=Boards.at(Workspace(folder=settings.workspace).board_file) if worker else None,
        )
        self.models = ModelManager(self.catalog, loader, on_switch=self._switched, stays=self.lineup.owns)
        self.reloading = Reloading(
            settings,
            reread=reread or (lambda: settings),
            keys=self.keys,
            lineup=self.lineup,
            ledger=self.ledger,
            answers=self.caches.answers,
        )
        self.pipeline = TurnPipeline(
            store=self.store,
            journal=self.journal,
            sessions=self.sessions,
            catalog=self.catalog,
            metrics=self.metrics,
            answers=self.caches.answers,
            ledger=self.ledger,
            price=self.lineup.price,
            system_prompt=settings.system_prompt,
            flush_interval=settings.flush_interval,
            announce=self.deliveries.announce,
            when_busy=settings.sessions.busy,
        )
        parsed = parse_key(key)
        owner = Principal(workspace=WORKSPACE, key_id=parsed.id if parsed else "", role=OWNER)
        self.authenticator = Authenticator({key: owner})
        self.server = GrpcServer(
            host=settings.grpc_host,
            port=settings.grpc_port,
            max_message_bytes=settings.max_message_bytes,
            tls=_tls(settings),
            sharing=Sharing(
                port=bool(worker),
                private=private,
                age=settings.connection_age,
                grace=settings.max_connection_age_grace,
            ),
        )
        places = Workspace(folder=settings.workspace)
        others = {number for number in range(1, settings.workers + 1) if worker} - {worker}
        self.siblings = Siblings({f"core-{number}": places.core_socket(number) for number in sorted(others)}, key)
        self.peers = Peers(self.store, self.metrics, tls=settings.tls_cert is not None, ca=settings.advertise_ca)
        self.ops: OpsServer | None = None
        self._serving = False
        self._engine_default = ""
        self._duties: list[asyncio.Task[None]] = []
        self._reloads: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the store, load and prove the model, then serve.

        Raises:
            ModelUnavailable: the model cannot be loaded.
            StorageUnavailable: the database cannot be used.
            OSError: an address cannot be bound.
        """
        started = time.perf_counter()
        async with contextlib.AsyncExitStack() as undo:
            await self.store.open()
            undo.push_async_callback(self.store.close)
            self.deliveries.open()
            undo.push_async_callback(self.deliveries.close)
            await self.ledger.open()
            undo.push_async_callback(self.ledger.close)
            undo.push_async_callback(self._close_models)
            await self.caches.start()
            undo.push_async_callback(self.caches.close)
            await self._open_models()
            undo.push_async_callback(self.lineup.close)
            await self.reloading.open()
            await self._take_over()
            caches = (self.caches.answers, self.sessions, self.caches.metadata)
            self.server.register(
                authenticator=self.authenticator,
                metrics=self.metrics,
                pipeline=self.pipeline,
                journal=self.journal,
                sessions=self.sessions,
                store=self.store,
                catalog=self.catalog,
                manager=self.models,
                ledger=self.ledger,
                reloading=self.reloading,
                deliveries=self.deliveries,
                caches=caches,
                siblings=self.siblings,
                peers=self.peers,
                max_inline_bytes=self.settings.max_inline_bytes,
            )
            self.metrics.turns_under_way.ask(lambda: len(self.journal))
            loop = asyncio.get_running_loop()
            self.metrics.tasks.ask(lambda: len(asyncio.all_tasks(loop)))
            self.metrics.sessions_at_hand.ask(lambda: len(self.sessions))
            self.metrics.models.ask(self.catalog.numbers)
            self.metrics.caches.read(caches)
            host, port = self.settings.metrics_host, self.settings.metrics_port
            self.ops = OpsServer(host=host, port=port, metrics=self.metrics.page, health=self.health)
            undo.callback(self.ops.close)
            await self.server.start()
            undo.push_async_callback(self.server.stop, 0.0)
            undo.push_async_callback(self.peers.close)
            reached_at = self.settings.reached_at(self.server.port)
            if self.settings.store.type == "redis":
                await self.peers.prove(self.server.address, reached_at)
            await self.store.advertise(reached_at)
            undo.pop_all()
        self._serving = True
        self._duties.append(asyncio.create_task(self._tell_of_store()))
        if self._worker <= 1:  # of several, one does it
            self._duties.append(asyncio.create_task(self._prune()))
        if self._worker:
            self._duties.append(asyncio.create_task(self._catch_up()))
        if self.store.shared:
            self._duties.append(asyncio.create_task(self._look_after_others()))
            self._duties.append(asyncio.create_task(self.ledger.follow_others()))
        seconds = round(time.perf_counter() - started, 3)
        log.info("the core serves", extra={"grpc": self.server.address, "seconds": seconds})

    async def stop(self, grace: float, *, lame_duck: float = 0.0) -> None:
        """Leave well: no new turns, those under way end within `grace` seconds, what is written is on the disk.

        Health checkers hear at once that it leaves; for `lame_duck` seconds before the rest new turns are taken all the
        same, from callers that have not heard of it yet.
        """
        self._serving = False
        if lame_duck:
            await self.server.tell_leaving()
            log.info("the core leaves; what comes is still taken for a moment", extra={"seconds": lame_duck})
            await asyncio.sleep(lame_duck)
        await self.server.retire(grace + _AFTER_GRACE)
        for duty in self._duties:
            duty.cancel()
        if self._duties:
            await asyncio.wait(self._duties)
        await self.pipeline.drain(grace)
        await self.deliveries.close()
        # Who follows turns of other cores through this one goes there by another way.
        await self.peers.close()
        # Streams deliver the last events of turns that have ended by now.
        await self.server.stop(_AFTER_GRACE)
        await self.peers.close()
        await self.caches.close()
        await self._close_models()
        await self.lineup.close()
        await self.ledger.close()
        await self.store.close()
        if self.ops is not None:
            await asyncio.to_thread(self.ops.close)
        log.info("the core has left")

    def reload_soon(self) -> None:
        """Read the configuration again, as `ReloadRoutes` does; the log says how that went."""
        if self._reloads is None or self._reloads.done():
            self._reloads = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        try:
            needs_restart = await self.reloading.reload()
        except MoltBotError as error:
            log.error("the configuration was not read again; the old one holds", extra={"problem": error.message})
            return
        if needs_restart:
            log.warning("some of it needs a restart", extra={"keys": ", ".join(needs_restart)})
        with contextlib.suppress(NotServing):  # the log says which workers could not
            await reload_others(self.siblings, None)

    async def _catch_up(self) -> None:
        """Take up what was changed for all workers while this one was being started."""
        try:
            await self.reloading.catch_up()
            if self._link is not None:
                before, models = self._engine_default, await self._link.models()
                for model in models:
                    engine = RemoteEngine(self._link, model, queue_limit=self.settings.queue_limit)
                    if engine.id not in self.catalog:
                        self.catalog.add(engine)
                default = _default_of(models)
                if default != before and not self.lineup.owns(self.catalog.default):
                    self.catalog.choose(default)
        except MoltBotError as error:
            log.error("what was changed while this core started may be missing", extra={"problem": error.message})

    @property
    def route(self) -> Sequence[str]:
        """The models that answer turns which name none, where a route decides that; empty where one model answers."""
        engine = self.catalog.entries[0].engine
        return engine.names if isinstance(engine, RouteEngine) else ()

    def health(self) -> Mapping[str, Any]:
        """Return how the core is, for `/health`."""
        entry, away = self.catalog.entries[0], self.store.away
        locked_out = entry.locked_out
        if not self._serving:
            status = "leaving"
        elif entry.state != "ready" or locked_out is not None:
            status = "model failed"
        else:
            status = "ok" if away is None else "store away"
        return {
            "status": status,
            "model": entry.engine.id,
            "route": self.route,
            "model_state": str(entry.state),
            "model_problem": locked_out.message if locked_out else entry.message,
            "model_reason": locked_out.reason if locked_out else entry.reason,
            "engine": "away" if self._link is not None and self._link.lost_for else "serving",
            "engine_address": INLINE if self._link is None else self._link.address,
            "store": "ok" if away is None else f"away: {away.problem}",
            "store_address": _place_of(self.settings),
            "store_away_s": None if away is None else round(time.time() - away.since, 1),
            "store_warnings": list(self.store.warnings),
            "turns_under_way": len(self.journal),
        }

    async def _open_models(self) -> None:
        """Load and prove the models, or connect to the engine that has done so."""
        if self._link is None:
            await self.catalog.start()
            return
        await self._link.open(_ENGINE_START)
        try:
            models = await self._link.models()
        except Unauthenticated:
            key_file = Workspace(folder=self.settings.workspace).key_file
            raise ModelUnavailable(
                f"The engine at {self._link.address} does not know this workspace's key: start all of MoltBot again if "
                f"the key was changed while it ran; an engine elsewhere needs {key_file} in its workspace."
            ) from None
        self._engine_default = _default_of(models)
        for model in models:
            self.catalog.add(RemoteEngine(self._link, model, queue_limit=self.settings.queue_limit))

    async def _close_models(self) -> None:
        await self.catalog.close()
        if self._link is not None:
            await self._link.close()

    def _window(self, history: Sequence[Message]) -> ContextWindow:
        engine = self.catalog.entries[0].engine
        return ContextWindow.of(history, engine.count, engine.capabilities.context_length)

    def _switched(self) -> None:
        """Take note that another model answers by default."""
        # What fits into its context may be more of a session than is at hand.
        self.sessions.forget_idle()
        # What the model before would have said is not what this one says.
        self.reloading.renew_answers()

    async def _take_over(self) -> None:
        if taken := await self.pipeline.take_over():
            log.info("turns of a core that is gone go on", extra={"turns": taken})

    async def _tell_of_store(self) -> None:
        """Let health checkers know whether the store is away; whoever finds that out does not wait for them."""
        told: bool | None = None
        while True:
            if told != (away := self.store.away is not None):
                told = away
                await self.server.tell_store(away=away)
            await asyncio.sleep(_STORE_TOLD_EVERY)

    async def _look_after_others(self) -> None:
        """Carry on what other cores left unfinished, soon after they are gone."""
        every = _LOOK_EVERY[self.settings.store.type]
        while True:
            await asyncio.sleep(every)
            try:
                await self._take_over()
            except MoltBotError as error:
                log.debug("cannot look after other cores now", extra={"error": error.message})

    async def _prune(self) -> None:
        """Forget sessions: those of stateless callers once their calls are no longer repeated, and those too old."""
        days = self.settings.retention.days
        while True:
            try:
                now = time.time()
                await self._forget(now - _KEEP_EPHEMERAL, ephemeral=True)
                if days and await self._forget(now - days * 86400.0, ephemeral=False):
                    # What is at hand would go on without its row.
                    self.sessions.forget_idle()
            except MoltBotError as error:
                log.warning("cannot forget sessions now; it is tried again", extra={"error": error.message})
            await asyncio.sleep(_PRUNE_EVERY)

    async def _forget(self, before: float, *, ephemeral: bool) -> int:
        """Forget sessions in steps: a store forgets so many at once that nobody has to wait for it."""
        forgotten = 0
        while pruned := await self.store.prune(before, ephemeral=ephemeral):
            forgotten += pruned
        if forgotten:
            log.info("forgot sessions", extra={"sessions": forgotten, "of_stateless_callers": ephemeral})
        return forgotten


def _models(settings: Settings, key: str, given: Catalog | None) -> tuple[Catalog, EngineLink | None, Loader]:
    """Return the catalog of models, the connection to their engine if that is another process, and what loads more."""
    if given is None and settings.engine not in ("", INLINE):
        own = settings.engine == f"unix:{Workspace(folder=settings.workspace).engine_socket}"
        link = EngineLink(settings.engine, key, ca=settings.engine_ca, own=own)
        return Catalog(), link, link
    # Late: the native code of models is loaded only where models are.
    from moltbot_server.models.building import LocalLoader, Resources, configured_catalog

    return given or configured_catalog(settings), None, LocalLoader(Resources.of(settings))


def _place_of(settings: Settings) -> str:
    """Return where turns are kept, for people."""
    named = settings.store
    return f"Redis at {named.host}:{named.port}" if named.type == "redis" else named.type


def _default_of(models: Sequence[model_pb2.Model]) -> str:
    """Return the id of the model that answers by default, which an engine tells first."""
    return models[0].name.removeprefix("models/") if models else ""


def _tls(settings: Settings) -> tuple[bytes, bytes] | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return settings.tls_cert.read_bytes(), settings.tls_key.read_bytes()
