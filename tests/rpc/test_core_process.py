"""The core as a process: it starts or says why not, survives a crash with what it had, and leaves well."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from core_process import core_process
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from moltbot.v1 import chat_pb2, inference_pb2, message_pb2
from moltbot_server.workspace import Workspace
from rpc_calls import Api, drained, kinds, reason_of, refused, turn, until


async def test_a_killed_core_keeps_its_sessions_and_the_next_one_carries_its_turns_on(tmp_path: Path) -> None:
    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        await api.run(turn("before", session="sessions/s"))
        call = api.stream(turn("#150 pace=0.01", session="sessions/s", request_id="cut"))
        events = [(await call.read()).event for _ in range(5)]
        waiting = api.stream(turn("waits", session="sessions/s", request_id="waiting"))
        await waiting.read()
        core.signal(signal.SIGKILL)
        await core.end()
        broken = await refused(call)
        assert broken.code() is grpc.StatusCode.UNAVAILABLE
        await api.channel.close()

    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        name = events[0].accepted.turn
        resumed = await api.resumed(name, events[-1].sequence)
        # What was kept and had not come yet comes first, then what the next core adds to it.
        assert "reset" not in kinds(resumed)
        assert kinds(resumed)[-1] == "completed"
        lasted = resumed[-1].create_time.ToNanoseconds() - events[0].create_time.ToNanoseconds()
        assert resumed[-1].completed.timings.total.ToNanoseconds() == pytest.approx(lasted, rel=0.2)
        text = "".join(event.text_delta.text for event in (*events, *resumed))
        assert text == resumed[-1].completed.text
        assert len(text.split()) == 150
        numbers = [event.sequence for event in resumed]
        assert numbers == sorted(set(numbers))
        assert numbers[0] > events[-1].sequence

        # What was shown before the core was killed can be read again, in front of what came after it.
        whole = await api.resumed(name)
        before = [event for event in whole if event.sequence <= events[-1].sequence]
        assert "".join(e.text_delta.text for e in before) == "".join(e.text_delta.text for e in events)
        assert "reset" not in kinds(whole)
        assert "".join(event.text_delta.text for event in whole) == text
        again = await api.run(turn("#150 pace=0.01", session="sessions/s", request_id="cut"))
        assert again.completed.text == text
        unary = await api.run(turn("waits", session="sessions/s", request_id="waiting"))
        assert await api.said("sessions/s") == [
            "before", "You said: before", "#150 pace=0.01", text, "waits", unary.completed.text,
        ]  # fmt: skip
        await api.channel.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others are not asked for their limits")
async def test_a_core_leaves_no_dump_of_its_memory_whatever_its_parent_allows(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    if not before[1]:
        pytest.skip("this machine allows nobody a core dump")
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_CORE, before))
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    async with core_process(tmp_path) as core:
        await core.serving()
        assert psutil.Process(core.process.pid).rlimit(psutil.RLIMIT_CORE)[0] == 0


async def test_a_core_told_to_leave_ends_its_turns_and_leaves_with_zero(tmp_path: Path) -> None:
    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        call = api.stream(turn("#100 pace=0.01"))
        await call.read()
        health = health_pb2_grpc.HealthStub(api.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        core.signal(signal.SIGTERM)
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await refused(api.run(turn("too late")))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")

        assert kinds(await drained(call))[-1] == "completed"
        assert await core.end() == 0
        await api.channel.close()
    assert "Traceback" not in await core.whole_log()


async def test_a_core_that_leaves_takes_what_comes_until_callers_can_have_heard_of_it(tmp_path: Path) -> None:
    async with core_process(tmp_path, MOLTBOT_LAME_DUCK="1.5", MOLTBOT_DRAIN_GRACE="30") as core:
        api = (await core.serving()).api()
        call = api.stream(turn("#300 pace=0.01"))
        await call.read()
        health = health_pb2_grpc.HealthStub(api.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        told = time.monotonic()
        core.signal(signal.SIGTERM)
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        taken, refusal = 0, None
        while refusal is None:
            try:
                assert (await api.run(turn("in between"))).completed.text == "You said: in between"
                taken += 1
            except aio.AioRpcError as error:
                refusal = error
        assert taken > 0
        assert (refusal.code(), reason_of(refusal)) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")
        assert time.monotonic() - told >= 1.5

        assert kinds(await drained(call))[-1] == "completed"
        assert await core.end() == 0
        await api.channel.close()
    assert "Traceback" not in await core.whole_log()


async def test_turns_that_outlast_the_grace_are_handed_to_the_next_core(tmp_path: Path) -> None:
    async with core_process(tmp_path, MOLTBOT_DRAIN_GRACE="0.5") as core:
        api = (await core.serving()).api()
        call = api.stream(turn("#1 wait=3", request_id="long"))
        accepted = (await call.read()).event.accepted
        told = time.monotonic()
        core.signal(signal.SIGTERM)
        error = await refused(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")
        assert await core.end() == 0
        assert time.monotonic() - told < 4
        await api.channel.close()

    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        resumed = await api.resumed(accepted.turn)
        assert (kinds(resumed)[0], resumed[-1].completed.text) == ("accepted", "one")
        await api.channel.close()


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        call = api.stream(turn("#1 wait=30"))
        await call.read()
        core.signal(signal.SIGTERM)
        with contextlib.suppress(aio.AioRpcError):  # it is heard soon, and then nothing more begins
            while True:
                await api.run(turn("too late"))
        core.signal(signal.SIGTERM)
        assert await core.end(within=2) == 1
        call.cancel()
        await api.channel.close()
    async with core_process(tmp_path) as core:
        await core.serving()


async def test_an_interrupt_from_the_keyboard_drains_too(tmp_path: Path) -> None:
    async with core_process(tmp_path) as core:
        await core.serving()
        core.signal(signal.SIGINT)

        assert await core.end() == 0


@pytest.mark.parametrize("flag", ["--grpc-port", "--metrics-port"])
async def test_a_port_that_is_taken_is_named(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        async with core_process(tmp_path, flag, port) as core:
            assert await core.end() == 69
            log = await core.whole_log()

    assert f"127.0.0.1:{port}" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"MOLTBOT_GRPC_HOST": "0.0.0.0"}, "tls_cert"),
        ({"MOLTBOT_GRPC_HOST": "::"}, "tls_cert"),
        ({"MOLTBOT_METRICS_HOST": "0.0.0.0"}, "metrics_host"),
        ({"MODEL_TYPE": "no-such-model", "MODEL_PATH": "/nowhere"}, "/nowhere"),
    ],
)
async def test_an_unsafe_or_impossible_configuration_refuses_to_start(
    tmp_path: Path, environ: dict[str, str], told: str
) -> None:
    async with core_process(tmp_path, **environ) as core:
        assert await core.end() == 78
        log = await core.whole_log()

    assert told in log
    assert "Traceback" not in log


def test_without_a_key_a_core_says_what_to_type(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moltbot_server", "--workspace", str(tmp_path)]
    refused_start = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    assert refused_start.returncode == 78
    assert "moltbot init" in refused_start.stderr
    assert "Traceback" not in refused_start.stderr


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed, so no certificate can be made")
    return certificate, key


async def test_a_core_with_a_certificate_speaks_tls_and_nothing_else(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    environ = {"MOLTBOT_TLS_CERT": str(certificate[0]), "MOLTBOT_TLS_KEY": str(certificate[1])}
    async with core_process(tmp_path / "workspace", **environ) as core:
        await core.serving()
        credentials = grpc.ssl_channel_credentials(certificate[0].read_bytes())
        api = Api(aio.secure_channel(core.address, credentials), core.metadata)
        assert (await api.run(turn("hello"))).completed.text == "You said: hello"
        await api.channel.close()

        plain = core.api()
        error = await refused(plain.run(turn("hello"), timeout=5))
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        await plain.channel.close()
        host, _, port = core.address.rpartition(":")
        with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection((host, int(port))) as raw:
            ssl.create_default_context().wrap_socket(raw, server_hostname="localhost")


async def test_a_core_on_a_database_of_a_newer_release_refuses_to_start(tmp_path: Path) -> None:
    Workspace(folder=tmp_path).create()
    with sqlite3.connect(tmp_path / "moltbot.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    async with core_process(tmp_path) as core:
        assert await core.end() == 78
        log = await core.whole_log()

    assert "newer release" in log
    assert "Traceback" not in log


async def test_health_and_metrics_are_told_over_http(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with core_process(tmp_path, "--metrics-port", str(port)) as core:
        api = (await core.serving()).api()
        await api.run(turn("hello"))
        await api.channel.close()

        def page(path: str) -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        health = await asyncio.to_thread(page, "/health")
        metrics = await asyncio.to_thread(page, "/metrics")
        missing = await asyncio.to_thread(page, "/etc/passwd")

    assert health[0] == 200
    assert '"status": "ok"' in health[1]
    assert 'moltbot_turns_total{outcome="stop"} 1.0' in metrics[1]
    assert missing[0] == 404


async def test_streams_that_are_open_when_a_core_leaves_are_unavailable_not_unknown(tmp_path: Path) -> None:
    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        talk = api.chat.Converse(metadata=api.metadata)
        await talk.write(chat_pb2.ConverseRequest(ref="a", start=turn("hello")))
        assert (await talk.read()).event.accepted.turn
        said = message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text="#1000 pace=0.03")])
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(messages=[said]))
        generation = api.inference.Generate(request, metadata=api.metadata)
        assert (await generation.read()).text
        core.signal(signal.SIGTERM)
        errors = [await refused(talk), await refused(generation)]

        assert {error.code() for error in errors} == {grpc.StatusCode.UNAVAILABLE}
        assert await core.end() == 0
        await api.channel.close()
    assert "Traceback" not in await core.whole_log()


async def test_a_core_that_still_waits_for_its_engine_leaves_when_it_is_told_to(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/nobody.sock"
    async with core_process(tmp_path, "--engine", address) as core:
        # The threads of gRPC tell that the core looks for its engine.
        await until(lambda: psutil.Process(core.process.pid).num_threads() > 4, within=20)
        core.signal(signal.SIGTERM)

        assert await core.end(within=5) == 0
