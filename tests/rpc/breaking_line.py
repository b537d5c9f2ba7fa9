"""A line between a client and a core that a test can cut, or that swallows all that is sent."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

_AT_ONCE = struct.pack("ii", 1, 0)  # closing drops what waits and tells the peer by a reset


class _Connection:
    """One connection and its other end at the core."""

    def __init__(self) -> None:
        self.dead = False
        self.writers: list[asyncio.StreamWriter] = []

    def reset(self) -> None:
        for writer in self.writers:
            own: socket.socket = writer.get_extra_info("socket")
            if own.fileno() >= 0:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if not self.dead:
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass  # reset by an end, which the other one is told by closing
        finally:
            writer.close()


class BreakingLine:
    """Carries connections on a port of its own to a core; `target` may change."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.address = ""
        self.carried = 0
        """How many connections there have been."""
        self.tasks: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        self._swallows = False

    def reset(self) -> None:
        """Reset every connection there is; new ones are carried."""
        for connection in tuple(self._connections):
            connection.reset()

    def swallow(self) -> None:
        """Let nothing through any more, and tell nobody. New connections are taken and hear nothing either."""
        self._swallows = True
        for connection in self._connections:
            connection.dead = True

    def heal(self) -> None:
        """Carry new connections again. Those that were swallowed stay as they are, and nobody tells them."""
        self._swallows = False

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.carried += 1
        connection = _Connection()
        connection.dead = self._swallows
        connection.writers.append(writer)
        self._connections.add(connection)
        host, _, port = self.target.rpartition(":")
        try:
            away, back = await asyncio.open_connection(host, int(port))
            connection.writers.append(back)
            await asyncio.gather(connection.carry(reader, back), connection.carry(away, writer))
        except OSError:
            connection.reset()
        finally:
            self._connections.discard(connection)

    def taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection, until the line ends."""
        task = asyncio.create_task(self._carry(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def end(self) -> None:
        """Reset what is left and wait until nobody carries anything."""
        self.reset()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@asynccontextmanager
async def breaking_line(target: str) -> AsyncGenerator[BreakingLine, None]:
    """Lay a line to a core."""
    line = BreakingLine(target)
    server = await asyncio.start_server(line.taken, "127.0.0.1", 0)
    line.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield line
    finally:
        server.close()
        await line.end()
        await server.wait_closed()
