"""A MoltBot whose default route lacks a key: what is said of it, and how a key gets to it and to no other one."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cli_process import Home, Started
from moltbot_server.cli.reaching import words_of
from moltbot_server.testing_provider import MockProvider, Script
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
    assert last == "All of it serves, but the default route lacks a key that works: its line says how to add one."
    assert re.search(
        r"Route   default \(openai/gpt-4o\)   OpenAI needs a key; .* key --workspace ~/ws3 add openai`\.", told.out
    )
    state = found.json
    assert (told.status, found.status, state["healthy"], state["model_reason"]) == (1, 1, False, "MODEL_CREDENTIAL")
    assert (state["core"]["healthy"], state["core"]["serving"]) == (True, 2)
    assert all(worker["healthy"] for worker in state["workers"].values())
    assert (await home.run("chat", *where, "--model", "scripted", "hi")).status == 0


def core_says(started: Started) -> tuple[int, Any]:
    """Return the status and the body of the core's `/health`."""
    try:
        with urllib.request.urlopen(f"{started.told()['metrics']}/health", timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


async def test_a_route_without_a_key_that_is_loaded_later_is_told_before_anybody_has_asked(tmp_path: Path) -> None:
    home = Home(tmp_path, variables={"MODEL_TYPE": "scripted"})
    await home.run("init")
    async with home.started() as started:
        with (home.workspace / "moltbot.yaml").open("a") as file:
            file.write(_ROUTE)
        assert (await home.run("route", "reload")).status == 0
        code, said = await asyncio.to_thread(core_says, started)
        assert (code, said["status"], said["model_reason"]) == (503, "model failed", "MODEL_CREDENTIAL")
        told = await home.run("status")
        assert (told.status, "Core    serving" in told.out) == (1, True)
    assert "Traceback" not in started.said


async def test_a_route_of_which_each_key_is_refused_is_told_as_one_that_cannot_answer(tmp_path: Path) -> None:
    home = Home(tmp_path, variables={"MODEL_TYPE": "scripted", "MOCK_API_KEY": "sk-mock-0123456789abcdef"})
    await home.run("init")
    async with MockProvider(Script.read({"faults": [{"kind": "unauthorized"}]})).running() as mock:
        with (home.workspace / "moltbot.yaml").open("a") as file:
            file.write(f"providers: {{mock: {{base_url: '{mock.address}/v1', models: [one]}}}}\n")
            file.write("models: {primary: mock/one}\n")
        async with home.started() as started:
            assert (await asyncio.to_thread(core_says, started))[1]["status"] == "ok"
            assert (await home.run("chat", "Hi")).status != 0
            code, said = await asyncio.to_thread(core_says, started)
            assert (code, said["status"], said["model_reason"]) == (503, "model failed", "MODEL_CREDENTIAL")
            assert "refused each key that it was given for one; add one" in said["model_problem"]
            told = await home.run("status")
    assert told.status == 1
    last = told.out.strip().splitlines()[-1]
    assert last == "All of it serves, but the default route lacks a key that works: its line says how to add one."
