"""One answer of a remote model on its way: asked for, read, told; with another key where one is refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

import msgspec

from moltbot_server.config_models import Provider
from moltbot_server.errors import ModelCredential, ModelUnavailable, MoltBotError, QueueFull
from moltbot_server.models.engine import Finished, Listener
from moltbot_server.models.providers.calls import Dialect
from moltbot_server.models.providers.connection import Connection
from moltbot_server.models.providers.cooldowns import Cause, Cooldowns, Place
from moltbot_server.models.providers.drafts import Refused
from moltbot_server.models.providers.events import Broken, EventLines
from moltbot_server.models.providers.http_body import Head
from moltbot_server.models.providers.keys import ProviderKey
from moltbot_server.models.providers.pool import Pool, Unreachable
from moltbot_server.models.providers.presets import Terms
from moltbot_server.models.providers.refusals import Refusal, refusal, refusal_in_stream
from moltbot_server.models.providers.withholding import Withholding
from moltbot_server.turns import FinishReason, GenerationOptions, Part, ToolCallPart, Usage

log = logging.getLogger(__name__)

_LARGEST_REFUSAL = 64 << 10
_LARGEST_BODY = 128 << 20
_REFUSAL_WITHIN = 5.0  # seconds that the text of a refusal may take; the status alone says most
_NOTHING = Usage()
_SOON = 0.001  # seconds


class Asked(Protocol):
    """What an answer needs of the model that is asked."""

    terms: Terms
    provider: Provider
    dialect: Dialect
    cooldowns: Cooldowns
    whole: Place

    @property
    def pool(self) -> Pool:
        """Where connections come from; raises ModelUnavailable when there are none any more."""

    @property
    def rest(self) -> float:
        """Seconds until one of its keys may be used again."""

    def place(self, key: ProviderKey) -> Place:
        """Return what rests when a key is refused."""

    def next_key(self, tried: Sequence[str]) -> ProviderKey | None:
        """Return a key that may be used now and was not tried."""

    def head(self, key: ProviderKey, length: int) -> bytes:
        """Return the head of a request."""

    def keys(self) -> list[str]:
        """Return the keys of the provider, of which no answer is to hold any."""

    def secrets(self) -> list[str]:
        """Return everything that must not be told."""

    def keyless(self) -> ModelCredential:
        """Return the refusal of a provider that was given no key and wants one."""

    def worked(self, key: ProviderKey) -> None:
        """Take note that the model speaks to whoever has this key."""

    def failed(self, error: MoltBotError, problem: str) -> None:
        """Take note of the error that an answer ended with; `problem` is what the log may have of it."""

    def over(self, answer: ProviderAnswer) -> None:
        """Let an answer go."""


class ProviderAnswer:
    """An answer that is asked for and read; a `Generation` and the hearer of its connection."""

    __slots__ = (
        "_again",
        "_asked",
        "_begun",
        "_body",
        "_collected",
        "_connection",
        "_ear",
        "_events",
        "_first",
        "_head",
        "_heard",
        "_key",
        "_listener",
        "_loop",
        "_model",
        "_most",
        "_over",
        "_reading",
        "_size",
        "_task",
        "_timer",
        "_tools",
        "_tried",
        "_worst",
    )

    def __init__(
        self,
        model: Asked,
        key: ProviderKey,
        body: bytes,
        options: GenerationOptions,
        listener: Listener,
    ) -> None:
        """Take the body of a request that was made with `options`."""
        self._loop = asyncio.get_running_loop()
        self._model = model
        self._key = key
        self._body = body
        self._tools = options.tools
        self._most = options.max_output_tokens
        self._listener = listener
        self._tried: list[str] = []
        self._worst: MoltBotError | None = None
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._over = self._again = False
        self._asked = self._heard = self._loop.time()
        self._begun = perf_counter()
        self._first = 0.0
        self._renew()

    def begin(self) -> None:
        """Ask, over a connection that is there or over a new one."""
        connection = self._model.pool.take()
        if connection is None:
            self._connect()
        else:
            self._send(connection)

    def stop(self) -> None:
        """Close the connection at once; the listener hears no more."""
        if not self._over:
            self._leave()
            if self._connection is not None:
                self._connection.abort()

    def fail(self, error: MoltBotError, *, quotes: bool = False) -> None:
        """End with an error; the connection is closed, because nobody knows what is still to come on it.

        One that `quotes` has words of the provider behind its colon, which may repeat what it was asked.
        """
        if self._over:
            return
        self._ear.let_go()
        if not self._over:
            self.stop()
            self._model.failed(error, error.message.partition(": ")[0] if quotes else error.message)
            self._listener.ended(error)

    # --- ask ---------------------------------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Begin to read anew."""
        terms = self._model.terms
        self._ear = Withholding(self._listener, self._model.keys())
        self._reading = self._model.dialect.reading(self._ear, self._tools, terms.reasoning)
        self._events = EventLines()
        self._head: Head | None = None
        self._collected: bytearray | None = None
        self._size = 0

    def _connect(self) -> None:
        self._task = self._loop.create_task(self._connected(self._model.pool))
        self._task.add_done_callback(self._task_over)

    async def _connected(self, pool: Pool) -> None:
        try:
            connection = await pool.connect(self._model.provider.connect_timeout)
        except Unreachable as problem:
            self.fail(ModelUnavailable(f"{self._model.terms.title} cannot answer: {problem}."))
        else:
            self._send(connection)

    def _task_over(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.error("a connection could not be made", exc_info=problem)
            self.fail(ModelUnavailable(f"{self._model.terms.title} cannot be asked; the log says why."))

    def _send(self, connection: Connection) -> None:
        self._connection = connection
        self._heard = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(min(self._model.provider.idle_timeout, self._left()), self._look)
        connection.ask(self._model.head(self._key, len(self._body)) + self._body, self)

    def _look(self) -> None:
        """Give up when nothing has come for too long, or no end; else look again when it might be so."""
        provider, whole = self._model.provider, self._left()
        left = self._heard + provider.idle_timeout - self._loop.time()
        if whole <= _SOON:
            text = f"did not come to an end within {provider.answer_timeout:g} s"
            self.fail(ModelUnavailable(f"{self._model.terms.title} {text}."))
        elif left > _SOON:
            self._timer = self._loop.call_later(min(left, whole), self._look)
        else:
            self.fail(ModelUnavailable(f"{self._model.terms.title} sent nothing for {provider.idle_timeout:g} s."))

    def _left(self) -> float:
        """Return how many seconds the answer may still take."""
        return self._asked + self._model.provider.answer_timeout - self._loop.time()

    # --- hear: the connection calls these ----------------------------------------------------------------------------

    def opened(self, head: Head) -> None:
        """Hear of the head of the response."""
        self._head = head
        self._heard = self._loop.time()
        kind = head.headers.get("content-type", "").lower()
        if head.status == 200 and "application/json" not in kind:
            if "text/html" in kind:
                text = "answered with a page for people; correct `base_url`, or look for a sign-in page of the network"
                self.fail(ModelUnavailable(f"{self._model.terms.title} {text}."))
            elif head.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
                self.fail(
                    ModelUnavailable(f"{self._model.terms.title} packs its answers although it was not asked to.")
                )
            return
        self._collected = bytearray()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(_REFUSAL_WITHIN, self._conclude_refusal)

    def received(self, data: bytes, last: bool) -> None:
        """Hear more of the body."""
        if last:
            self._connection = None
        if self._over:
            return
        self._heard = self._loop.time()
        if self._collected is not None:
            self._collected += data
            if last or len(self._collected) > _LARGEST_REFUSAL:
                self._conclude_refusal()
            return
        try:
            complete = self._read(data, last)
        except Broken as problem:
            self.fail(ModelUnavailable(f"{self._model.terms.title} cannot be understood: {problem}."))
        except Refused as problem:
            terms = self._model.terms
            self._refused(refusal_in_stream(terms.title, terms.model, problem.found, self._model.secrets()))
        else:
            if complete:
                self._complete()
            elif self._most is not None and self._reading.draft.exceeds(self._most):
                self._end(FinishReason.LENGTH, Usage(output_tokens=self._reading.draft.written))
            elif last:
                self.fail(ModelUnavailable(f"{self._model.terms.title} broke off: {self._reading.missing()}."))

    def lost(self, problem: str, unheard: bool) -> None:
        """Hear that the connection broke. One that was closed while it lay idle is no fault: a new one is made."""
        self._connection = None
        if self._over:
            return
        if self._collected is not None:
            self._conclude_refusal()
        elif unheard and not self._again:
            self._again = True
            self._connect()
        else:
            self.fail(ModelUnavailable(f"{self._model.terms.title} broke off: {problem}."))

    def _read(self, data: bytes, last: bool) -> bool:
        self._size += len(data)
        if self._size > _LARGEST_BODY:
            raise Broken("its answer has no end")
        payloads = self._events.feed(data)
        if last:
            payloads += self._events.end()
        if not payloads:
            return False
        reading = self._reading
        try:
            return reading.read(payloads)
        finally:
            if not self._first and reading.draft.spoke:
                self._first = perf_counter()
                self._model.worked(self._key)

    # --- end ---------------------------------------------------------------------------------------------------------

    def _complete(self) -> None:
        """Tell the good end of an answer."""
        if self._over:
            return  # stopped by whoever heard its last piece
        draft = self._reading.draft
        finish = draft.finish or FinishReason.STOP
        calls: tuple[Part, ...] = ()
        try:
            calls = draft.attachments()
        except Broken as problem:
            if finish is not FinishReason.LENGTH:  # a call that was cut by the limit is none
                self.fail(ModelUnavailable(f"{self._model.terms.title} cannot be understood: {problem}."))
                return
        usage = draft.usage
        if usage == _NOTHING:  # it was not told; each piece is about a token
            usage = Usage(output_tokens=draft.written)
        self._end(finish, usage, tuple(self._keyless(call, index) for index, call in enumerate(calls)))

    def _keyless(self, part: Part, index: int) -> Part:
        if not isinstance(part, ToolCallPart):
            return part
        # The id goes back to the provider with the tool's result: it has to stay one of its own.
        call_id = part.call_id if self._ear.hidden(part.call_id) == part.call_id else f"call_{index}"
        return msgspec.structs.replace(part, call_id=call_id, arguments_json=self._ear.hidden(part.arguments_json))

    def _end(self, finish: FinishReason, usage: Usage, calls: tuple[Part, ...] = ()) -> None:
        self._ear.let_go()
        if self._over:
            return  # stopped by whoever heard that
        now = perf_counter()
        first = self._first or now
        if not self._first:
            self._model.worked(self._key)
        self._leave()
        if self._connection is not None:
            self._connection.leave()
        self._listener.ended(
            Finished(
                finish_reason=finish,
                usage=usage,
                first_token=first - self._begun,
                generation=now - first,
                attachments=calls,
            )
        )

    def _conclude_refusal(self) -> None:
        """Read what was said instead of an answer."""
        head, terms, body = self._head, self._model.terms, bytes(self._collected or b"")
        if head is None or self._over:
            return
        secrets = self._model.secrets()
        if head.status == 200:
            found = refusal_in_stream(terms.title, terms.model, body, secrets)
        else:
            found = refusal(terms.title, terms.model, head.status, head.headers, body, secrets)
        self._refused(found)

    def _refused(self, found: Refusal) -> None:
        """Let rest what has to; go on with another key if that can help and nothing was told yet, else end."""
        model, key = self._model, self._key
        if self._over:
            return
        if found.filtered:
            self._end(FinishReason.CONTENT_FILTER, self._reading.draft.usage)
            return
        if found.cause is Cause.OUTAGE:
            model.cooldowns.failed(model.whole, Cause.OUTAGE, found.after)
        elif found.cause is not None:
            rest = model.cooldowns.failed(model.place(key), found.cause, found.after)
            self._say_refused(found.cause, rest)
            self._tried.append(key.id)
            if self._worst is None or isinstance(found.error, QueueFull):
                self._worst = found.error
            if not self._reading.draft.spoke and (other := model.next_key(self._tried)) is not None:
                self._go_on(other)
                return
        error = self._worst or found.error
        if isinstance(error, ModelCredential) and not key.text:
            error = model.keyless()
        if isinstance(error, QueueFull):
            error.retry_after = model.rest or error.retry_after
        self.fail(error, quotes=True)

    def _say_refused(self, cause: Cause, rest: float) -> None:
        fields: dict[str, object] = {"provider": self._model.terms.provider, "model": self._model.terms.model}
        if self._key.text:
            text, fields["key"] = "a provider refuses a key for a while", self._key.id
        elif cause is Cause.CREDENTIAL:
            text = "a provider wants a key and has none"
        else:
            text = "a provider takes no requests for a while"
        log.warning(text, extra={**fields, "seconds": rest, "cause": cause.value})

    def _go_on(self, key: ProviderKey) -> None:
        """Ask again with another key."""
        if self._connection is not None:
            self._connection.leave()
            self._connection = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._key = key
        self._again = False
        self._renew()
        try:
            self.begin()
        except MoltBotError as error:
            self.fail(error)

    def _leave(self) -> None:
        self._over = True
        self._reading.draft.hush()
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self._model.over(self)
