"""How a model is asked: the head of its requests, ready for each key, and the dialect of their bodies."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NamedTuple
from urllib.parse import urlsplit

from moltbot_server.errors import InvalidConfiguration
from moltbot_server.models.engine import Listener
from moltbot_server.models.providers import anthropic_request, openai_request
from moltbot_server.models.providers.anthropic_reading import AnthropicReading
from moltbot_server.models.providers.drafts import Reading
from moltbot_server.models.providers.keys import ProviderKey
from moltbot_server.models.providers.openai_reading import OpenAIReading
from moltbot_server.models.providers.pool import Origin, proxy_for, proxy_headers
from moltbot_server.models.providers.presets import Terms
from moltbot_server.turns import GenerationOptions, Message, Tool

_CHAT = "/chat/completions"
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_OURS = frozenset({"host", "content-length", "transfer-encoding", "connection", "content-type", "accept-encoding"})


class Dialect(NamedTuple):
    """A dialect: how a request is written and how its answer is read."""

    request: Callable[[Terms, Sequence[Message], GenerationOptions], bytes]
    reading: Callable[[Listener, Sequence[Tool], bool], Reading]


DIALECTS = {
    "openai": Dialect(
        openai_request.request, lambda listener, tools, inline: OpenAIReading(listener, tools, inline_thoughts=inline)
    ),
    "anthropic": Dialect(
        anthropic_request.request,
        lambda listener, tools, inline: AnthropicReading(listener, tools, inline_thoughts=inline),
    ),
}


class Heads:
    """The heads of the requests to one model: all of them but the length of the body is written once for each key."""

    def __init__(self, terms: Terms) -> None:
        """Write what all requests have in common.

        Raises:
            InvalidConfiguration: a header of the configuration is none.
        """
        _check(terms)
        parts = urlsplit(terms.url)
        origin = Origin.of(parts)
        proxy = None if origin.tls else proxy_for(origin)
        before = f"{parts.scheme}://{parts.netloc}" if proxy is not None else ""  # without a tunnel: the whole address
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        shared = [
            f"Host: {parts.netloc}",
            "Accept-Encoding: identity",
            *(proxy_headers(proxy) if proxy is not None else ()),
        ]
        given = {name.lower(): (name, value) for name, value in terms.headers}
        usual = {"user-agent": ("User-Agent", f"moltbot/{_version()}")}
        if terms.dialect == "anthropic":
            usual["anthropic-version"] = ("anthropic-version", terms.api_version or anthropic_request.VERSION)
        shared += [f"{name}: {value}" for name, value in (usual | given).values()]
        self._key_header = "" if terms.key_header in given else terms.key_header
        wants = ("Content-Type: application/json", "Accept: text/event-stream")
        self._common = "\r\n".join((f"POST {before}{target} HTTP/1.1", *shared, *wants)).encode("latin-1")
        self._heads: dict[str, bytes] = {}
        path = "" if parts.query or terms.dialect != "openai" else parts.path.removesuffix(_CHAT)
        looking = (f"GET {before}{path}/models HTTP/1.1", *shared, "Accept: application/json")
        self._look = "\r\n".join(looking).encode("latin-1") if path and path != parts.path else b""

    @property
    def has_list(self) -> bool:
        """Whether the provider may have a list of its models: those of the OpenAI dialect do."""
        return bool(self._look)

    def look(self, key: ProviderKey) -> bytes:
        """Return the whole request for the list of the provider's models."""
        return self._look + self._opening(key) + b"\r\n\r\n"

    def head(self, key: ProviderKey, length: int) -> bytes:
        """Return the head of a request with a body of so many bytes; a key without a text is none."""
        head = self._heads.get(key.text)
        if head is None:
            if len(self._heads) >= 256:  # keys that were replaced long ago
                self._heads.clear()
            head = self._heads[key.text] = self._common + self._opening(key) + b"\r\nContent-Length: "
        return b"%b%d\r\n\r\n" % (head, length)

    def _opening(self, key: ProviderKey) -> bytes:
        if not key.text or not self._key_header:
            return b""
        # A line break in a key would be a header of its own; such a key is none and the provider will say so.
        text = "".join(key.text.split())
        scheme = "Bearer " if self._key_header == "authorization" else ""
        return f"\r\n{self._key_header}: {scheme}{text}".encode("latin-1", "replace")


def _check(terms: Terms) -> None:
    for name, value in terms.headers:
        where = f"providers.{terms.provider}.headers"
        if not _NAME.fullmatch(name) or name.lower() in _OURS:
            raise InvalidConfiguration(f"{where}: {name!r} is no header that can be set here.")
        if not value.isascii() or not value.isprintable():
            raise InvalidConfiguration(f"{where}: the value of {name} has to be printable ASCII.")


def _version() -> str:
    try:
        return metadata.version("moltbot")
    except metadata.PackageNotFoundError:
        return "0"
