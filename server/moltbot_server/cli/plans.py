"""What `moltbot start` runs: an engine unless the models are elsewhere, cores, the processes of the HTTP adapter."""

from __future__ import annotations

from collections.abc import Sequence

from moltbot_server.cli.children import Plan
from moltbot_server.cli.pulse import LONG_PATIENCE
from moltbot_server.config import Settings
from moltbot_server.workspace import Workspace

ADAPTERS = "moltbot_adapters"
"""The module of the processes that serve HTTP."""
ENGINE_STAGE = 1
"""The engine is stopped last, and not started again in turn: all answers come from there."""
_FIRST_PAUSE = 0.1  # seconds; what dies for the first time is back as soon as can be, for callers wait for it
_LONGEST_PAUSE = 2.0  # streams, pages and turns wait for what died, however often that was
# What glibc's malloc reads when a process begins. By default it keeps up to eight arenas for each processor, and what
# a flood of calls took in one of them is not given back; two hold a core a fifth smaller after it, at the same speed.
# In an engine, whose threads come and go with its models, they bound what switches leave behind.
_FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}


def plans(
    settings: Settings, workspace: Workspace, *, core: str, metrics: Sequence[int], engine_metrics: int
) -> list[Plan]:
    """Return the processes by settings whose ports are all known.

    `core` is the address of the cores, `metrics` the port on which each of them tells how it does, and `engine_metrics`
    that of the engine.
    """
    # gRPC's native part writes lines of its own, which a reader of JSON cannot take, and several a second while the
    # engine of another machine is not trusted, of which our log has one.
    hushed = settings.log_json or settings.engine_ca is not None
    environ = _FEW_ARENAS | ({"GRPC_VERBOSITY": "NONE"} if hushed else {})
    server = ["--no-notices", "--problems-as-json"]
    server += ["--workspace", str(workspace.folder), "--log-level", settings.log_level]
    many = settings.workers > 1
    if many:
        # Each has a socket of its own, over which calls are spread evenly, however few the connections.
        core = ",".join(f"unix:{workspace.core_socket(number + 1)}" for number in range(settings.workers))
    adapters = settings.http_workers or settings.workers
    http = _http(settings, workspace, core, shares_port=adapters > 1)
    names = [f"http-{number}" if adapters > 1 else "http" for number in range(1, adapters + 1)]
    address = f"unix:{workspace.engine_socket}"
    own = settings.engine == ""
    server += ["--grpc-port", str(settings.grpc_port)]
    found = [
        *(
            Plan(
                name=f"core-{number}" if many else "core",
                module="moltbot_server",
                arguments=(
                    *server,
                    *("--metrics-port", str(port), "--engine", address if own else settings.engine),
                    *(("--worker", str(number), "--workers", str(settings.workers)) if many else ()),
                ),
                pause=_FIRST_PAUSE,
                longest_pause=_LONGEST_PAUSE,
                environ=environ,
                secrets=True,
                tells=True,
            )
            for number, port in enumerate(metrics, start=1)
        ),
        *(
            Plan(
                name=name,
                module=ADAPTERS,
                arguments=(*http, "--pulse", str(workspace.adapter_socket(name))),
                pause=_FIRST_PAUSE,
                longest_pause=_LONGEST_PAUSE,
                environ=environ | {"MOLTBOT_PROCESS": name},
                tells=True,
            )
            for name in names
        ),
    ]
    return [_engine(server, address, engine_metrics, environ), *found] if own else found


def _engine(server: list[str], address: str, metrics: int, environ: dict[str, str]) -> Plan:
    return Plan(
        name="engine",
        module="moltbot_server",
        arguments=("engine", *server, "--listen", address, "--metrics-port", str(metrics)),
        stage=ENGINE_STAGE,
        pause=_FIRST_PAUSE,
        longest_pause=_LONGEST_PAUSE,  # turns wait for it ten seconds
        patience=LONG_PATIENCE,
        environ=environ,
    )


def _http(settings: Settings, workspace: Workspace, core: str, *, shares_port: bool) -> list[str]:
    words = ["http", "--host", settings.host, "--port", str(settings.port), "--core", core]
    words += ["--key-file", str(workspace.key_file), "--state", str(workspace.http_state)]
    words += ["--log-level", settings.log_level, "--drain-grace", str(settings.drain_grace)]
    words += ["--log-json"] if settings.log_json else []
    words += ["--reuse-port"] if shares_port else []
    words += ["--trusted-proxy", *settings.trusted_proxies] if settings.trusted_proxies else []
    return words
