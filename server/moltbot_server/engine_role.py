"""The engine role's composition root: models behind InferenceService and ModelService, without sessions or a store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moltbot_server.auth.keys import Authenticator
from moltbot_server.auth.policy import OWNER
from moltbot_server.config import ConfigError, Problem, Settings, is_loopback
from moltbot_server.metrics import Metrics
from moltbot_server.models.building import LocalLoader, Resources, configured_catalog
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.manager import ModelManager
from moltbot_server.models.replica.nursery import Nursery
from moltbot_server.ops import OpsServer
from moltbot_server.rpc.server import GrpcServer
from moltbot_server.turns import Principal

log = logging.getLogger(__name__)


class EngineRole:
    """A running engine: its models and the server before them."""

    def __init__(
        self,
        settings: Settings,
        *,
        key: str,
        listen: str,
        metrics_port: int | None = None,
        catalog: Catalog | None = None,
        nursery: Nursery | None = None,
    ) -> None:
        """`key` opens it: who has it is a core, and is believed whom an answer is for.

        `listen` is `unix:PATH` or `HOST:PORT`; port 0 takes any free one. `/health` and `/metrics` are told on
        `metrics_port`, and nowhere without one. `catalog` stands in for the configured model. With a `nursery`,
        which is closed with the role, replicas of small models are processes.

        Raises:
            ModelUnavailable: the configured model cannot be found.
            ConfigError: the address is wrong, or others could listen to what passes there.
        """
        self.catalog = catalog or configured_catalog(settings, nursery)
        self.models = ModelManager(self.catalog, LocalLoader(Resources.of(settings, nursery)))
        self._nursery = nursery
        self.metrics = Metrics()
        self.server = _server(settings, listen)
        self.ops: OpsServer | None = None
        self._metrics_at = (settings.metrics_host, metrics_port)
        self._authenticator = Authenticator({key: Principal(workspace="", key_id="", role=OWNER)})

    async def start(self) -> None:
        """Load and prove the model, then serve.

        Raises:
            ModelUnavailable: the model cannot be loaded.
            OSError: the address cannot be bound.
        """
        started = time.perf_counter()
        await self.catalog.start()
        if self._nursery is not None and not self._nursery.born:
            await asyncio.to_thread(self._nursery.close)  # it takes memory, and starts again when it is needed
        try:
            self.server.register_engine(
                authenticator=self._authenticator, metrics=self.metrics, catalog=self.catalog, manager=self.models
            )
            self.metrics.models.ask(self.catalog.numbers)
            host, port = self._metrics_at
            if port is not None:
                self.ops = OpsServer(host=host, port=port, metrics=self.metrics.page, health=self.health)
            await self.server.start()
        except BaseException:
            if self.ops is not None:
                self.ops.close()
            await self.catalog.close()
            raise
        seconds = round(time.perf_counter() - started, 3)
        log.info("the engine serves", extra={"address": self.server.address, "seconds": seconds})

    async def stop(self, grace: float) -> None:
        """Leave well: answers under way end within `grace` seconds."""
        await self.server.retire()
        await self.server.stop(grace)
        await self.catalog.close()
        if self.ops is not None:
            await asyncio.to_thread(self.ops.close)
        if self._nursery is not None:
            await asyncio.to_thread(self._nursery.close)
        log.info("the engine has left")

    def health(self) -> Mapping[str, Any]:
        """Return how the engine is, for `/health`."""
        entry = self.catalog.entries[0]
        return {
            "status": "ok" if entry.state == "ready" else "model failed",
            "model": entry.engine.id,
            "model_state": str(entry.state),
        }


def _server(settings: Settings, listen: str) -> GrpcServer:
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        if not path.name or not path.parent.is_dir():
            text = f"found {listen!r}, expected unix:PATH in a folder that exists"
            raise ConfigError(Problem(where="--listen", text=text))
        return GrpcServer(path=path, max_message_bytes=_LARGEST)
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > _LAST_PORT:
        raise ConfigError(Problem(where="--listen", text=f"found {listen!r}, expected unix:PATH or HOST:PORT"))
    tls = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        tls = settings.tls_cert.read_bytes(), settings.tls_key.read_bytes()
    if tls is None and not is_loopback(host) and not settings.trusted_proxies:
        text = f"{host} can be reached from other machines and nothing would encrypt what passes"
        text += "; set `tls_cert` and `tls_key`, or use 127.0.0.1 or a Unix socket"
        raise ConfigError(Problem(where="--listen", text=text))
    return GrpcServer(host=host, port=int(port), max_message_bytes=_LARGEST, tls=tls)


_LARGEST = 64 << 20
_LAST_PORT = 65535
