"""Several keys of one provider: who is asked with which, which ones rest, and that none is ever shown."""

from __future__ import annotations

import json
import logging
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moltbot_server.config_models import Provider, ProviderModel
from moltbot_server.errors import ModelCredential, ModelUnavailable, QueueFull
from moltbot_server.models.providers import Cooldowns, Pools, ProviderEngine, ProviderKey
from moltbot_server.models.providers.keys import scrubbed
from moltbot_server.models.providers.withholding import Withholding
from moltbot_server.testing_provider import MockProvider, Script
from moltbot_server.turns import GenerationOptions, Tool, ToolCallPart
from provider_kit import DONE, HELLO, STOP, Heard, Ring, Wire, answered, provider, response, started, stream, word

DIALECTS = ("openai", "anthropic")
GREETING = "Grüße 你好"
KEY = "sk-planted-0123456789abcdef"


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def mock() -> AsyncIterator[MockProvider]:
    """A provider that greets."""
    async with MockProvider(Script.read({"text": GREETING})).running() as running:
        yield running


def follow(mock: MockProvider, *faults: dict[str, Any], **fields: Any) -> None:
    mock.follow(Script.read({"text": GREETING, "faults": list(faults), **fields}))


async def test_keys_are_used_in_turn(mock: MockProvider) -> None:
    async with started(provider(mock.address), Ring("key-aaaa", "key-bbbb", "key-cccc")) as engine:
        for _ in range(6):
            await answered(engine)
    assert [call["key"] for call in mock.calls.shown()["calls"]] == ["aaaa", "bbbb", "cccc"] * 2


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_next_key_answers_when_one_is_refused_and_the_refused_one_rests(
    mock: MockProvider, dialect: str, caplog: pytest.LogCaptureFixture
) -> None:
    follow(mock, keys=["key-good"])
    async with started(provider(mock.address, dialect), Ring("key-badd", "key-good")) as engine:
        with caplog.at_level(logging.WARNING):
            for _ in range(4):
                heard, _ = await answered(engine)
                assert heard.text == GREETING
        assert engine.rest == 0
        assert engine.numbers["keys_resting"] == 1
    assert mock.calls.shown()["outcomes"] == {"wrong_key": 1, "answered": 4}
    assert [(record.message, record.__dict__["key"]) for record in caplog.records] == [
        ("a provider refuses a key for a while", "key-0")
    ]


async def test_an_answer_has_the_next_key_after_a_limit_too(mock: MockProvider) -> None:
    follow(mock, {"kind": "rate_limit", "retry_after": 20, "until": "1 calls"})
    clock = Clock()
    async with started(provider(mock.address), Ring("key-aaaa", "key-bbbb"), cooldowns=Cooldowns(clock)) as engine:
        for _ in range(3):
            await answered(engine)
        assert [call["key"] for call in mock.calls.shown()["calls"]] == ["aaaa", "bbbb", "bbbb", "bbbb"]
        clock.now += 19.9
        await answered(engine)
        clock.now += 0.2
        await answered(engine)
        assert [call["key"] for call in mock.calls.shown()["calls"]][4:] == ["bbbb", "aaaa"]


async def test_retry_after_is_obeyed_to_the_second_when_there_is_one_key(mock: MockProvider) -> None:
    follow(mock, {"kind": "rate_limit", "retry_after": 20, "until": "1 calls"})
    clock = Clock()
    async with started(provider(mock.address), cooldowns=Cooldowns(clock)) as engine:
        with pytest.raises(QueueFull) as refused:
            await answered(engine)
        assert (refused.value.retry_after, engine.rest) == (20, 20)
        clock.now += 19.5
        with pytest.raises(QueueFull) as again:
            engine.begin(HELLO, GenerationOptions(), Heard())
        assert again.value.retry_after == pytest.approx(0.5)
        assert mock.calls.shown()["total"] == 1  # not asked while it rests
        clock.now += 0.6
        assert engine.rest == 0
        await answered(engine)


async def test_keys_that_are_all_refused_are_told_as_such_and_not_tried_all_the_time(mock: MockProvider) -> None:
    follow(mock, keys=["another"])
    async with started(provider(mock.address), Ring("key-aaaa", "key-bbbb")) as engine:
        for _ in range(3):
            with pytest.raises(ModelCredential):
                await answered(engine)
        assert mock.calls.shown()["outcomes"] == {"wrong_key": 2}
        assert engine.rest > 4


async def test_a_key_without_quota_is_a_matter_of_the_key(mock: MockProvider) -> None:
    follow(mock, out_of_quota=["key-aaaa"])
    async with started(provider(mock.address), Ring("key-aaaa")) as engine:
        with pytest.raises(ModelCredential, match="quota or balance is used up"):
            await answered(engine)


async def test_a_key_that_is_added_is_used_by_the_next_turn(mock: MockProvider) -> None:
    follow(mock, keys=["key-new"])
    ring = Ring("key-old")
    async with started(provider(mock.address), ring) as engine:
        with pytest.raises(ModelCredential):
            await answered(engine)
        ring.mine = [ProviderKey(id="fresh", text="key-new")]
        heard, _ = await answered(engine)
        assert heard.text == GREETING
        ring.mine = []
        engine_without = engine.numbers["keys"]
        assert engine_without == 0


async def test_a_provider_that_needs_a_key_is_not_asked_without_one() -> None:
    engine = ProviderEngine(Provider(name="openai"), ProviderModel(name="gpt-4o"))
    await engine.start()
    assert not engine.healthy
    with pytest.raises(ModelCredential, match="moltbot key add openai"):
        engine.begin(HELLO, GenerationOptions(), Heard())
    await engine.close()


async def test_a_provider_that_needs_none_is_asked_without_one() -> None:
    async with (
        Wire(stream(word("free"), STOP, DONE)).running() as wire,
        started(provider(wire.address), Ring()) as engine,
    ):
        assert engine.healthy
        heard, _ = await answered(engine)
        assert heard.text == "free"
        assert b"authorization" not in wire.requests[0].lower()


@pytest.mark.parametrize(
    ("status", "error", "line"),
    [
        ("401 Unauthorized", ModelCredential, "a provider wants a key and has none"),
        ("429 Too Many Requests", QueueFull, "a provider takes no requests for a while"),
    ],
)
async def test_the_log_names_no_key_where_there_is_none(
    status: str, error: type[Exception], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = response(b"{}", head=f"HTTP/1.1 {status}", content_type="application/json")
    async with Wire(refusal).running() as wire, started(provider(wire.address), Ring()) as engine:
        with caplog.at_level(logging.WARNING), pytest.raises(error):
            await answered(engine)
    (record,) = (each for each in caplog.records if each.name.endswith(".answer"))
    assert (record.message, record.__dict__["provider"], "key" in record.__dict__) == (line, engine.type, False)


async def test_what_was_learned_of_keys_outlives_an_engine(mock: MockProvider) -> None:
    follow(mock, {"kind": "rate_limit", "retry_after": 20})
    cooldowns, pools = Cooldowns(), Pools()
    async with started(provider(mock.address), cooldowns=cooldowns, pools=pools) as engine:
        with pytest.raises(QueueFull):
            await answered(engine)
    async with started(provider(mock.address), cooldowns=cooldowns, pools=pools) as engine:
        assert engine.rest > 19


async def test_a_whole_provider_that_says_it_is_down_rests_with_all_keys() -> None:
    down = response(b"{}", head="HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7", content_type="application/json")
    clock = Clock()
    async with (
        Wire(down).running() as wire,
        started(provider(wire.address), Ring("key-aaaa", "key-bbbb"), cooldowns=Cooldowns(clock)) as engine,
    ):
        with pytest.raises(ModelUnavailable) as refused:
            await answered(engine)
        assert (refused.value.retry_after, engine.rest) == (7, 7)
        with pytest.raises(ModelUnavailable, match="down"):
            engine.begin(HELLO, GenerationOptions(), Heard())
        assert len(wire.requests) == 1
        clock.now += 7.1
        assert engine.rest == 0


async def test_a_key_never_appears_in_what_is_said_or_shown(caplog: pytest.LogCaptureFixture) -> None:
    secret = "sk-proj-3vERySeCrEt0123456789"
    body = b'{"error":{"message":"bad key %b (Bearer %b) sk-other-12345678"}}' % (secret.encode(), secret.encode())
    texts: list[str] = []
    for status in (400, 401, 403, 404, 413, 422, 429, 500, 503):
        refused = response(body, head=f"HTTP/1.1 {status} No", content_type="application/json")
        inside = response(body)
        for answer in (refused, inside, stream(body.decode())):
            ring = Ring(secret)
            async with Wire(answer).running() as wire, started(provider(wire.address), ring) as engine:
                with caplog.at_level(logging.DEBUG), pytest.raises(Exception) as caught:  # noqa: PT011 - any will do
                    await answered(engine)
                assert secret.encode() in wire.requests[0]
                texts += [repr(caught.value), str(caught.value), repr(engine), repr(ring.mine), repr(vars(engine))]
    told = " ".join(texts) + caplog.text + repr([record.__dict__ for record in caplog.records])
    assert secret not in told
    assert "sk-other-12345678" not in told
    assert "[key]" in told


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("cut", [1, 3, 7, 1000])
async def test_a_key_that_comes_back_in_an_answer_is_not_told_however_it_is_cut(
    mock: MockProvider, dialect: str, cut: int
) -> None:
    text = f"Yes, it is {KEY}; so it {KEY[:9]} is{KEY}{KEY} not {KEY[:-1]} sk"
    mock.follow(Script.read({"text": text, "chunks": -(-len(text) // cut)}))
    async with started(provider(mock.address, dialect), Ring(KEY)) as engine:
        heard, end = await answered(engine)
    assert heard.text == text.replace(KEY, "[key]")
    assert KEY not in heard.text
    assert end.usage.output_tokens > 0


async def test_a_key_that_comes_back_in_the_calls_of_tools_is_not_told() -> None:
    tool = Tool(name="weather", parameters_json="{}")
    calls = [
        {"index": at, "id": f"call_{KEY}", "function": {"name": "weather", "arguments": json.dumps({"city": KEY})}}
        for at in range(2)
    ]
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": calls}}]})
    async with Wire(stream(chunk, STOP, DONE)).running() as wire, started(provider(wire.address), Ring(KEY)) as engine:
        _, end = await answered(engine, options=GenerationOptions(tools=(tool,)))
    found = [part for part in end.attachments if isinstance(part, ToolCallPart)]
    assert KEY not in repr(end)
    assert [json.loads(part.arguments_json) for part in found] == [{"city": "[key]"}] * 2
    assert len({part.call_id for part in found}) == 2


class Told(Heard):
    """A listener of a text alone, without a loop."""

    def __init__(self) -> None:
        self.text = ""

    def wrote(self, text: str, tokens: int) -> None:
        self.text += text


def test_nothing_is_held_back_of_a_text_that_is_no_key() -> None:
    heard = Told()
    ear = Withholding(heard, [KEY, "short"])
    for piece in ("Hello", " the", "re", ", short"):
        ear.wrote(piece, 1)
    assert heard.text == "Hello there, short"
    ear.wrote(" is", 1)  # a key may begin with its last letter
    assert heard.text == "Hello there, short i"
    ear.wrote(" it", 1)
    assert heard.text == "Hello there, short is it"
    ear.wrote(" sk-", 1)
    ear.let_go()
    assert heard.text == "Hello there, short is it sk-"


@given(st.lists(st.sampled_from(["s", "k", "-", "sk", KEY, KEY[:5], KEY[5:], "x"]), max_size=12), st.integers(1, 40))
def test_what_is_told_is_the_text_without_its_keys(pieces: list[str], size: int) -> None:
    text = "".join(pieces)
    heard = Told()
    ear = Withholding(heard, [KEY])
    for at in range(0, len(text), size):
        ear.wrote(text[at : at + size], 1)
    ear.let_go()
    assert KEY not in heard.text
    assert heard.text == text.replace(KEY, "[key]")


FORMS: dict[str, Callable[[str], str]] = {
    "itself": str,
    "in capitals": str.upper,
    "reversed": lambda key: key[::-1],
    "spaced": " ".join,
    "dashed": "-".join,
    "in an address": lambda key: quote(key, safe=""),
    "all of it in an address": lambda key: "".join(f"%{ord(each):02X}" for each in key),
    "in HTML": lambda key: "".join(f"&#{ord(each)};" for each in key),
    "in HTML by sixteens": lambda key: "".join(f"&#x{ord(each):X};" for each in key),
    "in JSON": lambda key: "".join(f"\\u{ord(each):04x}" for each in key),
    "as octets": lambda key: key.encode().hex(),
    "as octets in capitals": lambda key: key.encode().hex(" ").upper(),
    "in base64": lambda key: b64encode(key.encode()).decode(),
    "in base64 of a header": lambda key: b64encode(f"Bearer {key}".encode()).decode(),
    "in base64 of a user": lambda key: b64encode(f"me:{key}".encode()).decode(),
    "in base64 of an address": lambda key: urlsafe_b64encode(f"x={key}&y".encode()).decode(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("key", [KEY, "AbC~dEf+gHi/jKl=01234567890?>", "0123456789abcdef0123456789abcdef"])
def test_no_form_of_a_key_is_left_in_what_a_provider_says(form: Callable[[str], str], key: str) -> None:
    told = scrubbed(f"You sent ({form(key)}), which nobody knows.", [key])
    assert told.startswith("You sent (")
    assert told.endswith(" which nobody knows.")
    left = told.removeprefix("You sent (").removesuffix(", which nobody knows.").replace("[key]", "")
    assert len(left) <= 14, left  # what of base64 belongs to its neighbours


def test_what_a_provider_says_is_left_as_it_is_without_a_key() -> None:
    told = "Rate limit reached for gpt-x in organization org-1 on tokens per min: limit 30000, used 29000."
    assert scrubbed(told, [KEY, "0123456789abcdef0123456789abcdef", "--------"]) == told
