"""Many generations on one stream: each as if it had a call of its own, and none hurts another."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from moltbot.v1 import inference_pb2, message_pb2
from moltbot_server.rpc import inference_stream
from moltbot_server.testing import RunningServer
from rpc_calls import Api, WatchedEngine, reason_of, refused


def generation(
    number: int, text: str, *, within: float | None = None, trim: bool = False, **more: Any
) -> inference_pb2.NumberedGeneration:
    message = message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text=text)])
    start = inference_pb2.NumberedGeneration(
        number=number,
        request=inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(messages=[message], trim=trim), **more),
    )
    if within is not None:
        start.timeout.FromNanoseconds(int(within * 1e9))
    return start


class Stream:
    """A `GenerateMany` call, and what was heard of each generation."""

    def __init__(self, api: Api) -> None:
        self.call = api.inference.GenerateMany(metadata=api.metadata)
        self.texts: defaultdict[int, str] = defaultdict(str)
        self.finished: dict[int, inference_pb2.GenerateFinished] = {}
        self.failed: dict[int, inference_pb2.GenerationFailed] = {}
        self.messages = 0

    async def start(self, *starts: inference_pb2.NumberedGeneration) -> None:
        await self.call.write(inference_pb2.GenerateManyRequest(start=starts))

    async def hear(self) -> bool:
        """Read one message; False at the end."""
        response = await self.call.read()
        if not isinstance(response, inference_pb2.GenerateManyResponse):
            return False
        self.messages += 1
        for piece in response.pieces:
            if piece.HasField("failed"):
                self.failed[piece.number] = piece.failed
                continue
            self.texts[piece.number] += piece.response.text
            if piece.response.HasField("finished"):
                self.finished[piece.number] = piece.response.finished
        return True

    async def until(self, *numbers: int) -> None:
        """Read until so many have ended."""
        while not set(numbers) <= {*self.finished, *self.failed}:
            assert await self.hear()


@pytest.fixture
async def stream(api: Api) -> AsyncIterator[Stream]:
    stream = Stream(api)
    yield stream
    stream.call.cancel()


async def test_each_is_answered_whole_and_those_of_a_moment_travel_together(stream: Stream) -> None:
    count = 20
    await stream.start(*(generation(number, f"#{number + 10} pace=0.005") for number in range(1, count + 1)))
    await stream.until(*range(1, count + 1))

    assert not stream.failed
    assert [len(stream.texts[number].split()) for number in range(1, count + 1)] == list(range(11, 11 + count))
    assert {end.finish_reason for end in stream.finished.values()} == {message_pb2.FINISH_REASON_STOP}
    assert stream.messages < count * 4  # of a call of its own, each would be as many
    await stream.call.done_writing()
    assert not await stream.hear()
    assert await stream.call.code() is grpc.StatusCode.OK


async def test_one_that_is_refused_or_breaks_hurts_no_other(stream: Stream, core: RunningServer) -> None:
    await stream.start(
        generation(1, "#9 pace=0.01"),
        generation(2, "#9", model="models/nobody"),
        generation(3, " "),
        generation(4, "#9 fail=2"),
        generation(5, "#9", options=message_pb2.GenerationOptions(temperature=9.0)),
        generation(5, "#1"),
        generation(6, "long " * 20_000, trim=True),
        generation(7, "#3"),
    )
    await stream.until(1, 2, 3, 4, 5, 6, 7)

    assert set(stream.finished) == {1, 3, 7}
    assert {number: failed.reason for number, failed in stream.failed.items()} == {
        2: "MODEL_NOT_FOUND", 4: "MODEL_UNAVAILABLE", 5: "INVALID_FIELD", 6: "CONTEXT_LENGTH_EXCEEDED",
    }  # fmt: skip
    assert stream.failed[6].field == "prompt.messages"
    counted = core.core.metrics.calls
    assert counted._counts["InferenceService/Generate", "OK"] == 3
    assert counted._counts["InferenceService/Generate", "NOT_FOUND"] == 1
    assert stream.failed[2].code == grpc.StatusCode.NOT_FOUND.value[0]
    assert stream.texts[7] == "one two three"


async def test_one_that_is_cancelled_or_late_frees_the_engine(stream: Stream, engine: WatchedEngine) -> None:
    await stream.start(generation(1, "#1000 pace=0.01"), generation(2, "#1000 pace=0.01", within=0.2))
    while not stream.texts[1]:
        await stream.hear()
    await stream.call.write(inference_pb2.GenerateManyRequest(cancel=[1, 77]))
    await stream.until(2)
    await stream.start(generation(3, "#2"))
    await stream.until(3)

    assert 1 not in stream.finished
    assert stream.failed[2].reason == "DEADLINE_EXCEEDED"
    await asyncio.wait_for(engine.idle.wait(), 5)


async def test_who_hangs_up_frees_all(stream: Stream, engine: WatchedEngine) -> None:
    await stream.start(*(generation(number, "#1000 pace=0.01") for number in (1, 2, 3)))
    while len(stream.texts) < 3:
        await stream.hear()
    stream.call.cancel()
    await asyncio.wait_for(engine.idle.wait(), 5)


async def test_there_is_a_most(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_stream, "MOST", 2)
    await stream.start(*(generation(number, "#3 pace=0.05") for number in (1, 2, 3)))
    await stream.until(1, 2, 3)

    assert stream.failed[3].reason == "QUEUE_FULL"
    assert stream.failed[3].retry_delay == duration_pb2.Duration(seconds=1)
    assert set(stream.finished) == {1, 2}


@pytest.mark.parametrize("seconds", [11, 86_400, 315_576_000_000])
async def test_a_generation_may_take_as_long_as_a_duration_says(stream: Stream, seconds: int) -> None:
    start = generation(1, "hello")
    start.timeout.CopyFrom(duration_pb2.Duration(seconds=seconds))
    await stream.start(start)
    await stream.until(1)
    assert stream.texts[1] == "You said: hello"


@pytest.mark.parametrize("span", [{"seconds": -1}, {"nanos": -1}, {"seconds": 1, "nanos": 10**9}])
async def test_a_time_that_is_no_span_is_refused(stream: Stream, span: dict[str, int]) -> None:
    start = generation(1, "hello")
    start.timeout.CopyFrom(duration_pb2.Duration(**span))
    await stream.start(start)
    await stream.until(1)
    assert (stream.failed[1].reason, stream.failed[1].field) == ("INVALID_FIELD", "start.timeout")


async def test_more_than_anybody_begins_at_once_ends_the_stream_and_holds_up_nobody(stream: Stream, api: Api) -> None:
    await stream.start(generation(1, "#20 pace=0.02"))
    for request in (
        inference_pb2.GenerateManyRequest(start=[inference_pb2.NumberedGeneration()] * 100_000),
        inference_pb2.GenerateManyRequest(cancel=range(100_000)),
    ):
        flood = Stream(api)
        await flood.call.write(request)
        error = await refused(flood.call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    await stream.until(1)
    assert stream.texts[1].startswith("one two three")


async def test_refusals_that_nobody_reads_end_the_stream(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_stream, "MOST", 8)
    await stream.start(*[generation(0, "hello")] * 32)
    await stream.until(0)
    await stream.start(*[generation(0, "hello")] * 33)
    assert reason_of(await refused(stream.call)) == "QUEUE_FULL"
