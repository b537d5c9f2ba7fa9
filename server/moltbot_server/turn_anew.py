"""An answer that is begun anew, for what wrote it is gone: what was shown stays until there is more to show."""

from __future__ import annotations

from moltbot_server.models.engine import Finished, Listener
from moltbot_server.turns import Notice, Reset, Routed

MOST = 2
"""How often an answer is begun anew. A question that ends every engine which reads it must end by itself."""
_WHY = "the engine was lost while it wrote: what comes now counts"


class Anew:
    """A listener before another one, which tells it first that what it has heard is void, but not before there is more.

    So an engine that does not come back leaves what it had written.
    """

    __slots__ = ("_listener", "_told")

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._told = False

    def queued(self, position: int) -> None:
        """Pass on the place in the queue."""
        self._listener.queued(position)

    def wrote(self, text: str, tokens: int) -> None:
        """Pass on another piece."""
        self._tell()
        self._listener.wrote(text, tokens)

    def thought(self, text: str) -> None:
        """Pass on what the model thinks."""
        self._tell()
        self._listener.thought(text)

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Pass on who answers, or what is void."""
        self._told = self._told or isinstance(what, Reset)
        self._listener.noted(what)

    def ended(self, end: Finished | Exception) -> None:
        """Pass on the end: a good one without a word makes what was shown void, too."""
        if isinstance(end, Finished):
            self._tell()
        self._listener.ended(end)

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._listener.noted(Reset(text="", reason=_WHY))
