# ruff: noqa: RUF001  (Chinese punctuation is meant)
"""The local engine through real CTranslate2: what it streams, how it stops, and what it leaves behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import ctranslate2
import pytest
import sentencepiece
from moltbot_server.errors import ContentTooLarge, ContextLengthExceeded, ModelUnavailable, QueueFull, UnsupportedOption
from moltbot_server.models.engine import Chunk, Finished
from moltbot_server.models.engine import stream as streamed
from moltbot_server.models.engines.local import LocalEngine
from moltbot_server.models.engines.local import batch_writing as native
from moltbot_server.models.engines.local.rows import GONE, Row, Sampling
from moltbot_server.models.folder import read_folder
from moltbot_server.models.replica.nursery import Nursery
from moltbot_server.models.tokenizer import Tokenizer
from moltbot_server.models.tuning import Tuning
from moltbot_server.turns import FinishReason, GenerationOptions, Message, Role, TextPart
from tiny_model import make_tiny_model, vocabulary

ASK = GenerationOptions()
QUESTIONS = ["hello", "怎么安装?", "how do I start it", "🎉 party", "the lazy dog", "1 2 3", "你好，世界！", "x" * 30]


FORMS = ["threads", *(["processes"] if Nursery.possible() else [])]
nurseries: list[Nursery] = []
"""The nursery that engines are to have, if any."""


@pytest.fixture(autouse=True, scope="module", params=FORMS)
def _form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let all of this hold for replicas in threads and for those in processes."""
    if request.param == "processes":
        nurseries.append(Nursery())
    yield
    if nurseries:
        assert nurseries[0].born == 0
        nurseries.pop().close()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no answer give way to others; `test_models_local_sharing` is about that."""
    monkeypatch.setattr(native, "SLICE", 1_000_000)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "endless", context_length=8192, endless=True)


def user(text: str) -> list[Message]:
    return [Message(role=Role.USER, parts=(TextPart(text=text),))]


@asynccontextmanager
async def running(folder: Path, replicas: int, **options: int) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(
        read_folder(folder), tuning=Tuning(replicas=replicas), nursery=next(iter(nurseries), None), **options
    )
    await engine.start()
    assert all(nurse.born >= replicas for nurse in nurseries)
    try:
        yield engine
    finally:
        await engine.close()


async def ask(engine: LocalEngine, text: str, options: GenerationOptions = ASK) -> tuple[list[Chunk], Finished]:
    async with aclosing(streamed(engine, user(text), options)) as stream:
        items = [item async for item in stream]
    finished = items.pop()
    assert isinstance(finished, Finished)
    return [item for item in items if isinstance(item, Chunk)], finished


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def offline(folder: Path, text: str, limit: int) -> tuple[str, int]:
    """Answer alone and at once: the text and how many tokens it has."""
    read = read_folder(folder)
    generator = ctranslate2.Generator(str(folder), intra_threads=1)
    prompt = Tokenizer(read).prompt(user(text))
    result = generator.generate_batch([prompt], max_length=limit, include_prompt_in_result=False)[0]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(read.tokenizer))
    ids = [index for index in result.sequences_ids[0] if vocabulary(folder)[index] != "<|end|>"]
    return pieces.decode(ids), len(ids)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (native threads set no event)
            await asyncio.sleep(0.001)


async def opened(stream: AsyncGenerator[Chunk | Finished, None]) -> AsyncGenerator[Chunk | Finished, None]:
    """Return a stream whose first piece has come: it is on a replica."""
    assert isinstance(await anext(stream), Chunk)
    return stream


async def test_what_is_streamed_is_what_the_model_says_offline(tiny: Path) -> None:
    options = GenerationOptions(max_output_tokens=90)
    async with running(tiny, replicas=2) as engine:
        answers = await asyncio.gather(*(ask(engine, QUESTIONS[index % 8], options) for index in range(32)))
    expected = {text: offline(tiny, text, 90) for text in QUESTIONS}
    for index, (chunks, finished) in enumerate(answers):
        text, tokens = expected[QUESTIONS[index % 8]]
        assert text_of(chunks) == text
        assert finished.usage.output_tokens == tokens
        assert finished.finish_reason is (FinishReason.LENGTH if tokens == 90 else FinishReason.STOP)
        assert finished.usage.input_tokens == len(Tokenizer(read_folder(tiny)).prompt(user(QUESTIONS[index % 8])))


async def test_an_answer_arrives_in_many_pieces_and_says_where_its_time_went(endless: Path) -> None:
    async with running(endless, replicas=1) as engine:
        chunks, finished = await ask(engine, "hello", GenerationOptions(max_output_tokens=4000))
    assert len(chunks) > 20
    assert sum(chunk.tokens for chunk in chunks) <= finished.usage.output_tokens == 4000
    assert 0 < finished.first_token < finished.generation
    assert 0 <= finished.queue < 5


async def test_an_answer_ends_where_the_context_does(tiny: Path, endless: Path) -> None:
    async with running(endless, replicas=1, context_length=64) as engine:
        _, finished = await ask(engine, "hello")
        assert finished.usage.input_tokens + finished.usage.output_tokens == 64
        assert finished.finish_reason is FinishReason.LENGTH
        with pytest.raises(ContextLengthExceeded, match="of the model's 64 tokens"):
            await ask(engine, "1 " * 64)


async def test_a_temperature_is_not_ignored(tiny: Path) -> None:
    async with running(tiny, replicas=1) as engine:
        greedy = {text_of((await ask(engine, "hello"))[0]) for _ in range(3)}
        zero = {text_of((await ask(engine, "hello", GenerationOptions(temperature=0.0)))[0]) for _ in range(3)}
        warm = {text_of((await ask(engine, "hello", GenerationOptions(temperature=2.0)))[0]) for _ in range(5)}
        top1 = {text_of((await ask(engine, "hello", GenerationOptions(temperature=2.0, top_k=1)))[0]) for _ in range(3)}
        narrow = GenerationOptions(temperature=2.0, top_p=1e-6, top_k=100_000)
        nucleus = {text_of((await ask(engine, "hello", narrow))[0]) for _ in range(3)}
    assert greedy == zero == top1 == nucleus
    assert len(greedy) == 1
    assert len(warm) > 1


async def test_a_repetition_penalty_is_not_ignored(endless: Path) -> None:
    limit = GenerationOptions(max_output_tokens=60)
    async with running(endless, replicas=1) as engine:
        plain = text_of((await ask(engine, "hello", limit))[0])
        varied = text_of(
            (await ask(engine, "hello", GenerationOptions(max_output_tokens=60, repetition_penalty=5.0)))[0]
        )
    assert plain != varied


async def test_a_seed_is_refused(tiny: Path) -> None:
    engine = LocalEngine(read_folder(tiny))
    with pytest.raises(UnsupportedOption, match=r"options\.seed"):
        engine.check(GenerationOptions(seed=1))
    engine.check(GenerationOptions(temperature=1.0, top_p=0.9, top_k=40, repetition_penalty=1.1, stop=("\n",)))


async def test_stop_texts_end_an_answer_wherever_tokens_are_cut(endless: Path) -> None:
    whole, _ = offline(endless, "hello", 120)
    async with running(endless, replicas=2) as engine:
        for begin in range(0, 60, 7):
            for size in (1, 3, 9):
                stop = whole[begin : begin + size]
                options = GenerationOptions(max_output_tokens=120, stop=("never said", stop))
                chunks, finished = await ask(engine, "hello", options)
                assert text_of(chunks) == whole[: whole.index(stop)]
                assert finished.finish_reason is FinishReason.STOP_TEXT
        chunks, finished = await ask(
            engine, "hello", GenerationOptions(max_output_tokens=120, stop=(whole[-1] + "!!",))
        )
        assert (text_of(chunks), finished.finish_reason) == (whole, FinishReason.LENGTH), "what was held back is shown"


async def test_the_tokens_of_a_text_are_counted_however_long_it_is(tiny: Path) -> None:
    async with running(tiny, replicas=1) as engine:
        one = await engine.tokens("a b c d ")
        for times in (100, 1000, 10_000):
            assert await engine.tokens("a b c d " * times) >= times * (one - 1)
        alone = await engine.tokens(user("a b c d " * 10_000))
        assert alone > await engine.tokens("a b c d " * 10_000)
        with pytest.raises(ContentTooLarge, match=r"count at most 1048576 at once"):
            await engine.tokens("a" * 2_000_000)


async def test_what_was_written_after_a_stop_text_is_not_counted(endless: Path) -> None:
    async with running(endless, replicas=1) as engine:
        whole, _ = offline(endless, "hello", 120)
        stop = whole[40:43]
        _, finished = await ask(engine, "hello", GenerationOptions(max_output_tokens=120, stop=(stop,)))
        counted = finished.usage.output_tokens
        said = [
            text_of((await ask(engine, "hello", GenerationOptions(max_output_tokens=limit)))[0])
            for limit in (counted - 1, counted)
        ]
    assert [stop in text for text in said] == [False, True]


async def test_closing_a_stream_frees_its_row_within_one_step(endless: Path) -> None:
    async with running(endless, replicas=1) as engine:
        stream = await opened(streamed(engine, user("hello"), ASK))
        (row,) = engine._rows
        await stream.aclose()
        written = row.limit - row.left
        await ask(engine, "next", GenerationOptions(max_output_tokens=1))
        assert row.limit - row.left - written <= 1
        assert row.left > 1000


async def test_a_cancelled_row_leaves_its_batch_mates_unharmed(endless: Path) -> None:
    limit = GenerationOptions(max_output_tokens=300)
    expected = {text: offline(endless, text, 300)[0] for text in ("aaa", "bbb", "ccc")}
    async with running(endless, replicas=1) as engine:
        first = await opened(streamed(engine, user("hold the only replica"), ASK))
        mates = [asyncio.create_task(ask(engine, text, limit)) for text in expected]
        leaving = streamed(engine, user("ddd"), ASK)
        begun = asyncio.create_task(anext(leaving))
        await until(lambda: engine.waiting == 4)
        rows = engine._waiting.places()
        await first.aclose()
        await begun
        assert len({row.began for row in rows}) == 1, "the four are one batch"
        await leaving.aclose()
        answers = await asyncio.gather(*mates)
    assert [text_of(chunks) for chunks, _ in answers] == list(expected.values())
    assert rows[-1].left > 1000


async def test_a_stream_that_is_closed_while_it_waits_leaves_the_queue_at_once(endless: Path) -> None:
    async with running(endless, replicas=1) as engine:
        first = await opened(streamed(engine, user("hold"), ASK))
        waiting = asyncio.create_task(ask(engine, "never"))
        await until(lambda: engine.waiting == 1)
        (row,) = engine._waiting.places()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert engine.waiting == 0
        await first.aclose()
        await ask(engine, "next", GenerationOptions(max_output_tokens=1))
        assert row.began == 0.0


async def test_more_than_may_wait_is_refused_with_the_time_to_come_back(endless: Path) -> None:
    async with running(endless, replicas=1, max_waiting=2) as engine:
        first = await opened(streamed(engine, user("hold"), ASK))
        waiting = [asyncio.create_task(ask(engine, "wait", GenerationOptions(max_output_tokens=2))) for _ in range(2)]
        await until(lambda: engine.waiting == 2)
        with pytest.raises(QueueFull) as caught:
            await ask(engine, "too much")
        assert caught.value.retry_after is not None
        assert 0.05 <= caught.value.retry_after <= 30
        await first.aclose()
        await asyncio.gather(*waiting)
        await ask(engine, "there is room again", GenerationOptions(max_output_tokens=2))


async def test_only_equal_options_and_similar_lengths_share_a_batch(endless: Path) -> None:
    async with running(endless, replicas=1) as engine:
        first = await opened(streamed(engine, user("hold"), ASK))
        short = GenerationOptions(max_output_tokens=20)
        asked = [("a", short), ("b", short), ("1 " * 900, short), ("c", GenerationOptions(max_output_tokens=30))]
        asked.append(("d", GenerationOptions(max_output_tokens=20, temperature=1.0)))
        tasks = [asyncio.create_task(ask(engine, text, options)) for text, options in asked]
        await until(lambda: engine.waiting == 5)
        rows = engine._waiting.places()
        await first.aclose()
        answers = await asyncio.gather(*tasks)
    a, b, long, c, warm = (row.began for row in rows)
    assert a == b == c
    assert len({a, long, warm}) == 3
    assert [finished.usage.output_tokens for _, finished in answers] == [20, 20, 20, 30, 20]


async def test_two_models_answer_side_by_side(tiny: Path, endless: Path) -> None:
    options = GenerationOptions(max_output_tokens=50)
    async with running(tiny, replicas=1) as one, running(endless, replicas=1) as two:
        asked = [ask(engine, "hello", options) for engine in (one, two) * 4]
        texts = [text_of(chunks) for chunks, _ in await asyncio.gather(*asked)]
    assert set(texts[::2]) == {offline(tiny, "hello", 50)[0]}
    assert set(texts[1::2]) == {offline(endless, "hello", 50)[0]}


def native_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


async def test_closing_the_engine_ends_its_answers_and_all_its_threads(endless: Path) -> None:
    await asyncio.to_thread(int)  # the loop's own executor may start its threads before the count
    before = threading.active_count(), native_threads()
    engine = LocalEngine(read_folder(endless), tuning=Tuning(replicas=3), nursery=next(iter(nurseries), None))
    await engine.start()
    assert (engine.healthy, threading.active_count() - before[0] >= 3) == (True, True)
    streams = [await opened(streamed(engine, user("go on"), ASK)) for _ in range(3)]
    queued = asyncio.create_task(ask(engine, "wait"))
    await until(lambda: engine.waiting == 1)
    async with asyncio.timeout(5):
        await engine.close()
    for stream in streams:
        with pytest.raises(ModelUnavailable, match="closed"):
            async for _ in stream:
                pass
    with pytest.raises(ModelUnavailable):
        await queued
    with pytest.raises(ModelUnavailable):
        await ask(engine, "again")
    assert not engine.healthy
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("model-")]
    await until(lambda: native_threads() <= before[1] + 1)


async def test_a_batch_that_fails_hurts_no_other_and_the_thread_lives_on(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tiny, replicas=1) as engine:
        row = Row(["<s>", "<|user|>"], Sampling(topk=-5), 5)
        told: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        row.read = told.set_result
        engine._waiting.put(row)
        engine._waiting.wake()
        async with asyncio.timeout(5):
            assert await told == [GONE]
        assert "a batch failed" in caplog.text
        assert engine.healthy
        chunks, _ = await ask(engine, "hello", GenerationOptions(max_output_tokens=20))
        assert text_of(chunks) == offline(tiny, "hello", 20)[0]


async def test_trouble_in_the_callback_ends_one_row_only(
    endless: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(endless, replicas=1) as engine:
        first = await opened(streamed(engine, user("hold"), ASK))
        options = GenerationOptions(max_output_tokens=20)
        tasks = [asyncio.create_task(ask(engine, text, options)) for text in ("aaa", "bbb", "ccc")]
        await until(lambda: engine.waiting == 3)
        bad = engine._waiting.places()[1]
        note = engine.note

        def failing(row: Row, token: int) -> None:
            if row is bad and token >= 0:
                raise RuntimeError("no")
            note(row, token)

        monkeypatch.setattr(engine, "note", failing)
        await first.aclose()
        a, b, c = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(b, ModelUnavailable)
    for text, answer in (("aaa", a), ("ccc", c)):
        assert not isinstance(answer, BaseException)
        assert text_of(answer[0]) == offline(endless, text, 20)[0]
    assert "a batch failed" in caplog.text


async def test_a_thread_that_dies_makes_the_model_unavailable(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tiny, replicas=2) as engine:

        def die(*_: object) -> None:
            raise SystemError("the native code is broken")

        monkeypatch.setattr(engine._replicas, "_write", die)
        with pytest.raises(ModelUnavailable):
            async with asyncio.timeout(5):
                await ask(engine, "hello")
        assert not engine.healthy
        assert "a thread of the model died" in caplog.text
        with pytest.raises(ModelUnavailable, match="restart the core"):
            await ask(engine, "again")


@pytest.mark.parametrize("spoil", ["cut off", "noise"])
async def test_a_broken_weights_file_is_named(tmp_path: Path, spoil: str) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    whole = (folder / "model.bin").read_bytes()
    broken = {"cut off": whole[: len(whole) // 2], "noise": b"\x07" * 4096}[spoil]
    (folder / "model.bin").write_bytes(broken)
    engine = LocalEngine(read_folder(folder), tuning=Tuning(replicas=1), nursery=next(iter(nurseries), None))
    with pytest.raises(ModelUnavailable, match=r"tiny cannot be loaded: .*expected a whole CTranslate2 decoder model"):
        await engine.start()
    assert not engine.healthy
    await engine.close()


async def test_a_thousand_cancelled_answers_leave_nothing_behind(endless: Path) -> None:
    async def cancelled(engine: LocalEngine, index: int) -> None:
        async with aclosing(streamed(engine, user(f"hello {index % 7}"), ASK)) as stream:
            async for _ in stream:
                break

    async with running(endless, replicas=2, max_waiting=1000) as engine:
        work: list[Awaitable[None]] = [cancelled(engine, index) for index in range(1000)]
        async with asyncio.timeout(60):
            await asyncio.gather(*work)
        chunks, _ = await ask(engine, "hello", GenerationOptions(max_output_tokens=5))
        assert text_of(chunks) == offline(endless, "hello", 5)[0]
        assert (engine.waiting, len(engine._rows)) == (0, 0)
        await until(lambda: not engine._outbox)
