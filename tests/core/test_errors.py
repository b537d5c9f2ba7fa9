"""The tree of errors, the contract's enum and the page are one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.rpc import code_pb2
from moltbot.v1 import error_pb2
from moltbot_server.errors import InvalidField, MoltBotError, every_error, markdown

ERRORS = list(every_error())
CONTRACT = Path(__file__).parents[2] / "proto/moltbot/v1/error.proto"


def test_the_reasons_of_the_tree_are_those_of_the_contract_in_its_order() -> None:
    contract = [value.name.removeprefix("ERROR_REASON_") for value in error_pb2.ErrorReason.DESCRIPTOR.values]

    assert contract == ["UNSPECIFIED", *(error.reason for error in ERRORS)]


def test_the_contract_tells_the_status_that_the_tree_gives() -> None:
    told = {
        reason: status
        for status, reason in re.findall(
            r"// ([A-Z_]+): [^\n]*\n(?:  //[^\n]*\n)*  ERROR_REASON_([A-Z_]+) =", CONTRACT.read_text("utf-8")
        )
    }

    assert told == {error.reason: error.status.name for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.reason)
def test_each_error_has_a_canonical_status_a_sentence_and_advice(error: type[MoltBotError]) -> None:
    assert code_pb2.Code.Name(int(error.status)) == error.status.name
    assert error.__doc__
    assert error.__doc__.endswith(".")
    assert error.advice.endswith(".")
    assert f"| `{error.reason}` | `{error.status.name}` | {'yes' if error.retryable else 'no'} |" in markdown()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.reason)
def test_only_what_may_pass_is_retryable(error: type[MoltBotError]) -> None:
    may_pass = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"}

    # A budget passes too, but not while anybody waits.
    lasts = {"BUDGET_EXCEEDED"}
    may = error.status.name in may_pass or error.reason == "SESSION_BUSY"
    assert error.retryable == (may and error.reason not in lasts)


def test_the_page_is_that_of_the_tree() -> None:
    page = Path(__file__).parents[2] / "docs/errors.md"

    assert page.read_text("utf-8") == markdown()
    assert markdown().count("\n| `") == len(ERRORS)


def test_a_wrong_field_is_named_with_its_problem() -> None:
    error = InvalidField("turn.parts[3]", "is odd")

    assert error.fields == {"turn.parts[3]": "is odd"}
    assert error.message == "turn.parts[3]: is odd"
