"""What the configuration says of models: who provides them, which routes lead to them, what they may cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Dialect = Literal["openai", "anthropic"]
DEFAULT_ROUTE = "default"
"""The name of the route of turns that name no model."""

OnFailure = Literal["restart", "continue", "stop"]
Answers = Literal["deterministic", "always", "off"]
Scope = Literal["workspace", "user", "model"]
StoreType = Literal["sqlite", "redis", "memory"]
Period = Literal["day", "month"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model costs per million tokens, in `Settings.currency`.

    Without `cached_input`, tokens that the provider had cached cost as all others.
    """

    input: float
    output: float
    cached_input: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderModel:
    """A model of a provider: `name` is ours, `id` the provider's own (empty: the same).

    0 and None leave it to the preset. Lengths are tokens; `vision`, `tools` and `reasoning` are what it can do.
    """

    name: str
    id: str = ""
    context_length: int = 0
    max_output_tokens: int = 0
    vision: bool | None = None
    tools: bool | None = None
    reasoning: bool | None = None
    price: Price | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A provider of remote models. Its keys are no part of the configuration; they lie in the vault under its name.

    An empty `preset` is the one of the provider's own name, if there is one; an empty `dialect` or `base_url` is the
    preset's. Timeouts are seconds: to connect, between two pieces of a stream, and for an answer from its request to
    its end.
    """

    name: str
    preset: str = ""
    dialect: Dialect | Literal[""] = ""
    base_url: str = ""
    models: tuple[ProviderModel, ...] = ()
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    api_version: str = ""
    connect_timeout: float = 5.0
    idle_timeout: float = 60.0
    answer_timeout: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoute:
    """Which model answers, which ones stand in, and when; the route of the key `models` has no name.

    An empty `primary` is the local model. Seconds: `latency`, after which another model is asked as well; `timeout`,
    after which a silent model is given up; `cooldown` of one that failed; `window` in which failures are counted.
    Shares of 1: `error_rate`, above which a model rests once it was asked `min_attempts` times in the window;
    `retry_budget`, how many attempts more than turns there should be. `on_failure` says what becomes of an answer that
    broke after its first word. `weights` share conversations among the models that they name; without, the order alone
    counts.
    """

    name: str = ""
    primary: str = ""
    fallback: tuple[str, ...] = ()
    latency: float = 3.0
    error_rate: float = 0.05
    timeout: float = 120.0
    cooldown: float = 10.0
    window: float = 60.0
    min_attempts: int = 10
    retry_budget: float = 0.2
    on_failure: OnFailure = "restart"
    weights: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Where answers are kept for another time, and which. `ttl` in seconds; `max_bytes` bounds what memory takes."""

    type: str = "memory"
    host: str = "127.0.0.1"
    port: int = 6379
    password: str = field(default="", repr=False)
    ttl: float = 3600.0
    max_bytes: int = 64 << 20
    answers: Answers = "deterministic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Where sessions and turns are kept: in the workspace (`sqlite`), or in a Redis that several nodes share.

    All that is not `type` is of Redis; every key there begins with the `prefix`.
    """

    type: StoreType = "sqlite"
    host: str = "127.0.0.1"
    port: int = 6379
    password: str = field(default="", repr=False)
    database: int = 0
    prefix: str = "moltbot"
    tls: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivering:
    """How answers are handed to adapters. A `lease` lasts so many seconds, an answer waits for at most `keep` seconds.

    After `max_attempts` it is a dead letter, which is kept for `keep` seconds too.
    """

    lease: float = 15.0
    max_attempts: int = 10
    keep: float = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRules:
    """What becomes of turns whose session is busy, by channel; the channel `""` stands for all others."""

    when_busy: tuple[tuple[str, str], ...] = ()

    def busy(self, channel: str) -> str:
        """Return what becomes of a turn of a channel: `queue`, `interrupt` or `join`."""
        rules = dict(self.when_busy)
        return rules.get(channel, rules.get("", "queue"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """For how many days a session is kept after its last use; 0 is for ever."""

    days: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be used in a day or a month by the workspace, by each of its users, or of a model.

    0 is no limit; at least one of both is above it. `max_cost` is in `Settings.currency`. A soft budget only warns.
    `model` is for the scope `model` alone.
    """

    scope: Scope
    model: str = ""
    period: Period
    max_tokens: int = 0
    max_cost: float = 0.0
    soft: bool = False
