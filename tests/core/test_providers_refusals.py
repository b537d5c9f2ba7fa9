"""What the refusals of providers mean, how long they ask to wait, and how long something rests."""

from __future__ import annotations

import email.utils
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moltbot_server.errors import (
    ContentTooLarge,
    ContextLengthExceeded,
    InvalidField,
    ModelCredential,
    ModelUnavailable,
    MoltBotError,
    QueueFull,
)
from moltbot_server.models.providers import Cooldowns
from moltbot_server.models.providers.cooldowns import LONGEST_REST, Cause, Place
from moltbot_server.models.providers.keys import ProviderKey, scrubbed
from moltbot_server.models.providers.refusals import refusal, refusal_in_stream
from moltbot_server.models.providers.waits import asked_wait

NOW = 1_790_000_000.0


@pytest.mark.parametrize(
    ("status", "body", "error", "cause"),
    [
        (401, {"error": {"message": "x"}}, ModelCredential, Cause.CREDENTIAL),
        (403, {"message": "x"}, ModelCredential, Cause.CREDENTIAL),
        (402, {"error": {"message": "Insufficient Balance"}}, ModelCredential, Cause.CREDENTIAL),
        (429, {"error": {"code": "insufficient_quota"}}, ModelCredential, Cause.CREDENTIAL),
        (429, {"error": {"code": "1113", "message": "余额不足"}}, ModelCredential, Cause.CREDENTIAL),
        (400, {"error": {"code": "Arrearage"}}, ModelCredential, Cause.CREDENTIAL),
        (
            400,
            {"error": {"message": "Your credit balance is too low to use the API"}},
            ModelCredential,
            Cause.CREDENTIAL,
        ),
        (429, {"error": {"type": "rate_limit_error"}}, QueueFull, Cause.LIMIT),
        (404, {"error": {"code": "model_not_found", "message": "no such model"}}, ModelUnavailable, None),
        (400, {"error": {"code": "1211", "message": "模型不存在"}}, ModelUnavailable, None),
        (400, {"error": {"code": "context_length_exceeded"}}, ContextLengthExceeded, None),
        (
            400,
            {"error": {"message": "This model's maximum context length is 8192 tokens"}},
            ContextLengthExceeded,
            None,
        ),
        (
            400,
            {"error": {"message": "prompt is too long: 210000 tokens > 200000 maximum"}},
            ContextLengthExceeded,
            None,
        ),
        (400, {"error": {"message": "Range of input length should be [1, 30720]"}}, ContextLengthExceeded, None),
        (400, {"error": {"type": "exceed_context_size_error", "message": "x"}}, ContextLengthExceeded, None),
        (400, {"error": {"message": "Your request exceeded model token limit: 8192"}}, ContextLengthExceeded, None),
        (413, {"error": {"message": "Request too large"}}, ContentTooLarge, None),
        (400, {"error": {"message": "bad", "param": "temperature"}}, InvalidField, None),
        (422, {"detail": [{"loc": ["body"]}]}, InvalidField, None),
        (500, {"error": "x"}, ModelUnavailable, None),
        (529, {"type": "error", "error": {"type": "overloaded_error"}}, ModelUnavailable, None),
        (418, None, ModelUnavailable, None),
        (301, None, ModelUnavailable, None),
        (204, None, ModelUnavailable, None),
    ],
)
def test_a_refusal_has_the_meaning_of_its_status_and_its_words(
    status: int, body: object, error: type[MoltBotError], cause: Cause | None
) -> None:
    found = refusal("Acme", "m", status, {}, json.dumps(body).encode(), [])
    assert type(found.error) is error
    assert (found.cause, found.filtered) == (cause, False)
    assert "Acme" in found.error.message or isinstance(found.error, ContextLengthExceeded)


def test_the_field_that_a_provider_blames_is_named_as_ours() -> None:
    for param, field in (
        ("max_tokens", "options.max_output_tokens"),
        ("stop", "options.stop"),
        ("tools[0].function", "options.tools"),
        ("messages[3].content", "parts"),
        (None, "parts"),
    ):
        found = refusal("A", "m", 400, {}, json.dumps({"error": {"message": "bad", "param": param}}).encode(), [])
        assert isinstance(found.error, InvalidField)
        assert (found.error.field, found.error.message) == (field, f"{field}: A refuses the request: bad")


@pytest.mark.parametrize("code", ["content_filter", "data_inspection_failed", "DataInspectionFailed", "1301"])
def test_a_filtered_conversation_is_no_fault(code: str) -> None:
    assert refusal("A", "m", 400, {}, json.dumps({"error": {"code": code}}).encode(), []).filtered


def test_a_word_about_a_key_is_never_passed_on() -> None:
    body = json.dumps({"error": {"message": "Incorrect API key provided: sk-ab***1234"}}).encode()
    assert "1234" not in refusal("A", "m", 401, {}, body, []).error.message


def test_what_is_told_is_one_short_line_without_keys() -> None:
    text = "first line\nsecond\x1b[31m sk-verysecretkey0123 Bearer abcdefgh my-own-secret " + "x" * 5000
    found = refusal("A", "m", 400, {}, json.dumps({"error": {"message": text}}).encode(), ["my-own-secret"])
    told = found.error.message
    assert told.startswith("parts: A refuses the request: first line second[31m [key] [key] [key] xxx")
    assert len(told) < 400
    assert told.isprintable()


@given(st.binary(max_size=200))
def test_any_body_of_a_refusal_can_be_read(body: bytes) -> None:
    for status in (400, 401, 404, 429, 500):
        assert isinstance(refusal("A", "m", status, {}, body, []).error, MoltBotError)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["error", "message", "code", "type"]), inner),
        max_leaves=6,
    )
)
def test_any_error_inside_a_stream_can_be_read(found: object) -> None:
    assert isinstance(refusal_in_stream("A", "m", found, []).error, MoltBotError)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "20"}, 20),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "0"}, 0),
        ({"retry-after": email.utils.formatdate(NOW + 30, usegmt=True)}, 30),
        ({"retry-after": email.utils.formatdate(NOW - 30, usegmt=True)}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "99999999"}, LONGEST_REST),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        (
            {
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-reset-requests": "1s",
            },
            360,
        ),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "120ms"}, 0.12),
        ({"x-ratelimit-reset-requests": "1m30.5s", "x-ratelimit-reset-tokens": "2s"}, 2),
        ({"x-ratelimit-reset-requests": "1h", "retry-after": "3"}, 3),
        ({"x-ratelimit-reset-requests": "x" * 100}, None),
    ],
)
def test_the_wait_that_a_provider_asks_for_is_read_in_each_form(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait(headers, NOW) == (seconds if seconds is None else pytest.approx(seconds))


@given(st.text(max_size=30))
def test_no_header_makes_the_wait_raise(text: str) -> None:
    for name in ("retry-after", "retry-after-ms", "x-ratelimit-reset-tokens"):
        found = asked_wait({name: text}, NOW)
        assert found is None or 0 <= found <= LONGEST_REST


# --- rests -----------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


PLACE = Place("p", "m", "k")


def test_each_model_and_key_rests_for_itself() -> None:
    rests = Cooldowns(Clock())
    rests.failed(PLACE, Cause.LIMIT, 20)
    assert rests.rest(PLACE) == 20
    for other in (Place("p", "m", "k2"), Place("p", "m2", "k"), Place("p2", "m", "k"), Place("p", "m")):
        assert rests.rest(other) == 0
    assert len(rests) == 1


def test_a_rest_grows_with_each_failure_in_a_row_up_to_a_bound() -> None:
    clock = Clock()
    rests = Cooldowns(clock)
    grown = []
    for _ in range(9):
        grown.append(rests.failed(PLACE, Cause.CREDENTIAL))
        clock.now += grown[-1]
    assert grown == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    limits = [rests.failed(PLACE._replace(model="other"), cause) for cause in (Cause.LIMIT, Cause.OUTAGE)]
    assert limits == [1, 1]
    for _ in range(5):
        clock.now += 20
        limits = [rests.failed(PLACE._replace(model="other"), Cause.LIMIT)]
    assert limits == [8]  # nobody waits longer than ten seconds for what is well again
    rests.worked(PLACE)
    assert rests.failed(PLACE, Cause.CREDENTIAL) == 5


def test_calls_that_were_under_way_when_a_rest_began_neither_shorten_nor_lengthen_it() -> None:
    clock = Clock()
    rests = Cooldowns(clock)
    assert rests.failed(PLACE, Cause.LIMIT) == 1
    for _ in range(5):
        rests.failed(PLACE, Cause.LIMIT)
    assert rests.rest(PLACE) == 1
    clock.now += 1
    assert rests.failed(PLACE, Cause.LIMIT) == 2


def test_an_answer_that_was_under_way_when_a_rest_began_does_not_end_it() -> None:
    clock = Clock()
    rests = Cooldowns(clock)
    rests.failed(PLACE, Cause.LIMIT, 20)
    rests.worked(PLACE)
    assert rests.rest(PLACE) == 20
    clock.now += 20
    rests.worked(PLACE)
    assert rests.is_quiet


def test_what_the_provider_asks_for_is_kept_to_and_the_longest_holds() -> None:
    clock = Clock()
    rests = Cooldowns(clock)
    rests.failed(PLACE, Cause.LIMIT, 20)
    rests.failed(PLACE, Cause.LIMIT, 5)
    assert rests.rest(PLACE) == 20
    clock.now += 19.99
    assert rests.cause(PLACE) is Cause.LIMIT
    clock.now += 0.02
    assert (rests.rest(PLACE), rests.cause(PLACE), len(rests)) == (0, None, 0)


def test_old_failures_are_forgotten() -> None:
    clock = Clock()
    rests = Cooldowns(clock)
    for _ in range(4):
        clock.now += rests.failed(PLACE, Cause.LIMIT)
    clock.now += 3600
    assert rests.failed(PLACE, Cause.LIMIT) == 1


def test_rests_take_little_room_however_many_there_were() -> None:
    clock = Clock()
    rests = Cooldowns(clock)
    for at in range(20_000):
        clock.now += rests.failed(Place("p", "m", str(at)), Cause.LIMIT)
    assert len(rests._rests) < 5000


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_shown_by_its_id_alone() -> None:
    key = ProviderKey(id="main", text="sk-very-secret")
    assert repr(key) == "ProviderKey(id='main')"


@pytest.mark.parametrize(
    "text", ["Bearer abcd1234", "sk-proj-abcdef123", "api_key=abcdefgh12", "gsk_abcdefghij", "token: x sk-abcdefg"]
)
def test_what_looks_like_a_key_is_hidden(text: str) -> None:
    hidden = scrubbed(f"see {text} here", [])
    assert "[key]" in hidden
    assert "abcd" not in hidden


def test_an_ordinary_text_stays_as_it_is() -> None:
    text = "The keyboard has a token-ring and 5 keys; max_tokens=100 is too large for the sketch"
    assert scrubbed(text, [""]) == text
