"""One answer of an engine by itself, at moments that a whole engine hardly ever meets."""

from __future__ import annotations

from typing import Any

from moltbot.v1 import inference_pb2
from moltbot_server.rpc.remote_generation import RemoteGeneration


class Scene:
    """The engine that is asked, the link to it, its stream, and the listener, as far as one answer sees them."""

    id = "m"
    spec = None
    under_way = 0
    is_known = True

    def __init__(self) -> None:
        self.stream: Any = self
        self.cancelled: list[int] = []
        self.heard: list[object] = []

    def begin(self, request: inference_pb2.GenerateRequest, seconds: float | None, hearer: object) -> int:
        return 1

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def left(self) -> None:
        self.under_way -= 1

    def ended(self, end: object) -> None:
        self.heard.append(end)


async def test_an_answer_that_was_stopped_is_not_asked_for_again_when_its_stream_is_lost() -> None:
    scene: Any = Scene()
    generation = RemoteGeneration(scene, scene, inference_pb2.GenerateRequest(), scene, None)
    generation.stop()
    generation.lost(None)  # as when the loss of another one has it stopped

    assert scene.cancelled == [1]
    assert scene.under_way == 0
    assert generation._task is None
    assert scene.heard == []
