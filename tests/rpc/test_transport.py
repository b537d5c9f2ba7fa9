"""What holds a connection: options that the library knows, and pings of clients that wait for a silent turn."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from grpc import aio
from grpc._cython import cygrpc
from moltbot_server.errors import AddressTaken
from moltbot_server.rpc import remote_engine, server
from moltbot_server.rpc.server import GrpcServer
from moltbot_server.testing import RunningServer
from rpc_calls import Api, reason_of, turn


@pytest.mark.parametrize(
    "options", [server._options(1 << 20), remote_engine._OPTIONS], ids=["server", "engine's client"]
)
def test_every_option_of_the_transport_is_one_that_the_library_knows(options: list[tuple[str, object]]) -> None:
    library = Path(cygrpc.__file__).read_bytes()
    unknown = [name for name, _ in options if name.encode() + b"\0" not in library]

    assert unknown == []


async def test_a_burst_of_calls_on_many_connections_is_answered_or_refused_with_a_reason(core: RunningServer) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    apis = [Api(aio.insecure_channel(core.address, options=options), core.metadata) for _ in range(20)]
    calls = [api.run(turn("hello")) for _ in range(100) for api in apis]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for api in apis:
        await api.channel.close()

    refusals = [outcome for outcome in outcomes if isinstance(outcome, aio.AioRpcError)]
    assert [refusal for refusal in refusals if reason_of(refusal) != "QUEUE_FULL"] == []


async def test_a_turn_that_is_silent_for_long_keeps_the_connection_of_a_client_that_pings(core: RunningServer) -> None:
    options = [("grpc.keepalive_time_ms", 10_000), ("grpc.http2.max_pings_without_data", 0)]
    api = Api(aio.insecure_channel(core.address, options=options), core.metadata)
    answer = await api.run(turn("#1 wait=45"), timeout=60)  # the fourth ping would be one too many
    await api.channel.close()

    assert answer.completed.text == "one"


async def test_a_port_that_is_taken_is_told_as_such_and_an_address_of_others_is_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = GrpcServer(host="127.0.0.1", port=listener.getsockname()[1], max_message_bytes=1 << 20)
        with pytest.raises(AddressTaken, match="another program listens there"):
            await taken.start()
    with pytest.raises(OSError, match=r"cannot be bound$") as caught:
        await GrpcServer(host="192.0.2.7", port=50051, max_message_bytes=1 << 20).start()
    assert not isinstance(caught.value, AddressTaken)
