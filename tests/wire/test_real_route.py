"""A route that fails over, by the official OpenAI client through the adapter and the real core."""

from collections.abc import AsyncIterator

import openai
import pytest
from moltbot_adapters.http.settings import Settings
from moltbot_server.config_models import ModelRoute
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engines.scripted import Failure
from moltbot_server.models.routing import RouteEngine
from moltbot_server.testing import Rule, Script, ScriptedEngine, running_server
from running_adapter import RunningAdapter

FIRST = Script(
    id="first",
    rules=(
        Rule(match="errs", fail=Failure(message="The provider answered 500.")),
        Rule(match="breaks off", deltas=("Half of ", "it"), fail=Failure(after=1, message="The stream was cut.")),
    ),
)
SECOND = Script(id="second", rules=(Rule(template="From the second."),))


@pytest.fixture
async def client(tmp_path, request) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client of an adapter whose core answers by a route of two models; its parameter is `on_failure`."""
    models = Catalog([ScriptedEngine(FIRST), ScriptedEngine(SECOND)])
    await models.start()
    on_failure = getattr(request, "param", "restart")
    spec = ModelRoute(name="both", primary="first", fallback=("second",), on_failure=on_failure)
    route = RouteEngine(spec, models.entry)
    async with running_server(tmp_path / "workspace", engine=route, grace=0.2) as server:
        key_file = tmp_path / "key"
        key_file.write_text(server.key)
        settings = Settings(
            host="127.0.0.1", port=0, core=server.address, key_file=key_file, state=tmp_path / "state", drain_s=1.0
        )
        async with (
            RunningAdapter(settings) as adapter,
            openai.AsyncOpenAI(base_url=adapter.api, api_key=server.key, max_retries=0) as client,
        ):
            yield client


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("model", ["moltbot", "both"])
async def test_a_switch_before_the_first_word_is_unseen_but_in_the_name_and_the_times(client, model):
    whole = await client.chat.completions.create(model=model, messages=_user("It errs"))
    assert (whole.model, whole.choices[0].message.content) == ("second", "From the second.")
    log = whole.model_extra["timings"]["attempt_log"]
    assert [(each["model"], each["outcome"], each["reason"]) for each in log] == [
        ("first", "MODEL_UNAVAILABLE", "The provider answered 500."),
        ("second", "ANSWERED", ""),
    ]
    stream = await client.chat.completions.create(model=model, messages=_user("It errs"), stream=True)
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {"second"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "From the second."


async def test_words_that_are_taken_back_end_a_stream_and_no_whole_answer(client):
    whole = await client.chat.completions.create(model="moltbot", messages=_user("It breaks off"))
    assert (whole.model, whole.choices[0].message.content) == ("second", "From the second.")
    heard: list[str] = []

    async def listen() -> None:
        asked = {"model": "moltbot", "messages": _user("It breaks off"), "stream": True}
        async for chunk in await client.chat.completions.create(**asked):
            heard.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError) as caught:
        await listen()
    assert "".join(heard) == "Half of "
    assert caught.value.code == "answer_replaced"


@pytest.mark.parametrize("client", ["stop"], indirect=True)
async def test_an_answer_that_broke_off_is_no_whole_one(client):
    asked = {"model": "both", "messages": _user("It breaks off")}
    whole = (await client.chat.completions.create(**asked)).choices[0]
    assert (whole.message.content, whole.finish_reason) == ("Half of ", "length")
    chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Half of "
    assert chunks[-1].choices[0].finish_reason == "length"
