# ruff: noqa: RUF001 (Chinese is written as it is)
"""Who answers, in the page, or why nobody does: switches of the model, thoughts, tools, refusals, the store."""

from __future__ import annotations

import pytest
from browser import PHONE, answered, ask, shown, visiting
from playwright.async_api import Browser, expect
from scripted_site import Emit, Hold, Say, ScriptedSite, Step, error

pytestmark = pytest.mark.asyncio(loop_scope="module")

REASON = "no first token within 3000 ms"
SWITCH = Emit(kind="notice", data={"code": "FAILOVER", "from": "opus", "to": "gpt", "reason": REASON})
LINES = {
    "en-US": f"Switched from opus to gpt: {REASON}",
    "zh-CN": f"已从 opus 切换到 gpt：{REASON}",
}


@pytest.mark.parametrize("locale", LINES)
async def test_a_switch_before_the_first_word_is_one_small_line(browser: Browser, locale: str) -> None:
    steps: list[Step] = [Emit(kind="routed", data={"model": "opus"}), SWITCH, Say(text="Hello"), Hold(gate="end")]
    async with (
        ScriptedSite(lambda _: steps, models=("gpt",)) as site,
        visiting(browser, site.origin, "/#/new", locale=locale, viewport=PHONE) as visit,
    ):
        await ask(visit, "hi")
        await shown(visit, "Hello")
        site.gate("end").set()
        assert await answered(visit) == "Hello"
        assert await visit.page.locator(".notice").all_inner_texts() == [LINES[locale]]
        box = await visit.page.locator(".notice").bounding_box()
        assert box is not None
        assert box["height"] < 48, "two lines of a phone at most"
        assert (await visit.page.locator(".meta").inner_text()).startswith(("Model gpt", "模型 gpt"))
        assert visit.problems == []


async def test_words_that_are_taken_back_are_replaced_and_the_page_says_so(browser: Browser) -> None:
    steps: list[Step] = [
        Emit(kind="reasoning_delta", data={"text": "a wrong thought"}),
        Say(text="Wrong start"),
        Hold(gate="seen"),
        SWITCH,
        Emit(kind="reset", data={"text": "", "reason": REASON}),
        Emit(kind="reasoning_delta", data={"text": "a right thought"}),
        Say(text="Right"),
    ]
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "hi")
        await shown(visit, "Wrong start")
        site.gate("seen").set()
        assert await answered(visit) == "Right"
        lines = await visit.page.locator(".notice").all_inner_texts()
        assert lines == [LINES["en-US"], "The answer was started again"]
        assert await visit.page.locator(".thoughts-text").text_content() == "a right thought"


@pytest.mark.parametrize(("locale", "line"), [("en-US", "The answer was started again"), ("zh-CN", "回答已重新开始")])
async def test_an_answer_that_is_started_again_several_times_says_so_in_one_line(
    browser: Browser, locale: str, line: str
) -> None:
    steps: list[Step] = []
    for n in range(3):
        steps += [Say(text=f"Start {n}"), Hold(gate=f"seen {n}"), Emit(kind="reset", data={"text": ""})]
    async with (
        ScriptedSite(lambda _: [*steps, Say(text="Right")]) as site,
        visiting(browser, site.origin, "/#/new", locale=locale) as visit,
    ):
        await ask(visit, "hi")
        for n, times in enumerate(("", " (2×)", " (3×)")):
            await shown(visit, f"Start {n}")
            site.gate(f"seen {n}").set()
            await visit.page.get_by_text(line + times, exact=True).wait_for()
        assert await answered(visit) == "Right"
        assert await visit.page.locator(".notice").all_inner_texts() == [f"{line} (3×)"]


async def test_an_answer_that_goes_on_where_another_model_stopped_is_not_called_started_again(
    browser: Browser,
) -> None:
    steps: list[Step] = [
        Say(text="Half an"),
        SWITCH,
        Emit(kind="reset", data={"text": "Half an answer", "reason": ""}),
    ]
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "hi")
        assert await answered(visit) == "Half an answer"
        assert await visit.page.locator(".notice").all_inner_texts() == [LINES["en-US"]]


async def test_a_notice_that_is_no_switch_says_its_reason(browser: Browser) -> None:
    steps: list[Step] = [
        Emit(kind="notice", data={"code": "BUDGET", "from": "", "to": "", "reason": "90 % of the budget is used"}),
        Emit(kind="notice", data={"code": "SOMETHING_NEW", "from": "", "to": "", "reason": ""}),
        Say(text="Hello"),
    ]
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "hi")
        await answered(visit)
        lines = await visit.page.locator(".notice").all_inner_texts()
        assert lines == ["Note: 90 % of the budget is used", "Note: SOMETHING_NEW"]


async def test_thoughts_grow_folded_and_apart_from_the_answer(browser: Browser) -> None:
    steps: list[Step] = [
        Emit(kind="queued", data={"position": 2}),
        Emit(kind="reasoning_delta", data={"text": "First <b>this</b>,\n"}),
        Hold(gate="open"),
        Emit(kind="reasoning_delta", data={"text": "then that."}),
        Say(text="The answer"),
    ]
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "hi")
        await visit.page.get_by_text("Thinking").wait_for()
        said = visit.page.locator(".thoughts-text")
        assert not await said.is_visible()
        await visit.page.click(".thoughts summary")
        assert await said.inner_text() == "First <b>this</b>,\n"
        site.gate("open").set()
        assert await answered(visit) == "The answer"
        assert await said.inner_text() == "First <b>this</b>,\nthen that."
        assert await visit.page.locator(".thoughts").get_attribute("open") == ""


async def test_an_answer_without_thoughts_shows_no_place_for_them(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="Hello")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        await ask(visit, "hi")
        await answered(visit)
        assert not await visit.page.locator(".thoughts").is_visible()


@pytest.mark.parametrize(("locale", "words"), [("en-US", "kept from before"), ("zh-CN", "来自缓存")])
async def test_a_kept_answer_says_that_it_is_one(browser: Browser, locale: str, words: str) -> None:
    end = Emit(
        kind="completed",
        data={"text": "Hello", "finish_reason": "stop", "model": "gpt", "cached": True, "reasoning": "Hm."},
    )
    async with (
        ScriptedSite(lambda _: [Say(text="Hello"), Hold(gate="end"), end]) as site,
        visiting(browser, site.origin, "/#/new", locale=locale) as visit,
    ):
        await ask(visit, "hi")
        await shown(visit, "Hello")
        site.gate("end").set()
        await answered(visit)
        assert words in await visit.page.locator(".meta").inner_text()
        assert await visit.page.locator(".thoughts-text").text_content() == "Hm."


async def test_an_answer_of_parts_alone_names_them_and_is_not_called_empty(browser: Browser) -> None:
    parts = [{"kind": "tool_call", "tool": "clock"}, {"kind": "image", "filename": "cat.png"}]
    steps: list[Step] = [
        Emit(kind="attachment", data={"part": parts[0]}),
        Emit(kind="completed", data={"text": "", "finish_reason": "tool_calls", "attachments": parts}),
    ]
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "hi")
        await answered(visit)
        assert await visit.page.locator(".chip").all_inner_texts() == ["Asks for clock", "Attachment: cat.png"]


@pytest.mark.parametrize(
    ("reason", "words"), [("BUDGET_EXCEEDED", "The budget is used up"), ("MODEL_CREDENTIAL", "accepts no key")]
)
async def test_what_stops_a_provider_is_told_in_words(browser: Browser, reason: str, words: str) -> None:
    failed = Emit(kind="failed", data={"code": "FAILED_PRECONDITION", "reason": reason, "message": "m"})
    async with ScriptedSite(lambda _: [failed]) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "hi")
        await visit.page.wait_for_selector(".problem")
        assert words in await visit.page.locator(".problem").inner_text()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(429, "insufficient_quota", "The budget is used up"), (503, "model_credential", "accepts no key of this server")],
)
async def test_what_only_somebody_can_mend_is_told_at_once_and_not_asked_again(
    browser: Browser, status: int, code: str, words: str
) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="Too late")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        site.refusals = [error(status, "Refused.", code, {"Retry-After": "7"})]
        await ask(visit, "hi")
        await visit.page.get_by_text(words).wait_for()
        assert site.refusals == []
        await visit.page.reload()
        await expect(visit.page.locator("#message")).to_have_value("hi")
        await expect(visit.page.locator(".welcome")).to_be_visible()
        assert [body["text"] for body in site.started()] == ["hi"]


async def test_a_refusal_is_not_called_a_lost_connection(browser: Browser) -> None:
    said = """() => {
      window.said = [];
      new MutationObserver(() => window.said.push(document.querySelector(".thread").innerText))
        .observe(document.body, { childList: true, subtree: true, characterData: true });
    }"""
    async with ScriptedSite(lambda _: []) as site, visiting(browser, site.origin, "/#/new") as visit:
        site.refusals = [error(429, "Too many turns.", "rate_limit_exceeded") for _ in range(3)]
        await visit.page.evaluate(said)
        await ask(visit, "hi")
        await visit.page.get_by_text("MoltBot is busy right now").wait_for()
        assert site.refusals == []
        assert "Connection lost" not in "".join(await visit.page.evaluate("window.said"))


async def test_that_the_store_is_away_is_said_while_it_is_tried_again(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="Kept again")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        site.refusals = [error(503, "The core cannot reach its store.", "storage_unavailable") for _ in range(4)]
        await ask(visit, "hi")
        await visit.page.get_by_text("cannot reach its store").wait_for()
        assert await answered(visit) == "Kept again"
