"""What the READMEs tell people to type works, in their order, against the MoltBot that their first command starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTS = "make run\n"
"""The block that starts MoltBot; the fixture below runs it, and the others find it running."""
READY_WITHIN = 60
ANSWERED = re.compile(r"s to the first word")


@dataclass(frozen=True, slots=True)
class Started:
    """What `make run` started: the environment of a person beside it, and where it listens."""

    environment: dict[str, str]
    ports: dict[str, str]

    def here(self, text: str) -> str:
        """Replaces the ports that people have by those of this test."""
        for usual, own in self.ports.items():
            text = text.replace(usual, own)
        return text


def blocks() -> list[tuple[str, str]]:
    told = [FENCE.findall((ROOT / name).read_text("utf-8")) for name in ("README.md", "README.zh-CN.md")]
    for found in told:
        assert found[0] == ("sh", STARTS), "the first thing to type starts MoltBot"
    return [block for block in dict.fromkeys([*told[0], *told[1]]) if block[1] != STARTS]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """Runs `make run` as a newcomer does, with a home of its own and ports that nobody has."""
    if not (ROOT / ".venv" / ".installed-run").exists():
        pytest.skip("this environment was not made by make: type  make test")
    home = tmp_path_factory.mktemp("home")
    http, grpc, metrics = free_ports(3)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MOLTBOT_", "MAKE", "MFLAGS"))
    }
    environment |= {
        "HOME": str(home),
        "MOLTBOT_WORKSPACE": str(home / ".moltbot"),
        "PATH": os.pathsep.join([str(ROOT / ".tools" / "bin"), environment.get("PATH", "")]),
    }
    options = {"RUN_ARGS": f"--port {http} --grpc-port {grpc} --metrics-port {metrics}"}
    process = subprocess.Popen(
        ["bash", "-c", STARTS],
        cwd=ROOT,
        env=environment | options,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    told: list[str] = []
    answered_or_ended = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line)
            if ANSWERED.search(line):
                answered_or_ended.set()
        answered_or_ended.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        answered_or_ended.wait(READY_WITHIN)
        assert ANSWERED.search("".join(told)), "".join(told)
        assert f"http://127.0.0.1:{http}/login?code=" in "".join(told)
        yield Started(environment, {"127.0.0.1:8000": f"127.0.0.1:{http}", "127.0.0.1:50051": f"127.0.0.1:{grpc}"})
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
        listener.join(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(("language", "text"), blocks(), ids=[text.split("\n")[0][:40] for _, text in blocks()])
def test_what_the_readme_tells_to_type_works(started: Started, language: str, text: str) -> None:
    program = text.split()[0]
    if (
        language == "sh"
        and program in {"grpcurl", "curl"}
        and not shutil.which(program, path=started.environment["PATH"])
    ):
        pytest.skip(f"{program} is not installed")
    command = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]

    result = subprocess.run(
        [*command, started.here(text)],
        cwd=ROOT,
        env=started.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
