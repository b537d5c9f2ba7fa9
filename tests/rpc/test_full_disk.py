"""A disk without room, a locked database: turns are refused with the reason, and it passes by itself."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from moltbot import MoltBot
from moltbot.v1 import chat_pb2
from moltbot_server.testing import running_server
from rpc_calls import Api, kinds, reason_of, refused, turn, until


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def filled(api: Api) -> tuple[chat_pb2.TurnInput, str]:
    """Talk until the disk is full; return the turn that found no room and the reason that it was told."""
    for number in range(1000):
        spoken = turn("x" * 3000, session="sessions/s", request_id=str(number))
        try:
            last = (await api.events(spoken))[-1]
        except aio.AioRpcError as error:
            return spoken, reason_of(error)
        if last.WhichOneof("kind") == "failed":
            return spoken, last.failed.reason
    raise AssertionError("the disk was never full")


async def test_a_core_on_a_full_disk_refuses_new_turns_and_goes_on_when_there_is_room(tiny_disk: Path) -> None:
    async with running_server(tiny_disk) as server:
        api = Api.of(server)
        spoken, reason = await filled(api)
        # The second where it was an end that found no room: its turn was accepted.
        assert reason in ("STORAGE_FULL", "STORAGE_UNAVAILABLE")
        error = await refused(api.run(turn("y" * 60_000, request_id="big")))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")

        assert (await api.messages("sessions/s"))[0].parts[0].text == "x" * 3000
        assert (await api.session("sessions/s")).message_count >= 2
        health = await health_pb2_grpc.HealthStub(api.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING

        subprocess.run(["mount", "-o", "remount,size=16m", str(tiny_disk)], check=True)  # noqa: ASYNC221 - a moment
        # Where it was the turn's end that found no room, it is stored within a second.
        await until(lambda: not server.core.journal.under_way())
        again = await api.events(spoken)
        assert kinds(again)[-1] == "completed"
        assert kinds(await api.resumed(again[0].accepted.turn))[-1] == "completed"
        said = await api.said("sessions/s")
        assert said.count("x" * 3000) == len(said) // 2
        await api.channel.close()


async def test_an_end_that_cannot_be_stored_is_told_to_nobody_and_stored_as_soon_as_it_can_be(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        store = server.core.store
        store._writing.execute("PRAGMA busy_timeout = 50")
        call = api.stream(turn("#3 wait=0.3", request_id="one", session="sessions/s"))
        accepted = (await call.read()).event.accepted
        other = sqlite3.connect(tmp_path / "moltbot.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        broken = await refused(call)
        assert (broken.code(), reason_of(broken)) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
        resume = chat_pb2.ResumeTurnRequest(name=accepted.turn)
        again = await refused(api.chat.ResumeTurn(resume, metadata=api.metadata))
        assert (again.code(), reason_of(again)) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
        error = await refused(api.run(turn("other")))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
        live = server.core.journal.under_way()[0]
        other.execute("ROLLBACK")
        other.close()

        await until(lambda: live.ended)
        answer = await api.run(turn("#3 wait=0.3", request_id="one", session="sessions/s"))
        assert (answer.turn, answer.completed.text) == (accepted.turn, "one two three")
        assert (await api.resumed(accepted.turn))[-1].completed == answer.completed
        assert await api.said("sessions/s") == ["#3 wait=0.3", "one two three"]
        await api.channel.close()


async def test_an_answer_that_finds_no_room_is_waited_for_by_the_client_and_told_when_there_is_some(
    tmp_path: Path,
) -> None:
    async with running_server(tmp_path) as server, MoltBot(server.address, server.key) as bot:
        api = Api.of(server)
        writing = server.core.store._writing
        call = api.stream(turn("#20000 wait=0.5", session="sessions/s", request_id="one"))
        accepted = (await call.read()).event.accepted
        waiting = asyncio.create_task(bot.run_turn("#20000 wait=0.5", session="s", request_id="one", within=30))
        used = writing.execute("PRAGMA page_count").fetchone()[0]
        writing.execute(f"PRAGMA max_page_count = {used}")
        broken = await refused(call)
        assert (broken.code(), reason_of(broken)) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
        assert "could not be kept yet" in broken.details()
        assert "same request_id" in broken.details()
        assert not waiting.done()
        writing.execute("PRAGMA max_page_count = 1000000")
        answer = await waiting
        assert answer.turn == accepted.turn
        assert len(answer.text.split()) == 20000
        await api.channel.close()


async def test_a_core_whose_database_takes_no_writes_says_so_until_it_does(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        assert server.core.health()["store"] == "ok"
        writing = server.core.store._writing
        writing.execute(f"PRAGMA max_page_count = {writing.execute('PRAGMA page_count').fetchone()[0]}")
        error = await refused(api.run(turn("x" * 60_000)))
        assert reason_of(error) == "STORAGE_FULL"
        told = server.core.health()
        assert (told["status"], told["store"]) == ("store away", "away: the disk is full (SQLITE_FULL)")
        assert told["store_away_s"] >= 0
        stub, known = health_pb2_grpc.HealthStub(api.channel), health_pb2.HealthCheckResponse
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == known.SERVING
        told_so = stub.Watch(health_pb2.HealthCheckRequest(service="moltbot.store"))
        async with asyncio.timeout(10):
            while (await told_so.read()).status != known.NOT_SERVING:
                pass

        writing.execute("PRAGMA max_page_count = 1000000")
        await until(lambda: server.core.health()["status"] == "ok")
        assert server.core.health()["store_away_s"] is None
        async with asyncio.timeout(10):
            assert (await told_so.read()).status == known.SERVING
        await api.channel.close()
