"""grpcurl learns the contract from a running core, and calls it with the key alone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from moltbot_server.testing import RunningServer, running_server

ROOT = Path(__file__).resolve().parents[2]
GRPCURL = shutil.which("grpcurl", path=os.pathsep.join([str(ROOT / ".tools" / "bin"), os.environ.get("PATH", "")]))

pytestmark = pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not installed: type  make test  which installs it")


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with running_server(tmp_path / "workspace") as server:
        yield server


async def grpcurl(*arguments: str) -> tuple[int, str, str]:
    """Runs grpcurl; answers its exit status, its output and its errors."""
    process = await asyncio.create_subprocess_exec(
        str(GRPCURL), "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
        output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def test_reflection_lists_every_service(core: RunningServer) -> None:
    status, output, errors = await grpcurl(core.address, "list")

    assert status == 0, errors
    assert set(output.split()) >= {
        "grpc.health.v1.Health",
        "moltbot.v1.ChatService",
        "moltbot.v1.InferenceService",
        "moltbot.v1.ModelService",
        "moltbot.v1.PluginService",
        "moltbot.v1.SessionService",
    }


async def test_reflection_describes_a_service_with_its_messages(core: RunningServer) -> None:
    status, output, errors = await grpcurl(core.address, "describe", "moltbot.v1.ChatService")

    assert status == 0, errors
    assert (
        "rpc StreamTurn ( .moltbot.v1.StreamTurnRequest ) returns ( stream .moltbot.v1.StreamTurnResponse );" in output
    )


async def test_a_turn_needs_nothing_but_reflection_and_the_key(core: RunningServer) -> None:
    turn = json.dumps({"turn": {"parts": [{"text": "Hello"}]}})
    header = f"authorization: Bearer {core.key}"

    status, output, errors = await grpcurl("-H", header, "-d", turn, core.address, "moltbot.v1.ChatService/RunTurn")

    assert status == 0, errors
    assert "FINISH_REASON_STOP" in json.loads(output)["completed"].values(), output


async def test_a_turn_without_a_key_is_refused_with_a_reason(core: RunningServer) -> None:
    turn = json.dumps({"turn": {"parts": [{"text": "Hello"}]}})

    status, _, errors = await grpcurl("-d", turn, core.address, "moltbot.v1.ChatService/RunTurn")

    assert status == 64 + 16, "grpcurl adds the status UNAUTHENTICATED to 64"
    assert "UNAUTHENTICATED" in errors
