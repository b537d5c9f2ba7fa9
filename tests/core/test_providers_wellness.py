"""A remote model that fails is told in the log once, with its cause; and once when it answers again."""

from __future__ import annotations

import pytest
from moltbot_server.config_models import ProviderModel
from moltbot_server.errors import MoltBotError
from moltbot_server.models.providers import ProviderEngine
from moltbot_server.models.providers.wellness import Wellness
from moltbot_server.testing_provider import MockProvider, Script
from moltbot_server.turns import GenerationOptions
from provider_kit import HELLO, Heard, Wire, answered, provider, response, started

SECRET = "what somebody said"


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str]]:
    """The lines about how models are: level, model, and what is wrong."""
    return [
        (each.levelname, vars(each)["model"], vars(each).get("problem", ""))
        for each in caplog.records
        if each.name.endswith(".wellness")
    ]


async def failing(engine: ProviderEngine, times: int) -> None:
    for _ in range(times):
        with pytest.raises(MoltBotError):
            await answered(engine)


async def test_a_model_that_is_gone_is_told_once_and_so_is_that_it_answers_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    ill = MockProvider(Script.read({"faults": ["cut"]}))
    async with ill.running() as mock, started(provider(mock.address)) as engine:
        await failing(engine, 3)
        mock.follow(Script.read({"text": "Well."}))
        await answered(engine)
        await answered(engine)
    first, last = told(caplog)
    assert (first[:2], last) == (("WARNING", "mock-model"), ("INFO", "mock-model", ""))
    assert "broke off" in first[2]


async def test_a_server_that_is_down_is_told_with_the_model_and_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    async with MockProvider(Script.read({})).running() as mock:
        address = mock.address
    async with started(provider(address), model=ProviderModel(name="anything")) as engine:
        await failing(engine, 2)
    ((level, model, problem),) = told(caplog)
    assert (level, model) == ("WARNING", "anything")
    assert "cannot be reached" in problem
    assert "a-good-key" not in caplog.text


def refusal(status: str) -> bytes:
    """A refusal that repeats what was said."""
    said = f'{{"error": {{"message": "no: {SECRET}"}}}}'
    return response(said.encode(), head=f"HTTP/1.1 {status}", content_type="application/json")


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        ("404 Not Found", "has no model mock-model"),
        ("500 Internal Server Error", "failed (500)"),
        ("401 Unauthorized", "refuses the key (401)"),
        ("400 Bad Request", ""),  # the caller's own
        ("429 Too Many Requests", ""),  # it is well, and has much to do
    ],
)
async def test_what_is_wrong_with_the_model_is_told_and_nothing_of_what_was_said(
    caplog: pytest.LogCaptureFixture, status: str, problem: str
) -> None:
    async with Wire(refusal(status)).running() as wire, started(provider(wire.address)) as engine:
        await failing(engine, 1)
    found = [each for _, _, each in told(caplog)]
    assert len(found) == bool(problem)
    assert all(problem in each and SECRET not in each for each in found)


async def test_a_model_that_is_taken_away_is_not_ill(caplog: pytest.LogCaptureFixture) -> None:
    heard = Heard()
    async with Wire(b"").running() as wire:
        async with started(provider(wire.address)) as engine:
            engine.begin(HELLO, GenerationOptions(), heard)
            await wire.asked.wait()
        with pytest.raises(MoltBotError, match="taken away"):
            await heard.finished()
    assert told(caplog) == []


def test_a_model_that_fails_now_and_then_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now = 0.0
    wellness = Wellness(provider="p", model="m", clock=lambda: now)
    for second in range(120):
        now = float(second)
        wellness.failed("it broke")
        wellness.worked()
    assert [level for level, _, _ in told(caplog)] == ["WARNING", "INFO"] * 2
