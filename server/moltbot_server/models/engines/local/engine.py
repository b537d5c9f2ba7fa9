"""The local engine: a CTranslate2 model in this process.

Each replica of the model has one thread of ours that writes one batch after the other. The native code calls back once
per row and step; the callback notes the token and, at most once per turn of the event loop, asks the loop to fetch what
was noted. Everything that costs time (text, stop texts, waking the reader) happens on the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from time import perf_counter

from moltbot_server.errors import ContentTooLarge, ContextLengthExceeded, InvalidField, ModelUnavailable
from moltbot_server.models.detokenizer import Continued, Detokenizer
from moltbot_server.models.engine import (
    NOBODY,
    Asker,
    Capabilities,
    Embedded,
    Generation,
    Listener,
    counted_by,
    no_embeddings,
    stream,
)
from moltbot_server.models.engines.local.leads import Leads
from moltbot_server.models.engines.local.processes import ProcessReplica
from moltbot_server.models.engines.local.replicas import Replica, Replicas
from moltbot_server.models.engines.local.rows import EXPIRED, GONE, Row
from moltbot_server.models.engines.local.sampling import sampling_of
from moltbot_server.models.engines.local.threads import ThreadReplica, load
from moltbot_server.models.engines.local.waiting import Waiting
from moltbot_server.models.engines.local.weights import context_bytes
from moltbot_server.models.engines.local.writing import Writing
from moltbot_server.models.folder import ModelFolder
from moltbot_server.models.limits import check_options
from moltbot_server.models.replica.nursery import Nursery
from moltbot_server.models.tokenizer import Tokenizer
from moltbot_server.models.tuning import Tuning, tuning_for
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart

MAX_WAITING = 256

SMALL = 32 << 20
"""Bytes of weights up to which each replica may have its own, in a process of its own."""

_SOON_COUNTED = 8192
_MOST_COUNTED = 1 << 20
"""Characters of which the tokens are counted at once; more would keep a processor busy for seconds."""

_TOLD_EVERY = 0.25
_PROBED = 8  # tokens of the answers by which a model is proved, and its pace guessed
_LEADS_SHARE = 0.25  # of the weights' size: what the beginnings that the model keeps may take beside them,
_LEADS_LEAST = 8 << 20  # or this many bytes where the model is small
_HELLO = (Message(role=Role.USER, parts=(TextPart(text="Hello"),)),)
_DIED = "A thread of the model has died; restart the core."
_log = logging.getLogger(__name__)


class LocalEngine:
    """A model folder that answers. Its replicas share the weights; each writes one batch at a time."""

    is_route = False
    is_free = True
    rest = 0.0
    greedy = True  # without a temperature it takes the likeliest token, so its answers may be kept

    def __init__(
        self,
        folder: ModelFolder,
        *,
        context_length: int = 0,
        tuning: Tuning | None = None,
        max_waiting: int = MAX_WAITING,
        weights: Mapping[str, float] | None = None,
        nursery: Nursery | None = None,
    ) -> None:
        """Describe the model; nothing is loaded before `start`.

        `context_length` of 0 is the folder's. Without a `tuning` the model uses the machine as most would. At most
        `max_waiting` answers wait, fewer where they would wait too long. `weights` of workspaces say how they share the
        model, 1 for those not named. With a `nursery`, which stays the caller's, the replicas of a small model
        are processes.
        """
        self.id = folder.id
        self.display_name = folder.display_name
        self.type = folder.family
        self.capabilities = Capabilities(
            context_length=context_length or folder.context_length,
            sampling=True,
            stop=True,
            repetition_penalty=True,
            token_counts=True,
            cancellation=True,
            continuation=folder.continuation,
        )
        self._weights = self.memory_bytes = (folder.path / "model.bin").stat().st_size
        self.tuning = tuning or tuning_for(None, folder.path)
        self._nursery = nursery if self._weights <= SMALL else None
        if self._nursery is not None:
            self.memory_bytes *= self.tuning.replicas
        self._folder = folder
        self._loaded: Tokenizer | None = None
        self._leads: Leads | None = None
        self._stop_texts: tuple[str, ...] = ()
        self._waiting = Waiting(
            limit=max_waiting, replicas=self.tuning.replicas, batch=self.tuning.batch, weights=weights
        )
        self._outbox: deque[tuple[Row, int]] = deque()
        self._armed = self._calling = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._replicas: Replicas | None = None
        self._rows: set[Row] = set()
        self.trouble = "The model is not loaded."

    @property
    def healthy(self) -> bool:
        """Whether the model is loaded and every thread of it lives."""
        return not self.trouble and self._replicas is not None and self._replicas.alive

    @property
    def overhead(self) -> int:
        """How many tokens a prompt takes beside its messages."""
        return self._loaded.overhead if self._loaded is not None else 0

    @property
    def parallel(self) -> int:
        """How many answers are written at the same time before more have to wait."""
        return self.tuning.replicas * self.tuning.batch

    # --- what can be measured ----------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Answers that wait for a free replica."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return self._replicas.rows if self._replicas else 0

    @property
    def batches(self) -> int:
        """Batches written since the start."""
        return self._waiting.batches

    @property
    def mean_batch(self) -> float:
        """Rows of a batch, on average since the start."""
        return self._waiting.rows / max(1, self._waiting.batches)

    @property
    def pauses(self) -> int:
        """How often a long answer gave its place to those that waited, since the start."""
        return self._waiting.pauses

    @property
    def refused(self) -> int:
        """Answers that were refused because too much waited, since the start."""
        return self._waiting.refused

    @property
    def revivals(self) -> int:
        """How often a replica's process was started again, since the start."""
        return self._replicas.revivals if self._replicas else 0

    @property
    def static_prompts(self) -> int:
        """Beginnings of prompts that the model keeps."""
        return 0 if self._leads is None else len(self._leads)

    # --- on the event loop -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model and let every replica answer once.

        Raises:
            ModelUnavailable: the model cannot be loaded; the text says what was found and what was expected.
        """
        self._loop = asyncio.get_running_loop()
        self._replicas = replicas = await asyncio.to_thread(self._load)
        try:
            await asyncio.to_thread(replicas.load)
            replicas.start()
            self.trouble = ""
            await self._probe(1)
            self._waiting.forget()
            await self._probe(_PROBED)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop what runs within a step, end the threads and free the model."""
        self.trouble = self.trouble or "The model was closed."
        for row in self._waiting.close():
            self.note(row, GONE)
        for row in self._rows:
            row.cancel()
        replicas, self._replicas = self._replicas, None
        if replicas is not None:
            await asyncio.to_thread(replicas.close)
        self._fetch()

    def check(self, options: GenerationOptions) -> None:
        """Refuse options that are out of range, and `seed`: the native code has one generator for all rows."""
        check_options(options, self.capabilities)

    def count(self, message: Message) -> int:
        """Return how many tokens a message takes in a prompt, its role markers included."""
        return self._tokenizer.count(message)

    async def tokens(self, content: str | Sequence[Message]) -> int:
        """Return how many tokens a text or a conversation takes; see `Engine.tokens`."""
        size = len(content) if isinstance(content, str) else sum(len(message.text) for message in content)
        if size > _MOST_COUNTED:
            raise ContentTooLarge("input", f"has {size} characters; count at most {_MOST_COUNTED} at once")
        count = self._tokenizer.count_whole
        if size <= _SOON_COUNTED:
            return counted_by(count, content)
        return await asyncio.to_thread(counted_by, count, content)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Refuse: a decoder writes."""
        raise no_embeddings(self)

    @property
    def numbers(self) -> Mapping[str, float]:
        """What is counted of the queue and the batches."""
        return {
            "waiting": self.waiting,
            "running": self.running,
            "batches": self.batches,
            "mean_batch": self.mean_batch,
            "pauses": self.pauses,
            "refused": self.refused,
            "static_prompts": self.static_prompts,
            "revivals": self.revivals,
        }

    def admit(self, asker: Asker) -> None:
        """Refuse what could not begin in time; see `Engine.admit`."""
        self._waiting.admit(asker.workspace, asker.session, self._until(asker))

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Begin the answer to a conversation; see `Engine.begin`."""
        if not self.healthy:
            raise ModelUnavailable(self.trouble or _DIED)
        answer = messages[-1].text if messages[-1].role is Role.ASSISTANT else ""
        row, begun = self._row(messages[:-1] if answer else messages, options, asker, answer)
        surfaces, stops = self._tokenizer.surfaces, (*options.stop, *self._stop_texts)
        text = Continued(surfaces, answer[len(answer.rstrip()) :]) if answer else Detokenizer(surfaces)
        writing = Writing(self, row, text, stops, listener, begun=begun)
        self._waiting.put(row)
        self._rows.add(row)
        self._call_replicas()
        return writing

    def _call_replicas(self) -> None:
        """Wake idle replicas when all that has come at this moment waits."""
        loop = asyncio.get_running_loop()
        if not self._calling:
            self._calling = True
            loop.call_soon(self._called)
        if self._ticking is None:
            self._ticking = loop.call_later(_TOLD_EVERY, self._tick)

    def _called(self) -> None:
        self._calling = False
        self._waiting.wake()

    def let_go(self, row: Row) -> None:
        """Forget a row that nobody reads any more; its replica is free after the step."""
        row.cancel()
        self._rows.discard(row)
        self._waiting.remove(row)
        if row.ended and row.began:
            self._waiting.answered(row.limit - row.left, cut=not row.left)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._loaded is None:
            raise ModelUnavailable(self.trouble)
        return self._loaded

    def _row(
        self, messages: Sequence[Message], options: GenerationOptions, asker: Asker, answer: str
    ) -> tuple[Row, int]:
        """Return the row of a conversation with what there is of its answer, and how many tokens that is."""
        prompt = self._tokenizer.prompt(messages, answer)
        begun = len(prompt) - len(self._tokenizer.prompt(messages)) if answer else 0
        room = self.capabilities.context_length - len(prompt)
        if room < 1:
            raise ContextLengthExceeded(
                "messages", f"takes {len(prompt)} of the model's {self.capabilities.context_length} tokens"
            )
        limit = room if options.max_output_tokens is None else options.max_output_tokens - begun
        if limit < 1:
            raise InvalidField("messages", f"the answer that is begun has {begun} tokens already")
        row = Row(
            prompt,
            sampling_of(options, len(self._folder.vocabulary)),
            min(limit, room),
            lead=() if self._leads is None else self._leads.of(messages, prompt),
            workspace=asker.workspace,
            session=asker.session,
            deadline=self._until(asker),
        )
        return row, begun

    def _until(self, asker: Asker) -> float | None:
        """Return an asker's deadline on the clock of the replicas' threads."""
        if asker.deadline is None or self._loop is None:
            return None
        return perf_counter() + asker.deadline - self._loop.time()

    def _fetch(self) -> None:
        """Hand what the threads noted to the rows. The flag falls first: what is noted from here on asks again."""
        self._armed = False
        outbox, rows = self._outbox, []
        while outbox:
            row, token = outbox.popleft()
            if row.put(token):
                rows.append(row)
        for row in rows:
            try:
                row.hand_over()
            except Exception:
                _log.exception("a reader failed", extra={"model": self.id})
                row.cancel()

    def _tick(self) -> None:
        """End what waited too long, and tell the others their places if these have changed."""
        self._ticking = None
        expired = self._waiting.expired()
        for row in expired:
            self.note(row, EXPIRED)
        if expired:
            self.hand_over()
        self._waiting.under_way([row.limit - row.left for row in self._rows if row.began])
        for place, row in enumerate(self._waiting.places(), 1):
            if row.place == place or row.began:
                continue
            row.place = place
            try:
                row.told(place)
            except Exception:
                _log.exception("a reader failed", extra={"model": self.id})
        if self._rows and self._loop is not None:
            self._ticking = self._loop.call_later(_TOLD_EVERY, self._tick)

    async def _probe(self, tokens: int) -> None:
        """Let every replica answer, with so many tokens at most."""

        async def ask() -> None:
            async for _ in stream(self, _HELLO, GenerationOptions(max_output_tokens=tokens)):
                pass

        await asyncio.gather(*(ask() for _ in range(self.tuning.replicas)))

    # --- on the threads ----------------------------------------------------------------------------------------------

    def note(self, row: Row, token: int) -> None:
        """Take down a token of a row, or what ended it."""
        self._outbox.append((row, token))

    def hand_over(self) -> None:
        """Let the event loop read what was taken down."""
        if self._armed or self._loop is None:
            return
        self._armed = True
        try:
            self._loop.call_soon_threadsafe(self._fetch)
        except RuntimeError:  # the loop is closed: nobody reads any more
            for row, _ in self._outbox:
                row.cancel()

    def died(self) -> None:
        """Take note that a thread of the model has died."""
        self.trouble = _DIED

    def _load(self) -> Replicas:
        folder = self._folder
        tokenizer = self._loaded = Tokenizer(folder)
        stops = {stop: tokenizer.id(stop) for stop in (*folder.template.stop, folder.eos_token)}
        self._stop_texts = tuple(stop for stop in folder.template.stop if stops[stop] is None)
        each = context_bytes(folder.path / "model.bin")
        room = max(_LEADS_LEAST, self._weights * _LEADS_SHARE)
        self._leads = Leads(tokenizer.prompt, int(room / each) if each else 0)
        ends = frozenset(index for index in stops.values() if index is not None)
        return Replicas(
            self._made(ends),
            name=self.id,
            waiting=self._waiting,
            reader=self,
            ends=ends,
            vocabulary=folder.vocabulary,
        )

    def _made(self, ends: frozenset[int]) -> Sequence[Replica]:
        """Return the replicas, in processes or around one loaded model."""
        count, nursery = self.tuning.replicas, self._nursery
        if nursery is not None:
            trial = self._tokenizer.prompt(_HELLO)
            return [ProcessReplica(nursery, self._folder, self.tuning, ends=ends, trial=trial) for _ in range(count)]
        generator = load(self._folder, self.tuning)
        return [ThreadReplica(generator, ends) for _ in range(count)]
