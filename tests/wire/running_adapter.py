"""Runs the HTTP adapter inside a test, on a real socket."""

import dataclasses
import hashlib
import time
from dataclasses import dataclass

from aiohttp import web
from moltbot_adapters.http.app import build_app
from moltbot_adapters.http.server import Runner
from moltbot_adapters.http.settings import Settings


@dataclass
class Adapter:
    """A running adapter and how to reach it."""

    app: web.Application
    runner: Runner
    settings: Settings
    url: str
    port: int

    @property
    def api(self) -> str:
        """The base URL for OpenAI clients."""
        return f"{self.url}/v1"

    def link(self, code: str, lives_s: float = 60) -> str:
        """Writes a one-time link as the command line does, and returns its address."""
        links = self.settings.state / "links"
        (links / hashlib.sha256(code.encode()).hexdigest()).write_text(str(int(time.time() + lives_s)))
        return f"{self.url}/login?code={code}"


class RunningAdapter:
    """Runs an adapter with these settings for the length of a block."""

    def __init__(self, settings: Settings, **changes: object) -> None:
        self._settings = dataclasses.replace(settings, **changes)  # type: ignore[arg-type]

    async def __aenter__(self) -> Adapter:
        app = build_app(self._settings)
        self._runner = Runner(app, self._settings)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._settings.host, self._settings.port).start()
        port: int = self._runner.addresses[0][1]
        return Adapter(app, self._runner, self._settings, f"http://127.0.0.1:{port}", port)

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()
