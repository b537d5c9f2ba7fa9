"""`moltbot bench scale`: what it measures is what it says, in a run of seconds."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

from moltbot_server.bench.lean_load import LeanLoad
from moltbot_server.bench.scale import bench_scale, scale_table
from moltbot_server.bench.scale_balance import CONNECTIONS, balance
from moltbot_server.testing import running_server


def test_a_short_run_counts_turns_of_each_number_of_workers() -> None:
    told: list[str] = []
    report = bench_scale(
        workers=(1, 2), seconds=0.5, rounds=2, in_flight=8, connections=4, loaders=1, progress=told.append
    )
    assert report["turns_per_s"].keys() == report["detail"].keys() == {"1", "2"}
    assert min(report["turns_per_s"].values()) > 0
    detail = report["detail"]["2"]
    assert detail["lowest"] <= report["speedup_2"] <= detail["highest"]
    assert min(detail[name] for name in ("core_us", "load_us", "cores_busy", "load_busy", "p50_ms")) > 0
    assert report["machine"]["processors"] > 0
    assert set(report["balance"]) == {2}
    assert json.loads(json.dumps(report))["in_flight"] == 8
    table = scale_table(report)
    assert f"{report['speedup_2']:.2f}x" in table
    assert "64 connections" in table
    assert told


def test_one_process_has_all_connections_and_none_is_left_over() -> None:
    code = (
        "import socket, sys, threading\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "print(listener.getsockname()[1], flush=True)\n"
        "held = []\n"
        "while True:\n"
        "    held.append(listener.accept()[0])\n"
        "    held[-1].sendall(b'hello')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        found = balance(port, [process.pid], trials=2)
        assert found == {str(count): {"mean": 1.0, "worst": 1.0} for count in CONNECTIONS}
        with socket.create_connection(("127.0.0.1", port)):
            pass
        process.kill()


async def test_lean_load_makes_turns_that_are_stored_and_counts_what_is_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        load = LeanLoad(6)
        await load.connect(server.address, server.key, 3)
        found = await load.run(0.5)
        load.close()
        assert (found["errors"], found["first_error"]) == (0, "")
        assert found["calls"] > 6, (
            "more than one call on each connection, so the later ones name their headers by place"
        )
        assert 0 < found["p50_ms"] <= found["p99_ms"]
        page = server.core.metrics.page().decode()
        ended = re.findall(r"^moltbot_turns_total\{.*\} ([0-9.]+)$", page, re.MULTILINE)
        assert sum(map(float, ended)) >= found["calls"]

        stranger = LeanLoad(2)
        await stranger.connect(server.address, "mb_live_unknown", 1)
        found = await stranger.run(0.1)
        stranger.close()
        assert (found["calls"], found["errors"]) == (0, 2)
        assert "grpc-status" in found["first_error"]


async def test_lean_load_says_so_when_its_server_leaves(tmp_path: Path) -> None:
    load = LeanLoad(2)
    async with running_server(tmp_path) as server:
        await load.connect(server.address, server.key, 1)
        await load.run(0.1)
    found = await load.run(0.1)
    assert found["calls"] == 0
    assert found["errors"] == 2
