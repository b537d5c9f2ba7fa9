"""Errors on the wire: a status, a reason, a way out, and never the inside of the core."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from moltbot.errors import from_status
from moltbot.v1 import message_pb2
from moltbot_server.errors import InvalidField, MoltBotError, every_error
from moltbot_server.models.engine import NOBODY, Asker, Capabilities, Finished, Generation, Listener
from moltbot_server.testing import Script, ScriptedEngine, running_server
from moltbot_server.turns import GenerationOptions, Message
from rpc_calls import Api, WatchedEngine, details_of, info_of, reason_of, refused, turn


class BrokenEngine(ScriptedEngine):
    """Raises what its message names: a meaning with all that it can carry, or a fault that nobody foresaw."""

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Fail: foreseen faults break the answer, others its beginning."""
        listener.wrote("so far", 1)
        text = messages[-1].text
        for error in every_error():
            if error.reason == text:
                listener.ended(_failure(error))
                return super().begin(messages, options, Deaf())
        raise ZeroDivisionError("secret of the core: /etc/passwd")


def _failure(error: type[MoltBotError]) -> MoltBotError:
    if issubclass(error, InvalidField):
        refusal = error("turn.parts", "told to the caller")
        refusal.retry_after = 1.5
        return refusal
    return error("told to the caller", retry_after=1.5)


class Deaf:
    """Hears nothing."""

    def queued(self, position: int) -> None:
        pass

    def wrote(self, text: str, tokens: int) -> None:
        pass

    def ended(self, end: Finished | Exception) -> None:
        pass


@pytest.fixture
def engine() -> WatchedEngine:
    """The engine that fails."""
    return BrokenEngine(Script(continuation=False))  # type: ignore[return-value]


@pytest.mark.parametrize("error", list(every_error()), ids=lambda error: error.reason)
async def test_each_error_is_told_with_its_status_its_reason_and_when_to_come_back(
    api: Api, error: type[MoltBotError]
) -> None:
    told = await refused(api.run(turn(error.reason)))
    events = await api.events(turn(error.reason))

    assert told.code().value[0] == int(error.status)
    assert (reason_of(told), info_of(told).metadata["retryable"]) == (
        error.reason,
        "true" if error.retryable else "false",
    )
    assert from_status(told, "").retryable is error.retryable
    assert (told.details() or "").removeprefix("turn.parts: ") == "told to the caller"
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in details_of(told))
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert dict(told.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "1500"
    failed = events[-1].failed
    assert (failed.code, failed.reason, failed.retryable, failed.message) == (
        int(error.status),
        error.reason,
        error.retryable,
        told.details(),
    )
    assert failed.retry_delay.ToMilliseconds() == 1500


async def test_a_fault_that_nobody_foresaw_tells_an_id_and_nothing_else(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="moltbot_server"):
        error = await refused(api.run(turn("boom")))

    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    told = (error.details() or "") + str(details_of(error))
    assert not any(word in told for word in ("secret", "passwd", "ZeroDivision", "Traceback", ".py"))
    record = next(record for record in caplog.records if record.name == "moltbot_server.turn_run")
    assert record.incident in (error.details() or "")  # type: ignore[attr-defined]
    assert "boom" not in record.getMessage()


async def test_a_wrong_field_is_named(api: Api) -> None:
    error = await refused(api.run(turn(options=message_pb2.GenerationOptions(temperature=9))))

    request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(request) for detail in details_of(error))
    assert [violation.field for violation in request.field_violations] == ["turn.options.temperature"]


@pytest.mark.parametrize("option", ["temperature", "seed", "repetition_penalty"])
async def test_an_option_that_the_model_cannot_honour_is_named_as_the_caller_sent_it(
    tmp_path: Path, option: str
) -> None:
    engine = ScriptedEngine(capabilities=Capabilities(context_length=100))
    async with running_server(tmp_path, engine=engine) as server:
        api = Api.of(server)
        error = await refused(api.run(turn(options=message_pb2.GenerationOptions(**{option: 1}))))
        await api.channel.close()

    assert reason_of(error) == "UNSUPPORTED_OPTION"
    violated = error_details_pb2.BadRequest()
    assert any(detail.Unpack(violated) for detail in details_of(error))
    assert [violation.field for violation in violated.field_violations] == [f"turn.options.{option}"]


async def test_many_errors_at_once_each_get_their_own(api: Api) -> None:
    reasons = [error.reason for error in every_error()] * 5
    told = await asyncio.gather(*(refused(api.run(turn(reason))) for reason in reasons))

    assert [reason_of(error) for error in told] == reasons
