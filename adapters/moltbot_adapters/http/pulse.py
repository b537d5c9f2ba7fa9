"""A Unix socket of one process' own, on which its event loop says that it goes round.

The port tells nothing of one process where several share it, and what is asked there may wait for the core.
"""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

_BODY = b'{"status": "ok"}\n'
_HEAD = f"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n\r\n".encode()
_WITHIN_S = 10.0


async def listen(path: Path) -> Callable[[], None]:
    """Answers whoever asks on a socket at `path`, as a request for `/health` is answered; returns what ends that.

    Raises `OSError` when the socket cannot be made.
    """
    try:
        server = await asyncio.start_unix_server(_answer, path)
    except OSError as error:
        raise OSError(f"the socket {path} cannot be made: {error.strerror or error}") from error

    def end() -> None:
        server.close()
        path.unlink(missing_ok=True)

    return end


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers a request, whatever it asks for: what counts is that anybody answers."""
    # Who leaves, or does not ask, wants no answer. That this process leaves is no fault either, of which asyncio's
    # streams would tell at length.
    nothing = (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError)
    with contextlib.suppress(*nothing):
        async with asyncio.timeout(_WITHIN_S):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(_HEAD + _BODY)
            await writer.drain()
    writer.close()
