# ruff: noqa: SIM117 (a site and its visit read better apart)
"""Phones and low windows: where the focus goes, and what is in sight."""

from __future__ import annotations

import pytest
from browser import PHONE, visiting
from playwright.async_api import Browser, expect
from scripted_site import ScriptedSite

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("width", [320, 390])
async def test_the_list_of_chats_takes_the_focus_on_a_phone_and_gives_it_back(browser: Browser, width: int) -> None:
    async with ScriptedSite(lambda _: []) as site:
        async with visiting(browser, site.origin, "/#/new", viewport={**PHONE, "width": width}) as visit:
            box, closer, opener = (visit.page.locator(name) for name in ("#message", ".sidebar-head button", ".opener"))
            await expect(box).to_be_focused()
            for way_back in ("Escape", "Control+b", "Enter"):
                await visit.page.keyboard.press("Control+b")
                await expect(closer).to_be_focused()
                await visit.page.keyboard.press(way_back)
                await expect(box).to_be_focused()
            await opener.focus()
            await visit.page.keyboard.press("Enter")
            await expect(closer).to_be_focused()
            await visit.page.keyboard.press("Escape")
            await expect(opener).to_be_focused()


@pytest.mark.parametrize(("width", "height"), [(320, 480), (740, 340), (1280, 400)])
async def test_the_welcome_is_read_from_its_top_in_a_low_window(browser: Browser, width: int, height: int) -> None:
    async with ScriptedSite(lambda _: []) as site:
        site.add_chat("Past", [("q", "a\n\n" * 60)])
        async with visiting(browser, site.origin, "/#/new", viewport={"width": width, "height": height}) as visit:
            await expect(visit.page.locator(".welcome h2")).to_be_in_viewport(ratio=1)
            await expect(visit.page.locator(".jump")).to_be_hidden()
            await visit.page.evaluate("location.hash = '#/c/s1'")
            await expect(visit.page.locator(".answer .prose p").last).to_be_in_viewport()
            await visit.page.keyboard.press("Control+k")
            await expect(visit.page.locator(".welcome h2")).to_be_in_viewport(ratio=1)
            await visit.page.set_viewport_size({"width": width, "height": height - 20})
            await expect(visit.page.locator(".welcome h2")).to_be_in_viewport(ratio=1)
            assert visit.problems == []
