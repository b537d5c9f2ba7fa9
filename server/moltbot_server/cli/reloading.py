"""Telling a running core that its routes or its keys have changed."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import grpc
from moltbot.channel import open_channel
from moltbot.errors import from_status
from moltbot.v1 import route_pb2, route_pb2_grpc

from moltbot_server.cli.asking import Place
from moltbot_server.cli.reaching import find_core, key_for
from moltbot_server.cli.running import is_held
from moltbot_server.cli.terminal import Failure
from moltbot_server.workspace import Workspace, WorkspaceError

_PATIENCE = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """What became of it: `state` is `reloaded`, `not_running`, `next_start` or `refused`; `text` is for people."""

    state: str
    text: str


def reload_routes(workspace: Workspace, done: str = "The running core uses it now.") -> Reloaded:
    """Let the core of a workspace read its configuration and its keys again, if one runs. Never fails.

    `done` is what to say when it has.
    """
    if not os.environ.get("MOLTBOT_ADDRESS") and not is_held(workspace):
        return Reloaded(state="not_running", text="It holds from the next start on: MoltBot is not running here.")
    try:
        key = key_for(workspace)
        return asyncio.run(_reload(Place(address=find_core(workspace, ""), key=key), done))
    except (Failure, WorkspaceError) as problem:
        return Reloaded(state="next_start", text=f"It holds from the next start on: {problem}")


async def _reload(place: Place, done: str) -> Reloaded:
    channel = open_channel(place.address, None)
    try:
        answer = await route_pb2_grpc.RouteServiceStub(channel).ReloadRoutes(
            route_pb2.ReloadRoutesRequest(),
            timeout=_PATIENCE,
            metadata=(("authorization", f"Bearer {place.key}"),),
        )
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return Reloaded(state="next_start", text="It holds from the next start on.")
        told = from_status(error, place.address)
        return Reloaded(state="refused", text=f"The running core goes on as before: {told.message}")
    finally:
        await channel.close()
    rest = ", ".join(answer.needs_restart)
    also = f" A restart is needed for what else was changed: {rest}." if rest else ""
    return Reloaded(state="reloaded", text=f"{done}{also}")
