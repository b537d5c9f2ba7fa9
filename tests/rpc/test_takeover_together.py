"""Turns that a core takes over: those of all sessions go on together, and none waits for another one's session."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from moltbot import MoltBot
from moltbot_server.store.protocol import NewTurn, StoredSession
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.testing import Rule, Script, running_server
from moltbot_server.turn_checks import digest_of
from moltbot_server.turns import SessionKey, TextPart, TurnInput, TurnKey
from moltbot_server.workspace import Workspace

SESSIONS = 40


async def leave_running(workspace: Workspace) -> None:
    """Have two turns in each session that a core accepted which is gone then."""
    store = SqliteStore(workspace.database)
    await store.open()
    for session in (f"s{number}" for number in range(SESSIONS)):
        for ordinal in (1, 2):
            asked = TurnInput(parts=(TextPart(text=f"{ordinal}"),), session=session, request_id=f"{session}-{ordinal}")
            row = NewTurn(
                key=TurnKey(session=SessionKey(workspace="default", session=session), ordinal=ordinal),
                request_id=asked.request_id,
                digest=digest_of(asked),
                create_time=time.time(),
                question=asked.parts,
                rest=asked,
                opens_session=ordinal == 1,
            )
            assert await store.accept(row) is None
    await store.close()


async def test_sessions_are_read_together_and_their_turns_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(folder=tmp_path / "home")
    workspace.create()
    await leave_running(workspace)
    load, all_ask = SqliteStore.load_session, asyncio.Barrier(SESSIONS)

    async def together(store: SqliteStore, key: SessionKey, turns: int) -> StoredSession | None:
        await all_ask.wait()
        return await load(store, key, turns)

    monkeypatch.setattr(SqliteStore, "load_session", together)
    script = Script(rules=(Rule(template="{messages} with {text}"),))
    async with (
        asyncio.timeout(30),
        running_server(workspace.folder, script=script) as server,
        MoltBot(server.address, server.key) as bot,
    ):
        for number in range(SESSIONS):
            for ordinal in (1, 2):
                request = f"s{number}-{ordinal}"
                answer = await bot.run_turn(f"{ordinal}", session=f"sessions/s{number}", request_id=request)
                assert answer.completed.text == f"{2 * ordinal - 1} with {ordinal}"
