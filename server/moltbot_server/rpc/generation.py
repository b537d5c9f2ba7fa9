"""A generation of InferenceService under way: it hears what an engine writes, and gathers it until it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
from moltbot.v1 import inference_pb2

from moltbot_server.errors import ContextLengthExceeded, TurnInterrupted
from moltbot_server.models.context import ContextWindow
from moltbot_server.models.engine import Asker, Engine, Finished
from moltbot_server.models.engine import Generation as Answer
from moltbot_server.rpc import convert
from moltbot_server.turns import (
    FinishReason,
    GenerationOptions,
    Message,
    Notice,
    Reset,
    Role,
    Routed,
    ToolCallPart,
    Usage,
)


class Generation:
    """Hears what the engine writes; `take` gives what is to be sent of it, gathered for up to an interval."""

    def __init__(self, engine: Engine, interval: float, wake: Callable[[], None]) -> None:
        """`wake` is called when there is something to take, once until it is taken."""
        self._engine = engine
        self._interval = interval
        self._wake = wake
        self._woken = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at = 0.0
        self._pieces: list[tuple[str, int]] = []
        self._thoughts: list[str] = []
        self._position = 0
        self._answer: Answer | None = None
        self._read: Sequence[Message] = ()
        self._tokens = self._trimmed = self._told = 0
        self._end: Finished | Exception | None = None
        self.is_over = False
        """True when all was taken."""

    def begin(self, messages: Sequence[Message], options: GenerationOptions, asker: Asker, *, trim: bool) -> None:
        """Set the engine to work.

        Raises:
            MoltBotError: it does not begin.
        """
        self._read = messages
        if trim:
            # What there is of the answer has its room in what is kept for the answer.
            asked = len(messages) - (messages[-1].role is Role.ASSISTANT)
            window = ContextWindow.of(
                messages[: asked - 1], self._engine.count, self._engine.capabilities.context_length
            )
            fitted = window.fit(messages[asked - 1], options, overhead=self._engine.overhead)
            self._read = [*fitted.messages, *messages[asked:]]
            self._tokens, self._trimmed = fitted.tokens, fitted.trimmed_messages
        self._answer = self._engine.begin(self._read, options, self, asker)

    def stop(self) -> None:
        """Free the engine within a step, however far it is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._answer is not None:
            self._answer.stop()

    def abort(self) -> None:
        """End the generation now; its last response says that it was cancelled."""
        self.stop()
        self.ended(_CANCELLED)

    # --- from the engine ---------------------------------------------------------------------------------------------

    def queued(self, position: int) -> None:
        """Tell the caller that the answer waits, and where."""
        self._position = position
        self._tell()

    def wrote(self, text: str, tokens: int) -> None:
        """Take another piece: the first goes out at once, others wait for their mates."""
        self._pieces.append((text, tokens))
        if self._timer is None and not self._woken:
            rest = self._sent_at + self._interval - self._loop.time() if self._told else 0.0
            if rest > 0:
                self._timer = self._loop.call_later(rest, self._tell)
            else:
                self._tell()

    def thought(self, text: str) -> None:
        """Take more of what the model thinks."""
        self._thoughts.append(text)
        self._tell()

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Drop what is void, if it was not sent yet; if it was, it cannot be taken back, and the answer ends."""
        if isinstance(what, Reset):
            if self._told:
                self.ended(TurnInterrupted("the model broke off and another one would begin anew; ask again"))
            self._pieces.clear()

    def ended(self, end: Finished | Exception) -> None:
        """Take the end."""
        if self._end is None:
            self._end = end
            self._tell()

    def _tell(self) -> None:
        if not self._woken:
            self._woken = True
            self._wake()

    # --- to the caller -----------------------------------------------------------------------------------------------

    def take(self) -> list[inference_pb2.GenerateResponse]:
        """Return what is to be sent now, to the end if there is one."""
        self._woken = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        taken: list[inference_pb2.GenerateResponse] = []
        end, pieces = self._end, _joined(self._pieces) if self._interval > 0 else self._pieces
        self._pieces = []
        if self._position:
            position, self._position = self._position, 0
            if not self._told and not pieces and end is None:
                taken.append(inference_pb2.GenerateResponse(queue_position=position))
        if self._thoughts:
            taken.append(inference_pb2.GenerateResponse(reasoning="".join(self._thoughts)))
            self._thoughts = []
        # The last text goes with the end.
        last = pieces.pop() if pieces and self._interval > 0 and isinstance(end, Finished) else ("", 0)
        for text, tokens in pieces:
            self._told += tokens
            taken.append(inference_pb2.GenerateResponse(text=text, token_count=tokens))
        self._sent_at = self._loop.time()
        if end is not None:
            self.is_over = True
            if isinstance(end, Finished):
                taken.append(self._finished(end, *last))
        return taken

    @property
    def problem(self) -> Exception | None:
        """Why it ended without a good end."""
        if isinstance(self._end, ContextLengthExceeded):
            return self._end.at("prompt.messages")
        return self._end if isinstance(self._end, Exception) else None

    def _finished(self, end: Finished, text: str, tokens: int) -> inference_pb2.GenerateResponse:
        self._told += tokens
        counted = end.usage if end is not _CANCELLED else Usage(output_tokens=self._told)
        if not counted.input_tokens:
            read = self._tokens or sum(map(self._engine.count, self._read))
            counted = msgspec.structs.replace(counted, input_tokens=read)
        return inference_pb2.GenerateResponse(
            text=text,
            token_count=tokens,
            finished=inference_pb2.GenerateFinished(
                finish_reason=convert.finish_reason(end.finish_reason),
                usage=convert.usage(counted),
                model=f"models/{end.model or self._engine.id}",
                tool_calls=[convert.tool_call(part) for part in end.attachments if isinstance(part, ToolCallPart)],
                queue=convert.duration(end.queue),
                first_token=convert.duration(end.first_token),
                generation=convert.duration(end.generation),
                trimmed_messages=self._trimmed + end.trimmed_messages,
            ),
        )


_CANCELLED = Finished(finish_reason=FinishReason.CANCELLED, usage=Usage())


def _joined(pieces: list[tuple[str, int]]) -> list[tuple[str, int]]:
    if len(pieces) < 2:
        return pieces
    return [("".join(text for text, _ in pieces), sum(tokens for _, tokens in pieces))]
