"""What is known of providers and their models (presets.yaml), and what holds of one model of one provider."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit

import msgspec

from moltbot_server.config import is_loopback
from moltbot_server.config_models import Price, Provider, ProviderModel
from moltbot_server.errors import InvalidConfiguration
from moltbot_server.turns import Value

_FILE = Path(__file__).with_name("presets.yaml")
_OPENAI_OPTIONS: Mapping[str, str | None] = {
    "max_output_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop",
    "seed": "seed",
}
_ANTHROPIC_OPTIONS: Mapping[str, str | None] = {
    "max_output_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "stop": "stop_sequences",
}
_SAMPLING: Mapping[str, str | None] = {"temperature": None, "top_p": None, "top_k": None}
_NO_SAMPLING_SINCE = "2026-10-21"  # version of Anthropic's interface
_CONTEXT = 32_768  # of a model of which nothing is known
_OUTPUT = 4096
_LOCAL = (".local", ".lan", ".internal", ".localdomain", ".home.arpa", ".svc", ".test")


class Facts(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a model; 0 and None are not known. `options` replaces what the provider calls some of ours."""

    context_length: int = 0
    max_output_tokens: int = 0
    vision: bool | None = None
    tools: bool | None = None
    reasoning: bool | None = None
    forced_tools: bool | None = None
    strict_tools: bool | None = None
    price: tuple[float, ...] | None = None
    options: Mapping[str, str | None] = {}


class Preset(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a provider; presets.yaml explains the fields."""

    title: str
    dialect: Literal["openai", "anthropic"] = "openai"
    base_url: str = ""
    path: str = ""
    versioned_path: str = ""
    key_header: str = ""
    key_env: tuple[str, ...] = ()
    needs_key: bool = True
    patterns: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, str | None] = {}
    max_stops: int = 8
    max_temperature: float = 2.0
    asks_usage: bool = True
    default: Facts = Facts()
    models: Mapping[str, Facts] = {}

    def serves(self, model: str) -> bool:
        """Tell whether a model of this name is taken for this provider's."""
        return any(fnmatchcase(model, pattern) for pattern in self.patterns)

    def own_name(self, model: str) -> str:
        """Return what the provider calls a model."""
        for pattern, name in self.rename:
            if found := re.fullmatch(pattern, model):
                return found.expand(name)
        return model

    def facts(self, model: str) -> Facts:
        """Return what is known of a model, by the provider's own name of it."""
        name = model.rpartition("/")[2]
        return next((facts for pattern, facts in self.models.items() if fnmatchcase(name, pattern)), self.default)


class Terms(Value, frozen=True, kw_only=True):
    """What holds of one model of one provider: where and how it is asked, and what it can do."""

    provider: str
    title: str
    model: str
    id: str
    dialect: Literal["openai", "anthropic"]
    url: str
    key_header: str
    needs_key: bool
    headers: tuple[tuple[str, str], ...]
    api_version: str
    options: Mapping[str, str | None]
    max_stops: int
    max_temperature: float
    asks_usage: bool
    context_length: int
    context_known: bool
    max_output_tokens: int
    vision: bool
    tools: bool
    forced_tools: bool
    strict_tools: bool
    reasoning: bool
    price: Price | None

    def __repr__(self) -> str:
        # What the configuration sends along in `headers` may be a secret.
        return f"Terms(provider={self.provider!r}, model={self.model!r}, id={self.id!r}, url={self.url!r})"

    def takes(self, option: str) -> bool:
        """Tell whether the model honours one of our options."""
        return self.options.get(option) is not None


@lru_cache(maxsize=1)
def presets() -> Mapping[str, Preset]:
    """Return all presets by name, in the order in which their patterns are tried."""
    return msgspec.yaml.decode(_FILE.read_bytes(), type=dict[str, Preset])


def preset_of(provider: Provider) -> Preset | None:
    """Return the preset of a provider: the one that it names, or that has its name; None when there is none.

    Raises:
        InvalidConfiguration: it names one that is not there.
    """
    if provider.preset and provider.preset not in presets():
        known = ", ".join(sorted(presets()))
        raise InvalidConfiguration(
            f"providers.{provider.name}.preset: there is no {provider.preset!r}; known: {known}."
        )
    return presets().get(provider.preset or provider.name)


def terms(provider: Provider, model: ProviderModel) -> Terms:
    """Return what holds of a model: what the configuration says, else what the preset knows, else what is usual.

    Raises:
        InvalidConfiguration: the provider has no address, or one that must not be used.
    """
    found = preset_of(provider)
    preset = found or Preset(title=provider.name, needs_key=False)
    own = preset.own_name(model.id or model.name)
    facts = preset.facts(own)
    dialect = provider.dialect or preset.dialect
    usual = _OPENAI_OPTIONS if dialect == "openai" else _ANTHROPIC_OPTIONS
    late = _SAMPLING if dialect == "anthropic" and provider.api_version >= _NO_SAMPLING_SINCE else {}
    known = {"vision": facts.vision, "tools": facts.tools, "reasoning": facts.reasoning}
    can = {name: value if (value := getattr(model, name)) is not None else known[name] for name in known}
    default = preset.default
    return Terms(
        provider=provider.name,
        # Somebody else's address speaks as the preset does, and is not the company that the preset is named for.
        title=provider.name if provider.preset and provider.base_url else preset.title,
        model=model.name,
        id=own,
        dialect=dialect,
        url=_url(provider, preset, dialect, own),
        key_header=(preset.key_header if dialect == preset.dialect else "")
        or ("authorization" if dialect == "openai" else "x-api-key"),
        needs_key=preset.needs_key and not provider.base_url,
        headers=provider.headers,
        api_version=provider.api_version,
        options={**usual, **(preset.options if dialect == preset.dialect else {}), **facts.options, **late},
        max_stops=preset.max_stops,
        max_temperature=1.0 if dialect == "anthropic" else preset.max_temperature,
        asks_usage=preset.asks_usage,
        context_length=model.context_length or facts.context_length or default.context_length or _CONTEXT,
        context_known=bool(model.context_length or (facts is not default and facts.context_length)),
        max_output_tokens=model.max_output_tokens or facts.max_output_tokens or default.max_output_tokens or _OUTPUT,
        vision=can["vision"] if can["vision"] is not None else bool(default.vision),
        tools=can["tools"] is not False,
        forced_tools=facts.forced_tools is not False,
        strict_tools=dialect == preset.dialect and bool(default.strict_tools or facts.strict_tools),
        reasoning=bool(can["reasoning"]),
        price=model.price or _price(facts),
    )


def _price(facts: Facts) -> Price | None:
    if facts.price is None:
        return None
    return Price(input=facts.price[0], output=facts.price[1], cached_input=facts.price[2] if facts.price[2:] else None)


def _url(provider: Provider, preset: Preset, dialect: str, model: str) -> str:
    where = f"providers.{provider.name}.base_url"
    base = (provider.base_url or preset.base_url).rstrip("/")
    if not base:
        raise InvalidConfiguration(f"{where}: say where the provider is, such as https://host/v1.")
    try:
        parts = urlsplit(base)
        port = parts.port
    except ValueError:
        raise InvalidConfiguration(f"{where}: this is no address of the web.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or re.search(r"[\s\x00-\x1f]", base):
        raise InvalidConfiguration(f"{where}: expected https://HOST or http://HOST, with a path if there is one.")
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidConfiguration(f"{where}: leave out names, keys and anything after a question mark.")
    if parts.scheme == "http" and not _is_near(parts.hostname):
        raise InvalidConfiguration(
            f"{where}: {parts.hostname} is not of your own network; use https, so that keys and texts are encrypted."
        )
    path = preset.path if dialect == preset.dialect else ""
    if preset.versioned_path and provider.api_version:
        path = preset.versioned_path.format(model=quote(model, safe=""), version=quote(provider.api_version, safe=""))
    if not path:
        path = "/chat/completions" if dialect == "openai" else "/messages"
        if base.endswith(path):
            return base
        # Anthropic's clients leave the version out of the address; of the others, an address without any path lacks it.
        if not parts.path or (dialect == "anthropic" and not parts.path.endswith("/v1")):
            path = f"/v1{path}"
    return f"{base}{path}"


def _is_near(host: str) -> bool:
    """Tell whether a host is this machine or of a network of one's own, as far as its name tells."""
    if is_loopback(host) or ("." not in host.strip("[]").rstrip(".") and ":" not in host) or host.endswith(_LOCAL):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_private
    except ValueError:
        return False


def named(provider: str) -> Provider | None:
    """Return the provider that a preset's name alone stands for; None when there is no such preset."""
    return Provider(name=provider, preset=provider) if provider in presets() else None


def renamed(model: ProviderModel, name: str) -> ProviderModel:
    """Return the same model under another name of ours."""
    return replace(model, name=name, id=model.id or model.name)
