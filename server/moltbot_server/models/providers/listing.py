"""What a provider says of its models by itself: how much they read, where nobody else has said so.

Servers of one's own tell it in the list of their models, each by a name of its own: vLLM, OpenRouter, Groq, Mistral,
LM Studio and others. OpenAI's list has nothing of the kind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from moltbot_server.models.providers.connection import Connection
from moltbot_server.models.providers.http_body import Head
from moltbot_server.models.providers.pool import Pool, Unreachable

_WITHIN = 10.0  # seconds
_LARGEST = 8 << 20  # bytes; OpenRouter's list has 1 MB
_LEAST, _MOST = 256, 100_000_000


class NotTold(Exception):
    """A provider has no list of its models to be had now; the text says why, with no address and no key in it."""


class _Model(msgspec.Struct):
    id: object = None
    max_model_len: object = None
    context_length: object = None
    context_window: object = None
    max_context_length: object = None

    def reads(self) -> int:
        """Return the context length, 0 where it is not told or cannot be."""
        told = (self.max_model_len, self.context_length, self.context_window, self.max_context_length)
        return next((each for each in told if type(each) is int and _LEAST <= each <= _MOST), 0)


class _List(msgspec.Struct):
    data: list[_Model]


async def context_lengths(pool: Pool, request: bytes) -> Mapping[str, int]:
    """Ask for the list of models with a whole request, and return how many tokens each reads that says so.

    Raises:
        NotTold: there is no list, or none that can be read.
    """
    try:
        async with asyncio.timeout(_WITHIN):
            connection = await pool.connect(_WITHIN)
            body = await _asked(connection, request)
    except Unreachable as problem:
        raise NotTold(str(problem)) from None
    except TimeoutError:
        raise NotTold(f"it took longer than {_WITHIN:g} s") from None
    return lengths_in(body)


def lengths_in(body: bytes) -> Mapping[str, int]:
    """Return the context lengths that a list of models tells, by the provider's names of them.

    Raises:
        NotTold: it is no list of models.
    """
    try:
        listed = msgspec.json.decode(body, type=_List).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise NotTold("it is no list of models") from None
    return {model.id: reads for model in listed if isinstance(model.id, str) and (reads := model.reads())}


async def _asked(connection: Connection, request: bytes) -> bytes:
    hearer = _Hearer()
    connection.ask(request, hearer)
    try:
        return await hearer.whole
    except BaseException:
        connection.abort()
        raise


class _Hearer:
    """Hears a response to its end; `whole` is its body, or NotTold."""

    def __init__(self) -> None:
        self.whole: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._body = bytearray()

    def opened(self, head: Head) -> None:
        """Hear of the head."""
        if head.status != 200:
            self._end(NotTold(f"it answered {head.status}"))

    def received(self, data: bytes, last: bool) -> None:
        """Hear more of the body."""
        self._body += data
        if len(self._body) > _LARGEST:
            self._end(NotTold("its list has no end"))
        elif last:
            self._end(bytes(self._body))

    def lost(self, problem: str, unheard: bool) -> None:
        """Hear that the connection broke."""
        self._end(NotTold(problem))

    def _end(self, outcome: bytes | NotTold) -> None:
        if self.whole.done():
            return
        if isinstance(outcome, NotTold):
            self.whole.set_exception(outcome)
        else:
            self.whole.set_result(outcome)
