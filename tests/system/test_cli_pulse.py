"""Who is asked how it does, and who is told to stand still."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from moltbot_server.cli.pulse import LONG_PATIENCE, OVERDUE, PATIENCE, Pulse
from moltbot_server.ops import OpsServer


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    """A selector, which has nothing left in it at the end."""
    with selectors.DefaultSelector() as selector:
        yield selector
        assert not selector.get_map()


@pytest.fixture
def pulse(selector: selectors.BaseSelector) -> Iterator[Pulse]:
    """What asks."""
    pulse = Pulse(selector)
    yield pulse
    pulse.close()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of one that stands still: the system takes connections for it, and it takes none of them up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def settle(selector: selectors.BaseSelector) -> None:
    """Let what comes within a moment come."""
    while events := selector.select(0.2):
        for key, _ in events:
            key.data()


def test_who_owes_an_answer_at_look_after_look_is_named_once(
    selector: selectors.BaseSelector, pulse: Pulse, silent: str
) -> None:
    named = []
    for _ in range(PATIENCE + 2):
        named.append(pulse.look({"core": silent}))
        settle(selector)
    assert named == [*[[]] * PATIENCE, ["core"], []]


def test_who_may_be_long_about_it_is_named_later(selector: selectors.BaseSelector, pulse: Pulse, silent: str) -> None:
    named: list[list[str]] = []
    for _ in range(LONG_PATIENCE + 2):
        named.append([*pulse.look({"engine": silent}, {"engine": LONG_PATIENCE})])
        settle(selector)
    assert named == [*[[]] * LONG_PATIENCE, ["engine"], []]


def test_who_should_have_left_is_named_sooner_and_the_others_are_not(
    selector: selectors.BaseSelector, pulse: Pulse, silent: str
) -> None:
    for _ in range(OVERDUE + 1):
        pulse.look({"core-1": silent, "core-2": silent})
        settle(selector)
    assert pulse.silent(["core-1", "http"], OVERDUE) == ["core-1"]
    assert pulse.silent(["core-1", "core-2"], OVERDUE + 1) == []
    pulse.look({"core-2": silent})
    assert pulse.silent(["core-1", "core-2"], OVERDUE + 1) == ["core-2"]


def test_who_answers_whatever_it_says_is_never_named(selector: selectors.BaseSelector, pulse: Pulse) -> None:
    asked = []
    ill = OpsServer(
        host="127.0.0.1", port=0, metrics=lambda: b"", health=lambda: asked.append(1) or {"status": "leaving"}
    )
    try:
        for _ in range(PATIENCE + 2):
            assert pulse.look({"core": ill.address}) == []
            settle(selector)
    finally:
        ill.close()
    assert len(asked) == PATIENCE + 2


def test_one_on_a_unix_socket_is_asked_as_well(selector: selectors.BaseSelector, pulse: Pulse, tmp_path: Path) -> None:
    path = tmp_path / "http-1.sock"
    places = {"http-1": f"unix:{path}", "http-2": f"unix:{tmp_path / 'nowhere'}"}
    named = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        for _ in range(PATIENCE + 1):
            named.append(pulse.look(places))
            settle(selector)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100).startswith(b"GET /health ")
    assert named == [*[[]] * PATIENCE, ["http-1"]]
    assert pulse.look(places) == []  # nobody is there now
    settle(selector)


def test_a_port_that_is_closed_and_an_address_that_is_none_prove_nothing(
    selector: selectors.BaseSelector, pulse: Pulse
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for _ in range(PATIENCE + 2):
        assert pulse.look({"core": f"127.0.0.1:{port}", "odd": "nowhere"}) == []
        settle(selector)


def test_who_is_not_looked_at_any_more_begins_anew(selector: selectors.BaseSelector, pulse: Pulse, silent: str) -> None:
    for _ in range(PATIENCE):
        pulse.look({"core": silent})
    assert pulse.look({}) == []
    for _ in range(PATIENCE):
        assert pulse.look({"core": silent}) == []
    assert pulse.look({"core": silent}) == ["core"]


def test_who_answers_in_pieces_is_heard_to_the_end(selector: selectors.BaseSelector, pulse: Pulse) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pulse.look({"core": f"127.0.0.1:{listener.getsockname()[1]}"})
        connection, _ = listener.accept()
        with connection:
            settle(selector)
            assert connection.recv(100).startswith(b"GET /health ")
            for _ in range(3):
                connection.sendall(b"HTTP/1.0 200 OK\r\n")
                settle(selector)
            connection.shutdown(socket.SHUT_WR)
            settle(selector)
            assert connection.recv(1) == b""  # closed, and not reset
    assert not selector.get_map()
