# ruff: noqa: RUF001 (the Chinese words are written as they are)
"""Enter while an answer is still being written: the text stays, and the page says why and what ends the wait."""

from __future__ import annotations

from typing import Any

import pytest
from browser import DESKTOP, PHONE, Visit, answered, ask, shown, visiting
from playwright.async_api import Browser, Locator, expect
from scripted_site import Hold, Say, ScriptedSite
from test_page_shell import CONTRAST

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGLISH = "The answer is still being written. Your message stays here; Stop (Esc) ends the answer."
CHINESE = "回答还没写完，你的消息先留在这里；“停止”（Esc）可结束回答。"


def site() -> ScriptedSite:
    """A site whose answers go on until the gate "end" is set."""
    return ScriptedSite(lambda _: [Say(text="busy"), Hold(gate="end")])


def hint(visit: Visit) -> Locator:
    """The place of the hint: it is there from the start, so that screen readers watch it."""
    return visit.page.locator(".held[role=status]")


async def too_early(visit: Visit) -> None:
    """Asks, and presses Enter on the next message while the answer is still being written."""
    await ask(visit, "one")
    await shown(visit, "busy")
    await ask(visit, "two")


@pytest.mark.parametrize(("locale", "words"), [("en-US", ENGLISH), ("zh-CN", CHINESE)])
async def test_an_enter_that_comes_too_early_keeps_the_text_and_says_why(
    browser: Browser, locale: str, words: str
) -> None:
    async with site() as served, visiting(browser, served.origin, "/#/new", locale=locale) as visit:
        await expect(hint(visit)).to_have_text("")
        await ask(visit, "one")
        await shown(visit, "busy")
        await visit.page.keyboard.press("Enter")
        await expect(hint(visit)).to_have_text("")  # there is nothing that could wait
        await ask(visit, "two")
        await expect(hint(visit)).to_have_text(words)
        await expect(hint(visit)).to_be_visible()
        assert await visit.page.input_value("#message") == "two"
        assert await visit.page.evaluate("document.activeElement.id") == "message"
        assert len(served.started()) == 1
        served.gate("end").set()
        await answered(visit)
        await expect(hint(visit)).to_have_text("")
        await visit.page.keyboard.press("Enter")
        await visit.page.locator(".question").nth(1).wait_for()
        assert [body["text"] for body in served.started()] == ["one", "two"]
        assert visit.problems == []


async def test_the_hint_goes_when_the_text_changes_and_comes_back_with_the_next_enter(browser: Browser) -> None:
    async with site() as served, visiting(browser, served.origin, "/#/new") as visit:
        await too_early(visit)
        await expect(hint(visit)).to_have_text(ENGLISH)
        await visit.page.keyboard.type("!")
        await expect(hint(visit)).to_have_text("")
        await visit.page.keyboard.press("Enter")
        await expect(hint(visit)).to_have_text(ENGLISH)
        await visit.page.get_by_role("button", name="切换到中文").click()
        await expect(hint(visit)).to_have_text(CHINESE)
        served.gate("end").set()


async def test_each_further_enter_is_told_to_screen_readers_again(browser: Browser) -> None:
    async with site() as served, visiting(browser, served.origin, "/#/new") as visit:
        await too_early(visit)
        await expect(hint(visit)).to_have_text(ENGLISH)
        await hint(visit).evaluate(
            "node => new MutationObserver(() => { window.told = true; }).observe(node, { childList: true })"
        )
        await visit.page.keyboard.press("Enter")
        await visit.page.wait_for_function("window.told")
        await expect(hint(visit)).to_have_text(ENGLISH)
        served.gate("end").set()


async def test_what_the_hint_names_ends_the_answer_and_the_text_can_be_sent(browser: Browser) -> None:
    async with site() as served, visiting(browser, served.origin, "/#/new") as visit:
        await too_early(visit)
        await visit.page.keyboard.press("Escape")
        await visit.page.locator(".chip.ending").wait_for()
        await expect(hint(visit)).to_have_text("")
        await visit.page.keyboard.press("Enter")
        await visit.page.locator(".question").nth(1).wait_for()
        assert [body["text"] for body in served.started()] == ["one", "two"]
        served.gate("end").set()


async def test_an_answer_that_is_being_stopped_is_not_said_to_be_written(browser: Browser) -> None:
    async with site() as served, visiting(browser, served.origin, "/#/new") as visit:
        served.slow_accept = True
        await ask(visit, "one")
        await visit.page.wait_for_selector(".dots")
        await ask(visit, "two")
        await expect(hint(visit)).to_have_text(ENGLISH)
        await visit.page.click(".round.stop")
        await expect(hint(visit)).to_have_text("Stopping…")
        await visit.page.wait_for_selector(".chip.ending")
        await expect(hint(visit)).to_have_text("")
        served.gate("accept").set()
        served.gate("end").set()


async def test_another_chat_does_not_take_the_hint_along(browser: Browser) -> None:
    async with site() as served, visiting(browser, served.origin, "/#/new") as visit:
        await too_early(visit)
        await expect(hint(visit)).to_have_text(ENGLISH)
        await visit.page.keyboard.press("Control+k")
        await visit.page.locator(".welcome").wait_for()
        await expect(hint(visit)).to_have_text("")
        assert await visit.page.input_value("#message") == "two"
        served.gate("end").set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_the_hint_is_readable_beside_the_box_and_hides_no_word_of_the_answer(
    browser: Browser, scheme: str, viewport: Any
) -> None:
    long = "\n\n".join(f"Paragraph {n}." for n in range(60))
    steps = [Say(text=long, chunk=400), Hold(gate="end")]
    look = {"viewport": viewport, "color_scheme": scheme, "reduced_motion": "reduce"}
    async with ScriptedSite(lambda _: steps) as served, visiting(browser, served.origin, "/#/new", **look) as visit:
        await ask(visit, "one")
        last = visit.page.locator(".answer .prose p").last
        await expect(last).to_have_text("Paragraph 59.")
        await ask(visit, "two")
        await expect(hint(visit)).to_have_text(ENGLISH)
        await expect(last).to_be_in_viewport()
        told, box, end = [await place.bounding_box() for place in (hint(visit), visit.page.locator(".composer"), last)]
        assert told is not None
        assert box is not None
        assert end is not None
        assert end["y"] + end["height"] <= told["y"]
        assert told["y"] + told["height"] <= box["y"]
        assert told["x"] >= 0
        assert told["x"] + told["width"] <= viewport["width"]
        assert await visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert await visit.page.evaluate(CONTRAST) == []
        served.gate("end").set()
