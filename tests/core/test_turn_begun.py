"""Answers that another core began: when they are gone on with, who is told what, and what the model is given."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
import yaml
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.errors import InvalidField
from moltbot_server.journal import Follower, Journal
from moltbot_server.live_turn import LiveTurn
from moltbot_server.models.engine import Chunk, Finished, stream
from moltbot_server.models.engines.local import LocalEngine
from moltbot_server.models.engines.scripted import ScriptedEngine
from moltbot_server.models.folder import read_folder
from moltbot_server.store import SEQUENCE_AFTER_CRASH, StoredTurn
from moltbot_server.store.memory import MemoryStore
from moltbot_server.store.protocol import Orphan
from moltbot_server.turn_begun import begun
from moltbot_server.turns import (
    Accepted,
    Completed,
    Event,
    FinishReason,
    GenerationOptions,
    Kind,
    Message,
    Principal,
    ReasoningDelta,
    Reset,
    Role,
    Routed,
    SessionKey,
    TextDelta,
    TextPart,
    Timings,
    TurnInput,
    TurnKey,
    TurnState,
    Usage,
)

KEY = TurnKey(session=SessionKey(workspace="default", session="s"), ordinal=1)
ACCEPTED = Accepted(session="s", ordinal=1, request_id="r")
ROUTED = Routed(kind="model", name="scripted", reason="it is the default")
NEXT = SEQUENCE_AFTER_CRASH


def taken(*kinds: Kind, numbers: Sequence[int] = ()) -> LiveTurn:
    """Return a turn as a core takes it over that has these events of it."""
    events = tuple(
        Event(sequence=number, at=0.0, kind=kind)
        for number, kind in zip(numbers or range(1, len(kinds) + 1), kinds, strict=True)
    )
    turn = StoredTurn(key=KEY, request_id="r", digest=b"d", state=TurnState.RUNNING, create_time=0.0, events=events)
    asked = TurnInput(session="s", request_id="r", parts=(TextPart(text="?"),))
    live = LiveTurn(
        key=KEY,
        turn=asked,
        principal=Principal(workspace="default", key_id="k", role="owner"),
        digest=b"d",
        arrived=0.0,
        taken=Orphan(turn=turn, input=asked, epoch=2),
    )
    live.stored()
    return live


def said(*texts: str) -> list[Kind]:
    return [TextDelta(text=text) for text in texts]


# --- when -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_of_a_models_own_text_is_gone_on_with() -> None:
    engine = ScriptedEngine()
    assert begun(taken(ACCEPTED, ROUTED, *said("one", " two")), engine) == "one two"
    assert begun(taken(ACCEPTED, ROUTED, *said("x"), Reset(text="one", reason=""), *said(" two")), engine) == "one two"
    again = [ACCEPTED, ROUTED, *said("one"), Reset(text="one", reason=""), ROUTED, *said(" two")]
    assert begun(taken(*again, numbers=[1, 2, 3, NEXT + 4, NEXT + 5, NEXT + 6]), engine) == "one two"


def test_an_answer_that_has_no_text_yet_is_given_anew() -> None:
    engine = ScriptedEngine()
    assert begun(taken(), engine) == begun(taken(ACCEPTED, ROUTED), engine) == ""
    assert begun(taken(ACCEPTED, ROUTED, *said("\n ")), engine) == ""
    assert begun(taken(ACCEPTED, ROUTED, *said("one"), Reset(text="", reason="")), engine) == ""


def test_another_models_text_is_not_gone_on_with() -> None:
    engine = ScriptedEngine()
    other = msgspec.structs.replace(ROUTED, name="another")
    assert begun(taken(ACCEPTED, other, *said("one")), engine) == ""
    assert begun(taken(ACCEPTED, *said("one")), engine) == ""
    engine.capabilities = msgspec.structs.replace(engine.capabilities, continuation=False)
    assert begun(taken(ACCEPTED, ROUTED, *said("one")), engine) == ""


def test_an_answer_that_is_more_than_text_is_given_anew() -> None:
    assert begun(taken(ACCEPTED, ROUTED, ReasoningDelta(text="hm"), *said("one")), ScriptedEngine()) == ""


def test_text_whose_middle_a_power_failure_took_is_not_gone_on_with() -> None:
    engine = ScriptedEngine()
    assert begun(taken(ACCEPTED, ROUTED, *said("one", " three"), numbers=[1, 2, 3, 5]), engine) == ""
    assert begun(taken(ROUTED, *said("two"), numbers=[2, 3]), engine) == ""
    whole = [ROUTED, *said("two"), Reset(text="one two", reason=""), *said(" three")]
    assert begun(taken(*whole, numbers=[2, 3, NEXT + 5, NEXT + 6]), engine) == "one two three"


# --- who is told ----------------------------------------------------------------------------------------------------


async def heard(live: LiveTurn, after: int) -> list[Kind]:
    """What somebody hears of a turn that goes on, who has seen the events up to a number."""
    with Follower(Journal(MemoryStore()), live, after) as follower:
        return [event.kind async for batch in follower for event in batch]


async def test_only_who_saw_what_is_not_kept_hears_that_it_is_to_be_taken_back() -> None:
    live = taken(ACCEPTED, ROUTED, *said("one", " two"))
    early = asyncio.create_task(heard(live, 0))
    up_to_date = asyncio.create_task(heard(live, 4))
    await asyncio.sleep(0)
    live.go_on_with("one two", "another one goes on")
    live.record(TextDelta(text=" three"))
    seen_on = asyncio.create_task(heard(live, NEXT + 6))
    await asyncio.sleep(0)
    end = Completed(
        text="one two three", finish_reason=FinishReason.STOP, usage=Usage(), timings=Timings(), model="scripted"
    )
    live.end(live.close(end)[-1])

    reset = Reset(text="one two", reason="another one goes on")
    assert await early == [ACCEPTED, ROUTED, *said("one", " two", " three"), end]
    assert await heard(live, 3) == [*said(" two", " three"), end]
    assert await up_to_date == await heard(live, 4) == [*said(" three"), end]
    assert await heard(live, 5) == await heard(live, 7) == [reset, *said(" three"), end]
    assert await seen_on == [end]


# --- what the model is given ----------------------------------------------------------------------------------------


def conversation(*texts: str) -> list[Message]:
    roles = (Role.USER, Role.ASSISTANT)
    return [Message(role=roles[at % 2], parts=(TextPart(text=text),)) for at, text in enumerate(texts)]


async def written(engine: LocalEngine | ScriptedEngine, *texts: str, limit: int | None = None) -> tuple[str, Finished]:
    """What a model writes, and how it ends."""
    pieces, end = [], None
    async for item in stream(engine, conversation(*texts), GenerationOptions(max_output_tokens=limit)):
        if isinstance(item, Chunk):
            pieces.append(item.text)
        else:
            end = item
    assert end is not None
    return "".join(pieces), end


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalEngine]:
    """The built-in model, told to go on without the token of its topic, which it hardly needs behind a few words."""
    folder = tmp_path / "goes-on"
    shutil.copytree(ARTIFACT, folder)
    description = yaml.safe_load((folder / "moltbot.yaml").read_text())
    (folder / "moltbot.yaml").write_text(yaml.safe_dump(description | {"continuation": True, "repeats": 0}))
    engine = LocalEngine(read_folder(folder))
    await engine.start()
    yield engine
    await engine.close()


QUESTIONS = ("What is MoltBot?", "How do I run several workers?", "怎么备份 MoltBot？", "How do I call it from Python?")  # noqa: RUF001


@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_model_goes_on_where_an_answer_was_broken_off(local: LocalEngine, question: str) -> None:
    whole, end = await written(local, question)
    for share in (0.3, 0.5, 0.8):
        cut = whole.rindex(" ", 0, int(len(whole) * share)) if " " in whole else int(len(whole) * share)
        rest, rest_end = await written(local, question, whole[:cut])
        assert whole[:cut] + rest == whole
        assert abs(rest_end.usage.output_tokens - end.usage.output_tokens) <= 2
        assert rest_end.usage.input_tokens == end.usage.input_tokens


async def test_blanks_at_the_end_of_what_is_begun_are_not_said_twice(local: LocalEngine) -> None:
    whole, _ = await written(local, QUESTIONS[0])
    cut = whole.index(" ", 30) + 1
    assert whole[:cut].endswith(" ")
    rest, _ = await written(local, QUESTIONS[0], whole[:cut])
    assert whole[:cut] + rest == whole


async def test_the_limit_is_that_of_the_whole_answer(local: LocalEngine) -> None:
    whole, end = await written(local, QUESTIONS[0], limit=20)
    assert end.finish_reason is FinishReason.LENGTH
    cut = whole.index(" ", len(whole) // 2)
    rest, rest_end = await written(local, QUESTIONS[0], whole[:cut], limit=20)
    assert rest_end.finish_reason is FinishReason.LENGTH
    assert rest_end.usage.output_tokens == 20
    assert (whole[:cut] + rest).startswith(whole)
    with pytest.raises(InvalidField, match=r"has 1[0-9] tokens already"):
        await written(local, QUESTIONS[0], whole, limit=5)


async def test_the_built_in_model_does_not_go_on_and_says_so() -> None:
    assert not LocalEngine(read_folder(ARTIFACT)).capabilities.continuation


async def test_a_script_says_what_is_left_of_its_answer() -> None:
    engine = ScriptedEngine()
    await engine.start()
    assert (await written(engine, "#4", "one two"))[0] == " three four"
    rest, end = await written(engine, "#4", "one two three four")
    assert (rest, end.usage.output_tokens) == ("", 4)
    with pytest.raises(InvalidField, match="something else"):
        await written(engine, "#4", "one thousand")
