"""Answers kept in Redis, for all nodes that name the same one.

Redis is never in the way: a lookup takes `PATIENCE` at most, and while Redis is away or slow everything counts as not
kept. Lookups and writes that come together travel together, over one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from hashlib import blake2b
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from moltbot_server import tasks
from moltbot_server.config import is_loopback
from moltbot_server.errors import StorageUnavailable
from moltbot_server.models.caching.backend import Key

PATIENCE = 0.05
"""Seconds that Redis may take for what travels together."""

REST = 5.0
"""Seconds after which Redis is tried again when it failed."""

_LONGEST_CONNECT = 2.0
_SOON = 0.5  # seconds that a start waits for Redis
_LONGEST_CLEAR = 30.0
_LONGEST_SILENCE = 5.0  # seconds in which not even a part of what is cleared was done; somebody waits for it
_TOGETHER = 256
_LARGEST = 1 << 20
_MOST_UNWRITTEN = 16 << 20
_STRIKES = 2
_PROBLEMS = (RedisError, OSError, TimeoutError)

log = logging.getLogger(__name__)


class RedisBackend:
    """Keeps values in Redis for `ttl` seconds. How much it keeps, and what goes first, is Redis' own setting."""

    kind = "redis"
    entries = size = 0

    def __init__(self, *, host: str, port: int, password: str = "", ttl: float, owner: str = "") -> None:
        """`owner` tells installations that share a Redis from each other, and is the same on all nodes of one."""
        self._owner = owner
        self.address = f"{host}:{port}"
        self._is_near = is_loopback(host)
        self.failures = 0
        # What an attempt costs is bounded here; a client that tries again by itself would wait unseen.
        self._client: Redis = Redis(
            host=host,
            port=port,
            password=password or None,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=_LONGEST_CONNECT,
            socket_timeout=_LONGEST_SILENCE,
            client_name="moltbot",
        )
        self._keep_ms = max(1, round(ttl * 1000))
        self._there = False
        self._strikes = 0
        self._wanted: list[tuple[str, asyncio.Future[bytes | None]]] = []
        self._unwritten: dict[str, bytes] = {}
        self._unwritten_size = 0
        self._worker: asyncio.Task[None] | None = None
        self._probe: asyncio.Task[None] | None = None

    @property
    def there(self) -> bool:
        """Whether Redis answered lately."""
        return self._there

    async def start(self) -> None:
        """Connect; where nobody answers it is tried again and again, and nothing is kept meanwhile."""
        if not self._is_near:
            log.warning("answers are kept in Redis and pass the network unencrypted", extra={"at": self.address})
        if not await self._answers(_SOON):
            log.warning("the cache cannot be reached; answers are not kept until it can", extra={"at": self.address})
            self._probe = asyncio.create_task(self._wait_for_it(REST))

    async def close(self) -> None:
        """Leave; what was not written is not kept."""
        self._there = False
        for task in (self._worker, self._probe):
            if task is not None:
                await tasks.end(task)
        self._give_up_waiting()
        await self._client.aclose()

    def find(self, key: Key) -> asyncio.Future[bytes | None] | None:
        """Return a future of what is kept; None, at once, while Redis is away."""
        if not self._there:
            return None
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._wanted.append((self._name(key), future))
        self._work_on()
        return future

    def put(self, key: Key, value: bytes) -> None:
        """Have a value written soon; too much that waits is not kept."""
        if not self._there or len(value) > _LARGEST or self._unwritten_size > _MOST_UNWRITTEN:
            return
        name = self._name(key)
        self._unwritten_size += len(value) - len(self._unwritten.get(name, b""))
        self._unwritten[name] = value
        self._work_on()

    async def clear(self, workspace: str) -> int:
        """Forget what belongs to a workspace; see `Backend.clear`."""
        self._unwritten.clear()
        self._unwritten_size = cleared = 0
        try:
            async with asyncio.timeout(_LONGEST_CLEAR):
                cursor = 0
                while True:
                    cursor, names = await self._client.scan(cursor, match=f"{self._prefix(workspace)}*", count=1000)
                    cleared += int(await self._client.unlink(*names)) if names else 0
                    if not cursor:
                        return cleared
        except _PROBLEMS as problem:
            self._fail(problem)
            raise StorageUnavailable(
                f"The cache was not cleared: Redis at {self.address} does not answer. "
                f"{cleared or 'No'} entries were forgotten.",
                retry_after=REST,
            ) from None

    # --- what travels together ---------------------------------------------------------------------------------------

    def _work_on(self) -> None:
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._there and (self._wanted or self._unwritten):
            asked, self._wanted = self._wanted[:_TOGETHER], self._wanted[_TOGETHER:]
            answers: list[bytes | None] = [None] * len(asked)
            try:
                async with asyncio.timeout(PATIENCE):
                    answers = await self._exchange([name for name, _ in asked], self._next_writes())
                self._strikes = 0
            except Exception as problem:  # whatever it is, turns wait for an answer
                self._fail(problem)
            finally:
                for (_, future), answer in zip(asked, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
        self._give_up_waiting()

    async def _exchange(self, names: list[str], written: dict[str, bytes]) -> list[bytes | None]:
        """Write and read in one go and return what was read."""
        pipeline: Any = self._client.pipeline(transaction=False)
        for name, value in written.items():
            pipeline.set(name, value, px=self._keep_ms)
        for name in names:
            pipeline.get(name)
        answers = await pipeline.execute(raise_on_error=False)
        read = answers[len(written) :]
        for answer in read:
            if isinstance(answer, Exception):
                raise answer
        # One that is full, or a copy that takes no writes, still reads.
        self.failures += any(isinstance(answer, Exception) for answer in answers)
        return list(read)

    def _next_writes(self) -> dict[str, bytes]:
        """Take what is to be written next: not so much that those who read wait for it."""
        taken: dict[str, bytes] = {}
        room = _LARGEST
        while self._unwritten and room > 0 and len(taken) < _TOGETHER:
            name, value = self._unwritten.popitem()
            taken[name] = value
            room -= len(value)
            self._unwritten_size -= len(value)
        return taken

    def _give_up_waiting(self) -> None:
        if self._there:
            return
        waiting, self._wanted = self._wanted, []
        for _, future in waiting:
            if not future.done():
                future.set_result(None)
        self._unwritten.clear()
        self._unwritten_size = 0

    # --- when Redis is away ------------------------------------------------------------------------------------------

    def _fail(self, problem: Exception) -> None:
        """Count a failure, and do without Redis for a while when it is gone, or slow twice in a row."""
        self.failures += 1
        self._strikes += 1
        # One that is slow once may be our own event loop's doing.
        if not self._there or (isinstance(problem, TimeoutError) and self._strikes < _STRIKES):
            return
        self._there, self._strikes = False, 0
        log.warning("the cache is away", extra={"at": self.address, "problem": type(problem).__name__})
        # A connection that was closed may be had again at once.
        rest = 0.0 if isinstance(problem, RedisConnectionError) else REST
        self._probe = asyncio.create_task(self._wait_for_it(rest))

    async def _wait_for_it(self, rest: float) -> None:
        """Try every now and then whether Redis is there again."""
        while True:
            await asyncio.sleep(rest)
            if await self._answers(_LONGEST_CONNECT):
                break
            rest = REST
        log.info("the cache is there again", extra={"at": self.address})

    def _prefix(self, workspace: str) -> str:
        """Return how the names of a workspace's entries begin; no name of a workspace means anything to Redis."""
        whose = f"{self._owner}/{workspace}" if self._owner else workspace
        return f"moltbot:1:answers:{blake2b(whose.encode(), digest_size=8).hexdigest()}:"

    def _name(self, key: Key) -> str:
        return self._prefix(key[0]) + key[1].hex()

    async def _answers(self, within: float) -> bool:
        with contextlib.suppress(*_PROBLEMS):
            async with asyncio.timeout(within):
                await self._client.ping()
                self._there = True
                return True
        return False
