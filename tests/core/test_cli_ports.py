"""The ports that `moltbot start` takes."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import pytest
from moltbot_server.cli import ports
from moltbot_server.cli.ports import Wanted, port_problems, take_ports
from moltbot_server.cli.terminal import Failure


def again(others: Mapping[str, object]) -> str:
    return f"with {others}"


def wanted(key: str, port: int) -> Wanted:
    return Wanted(key=key, host="127.0.0.1", port=port, what=key)


def test_a_port_that_the_system_gives_twice_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([30001, 30001, 30003, 30001, 30002])

    def take(asked: Wanted) -> int:
        return asked.port or next(given)

    monkeypatch.setattr(ports, "_take", take)
    asked = [wanted("port", 0), wanted("grpc_port", 0), wanted("metrics_port", 30003)]
    assert take_ports(asked, again) == {"port": 30001, "grpc_port": 30002, "metrics_port": 30003}


def test_a_port_that_somebody_has_is_told_with_another_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Failure, match=f"port {port} .*in use by .*Choose another one: with"):
            take_ports([wanted("grpc_port", port)], again)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, []),
        ({"port": 0, "grpc_port": 0, "metrics_port": 0}, []),
        ({"port": 3000, "grpc_port": 8000}, []),
        ({"grpc_port": 8000}, [("grpc_port", "grpc_port and port are both 8000; give each its own")]),
        ({"port": 9464}, [("port", "port and metrics_port are both 9464; give each its own")]),
    ],
)
def test_the_http_adapter_has_a_port_of_its_own(values: Mapping[str, int], told: list[tuple[str, str]]) -> None:
    assert list(port_problems(values)) == told
