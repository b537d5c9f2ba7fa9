"""What the page says while the server's store is away: that, and nothing else, until it is back."""

from __future__ import annotations

import pytest
from browser import Visit, answered, ask, shown, visiting
from playwright.async_api import Browser, expect
from scripted_site import Cut, Hold, Say, ScriptedSite

pytestmark = pytest.mark.asyncio(loop_scope="module")

AWAY = "The server cannot reach its store. Trying again…"
NOTED = """() => {
  window.said = [];
  const note = () => {
    const status = document.querySelector(".answer:last-child .status:not([hidden])");
    if (status && status.textContent !== window.said.at(-1)) window.said.push(status.textContent);
  };
  new MutationObserver(note).observe(document.body, { subtree: true, childList: true, attributes: true });
}"""
"""Keeps what the line under the last answer says, one after the other."""


async def said(visit: Visit) -> list[str]:
    """What that line has said up to now."""
    found: list[str] = await visit.page.evaluate("window.said")
    return found


@pytest.mark.parametrize("address", ["/#/c/s1", "/#/new", "/"])
async def test_a_page_that_opens_meanwhile_says_so_and_shows_all_when_the_store_is_back(
    browser: Browser, address: str
) -> None:
    async with ScriptedSite(lambda _: []) as site:
        site.add_chat("Past", [("q", "past answer")])
        site.store_away = True
        async with visiting(browser, site.origin, address) as visit:
            await expect(visit.page.locator(".away")).to_have_text(AWAY)
            await expect(visit.page.locator(".thread")).not_to_be_empty()
            site.store_away = False
            if address != "/#/c/s1":
                await visit.page.get_by_role("link", name="Past").click()
            await shown(visit, "past answer")
            await expect(visit.page.locator(".away")).to_have_text("")
            await expect(visit.page.locator(".chat-name")).to_have_text("Past")


async def test_a_store_that_is_lost_while_the_page_loads_leaves_no_blank_page(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site:
        site.slow_list = True
        async with visiting(browser, site.origin, "/#/new") as visit:
            await expect(visit.page.locator(".thread")).not_to_be_empty()
            site.store_away = True
            site.gate("list").set()
            await expect(visit.page.locator(".away")).to_have_text(AWAY)
            site.store_away = False
            await visit.page.locator(".welcome").wait_for()


async def test_a_message_says_what_is_waited_for_and_nothing_else_until_it_is_answered(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="Kept again")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        await visit.page.locator(".welcome").wait_for()
        await visit.page.evaluate(NOTED)
        site.store_away = True
        await ask(visit, "hi")
        await visit.page.locator(".answer .status", has_text=AWAY).wait_for()
        for _ in range(2):
            async with visit.page.expect_request("**/api/turns"):
                pass
        assert await said(visit) == ["Thinking", AWAY]
        site.store_away = False
        assert await answered(visit) == "Kept again"
        assert "Connection lost. Reconnecting…" not in await said(visit)
        assert len({body["request_id"] for body in site.started()}) == 1


async def test_an_answer_that_is_cut_says_so_too_while_it_cannot_be_picked_up(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="First half, "), Hold(gate="cut"), Cut(), Say(text="second half")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        await ask(visit, "hi")
        await shown(visit, "First half")
        site.store_away = True
        site.gate("cut").set()
        await visit.page.locator(".answer .status", has_text=AWAY).wait_for()
        site.store_away = False
        assert await answered(visit) == "First half, second half"
        await expect(visit.page.locator(".answer .status")).to_be_hidden()
