"""How answers share the local engine: long ones give way, late ones are dropped, places are told, prompts are kept."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.errors import DeadlineExceeded, QueueFull
from moltbot_server.models.engine import NOBODY, Asker, Chunk, Finished, stream
from moltbot_server.models.engines.local import LocalEngine, batch_writing
from moltbot_server.models.folder import read_folder
from moltbot_server.models.replica.nursery import Nursery
from moltbot_server.models.tuning import Tuning
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart
from tiny_model import make_tiny_model

ASK = GenerationOptions()
FORMS = ["threads", *(["processes"] if Nursery.possible() else [])]
nurseries: list[Nursery] = []
"""The nursery that engines are to have, if any."""
SYSTEM = "the quick brown fox jumps over the lazy dog and says hello to everybody"


@pytest.fixture(autouse=True, scope="module", params=FORMS)
def _form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let all of this hold for replicas in threads and for those in processes."""
    if request.param == "processes":
        nurseries.append(Nursery())
    yield
    if nurseries:
        assert nurseries[0].born == 0
        nurseries.pop().close()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "endless", context_length=8192, endless=True)


def conversation(text: str, system: str = "") -> list[Message]:
    said = [(Role.SYSTEM, system)] if system else []
    return [Message(role=role, parts=(TextPart(text=part),)) for role, part in (*said, (Role.USER, text))]


def tokens(count: int, **options: Any) -> GenerationOptions:
    return GenerationOptions(max_output_tokens=count, **options)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (native threads set no event)
            await asyncio.sleep(0.001)


@asynccontextmanager
async def running(
    folder: Path, replicas: int = 1, batch: int = 8, compute_type: str = "default", **options: Any
) -> AsyncIterator[LocalEngine]:
    tuning = Tuning(replicas=replicas, batch=batch, compute_type=compute_type)
    engine = LocalEngine(read_folder(folder), tuning=tuning, nursery=next(iter(nurseries), None), **options)
    await engine.start()
    assert all(nurse.born >= replicas for nurse in nurseries)
    await until(lambda: engine._waiting._idle == replicas)  # all are back from their probe
    try:
        yield engine
    finally:
        await engine.close()


async def ask(
    engine: LocalEngine, messages: Sequence[Message], options: GenerationOptions = ASK, asker: Asker = NOBODY
) -> tuple[str, Finished]:
    async with aclosing(stream(engine, messages, options, asker)) as items:
        heard = [item async for item in items]
    finished = heard.pop()
    assert isinstance(finished, Finished)
    return "".join(item.text for item in heard if isinstance(item, Chunk)), finished


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no answer give way to others."""
    monkeypatch.setattr(batch_writing, "SLICE", 1_000_000)


@asynccontextmanager
async def holding(engine: LocalEngine) -> AsyncIterator[None]:
    """Keep the only replica busy."""
    async with aclosing(stream(engine, conversation("hold"), ASK)) as held:
        assert isinstance(await anext(held), Chunk)
        yield


class Listening:
    """A listener that keeps the places it is told."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.end: asyncio.Future[Finished | Exception] = asyncio.get_running_loop().create_future()

    def queued(self, position: int) -> None:
        self.places.append(position)

    def wrote(self, text: str, tokens: int) -> None:
        pass

    def ended(self, end: Finished | Exception) -> None:
        self.end.set_result(end)


# --- long answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "number_type"), [("endless", "float32"), ("built-in", "default")])
async def test_a_long_answer_gives_way_to_those_that_wait_and_says_the_same(
    folder: str, number_type: str, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In int8 the noise of a random model turns at rounding errors, as it does from one batch to another.
    monkeypatch.setattr(batch_writing, "SLICE", 16)
    monkeypatch.setattr(batch_writing, "PAYS", 0.0)
    monkeypatch.setattr(batch_writing, "_NEARLY_DONE", 4)
    path = endless if folder == "endless" else ARTIFACT
    asked = [f"question number {index}" for index in range(12)]
    async with running(path, batch=4, compute_type=number_type) as engine:
        answers = await asyncio.gather(*(ask(engine, conversation(text), tokens(200)) for text in asked))
        assert engine.pauses > 12
        assert (engine.waiting, len(engine._rows)) == (0, 0)
    async with running(path, compute_type=number_type) as engine:
        alone = [await ask(engine, conversation(text), tokens(200)) for text in asked]
        assert engine.pauses == 0
    for (text, finished), (same, whole) in zip(answers, alone, strict=True):
        assert text == same
        assert finished.usage == whole.usage
        assert finished.finish_reason is whole.finish_reason


async def test_a_long_answer_goes_on_while_nobody_waits(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_writing, "SLICE", 16)
    monkeypatch.setattr(batch_writing, "PAYS", 0.0)
    async with running(endless, batch=8) as engine:
        await asyncio.gather(*(ask(engine, conversation(f"q{index}"), tokens(300)) for index in range(8)))
        assert engine.pauses == 0


async def test_who_comes_while_endless_answers_fill_the_model_is_answered_before_they_end(
    endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_writing, "SLICE", 16)
    monkeypatch.setattr(batch_writing, "PAYS", 0.0)
    async with running(endless, batch=2) as engine, holding(engine), holding(engine):
        async with asyncio.timeout(20):
            _, finished = await ask(engine, conversation("short"), tokens(3))
        assert finished.usage.output_tokens == 3
        assert engine.pauses >= 1
        assert len(engine._rows) == 2


async def test_an_answer_that_gave_way_can_be_stopped(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_writing, "SLICE", 8)
    monkeypatch.setattr(batch_writing, "PAYS", 0.0)
    async with running(endless, batch=1) as engine:
        for _ in range(20):
            async with holding(engine), holding(engine):
                await until(lambda: engine.waiting + engine.running == 2)  # one may be on its way between them
        assert engine.pauses > 0
        await ask(engine, conversation("next"), tokens(2))
        await until(lambda: engine.running == 0)
        assert (engine.waiting, len(engine._rows)) == (0, 0)


async def test_a_repetition_penalty_counts_the_own_answer_only(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_writing, "SLICE", 8)
    monkeypatch.setattr(batch_writing, "PAYS", 0.0)
    asked = ["hello", "hello there", "how do I start it", "the lazy dog", "x", "1 2 3"]
    penalty = {"repetition_penalty": 1.8}
    async with running(endless, batch=4) as engine:
        answers = await asyncio.gather(*(ask(engine, conversation(text), tokens(60, **penalty)) for text in asked))
    async with running(endless) as engine:
        alone = [await ask(engine, conversation(text), tokens(60, **penalty)) for text in asked]
    assert [text for text, _ in answers] == [text for text, _ in alone]


async def test_giving_way_has_to_be_worth_reading_the_prompts_again(
    endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_writing, "SLICE", 16)
    asked = conversation("1 " * 1500)
    async with running(endless, batch=1) as engine:
        await ask(engine, asked, tokens(8))  # reading is measured
        await asyncio.gather(*(ask(engine, asked, tokens(100)) for _ in range(3)))
        assert engine.pauses == 0


# --- system prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["endless", "built-in"])
async def test_a_system_prompt_that_the_model_keeps_changes_no_answer(folder: str, endless: Path) -> None:
    path = endless if folder == "endless" else ARTIFACT
    asked = [conversation(f"how do I start it {index}", SYSTEM) for index in range(6)]
    async with running(path) as engine:
        plain = [await ask(engine, messages, tokens(40)) for messages in asked[:2]]
        assert engine.static_prompts == 0
        kept = [await ask(engine, messages, tokens(40)) for messages in asked * 2]
        together = await asyncio.gather(*(ask(engine, messages, tokens(40)) for messages in asked))
        assert engine.static_prompts == 1
    assert [text for text, _ in kept[:2]] == [text for text, _ in plain]
    assert [text for text, _ in kept[:6]] == [text for text, _ in kept[6:]] == [text for text, _ in together]
    cached = kept[-1][1].usage.cached_input_tokens
    assert 8 <= cached < kept[-1][1].usage.input_tokens
    assert plain[0][1].usage.cached_input_tokens == 0


@pytest.mark.usefixtures("patient")
async def test_many_system_prompts_share_batches_rather_than_each_its_own(endless: Path) -> None:
    systems = [f"{SYSTEM} {letter}" for letter in "abcdefgh"]
    async with running(endless) as engine:
        for system in systems:
            for _ in range(30):
                await ask(engine, conversation("hello", system), tokens(1))
        assert engine.static_prompts > 4
        async with holding(engine):
            asked = [asyncio.create_task(ask(engine, conversation("hello", system), tokens(60))) for system in systems]
            await until(lambda: engine.waiting == 8)
            batches = engine.batches
        answers = await asyncio.gather(*asked)
        assert engine.batches - batches <= 4
        alone = [await ask(engine, conversation("hello", system), tokens(60)) for system in systems]
    assert [text for text, _ in answers] == [text for text, _ in alone]


# --- the queue ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
async def test_those_that_wait_are_told_their_places(endless: Path) -> None:
    async with running(endless, batch=1) as engine:
        heard = [Listening() for _ in range(3)]
        async with holding(engine):
            begun = [engine.begin(conversation("wait"), tokens(2), listener) for listener in heard]
            await until(lambda: bool(heard[2].places))
            assert [listener.places for listener in heard] == [[1], [2], [3]]
            begun[0].stop()
            await until(lambda: len(heard[2].places) > 1)
            assert [listener.places for listener in heard] == [[1], [2, 1], [3, 2]]
        await asyncio.gather(heard[1].end, heard[2].end)


async def test_who_is_served_at_once_is_told_no_place(endless: Path) -> None:
    async with running(endless) as engine:
        listener = Listening()
        engine.begin(conversation("hello"), tokens(400), listener)
        assert isinstance(await listener.end, Finished)
        assert listener.places == []


@pytest.mark.usefixtures("patient")
async def test_what_cannot_begin_before_its_deadline_is_refused_at_once(endless: Path) -> None:
    loop = asyncio.get_running_loop()
    async with running(endless, batch=1) as engine:
        for _ in range(4):
            await ask(engine, conversation("measure"), tokens(400))
        async with holding(engine):
            waiting = [engine.begin(conversation("wait"), tokens(400), Listening()) for _ in range(60)]
            hurried = Asker(workspace="w", session="s", deadline=loop.time() + 0.001)
            for refused in (
                lambda: engine.admit(hurried),
                lambda: engine.begin(conversation("hurry"), ASK, Listening(), hurried),
            ):
                with pytest.raises(QueueFull, match="after the deadline") as caught:
                    refused()
                assert caught.value.retry_after
            engine.admit(Asker(deadline=loop.time() + 1000))
            for generation in waiting:
                generation.stop()
        assert engine.refused == 2


@pytest.mark.usefixtures("patient")
async def test_what_waited_beyond_its_deadline_never_begins(endless: Path) -> None:
    async with running(endless, batch=1) as engine:
        async with holding(engine):
            asker = Asker(deadline=asyncio.get_running_loop().time() + 0.05)
            late = asyncio.create_task(ask(engine, conversation("late"), ASK, asker))
            async with asyncio.timeout(10):
                with pytest.raises(DeadlineExceeded, match="before the model could begin"):
                    await late
            assert engine.waiting == 0
        batches = engine.batches
        await ask(engine, conversation("next"), tokens(2))
        assert engine.batches - batches <= 2


@pytest.mark.usefixtures("patient")
async def test_a_workspace_that_floods_the_model_does_not_delay_the_others(endless: Path) -> None:
    order: list[str] = []

    async def asked(workspace: str) -> None:
        await ask(engine, conversation("hello"), tokens(20), Asker(workspace=workspace))
        order.append(workspace)

    async with running(endless, batch=1, weights={"quiet": 1.0}) as engine:
        async with holding(engine):
            loud = [asyncio.create_task(asked("loud")) for _ in range(40)]
            await until(lambda: engine.waiting == 40)
            quiet = [asyncio.create_task(asked("quiet")) for _ in range(3)]
            await until(lambda: engine.waiting == 43)
        await asyncio.gather(*loud, *quiet)
    assert order[:7].count("quiet") == 3


async def test_what_comes_at_one_moment_is_shared_out_between_the_replicas(endless: Path) -> None:
    async with running(endless, replicas=2) as engine:
        batches = engine.batches
        await asyncio.gather(*(ask(engine, conversation("hello"), tokens(20)) for _ in range(16)))
        await until(lambda: engine.running == 0)
    # On a busy machine a replica may begin before the last of them is there.
    assert 2 <= engine.batches - batches <= 8


async def test_the_tuning_says_how_many_answers_are_written_at_once(endless: Path) -> None:
    async with running(endless, replicas=3, batch=5) as engine:
        each = (endless / "model.bin").stat().st_size
        assert (engine.parallel, engine.memory_bytes) == (15, 3 * each if nurseries else each)
        await asyncio.gather(*(ask(engine, conversation("hello"), tokens(20)) for _ in range(30)))
        assert 1 <= engine.mean_batch <= 5


async def test_a_busy_event_loop_does_not_keep_the_replicas_waiting(endless: Path) -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        async with running(endless):
            assert sys.getswitchinterval() <= 0.0002
    finally:
        sys.setswitchinterval(before)
