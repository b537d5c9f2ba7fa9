"""A hundred planted keys are found nowhere: not in files, logs, errors or the text of any object that holds them."""

from __future__ import annotations

import base64
import copy
import gc
import logging
import pickle
import secrets
import traceback
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web
from moltbot_server.auth.provider_keys import ProviderKeys, variables_of
from moltbot_server.auth.vault import Vault, VaultError
from moltbot_server.config import ConfigError, Provider, ProviderModel, Settings, load_settings
from moltbot_server.errors import MoltBotError
from moltbot_server.models.engine import stream
from moltbot_server.models.providers import ProviderEngine, ProviderKey
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart
from moltbot_server.workspace import Workspace

COUNT = 100
STATUSES = (400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 503, 529)
QUESTION = (Message(role=Role.USER, parts=(TextPart(text="Hello"),)),)


@pytest.fixture
def planted() -> list[str]:
    """Keys in the forms of several providers."""
    forms = ("sk-{}", "sk-ant-api03-{}", "sk-proj-{}", "AIza{}", "{}", "gsk_{}", "{}.{}")
    return [
        forms[number % len(forms)].format(secrets.token_hex(20), secrets.token_urlsafe(12)) for number in range(COUNT)
    ]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace folder."""
    return Workspace(folder=tmp_path)


@pytest.fixture
async def hostile() -> AsyncIterator[str]:
    """A provider that refuses every request in another way, and says the key in all that it says."""
    served = 0

    async def refuse(request: web.Request) -> web.StreamResponse:
        nonlocal served
        served += 1
        key = request.headers.get("x-api-key", "") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        text = f"Incorrect API key provided: {key}. You sent {request.headers!r}"
        status = STATUSES[served % (len(STATUSES) + 2)] if served % (len(STATUSES) + 2) < len(STATUSES) else 200
        body = {"type": "error", "error": {"message": text, "type": key, "code": key, "param": key}}
        if status != 200:
            return web.json_response(body, status=status, reason=key, headers={"Retry-After": key, "X-Key": key})
        if served % 2:
            return web.Response(text=f"<html>{text}</html>", content_type="text/html")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(f'event: {key}\ndata: {{"error": {{"message": "{key}"}}}}\n\n'.encode())
        return response

    application = web.Application()
    application.router.add_route("*", "/{rest:.*}", refuse)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    await runner.cleanup()


def found_in(text: str | bytes, keys: Iterable[str]) -> list[str]:
    """Return the keys that a text holds, as they are or in base64."""
    text = text if isinstance(text, str) else text.decode("utf-8", "replace")
    return [key for key in keys if key in text or base64.b64encode(key.encode()).decode().rstrip("=")[:-2] in text]


def own_objects(*roots: object) -> list[object]:
    """Return every object of a class of ours that is reachable from some."""
    seen: dict[int, object] = {}
    waiting: list[object] = list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | logging.Logger):
            continue
        seen[id(one)] = one
        waiting += [each for each in gc.get_referents(one) if not callable(each) or hasattr(each, "__self__")]
    return [one for one in seen.values() if type(one).__module__.startswith("moltbot")]


def filled(workspace: Workspace, keys: Sequence[str], environ: dict[str, str]) -> ProviderKeys[ProviderKey]:
    """Return a ring of which most keys are in the vault and some in the environment."""
    vault = Vault(workspace, {})
    for number, key in enumerate(keys[:-10]):
        vault.add(("openai", "anthropic", "office")[number % 3], key, label=f"key {number}")
    names = [f"OWN_{number}_API_KEY" for number in range(10)]
    environ.update(zip(names, keys[-10:], strict=True))
    ring = ProviderKeys(workspace, environ, make=ProviderKey)
    ring.use(ring.read({"office": names}))
    return ring


async def outcomes(engine: ProviderEngine) -> list[str]:
    """Ask until no key is left, and return all that is told of it."""
    said = []
    for _ in range(len(STATUSES) * 3):
        try:
            async with aclosing(stream(engine, QUESTION, GenerationOptions())) as pieces:
                said += [repr(piece) async for piece in pieces]
        except MoltBotError as error:
            said += [str(error), repr(error), repr(error.fields), "".join(traceback.format_exception(error))]
    return said


def test_the_files_hold_none_of_them(workspace: Workspace, planted: list[str]) -> None:
    filled(workspace, planted, {})
    for path in workspace.folder.iterdir():
        assert found_in(path.read_bytes(), planted) == []
    assert len(Vault(workspace, {}).keys) == 0
    vault = Vault(workspace, {})
    vault.reload()
    assert [key.text for key in vault.keys] == planted[:-10]  # they are there all the same


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
async def test_no_error_log_or_object_of_an_engine_tells_one(
    workspace: Workspace, planted: list[str], hostile: str, dialect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ring = filled(workspace, planted, {})
    headers = (("X-Gateway", secret := "gw-" + secrets.token_hex(12)),)
    said, engines = [], []
    for name in ("openai", "anthropic", "office"):
        provider = Provider(name=name, dialect=dialect, base_url=hostile, headers=headers)
        engine = ProviderEngine(provider, ProviderModel(name="small"), keys=ring)
        engines.append(engine)
        await engine.start()
        said += await outcomes(engine)
        said += [repr(dict(engine.numbers)), engine.display_name]
    objects = own_objects(*engines, ring)
    said += [f"{one!r}\n{one}" for one in objects]
    said += [f"{record.getMessage()} {vars(record)!r}" for record in caplog.records]
    for engine in engines:
        await engine.close()
    assert {type(one).__name__ for one in objects} >= {"ProviderKeys", "Vault", "ProviderKey", "ProviderEngine"}
    assert any("refuses the key" in text for text in said)
    assert {text for text in said if found_in(text, [*planted, secret])} == set()


def test_no_error_of_the_vault_or_the_configuration_tells_one(workspace: Workspace, planted: list[str]) -> None:
    ring, said = filled(workspace, planted, {}), []
    whole = workspace.vault_file.read_bytes()
    for number, key in enumerate(planted):
        for act in (
            lambda key=key: ring.vault.add("openai", f"{key} {key}"),
            lambda key=key: ring.vault.add("office", key) and ring.vault.add("office", key),
            lambda key=key: ring.vault.remove(key),
            lambda key=key: Vault(workspace, {"MOLTBOT_VAULT_KEY": key}).add("x", key),
        ):
            with pytest.raises(VaultError) as caught:
                act()
            said.append("".join(traceback.format_exception(caught.value)))
        for yaml in (f"api_key: {key}", f"headers: {{Authorization: {key}}}", f"headers: {key}", f"token: [{key}]"):
            (workspace.folder / "moltbot.yaml").write_text(f"providers:\n  openai: {{{yaml}}}\n")
            with pytest.raises(ConfigError) as refused:
                load_settings(workspace.folder, {}, current=workspace.folder / "nowhere")
            said.append("".join(traceback.format_exception(refused.value)))
        workspace.vault_file.write_bytes(whole[: -number - 3])
        with pytest.raises(VaultError) as caught:
            Vault(workspace, {}).reload()
        said.append("".join(traceback.format_exception(caught.value)))
        workspace.vault_file.write_bytes(whole)
    assert len(said) == COUNT * 9
    assert {text for text in said if found_in(text, planted)} == set()


def test_settings_with_secrets_in_all_places_tell_none(tmp_path: Path, planted: list[str]) -> None:
    first, second, *rest = planted
    (tmp_path / "moltbot.yaml").write_text(
        f"cache: {{password: {first!r}}}\n"
        f"providers: {{office: {{base_url: 'https://a.example/v1', headers: {{X: {second!r}}}}}}}\n"
    )
    (tmp_path / ".env").write_text("".join(f"P{number}_API_KEY={key}\n" for number, key in enumerate(rest)))
    settings = load_settings(tmp_path, {"OPENAI_API_KEY": rest[0]}, current=tmp_path / "nowhere")
    assert settings.cache.password == first
    text = f"{settings!r} {settings} {settings.origins} {settings.notices} {variables_of(settings.providers, {})}"
    assert found_in(text, planted) == []
    assert isinstance(copy.copy(settings), Settings)


def test_a_key_is_no_value_that_is_written_away_by_accident(workspace: Workspace, planted: list[str]) -> None:
    """What is logged as JSON, or formatted, goes by `str` and `repr`; both are without the secret."""
    ring = filled(workspace, planted, {})
    for key in (*ring.held.all, *ring.vault.keys, *ring.keys("office")):
        assert found_in(f"{key} {key!r} {[key]} { {key.id: key} }", planted) == []
    assert found_in(pickle.dumps([key.id for key in ring.held.all]), planted) == []
