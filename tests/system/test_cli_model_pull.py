"""`moltbot model pull` as people run it, against a hub on this machine: nothing is lost, nothing wrong is kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cli_process import COMMAND, Home
from model_folders import BUILT_IN, known, twin
from moltbot_server.models.hub import Hub, parse_source
from moltbot_server.testing_hub import SmallHub


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home folder in which nothing is configured."""
    (tmp_path / "home").mkdir()
    return Home(tmp_path / "home", variables={})


@pytest.fixture
async def hub(tmp_path: Path, home: Home) -> AsyncIterator[SmallHub]:
    """A hub with a model that can answer, one that must be converted and one that is of no use."""
    for name in ("twin", "raw", "llama"):
        (tmp_path / "hub" / "acme" / name).parent.mkdir(parents=True, exist_ok=True)
    twin(tmp_path / "hub" / "acme" / "twin")
    for name, file in (("raw", "model.safetensors"), ("llama", "llama.gguf")):
        (tmp_path / "hub" / "acme" / name).mkdir()
        (tmp_path / "hub" / "acme" / name / file).write_bytes(os.urandom(20_000))
        (tmp_path / "hub" / "acme" / name / "config.json").write_text("{}")
    async with SmallHub(tmp_path / "hub").running() as hub:
        home.variables["MOLTBOT_HUB"] = hub.address
        yield hub


async def test_a_pulled_model_is_ready_to_answer(home: Home, hub: SmallHub) -> None:
    ended = await home.run("model", "pull", "acme/twin")
    assert (ended.status, ended.err) == (0, "")
    assert "CTranslate2 weights" in ended.out
    assert "model switch twin" in ended.out
    model = (await known(home))["twin"]
    assert model["origin"] == "pulled"
    assert "/acme/twin@" in str(model["source"])
    assert Path(str(model["path"])) == home.workspace / "models" / "twin"
    assert [path.name for path in (home.workspace / "models").iterdir()] == ["twin"]
    asked = len(hub.of("resolve"))
    again = await home.run("model", "pull", "acme/twin", "--json")
    assert (again.status, again.json["problem"]) == (0, "")
    assert len(hub.of("resolve")) == asked
    other = await home.run("model", "pull", "acme/twin", "--revision", hub.of("resolve")[0].path.split("/")[4])
    assert (other.status, len(hub.of("resolve"))) == (0, asked)
    (hub.folder / "acme" / "twin" / "NOTICE").write_text("newer")
    newer = await home.run("model", "pull", "acme/twin@" + await commit(hub))
    assert newer.status == 1
    assert "fetch it beside with --name" in newer.err
    removed = await home.run("model", "remove", "twin")
    assert "with its files" in removed.out
    assert not (home.workspace / "models" / "twin").exists()


async def test_ctrl_c_keeps_what_came_and_the_same_command_goes_on(home: Home, hub: SmallHub) -> None:
    hub.faults.stall_after = 100_000
    process = await home.spawn("model", "pull", "acme/twin")
    weights = home.workspace / "models" / ".twin.partial" / "model.bin"
    await asyncio.to_thread(await_size, weights, 100_000)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 130
    assert b"the same command goes on" in err
    assert b"Traceback" not in err
    assert set(await known(home)) == {BUILT_IN}
    hub.faults.stall_after = None
    hub.asked.clear()
    assert (await home.run("model", "pull", "acme/twin")).status == 0
    assert "bytes=100000-" in {asked.range for asked in hub.of("store")}
    assert "twin" in await known(home)


async def test_at_a_terminal_a_bar_is_drawn_and_what_breaks_is_told(home: Home, hub: SmallHub) -> None:
    hub.faults.cuts = [300_000]
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "model", "pull", "acme/twin", cwd=home.folder, env=home.environ,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    reading = asyncio.create_task(asyncio.to_thread(read_all, ours))
    assert await asyncio.wait_for(process.wait(), 30) == 0
    seen = await reading
    assert "\rtwin  [" in seen.replace("\x1b[K", "")
    assert "Trying again" in seen
    assert seen.endswith("\x1b[K")  # the bar is gone in the end


async def test_weights_that_must_be_converted_say_so(home: Home, hub: SmallHub) -> None:
    ended = await home.run("model", "pull", "acme/raw")
    assert ended.status == 0
    assert "safetensors" in ended.out
    assert "model convert raw" in ended.out
    assert (await known(home))["raw"]["problem"]


async def test_weights_of_no_use_are_refused_before_they_are_fetched(home: Home, hub: SmallHub) -> None:
    ended = await home.run("model", "pull", "acme/llama")
    assert ended.status == 1
    assert "llama.cpp" in ended.err
    assert hub.of("store") == []
    assert (await home.run("model", "pull", "acme/llama", "--include", "config.json")).status == 0


async def test_a_family_that_there_is_not_is_refused_before_anything_is_fetched(home: Home, hub: SmallHub) -> None:
    ended = await home.run("model", "pull", "acme/twin", "--type", "lama2")
    assert (ended.status, ended.out, hub.asked) == (2, "", [])
    assert "--type: found 'lama2', expected one of chatml, gemma," in ended.err
    assert "Did you mean llama2?" in ended.err
    assert not home.workspace.exists(), "nothing is made for a command that cannot be meant"


async def test_a_token_of_the_workspace_opens_a_private_model_and_is_never_shown(home: Home, hub: SmallHub) -> None:
    async with SmallHub(hub.folder, token="hf_secret").running() as private:
        await home.run("init")
        env = home.workspace / ".env"
        del home.variables["MOLTBOT_HUB"]
        env.write_text(f"MOLTBOT_HUB={private.address}\n")
        refused = await home.run("model", "pull", "acme/twin")
        assert refused.status == 1
        assert "MOLTBOT_HUB_TOKEN" in refused.err
        env.write_text(f"MOLTBOT_HUB={private.address}\nMOLTBOT_HUB_TOKEN=hf_secret\n")
        fetched = await home.run("model", "pull", "acme/twin")
        assert fetched.status == 0
        assert "hf_secret" not in fetched.out + fetched.err
        assert {asked.authorization for asked in private.of("store")} == {""}
        assert (await home.run("model", "list")).status == 0  # the settings know the two names


async def test_the_token_does_not_go_to_a_hub_whose_address_was_pasted(home: Home, hub: SmallHub) -> None:
    home.variables |= {"MOLTBOT_HUB": "https://hub.invalid", "MOLTBOT_HUB_TOKEN": "hf_secret"}
    assert (await home.run("model", "pull", f"{hub.address}/acme/twin")).status == 0
    assert {asked.authorization for asked in hub.asked} == {""}


async def test_a_name_that_is_taken_is_refused_before_anything_is_fetched(home: Home, hub: SmallHub) -> None:
    twin(home.folder / "twin")
    await home.run("model", "add", "twin")
    ended = await home.run("model", "pull", "acme/twin")
    assert ended.status == 1
    assert "--name" in ended.err
    assert hub.asked == []
    assert (await home.run("model", "pull", "acme/twin", "--name", "other")).status == 0


async def commit(hub: SmallHub) -> str:
    """Return the commit that a hub is at with `acme/twin`."""
    async with Hub(hub.address) as client:
        return (await client.listing(parse_source("acme/twin", hub.address))).commit


def await_size(file: Path, size: int) -> None:
    """Return when a file has so many bytes: another process's doing, of which nothing tells us."""
    deadline = time.monotonic() + 30
    while not file.exists() or file.stat().st_size < size:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_all(terminal: int) -> str:
    """Return what is written to a terminal until nobody holds its other end."""
    seen = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is gone
        while piece := os.read(terminal, 4096):
            seen += piece
    os.close(terminal)
    return seen.decode()
