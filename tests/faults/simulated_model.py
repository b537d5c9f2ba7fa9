"""The model of a core in virtual time: it says something of its own each time, and sometimes it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import msgspec
from moltbot_server.errors import InvalidField, ModelUnavailable
from moltbot_server.models.engine import NOBODY, Asker, Finished, Generation, Listener
from moltbot_server.models.engines.scripted import ScriptedEngine
from moltbot_server.turns import FinishReason, GenerationOptions, Message, Role, Usage
from simulated_world import World


class Speaker(Protocol):
    """The core that a model belongs to."""

    world: World

    def pieces(self) -> list[str]:
        """Return an answer that nobody else gives."""

    def record_read(self, messages: Sequence[Message], pieces: list[str]) -> None:
        """Take note of what a model read."""


class Model(ScriptedEngine):
    """Says something of its own each time, at a pace of the world's; sometimes it fails.

    At every other core it goes on with an answer that another one began, if it has anything to add.
    """

    healthy = True

    def __init__(self, node: Speaker) -> None:
        super().__init__()
        self.healthy = True
        self._node = node
        goes_on = node.world.random.random() < 0.5
        self.capabilities = msgspec.structs.replace(self.capabilities, continuation=goes_on)

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Begin an answer."""
        world = self._node.world
        dice = world.random
        if dice.random() < 0.02:
            raise ModelUnavailable("The model does not answer.")
        begun = messages[-1].text if messages[-1].role is Role.ASSISTANT else ""
        if begun and dice.random() < 0.1:
            raise InvalidField("messages", "there is nothing to add to the answer")
        asked = messages[:-1] if begun else messages
        self._node.record_read(asked, [begun, *(pieces := self._node.pieces())])
        recital = _Recital(self._node, listener, pieces, hurries=dice.random() < 0.2)
        recital.go_on()
        return recital


class _Recital:
    """An answer on its way."""

    def __init__(self, node: Speaker, listener: Listener, pieces: list[str], *, hurries: bool) -> None:
        self._node, self._listener, self._pieces, self._hurries = node, listener, pieces, hurries
        dice = node.world.random.random()
        self._fails = len(pieces) * dice * 20 if dice < 0.05 else None
        self._said = 0
        self._timer: asyncio.TimerHandle | None = None

    def go_on(self) -> None:
        """Say the next piece, or all that are left, or the end."""
        while True:
            self._timer = None
            if self._fails is not None and self._said >= self._fails:
                self._listener.ended(ModelUnavailable("The model broke."))
                return
            if self._said == len(self._pieces):
                usage = Usage(output_tokens=self._said)
                self._listener.ended(Finished(finish_reason=FinishReason.STOP, usage=usage))
                return
            if not self._hurries or self._said:
                break
            self._say()
        if self._hurries:
            while self._said < len(self._pieces):
                self._say()
            self.go_on()
            return
        pause = self._node.world.random.random() * 0.1
        self._timer = asyncio.get_running_loop().call_later(pause, self._next)

    def _next(self) -> None:
        self._say()
        self.go_on()

    def _say(self) -> None:
        self._said += 1
        self._listener.wrote(self._pieces[self._said - 1], 1)

    def stop(self) -> None:
        """Fall silent."""
        if self._timer is not None:
            self._timer.cancel()
