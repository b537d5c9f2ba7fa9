"""One question from the command line: its answer as text, as one JSON object, or as JSON lines of events."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from moltbot import MoltBot, MoltBotClientError
from moltbot.errors import from_event
from moltbot.v1 import chat_pb2, message_pb2

from moltbot_server.cli.showing import Shown, attended
from moltbot_server.cli.terminal import Exit, Failure, harmless, lasting

CHANNEL = "cli"
_TOO_LARGE = re.compile(r"SERVER: Received message larger than max \((\d+) vs\. (\d+)\)")
_PATIENCE = 10.0  # seconds; a person who waits for longer asks what is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a core is and the key to it. `store_away` tells what it cannot do with its store; empty when it can all."""

    address: str
    key: str
    store_away: Callable[[], str] = lambda: ""

    roots: str | None = None
    """Certificates in PEM that are believed, empty for those that gRPC believes; None where nothing is encrypted."""

    words: Callable[[str], str] = str
    """Puts what that core said as it is typed for its workspace, such as a command for a key."""
    start: str = "moltbot start"
    """What starts that core, and what shows a session's messages."""
    show: str = "moltbot session show"

    def failure(self, error: MoltBotClientError, turn: str) -> Failure:
        """Return a client's error as the end of a command; `turn` is one whose end it has not heard, or empty."""
        found = failure(error)
        message = self.words(found.message).replace("`moltbot start`", f"`{self.start}`")
        if turn and found.status is Exit.UNAVAILABLE:
            session = turn.partition("/turns/")[0]
            message += (
                f"\nThe question was taken, and its answer is kept: `{self.show} {session}` has it once it is there."
            )
        return Failure(message, found.status)

    def connect(self, on_repeat: Callable[[str], None] | None = None) -> MoltBot:
        """Return a client; `on_repeat` hears when something is asked for again, because the core was away."""
        credentials = None
        if self.roots is not None:
            credentials = grpc.ssl_channel_credentials(self.roots.encode() or None)
        return MoltBot(self.address, self.key, credentials=credentials, patience=_PATIENCE, on_repeat=on_repeat)


def failure(error: MoltBotClientError) -> Failure:
    """Return a client's error as the end of a command."""
    message, wait = _without_fields(error), ""
    if error.retry_after:
        stop = "" if message.endswith((".", "?", "!")) else "."
        wait = f"{stop} Try again in {lasting(error.retry_after) if error.retry_after >= 1 else 'a moment'}."
    statuses = {
        "UNAVAILABLE": Exit.UNAVAILABLE,
        "UNAUTHENTICATED": Exit.NOT_ALLOWED,
        "PERMISSION_DENIED": Exit.NOT_ALLOWED,
    }
    if error.code.name == "UNAUTHENTICATED" and os.environ.get("MOLTBOT_KEY"):
        text = (
            "MoltBot does not know the key in MOLTBOT_KEY: unset that, or set it to the line in the workspace's `key`"
        )
        return Failure(f"{text} file. ({error.reason})", Exit.NOT_ALLOWED)
    return Failure(f"{message}{wait} ({error.reason or error.code.name})", statuses.get(error.code.name, Exit.FAILED))


def _without_fields(error: MoltBotClientError) -> str:
    """Return what is wrong without the name of the field of a message: whoever types one knows of no fields."""
    problem = next((problem for field, problem in error.fields.items() if field.startswith("turn.parts")), "")
    return problem or _message(error)


def _message(error: MoltBotClientError) -> str:
    """Return what is wrong, where gRPC itself refused a message for its size in words of ours."""
    if (found := _TOO_LARGE.search(error.message)) is None:
        return error.message
    size, most = (int(number) for number in found.groups())
    return (
        f"that is too long: {size:,} bytes would be sent, and the core takes {most:,} at once (`max_message_bytes` of "
        "its configuration); say it in parts"
    )


@asynccontextmanager
async def interrupts() -> AsyncIterator[asyncio.Event]:
    """Give an event that Ctrl-C sets; a second Ctrl-C breaks the body off.

    Raises:
        KeyboardInterrupt: it was pressed twice.
    """
    pressed, broken = asyncio.Event(), False
    task = asyncio.current_task()
    assert task is not None

    def press() -> None:
        nonlocal broken
        if pressed.is_set():
            broken = True
            task.cancel()
        pressed.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, press)
    try:
        yield pressed
    except asyncio.CancelledError:
        if not broken:
            raise
        task.uncancel()
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@asynccontextmanager
async def cancelling(bot: MoltBot, turn: list[str], pressed: asyncio.Event) -> AsyncIterator[None]:
    """Cancel the turn, once it has a name, when Ctrl-C is pressed while the body runs."""

    async def cancel() -> None:
        await pressed.wait()
        if turn:
            await bot.cancel_turn(turn[0])

    task = asyncio.create_task(cancel())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def ask(place: Place, text: str, *, session: str, model: str, form: str) -> int:
    """Ask and print the answer; `form` is `text`, `json` or `events`. Return the exit status."""
    shown = Shown(place.store_away)
    async with place.connect(shown.waits if form == "text" else None) as bot, interrupts() as pressed:
        turn: list[str] = []
        heard = False
        completed: chat_pb2.Completed | None = None
        notices: list[chat_pb2.Notice] = []
        show = {"text": shown.show, "events": _print_event}.get(form)
        try:
            stream = bot.stream_turn(text, session=session, model=_model(model), channel=CHANNEL)
            async with aclosing(stream) as events, cancelling(bot, turn, pressed):
                async for event in attended(events, shown) if form == "text" else events:
                    heard = True
                    if event.HasField("accepted"):
                        turn.append(event.accepted.turn)
                        if pressed.is_set():
                            await bot.cancel_turn(turn[0])
                    if show is not None:
                        show(event)
                    if event.HasField("notice"):
                        notices.append(event.notice)
                    elif event.HasField("completed"):
                        completed = event.completed
                    elif event.HasField("failed"):
                        turn.clear()  # that was its end
                        raise from_event(event.failed)
            shown.end()
            if form == "text" and completed is not None and (what := remark(completed, cancelled=pressed.is_set())):
                print(f"moltbot: {what}", file=sys.stderr, flush=True)
        except MoltBotClientError as error:
            shown.end()
            if form == "text":
                raise place.failure(error, turn[0] if turn else "") from None
            if form == "json" or not heard:
                print(json.dumps({"error": _as_json(error)}, ensure_ascii=False), flush=True)
            return int(failure(error).status)
        if form == "json" and completed is not None:
            print(json.dumps(outcome(turn[0], completed, notices), ensure_ascii=False), flush=True)
    if pressed.is_set():
        return int(Exit.INTERRUPTED)
    broken_off = completed is not None and completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    return int(Exit.FAILED if broken_off else Exit.OK)


def _print_event(event: chat_pb2.Event) -> None:
    shape = MessageToDict(event, preserving_proto_field_name=True)
    print(json.dumps(shape, ensure_ascii=False), flush=True)


def remark(completed: chat_pb2.Completed, *, cancelled: bool) -> str:
    """Return what a person should know of an answer that is not whole or has no text; empty when all is well.

    `cancelled`: by that person, who knows.
    """
    if completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED:
        return "" if cancelled else "somebody else cancelled the answer: it is not whole"
    if completed.finish_reason == message_pb2.FINISH_REASON_LENGTH:
        return "the answer was cut at the limit of its length"
    if completed.finish_reason == message_pb2.FINISH_REASON_UPSTREAM_ERROR:
        return "the answer broke off: its model failed, and the route keeps what it had said (`on_failure: stop`)"
    return "" if completed.text.strip() or completed.attachments else "the answer is empty"


def outcome(turn: str, completed: chat_pb2.Completed, notices: Sequence[chat_pb2.Notice]) -> dict[str, Any]:
    """Return a whole answer as the JSON object of `moltbot chat --json`. Times in milliseconds."""
    timings = completed.timings
    stages = ("accept", "queue", "first_token", "generation", "total")
    reason = message_pb2.FinishReason.Name(completed.finish_reason).removeprefix("FINISH_REASON_").lower()
    return {
        "text": completed.text,
        "session": turn.partition("/turns/")[0],
        "turn": turn,
        "model": completed.model,
        "reasoning": completed.reasoning,
        "cached": completed.cached,
        "finish_reason": reason,
        "notices": [_notice(notice) for notice in notices],
        "usage": {
            "input_tokens": completed.usage.input_tokens,
            "output_tokens": completed.usage.output_tokens,
            "cached_input_tokens": completed.usage.cached_input_tokens,
        },
        "timings": {
            **{f"{stage}_ms": _ms(getattr(timings, stage)) for stage in stages},
            "history_messages": timings.history_messages,
            "trimmed_messages": timings.trimmed_messages,
            "attempts": timings.attempts,
        },
        "attempts": [_attempt(attempt) for attempt in timings.attempt_log],
    }


def _notice(notice: chat_pb2.Notice) -> dict[str, str]:
    return {"code": notice.code, "from": getattr(notice, "from"), "to": notice.to, "reason": notice.reason}


def _attempt(attempt: chat_pb2.Attempt) -> dict[str, Any]:
    first = attempt.first_token
    return {
        "model": attempt.model,
        "outcome": attempt.outcome,
        "reason": attempt.reason,
        "start_ms": _ms(attempt.start),
        "first_token_ms": _ms(first) if attempt.HasField("first_token") else None,
        "total_ms": _ms(attempt.total),
    }


def _ms(span: Duration) -> float:
    return round(span.ToNanoseconds() / 1e6, 3)


def _as_json(error: MoltBotClientError) -> dict[str, Any]:
    return {
        "code": error.code.name,
        "reason": error.reason,
        "message": _message(error),
        "retryable": error.retryable,
        "retry_after": error.retry_after,
        "fields": error.fields,
    }


def _model(name: str) -> str:
    return name if not name or name.startswith("models/") else f"models/{name}"


async def ask_first(place: Place, text: str) -> None:
    """Ask the first question of `moltbot start` and print the answer with its times."""
    async with place.connect() as bot:
        began, first = time.perf_counter(), 0.0
        print(f"\nYou      {text}\nMoltBot  ", end="", flush=True)
        async with aclosing(bot.stream_turn(text, channel=CHANNEL)) as events:
            async for event in events:
                if event.HasField("text_delta"):
                    first = first or time.perf_counter()
                    print(harmless(event.text_delta.text), end="", flush=True)
                elif event.HasField("reset"):
                    print(f"\nMoltBot  {harmless(event.reset.text)}", end="", flush=True)
                elif event.HasField("failed"):
                    raise from_event(event.failed)
        total = time.perf_counter() - began
        print(f"\n         ({(first or began) - began:.3f} s to the first word, {total:.3f} s in all)", flush=True)
