"""People who ask a core for turns of all kinds, check each answer, and delete their sessions."""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from typing import Any

import grpc
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2, session_pb2, session_pb2_grpc

_TURNS_IN_A_SESSION = 25
_CHANNELS = 4


class People:
    """So many people at the same time, each in one session after the other. `turns` counts what they asked."""

    def __init__(self, address: str, key: str, count: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [aio.insecure_channel(address, options=options) for _ in range(_CHANNELS)]
        self._chats: list[Any] = [chat_pb2_grpc.ChatServiceStub(channel) for channel in self._channels]
        self._sessions: Any = session_pb2_grpc.SessionServiceStub(self._channels[0])
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._count = count
        self._dice = random.Random(1)
        self._numbers = itertools.count()
        self._resting = True
        self._busy: set[asyncio.Task[None]] = set()
        self._target = 0
        self._reached = asyncio.Event()
        self.turns = 0

    async def talk(self, turns: int, *, rest: bool = True) -> None:
        """Let them ask so many more turns; with `rest`, wait then until all sessions are deleted."""
        self._target = self.turns + turns
        self._reached.clear()
        self._resting = False
        while len(self._busy) < self._count and turns:
            task = asyncio.create_task(self._live())
            self._busy.add(task)
        if turns:
            reached = asyncio.create_task(self._reached.wait())
            await asyncio.wait({reached, *self._busy}, return_when=asyncio.FIRST_COMPLETED)
            reached.cancel()
        for task in [task for task in self._busy if task.done()]:
            task.result()  # nobody stops before the end, but one to whom something else was said than should be
        if rest:
            self._resting = True
            busy, self._busy = self._busy, set()
            await asyncio.gather(*busy)

    async def close(self) -> None:
        """Hang up."""
        for task in self._busy:
            task.cancel()
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _live(self) -> None:
        while not self._resting:
            number = next(self._numbers)
            chat = self._chats[number % _CHANNELS]
            session = f"sessions/soak-{number}"
            last = ""
            for turn in range(_TURNS_IN_A_SESSION):
                last = await self._ask(chat, session, turn, last)
            messages = session_pb2.ListMessagesRequest(parent=session, page_size=100)
            found = await self._sessions.ListMessages(messages, metadata=self._metadata)
            assert len(found.messages) >= _TURNS_IN_A_SESSION, f"{len(found.messages)} messages in {session}"
            await self._sessions.DeleteSession(session_pb2.DeleteSessionRequest(name=session), metadata=self._metadata)

    async def _ask(self, chat: Any, session: str, number: int, last: str) -> str:
        """Ask for one turn in the way that its number says; return the name of one that has ended."""
        request = str(uuid.uuid4())
        way = number % _TURNS_IN_A_SESSION
        name = last
        if way == 3:
            await self._leave(chat, self._turn(session, request, "slow", cancel_on_disconnect=True))
        elif way == 7:
            await self._cancel(chat, self._turn(session, request, "slow"))
        elif way == 11 and last:
            resume = chat_pb2.ResumeTurnRequest(name=last, after_sequence=1)
            events = [each.event async for each in chat.ResumeTurn(resume, metadata=self._metadata)]
            assert events[-1].HasField("completed"), events[-1]
            name = await self._run(chat, self._turn(session, request, f"quick {number}"))
        elif way % 5 == 0:
            await self._stream(chat, self._turn(session, request, f"quick {number}"))
        else:
            name = await self._run(chat, self._turn(session, request, f"quick {number}"))
            if way == 13:  # the same again is the same turn
                assert await self._run(chat, self._turn(session, request, f"quick {number}")) == name
        self.turns += 1
        if self.turns >= self._target:
            self._reached.set()
        return name

    def _turn(self, session: str, request: str, text: str, **fields: Any) -> chat_pb2.TurnInput:
        return chat_pb2.TurnInput(session=session, request_id=request, parts=[message_pb2.Part(text=text)], **fields)

    async def _run(self, chat: Any, turn: chat_pb2.TurnInput) -> str:
        answer = await chat.RunTurn(chat_pb2.RunTurnRequest(turn=turn), metadata=self._metadata)
        assert answer.completed.text == f"said {turn.parts[0].text}", answer
        return str(answer.turn)

    async def _stream(self, chat: Any, turn: chat_pb2.TurnInput) -> None:
        text, last = "", chat_pb2.Event()
        async for response in chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self._metadata):
            last = response.event
            text += last.text_delta.text
        assert last.completed.text == text == f"said {turn.parts[0].text}", last

    async def _leave(self, chat: Any, turn: chat_pb2.TurnInput) -> None:
        """Go away after the first word."""
        call = chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self._metadata)
        async for response in call:
            if response.event.HasField("text_delta"):
                break
        call.cancel()

    async def _cancel(self, chat: Any, turn: chat_pb2.TurnInput) -> None:
        """Have a turn cancelled at its first word, and read it to its end."""
        call = chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self._metadata)
        name = ""
        try:
            async for response in call:
                name = response.event.accepted.turn or name
                if response.event.HasField("text_delta") and name:
                    await chat.CancelTurn(chat_pb2.CancelTurnRequest(name=name), metadata=self._metadata)
                    name = ""
        except grpc.RpcError as error:
            raise AssertionError(f"a cancelled stream broke: {error}") from None
