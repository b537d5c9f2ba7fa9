"""A connection to Redis that carries calls in groups: what the event loop gathered travels together.

Groups follow each other without waiting for answers, which come in the order of the calls. When the connection breaks,
what has no answer is sent again on the next one, where that can do no harm; what cannot be answered in time is refused,
and where Redis may have done it all the same, it is undone first of all when Redis is there again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from moltbot_server import tasks
from moltbot_server.errors import MoltBotError, StorageFull, StorageUnavailable
from moltbot_server.store.damage import Unreadable, damage
from moltbot_server.store.pending import Pending
from moltbot_server.store.redis_presence import Presence, why_no_writes
from moltbot_server.store.redis_wire import Wire

log = logging.getLogger(__name__)

Argument = str | bytes | int | float
Command = tuple[Argument, ...]
T = TypeVar("T")

QUICK = 2.0
"""Seconds that Redis may take to answer a call, and that most calls may take in all."""
PATIENT = 8.0
"""Seconds for which calls that end something are kept while Redis is away."""

_RETRY_AFTER = 1.0
_MOST_UNDER_WAY = 1024
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
_REPLICA = "it has become a replica, which takes no writes (READONLY): name the one that it copies in store.host"
_BROKEN = (NoScriptError, ReadOnlyError)  # what another connection may know or do


# Its stub knows tuples of one argument.
_pack: Callable[[Command], bytes] = pack_command  # type: ignore[assignment]


class Call(Pending[T]):
    """Commands that go to Redis one behind the other, and whoever waits for what they say.

    `repeatable`: to carry them out twice is as to carry them out once. `undo` takes back what they did. A `tolerant`
    call reads refusals too.
    """

    __slots__ = ("commands", "patient", "read", "repeatable", "sent", "sent_at", "tolerant", "undo", "until")

    def __init__(
        self,
        *commands: Command,
        read: Callable[[list[Any]], T | MoltBotError],
        patient: bool = False,
        repeatable: bool = True,
        undo: Sequence[Command] = (),
        tolerant: bool = False,
    ) -> None:
        super().__init__()
        self.commands = commands
        self.read = read
        self.patient = patient
        self.repeatable = repeatable
        self.undo = undo
        self.tolerant = tolerant
        self.until = asyncio.get_running_loop().time() + (PATIENT if patient else QUICK)
        self.sent = False
        self.sent_at = 0.0

    def hear_replies(self, replies: list[Any]) -> None:
        """Settle with what the replies say."""
        self.settle(_outcome(self.read, replies, tolerant=self.tolerant))


class RedisLine:
    """One connection, opened again whenever it breaks, and the task that owns it."""

    def __init__(
        self,
        connect: Callable[[], AbstractConnection],
        *,
        scripts: Sequence[Command],
        presence: Presence,
    ) -> None:
        """`connect` makes a connection that is not open yet.

        `presence` hears when Redis is away, when it is there again, and what it refuses.
        """
        self._connect = connect
        self._scripts = scripts
        self._connected: list[Callable[[], None]] = []
        self._presence = presence
        self._wire: Wire | None = None
        self._waiting: deque[Call[Any]] = deque()
        self._under_way: deque[Call[Any]] = deque()
        self._undo: list[Command] = []
        self._replies: list[Any] = []
        self._wanted = asyncio.Event()
        self._sending = False
        self._idle = asyncio.Event()
        self._away = self._closed = False
        self._run_id = ""
        self.client_id = 0
        """The number that Redis gave the connection; of the last one while there is none."""
        self._pause = _SHORTEST_PAUSE
        self._breaks = 0
        self._problem: Exception | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._worker: asyncio.Task[None] | None = None
        self.server: dict[str, str] = {}

    def when_connected(self, hear: Callable[[], None]) -> None:
        """Have `hear` called for each connection that is opened from now on."""
        self._connected.append(hear)

    @property
    def waiting(self) -> int:
        """How many calls wait to be sent, or to be answered."""
        return len(self._waiting) + len(self._under_way)

    async def open(self, within: float) -> None:
        """Connect; what fails is tried again for so many seconds.

        Raises:
            StorageUnavailable: Redis cannot be used; the text says why. Without `retry_after`, waiting does not help.
        """
        until, told = asyncio.get_running_loop().time() + within, False
        while (problem := await self._reconnect()) is not None:
            if _shut_out(problem):
                raise StorageUnavailable(why(problem)) from None
            if not told:
                fields = {"at": self._presence.address, "problem": why(problem), "for_seconds": within}
                log.info("Redis cannot be used and is tried again", extra=fields)
                told = True
            if asyncio.get_running_loop().time() >= until:
                raise StorageUnavailable(why(problem), retry_after=_RETRY_AFTER) from None
            await self._rest()
        self._worker = asyncio.create_task(self._work())

    def put(self, call: Call[T], *, gathered: bool = False) -> Call[T]:
        """Queue a call; while Redis is away, only those that are patient wait for it.

        One that was `gathered` already waits for no others: it goes at once, with all that wait.
        """
        if self._closed:
            call.settle(StorageUnavailable("the store is closed"))
        elif self._away and not call.patient:
            call.settle(_unavailable())
        else:
            self._waiting.append(call)
            if self._wire is None:
                self._wanted.set()
            elif gathered:
                self._send()
            else:
                self._send_soon()
        return call

    async def close(self) -> None:
        """Carry out what waits, if Redis is there, and disconnect."""
        if self._closed:
            return
        self._closed = True
        if self._worker is not None:
            self._wanted.set()
            try:
                async with asyncio.timeout(QUICK):
                    await self._idle.wait()
            except TimeoutError:
                log.error("Redis did not take everything before the end", extra={"calls": self.waiting})
            await tasks.end(self._worker)
        if self._watch is not None:
            self._watch.cancel()
        await self._disconnect()
        self._take_back()
        self._refuse(lambda call: True)

    # --- calls and replies --------------------------------------------------------------------------------------------

    def _send_soon(self) -> None:
        """Send what waits once the loop has gone through what it has at hand, which may bring more."""
        if not self._sending:
            self._sending = True
            asyncio.get_running_loop().call_soon(self._send_gathered)

    def _send_gathered(self) -> None:
        self._sending = False
        self._send()

    def _send(self) -> None:
        """Send what waits, as far as there is room for it."""
        wire, waiting, under_way = self._wire, self._waiting, self._under_way
        if wire is None or self._problem is not None:
            return
        now, chunks = asyncio.get_running_loop().time(), list[bytes]()
        while waiting and len(under_way) < _MOST_UNDER_WAY and not wire.is_full:
            call = waiting.popleft()
            if packed := _packed(call):
                chunks += packed
                call.sent, call.sent_at = True, now
                under_way.append(call)
        if chunks:
            wire.write(chunks)
            if self._watch is None:
                self._watch_over()

    def _hear(self, reply: Any) -> None:
        """Tell the call that was sent first what Redis says to it."""
        if isinstance(reply, RedisError):
            self._hear_refusal(reply)
        replies = self._replies
        replies.append(reply)
        call = self._under_way[0]
        if len(replies) == len(call.commands):
            self._replies = []
            self._under_way.popleft()
            self._breaks = 0
            call.hear_replies(replies)
            if self._waiting:
                self._send_soon()
            elif self._closed:
                self._wanted.set()

    def _hear_refusal(self, refusal: RedisError) -> None:
        """Give the connection up where another one may be told something else, and see whether writes are refused."""
        if isinstance(refusal, _BROKEN):
            raise refusal
        self._presence.refused(refusal)

    def _watch_over(self) -> None:
        """Look whether the call that was sent first was answered in time, and when to look again."""
        self._watch = None
        if not self._under_way:
            return
        loop = asyncio.get_running_loop()
        late = self._under_way[0].sent_at + QUICK
        if loop.time() >= late:
            self._fail(TimeoutError())
        else:
            self._watch = loop.call_at(late, self._watch_over)

    # --- the task -----------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        """See to it that there is a connection while there is something to say, or a Redis to look for."""
        while True:
            while self._problem is None and not self._is_missing():
                self._wanted.clear()
                if self._closed and not self._waiting and not self._under_way:
                    self._idle.set()
                await self._wanted.wait()
            if self._problem is not None:
                await self._broke(self._problem)
            elif (problem := await self._reconnect()) is not None:
                self._leave_be(problem)
                await self._rest()
            elif self._away:
                self._away = False
                self._presence.found(self)

    def _is_missing(self) -> bool:
        """Tell whether a connection is wanted that is not there."""
        return self._wire is None and bool(self._waiting or (self._away and not self._closed))

    def _fail(self, problem: Exception) -> None:
        """Have the connection given up, for the first reason that there is."""
        if self._problem is None:
            if not isinstance(problem, RedisError | OSError):
                log.error("what Redis says is not understood", exc_info=problem)
            self._problem = problem
            self._wanted.set()

    async def _broke(self, problem: Exception) -> None:
        """Give the connection up. Calls that were under way are sent again if that can do no harm."""
        await self._disconnect()
        self._breaks += 1
        self._take_back()
        now = asyncio.get_running_loop().time()
        self._refuse(lambda call: call.sent and (not call.repeatable or now >= call.until))
        if isinstance(problem, TimeoutError | ReadOnlyError):
            # It hangs, and whoever waits has waited long enough; or it has become a replica, and stays one for a while.
            self._leave_be(problem)
        elif self._breaks > 1:
            await self._rest()

    def _take_back(self) -> None:
        """Let what has no answer wait again, before all that was not sent yet."""
        self._waiting.extendleft(reversed(self._under_way))
        self._under_way.clear()
        self._replies = []

    def _leave_be(self, problem: Exception) -> None:
        """Refuse what cannot wait until Redis is there again."""
        if not self._away:
            self._away = True
            self._presence.lost(self, why(problem))
        now = asyncio.get_running_loop().time()
        self._refuse(lambda call: not call.patient or now >= call.until)

    def _refuse(self, chosen: Callable[[Call[Any]], bool]) -> None:
        refused = [call for call in self._waiting if chosen(call)]
        self._waiting = deque(call for call in self._waiting if not chosen(call))
        for call in refused:
            if call.sent:
                self._undo += call.undo
            call.settle(_unavailable())

    async def _rest(self) -> None:
        """Pause before Redis is tried again, longer each time, and not at once with all other nodes."""
        await asyncio.sleep(self._pause * (0.5 + random.random()))
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    # --- the connection -----------------------------------------------------------------------------------------------

    async def _reconnect(self) -> Exception | None:
        """Open a connection that knows the scripts, and undo what was refused; return why that cannot be."""
        connection = self._connect()
        try:
            async with asyncio.timeout(QUICK / 2 if self._away else QUICK):
                await connection.connect()  # type: ignore[no-untyped-call]
                await self._make_ready(connection)
            self._wire = Wire(connection, hear=self._hear, lost=self._fail, room=self._send_soon)
        except Exception as problem:
            if not isinstance(problem, RedisError | OSError):
                log.exception("what Redis says is not understood")
            await connection.disconnect(nowait=True)
            return problem
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._pause = _SHORTEST_PAUSE
        for hear in self._connected:
            hear()
        self._send_soon()
        return None

    async def _make_ready(self, connection: AbstractConnection) -> None:
        asked: tuple[Command, ...] = (("INFO", "server"), ("INFO", "replication"), ("CLIENT", "ID"))
        info, role, client_id = await _ask(connection, *asked)
        _raise_first((info, role, client_id))
        self.server = parse_info(info)
        if self._worker is not None and parse_info(role).get("role") == "slave":
            raise ReadOnlyError(_REPLICA)  # one that is opened is judged as a whole
        # What the connection before has sent and nobody has read yet must not be carried out after what this one sends.
        # In a Redis that was started again it is gone, and its number may be another's.
        same = self.server.get("run_id") == self._run_id
        stale: list[Command] = [("CLIENT", "KILL", "ID", self.client_id)] if same and self.client_id else []
        _raise_first(await _ask(connection, *stale, *self._scripts), start=len(stale))
        self._run_id, self.client_id = self.server.get("run_id", ""), int(client_id)
        undo, self._undo = self._undo, []
        try:
            _raise_first(await _ask(connection, *undo))
        except BaseException:
            self._undo = undo
            raise

    async def _disconnect(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.close()
        self._problem = None


def _packed(call: Call[Any]) -> list[bytes]:
    """Return what is sent; nothing for a call that has nothing to say, or makes no sense: it is answered here.

    The client's own packing for asyncio is written in Python and takes six times as long.
    """
    try:
        packed = [*map(_pack, call.commands)]
    except (TypeError, ValueError):
        log.exception("a call cannot be sent")
        call.settle(StorageUnavailable("the store refused a write; the log says why"))
        return []
    if not packed:
        call.hear_replies([])
    return packed


async def _ask(connection: AbstractConnection, *commands: Command) -> list[Any]:
    if not commands:
        return []
    await connection.send_packed_command([*map(_pack, commands)], check_health=False)
    return [await _reply(connection) for _ in commands]


async def _reply(connection: AbstractConnection) -> Any:
    """Return the next reply; a refusal is one, unless another connection would have been told something else."""
    try:
        return await connection.read_response(disable_decoding=True)
    except _BROKEN:
        raise
    except ResponseError as refusal:
        return refusal


def _raise_first(replies: Sequence[Any], start: int = 0) -> None:
    for reply in replies[start:]:
        if isinstance(reply, Exception):
            raise reply


def _outcome(read: Callable[[list[Any]], T | MoltBotError], replies: list[Any], *, tolerant: bool) -> T | MoltBotError:
    """Return what replies say, or the error that tells why nothing could be done."""
    for reply in replies:
        if isinstance(reply, Exception) and not tolerant:
            return refused(reply)
    try:
        return read(replies)
    except (Unreadable, msgspec.MsgspecError, UnicodeDecodeError) as problem:
        return damage(problem)
    except Exception:
        log.exception("a reply of Redis could not be read")
        return StorageUnavailable("the store could not read; the log says why")


def refused(refusal: Exception) -> MoltBotError:
    """Return what a refusal of Redis means to a caller; the text holds no content and no address."""
    text = str(refusal)
    if not why_no_writes(refusal):  # which is said once, and not of each command
        log.error("Redis refused a command", extra={"problem": text[:200]})
    if isinstance(refusal, OutOfMemoryError) or text.startswith("OOM") or "maxmemory" in text:
        return StorageFull("Redis has no memory left: nothing was stored", retry_after=5.0)
    if "No space left" in text:
        return StorageFull("the disk of Redis is full: nothing was stored", retry_after=5.0)
    retry_after = None if isinstance(refusal, NoPermissionError) else _RETRY_AFTER
    return StorageUnavailable("Redis cannot do this now; the log says why", retry_after=retry_after)


def why(problem: Exception) -> str:
    """Return why Redis cannot be used, for whoever runs it."""
    if isinstance(problem, TimeoutError):
        return f"no answer within {QUICK:g} seconds"
    if isinstance(problem, ReadOnlyError):
        return _REPLICA
    if _shut_out(problem):
        unasked = "without any password" in str(problem)
        needs = "remove store.password, or set one there" if unasked else "set store.password"
        return f"Redis does not let us in ({str(problem)[:200]}): {needs}"
    if isinstance(problem.__context__, ConnectionRefusedError):
        return "connection refused"  # the client names the address once more, and a number
    return str(problem)[:200].rstrip(".") or type(problem).__name__


def _shut_out(problem: Exception) -> bool:
    return isinstance(problem, AuthenticationError | NoPermissionError) or "NOAUTH" in str(problem)


def parse_info(text: bytes) -> dict[str, str]:
    """Return what Redis says of itself, by name."""
    lines = (line.partition(":") for line in text.decode("utf-8", "replace").splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in lines if name}


def _unavailable() -> StorageUnavailable:
    return StorageUnavailable("the core cannot reach its store (Redis) now", retry_after=_RETRY_AFTER)
