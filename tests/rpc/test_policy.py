"""Access: every RPC has a rule, every rule has an RPC, and nothing is answered without a key."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from moltbot_server.auth.keys import Authenticator
from moltbot_server.auth.policy import MEMBER, POLICY
from moltbot_server.rpc.server import SERVICES
from moltbot_server.testing import RunningServer
from moltbot_server.turns import Principal
from rpc_calls import Api, details_of, reason_of, refused

OURS = sorted(method for method in POLICY if method.startswith("/moltbot."))
OPEN = {
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
}


def declared(service: str) -> set[str]:
    """Return the RPCs that the contract declares for a service."""
    descriptor = descriptor_pool.Default().FindServiceByName(service)
    return {f"/{service}/{method.name}" for method in descriptor.methods}


def call(api: Api, method: str, metadata: tuple[tuple[str, str], ...]) -> Any:
    """Return an RPC called by its name with an empty request, whatever its kind."""
    service, _, name = method[1:].partition("/")
    descriptor = descriptor_pool.Default().FindServiceByName(service).FindMethodByName(name)
    if descriptor.client_streaming:
        # Nothing is sent: where a refusal comes while grpcio sends, it reports its own failed write instead.
        return api.channel.stream_stream(method)(metadata=metadata)
    if descriptor.server_streaming:
        return api.channel.unary_stream(method)(b"", metadata=metadata)
    return api.channel.unary_unary(method)(b"", metadata=metadata)


def test_every_rpc_that_is_served_has_a_rule_and_every_rule_an_rpc(core: RunningServer) -> None:
    assert sorted(core.core.server.methods) == sorted(POLICY)
    assert {method for service in SERVICES for method in declared(service)} == set(OURS)


def test_only_health_and_reflection_are_open_to_everybody() -> None:
    assert {method for method, roles in POLICY.items() if roles is None} <= OPEN
    assert all(roles for method, roles in POLICY.items() if method in OURS)


@pytest.mark.parametrize("method", OURS)
async def test_without_the_right_key_nothing_is_answered(api: Api, core: RunningServer, method: str) -> None:
    key = core.key
    wrong: list[tuple[tuple[str, str], ...]] = [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", key),),
        (("authorization", f"Basic {key}"),),
        (("authorization", f"Bearer {key[:-1]}"),),
        (("authorization", f"Bearer {key}x"),),
        (("authorization", f"Bearer {key.lower()}"),),
        (("authorization", "Bearer " + "x" * 2000),),
        (("x-api-key", key),),
    ]
    for metadata in wrong:
        error = await refused(call(api, method, metadata))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"), metadata
        assert key not in (error.details() or "") + str(details_of(error))


async def test_malformed_bytes_without_a_key_are_unauthenticated_not_malformed(api: Api) -> None:
    error = await refused(api.channel.unary_unary("/moltbot.v1.ChatService/RunTurn")(b"\xff\xff"))

    assert reason_of(error) == "UNAUTHENTICATED"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_is_read_in_any_case(api: Api, core: RunningServer, scheme: str) -> None:
    method = "/moltbot.v1.ModelService/ListModels"

    await call(api, method, (("authorization", f"{scheme} {core.key}"),))
    await call(api, method, (("authorization", f"{scheme}   {core.key}  "),))


async def test_a_member_may_talk_but_not_change_models(api: Api, core: RunningServer) -> None:
    member = Principal(workspace="default", key_id="m", role=MEMBER)
    core.core.authenticator._principals.update(Authenticator({"a member's key": member})._principals)
    metadata = (("authorization", "Bearer a member's key"),)

    await call(api, "/moltbot.v1.ModelService/ListModels", metadata)
    for name in ("LoadModel", "SwitchModel", "UnloadModel"):
        error = await refused(call(api, f"/moltbot.v1.ModelService/{name}", metadata))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")


async def test_health_is_told_to_everybody(api: Api) -> None:
    stub = health_pb2_grpc.HealthStub(api.channel)
    for service in ("", *SERVICES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    error = await refused(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_tells_the_contract_on_loopback(api: Api) -> None:
    stream = reflection_pb2_grpc.ServerReflectionStub(api.channel).ServerReflectionInfo()
    await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = await stream.read()
    await stream.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="moltbot.v1.ChatService"))
    described = await stream.read()
    await stream.done_writing()

    names = {service.name for service in listed.list_services_response.service}
    assert set(SERVICES) <= names
    assert described.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize(
    ("symbol", "is_known"),
    [
        ("moltbot.v1.ChatService.StreamTurn", True),  # ghz asks like that
        ("moltbot.v1.StreamTurnRequest", True),
        ("moltbot.v1.ChatService.Nothing", False),
        ("nowhere.ChatService.StreamTurn", False),
    ],
)
async def test_reflection_knows_methods_as_well(api: Api, symbol: str, is_known: bool) -> None:
    question = reflection_pb2.ServerReflectionRequest(host="here", file_containing_symbol=symbol)
    stream = reflection_pb2_grpc.ServerReflectionStub(api.channel).ServerReflectionInfo()
    await stream.write(question)
    answer = await stream.read()
    await stream.done_writing()

    assert answer.original_request == question
    assert bool(answer.file_descriptor_response.file_descriptor_proto) is is_known
    assert answer.error_response.error_code == (0 if is_known else grpc.StatusCode.NOT_FOUND.value[0])
