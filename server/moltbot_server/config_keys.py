"""Every key of the configuration: its place in YAML, what it accepts, and the names it has in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping

from moltbot_server.config_reading import sections_of
from moltbot_server.config_sections import BUDGETS, PROVIDERS, ROUTE_KEYS, ROUTES, WHEN_BUSY
from moltbot_server.config_values import (
    HOST,
    NETWORK,
    PATH,
    PERCENT,
    PORT,
    TRUTH,
    Kind,
    choice,
    duration,
    records,
    several,
    shaped,
    size,
    text,
    whole,
)

# A dot leads into a section of the YAML file.
KEYS: Mapping[str, Kind] = {
    "host": HOST,
    "port": PORT,
    "grpc_host": HOST,
    "grpc_port": PORT,
    "metrics_host": HOST,
    "metrics_port": PORT,
    "workers": whole(1, 64),
    "http_workers": whole(1, 64),
    "model_type": text(64),
    "model_path": PATH,
    "context_length": whole(16, 1 << 24, "a number of tokens"),
    "threads": whole(1, 1024),
    "engine": text(256),
    "engine_ca": PATH,
    "advertise": text(256),
    "advertise_ca": PATH,
    "system_prompt": text(32_000),
    "log_level": choice("debug", "info", "warning", "error"),
    "log_json": TRUTH,
    "tls_cert": PATH,
    "tls_key": PATH,
    "trusted_proxies": several(NETWORK),
    "max_message_bytes": size(64 << 10, 64 << 20),
    "max_inline_bytes": size(1 << 10, 32 << 20),
    "flush_interval": duration(0, 5),
    "queue_limit": whole(1, 1_000_000),
    "shares": records({"workspace": text(64, blank=False), "weight": whole(1, 1000)}),
    "drain_grace": duration(0, 3600),
    "lame_duck": duration(0, 300),
    "max_connection_age": duration(1, 7 * 86400, never=True),
    "max_connection_age_grace": duration(0, 3600),
    "providers": PROVIDERS,
    **{f"models.{key}": kind for key, kind in ROUTE_KEYS.items()},
    "routes": ROUTES,
    "cache.type": choice("memory", "redis"),
    "cache.host": HOST,
    "cache.port": whole(1, 65535, "a port"),
    "cache.password": text(512, secret=True),
    "cache.ttl": duration(0, 365 * 86400),
    "cache.max_bytes": size(64 << 10, 1 << 40),
    "cache.answers": choice("deterministic", "always", "off"),
    "store.type": choice("sqlite", "redis", "memory"),
    "store.host": HOST,
    "store.port": whole(1, 65535, "a port"),
    "store.password": text(512, secret=True),
    "store.database": whole(0, 1_000_000, "the number of a database"),
    "store.prefix": shaped("[A-Za-z0-9._-]{1,64}", "1 to 64 of A-Z a-z 0-9 . _ -"),
    "store.tls": TRUTH,
    "outbox.lease": duration(1, 600),
    "outbox.max_attempts": whole(1, 1000),
    "outbox.keep": duration(60, 365 * 86400),
    "sessions.when_busy": WHEN_BUSY,
    "retention.days": whole(0, 36_500, "a number of days, 0 for ever,"),
    "budgets": BUDGETS,
    "currency": shaped("[A-Z]{3}", "three capitals such as USD or CNY"),
    "autoscaling.min_replicas": whole(1, 10_000),
    "autoscaling.max_replicas": whole(1, 10_000),
    "autoscaling.metrics": records({"type": choice("cpu", "memory", "queue_depth"), "target": PERCENT}),
}

SECTIONS = sections_of(KEYS)

# The names that work without the prefix MOLTBOT_, in the environment and in environment files.
PLAIN_NAMES: Mapping[str, str] = {
    "PORT": "port",
    "WORKERS": "workers",
    "MODEL_TYPE": "model_type",
    "MODEL_PATH": "model_path",
    "CONTEXT_LENGTH": "context_length",
}

ENV_NAMES: Mapping[str, str] = {
    **PLAIN_NAMES,
    **{"MOLTBOT_" + key.upper().replace(".", "_"): key for key, kind in KEYS.items() if kind.flat},
}

# Names of other programs that are one slip away from a plain name of ours.
OTHERS_NAMES = frozenset({"PORTS", "POST", "WORKER"})

# Variables of MoltBot that are no settings of the server.
OTHER_NAMES = frozenset(
    {
        "MOLTBOT_WORKSPACE",
        "MOLTBOT_KEY",
        "MOLTBOT_ADDRESS",
        "MOLTBOT_HUB",
        "MOLTBOT_HUB_TOKEN",
        "MOLTBOT_FIRST_TUNING",
        "MOLTBOT_VAULT_KEY",
        "MOLTBOT_VAULT_KEY_FILE",
        "MOLTBOT_VAULT_KEY_NEW",
        "MOLTBOT_PROVIDER_ENV",
    }
)

# Variables that the core alone has to know.
SECRET_NAMES = frozenset(
    {"MOLTBOT_VAULT_KEY", "MOLTBOT_VAULT_KEY_NEW", "MOLTBOT_CACHE_PASSWORD", "MOLTBOT_STORE_PASSWORD"}
)

_PROVIDER_KEY = re.compile(r"[A-Z][A-Z0-9_]*_API_KEY")


def is_provider_key(name: str) -> bool:
    """Return whether people give a provider's key by this name, such as OPENAI_API_KEY."""
    return bool(_PROVIDER_KEY.fullmatch(name))
