# ruff: noqa: RUF001 (the Chinese questions are written as they are)
"""Takes the pictures of the README from a real `moltbot start` with the built-in model.

python tests/system/web/take_screenshots.py docs/images
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from cli_process import Home
from playwright.async_api import Browser, StorageState
from web.browser import DESKTOP, PHONE, answered, ask, chromium, visiting

ENGLISH = ("What can you do?", "How do I use the OpenAI client with MoltBot?", "show me an example")
CHINESE = ("你能做什么？", "怎么用 OpenAI 客户端连接？", "举个例子")
HANDHELD = {"viewport": PHONE, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
PICTURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "chat-desktop": (ENGLISH, {"viewport": DESKTOP, "color_scheme": "light"}),
    "chat-desktop-dark": (ENGLISH, {"viewport": DESKTOP, "color_scheme": "dark"}),
    "chat-desktop-zh": (CHINESE, {"viewport": DESKTOP, "color_scheme": "light", "locale": "zh-CN"}),
    "chat-phone": (ENGLISH, {**HANDHELD, "color_scheme": "light"}),
    "chat-phone-zh": (CHINESE, {**HANDHELD, "color_scheme": "dark", "locale": "zh-CN"}),
    "welcome-desktop": ((), {"viewport": DESKTOP, "color_scheme": "light"}),
    "welcome-phone": ((), {**HANDHELD, "color_scheme": "light"}),
}


async def take(browser: Browser, origin: str, state: StorageState, target: Path) -> None:
    """Has each conversation and takes its picture."""
    for name, (questions, options) in PICTURES.items():
        async with visiting(browser, origin, "/#/new", storage_state=state, **options) as visit:
            await visit.page.wait_for_selector(".card")
            for question in questions:
                await ask(visit, question)
                print(f"{name}: {question} -> {await answered(visit)!r}")
            if questions:
                await visit.page.locator(".chat-row", has_text=questions[0]).first.wait_for(state="attached")
            await visit.page.screenshot(path=target / f"{name}.png", animations="disabled")


async def main(target: Path) -> None:
    """Starts MoltBot in a home of its own, signs in by the printed link, and takes the pictures."""
    model = {name: os.environ[name] for name in ("MODEL_TYPE", "MODEL_PATH") if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        async with Home(Path(folder), model).started() as started, chromium() as browser:
            link = next(iter(re.findall(r"http://\S+/login\?code=\S+", started.said)))
            origin = link[: link.index("/login")]
            async with visiting(browser, origin, link.removeprefix(origin)) as visit:
                await visit.page.wait_for_selector("#message")
                state = await visit.page.context.storage_state()
            await take(browser, origin, state, target)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
