"""The bare server that the core is compared with: grpc.aio on uvloop, no work at all.

Run as `python -m moltbot_server.bench.echo`; it prints `{"ready": true, "grpc": ADDRESS}` and serves until its standard
input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
import uvloop
from google.protobuf.wrappers_pb2 import StringValue
from grpc import aio

SERVICE = "moltbot.bench.Echo"
MESSAGES = 32


async def _unary(request: StringValue, context: Any) -> StringValue:
    return StringValue(value=request.value)


async def _stream(request: StringValue, context: Any) -> None:
    for _ in range(MESSAGES):
        await context.write(StringValue(value=request.value))


async def _serve() -> None:
    coders: dict[str, Any] = {
        "request_deserializer": StringValue.FromString,
        "response_serializer": StringValue.SerializeToString,
    }
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary, **coders),
        "Stream": grpc.unary_stream_rpc_method_handler(_stream, **coders),
    }
    server = aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"ready": True, "grpc": f"127.0.0.1:{port}"}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    uvloop.run(_serve())
