"""Whether processes still answer: their `/health` is asked again and again, and nobody waits for it."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Iterable, Mapping, Sequence

EVERY = 2.0
"""Seconds between two looks."""
PATIENCE = 5
LONG_PATIENCE = 30
"""Looks at which a process may owe an answer, and those at which an engine may, whose native code may keep it from one.

Looks and no seconds: when all of us stood still, nobody is to blame.
"""
OVERDUE = 2
"""Looks at which a process may owe an answer when it should have left by now."""

_NO_MORE: Mapping[str, int] = {}
_MOST = 65536
_QUESTION = b"GET /health HTTP/1.0\r\n\r\n"


class Pulse:
    """Asks processes how they are by the selector of whoever looks; whatever they answer, they are there."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        """The callbacks that it registers with `selector` are the data of its keys, to be called without arguments."""
        self._selector = selector
        self._asked: dict[str, socket.socket] = {}
        self._looks: dict[str, int] = {}

    def look(self, addresses: Mapping[str, str], patience: Mapping[str, int] = _NO_MORE) -> Sequence[str]:
        """Return the names of those that owe an answer for too long, and ask all that owe none.

        `addresses` are those of their ports for operators, such as `127.0.0.1:9464`, or `unix:PATH`; `patience` are the
        looks of those that may owe an answer for more than `PATIENCE`. One that is named is forgotten, so that whoever
        comes in its place is asked as if it were the first.
        """
        for name in self._asked.keys() - addresses.keys():
            self._forget(name)
        for name, address in addresses.items():
            if name in self._asked:
                self._looks[name] += 1
            else:
                self._ask(name, address)
        return [name for name in addresses if self.silent((name,), patience.get(name, PATIENCE))]

    def silent(self, names: Iterable[str], looks: int) -> Sequence[str]:
        """Return which of those named have owed an answer for so many looks. They are forgotten, as at `look`."""
        found = [name for name in names if self._looks.get(name, -1) >= looks]
        for name in found:
            self._forget(name)
        return found

    def close(self) -> None:
        """Ask nobody any more."""
        for name in tuple(self._asked):
            self._forget(name)

    def _ask(self, name: str, address: str) -> None:
        path = address.removeprefix("unix:") if address.startswith("unix:") else ""
        host, _, port = address.rpartition(":")
        family = socket.AF_UNIX if path else socket.AF_INET6 if ":" in host else socket.AF_INET
        asked = socket.socket(family, socket.SOCK_STREAM)
        asked.setblocking(False)
        try:
            asked.connect_ex(path or (host.strip("[]"), int(port)))
        except (OSError, ValueError):
            asked.close()
            return  # no address that can be asked; it proves nothing
        self._asked[name], self._looks[name] = asked, 0
        self._selector.register(asked, selectors.EVENT_WRITE, lambda: self._say(name, asked))

    def _say(self, name: str, asked: socket.socket) -> None:
        """Put the question, now that the connection stands; one that was refused says that nobody is there to ask."""
        try:
            asked.send(_QUESTION)
        except OSError:
            self._forget(name)
        else:
            self._selector.modify(asked, selectors.EVENT_READ, lambda: self._hear(name, asked))

    def _hear(self, name: str, asked: socket.socket) -> None:
        """Read on to the end of the answer: whoever is still writing would be told that the connection was reset."""
        try:
            ended = not asked.recv(_MOST)
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            self._forget(name)

    def _forget(self, name: str) -> None:
        asked = self._asked.pop(name)
        del self._looks[name]
        with contextlib.suppress(KeyError):
            self._selector.unregister(asked)
        asked.close()
