"""A hundred planted keys, all of them used by a running MoltBot, are found in nothing that it writes or tells."""

from __future__ import annotations

import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
from aiohttp import web
from cli_process import Home
from moltbot_server.auth.vault import Vault
from moltbot_server.workspace import Workspace

COUNT = 100
PROVIDERS = ("mine", "yours", "claudes")
STATUSES = (401, 403, 429, 402)


@asynccontextmanager
async def hostile() -> AsyncIterator[tuple[str, set[str]]]:
    """Run a provider that refuses each key and repeats it in all that it says; give its address and the keys seen."""
    seen: set[str] = set()

    async def refuse(request: web.Request) -> web.StreamResponse:
        key = request.headers.get("x-api-key", "") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        seen.add(key)
        body = {"error": {"message": f"Incorrect API key provided: {key}", "type": key, "code": key}}
        return web.json_response(body, status=STATUSES[len(seen) % len(STATUSES)], headers={"X-Key": key})

    application = web.Application()
    application.router.add_route("*", "/{rest:.*}", refuse)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1", seen
    finally:
        await runner.cleanup()


def configured(home: Home, address: str, planted: list[str]) -> None:
    """Put the keys into the vault, and the providers and a route through all of them into the configuration."""
    workspace = Workspace(folder=home.workspace)
    workspace.create()
    vault = Vault(workspace, {})
    for number, key in enumerate(planted[:-3]):
        vault.add(PROVIDERS[number % 3], key, label=f"key {number}")
    for name, key in zip(PROVIDERS, planted[-3:], strict=True):
        home.variables[f"{name.upper()}_API_KEY"] = key
    workspace.config_file.write_text(
        "log_level: debug\n"
        "providers:\n"
        f"  mine: {{base_url: '{address}', models: [one]}}\n"
        f"  yours: {{base_url: '{address}', models: [two]}}\n"
        f"  claudes: {{base_url: '{address}', dialect: anthropic, models: [three]}}\n"
        "models: {primary: mine/one, fallback: [yours/two, claudes/three]}\n"
    )


def leaked(text: str | bytes, planted: list[str]) -> list[str]:
    """Return what a text holds of them."""
    text = text if isinstance(text, str) else text.decode("utf-8", "replace")
    return [key for key in planted if key in text]


async def test_no_file_answer_log_metric_or_command_line_holds_one(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    home = Home(tmp_path / "home", variables={})
    planted = [f"sk-{name}-{secrets.token_hex(16)}" for name in ("proj", "ant") for _ in range(COUNT // 2)]
    said = []
    async with hostile() as (address, seen):
        configured(home, address, planted)
        async with home.started() as started:
            for model in ("", "mine/one", "yours/two", "claudes/three", ""):
                named = ("--model", model) if model else ()
                for form in ("--events", "--json"):
                    ended = await home.run("chat", form, *named, "Hello")
                    assert ended.status != 0
                    said += [ended.out, ended.err]
            added = await home.run("key", "add", "mine", "--json", text=(late := f"sk-late-{secrets.token_hex(16)}"))
            assert added.json["core"] == "reloaded"
            said += [added.out, (await home.run("chat", "--json", "--model", "mine/one", "Hello")).out]
            for words in (("key", "list", "--json"), ("key", "list"), ("key", "test", "--json"), ("key", "test")):
                ended = await home.run(*words)
                said += [ended.out, ended.err]
            for words in (("status", "--json"), ("usage", "--json"), ("model", "list", "--json")):
                said.append((await home.run(*words)).out)
            async with aiohttp.ClientSession() as http:
                for page in (started.told()["metrics"] + "/metrics", started.told()["http"] + "/metrics"):
                    async with http.get(page if "://" in page else f"http://{page}") as response:
                        said.append(await response.text())
            said += [" ".join(process.cmdline()) for process in started.processes()]
            pids = started.told()["processes"]
            if sys.platform.startswith("linux"):  # other systems do not show it
                said += [repr(psutil.Process(pids[name]).environ()) for name in ("engine", "http")]
        said.append(started.said)
    files = [path for path in home.folder.rglob("*") if path.is_file()]
    assert {"moltbot.db", "vault.json", "key"} <= {path.name for path in files}
    assert set(planted) | {late} <= seen  # each was used, so each could have been told
    assert any("refuses the key" in text for text in said)
    assert [text[:2000] for text in said if leaked(text, [*planted, late])] == []
    assert [path for path in files if leaked(path.read_bytes(), [*planted, late])] == []
