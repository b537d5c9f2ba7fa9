"""What the server is told: read once, validated at birth, handed down.

Sources, the later over the earlier: defaults, `moltbot.yaml` of the workspace, `.env` of the current folder (the five
names of `PLAIN_NAMES` only), `.env` of the workspace, the process environment, command-line flags.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from moltbot_server.config_keys import ENV_NAMES, KEYS, OTHER_NAMES, OTHERS_NAMES, PLAIN_NAMES, is_provider_key
from moltbot_server.config_models import (
    DEFAULT_ROUTE,
    Budget,
    Cache,
    Delivering,
    ModelRoute,
    Price,
    Provider,
    ProviderModel,
    Retention,
    SessionRules,
    Storage,
)
from moltbot_server.config_reading import flat, read
from moltbot_server.config_sections import route, route_problems
from moltbot_server.config_sources import (
    ConfigError,
    Given,
    Problem,
    place_of,
    places,
    read_env_file,
    read_environ,
    read_flags,
    read_yaml,
)
from moltbot_server.config_spelling import nearest, slips, unknown
from moltbot_server.config_values import unproving

__all__ = [
    "Autoscaling",
    "Budget",
    "Cache",
    "ConfigError",
    "ModelRoute",
    "Price",
    "Problem",
    "Provider",
    "ProviderModel",
    "Retention",
    "Settings",
    "Storage",
    "is_loopback",
    "load_settings",
]

INLINE = "inline"
"""The value of `engine` for models in the core's own process."""

_EVERYWHERE = frozenset({"0.0.0.0", "::", "[::]", ""})
_CONNECTION_AGE = 600.0
_LAME_DUCK = 2.0
_ADDRESS = re.compile(r"unix:.+|(dns:///)?(\[[0-9A-Fa-f:.]+\]|[^:/\[\]\s]+):\d{1,5}")
_TAKEN = frozenset({DEFAULT_ROUTE, "moltbot", "local", "builtin", "built-in"})
_NEED_NO_PATH = frozenset({"", "moltbot-demo", "builtin", "built-in", "scripted"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """How many replicas to run; `metrics` maps cpu, memory or queue_depth to a target share of 1."""

    min_replicas: int = 2
    max_replicas: int = 10
    metrics: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The server's settings. Durations are seconds, sizes bytes; a port of 0 takes any free one.

    `origins` maps a key to the place that set it, such as `.env:4`, for messages about a value that turns out wrong;
    what lies inside sections has a place too, such as `routes.careful.fallback.0`.
    `beneath` has what files and the environment, or else the default, say of the keys that a flag decided.
    `engine` is empty for models of MoltBot's own choosing, `inline`, or the address of an engine that runs elsewhere.
    `workers` are cores that share the work of this machine; as many serve HTTP unless `http_workers` says otherwise.
    `advertise` is where other nodes reach this one, `HOST:PORT`; empty: at what it is bound to, or by its name.
    `lame_duck` None: where callers have other nodes to go to, one that was told to leave goes on for a moment.
    `max_connection_age` None: where connections are shared by several cores, they end now and then; 0: never.
    `shares` are weights of workspaces: how they share a model when all of them want it; 1 for those not named.
    `models` is the route of turns that name no model, `routes` are the others; prices and budgets are in `currency`.
    `notices` tells what was asked for and is not acted on by this release, one sentence each.

    Raises:
        ConfigError: a combination is unsafe or makes no sense.
    """

    workspace: Path
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_host: str = "127.0.0.1"
    grpc_port: int = 50051
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9464
    workers: int = 1
    http_workers: int | None = None
    model_type: str = ""
    model_path: Path | None = None
    context_length: int | None = None
    threads: int | None = None
    engine: str = ""
    engine_ca: Path | None = None
    system_prompt: str = ""
    log_level: str = "info"
    log_json: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    trusted_proxies: tuple[str, ...] = ()
    max_message_bytes: int = 4 << 20
    max_inline_bytes: int = 1 << 20
    flush_interval: float = 0.02
    queue_limit: int = 256
    shares: tuple[tuple[str, int], ...] = ()
    drain_grace: float = 10.0
    lame_duck: float | None = None
    advertise: str = ""
    advertise_ca: Path | None = None
    max_connection_age: float | None = None
    max_connection_age_grace: float = 60.0
    providers: tuple[Provider, ...] = ()
    models: ModelRoute = field(default_factory=ModelRoute)
    routes: tuple[ModelRoute, ...] = ()
    cache: Cache = field(default_factory=Cache)
    store: Storage = field(default_factory=Storage)
    outbox: Delivering = field(default_factory=Delivering)
    sessions: SessionRules = field(default_factory=SessionRules)
    retention: Retention = field(default_factory=Retention)
    budgets: tuple[Budget, ...] = ()
    currency: str = "USD"
    autoscaling: Autoscaling | None = None
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    beneath: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        problems = [*self._unsafe(), *self._nonsense()]
        if problems:
            raise ConfigError(*problems)

    def origin(self, key: str) -> str:
        """Return where a key was set, such as `moltbot.yaml:3`; `the default` when nowhere."""
        return self.origins.get(key, "the default")

    @property
    def notices(self) -> tuple[str, ...]:
        """What was asked for and is not acted on by this release; to be told once at start."""
        if self.autoscaling is None:
            return ()
        return ("autoscaling: this release does not start or stop replicas by itself; the section is not used yet.",)

    @property
    def connection_age(self) -> float:
        """After how many seconds a client is asked to connect anew; 0 for never.

        Where several cores share what comes, one that has just been started would have no clients otherwise.
        """
        if self.max_connection_age is not None:
            return self.max_connection_age
        return _CONNECTION_AGE if self.workers > 1 or self.store.type == "redis" else 0.0

    @property
    def lame_duck_time(self) -> float:
        """For how many seconds a core that was told to leave still takes new turns.

        Balancers that ask for its health need them to find another node; a single one has nobody to send callers to.
        """
        if self.lame_duck is not None:
            return self.lame_duck
        return _LAME_DUCK if self.store.type == "redis" else 0.0

    @property
    def leaving_time(self) -> float:
        """Within how many seconds a core that was told to leave has ended what is under way, or handed it over."""
        return self.lame_duck_time + self.drain_grace

    def reached_at(self, port: int) -> str:
        """Return where other nodes reach this one, which listens on a port."""
        if self.advertise:
            return self.advertise
        host = socket.gethostname() if self.grpc_host in _EVERYWHERE else self.grpc_host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _unsafe(self) -> Iterator[Problem]:
        """A port that others can reach needs TLS of its own or a proxy that has it; there is no way around it."""
        for key, speaks_tls in (("grpc_host", True), ("metrics_host", True), ("host", False)):
            host = getattr(self, key)
            if is_loopback(host) or self.trusted_proxies or (speaks_tls and self.tls_cert and self.tls_key):
                continue
            way = "set `tls_cert` and `tls_key`, or " if speaks_tls else ""
            yield self._problem(
                key,
                f"{key} {host} can be reached from other machines and nothing would encrypt what passes; {way}"
                "name the proxy that ends TLS in `trusted_proxies`, or use 127.0.0.1",
            )

    def _nonsense(self) -> Iterator[Problem]:
        for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
            path = getattr(self, one)
            if path is not None and getattr(self, other) is None:
                yield self._problem(one, f"{one} is set and {other} is not; set both")
            if path is not None and not path.is_file():
                yield self._problem(one, f"{one}: there is no file {path}")
        if self.model_path is None and self.model_type.lower() not in _NEED_NO_PATH:
            yield self._problem(
                "model_type",
                f"model_type is {self.model_type!r} and no model_path says where that model is; set MODEL_PATH, "
                "or leave MODEL_TYPE out for the built-in model",
            )
        if self.engine not in ("", INLINE) and not _ADDRESS.fullmatch(self.engine):
            text = f"engine: found {self.engine!r}, expected inline, unix:PATH, HOST:PORT or dns:///HOST:PORT"
            yield self._problem("engine", text)
        if self.advertise and (self.advertise.startswith("unix:") or not _ADDRESS.fullmatch(self.advertise)):
            text = f"advertise: found {self.advertise!r}, expected HOST:PORT or dns:///HOST:PORT"
            yield self._problem("advertise", text)
        for key in ("advertise_ca", "engine_ca"):
            if (path := getattr(self, key)) is not None and (wrong := unproving(path)):
                yield self._problem(key, f"{key}: {wrong}")
        if self.max_inline_bytes >= self.max_message_bytes:
            yield self._problem("max_inline_bytes", "max_inline_bytes must be below max_message_bytes")
        if self.store.type == "memory" and self.workers > 1:
            text = (
                f"store.type is memory, which is that of one core alone, and workers is {self.workers}; choose another"
            )
            yield self._problem("store.type", text)
        scaling = self.autoscaling
        if scaling and scaling.min_replicas > scaling.max_replicas:
            text = f"autoscaling: min_replicas {scaling.min_replicas} is above max_replicas {scaling.max_replicas}"
            yield self._problem("autoscaling.min_replicas", text)
        yield from self._wrong_routes()
        if self.grpc_port and self.grpc_port == self.metrics_port:
            yield self._problem("metrics_port", same_port("metrics_port", "grpc_port", self.metrics_port))

    def _wrong_routes(self) -> Iterator[Problem]:
        place = "models.primary" if self.models.primary or not self.models.fallback else "models.fallback"
        yield from (self._problem(place, f"models: {text}") for text in route_problems(self.models))
        names = {route.name for route in self.routes}
        for name in sorted(names & _TAKEN):
            text = f"routes.{name}: this name has a meaning of its own; give the route another one"
            yield self._problem(f"routes.{name}", text)
        for one in (self.models, *self.routes):
            for model in names.intersection((one.primary, *one.fallback)):
                key, title = (f"routes.{one.name}", f"routes.{one.name}") if one.name else ("models.primary", "models")
                yield self._problem(key, f"{title}: `{model}` is a route; a route names models")

    def _problem(self, key: str, text: str) -> Problem:
        return Problem(where=place_of(self.origins, key), text=text)


def is_loopback(host: str) -> bool:
    """Return True when a bind to the host can be reached from this machine only; False when that is not certain."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# Yields a key among those given and what is wrong with it.
Check = Callable[[Mapping[str, Any]], Iterable[tuple[str, str]]]


def same_port(key: str, other: str, port: int) -> str:
    """Return what is said of two keys that give one port."""
    return f"{key} and {other} are both {port}; give each its own"


def load_settings(
    workspace: Path,
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
    *,
    current: Path | None = None,
    check: Check | None = None,
) -> Settings:
    """Return the settings of a workspace.

    `overrides` maps keys, such as `grpc_port`, to what command-line flags said; None is a flag that was not given.
    What is wrong beneath a flag is told as well: other processes read it, and the next start without the flag.
    `current` is the folder whose `.env` is read too; by default the working directory. `check` looks at the values of
    the keys that were given, for what only files can tell; what it finds is told with the rest.

    Raises:
        ConfigError: something is wrong; all of it is told, each with its place and what was expected.
    """
    problems: list[Problem] = []
    given: dict[str, Given] = dict(flat(read_yaml(workspace / "moltbot.yaml", problems), KEYS, problems))
    current = current or Path.cwd()
    if current.resolve() != workspace.resolve():
        # Other programs keep their own names in this file: only the five are ours.
        given |= _named(read_env_file(current / ".env", []).items(), PLAIN_NAMES)
    own = read_env_file(workspace / ".env", problems)
    problems += (unknown(name, place.where, ENV_NAMES) for name, place in own.items() if not _known(name))
    given |= _named(own.items(), ENV_NAMES) | _named(read_environ(environ), ENV_NAMES)
    flags = dict(read_flags(overrides or {}))
    beneath = defaults() | read({key: value for key, value in given.items() if key in flags}, KEYS, problems)
    for key, flag in flags.items():
        if key in KEYS:
            given[key] = flag
        else:
            problems.append(unknown(key, flag.where, KEYS))
    values = read(given, KEYS, problems)
    if check is not None:
        problems += (Problem(where=given[key].where, text=text) for key, text in check(values))
    settings = _settings(workspace, values, dict(places(given)), problems)
    return replace(settings, beneath={key: beneath[key] for key in flags if key in beneath})


def misspelled(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence for each `MOLTBOT_` variable of the environment that is none of ours but close to one."""
    near = ((name, nearest(name, ENV_NAMES)) for name in environ if name.startswith("MOLTBOT_") and not _known(name))
    return tuple(
        f"environment variable {name} is not known and not used; did you mean {own}?" for name, own in near if own
    )


def overlooked(workspace: Path, environ: Mapping[str, str], *, current: Path | None = None) -> tuple[str, ...]:
    """Return a sentence for each line of the current folder's `.env` that was meant for MoltBot and is not used.

    A warning and no mistake: the file belongs to other programs too. What the environment gives as well is used.

    Raises:
        ConfigError: the file cannot be read.
    """
    current = current or Path.cwd()
    if current.resolve() == workspace.resolve():
        return ()
    lines = read_env_file(current / ".env", [])
    told = ((place.where, _unused(name, workspace)) for name, place in lines.items() if name not in environ)
    return tuple(f"{where}: {name_and_why}" for where, name_and_why in told if name_and_why)


def _unused(name: str, workspace: Path) -> str:
    """Say what became of a name in the current folder's `.env`; nothing when it is used, or none of ours."""
    if name in PLAIN_NAMES or name in OTHERS_NAMES:
        return ""
    if name in ENV_NAMES or name in OTHER_NAMES:
        place = "the environment" if name in OTHER_NAMES else str(workspace / ".env")
        return f"{name} is not used: only {', '.join(PLAIN_NAMES)} are read from this file; put it into {place}"
    if name.startswith("MOLTBOT_"):
        near = nearest(name, ENV_NAMES)
        hint = f"did you mean {near}?" if near else "docs/configuration.md has all that are known"
        return f"{name} is not known and not used; {hint}"
    meant = next((own for own in PLAIN_NAMES if slips(name.upper(), own) <= (2 if len(own) > 10 else 1)), "")
    return f"{name} is not known and not used; did you mean {meant}?" if meant else ""


def _known(name: str) -> bool:
    return name in ENV_NAMES or name in OTHER_NAMES or is_provider_key(name)


def _named(variables: Iterable[tuple[str, Given]], names: Mapping[str, str]) -> dict[str, Given]:
    """Return variables by key. A blank one counts as not given; a name with the prefix wins over the plain one."""
    known = [(name, value) for name, value in variables if name in names and value.value]
    known.sort(key=lambda item: item[0].startswith("MOLTBOT_"))
    return {names[name]: value for name, value in known}


def _settings(
    workspace: Path, values: Mapping[str, Any], origins: Mapping[str, str], problems: list[Problem]
) -> Settings:
    """Make the value; when problems were found already, make it only to find those of combinations too."""
    flat = {key: value for key, value in values.items() if "." not in key}
    models = {key.removeprefix("models."): value for key, value in values.items() if key.startswith("models.")}
    scaling = _section(values, "autoscaling")
    try:
        settings = Settings(
            workspace=workspace,
            models=route(models),
            cache=Cache(**_section(values, "cache")),
            store=Storage(**_section(values, "store")),
            outbox=Delivering(**_section(values, "outbox")),
            sessions=SessionRules(**_section(values, "sessions")),
            retention=Retention(**_section(values, "retention")),
            autoscaling=Autoscaling(**scaling) if scaling else None,
            origins=origins,
            **flat,
        )
    except ConfigError as error:
        raise ConfigError(*sorted([*problems, *error.problems], key=_place)) from None
    if problems:
        raise ConfigError(*sorted(problems, key=_place))
    return settings


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key.rpartition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}


def _place(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.where.rpartition(":")
    return (file, int(line)) if line.isdecimal() else (problem.where, 0)


def defaults() -> dict[str, object]:
    """Return the default of every plain key."""
    return {item.name: item.default for item in fields(Settings) if item.name in KEYS and item.default is not MISSING}
