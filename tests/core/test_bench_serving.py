"""`moltbot bench serving`: each scenario in short, with real processes, and that what it counts can be counted."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2
from moltbot_server.bench import serving_kill, serving_overload, serving_switch
from moltbot_server.bench.installation import started
from moltbot_server.bench.random_model import Shape, random_model
from moltbot_server.bench.serving_calls import CUT, EMPTY, Ended
from moltbot_server.bench.serving_cancel import bench_cancel
from moltbot_server.bench.serving_crowd import bar, missing_messages
from moltbot_server.bench.serving_fair import bench_fair
from moltbot_server.bench.serving_kill import bench_kill
from moltbot_server.bench.serving_load import Haul, Job, Load, Plan
from moltbot_server.bench.serving_overload import bench_overload
from moltbot_server.bench.serving_steady import bench_sessions, bench_steady
from moltbot_server.bench.serving_switch import bench_switch

OK = Ended(due=1.0, sent=1.0, first=1.1, ended=1.2, status="OK", accepted=True, model="models/a")
Events = AsyncGenerator[chat_pb2.Event, None]


def quiet(text: str) -> None:
    """Hear of a benchmark's progress and say nothing."""


def values(report: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that have a bar."""
    return {name: found["value"] for name, found in report["bars"].items()}


# --- a core that misbehaves ------------------------------------------------------------------------------------------


def routed(model: str = "a") -> chat_pb2.Event:
    return chat_pb2.Event(routed=chat_pb2.Routed(model=f"models/{model}"))


def delta(text: str) -> chat_pb2.Event:
    return chat_pb2.Event(text_delta=chat_pb2.TextDelta(text=text))


def completed(text: str = "hello you", history: int = 0, **fields: Any) -> chat_pb2.Event:
    fields = {"model": "models/a", "finish_reason": message_pb2.FINISH_REASON_STOP, **fields}
    timings = chat_pb2.Timings(history_messages=history)
    return chat_pb2.Event(completed=chat_pb2.Completed(text=text, timings=timings, **fields))


class Core(chat_pb2_grpc.ChatServiceServicer):
    """Answers every turn in the same way, or refuses it; counts how many are under way."""

    def __init__(self, answer: Callable[[], Events] | list[chat_pb2.Event]) -> None:
        self._answer = answer
        self.under_way = self.most = self.asked = 0
        self.sessions: list[str] = []

    async def StreamTurn(  # noqa: N802 (the contract's name)
        self, request: Any, context: Any
    ) -> AsyncGenerator[chat_pb2.StreamTurnResponse, None]:
        self.sessions.append(request.turn.session)
        self.asked += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if callable(self._answer):
                async for event in self._answer():
                    yield chat_pb2.StreamTurnResponse(event=event)
            else:
                for event in self._answer:
                    yield chat_pb2.StreamTurnResponse(event=event)
        finally:
            self.under_way -= 1


@asynccontextmanager
async def asking(core: chat_pb2_grpc.ChatServiceServicer) -> AsyncIterator[Load]:
    """Serve a core and yield a load upon it."""
    server = aio.server()
    chat_pb2_grpc.add_ChatServiceServicer_to_server(core, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    load = Load(Plan(address=f"127.0.0.1:{port}", key="none"))
    try:
        yield load
    finally:
        await load.close()
        await server.stop(None)


async def one(events: list[chat_pb2.Event], *, turns: int = 1) -> list[Ended]:
    """Return what became of turns in one session that were all answered by these events."""
    over = asyncio.Event()

    async def answer() -> Events:
        if core.asked >= turns:
            over.set()
        for event in events:
            yield event

    core = Core(answer)
    async with asking(core) as load, asyncio.timeout(20):
        return (await load.run(Job(streams=1, turns=turns), over)).ended


class TestCalls:
    async def test_a_whole_answer_is_one_of_one_model_whose_pieces_are_its_text(self) -> None:
        [call] = await one([routed(), delta("hello "), delta("you"), completed()])
        assert (call.status, call.mixed, call.model, call.forgotten) == ("OK", False, "models/a", 0)
        assert call.due <= call.sent < call.first <= call.ended

    @pytest.mark.parametrize(
        "events",
        [
            [routed(), routed("b"), delta("hello you"), completed()],
            [routed("b"), delta("hello you"), completed()],
            [routed(), delta("hello "), completed()],
            [routed(), delta("hello you"), delta("hello you"), completed()],
        ],
        ids=["two models", "another model", "a piece missing", "a piece twice"],
    )
    async def test_an_answer_that_does_not_fit_together_is_mixed(self, events: list[chat_pb2.Event]) -> None:
        [call] = await one(events)
        assert call.mixed

    @pytest.mark.parametrize(
        ("events", "status"),
        [
            ([routed(), delta("hello")], CUT),
            ([routed(), completed(" ")], EMPTY),
            ([routed(), delta("hello"), completed("hello", finish_reason=message_pb2.FINISH_REASON_CANCELLED)], CUT),
            ([chat_pb2.Event(failed=chat_pb2.Failed(code=14, reason="MODEL_UNAVAILABLE"))], "UNAVAILABLE"),
        ],
        ids=["no end", "no text", "cancelled", "failed"],
    )
    async def test_an_answer_without_a_good_end_is_none(self, events: list[chat_pb2.Event], status: str) -> None:
        [call] = await one(events)
        assert call.status == status

    async def test_messages_that_the_model_did_not_read_are_counted_from_the_second_turn_on(self) -> None:
        calls = await one([routed(), delta("hello you"), completed(history=0)], turns=3)
        assert [call.forgotten for call in calls] == [0, 2, 4]

    @pytest.mark.parametrize("details", [True, False])
    @pytest.mark.parametrize("pushback", [True, False])
    async def test_a_refusal_is_advised_when_both_the_details_and_the_trailers_say_when_to_come_back(
        self, details: bool, pushback: bool
    ) -> None:
        status = status_pb2.Status(code=8, message="full")
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(100)
        for detail in (error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="moltbot"), retry)[: 1 + details]:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
        trailers += [("grpc-retry-pushback-ms", "100")] * pushback

        class Full(chat_pb2_grpc.ChatServiceServicer):
            async def StreamTurn(  # noqa: N802 (the contract's name)
                self, request: Any, context: Any
            ) -> Events:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", tuple(trailers))
                yield routed()

        async with asking(Full()) as load:
            ended = (await load.run(Job(rate=50, seconds=0.2), asyncio.Event())).ended
        assert {(call.status, call.reason) for call in ended} == {("RESOURCE_EXHAUSTED", "QUEUE_FULL")}
        assert {call.advised for call in ended} == {details and pushback}


class TestLoad:
    async def test_an_open_loop_sends_whatever_becomes_of_earlier_calls(self) -> None:
        enough = asyncio.Event()

        async def when_many_wait() -> Events:
            if core.under_way >= 20:
                enough.set()
            await enough.wait()
            yield routed()
            yield delta("hello you")
            yield completed()

        core = Core(when_many_wait)
        async with asking(core) as load, asyncio.timeout(20):
            haul = await load.run(Job(rate=200, seconds=1.0, conversations=100), asyncio.Event())
        assert core.most >= 20
        assert len(haul.ended) == core.asked
        assert 100 < core.asked < 300
        assert {call.status for call in haul.ended} == {"OK"}

    async def test_a_closed_loop_keeps_its_streams_under_way_in_sessions_of_so_many_turns(self) -> None:
        first = asyncio.Barrier(4)

        async def together() -> Events:
            yield routed()
            if core.asked <= 4:
                await first.wait()
            yield delta("hello you")
            yield completed(history=99)

        core = Core(together)
        async with asking(core) as load, asyncio.timeout(20):
            haul = await load.run(Job(streams=4, seconds=0.5, turns=3), asyncio.Event())
        assert core.most == 4
        assert max(haul.sessions.values()) == 3
        assert sum(haul.sessions.values()) == len(haul.ended) == core.asked

    async def test_a_deadline_ends_calls_that_are_not_answered(self) -> None:
        never = asyncio.Event()

        async def silent() -> Events:
            yield routed()
            await never.wait()

        async with asking(Core(silent)) as load:
            haul = await load.run(Job(streams=2, seconds=0.1, deadline=0.2), asyncio.Event())
        assert {call.status for call in haul.ended} == {"DEADLINE_EXCEEDED"}


# --- reports ---------------------------------------------------------------------------------------------------------


class TestReports:
    def test_a_figure_that_could_not_be_measured_does_not_meet_its_bar(self) -> None:
        assert not bar(None, "<=", 10)["met"]
        assert [bar(value, "<=", 2)["met"] for value in (2, 2.1)] == [True, False]
        assert [bar(value, "<", 2)["met"] for value in (1.9, 2)] == [True, False]
        assert [bar(value, ">=", 2)["met"] for value in (2, 1.9)] == [True, False]

    def test_a_kill_tells_turns_that_had_not_begun_to_stream_from_those_that_were_cut(self) -> None:
        calls = [
            OK,
            changed(OK, first=5.05, ended=5.2),  # was on its way when the engine died
            changed(OK, first=6.5, ended=7.0, forgotten=2),
            changed(OK, status="UNAVAILABLE", first=4.9),
            changed(OK, status="UNAVAILABLE", first=0.0),
            changed(OK, status="UNAVAILABLE", first=0.0),
        ]
        report = serving_kill._report(calls, killed=[5.0], missing=4)
        assert values(report) == {
            "slowest_next_answer_s": 1.5,
            "failed_before_they_streamed": 2,
            "turns_that_miss_history": 1,
            "missing_messages": 4,
        }
        assert report["cut_while_they_streamed"]["UNAVAILABLE  after accepted"]["calls"] == 1

    def test_a_kill_after_which_nothing_is_answered_meets_no_bar(self) -> None:
        report = serving_kill._report([OK], killed=[0.5, 5.0], missing=0)
        assert report["next_answer_s"] == [0.6, None]
        assert not report["bars"]["slowest_next_answer_s"]["met"]

    def test_switches_count_failed_and_mixed_turns(self) -> None:
        class Changed:
            switched, refused, broken_loaded, seconds, problems = 8, 1, 1, [0.1], ["models/bench-3: full"]

        calls = [OK, changed(OK, mixed=True, model="models/b"), changed(OK, status="NOT_FOUND")]
        report = serving_switch._report(calls, Changed(), 1.2, 20)  # type: ignore[arg-type]
        assert values(report) == {
            "failed": 1,
            "mixed": 1,
            "memory_growth": 1.2,
            "broken_refused": 1,
            "broken_loaded": 1,
            "refused_although_whole": 1,
        }
        assert not any(found["met"] for found in report["bars"].values())
        assert report["models_that_answered"] == 2

    def test_an_overload_counts_refusals_that_say_nothing_of_when_to_come_back(self) -> None:
        refused = changed(OK, status="RESOURCE_EXHAUSTED", first=0.0, accepted=False, ended=1.02)
        told = serving_overload._refusals([refused, changed(refused, advised=True)], [refused])
        assert told["advised_share"] == 0.5
        assert told["refusal_ms_of_the_probe"]["p99"] == 20.0
        assert serving_overload._refusals([], [])["advised_share"] is None


def changed(call: Ended, **fields: Any) -> Ended:
    return msgspec.structs.replace(call, **fields)


# --- short runs with real processes ----------------------------------------------------------------------------------


class TestScenarios:
    def test_steady_turns_are_answered_and_written(self) -> None:
        report = bench_steady(rate=20, seconds=1.5, cpus=None, progress=quiet)
        assert report["turns"] == report["sessions"] > 5 or report["turns"] > report["sessions"] > 5
        assert (report["failed"], report["missing_messages"]) == (0, 0)
        assert 0 < report["first_token_ms"]["p50"] <= report["full_response_ms"]["p50"]
        assert 0 < report["processors"]["installation_share"] < 1
        assert "idle_but_for_moltbot" not in report["bars"]
        assert set(report["memory_mb"]["after"]) == {"supervisor", "engine", "core", "http", "all"}

    def test_what_was_told_as_completed_and_is_not_stored_is_missing(self) -> None:
        with started(MODEL_TYPE="scripted") as installation, grpc.insecure_channel(installation.grpc) as channel:
            turn = chat_pb2.TurnInput(session="sessions/kept", parts=[message_pb2.Part(text="hello")])
            chat_pb2_grpc.ChatServiceStub(channel).RunTurn(
                chat_pb2.RunTurnRequest(turn=turn), metadata=(("authorization", installation.bearer),), timeout=20
            )
            assert missing_messages(installation, {"sessions/kept": 1, "sessions/unused": 0}) == 0
            assert missing_messages(installation, {"sessions/kept": 3}) == 4

    def test_many_sessions_are_measured_with_the_memory_of_all_processes(self) -> None:
        report = bench_sessions(sessions=10, every=1.0, seconds=2.0, cpus=None, progress=quiet)
        assert report["sessions"]["turns"] == 20
        assert values(report)["errors"] == 0
        assert values(report)["memory_mb"] > 50
        assert values(report)["first_token_p99_ms"] > 0

    def test_an_overload_offers_many_times_the_peak(self) -> None:
        report = bench_overload(times_peak=4, seconds=1.5, step=0.5, model="builtin", cpus=None, progress=quiet)
        assert report["peak"] in report["ladder"]
        assert report["wanted_per_second"] == pytest.approx(4 * report["peak"]["turns_per_second"], rel=0.01)
        assert report["offered_per_second"] > 0
        assert report["answered_per_second"] > 0
        asked = report["refused"] + values(report)["neither_answered_nor_refused"]
        assert asked > 0
        assert values(report)["answers_afterwards"] == 1

    def test_a_loud_neighbour_asks_far_more_than_it_asked_before(self) -> None:
        report = bench_fair(seconds=1.0, rounds=1, times_share=10, cpus=None, progress=quiet)
        for pair in ("workspaces", "sessions"):
            without, normal, loud = (report[pair][way] for way in ("without", "normal", "loud"))
            assert without["loud_asked_per_second"] == 0
            assert loud["loud_asked_per_second"] > 2 * normal["loud_asked_per_second"]
            assert all(way["others"]["first_token_ms"]["p99"] > 0 for way in (without, normal, loud))

    def test_models_are_switched_under_load_and_a_broken_one_is_refused(self) -> None:
        report = bench_switch(switches=10, rate=20, cpus=None, progress=quiet)
        assert (report["switched"], report["refused"], report["problems"]) == (9, 1, [])
        assert (report["failed"], report["mixed"], report["missing_messages"]) == (0, 0, 0)
        assert report["models_that_answered"] > 1
        assert {"before", "after_5", "after_all", "at_rest"} == set(report["memory_mb"])

    def test_cancelled_rows_are_free_long_before_their_answers_would_have_ended(self, tmp_path: Path) -> None:
        shape = Shape(layers=6, width=512, heads=8, feed=1024, vocabulary=4000)
        model = random_model(shape, cache=tmp_path)
        report = bench_cancel(cancels=8, cpus=None, progress=quiet, model=model)
        assert report["steps_without_a_cancel"] > 20  # of about a hundred; a slow machine begins late to count
        for way in ("cancel_turn", "dropped_call"):
            assert report[way]["steps"]["p50"] < report["steps_without_a_cancel"] / 3
        assert report["cancels"] == {"cancelled": 4, "dropped": 4, "ended_before": 0, "ended_otherwise": 0}
        assert values(report)["turns_under_way"] == 0

    def test_an_engine_that_is_killed_is_back_and_no_session_is_lost(self) -> None:
        report = bench_kill(kills=1, every=3.0, streams=16, cpus=None, progress=quiet)
        assert report["kills"] == 1
        assert report["next_answer_s"][0] > 0.1
        assert values(report)["missing_messages"] == 0
        assert values(report)["turns_that_miss_history"] == 0
        assert report["answered"] > 0

    def test_the_command_prints_json_and_tells_its_progress_beside(self) -> None:
        command = [sys.executable, "-m", "moltbot_server.bench", "serving", "steady", "--rate", "10", "--seconds", "1"]
        ended = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True)
        report = json.loads(ended.stdout)
        assert (report["scenario"], report["options"]) == ("steady", {"rate": 10.0, "seconds": 1.0})
        assert report["machine"]["processors"] == len(os.sched_getaffinity(0))
        assert "10 turns/s for 1 s" in ended.stderr
        table = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "mean_full_response_ms" in table
        assert "grpcio" in table


def test_what_a_load_brings_home_survives_the_way_to_the_benchmark() -> None:
    haul = Haul(ended=[OK], sessions={"sessions/a": 2})
    assert msgspec.convert(json.loads(msgspec.json.encode(haul)), Haul) == haul
