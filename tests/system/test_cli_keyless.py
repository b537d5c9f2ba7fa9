"""A MoltBot whose default route lacks a key: what is said of it, and how a key gets to it and to no other one."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cli_process import Home, Started
from moltbot_server.cli.reaching import words_of
from moltbot_server.workspace import Workspace

_ROUTE = """
models: {primary: openai/gpt-4o}
providers: {openai: {}}
"""


@pytest.fixture
async def keyless(tmp_path: Path) -> AsyncIterator[Started]:
    """Two workers in a workspace of another name, without the key that their route needs."""
    home = Home(tmp_path)
    assert (await home.run("init", "--workspace", str(tmp_path / "ws3"))).status == 0
    with (tmp_path / "ws3" / "moltbot.yaml").open("a") as file:
        file.write(_ROUTE)
    home.variables["WORKERS"] = "2"
    async with home.started("--workspace", str(tmp_path / "ws3")) as started:
        yield started


async def test_each_command_names_the_workspace_that_lacks_the_key(keyless: Started) -> None:
    home = keyless.home
    where = ("--workspace", str(home.folder / "ws3"))
    command = re.compile(r"`\S.* key --workspace ~/ws3 add openai`")
    status, asked, routes = [
        await home.run(*words) for words in (("status", *where), ("chat", *where, "hi"), ("route", "list", *where))
    ]
    for said in (keyless.said, status.out, asked.err, routes.out):
        assert command.search(said), said
        assert "`moltbot key add" not in said, said


def test_what_the_core_of_another_workspace_says_is_left_as_it_is(tmp_path: Path) -> None:
    said = "OpenAI needs a key; add one to the workspace of this MoltBot with `moltbot key add openai`."
    assert words_of(Workspace(folder=tmp_path), "127.0.0.1:1")(said) == said
