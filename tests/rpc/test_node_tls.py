"""Cores on one Redis that speak TLS with each other, and what is said where they do not trust each other."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode, aio
from moltbot_server.config import Storage
from moltbot_server.testing import RunningServer, running_server
from redis_process import KeepingRedis
from rpc_calls import LOOPBACK_NAME, Api, WatchedEngine, certificate, drained, reason_of, turn

SESSION = "sessions/s"
SLOW = "#40 pace=0.03"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeepingRedis]:
    """A Redis that keeps what it is given; each test has a prefix of its own in it."""
    with KeepingRedis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


def secure(server: RunningServer, cert: Path) -> Api:
    """Return the services of a core, called over TLS."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    credentials = grpc.ssl_channel_credentials(cert.read_bytes())
    return Api(aio.secure_channel(server.address, credentials, options=options), server.metadata)


@asynccontextmanager
async def nodes(redis: KeepingRedis, folder: Path, *each: dict[str, Any]) -> AsyncGenerator[list[Api], None]:
    """Run cores with settings of their own each."""
    store = Storage(type="redis", host="127.0.0.1", port=redis.port, prefix=f"test-{secrets.token_hex(4)}")
    async with AsyncExitStack() as running:
        apis = []
        for settings in each:
            made = running_server(folder / "home", engine=WatchedEngine(), store=store, grace=0.5, **settings)
            apis.append(secure(await running.enter_async_context(made), settings["tls_cert"]))
        yield apis
        for api in apis:
            await api.channel.close()


def problems(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    """Return what warnings with this text tell as the problem."""
    return [getattr(record, "problem", "") for record in caplog.records if record.getMessage() == text]


NOT_TRUSTED = "another core is not trusted"
WILL_NOT_TRUST = "other cores will not trust this one, and cannot pass calls on to it"


async def test_calls_are_passed_on_over_tls(
    tmp_path: Path, redis: KeepingRedis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    one, two = certificate(tmp_path / "tls", "one"), certificate(tmp_path / "tls", "two")
    both = tmp_path / "both.crt"
    both.write_bytes(one["tls_cert"].read_bytes() + two["tls_cert"].read_bytes())
    async with nodes(redis, tmp_path, *({**files, "advertise_ca": both} for files in (one, two))) as (here, there):
        running = here.stream(turn(SLOW, session=SESSION))
        name = (await running.read()).event.accepted.turn
        streamed = there.stream(turn("behind", session=SESSION))
        events = await drained(streamed)
        assert events[0].accepted.turn == f"{SESSION}/turns/2"
        assert events[-1].completed.text == "You said: behind"
        assert [event.sequence for event in await there.resumed(name)][-1] > 1
        assert (await drained(running))[-1].HasField("completed")

        again = here.stream(turn(SLOW, session=SESSION))
        name = (await again.read()).event.accepted.turn
        assert await there.cancel(name)
        assert (await drained(again))[-1].HasField("completed")
    assert problems(caplog, NOT_TRUSTED) == problems(caplog, WILL_NOT_TRUST) == []


async def test_a_core_whose_certificate_is_not_proved_is_named_in_the_log_once(
    tmp_path: Path, redis: KeepingRedis, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = certificate(tmp_path / "tls", "one"), certificate(tmp_path / "tls", "two")
    settings = ({**one, "advertise_ca": one["tls_cert"]}, {**two, "advertise_ca": two["tls_cert"]})
    async with nodes(redis, tmp_path, *settings) as (here, there):
        running = here.stream(turn(SLOW, session=SESSION))
        await running.read()
        for _ in range(2):
            with pytest.raises(aio.AioRpcError) as caught:
                await there.run(turn("behind", session=SESSION))
            assert (caught.value.code(), reason_of(caught.value)) == (StatusCode.UNAVAILABLE, "NOT_SERVING")
        running.cancel()
    (told,) = problems(caplog, NOT_TRUSTED)
    assert "advertise_ca" in told
    assert "self signed" in told
    assert problems(caplog, WILL_NOT_TRUST) == []


@pytest.mark.parametrize(
    ("holds", "with_ca", "word"),
    [(LOOPBACK_NAME, False, "advertise_ca"), ("subjectAltName=DNS:core.example", True, "name")],
)
async def test_a_core_that_others_would_not_trust_says_so_when_it_starts(
    tmp_path: Path, redis: KeepingRedis, caplog: pytest.LogCaptureFixture, holds: str, with_ca: bool, word: str
) -> None:
    files = certificate(tmp_path / "tls", "one", holds)
    async with nodes(redis, tmp_path, {**files, "advertise_ca": files["tls_cert"] if with_ca else None}):
        (told,) = problems(caplog, WILL_NOT_TRUST)
    assert word in told
