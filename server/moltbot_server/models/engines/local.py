"""The local engine: a CTranslate2 model with a sentencepiece tokenizer, in this process.

Each replica of the model has one thread of ours that runs one batch after the other. The native code calls back once
per row and step; the callback notes the token and, at most once per turn of the event loop, asks the loop to fetch what
was noted. Everything that costs time (text, stop texts, waking the reader) happens on the loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

import ctranslate2

from moltbot_server.errors import ContextLengthExceeded, ModelUnavailable
from moltbot_server.models.cpus import usable_cpus
from moltbot_server.models.detokenizer import Detokenizer
from moltbot_server.models.engine import NOBODY, Asker, Capabilities, Finished, Generation, Listener, counted, stream
from moltbot_server.models.engines.rows import BATCH, FULL, GONE, STOPPED, Row, Sampling, Waiting, unread
from moltbot_server.models.folder import ModelFolder
from moltbot_server.models.limits import check_options
from moltbot_server.models.stops import StopTexts
from moltbot_server.models.tokenizer import Tokenizer
from moltbot_server.turns import FinishReason, GenerationOptions, Message, Role, TextPart, Usage

MAX_WAITING = 256
_REASONS = {STOPPED: FinishReason.STOP, FULL: FinishReason.LENGTH}
_log = logging.getLogger(__name__)

Callback = Callable[[ctranslate2.GenerationStepResult], bool]
"""Called once per row and step; True ends the row."""


def default_threads() -> int:
    """Return how many replicas fit the machine, each computing on one thread.

    Measured with the built-in model and 16 streams, tokens/s and median first token, medians of five runs on a busy
    machine: on 2 processors 1 replica 8,700 and 51 ms, 2 replicas 9,400 and 19 ms; on 4 processors 2 replicas 12,700
    and 13 ms, 3 replicas 10,200 and 13 ms, 4 replicas 10,500 and 12 ms. So half of the processors stay with the event
    loop, which must read every token, and with whatever else runs; but two processors have two replicas.
    """
    cpus = usable_cpus()
    return min(4, max(cpus // 2, min(cpus, 2)))


class LocalEngine:
    """A model folder that answers. `threads` replicas share the weights; each writes one batch at a time."""

    def __init__(
        self, folder: ModelFolder, *, context_length: int = 0, threads: int = 0, max_waiting: int = MAX_WAITING
    ) -> None:
        """Describe the model; nothing is loaded before `start`. 0 leaves a number to the folder or the machine."""
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
        )
        self.threads = threads or default_threads()
        self.parallel = self.threads * BATCH
        self.memory_bytes = (folder.path / "model.bin").stat().st_size
        self._folder = folder
        self._loaded: Tokenizer | None = None
        self._ends: frozenset[int] = frozenset()
        self._stop_texts: tuple[str, ...] = ()
        self._waiting = Waiting(max_waiting, self.threads)
        self._outbox: deque[tuple[Row, int]] = deque()
        self._armed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._workers: list[threading.Thread] = []
        self._running: set[Row] = set()
        self._trouble = "The model is not loaded."

    @property
    def healthy(self) -> bool:
        """Whether the model is loaded and every thread of it lives."""
        return not self._trouble and all(worker.is_alive() for worker in self._workers)

    @property
    def waiting(self) -> int:
        """Answers that wait for a free replica."""
        return len(self._waiting)

    async def start(self) -> None:
        """Load the model and let every replica answer once.

        Raises:
            ModelUnavailable: the model cannot be loaded; the text says what was found and what was expected.
        """
        self._loop = asyncio.get_running_loop()
        generator = await asyncio.to_thread(self._load)
        self._workers = [
            threading.Thread(target=self._work, args=(generator,), name=f"model-{self.id}-{index}", daemon=True)
            for index in range(self.threads)
        ]
        for worker in self._workers:
            worker.start()
        self._trouble = ""
        try:
            await asyncio.gather(*(self._probe() for _ in self._workers))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop what runs within a step, end the threads and free the model."""
        self._trouble = self._trouble or "The model was closed."
        self._abandon()
        for row in self._running:
            row.cancelled = True
        workers, self._workers = self._workers, []
        for worker in workers:
            await asyncio.to_thread(worker.join)
        self._fetch()

    def check(self, options: GenerationOptions) -> None:
        """Refuse options that are out of range, and `seed`: the native code has one generator for all rows."""
        check_options(options, self.capabilities)

    def count(self, message: Message) -> int:
        """Return how many tokens a message takes in a prompt, its role markers included."""
        return self._tokenizer.count(message)

    async def tokens(self, content: str | Sequence[Message]) -> int:
        """Return how many tokens a text or a conversation takes; see `Engine.tokens`."""
        return counted(self, content)

    def admit(self, asker: Asker) -> None:
        """Refuse when as many answers wait as may."""
        self._waiting.check()

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Begin the answer to a conversation; see `Engine.begin`."""
        row = self._admit(messages, options)
        return _Writing(self, row, StopTexts((*options.stop, *self._stop_texts)), listener)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._loaded is None:
            raise ModelUnavailable(self._trouble)
        return self._loaded

    # --- on the event loop -------------------------------------------------------------------------------------------

    def _admit(self, messages: Sequence[Message], options: GenerationOptions) -> Row:
        if not self.healthy:
            raise ModelUnavailable(self._trouble or "A thread of the model has died; restart the core.")
        prompt = self._tokenizer.prompt(messages)
        room = self.capabilities.context_length - len(prompt)
        if room < 1:
            raise ContextLengthExceeded(
                "messages", f"takes {len(prompt)} of the model's {self.capabilities.context_length} tokens"
            )
        row = Row(prompt, self._sampling(options), min(options.max_output_tokens or room, room))
        self._waiting.put(row)
        self._running.add(row)
        return row

    def _sampling(self, options: GenerationOptions) -> Sampling:
        penalty = options.repetition_penalty or 1.0
        topk = options.top_k or 0
        if not options.temperature or topk == 1:
            return Sampling(repetition_penalty=penalty)
        # Without a top_k of its own CTranslate2 takes the likeliest token whatever the temperature is.
        topk = 0 if topk >= len(self._folder.vocabulary) else topk
        return Sampling(
            topk=topk, topp=options.top_p or 1.0, temperature=options.temperature, repetition_penalty=penalty
        )

    def _let_go(self, row: Row) -> None:
        """Forget a row that nobody reads any more; its replica is free after the step."""
        row.cancelled = True
        self._running.discard(row)
        if not row.began:
            self._waiting.remove(row)

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
                row.cancelled = True

    async def _probe(self) -> None:
        messages = (Message(role=Role.USER, parts=(TextPart(text="Hello"),)),)
        async for _ in stream(self, messages, GenerationOptions(max_output_tokens=8)):
            pass

    # --- on the threads ----------------------------------------------------------------------------------------------

    def _load(self) -> ctranslate2.Generator:
        folder = self._folder
        self._loaded = Tokenizer(folder)
        stops = {stop: self._loaded.id(stop) for stop in (*folder.template.stop, folder.eos_token)}
        self._ends = frozenset(index for index in stops.values() if index is not None)
        self._stop_texts = tuple(stop for stop in folder.template.stop if stops[stop] is None)
        try:
            return ctranslate2.Generator(
                str(folder.path), device="cpu", inter_threads=self.threads, intra_threads=1, max_queued_batches=-1
            )
        except (RuntimeError, ValueError, MemoryError) as problem:
            raise ModelUnavailable(
                f"{folder.path} cannot be loaded: {problem}; expected a whole CTranslate2 decoder model."
            ) from None

    def _work(self, generator: ctranslate2.Generator) -> None:
        batch: list[Row] = []
        try:
            while batch := self._waiting.take():
                self._write(generator, batch)
        except BaseException:
            _log.exception("a thread of the model died", extra={"model": self.id})
            self._trouble = "A thread of the model has died; restart the core."
            for row in batch:
                self._note(row, GONE)
            self._abandon()

    def _write(self, generator: ctranslate2.Generator, batch: list[Row]) -> None:
        began = perf_counter()
        for row in batch:
            row.began = began
        rows = [row for row in batch if not row.cancelled]
        ended: set[Row] = set()
        trouble: list[Exception] = []
        try:
            if rows:
                self._run(generator, rows, self._callback(rows, ended, trouble))
        except Exception as problem:
            trouble.append(problem)
        finally:
            if trouble:
                _log.error("a batch failed", exc_info=trouble[0], extra={"model": self.id, "rows": len(rows)})
            for row in batch:
                if row not in ended:
                    self._note(row, GONE)
        self._waiting.measured(perf_counter() - began, len(batch))

    def _run(self, generator: ctranslate2.Generator, rows: list[Row], callback: Callback) -> None:
        sampling = rows[0].sampling
        generator.generate_batch(
            [row.prompt for row in rows],
            max_length=max(row.limit for row in rows),
            end_token=list(self._ends),
            include_prompt_in_result=False,
            sampling_topk=sampling.topk,
            sampling_topp=sampling.topp,
            sampling_temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
            callback=callback,
        )

    def _callback(self, rows: list[Row], ended: set[Row], trouble: list[Exception]) -> Callback:
        """Return what the native code calls once per row and step. It must not raise: that would end all its mates."""
        ends = self._ends
        note = self._note

        def wrote(step: ctranslate2.GenerationStepResult) -> bool:
            try:
                row = rows[step.batch_id]
                if row.cancelled:
                    return True
                token = step.token_id
                row.last = perf_counter()
                if token in ends:
                    ended.add(row)
                    note(row, STOPPED)
                    return True
                if not row.first:
                    row.first = row.last
                note(row, token)
                row.left -= 1
                if row.left:
                    return False
                ended.add(row)
                note(row, FULL)
                return True
            except Exception as problem:
                trouble.append(problem)
                return True

        return wrote

    def _note(self, row: Row, token: int) -> None:
        self._outbox.append((row, token))
        if not self._armed and self._loop is not None:
            self._armed = True
            try:
                self._loop.call_soon_threadsafe(self._fetch)
            except RuntimeError:  # the loop is closed: nobody reads any more
                row.cancelled = True

    def _abandon(self) -> None:
        for row in self._waiting.close():
            self._note(row, GONE)


class _Writing:
    """One answer on its way from tokens to text, on the event loop."""

    __slots__ = ("_engine", "_listener", "_over", "_row", "_silent", "_stops", "_text", "_used")

    def __init__(self, engine: LocalEngine, row: Row, stops: StopTexts, listener: Listener) -> None:
        self._engine = engine
        self._row = row
        self._text = Detokenizer(engine._tokenizer.surfaces)
        self._stops = stops
        self._listener = listener
        self._used = self._silent = 0
        self._over = False
        row.read = self._read

    def stop(self) -> None:
        """Let the row go."""
        if not self._over:
            self._over = True
            self._row.read = unread  # no cycle is left behind for the garbage collector
            self._engine._let_go(self._row)

    def _read(self, tokens: list[int]) -> None:
        """Take what the model wrote since the last time: token ids, then perhaps what ended the row."""
        if self._over:
            return
        try:
            reason = self._reason(tokens.pop()) if tokens[-1] < 0 else None
            fresh = self._fresh(tokens, last=reason is not None)
        except Exception as problem:
            self.stop()
            self._listener.ended(problem)
            return
        if self._stops.stopped:
            reason = FinishReason.STOP_TEXT
        if fresh:
            silent, self._silent = self._silent, 0
            self._listener.wrote(fresh, silent)
        if reason is not None and not self._over:
            self.stop()
            self._listener.ended(self._finished(reason))

    def _fresh(self, tokens: list[int], *, last: bool) -> str:
        """Return the text that may be shown now: not what could still become a character or a stop text."""
        self._used += len(tokens)
        self._silent += len(tokens)
        stops = self._stops
        fresh = stops.feed(self._text.feed(tokens))
        if last and not stops.stopped:
            fresh += stops.feed(self._text.flush())
            if not stops.stopped:
                fresh += stops.flush()
        return fresh

    def _reason(self, end: int) -> FinishReason:
        if end == GONE:
            trouble = self._engine._trouble
            raise ModelUnavailable(trouble or "The model failed while it wrote this answer; the log says why.")
        return _REASONS[end]

    def _finished(self, reason: FinishReason) -> Finished:
        row = self._row
        first = row.first or perf_counter()
        return Finished(
            finish_reason=reason,
            usage=Usage(input_tokens=len(row.prompt), output_tokens=self._used),
            queue=row.began - row.arrived,
            first_token=first - row.began,
            generation=max(row.last - first, 0.0),
        )
