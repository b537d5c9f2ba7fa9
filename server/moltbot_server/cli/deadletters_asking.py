"""What `moltbot deadletters` does: asks the core that runs, and prints a table or JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import grpc
from moltbot.channel import open_channel
from moltbot.errors import from_status
from moltbot.v1 import delivery_pb2, delivery_pb2_grpc

from moltbot_server.cli.asking import Place
from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.tables import moment, short, table
from moltbot_server.cli.terminal import Exit, Failure, command, confirm, harmless

_Answer = TypeVar("_Answer")
_PATIENCE = 60.0
_PAGE = 500
_WIDEST = 40
_NAME = re.compile(r"(?:deliveries/)?([0-9a-f]{24})")


class _Desk:
    """The service of the core, with the key of the workspace."""

    def __init__(self, service: Any, key: str) -> None:
        self._service = service
        self._metadata = (("authorization", f"Bearer {key}"),)

    async def letters(self, channel: str, limit: int) -> AsyncIterator[delivery_pb2.DeadLetter]:
        """Yield dead letters, the latest first."""
        token = ""
        while limit > 0:
            request = delivery_pb2.ListDeadLettersRequest(
                channel=channel, page_size=min(limit, _PAGE), page_token=token
            )
            page = await self._service.ListDeadLetters(request, metadata=self._metadata, timeout=_PATIENCE)
            for letter in page.dead_letters:
                yield letter
            limit -= len(page.dead_letters)
            token = page.next_page_token
            if not token:
                return

    async def names(self, channel: str) -> list[str]:
        """Return the names of all dead letters, those of the oldest answers first.

        The list does not tell in which order they stood in their place where many were given up at one moment.
        """
        found = [
            (letter.delivery.create_time.ToNanoseconds(), letter.delivery.name)
            async for letter in self.letters(channel, 1 << 30)
        ]
        found.reverse()
        return [name for _, name in sorted(found, key=itemgetter(0))]

    async def channels(self) -> list[str]:
        """Return the channels of the latest dead letters: so many that nobody has to wait for them."""
        return sorted({letter.delivery.place.channel async for letter in self.letters("", _PAGE)})

    async def retry(self, name: str) -> None:
        """Have one delivered after all."""
        request = delivery_pb2.RetryDeadLetterRequest(name=name)
        await self._service.RetryDeadLetter(request, metadata=self._metadata, timeout=_PATIENCE)

    async def drop(self, name: str) -> None:
        """Delete one."""
        request = delivery_pb2.DropDeadLetterRequest(name=name)
        await self._service.DropDeadLetter(request, metadata=self._metadata, timeout=_PATIENCE)


@told
def list_dead_letters(given: argparse.Namespace) -> int:
    """Print the dead letters; return the exit status."""

    async def ask(desk: _Desk) -> tuple[list[delivery_pb2.DeadLetter], list[str]]:
        letters = [letter async for letter in desk.letters(given.channel or "", given.limit)]
        return letters, await desk.channels() if given.channel and not letters else []

    letters, others = asyncio.run(_asked(_core(given), ask))
    entries = [_entry(letter) for letter in letters]
    if given.json:
        print(json.dumps({"dead_letters": entries}, ensure_ascii=False))
    else:
        print(_table(entries) if entries else _none(given.channel or "", others))
    return int(Exit.OK)


@told
def retry_dead_letters(given: argparse.Namespace) -> int:
    """Have dead letters delivered after all; return the exit status."""
    return _change(given, lambda desk, name: desk.retry(name), "retried", "will be delivered again")


@told
def drop_dead_letters(given: argparse.Namespace) -> int:
    """Delete dead letters; return the exit status."""
    return _change(given, lambda desk, name: desk.drop(name), "dropped", "deleted")


def _change(given: argparse.Namespace, change: Callable[[_Desk, str], Awaitable[None]], word: str, done: str) -> int:
    if bool(given.names) == given.all:
        names = command("deadletters list", Models.of(given).workspace)
        raise Failure(f"name the dead letters, as `{names}` tells them, or say --all", Exit.USAGE)
    if given.channel and not given.all:
        raise Failure("--channel goes with --all", Exit.USAGE)

    named = [_named(name, given) for name in given.names]

    async def find(desk: _Desk) -> tuple[list[str], list[str] | None]:
        # All are found before the first is changed: what is retried and dies again is not met twice.
        found = await desk.names(given.channel or "")
        return found, None if found else await desk.channels()

    async def work(desk: _Desk) -> list[str]:
        changed = []
        for name in wanted:
            try:
                await change(desk, name)
            except grpc.aio.AioRpcError as error:
                if given.all and error.code() is grpc.StatusCode.NOT_FOUND:
                    continue  # somebody else has retried or dropped it since it was listed
                raise
            changed.append(name)
        return changed

    core = _core(given)
    wanted, others = asyncio.run(_asked(core, find)) if given.all else (named, None)
    if given.all and wanted and word == "dropped":
        _confirm(given, len(wanted))
    changed = asyncio.run(_asked(core, work)) if wanted else []
    if given.json:
        print(json.dumps({word: changed} if others is None else {word: changed, "channels": others}))
    elif others is not None:
        print(_none(given.channel or "", others))
    else:
        count = len(changed)
        verb = done if done.startswith("will") else f"{'was' if count == 1 else 'were'} {done}"
        print(f"{count} dead {'letter' if count == 1 else 'letters'} {verb}.")
    return int(Exit.OK)


def _confirm(given: argparse.Namespace, count: int) -> None:
    """Make sure that all dead letters are meant."""
    whole = f" of the channel {harmless(given.channel)}" if given.channel else ", of all channels,"
    letters = f"{count} dead {'letter' if count == 1 else 'letters'}{whole}"
    confirm(f"{letters} would be deleted for good", "nothing was deleted", given)


def _none(channel: str, others: Sequence[str]) -> str:
    """Return that there are no dead letters of a channel, or none at all, and which `others` have some.

    The name may be a slip, and then what was meant is still there.
    """
    if not others:
        return "There are no dead letters."
    return f"There are no dead letters of the channel {harmless(channel)}; there are some of {', '.join(others)}."


def _named(name: str, given: argparse.Namespace) -> str:
    """Return the name of a delivery, which may have been given without `deliveries/`.

    Raises:
        Failure: it is none.
    """
    if (found := _NAME.fullmatch(name)) is None:
        names = command("deadletters list", Models.of(given).workspace)
        text = f"{harmless(name)[:_WIDEST]!r} is no name of a dead letter: `{names}` tells them"
        raise Failure(f"{text}, such as deliveries/1f0c5a90be2d4c7781a03a6e.", Exit.USAGE)
    return f"deliveries/{found[1]}"


def _core(given: argparse.Namespace) -> Place:
    return Models.of(given).running_core("it delivers")


async def _asked(place: Place, ask: Callable[[_Desk], Awaitable[_Answer]]) -> _Answer:
    channel = open_channel(place.address, None)
    try:
        return await ask(_Desk(delivery_pb2_grpc.DeliveryServiceStub(channel), place.key))
    except grpc.aio.AioRpcError as error:
        raise from_status(error, place.address) from None
    finally:
        await channel.close()


def _entry(letter: delivery_pb2.DeadLetter) -> dict[str, Any]:
    delivery = letter.delivery
    failed = delivery.HasField("failed")
    return {
        "name": delivery.name,
        "channel": delivery.place.channel,
        "address": delivery.place.address,
        "turn": delivery.turn,
        "request_id": delivery.request_id,
        "attempts": delivery.attempt,
        "reason": letter.reason,
        "time": moment(letter.dead_time),
        "created": moment(delivery.create_time),
        "failed": delivery.failed.reason if failed else "",
        "text": delivery.failed.message if failed else delivery.completed.text,
    }


def _table(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [("NAME", "GIVEN UP", "ATTEMPTS", "PLACE", "WHY", "TEXT")]
    for entry in entries:
        place = f"{entry['channel']} {entry['address']}"
        told = (entry["name"], entry["time"], str(entry["attempts"]), place, entry["reason"], entry["text"])
        rows.append((told[0], told[1], told[2], *(short(cell) for cell in told[3:])))
    return table(rows)
