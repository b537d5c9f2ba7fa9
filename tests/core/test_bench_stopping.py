"""Ctrl-C in a benchmark: one line, nothing left behind, status 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize(
    ("words", "sign"),
    [
        (("local", "--quick", "--only", "builtin_ceiling_ratio"), "builtin"),
        (("core", "--seconds", "5"), "unary_ratio"),
        (("chat", "--seconds", "60"), "first chats"),
        (("scale", "--seconds", "5"), "workers start"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_ctrl_c_in_a_benchmark_says_one_line_and_leaves_nothing_behind(
    tmp_path: Path, words: tuple[str, ...], sign: str, times: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "moltbot_server.bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        process_group=0,  # as a shell does; Ctrl-C goes to all of it
    )
    assert process.stderr is not None
    while sign not in (line := process.stderr.readline()):
        assert line, "it ended before it began"
    begun = psutil.Process(process.pid).children(recursive=True)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        for left in (*begun, process):
            with suppress(psutil.NoSuchProcess):
                left.kill()

    told = [line for line in err.splitlines() if line and not line.startswith("[")]
    assert (process.returncode, out) == (130, "")
    assert told == ["moltbot: the benchmark was stopped; what it began is ended and removed."]
    assert psutil.wait_procs(begun, 5)[1] == []
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_a_benchmark_has_begun_says_the_same_line() -> None:
    code = (
        "import os\nfrom moltbot_server.bench import stopping\nstopping.leave_when_stopped()\nos.kill(os.getpid(), 2)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr.strip() == "moltbot: the benchmark was stopped; what it began is ended and removed."


def test_an_interrupt_that_the_interpreter_ignores_is_raised_again() -> None:
    code = """
import os, signal, time
from moltbot_server.bench.stopping import cleaned_up

class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

try:
    with cleaned_up():
        Freed()
        print("lost", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    time.sleep(3)
    print("heard once")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)

    assert (ended.returncode, ended.stdout) == (0, "lost\nheard once\n")
    assert ended.stderr.strip() == "moltbot: the benchmark was stopped; what it began is ended and removed."


def test_a_benchmark_leaves_alone_what_it_did_not_begin() -> None:
    code = """
import signal, subprocess
from moltbot_server.bench.stopping import cleaned_up

begin = lambda: subprocess.Popen(["sleep", "60"])
earlier = begin()
with cleaned_up():
    its = begin()
its.wait(5)  # which raises if it still runs; what it ended with was heard by those who ended it
print(earlier.poll(), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
earlier.kill()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)

    assert ended.stdout == "None True\nTrue\n"
