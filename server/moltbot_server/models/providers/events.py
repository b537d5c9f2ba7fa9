"""Server-sent events out of bytes as they come; https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

LARGEST_EVENT = 1 << 20
"""Bytes that one event may have."""


class Broken(Exception):
    """What a provider sent cannot be read; the text says what is wrong with it and shows nothing of it."""


class EventLines:
    """Cuts a stream into the `data` of its events; their names, ids and comments are left out.

    An event is read when its blank line has come, so a read that ends inside a character breaks none.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of the events that are complete now.

        Raises:
            Broken: an event is too large.
        """
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            # A line may end in any of three ways; the half of one may be still to come.
            half = data.endswith(b"\r")
            data = (data[:-1] if half else data).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            events = data.split(b"\n\n")
            self._rest = events.pop() + (b"\r" if half else b"")
        else:
            events = data.split(b"\n\n")
            self._rest = events.pop()
        if len(self._rest) > LARGEST_EVENT:
            raise Broken("it sent an event that is larger than 1 MiB")
        found = []
        for event in events:
            if len(event) > LARGEST_EVENT:
                raise Broken("it sent an event that is larger than 1 MiB")
            # Without a call for the two forms in which nearly all come: the data alone, or after the event's name.
            if event.startswith(b"data: ") and b"\n" not in event:
                found.append(event[6:])
            elif event.startswith(b"event: ") and event.count(b"\n") == 1 and (at := event.find(b"\ndata: ")) > 0:
                found.append(event[at + 7 :])
            elif (payload := _data(event)) is not None:
                found.append(payload)
        return found

    def end(self) -> list[bytes]:
        """Return the data of a last event that lacks its blank line, as some servers send it."""
        rest, self._rest = self._rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), b""
        payload = _data(rest) if rest.strip() else None
        return [] if payload is None else [payload]


def _data(event: bytes) -> bytes | None:
    event = event.removeprefix(b"\xef\xbb\xbf")  # a stream may begin with a byte order mark
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    if lines:
        return b"\n".join(lines)
    return b"" if event.strip() == b"data" else None
