"""A headless Chromium for the page tests: found on the machine, cut off from every host but this one, and watched."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Request, async_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 800}


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@dataclass(slots=True)
class Visit:
    """A page in a browser and everything suspicious that it did."""

    page: Page
    origin: str
    strangers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def on_request(self, request: Request) -> None:
        """Notes a request to any other host."""
        target = urlsplit(request.url)
        if target.scheme not in ("data", "blob", "about") and f"{target.scheme}://{target.netloc}" != self.origin:
            self.strangers.append(request.url)

    def on_console(self, message: ConsoleMessage) -> None:
        """Notes an error in the console; answers of 4xx and broken lines are part of the tests."""
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)


@asynccontextmanager
async def chromium() -> AsyncGenerator[Browser]:
    """Starts the browser and ends it."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def visiting(browser: Browser, origin: str, path: str = "/", **options: Any) -> AsyncGenerator[Visit]:
    """Opens a page in a context of its own; `options` go to the context (locale, color_scheme, viewport…)."""
    settings = {"viewport": DESKTOP, "locale": "en-US", **options}
    context: BrowserContext = await browser.new_context(**settings)
    context.set_default_timeout(10_000)
    try:
        page = await context.new_page()
        visit = Visit(page, origin)
        page.on("request", lambda request: visit.on_request(request))
        page.on("console", lambda message: visit.on_console(message))
        page.on("pageerror", lambda failure: visit.problems.append(str(failure)))
        await page.goto(origin + path)
        yield visit
    finally:
        await context.close()


async def ask(visit: Visit, text: str) -> None:
    """Types a message and sends it with Enter."""
    await visit.page.fill("#message", text)
    await visit.page.keyboard.press("Enter")


async def answered(visit: Visit) -> str:
    """Waits until the last answer has ended; answers its text as a reader sees it."""
    await visit.page.wait_for_selector(".answer:last-child:not([aria-busy])", state="attached")
    return await visit.page.locator(".answer .prose").last.inner_text()


async def shown(visit: Visit, text: str) -> None:
    """Waits until the last answer shows a text."""
    await visit.page.locator(".answer .prose").last.get_by_text(text).first.wait_for()
