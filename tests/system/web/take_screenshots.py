# ruff: noqa: RUF001 (the Chinese questions are written as they are)
"""Takes the pictures of the README from a real `moltbot start` with the built-in model; every answer is its own.

python tests/system/web/take_screenshots.py docs/images
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from cli_process import Home
from playwright.async_api import Browser, StorageState
from web.browser import DESKTOP, PHONE, Visit, answered, ask, chromium, visiting

Chats = tuple[tuple[str, ...], ...]

BUILT_IN = "moltbot-demo"
WHAT = "What is MoltBot?"
CLIENT = "How do I use the OpenAI client with MoltBot?"
DINGTALK = "怎么接入钉钉？"
# The questions of each chat; the last chat is the one in the picture, the others are in the list beside it.
ENGLISH: Chats = ((DINGTALK,), ("tell me a joke",), (CLIENT, "Show me an example"))
CHINESE: Chats = ((WHAT,), (DINGTALK,), ("怎么用 OpenAI 客户端？", "举个例子"))
HANDHELD = {"viewport": PHONE, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
PICTURES: dict[str, tuple[Chats, dict[str, Any]]] = {
    "chat-desktop": (ENGLISH, {"viewport": DESKTOP, "color_scheme": "light"}),
    "chat-desktop-dark": (ENGLISH, {"viewport": DESKTOP, "color_scheme": "dark"}),
    "chat-desktop-zh": (CHINESE, {"viewport": DESKTOP, "color_scheme": "light", "locale": "zh-CN"}),
    "chat-phone": (ENGLISH, {**HANDHELD, "color_scheme": "light"}),
    "chat-phone-zh": (CHINESE, {**HANDHELD, "color_scheme": "dark", "locale": "zh-CN"}),
    "welcome-desktop": ((), {"viewport": DESKTOP, "color_scheme": "light"}),
    "welcome-phone": ((), {**HANDHELD, "color_scheme": "light"}),
}
CLEAR = """async () => {
  const { sessions } = await (await fetch("/api/sessions")).json();
  const ask = { method: "DELETE", headers: { "X-MoltBot": "1" } };
  return Promise.all(sessions.map(async ({ id }) => (await fetch(`/api/sessions/${id}`, ask)).status));
}"""


async def converse(visit: Visit, questions: tuple[str, ...]) -> None:
    """Has a chat of its own with the model. Raises `SystemExit` where an answer is missing."""
    await visit.page.keyboard.press("Control+k")
    await visit.page.wait_for_selector(".welcome")
    for question in questions:
        await ask(visit, question)
        print(f"{question} -> {await answered(visit)!r}")
    await visit.page.locator(".chat-row", has_text=questions[0]).first.wait_for(state="attached")
    if await visit.page.locator(".problem").count():
        raise SystemExit(f"no answer: {await visit.page.locator('.problem').first.inner_text()}")


async def take(browser: Browser, origin: str, state: StorageState, target: Path) -> None:
    """Has the chats of each picture, takes it, and deletes them again, so that no title is listed twice."""
    for name, (chats, options) in PICTURES.items():
        async with visiting(browser, origin, "/#/new", storage_state=state, **options) as visit:
            await visit.page.wait_for_selector(".card")
            for questions in chats:
                await converse(visit, questions)
            await visit.page.screenshot(path=target / f"{name}.png", animations="disabled")
            if set(await visit.page.evaluate(CLEAR)) - {204}:
                raise SystemExit("the chats of a picture could not be deleted")


async def main(target: Path) -> None:
    """Starts MoltBot in a home of its own, signs in by the printed link, and takes the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        async with Home(Path(folder), {}).started() as started, chromium() as browser:
            link = next(iter(re.findall(r"http://\S+/login\?code=\S+", started.said)))
            origin = link[: link.index("/login")]
            async with visiting(browser, origin, link.removeprefix(origin)) as visit:
                await visit.page.wait_for_selector("#message")
                model = await visit.page.evaluate(
                    "fetch('/api/me').then(async (me) => (await me.json()).default_model.id)"
                )
                if model != BUILT_IN:
                    raise SystemExit(f"the pictures show the built-in model, but {model} answers")
                state = await visit.page.context.storage_state()
            await take(browser, origin, state, target)


if __name__ == "__main__":
    pictures = Path(sys.argv[1])
    pictures.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(pictures))
