"""What the command says of an answer that it could not get whole."""

from __future__ import annotations

import grpc
import pytest
from moltbot import MoltBotClientError
from moltbot.v1 import chat_pb2, message_pb2
from moltbot_server.cli.asking import Place, remark
from moltbot_server.cli.terminal import Exit

PLACE = Place(address="a:1", key="k", start="moltbot start --workspace w", show="moltbot session --workspace w show")
AWAY = MoltBotClientError(grpc.StatusCode.UNAVAILABLE, "nobody answers at a:1: start MoltBot with `moltbot start`")


def test_the_command_that_starts_the_core_is_that_of_its_workspace() -> None:
    failure = PLACE.failure(AWAY, "")
    assert failure.status is Exit.UNAVAILABLE
    assert "start MoltBot with `moltbot start --workspace w`" in failure.message
    assert "\n" not in failure.message


def test_an_answer_that_was_cut_is_told_where_it_will_be() -> None:
    failure = PLACE.failure(AWAY, "sessions/s/turns/1")
    assert "`moltbot session --workspace w show sessions/s` has it once it is there" in failure.message
    refused = MoltBotClientError(grpc.StatusCode.FAILED_PRECONDITION, "no")
    assert "session" not in PLACE.failure(refused, "sessions/s/turns/1").message


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0004, "a moment"), (0.9, "a moment"), (1.0, "1 s"), (90.0, "1 min 30 s")]
)
def test_a_wait_is_never_told_to_be_none(seconds: float, told: str) -> None:
    full = MoltBotClientError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after=seconds)
    assert PLACE.failure(full, "").message == f"full. Try again in {told}. (QUEUE_FULL)"


@pytest.mark.parametrize(
    ("field", "told"),
    [("turn.parts", "it is blank"), ("turn.parts[0].text", "it is blank"), ("turn.model", "turn.model: it is blank")],
)
def test_who_types_a_message_is_not_told_its_field(field: str, told: str) -> None:
    fields = {field: "it is blank"}
    blank = MoltBotClientError(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: it is blank", reason="WRONG", fields=fields)
    assert PLACE.failure(blank, "").message == f"{told} (WRONG)"


@pytest.mark.parametrize(("cancelled", "said"), [(False, "somebody else cancelled the answer"), (True, "")])
def test_who_did_not_cancel_an_answer_is_told_that_somebody_did(cancelled: bool, said: str) -> None:
    completed = chat_pb2.Completed(text="half", finish_reason=message_pb2.FINISH_REASON_CANCELLED)
    assert remark(completed, cancelled=cancelled).startswith(said)
    assert bool(remark(completed, cancelled=cancelled)) is not cancelled
