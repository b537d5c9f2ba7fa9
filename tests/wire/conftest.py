"""The adapter under test: real sockets on both sides, a scripted core behind it."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from moltbot_adapters.http.settings import Settings
from running_adapter import Adapter, RunningAdapter
from scripted_core import KEY, ScriptedCore


@pytest.fixture
async def core() -> AsyncIterator[ScriptedCore]:
    """A scripted core that serves."""
    core = ScriptedCore()
    await core.start()
    yield core
    await core.stop()


@pytest.fixture
def settings(core: ScriptedCore, tmp_path: Path) -> Settings:
    """Settings of an adapter in front of the scripted core."""
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    key_file.chmod(0o600)
    return Settings(
        host="127.0.0.1",
        port=0,
        core=f"127.0.0.1:{core.port}",
        key_file=key_file,
        state=tmp_path / "state",
        drain_s=1.0,
    )


@pytest.fixture
async def adapter(settings: Settings) -> AsyncIterator[Adapter]:
    """A running adapter."""
    async with RunningAdapter(settings) as adapter:
        yield adapter


@pytest.fixture
async def http(adapter: Adapter) -> AsyncIterator[aiohttp.ClientSession]:
    """A plain HTTP client that keeps no cookies."""
    async with aiohttp.ClientSession(adapter.url, cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


@pytest.fixture
async def browser(adapter: Adapter) -> AsyncIterator[aiohttp.ClientSession]:
    """A signed-in browser: it holds the cookie and sends what a page of this origin sends."""
    headers = {"X-MoltBot": "1", "Origin": adapter.url, "Sec-Fetch-Site": "same-origin"}
    jar = aiohttp.CookieJar(unsafe=True)  # cookies of an address, not of a name
    async with aiohttp.ClientSession(adapter.url, headers=headers, cookie_jar=jar) as session:
        async with session.post("/api/login", json={"key": KEY}) as answer:
            assert answer.status == 204
        yield session
