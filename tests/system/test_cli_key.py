"""`moltbot key …` as people run it: without a core, with one that hears of changes, and against a provider."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cli_process import Home
from grpc import aio
from moltbot.v1 import route_pb2, route_pb2_grpc
from moltbot_server.testing_provider import MockProvider, Script

SECRET = "sk-planted-0123456789abcdefWXYZ"
OTHER = "sk-planted-0123456789ghijklQRST"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home folder in which nothing is configured."""
    (tmp_path / "home").mkdir()
    return Home(tmp_path / "home", variables={})


async def added(home: Home, provider: str = "openai", text: str = SECRET, *arguments: str) -> Any:
    """Add a key from a pipe and return what was said of it as JSON."""
    ended = await home.run("key", "add", provider, "--json", *arguments, text=f"{text}\n")
    assert (ended.status, ended.err) == (0, "")
    assert text not in ended.out
    return ended.json


async def test_help_teaches_every_command_by_example(home: Home) -> None:
    overview = (await home.run("key")).out
    for name in ("add", "list", "remove", "test", "rotate-master"):
        assert f"\n    {name} " in overview
        told = (await home.run("key", name, "--help")).out
        assert f"\n  moltbot key {name}" in told
        assert "--json" in told


class TestKeeping:
    """What the commands keep, list and forget."""

    async def test_a_piped_key_is_kept_encrypted_and_listed_by_its_last_four(self, home: Home) -> None:
        ended = await home.run("key", "add", "openai", "--label", "team", text=f"{SECRET}\n")
        assert ended.status == 0
        assert "(…WXYZ), encrypted in the vault. It holds from the next start on" in ended.out
        assert "Try it: " in ended.out
        listed = await home.run("key", "list")
        [heading, row] = listed.out.splitlines()
        assert heading.split() == ["PROVIDER", "ID", "KEY", "SOURCE", "ADDED", "LABEL"]
        assert (row.split()[0], row.split()[2], row.split()[3], row.split()[5]) == ("openai", "…WXYZ", "vault", "team")
        for name in ("vault.json", "vault.key", "vault.lock"):
            assert stat.S_IMODE((home.workspace / name).stat().st_mode) == 0o600
        assert SECRET not in ended.out + listed.out + (home.workspace / "vault.json").read_text()

    async def test_json_tells_all_but_the_key(self, home: Home) -> None:
        kept = await added(home)
        [listed] = (await home.run("key", "list", "--json")).json["keys"]
        assert {**listed, "core": "not_running", "message": kept["message"]} == kept
        assert (listed["provider"], listed["last4"], listed["source"]) == ("openai", "WXYZ", "vault")
        assert listed["created"].endswith("Z")

    async def test_a_key_of_the_environment_is_listed_and_not_removed(self, home: Home) -> None:
        await home.run("init")
        home.variables["ZAI_API_KEY"] = OTHER
        [listed] = (await home.run("key", "list", "--json")).json["keys"]
        assert (listed["provider"], listed["id"], listed["source"]) == ("zhipu", "env:ZAI_API_KEY", "environment")
        assert listed["created"] is None
        ended = await home.run("key", "remove", "env:ZAI_API_KEY")
        assert ended.status == 1
        assert "comes from the environment or from `.env`: take ZAI_API_KEY out there" in ended.err

    async def test_a_removed_key_is_gone_and_an_unknown_one_is_told(self, home: Home) -> None:
        kept = await added(home)
        ended = await home.run("key", "remove", kept["id"])
        assert ended.status == 0
        assert "withdraw it there" in ended.out
        assert (await home.run("key", "list", "--json")).json["keys"] == []
        again = await home.run("key", "remove", kept["id"], "--json")
        assert (again.status, again.json["error"]["status"]) == (1, 1)  # as for an unknown model or dead letter
        assert "no key of this id: it is empty" in again.json["error"]["message"]
        other = await added(home)
        wrong = await home.run("key", "remove", "ffffffff")
        assert (wrong.status, wrong.out) == (1, "")
        assert f"no key of this id: it has {other['id']} (openai); `" in wrong.err
        assert " key list` has all." in wrong.err

    async def test_the_master_key_is_replaced_and_the_keys_stay(self, home: Home) -> None:
        kept = await added(home)
        before = (home.workspace / "vault.key").read_bytes()
        assert (await home.run("key", "rotate-master")).status == 0
        assert (home.workspace / "vault.key").read_bytes() != before
        assert [key["id"] for key in (await home.run("key", "list", "--json")).json["keys"]] == [kept["id"]]

    async def test_a_master_key_in_a_variable_is_replaced_by_another_variable(self, home: Home) -> None:
        home.variables["MOLTBOT_VAULT_KEY"] = "ab" * 32
        await added(home)
        assert "MOLTBOT_VAULT_KEY_NEW" in (await home.run("key", "rotate-master")).err
        home.variables["MOLTBOT_VAULT_KEY_NEW"] = "cd" * 32
        ended = await home.run("key", "rotate-master")
        assert "Now set MOLTBOT_VAULT_KEY to what MOLTBOT_VAULT_KEY_NEW is" in ended.out
        home.variables["MOLTBOT_VAULT_KEY"] = home.variables.pop("MOLTBOT_VAULT_KEY_NEW")
        assert len((await home.run("key", "list", "--json")).json["keys"]) == 1
        assert not (home.workspace / "vault.key").exists()


class TestRefusing:
    """What is refused says what to do, and repeats no key."""

    @pytest.mark.parametrize("arguments", [("add", "openai", SECRET), ("add", "openai", "x", SECRET, "--json")])
    async def test_a_key_as_an_argument_is_refused_and_not_repeated(
        self, home: Home, arguments: tuple[str, ...]
    ) -> None:
        ended = await home.run("key", *arguments)
        assert ended.status == 2
        assert "a key is never an argument" in ended.err + ended.out
        assert SECRET not in ended.err + ended.out
        assert not home.workspace.exists()

    @pytest.mark.parametrize("arguments", [("add", SECRET), ("remove", SECRET), ("test", SECRET)])
    async def test_a_key_in_the_place_of_a_name_is_not_repeated(self, home: Home, arguments: tuple[str, ...]) -> None:
        await added(home, text=OTHER)
        ended = await home.run("key", *arguments, text="")
        assert ended.status in (1, 2)
        assert SECRET not in ended.err + ended.out

    @pytest.mark.parametrize(
        ("text", "said"),
        [("", "nothing was piped in"), ("two words\n", "this is no key"), ("x" * 9000, "this is no key")],
    )
    async def test_what_is_no_key_is_told(self, home: Home, text: str, said: str) -> None:
        ended = await home.run("key", "add", "openai", text=text)
        assert (ended.status, said in ended.err) == (2, True)

    async def test_an_unknown_provider_is_told_the_nearest_one(self, home: Home) -> None:
        ended = await home.run("key", "add", "opnai", text=SECRET)
        assert ended.status == 2
        assert "there is no provider 'opnai'; did you mean openai?" in ended.err
        (home.workspace / "moltbot.yaml").write_text("providers: {office: {base_url: 'https://llm.example.com/v1'}}\n")
        assert (await added(home, "office"))["provider"] == "office"

    async def test_a_vault_that_does_not_open_is_told_with_the_next_step(self, home: Home) -> None:
        await added(home)
        (home.workspace / "vault.key").chmod(0o644)
        ended = await home.run("key", "list")
        assert (ended.status, "run `chmod 600 " in ended.err) == (78, True)
        as_json = await home.run("key", "list", "--json")
        assert (as_json.status, as_json.json["error"]["status"]) == (78, 78)


async def test_in_a_terminal_the_key_is_asked_for_and_not_shown(home: Home) -> None:
    ours, theirs = os.openpty()
    try:
        process = await home.spawn("key", "add", "openai", stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen = b""
        async with asyncio.timeout(30):
            while b"it is not shown" not in seen:
                seen += await asyncio.to_thread(os.read, ours, 4096)
            os.write(ours, f"{SECRET}\n".encode())
            while b"Try it" not in seen:
                seen += await asyncio.to_thread(os.read, ours, 4096)
            assert await process.wait() == 0
    finally:
        os.close(ours)
    assert SECRET.encode() not in seen
    assert len((await home.run("key", "list", "--json")).json["keys"]) == 1


class Routes(route_pb2_grpc.RouteServiceServicer):
    """A core that counts how often it is told to read its keys again."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.told = 0

    async def ReloadRoutes(  # noqa: N802
        self,
        request: route_pb2.ReloadRoutesRequest,
        context: aio.ServicerContext[route_pb2.ReloadRoutesRequest, route_pb2.ReloadRoutesResponse],
    ) -> route_pb2.ReloadRoutesResponse:
        """Count, then answer or refuse."""
        self.told += 1
        if self.refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        return route_pb2.ReloadRoutesResponse(needs_restart=["port"])


@asynccontextmanager
async def core_with(home: Home, routes: Routes | None) -> AsyncIterator[None]:
    """Run a core that the commands find by its address."""
    server = aio.server()
    if routes is not None:
        route_pb2_grpc.add_RouteServiceServicer_to_server(routes, server)
    home.variables["MOLTBOT_ADDRESS"] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


class TestARunningCore:
    """It is told of every change, and what it says is passed on."""

    async def test_it_uses_a_new_key_a_removal_and_a_rotation_at_once(self, home: Home) -> None:
        routes = Routes()
        async with core_with(home, routes):
            kept = await added(home)
            assert (kept["core"], kept["message"]) == (
                "reloaded",
                "The running core uses it now. A restart is needed for what else was changed: port.",
            )
            assert "The running core uses it now." in (await home.run("key", "rotate-master")).out
            assert "The running core does without it now." in (await home.run("key", "remove", kept["id"])).out
        assert routes.told == 3

    async def test_one_that_refuses_goes_on_as_before_and_the_key_is_kept(self, home: Home) -> None:
        async with core_with(home, Routes("moltbot.yaml:3: this is wrong")):
            kept = await added(home)
        assert kept["core"] == "refused"
        assert kept["message"] == "The running core goes on as before: moltbot.yaml:3: this is wrong"
        del home.variables["MOLTBOT_ADDRESS"]
        assert len((await home.run("key", "list", "--json")).json["keys"]) == 1

    async def test_one_that_does_not_know_routes_takes_it_at_the_next_start(self, home: Home) -> None:
        async with core_with(home, None):
            kept = await added(home)
        assert (kept["core"], kept["message"]) == ("next_start", "It holds from the next start on.")


@asynccontextmanager
async def provider_with(home: Home, **script: Any) -> AsyncIterator[MockProvider]:
    """Run a provider and configure it as `mock`, with one model and no other."""
    async with MockProvider(Script.read({"text": "yes", **script})).running() as provider:
        (home.workspace / "moltbot.yaml").write_text(
            f"providers: {{mock: {{base_url: '{provider.address}/v1', models: [small]}}}}\n"
        )
        yield provider


class TestTrying:
    """A word from the provider with each of its keys."""

    async def test_each_key_is_tried_by_itself_and_the_bad_one_is_told(self, home: Home) -> None:
        await home.run("init")
        async with provider_with(home, keys=[SECRET]):
            good, bad = await added(home, "mock"), await added(home, "mock", OTHER)
            ended = await home.run("key", "test", "--json")
            shown = await home.run("key", "test", "mock")
        assert (ended.status, shown.status) == (1, 1)
        first, second = ended.json["tried"]
        assert (first["key"], first["works"], first["model"], first["problem"]) == (good["id"], True, "small", "")
        assert (second["key"], second["works"]) == (bad["id"], False)
        assert "refuses the key (401)" in second["problem"]
        assert f"mock  key {good['id']}  works (small answered in " in shown.out
        assert f"mock  key {bad['id']}  refuses the key (401)" in shown.out
        assert (ended.err, shown.err) == ("", "")
        assert SECRET not in ended.out + shown.out
        assert OTHER not in ended.out + shown.out

    async def test_when_all_work_the_status_is_0_and_the_model_can_be_named(self, home: Home) -> None:
        await home.run("init")
        async with provider_with(home) as provider:
            await added(home, "mock")
            ended = await home.run("key", "test", "--model", "large", "--json")
            calls = provider.calls.shown()
        assert ended.status == 0
        assert [one["works"] for one in ended.json["tried"]] == [True]
        assert [call["model"] for call in calls["calls"]] == ["large"]

    async def test_a_provider_without_a_key_is_asked_without_one(self, home: Home) -> None:
        await home.run("init")
        async with provider_with(home):
            ended = await home.run("key", "test", "mock", "--json")
        [tried] = ended.json["tried"]
        assert (ended.status, tried["key"], tried["works"]) == (1, "", False)  # this one wants some key

    async def test_a_company_is_named_once_and_its_key_is_added_as_one_types_it_here(self, home: Home) -> None:
        ended = await home.run("key", "--workspace", str(home.folder / "other"), "test", "openai")
        assert ended.status == 78
        await home.run("init", "--workspace", str(home.folder / "other"))
        ended = await home.run("key", "--workspace", str(home.folder / "other"), "test", "openai")
        assert ended.out.startswith("openai  no key  needs a key; add one to the workspace of this MoltBot with `")
        assert " key --workspace ~/other add openai`." in ended.out

    async def test_without_any_key_the_next_step_is_told(self, home: Home) -> None:
        await home.run("init")
        ended = await home.run("key", "test")
        assert (ended.status, "there is no key yet; add one: " in ended.err) == (1, True)

    async def test_a_provider_of_which_no_model_is_known_asks_for_one(self, home: Home) -> None:
        await added(home, "openrouter")
        ended = await home.run("key", "test", "openrouter")
        told = "openrouter  Which of its models is to be asked? Name one with --model, or in a route.\n"
        assert (ended.status, ended.out) == (1, told)
