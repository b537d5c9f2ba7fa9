"""The conversation in the terminal: a prompt with history, streamed answers, Ctrl-C stops one, Ctrl-D leaves."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing

from moltbot import MoltBotClientError
from moltbot.errors import from_event
from moltbot.v1 import chat_pb2, message_pb2, session_pb2
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output import create_output

from moltbot_server.cli.asking import CHANNEL, Place, cancelling, interrupts, remark
from moltbot_server.cli.encoding import replaced
from moltbot_server.cli.showing import Shown, attended
from moltbot_server.cli.terminal import Exit, harmless
from moltbot_server.workspace import Workspace

_LISTED = 20
_HELP = """\
Type and press Enter. Ctrl-C stops an answer, Ctrl-D leaves.
  /new             start a new conversation
  /sessions        list conversations; /sessions 2 goes on with the second
  /model [NAME]    list the models; with a name, use that one
  /help            this text
  /quit            leave
A text that begins with a slash of its own: double it, as in //help."""

_LEAVING = frozenset({"exit", "quit", ":q"})  # what other programs of a terminal are left with


class Talk:
    """One conversation at a terminal, which may move from session to session."""

    def __init__(self, place: Place, *, session: str, model: str) -> None:
        self.bot = place.connect(self._waits)
        self._failure = place.failure
        self._session = session
        self._model = model
        self._store_away = place.store_away
        self._shown = Shown(place.store_away)
        self._listed: list[session_pb2.Session] = []
        self._leaving = False
        self._under_way = ""  # the turn whose end nobody has told yet
        self.commands: Mapping[str, Callable[[str], Awaitable[None]]] = {
            "/new": self._new,
            "/sessions": self._sessions,
            "/model": self._choose_model,
            "/help": self._help,
            "/quit": self._quit,
            "/exit": self._quit,
        }

    async def run(self, read: Callable[[], Awaitable[str]]) -> None:
        """Read and answer until the person leaves. `read` raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
        while not self._leaving:
            try:
                text = replaced(await read()).strip()
            except KeyboardInterrupt:
                print("Ctrl-D or /quit leaves.")
                continue
            except EOFError:
                return
            if not text:
                continue
            if text.lower() in _LEAVING:
                return
            self._under_way = ""
            try:
                await self.take(text)
            except MoltBotClientError as error:
                print(f"! {self._failure(error, self._under_way).message}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:  # pressed twice: nobody answered the first
                print(" [left the answer]", flush=True)

    def _waits(self, kind: str) -> None:
        self._shown.waits(kind)

    async def take(self, text: str) -> None:
        """Carry out a command, or say the text and show the answer."""
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text.partition(" ")
            command = self.commands.get(name)
            if command is None:
                print(f"{name} is no command; /help lists them. To say it, double the slash: /{text}")
            else:
                await command(rest.strip())
        else:
            await self._say(text[1:] if text.startswith("//") else text)

    async def _say(self, text: str) -> None:
        turn: list[str] = []
        self._shown = shown = Shown(self._store_away)
        async with interrupts() as pressed:
            stream = self.bot.stream_turn(text, session=self._session, model=self._model, channel=CHANNEL)
            async with aclosing(stream) as events, cancelling(self.bot, turn, pressed):
                async for event in attended(events, shown):
                    if event.HasField("accepted"):
                        turn.append(event.accepted.turn)
                        self._session = event.accepted.session
                        self._under_way = event.accepted.turn
                    elif event.HasField("failed"):
                        self._under_way = ""
                        if pressed.is_set():
                            await self.bot.cancel_turn(turn[0])
                    _show(shown, event)
        print(flush=True)

    async def _new(self, _rest: str) -> None:
        self._session = ""
        print("A new conversation.")

    async def _sessions(self, rest: str) -> None:
        if rest:
            await self._go_on(rest)
            return
        more = await self._list()
        for number, session in enumerate(self._listed, 1):
            mark = "*" if session.name == self._session else " "
            when = session.update_time.ToDatetime().strftime("%Y-%m-%d %H:%M")
            print(f"{mark}{number:3}  {when}  {harmless(session.title) or session.name}")
        if more:
            print(f"These are the {_LISTED} used last; there are older ones.")
        print("/sessions NUMBER goes on with one." if self._listed else "No conversations yet.")

    async def _list(self) -> bool:
        """Keep the conversations used last; return whether there are older ones."""
        self._listed = []
        async for session in self.bot.sessions(channel=CHANNEL):
            if len(self._listed) == _LISTED:
                return True
            self._listed.append(session)
        return False

    async def _go_on(self, number: str) -> None:
        if not self._listed:
            await self._list()
        if not number.isdecimal() or not 0 < int(number) <= len(self._listed):
            count = len(self._listed)
            there = f"the list goes from 1 to {count}; /sessions shows it" if count else "no conversations yet"
            print(f"There is no number {harmless(number)}: {there}.")
            return
        chosen = self._listed[int(number) - 1]
        self._session = chosen.name
        print(f"Going on with: {harmless(chosen.title)}")
        await self._recall()

    async def _recall(self) -> None:
        messages = [message async for message in self.bot.messages(self._session)]
        for message in messages[-4:]:
            text = harmless("".join(part.text for part in message.parts))
            who = "you" if message.role == message_pb2.ROLE_USER else "bot"
            print(f"  {who}: {text if len(text) <= 200 else text[:199] + '…'}")

    async def _choose_model(self, rest: str) -> None:
        if rest:
            model = await self.bot.get_model(rest)
            self._model = model.name
            print(f"From now on {harmless(model.display_name)} answers.")
            return
        async for model in self.bot.models():
            mark = "*" if model.name == self._model or (not self._model and model.is_default) else " "
            print(f"{mark} {harmless(model.name.removeprefix('models/'))}  {harmless(model.display_name)}")

    async def _help(self, _rest: str) -> None:
        print(_HELP)

    async def _quit(self, _rest: str) -> None:
        self._leaving = True


def _show(shown: Shown, event: chat_pb2.Event) -> None:
    shown.show(event)
    if event.HasField("completed"):
        stopped = event.completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED
        print(" [stopped]" if stopped else "", flush=True)
        if what := remark(event.completed, cancelled=True):
            print(f"! {what}", file=sys.stderr, flush=True)
    elif event.HasField("failed"):
        print(flush=True)
        raise from_event(event.failed)


async def talk(place: Place, workspace: Workspace, *, session: str, model: str) -> int:
    """Hold a conversation at the terminal; return the exit status.

    Where the standard output goes elsewhere, that gets the answers, and the standard error what is for the person.
    """
    screen = sys.stdout if sys.stdout.isatty() else sys.stderr
    conversation = Talk(place, session=session, model=f"models/{model}" if model and "/" not in model else model)
    async with conversation.bot as bot:
        names = [item.name.removeprefix("models/") async for item in bot.models()]
        prompt: PromptSession[str] = PromptSession(
            HTML("<b>You</b>  "),
            history=_history(workspace),
            completer=WordCompleter(sorted(conversation.commands), sentence=True),
            complete_while_typing=False,
            output=create_output(stdout=screen),
        )
        model = names[0] if names else "unknown"
        print(f"MoltBot, model {model}. /help tells what else there is; Ctrl-D leaves.\n", file=screen, flush=True)
        await conversation.run(prompt.prompt_async)
    return int(Exit.OK)


def _history(workspace: Workspace) -> History:
    """Return what was typed before; where there is no workspace, it is forgotten at the end."""
    if not workspace.folder.is_dir():
        return InMemoryHistory()
    # Readable by its owner alone before anything is written to it.
    os.close(os.open(workspace.history_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    return FileHistory(str(workspace.history_file))
