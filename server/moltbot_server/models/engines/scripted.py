"""The scripted engine: deterministic answers at a set pace, for tests, load tests and benchmarks.

Without a script it repeats what it was told, word by word: `You said: ...`. A script is a list of rules; the first one
whose pattern is found in the last user text answers. A user text that starts with `#` is a directive and needs no rule:

- `#32` answers with 32 deltas (`one two three` ...),
- `wait=0.5` waits half a second before the first delta, `pace=0.02` waits 20 ms between deltas,
- `fail=5` fails with MODEL_UNAVAILABLE after 5 deltas, `fail=5:QUEUE_FULL` with that reason,

together as in `#32 wait=0.5 pace=0.02 fail=5`. Something else after `#` is ordinary text.

With no pauses the engine never gives way to the event loop, so that what is measured around it is the core alone.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from time import perf_counter
from typing import ClassVar

import msgspec

from moltbot_server.errors import ContextLengthExceeded, InvalidField, ModelUnavailable, MoltBotError, every_error
from moltbot_server.models.engine import (
    NOBODY,
    Asker,
    Capabilities,
    Chunk,
    Embedded,
    Finished,
    Generation,
    Listener,
    counted,
    no_embeddings,
)
from moltbot_server.models.limits import check_options
from moltbot_server.models.plain_yaml import read_plain_yaml
from moltbot_server.models.stops import StopTexts
from moltbot_server.turns import FinishReason, GenerationOptions, Message, Role, Usage, Value

MAX_DELTAS = 100_000
_PLANS_KEPT = 1024
_DIRECTIVE = re.compile(
    r"#(?P<deltas>\d{1,6})(?: wait=(?P<wait>\d+(?:\.\d+)?))?(?: pace=(?P<pace>\d+(?:\.\d+)?))?"
    r"(?: fail=(?P<fail>\d+)(?::(?P<reason>[A-Z_]+))?)?\s*"
)
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_REASONS = {error.reason: error for error in every_error() if not issubclass(error, InvalidField)}


class Failure(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer that breaks `after` so many deltas, with a `reason` of docs/errors.md."""

    after: int = 0
    reason: str = "MODEL_UNAVAILABLE"
    message: str = "The script says that the model fails here."

    def error(self) -> MoltBotError:
        """Return the error that the reason names."""
        return _REASONS.get(self.reason, ModelUnavailable)(self.message)


class Tokens(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The token counts that an answer claims; what is 0 for the prompt is counted by the caller."""

    input_tokens: int = 0
    output_tokens: int = 0


class Rule(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is answered to a user text in which the regular expression `match` is found.

    Either `deltas`, or a `template` that is cut into words; `{text}` stands for the user text, `{1}` for the first
    group of the match, `{messages}` for how many messages the model read, `{system}` for the system prompt.
    `first_delay` and `pace` are in seconds: before the first delta, and between two.
    """

    match: str = ""
    deltas: tuple[str, ...] | None = None
    template: str = "You said: {text}"
    first_delay: float = 0.0
    pace: float = 0.0
    fail: Failure | None = None
    usage: Tokens | None = None
    finish_reason: FinishReason = FinishReason.STOP

    def __post_init__(self) -> None:
        """Refuse what could not be run.

        Raises:
            ValueError: a pattern that does not compile, a negative time, an unknown reason.
        """
        try:
            re.compile(self.match)
        except re.error as problem:
            raise ValueError(f"match {self.match!r} is no regular expression: {problem}") from None
        if self.first_delay < 0 or self.pace < 0:
            raise ValueError("first_delay and pace are seconds and cannot be negative")
        if self.fail is not None and self.fail.reason not in _REASONS:
            raise ValueError(f"no failure has the reason {self.fail.reason!r}; one of {', '.join(sorted(_REASONS))}")


class Script(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a scripted model answers: the first matching rule, else an echo. `context_length` is in tokens.

    `continuation`: whether it goes on with an answer that is begun.
    """

    rules: tuple[Rule, ...] = ()
    id: str = "scripted"
    display_name: str = "Scripted answers"
    context_length: int = 8192
    continuation: bool = True


def load_script(path: Path) -> Script:
    """Read a script from a YAML file with the fields of `Script`.

    Raises:
        ModelUnavailable: the file is missing or is not a script.
    """
    try:
        return read_plain_yaml(path, Script)
    except OSError as problem:
        found = problem.strerror or type(problem).__name__
        raise ModelUnavailable(f"MODEL_PATH {path}: {found}; expected a YAML file with a script.") from None
    except ValueError as problem:
        raise ModelUnavailable(f"MODEL_PATH {path} is not a script: {problem}.") from None


class _Plan(Value, frozen=True, kw_only=True):
    chunks: tuple[Chunk, ...]
    first_delay: float = 0.0
    pace: float = 0.0
    fail: Failure | None = None
    usage: Usage | None = None
    finish_reason: FinishReason = FinishReason.STOP


class ScriptedEngine:
    """Answers from a script. Stop texts and the token limit are honoured; a fixed answer fits any sampling option."""

    type = "scripted"
    memory_bytes = parallel = overhead = 0
    is_route = False
    is_free = True
    rest = 0.0
    numbers: ClassVar[Mapping[str, float]] = {}

    def __init__(self, script: Script | None = None, *, capabilities: Capabilities | None = None) -> None:
        script = script or Script()
        self.id = script.id
        self.display_name = script.display_name
        self.healthy = False
        self.capabilities = capabilities or Capabilities(
            context_length=script.context_length,
            sampling=True,
            stop=True,
            seed=True,
            repetition_penalty=True,
            token_counts=True,
            cancellation=True,
            continuation=script.continuation,
        )
        self._rules = [(re.compile(rule.match), rule) for rule in (*script.rules, Rule())]
        self._plans: dict[str, _Plan] = {}

    async def start(self) -> None:
        """Become ready."""
        self.healthy = True

    async def close(self) -> None:
        """Stop being ready."""
        self.healthy = False

    def check(self, options: GenerationOptions) -> None:
        """Refuse options that are out of range, and those that the given capabilities leave out."""
        check_options(options, self.capabilities)

    def count(self, message: Message) -> int:
        """Count one token for every four characters begun, and one for the role."""
        return 1 + (len(message.text) + 3) // 4

    async def tokens(self, content: str | Sequence[Message]) -> int:
        """Return how many tokens a text or a conversation takes; see `Engine.tokens`."""
        return counted(self, content)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Refuse: a script writes."""
        raise no_embeddings(self)

    def admit(self, asker: Asker) -> None:
        """Take everything: nothing waits here."""

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Tell the scripted answer to the last user message, or what is left of it: at once, or at a pace."""
        if not self.healthy:
            raise ModelUnavailable("The scripted model is not started.")
        if asker.whole and (size := counted(self, messages)) >= (room := self.capabilities.context_length):
            raise ContextLengthExceeded("messages", f"takes {size} of the model's {room} tokens")
        begun = messages[-1].text if messages[-1].role is Role.ASSISTANT else ""
        if begun:
            messages = messages[:-1]
        text = messages[-1].text
        plan = self._plans.get(text) or self._plan(text, messages)
        if options.stop or options.max_output_tokens is not None:
            plan = _limited(plan, options)
        if begun:
            plan = _rest(plan, begun)
        if plan.pace or plan.first_delay or plan.fail:
            return _Recital(plan, listener)
        began = perf_counter()
        for chunk in plan.chunks:
            listener.wrote(chunk.text, chunk.tokens)
        listener.ended(_finished(plan, began))
        return _SAID

    def _plan(self, text: str, messages: Sequence[Message]) -> _Plan:
        if text.startswith("#") and (directive := _DIRECTIVE.fullmatch(text)):
            plan, same = _directed(directive), True
        else:
            plan, same = self._ruled(text, messages)
        if same and len(text) <= 256 and len(plan.chunks) <= 256:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.clear()
            self._plans[text] = plan
        return plan

    def _ruled(self, text: str, messages: Sequence[Message]) -> tuple[_Plan, bool]:
        """Return the plan, and whether it depends on the text alone."""
        match, rule = next((found, rule) for pattern, rule in self._rules if (found := pattern.search(text)))
        deltas, same = rule.deltas, True
        if deltas is None:
            same = "{messages}" not in rule.template and "{system}" not in rule.template
            system = "" if same else "\n".join(entry.text for entry in messages if entry.role is Role.SYSTEM)
            words = {"text": text, "messages": str(len(messages)), "system": system}
            words |= {str(index): group or "" for index, group in enumerate(match.groups(), 1)}
            answer = re.sub(r"\{(\w+)\}", lambda place: words.get(place[1], place[0]), rule.template)
            deltas = tuple(re.findall(r"\s*\S+|\s+\Z", answer))
        claimed = rule.usage
        plan = _Plan(
            chunks=tuple(Chunk(text=delta) for delta in deltas),
            first_delay=rule.first_delay,
            pace=rule.pace,
            fail=rule.fail,
            usage=None if claimed is None else Usage(**msgspec.structs.asdict(claimed)),
            finish_reason=rule.finish_reason,
        )
        return plan, same


class _Said:
    """An answer that was told at once: there is nothing left to stop."""

    def stop(self) -> None:
        """Do nothing."""


_SAID = _Said()


class _Recital:
    """An answer that is told at its plan's pace."""

    def __init__(self, plan: _Plan, listener: Listener) -> None:
        self._plan = plan
        self._listener = listener
        self._task = asyncio.create_task(self._tell())

    def stop(self) -> None:
        """Fall silent."""
        self._task.cancel()

    async def _tell(self) -> None:
        began = perf_counter()
        try:
            async with aclosing(_paced(self._plan)) as chunks:
                async for chunk in chunks:
                    self._listener.wrote(chunk.text, chunk.tokens)
        except Exception as error:
            self._listener.ended(error)
        else:
            self._listener.ended(_finished(self._plan, began))


def _finished(plan: _Plan, began: float) -> Finished:
    return Finished(
        finish_reason=plan.finish_reason,
        usage=plan.usage or Usage(output_tokens=len(plan.chunks)),
        first_token=plan.first_delay,
        generation=perf_counter() - began - plan.first_delay,
    )


def _directed(directive: re.Match[str]) -> _Plan:
    count = min(int(directive["deltas"]), MAX_DELTAS)
    fail = None
    if directive["fail"]:
        fail = Failure(after=int(directive["fail"]), reason=directive["reason"] or "MODEL_UNAVAILABLE")
    spaced = [Chunk(text=f" {word}") for word in _WORDS]
    chunks = tuple(spaced[index % 10] if index else Chunk(text=_WORDS[0]) for index in range(count))
    return _Plan(
        chunks=chunks, first_delay=float(directive["wait"] or 0), pace=float(directive["pace"] or 0), fail=fail
    )


def _limited(plan: _Plan, options: GenerationOptions) -> _Plan:
    """Cut a plan at the token limit or at a stop text, whichever comes first; a delta is a token."""
    limit = options.max_output_tokens
    reason = plan.finish_reason
    chunks = plan.chunks
    if limit is not None and limit < len(chunks):
        chunks, reason = chunks[:limit], FinishReason.LENGTH
    if options.stop:
        stops = StopTexts(options.stop)
        texts = []
        for chunk in chunks:
            texts.append(stops.feed(chunk.text))
            if stops.stopped:
                reason = FinishReason.STOP_TEXT
                break
        texts.append(stops.flush())
        chunks = tuple(Chunk(text=text) for text in texts if text)
    return _Plan(
        chunks=chunks,
        first_delay=plan.first_delay,
        pace=plan.pace,
        fail=plan.fail,
        usage=plan.usage,
        finish_reason=reason,
    )


def _rest(plan: _Plan, begun: str) -> _Plan:
    """Return what is left of a plan to say, in the time that is left of it.

    Raises:
        InvalidField: an answer that begins otherwise is none of the script's.
    """
    said = 0
    rest = begun
    for chunk in plan.chunks:
        if not rest or not rest.startswith(chunk.text):
            break
        rest = rest[len(chunk.text) :]
        said += 1
    if rest:
        raise InvalidField("messages", "the script answers something else than what is begun")
    fail = plan.fail and msgspec.structs.replace(plan.fail, after=max(plan.fail.after - said, 0))
    usage = plan.usage or Usage(output_tokens=len(plan.chunks))
    return msgspec.structs.replace(plan, chunks=plan.chunks[said:], first_delay=plan.pace, fail=fail, usage=usage)


async def _paced(plan: _Plan) -> AsyncGenerator[Chunk, None]:
    """Keep to the plan's clock: delta n comes at first_delay + n * pace, so that delays do not add up."""
    loop = asyncio.get_running_loop()
    due = loop.time() + plan.first_delay
    breaks = plan.fail.after if plan.fail else None
    for index, chunk in enumerate(plan.chunks):
        if index == breaks:
            break
        if (pause := due - loop.time()) > 0:
            await asyncio.sleep(pause)
        yield chunk
        due += plan.pace
    if plan.fail:
        if (pause := due - loop.time()) > 0 and not plan.chunks:
            await asyncio.sleep(pause)
        raise plan.fail.error()
