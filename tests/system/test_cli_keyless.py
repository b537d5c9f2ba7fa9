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


async def test_status_says_that_the_cores_serve_and_what_the_default_route_lacks(keyless: Started) -> None:
    home = keyless.home
    where = ("--workspace", str(home.folder / "ws3"))
    told, found = await home.run("status", *where), await home.run("status", "--json", *where)
    assert "Core    serving      2 of 2 workers" in told.out
    assert "NOT SERVING" not in told.out
    assert "Not everything serves" not in told.out
    last = told.out.strip().splitlines()[-1]
    assert last == "All of it serves, but the default route lacks a key: its line says how to add one."
    assert re.search(
        r"Route   default \(openai/gpt-4o\)   OpenAI needs a key; .* key --workspace ~/ws3 add openai`\.", told.out
    )
    state = found.json
    assert (told.status, found.status, state["healthy"], state["model_reason"]) == (1, 1, False, "MODEL_CREDENTIAL")
    assert (state["core"]["healthy"], state["core"]["serving"]) == (True, 2)
    assert all(worker["healthy"] for worker in state["workers"].values())
    assert (await home.run("chat", *where, "--model", "scripted", "hi")).status == 0
