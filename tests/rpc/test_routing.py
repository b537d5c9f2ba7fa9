"""A route behind a real core: what callers see of a switch, and what is stored of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from moltbot.v1 import chat_pb2
from moltbot_server.config_models import ModelRoute
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engines.scripted import Failure
from moltbot_server.models.routing import RouteEngine
from moltbot_server.testing import Rule, Script, ScriptedEngine, running_server
from rpc_calls import Api, info_of, kinds, refused, turn

FIRST = Script(
    id="first",
    rules=(
        Rule(match="errs", fail=Failure(message="The provider answered 500.")),
        Rule(match="hangs", first_delay=60.0),
        Rule(
            match="breaks off", deltas=("Half of ", "an answer"), fail=Failure(after=1, message="The stream was cut.")
        ),
    ),
)
SECOND = Script(
    id="second",
    rules=(
        Rule(match="all err", fail=Failure(reason="QUEUE_FULL", message="Busy.")),
        Rule(template="From the second."),
    ),
)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """A core whose default model is a route over two scripted ones."""
    models = Catalog([ScriptedEngine(FIRST), ScriptedEngine(SECOND)])
    await models.start()
    route = RouteEngine(ModelRoute(primary="first", fallback=("second",), latency=0.2), models.entry)
    async with running_server(tmp_path / "workspace", engine=route) as server:
        api = Api.of(server)
        yield api
        await api.channel.close()


def _told(events: list[chat_pb2.Event]) -> list[str]:
    return [kind for kind in kinds(events) if kind not in ("accepted", "text_delta")]


async def test_the_switch_before_the_first_word_is_an_event_and_the_answer_names_its_model(api: Api) -> None:
    events = await api.events(turn("It errs", session="sessions/talk"))
    assert _told(events) == ["routed", "notice", "routed", "completed"]
    assert [event.routed.model for event in events if event.HasField("routed")] == ["models/first", "models/second"]
    notice = next(event.notice for event in events if event.HasField("notice"))
    assert (notice.code, getattr(notice, "from"), notice.to, notice.reason) == (
        "FAILOVER", "models/first", "models/second", "The provider answered 500.",
    )  # fmt: skip
    completed = events[-1].completed
    assert (completed.text, completed.model) == ("From the second.", "models/second")
    assert completed.timings.attempts == 2
    assert [(attempt.model, attempt.outcome) for attempt in completed.timings.attempt_log] == [
        ("models/first", "MODEL_UNAVAILABLE"),
        ("models/second", "ANSWERED"),
    ]
    assert [message.model for message in await api.messages("sessions/talk")] == ["", "models/second"]


async def test_a_model_that_hangs_costs_its_threshold_and_little_more(api: Api) -> None:
    began = time.perf_counter()
    answer = await api.run(turn("It hangs"))
    assert 0.2 <= time.perf_counter() - began <= 0.7
    assert answer.completed.text == "From the second."
    slow = answer.completed.timings.attempt_log[0]
    assert (slow.outcome, slow.HasField("first_token")) == ("CANCELLED", False)
    assert 0.2 <= slow.total.ToNanoseconds() / 1e9 <= 0.7


async def test_an_answer_that_broke_off_is_taken_back_and_only_the_new_one_is_stored(api: Api) -> None:
    events = await api.events(turn("It breaks off", session="sessions/talk"))
    shown = ""
    for event in events:
        shown = event.reset.text if event.HasField("reset") else shown + event.text_delta.text
    assert _told(events) == ["routed", "notice", "routed", "reset", "completed"]
    assert shown == events[-1].completed.text == "From the second."
    assert await api.said("sessions/talk") == ["It breaks off", "From the second."]
    assert await api.resumed(events[0].accepted.turn) == events


async def test_a_first_choice_that_answers_is_told_of_once_and_logs_nothing(api: Api) -> None:
    events = await api.events(turn("Hello"))
    assert _told(events) == ["routed", "completed"]
    timings = events[-1].completed.timings
    assert (timings.attempts, list(timings.attempt_log)) == (1, [])
    assert events[-1].completed.model == "models/first"


async def test_a_turn_that_nobody_could_answer_says_who_was_asked(api: Api) -> None:
    events = await api.events(turn("They all err, it errs"))
    failed = events[-1].failed
    assert (failed.reason, failed.retryable, failed.timings.attempts) == ("MODEL_UNAVAILABLE", True, 2)
    assert failed.message == (
        "None of the route's 2 models (2 asked) could answer: first: The provider answered 500; second: Busy"
    )
    assert [attempt.outcome for attempt in failed.timings.attempt_log] == ["MODEL_UNAVAILABLE", "QUEUE_FULL"]


async def test_a_core_all_of_whose_models_are_dead_refuses_at_once_and_says_until_when(tmp_path: Path) -> None:
    models = Catalog([ScriptedEngine(FIRST)])
    await models.start()
    route = RouteEngine(ModelRoute(primary="first"), models.entry)
    async with running_server(tmp_path / "workspace", engine=route) as server:
        api = Api.of(server)
        for _ in range(5):
            await api.events(turn("It errs"))
        began = time.perf_counter()
        problem = await refused(api.run(turn("Hello")))
        assert time.perf_counter() - began < 0.05
        assert info_of(problem).reason == "MODEL_UNAVAILABLE"
        assert "first rests: The provider answered 500." in (problem.details() or "")
        await api.channel.close()
