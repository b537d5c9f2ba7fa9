"""What `moltbot session` does: asks the core that runs, and prints text or JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict
from moltbot import MoltBot, MoltBotClientError
from moltbot.v1 import message_pb2, session_pb2

from moltbot_server.cli.asking import Place
from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.tables import moment, short, table
from moltbot_server.cli.terminal import Exit, Failure, command, confirm, dim, harmless

_Answer = TypeVar("_Answer")
_NOT_THERE = "SESSION_NOT_FOUND"


@told
def list_sessions(given: argparse.Namespace) -> int:
    """Print the sessions; return the exit status."""

    async def ask(bot: MoltBot) -> list[session_pb2.Session]:
        return await _found(bot, given, given.limit + 1)

    found = asyncio.run(_asked(given, ask))
    entries = [_entry(session) for session in found[: given.limit]]
    if given.json:
        print(json.dumps({"sessions": entries, "more": len(found) > given.limit}, ensure_ascii=False))
    elif not entries:
        print(f"There are no sessions{_chosen(given)}.")
    else:
        rows = [("NAME", "LAST USED", "MESSAGES", "USER", "CHANNEL", "TITLE")]
        for each in entries:
            rows.append((each["name"], each["used"], str(each["messages"]), *map(short, _told(each))))
        print(table(rows))
        if len(found) > given.limit:
            print(f"There are more; --limit {given.limit * 10} lists up to so many.", file=sys.stderr)
    return int(Exit.OK)


@told
def show_session(given: argparse.Namespace) -> int:
    """Print a session's messages; return the exit status."""

    async def ask(bot: MoltBot) -> tuple[session_pb2.Session, list[message_pb2.Message]]:
        session = await bot.get_session(given.name)
        return session, [message async for message in bot.messages(given.name)]

    session, messages = asyncio.run(_asked(given, ask))
    if given.json:
        spoken = [MessageToDict(message, preserving_proto_field_name=True) for message in messages]
        shape = {**_entry(session), "active_turn": session.active_turn.name}
        print(json.dumps({"session": shape, "messages": spoken}, ensure_ascii=False))
        return int(Exit.OK)
    entry = _entry(session)
    about = (text for text in (entry["title"], entry["user"], entry["channel"], f"last used {entry['used']}") if text)
    print(f"{entry['name']}: {harmless(', '.join(about))}")
    for message in messages:
        asked = message.role == message_pb2.ROLE_USER
        who = (entry["user"] or "user") if asked else message.model.removeprefix("models/") or "assistant"
        head = f"{harmless(who)}, {moment(message.create_time)}:"
        print(f"\n{dim(head) if sys.stdout.isatty() else head}\n{harmless(_text(message))}")
    if session.HasField("active_turn"):
        print("\n(An answer is being written, or waits for its turn.)")
    elif messages and messages[-1].role == message_pb2.ROLE_USER:
        print("\n(There is no answer: the turn has failed, or was cancelled before its first word.)")
    return int(Exit.OK)


@told
def reset_sessions(given: argparse.Namespace) -> int:
    """Delete what was said in sessions; return the exit status."""

    async def reset(bot: MoltBot, name: str) -> None:
        await bot.reset_session(name)

    return _change(given, reset, "reset")


@told
def delete_sessions(given: argparse.Namespace) -> int:
    """Delete sessions; return the exit status."""

    async def delete(bot: MoltBot, name: str) -> None:
        await bot.delete_session(name)

    return _change(given, delete, "deleted")


def _change(given: argparse.Namespace, change: Callable[[MoltBot, str], Awaitable[None]], done: str) -> int:
    if bool(given.names) == given.all:
        names = command("session list", Models.of(given).workspace)
        raise Failure(f"name the sessions, as `{names}` tells them, or say --all", Exit.USAGE)
    if (given.user or given.channel) and not given.all:
        raise Failure("--user and --channel go with --all", Exit.USAGE)

    async def find(bot: MoltBot) -> list[str]:
        # All are found before the first is changed: what is reset is used by that, and would come first.
        return [session.name for session in await _found(bot, given, None)]

    async def work(bot: MoltBot) -> None:
        for name in wanted:
            try:
                await change(bot, name)
            except MoltBotClientError as error:
                if error.reason == _NOT_THERE:
                    missing.append(name)  # or somebody else has deleted it since it was listed
                    continue
                if changed:
                    print(_counted(len(changed), done), file=sys.stderr)
                raise
            changed.append(name)

    wanted = asyncio.run(_asked(given, find)) if given.all else given.names
    if given.all and wanted:
        _confirm(given, len(wanted), done)
    changed, missing = list[str](), list[str]()
    if wanted:
        asyncio.run(_asked(given, work))
    if given.json:
        print(json.dumps({done: changed, "missing": [] if given.all else missing}, ensure_ascii=False))
    elif not wanted:
        print(f"There are no sessions{_chosen(given)}. Those of stateless callers are not listed, and go after a day.")
    elif changed or given.all:
        print(_counted(len(changed), done))
    if given.all or not missing:
        return int(Exit.OK)
    if not given.json:
        names = ", ".join(map(harmless, missing))
        print(f"moltbot: there is no session {names} in this workspace (SESSION_NOT_FOUND)", file=sys.stderr)
    return int(Exit.FAILED)


def _counted(count: int, done: str) -> str:
    return f"{count} {'session was' if count == 1 else 'sessions were'} {done}."


def _confirm(given: argparse.Namespace, count: int, done: str) -> None:
    """Make sure that all sessions are meant."""
    whole = "" if given.user or given.channel else ", which is all that the workspace has,"
    sessions = f"{count} {'session' if count == 1 else 'sessions'}{_chosen(given)}{whole}"
    confirm(f"{sessions} would be {done} for good", f"nothing was {done}", given)


async def _found(bot: MoltBot, given: argparse.Namespace, limit: int | None) -> list[session_pb2.Session]:
    found: list[session_pb2.Session] = []
    async for session in bot.sessions(user=given.user or "", channel=given.channel or ""):
        if limit is not None and len(found) == limit:
            break
        found.append(session)
    return found


async def _asked(given: argparse.Namespace, ask: Callable[[MoltBot], Awaitable[_Answer]]) -> _Answer:
    async with _core(given).connect() as bot:
        return await ask(bot)


def _core(given: argparse.Namespace) -> Place:
    return Models.of(given).running_core("it keeps the sessions")


def _chosen(given: argparse.Namespace) -> str:
    """Return which sessions a command is about, in words behind `sessions`."""
    user = f" of the user {harmless(given.user)}" if given.user else ""
    return f"{user} of the channel {harmless(given.channel)}" if given.channel else user


def _told(entry: dict[str, Any]) -> Sequence[str]:
    return [entry[key] or "-" for key in ("user", "channel", "title")]


def _entry(session: session_pb2.Session) -> dict[str, Any]:
    return {
        "name": session.name,
        "title": session.title,
        "user": session.user,
        "channel": session.channel,
        "messages": session.message_count,
        "created": moment(session.create_time),
        "used": moment(session.update_time),
    }


def _text(message: message_pb2.Message) -> str:
    """Return what a message says; what is no text is named."""
    return "\n".join(part.text or f"[{part.WhichOneof('content') or 'nothing'}]" for part in message.parts)
