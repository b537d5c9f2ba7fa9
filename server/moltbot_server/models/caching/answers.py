"""Answers kept for the next time that the same is asked, and one answer for all who ask the same at once.

What is asked is the whole prompt that the model reads, its options, the model, and the workspace. Only what a model
would say again is kept: answers to options that leave nothing to chance, or any answer where the configuration says so.
Calls of tools, pictures and files are neither kept nor shared.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from typing import Literal

import msgspec

from moltbot_server.metrics import CacheCounts
from moltbot_server.models.caching.backend import Backend, Key, MemoryBackend
from moltbot_server.models.caching.flight import Flight
from moltbot_server.models.engine import Asker, Engine, Finished, Generation, Listener
from moltbot_server.turns import (
    FinishReason,
    GenerationOptions,
    Message,
    Part,
    Role,
    Routed,
    TextPart,
    TurnInput,
    Usage,
    Value,
    encode,
)

Answers = Literal["deterministic", "always", "off"]
"""Which answers are kept: those that leave nothing to chance, all of them, or none."""

KEPT = "the answer was kept from before"
"""Why a route's model is named as the one that answers, when it was not asked."""

_WHOLE = frozenset({FinishReason.STOP, FinishReason.STOP_TEXT, FinishReason.LENGTH})
_PIECE = 512
_MOST_MODELS = 10_000
_SCRIPTED = "scripted"


class KeptAnswer(Value, frozen=True, kw_only=True, array_like=True):
    """An answer as it is kept: its text in pieces with the tokens of each, and what its end said."""

    pieces: tuple[tuple[str, int], ...]
    finish_reason: FinishReason
    usage: Usage
    model: str = ""
    reasoning: str = ""
    trimmed_messages: int = 0

    def tell(self, engine: Engine, listener: Listener) -> None:
        """Tell the answer to a listener as if the engine wrote it now."""
        if engine.is_route:
            listener.noted(Routed(kind="model", name=self.model or engine.id, reason=KEPT))
        if self.reasoning:
            listener.thought(self.reasoning)
        for text, tokens in self.pieces:
            listener.wrote(text, tokens)
        listener.ended(
            Finished(
                finish_reason=self.finish_reason,
                usage=self.usage,
                trimmed_messages=self.trimmed_messages,
                model=self.model,
                cached=True,
            )
        )


Ask = Callable[[Listener], Generation]
"""Begins an answer of an engine; raises what `Engine.begin` does."""

_decoder = msgspec.msgpack.Decoder(KeptAnswer)


class AnswerCache:
    """Stands between a turn and its engine. Belongs to the event loop's thread."""

    name = "answers"

    def __init__(
        self, backend: Backend, *, ttl: float, max_bytes: int = 0, answers: Answers = "deterministic", salt: bytes = b""
    ) -> None:
        """`ttl` in seconds and `max_bytes` are the backend's, to be told; see `renew` for `salt`."""
        self.ttl, self.max_bytes = ttl, max_bytes
        self.counts = CacheCounts()
        self._backend = backend
        self._answers = answers
        self._salt = salt
        self._flights: dict[Key, Flight] = {}
        self._editions: dict[str, tuple[Callable[[], Engine | None], int]] = {}

    @property
    def backend(self) -> str:
        """Where answers are kept: `memory` or `redis`."""
        return self._backend.kind

    @property
    def entries(self) -> int:
        """How many answers it holds; 0 when they are kept elsewhere."""
        return self._backend.entries

    @property
    def size(self) -> int:
        """What they take, in bytes; 0 when they are kept elsewhere."""
        return self._backend.size

    @property
    def failures(self) -> int:
        """How often what is kept could not be reached."""
        return self._backend.failures

    @property
    def under_way(self) -> int:
        """Answers that are being written and that others may join."""
        return len(self._flights)

    async def start(self) -> None:
        """Become ready; what is not there is done without."""
        await self._backend.start()

    async def close(self) -> None:
        """Let go of what it needs."""
        await self._backend.close()

    async def clear(self, workspace: str) -> int:
        """Forget the answers of a workspace and return how many that were.

        Raises:
            StorageUnavailable: what is kept cannot be reached.
        """
        return await self._backend.clear(workspace)

    def renew(self, salt: bytes) -> None:
        """Forget all answers in this process, and those of others that have another salt.

        A digest of what decides who answers, such as the routes: when that changes, what was kept counts no more.
        """
        self._salt = salt
        if isinstance(self._backend, MemoryBackend):
            self._backend.forget_all()

    # --- a turn ------------------------------------------------------------------------------------------------------

    def begin(
        self,
        engine: Engine,
        messages: Sequence[Message],
        turn: TurnInput,
        workspace: str,
        listener: Listener,
        asker: Asker,
    ) -> Generation:
        """Begin an answer as `Engine.begin` does, unless it is kept, or being written for somebody else.

        Raises:
            MoltBotError: what `Engine.begin` raises; where what is kept has to be waited for, the listener hears it.
        """
        options = turn.options
        # With a deadline of its own an answer may be cut where others want to hear more; one begun belongs to its turn.
        if asker.deadline is not None or messages[-1].role is Role.ASSISTANT or not self._may_keep(engine, options):
            return engine.begin(messages, options, listener, asker)
        key = self._key(engine, messages, options, workspace)
        if key is None:
            return engine.begin(messages, options, listener, asker)
        flight = self._flights.get(key)
        if flight is not None:
            self.counts.joined += 1
            return flight.join(listener)
        found = self._backend.find(key)
        looked = found if isinstance(found, asyncio.Future) else None
        if not isinstance(found, asyncio.Future) and (kept := _read(found)) is not None:
            self.counts.hits += 1
            kept.tell(engine, listener)
            return _TOLD
        flight = self._flights[key] = Flight(partial(self._landed, key), partial(self._given_up, key))
        seat = flight.join(listener)
        ask = partial(_ask, engine, messages, options, asker)
        if looked is not None:
            looked.add_done_callback(partial(self._looked_up, flight, engine, ask))
            return seat
        try:
            self._set_out(flight, ask)
        except BaseException:
            del self._flights[key]
            raise
        return seat

    def _may_keep(self, engine: Engine, options: GenerationOptions) -> bool:
        """Tell whether the answer would be the same another time, or counts as if it were."""
        if self._answers == "off" or options.tools:
            return False
        if self._answers == "always":
            return True
        if engine.type == _SCRIPTED:
            return False  # it stands in for a model in tests and benchmarks, where each call is wanted
        if options.temperature is None:
            return getattr(engine, "greedy", False) is True
        return options.temperature == 0

    def _key(
        self, engine: Engine, messages: Sequence[Message], options: GenerationOptions, workspace: str
    ) -> Key | None:
        """Return the key of what is asked, or None for what holds more than text."""
        asked: list[tuple[Role, tuple[Part, ...]]] = []
        for message in messages:
            parts = message.parts
            for part in parts:
                if type(part) is not TextPart:
                    return None
            asked.append((message.role, parts))
        # What tells a model from another one of its name, here and, as far as that can be, on other machines.
        model = (engine.id, self._edition(engine), engine.type, engine.memory_bytes, engine.capabilities.context_length)
        content = encode((self._salt, model, options, asked))
        return workspace, blake2b(content, digest_size=16).digest()

    def _edition(self, engine: Engine) -> int:
        """Return which engine of its id this is: one that was loaded anew has not said what the one before did."""
        known, number = self._editions.get(engine.id, (_nobody, -1))
        if known() is not engine:
            number += 1
            if len(self._editions) >= _MOST_MODELS:
                self._editions.clear()
            self._editions[engine.id] = (weakref.ref(engine), number)
        return number

    def _looked_up(self, flight: Flight, engine: Engine, ask: Ask, looked: asyncio.Future[bytes | None]) -> None:
        """Go on with what the lookup found, for all who came meanwhile."""
        if flight.over:
            return
        try:
            if (kept := _read(looked.result())) is not None:
                self.counts.hits += 1
                kept.tell(engine, flight)
            else:
                self._set_out(flight, ask)
        except Exception as problem:
            flight.ended(problem)

    def _set_out(self, flight: Flight, ask: Ask) -> None:
        self.counts.misses += 1
        generation = ask(flight)
        if not flight.over:
            flight.generation = generation

    def _landed(self, key: Key, flight: Flight, end: Finished | Exception) -> None:
        """Let later ones start anew, and keep the answer if it is one that stands."""
        self._flights.pop(key, None)
        if not isinstance(end, Finished) or end.cached or not flight.pieces:
            return
        # A cache must not make a failure last longer: what another model than the first one said is not kept.
        stood_in = bool(end.attempts) and end.attempts[0].outcome != "ANSWERED"
        if end.finish_reason not in _WHOLE or end.attachments or stood_in:
            return
        kept = KeptAnswer(
            pieces=_joined(flight.pieces),
            finish_reason=end.finish_reason,
            usage=end.usage,
            model=end.model,
            reasoning="".join(flight.thoughts),
            trimmed_messages=end.trimmed_messages,
        )
        self._backend.put(key, encode(kept))

    def _given_up(self, key: Key, flight: Flight) -> None:
        self._flights.pop(key, None)


def _ask(
    engine: Engine, messages: Sequence[Message], options: GenerationOptions, asker: Asker, listener: Listener
) -> Generation:
    return engine.begin(messages, options, listener, asker)


def _nobody() -> None:
    """Stand for an engine that is gone."""


class _Told:
    """An answer that was told at once: there is nothing left to stop."""

    def stop(self) -> None:
        """Do nothing."""


_TOLD = _Told()


def _read(kept: bytes | None) -> KeptAnswer | None:
    """Return an answer as it was kept; what cannot be read, of another release perhaps, is as good as none."""
    if kept is None:
        return None
    try:
        return _decoder.decode(kept)
    except msgspec.DecodeError:
        return None


def _joined(pieces: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Return the pieces of an answer, small ones joined."""
    joined: list[tuple[str, int]] = []
    texts: list[str] = []
    length = count = 0
    for text, tokens in pieces:
        texts.append(text)
        length += len(text)
        count += tokens
        if length >= _PIECE:
            joined.append(("".join(texts), count))
            texts, length, count = [], 0, 0
    if texts:
        joined.append(("".join(texts), count))
    return tuple(joined)
