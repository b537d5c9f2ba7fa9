"""Which processes share a SQLite file: who is there, who is gone, and who writes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from moltbot_server.store.sqlite_nodes import Pen, SqliteNodes

_NODE = """
import sys
from pathlib import Path
from moltbot_server.store.sqlite_nodes import SqliteNodes
nodes = SqliteNodes(Path(sys.argv[1]), address="unix:/there")
nodes.join()
print(nodes.node, flush=True)
sys.stdin.read()
"""


def joined(folder: Path, address: str) -> SqliteNodes:
    """Return a node that has joined."""
    nodes = SqliteNodes(folder, address=address)
    nodes.join()
    return nodes


def test_a_node_knows_the_addresses_of_those_that_are_there(tmp_path: Path) -> None:
    one, other = joined(tmp_path / "nodes", "unix:/one"), joined(tmp_path / "nodes", "unix:/other")
    assert one.address_of(other.node) == "unix:/other"
    assert one.address_of(one.node) == "unix:/one"
    assert one.gone([one.node, other.node]) == set()
    assert one.left() == set()
    one.leave()
    other.leave()


def test_a_node_that_left_is_gone_until_it_is_struck(tmp_path: Path) -> None:
    one, other = joined(tmp_path, "unix:/one"), joined(tmp_path, "unix:/other")
    other.leave()
    assert one.address_of(other.node) == ""
    assert one.gone([other.node]) == {other.node}
    assert one.left() == {other.node}
    one.strike([other.node])
    assert one.left() == set()
    assert one.gone([other.node]) == {other.node}
    one.leave()


def test_a_node_that_nobody_has_ever_seen_is_gone(tmp_path: Path) -> None:
    one = joined(tmp_path, "unix:/one")
    assert one.gone(["0123456789abcdef"]) == {"0123456789abcdef"}
    assert one.address_of("0123456789abcdef") == ""
    assert one.address_of("") == ""
    one.leave()


def test_a_node_without_an_address_is_the_only_one_and_leaves_no_trace(tmp_path: Path) -> None:
    alone = joined(tmp_path / "nodes", "")
    other = joined(tmp_path / "nodes", "unix:/other")
    assert not alone.shared
    assert alone.gone([alone.node, other.node]) == {other.node}
    assert alone.address_of(other.node) == ""
    assert other.left() == set()
    other.leave()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_was_ended_is_gone_at_once(tmp_path: Path, number: signal.Signals) -> None:
    one = joined(tmp_path, "unix:/one")
    with subprocess.Popen(
        [sys.executable, "-c", _NODE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        node = process.stdout.readline().strip()
        assert one.address_of(node) == "unix:/there"
        process.send_signal(number)
        process.wait()
        assert one.left() == {node}
    one.leave()


def test_a_process_that_stands_still_is_there(tmp_path: Path) -> None:
    one = joined(tmp_path, "unix:/one")
    with subprocess.Popen(
        [sys.executable, "-c", _NODE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        node = process.stdout.readline().strip()
        process.send_signal(signal.SIGSTOP)
        assert one.left() == set()
        assert one.address_of(node) == "unix:/there"
        process.kill()
    one.leave()


async def test_one_holds_the_pen_and_the_next_has_it_when_it_is_laid_down(tmp_path: Path) -> None:
    mine, yours = Pen(tmp_path), Pen(tmp_path)
    written, both_waited = [], threading.Event()

    def write() -> None:
        both_waited.wait()
        with yours:
            written.append("yours")

    waiting = asyncio.create_task(asyncio.to_thread(write))
    with mine:
        both_waited.set()
        await asyncio.wait({waiting}, timeout=0.05)
        assert not written
        written.append("mine")
    await waiting
    assert written == ["mine", "yours"]
    mine.close()
    yours.close()
