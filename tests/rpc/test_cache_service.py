"""Caches as callers see them: what is kept serves the next one, is counted, and can be cleared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from moltbot.v1 import cache_pb2, cache_pb2_grpc, chat_pb2, message_pb2, model_pb2
from moltbot_server.auth.keys import Authenticator
from moltbot_server.auth.policy import MEMBER
from moltbot_server.config import Cache
from moltbot_server.config_models import Provider, ProviderModel
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.models.providers import ProviderEngine, ProviderKey
from moltbot_server.testing import RunningServer, running_server
from moltbot_server.testing_provider import MockProvider, Script
from moltbot_server.turns import Principal
from rpc_calls import Api, WatchedEngine, kinds, reason_of, refused, text_of, turn, until


class Model(WatchedEngine):
    """A scripted engine that is taken for a model which always says the same."""

    type = "llama"
    greedy = True


@pytest.fixture
def engine() -> Model:
    """The engine of the core."""
    return Model()


@pytest.fixture
async def core(tmp_path: Path, engine: Model) -> AsyncIterator[RunningServer]:
    """A core that keeps what its model says."""
    async with running_server(tmp_path / "workspace", engine=engine, cache=Cache(max_bytes=1 << 20)) as server:
        yield server


class Caches:
    """Short ways to ask for caches."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._stub = cache_pb2_grpc.CacheServiceStub(api.channel)

    async def all(self) -> dict[str, cache_pb2.Cache]:
        answer = await self._stub.ListCaches(cache_pb2.ListCachesRequest(), metadata=self._api.metadata)
        return {cache.name: cache for cache in answer.caches}

    def clear(self, name: str) -> Any:
        return self._stub.ClearCache(cache_pb2.ClearCacheRequest(name=name), metadata=self._api.metadata)


@pytest.fixture
def caches(api: Api) -> Caches:
    """The caches of the core."""
    return Caches(api)


async def test_the_caches_say_what_they_are(caches: Caches) -> None:
    answered = await caches.all()

    assert list(answered) == ["caches/answers", "caches/sessions", "caches/metadata"]
    answers = answered["caches/answers"]
    assert (answers.backend, answers.max_bytes, answers.ttl.seconds) == ("memory", 1 << 20, 3600)
    assert (answers.entries, answers.hits, answers.misses, answers.joined) == (0, 0, 0, 0)


async def test_the_same_question_in_a_new_session_is_answered_from_what_is_kept(api: Api, caches: Caches) -> None:
    first = await api.events(turn("What can you do?"))
    second = await api.events(turn("What can you do?"))

    assert text_of(first) == text_of(second) == "You said: What can you do?"
    told = [events[-1].completed for events in (first, second)]
    assert [each.cached for each in told] == [False, True]
    assert [each.model for each in told] == ["models/scripted"] * 2
    assert told[0].usage == told[1].usage
    assert kinds(second)[:2] == ["accepted", "routed"]
    answers = (await caches.all())["caches/answers"]
    assert (answers.entries, answers.hits, answers.misses) == (1, 1, 1)
    assert answers.bytes > 0


async def test_a_kept_answer_belongs_to_the_session_like_any_other(api: Api) -> None:
    await api.run(turn("What can you do?"))
    kept = await api.run(turn("What can you do?", session="sessions/s"))
    after = await api.run(turn("And now?", session="sessions/s"))

    assert kept.completed.cached
    assert kept.completed.timings.attempts == 0
    assert after.completed.timings.history_messages == 2


async def test_a_thousand_identical_questions_at_once_are_answered_by_one(api: Api, caches: Caches) -> None:
    asked = [asyncio.create_task(api.run(turn("#8 wait=0.3"))) for _ in range(1000)]
    answers = await asyncio.gather(*asked)

    assert {answer.completed.text for answer in answers} == {"one two three four five six seven eight"}
    assert sum(not answer.completed.cached for answer in answers) == 1
    counted = (await caches.all())["caches/answers"]
    assert counted.misses == 1
    assert counted.hits + counted.joined == 999


async def test_a_thousand_identical_questions_at_once_are_one_call_of_a_provider(tmp_path: Path) -> None:
    class Keys:
        def keys(self, provider: str) -> Sequence[ProviderKey]:
            return (ProviderKey(id="k", text="a-good-key"),)

    script = Script.read({"text": "One answer for all of you.", "first_token": "200ms"})
    cold = message_pb2.GenerationOptions(temperature=0.0)
    async with MockProvider(script).running() as mock:
        remote = ProviderEngine(
            Provider(name="mock", dialect="openai", base_url=mock.address),
            ProviderModel(name="mock-model"),
            keys=Keys(),
        )
        async with running_server(tmp_path / "other", engine=remote) as server:
            api = Api.of(server)
            answers = await asyncio.gather(*(api.run(turn("How?", options=cold)) for _ in range(1000)))
            kept = await api.run(turn("How?", options=cold))
            varied = await api.run(turn("How?"))
            await api.channel.close()

        assert {answer.completed.text for answer in answers} == {"One answer for all of you."}
        assert (kept.completed.cached, varied.completed.cached) == (True, False)
        assert mock.calls.shown()["total"] == 2


async def test_who_cancels_a_shared_answer_leaves_the_others_theirs(
    api: Api, core: RunningServer, engine: Model
) -> None:
    first = api.stream(turn("#20 pace=0.05"))
    accepted = (await first.read()).event.accepted
    await until(lambda: engine.running == 1)
    second = asyncio.create_task(api.run(turn("#20 pace=0.05")))
    await until(lambda: core.core.caches.answers.counts.joined == 1)
    await api.chat.CancelTurn(chat_pb2.CancelTurnRequest(name=accepted.turn), metadata=api.metadata)
    answer = await second

    assert len(answer.completed.text.split()) == 20
    first.cancel()


async def test_what_is_cleared_is_asked_for_again(api: Api, caches: Caches) -> None:
    await api.run(turn("hello"))
    assert (await caches.clear("caches/answers")).cleared == 1

    assert not (await api.run(turn("hello"))).completed.cached
    assert (await caches.all())["caches/answers"].misses == 2


async def test_all_caches_are_cleared_at_once(api: Api, caches: Caches) -> None:
    await api.run(turn("hello", session="sessions/s"))
    assert {name: cache.entries for name, cache in (await caches.all()).items()} == {
        "caches/answers": 1,
        "caches/sessions": 1,
        "caches/metadata": 0,
    }

    assert (await caches.clear("caches/-")).cleared == 2
    assert (await caches.clear("caches/-")).cleared == 0
    again = await api.run(turn("and?", session="sessions/s"))
    assert again.completed.timings.history_messages == 2
    assert (await caches.all())["caches/sessions"].misses == 2


@pytest.mark.parametrize("name", ["", "answers", "caches/", "caches/nothing", "models/answers"])
async def test_a_cache_that_there_is_not_is_told_with_those_that_there_are(caches: Caches, name: str) -> None:
    problem = await refused(caches.clear(name))

    assert reason_of(problem) == "INVALID_FIELD"
    assert "`caches/answers`, `caches/sessions`, `caches/metadata`" in str(problem.details())


async def test_a_member_looks_and_only_the_owner_clears(api: Api, core: RunningServer) -> None:
    member = Principal(workspace="default", key_id="m", role=MEMBER)
    core.core.authenticator._principals.update(Authenticator({"a member's key": member})._principals)
    caches = Caches(Api(api.channel, (("authorization", "Bearer a member's key"),)))

    assert len(await caches.all()) == 3
    assert reason_of(await refused(caches.clear("caches/-"))) == "PERMISSION_DENIED"


async def test_another_model_by_default_begins_with_nothing_kept(api: Api, caches: Caches) -> None:
    load = model_pb2.LoadModelRequest(name="models/demo", path=str(ARTIFACT))
    async for _ in api.models.LoadModel(load, metadata=api.metadata):
        pass
    await api.run(turn("hello"))
    await api.models.SwitchModel(model_pb2.SwitchModelRequest(name="models/demo"), metadata=api.metadata)
    answered = await api.run(turn("hello"))

    assert not answered.completed.cached
    assert answered.completed.model == "models/demo"
    assert (await api.run(turn("hello"))).completed.cached


async def test_a_scripted_model_is_asked_each_time(tmp_path: Path) -> None:
    async with running_server(tmp_path / "other") as server:
        api = Api.of(server)
        assert [(await api.run(turn("hello"))).completed.cached for _ in range(2)] == [False, False]
        await api.channel.close()


async def test_a_core_starts_and_answers_without_the_redis_that_it_is_told_of(tmp_path: Path, engine: Model) -> None:
    nowhere = Cache(type="redis", host="127.0.0.1", port=1)
    async with running_server(tmp_path / "other", engine=engine, cache=nowhere) as server:
        api = Api.of(server)
        assert [(await api.run(turn("hello"))).completed.cached for _ in range(2)] == [False, False]
        assert (await Caches(api).all())["caches/answers"].backend == "redis"
        problem = await refused(Caches(api).clear("caches/answers"))
        assert (problem.code(), reason_of(problem)) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
        await api.channel.close()


async def test_what_is_in_memory_is_cleared_although_redis_is_away(tmp_path: Path, engine: Model) -> None:
    nowhere = Cache(type="redis", host="127.0.0.1", port=1)
    async with running_server(tmp_path / "other", engine=engine, cache=nowhere) as server:
        api = Api.of(server)
        await api.run(turn("hello", session="sessions/s"))
        problem = await refused(Caches(api).clear("caches/-"))
        assert reason_of(problem) == "STORAGE_UNAVAILABLE"
        assert (await Caches(api).all())["caches/sessions"].entries == 0
        await api.channel.close()
