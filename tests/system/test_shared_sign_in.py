"""Two installations with a chat page: who signed in at one is known at the other that has the same keys."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import ClientSession, CookieJar
from cli_process import Home


async def test_installations_with_the_same_keys_know_the_same_people(tmp_path: Path) -> None:
    here, there = Home(tmp_path / "here"), Home(tmp_path / "there")
    for home in (here, there):
        home.folder.mkdir()
    async with here.started() as first:
        for folder in (there.workspace, there.workspace / "http"):
            folder.mkdir(mode=0o700)
        for name in ("key", "http/cookie.key"):
            shutil.copy2(here.workspace / name, there.workspace / name)
        async with there.started() as second, ClientSession(cookie_jar=CookieJar(unsafe=True)) as browser:
            link = urlsplit((await here.run("link")).out.strip())
            async with browser.get(f"{first.told()['http']}{link.path}?{link.query}") as page:
                assert (page.status, page.url.query_string) == (200, "")
            for started in (first, second):
                async with browser.get(f"{started.told()['http']}/api/me") as me:
                    assert me.status == 200, await me.text()
