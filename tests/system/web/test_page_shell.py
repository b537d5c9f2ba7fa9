# ruff: noqa: E501, RUF001, SIM117 (scripts for the browser, hostile texts and Chinese are written as they are)
"""Everything around the conversation: the list of chats, keys, languages, themes, phones and what the files may hold."""

from __future__ import annotations

import base64
import re
from datetime import timedelta

import pytest
from browser import DESKTOP, PHONE, Visit, answered, ask, shown, visiting
from playwright.async_api import Browser, Locator
from scripted_site import BUILT_IN, STATIC, Emit, Hold, Say, ScriptedSite, Step

pytestmark = pytest.mark.asyncio(loop_scope="module")

RICH = (
    "# One\n\nText with `code`, **bold**, [a link](https://ok.example) and ![a picture](https://ok.example/x.png).\n\n> A quote\n\n"
    '| a | b |\n| - | - |\n| 1 | 2 |\n\n```python\n@deco\ndef f(x: int) -> None:  # note\n    return "s" + str(1)\n```\n\n'
    "```diff\n@@ -1 +1 @@\n-a\n+b\n```\n\n```go\ntype T struct { a int }\n```\n"
)

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => top.slice(0, 3).map((value, i) => value * top[3] + under[i] * (1 - top[3]));
  const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    if (!node) return [255, 255, 255];
    const own = rgba(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, ground(node.parentElement));
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || node.closest(".visually-hidden, noscript, [hidden], :disabled") || !node.checkVisibility()) continue;
    const under = ground(node);
    const [a, b] = [light(over(rgba(getComputedStyle(node).color), under)), light(under)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${node.className || node.tagName}: ${walker.currentNode.data.trim().slice(0, 20)}`);
  }
  return poor;
}"""

INK = """async (picture) => {
  const bytes = Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = image.width;
  canvas.drawImage(image, 0, 0);
  const lights = (x, width, top, height) => {
    const data = canvas.getImageData(x, top, width, height).data;
    return Array.from({ length: width * height }, (_, i) => data[4 * i] + data[4 * i + 1] + data[4 * i + 2]);
  };
  const ground = lights(Math.round(image.width / 2), 1, 6, 1)[0];
  const ink = (x, width) => Math.max(...lights(x, width, 6, image.height - 36).map((light) => ground - light));
  const stripe = Math.max(...lights(2, image.width - 4, 6, 1).map((light) => Math.abs(ground - light)));
  return { left: ink(3, 6), right: ink(image.width - 14, 10), near: ink(image.width - 56, 16), first: ink(16, 12), stripe };
}"""

UNNAMED = """() => [...document.querySelectorAll("button, a, input, select, textarea")]
  .filter((node) => !(node.getAttribute("aria-label") || node.innerText?.trim() || node.labels?.length || node.closest("[hidden], .task")))
  .map((node) => node.outerHTML.slice(0, 80))"""


async def sidebar_titles(visit: Visit) -> list[str]:
    """The titles in the list of chats, from top to bottom."""
    return await visit.page.locator(".chat-title").all_inner_texts()


async def test_past_chats_are_listed_by_day_and_older_ones_on_request(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [], page_size=3) as site:
        for days in (0, 1, 5, 40, 41):
            site.add_chat(f"Chat {days}", [("q", "a")], age=timedelta(days=days))
        async with visiting(browser, site.origin, "/#/new") as visit:
            await visit.page.wait_for_selector(".chat-row")
            assert await sidebar_titles(visit) == ["Chat 0", "Chat 1", "Chat 5"]
            assert await visit.page.locator(".chat-list h2").all_inner_texts() == [
                "Today",
                "Yesterday",
                "Previous 7 days",
            ]
            await visit.page.get_by_role("button", name="Load older chats").click()
            await visit.page.get_by_text("Chat 41").wait_for()
            assert await sidebar_titles(visit) == ["Chat 0", "Chat 1", "Chat 5", "Chat 40", "Chat 41"]
            assert await visit.page.get_by_role("button", name="Load older chats").count() == 0


async def test_a_chat_is_deleted_only_after_a_yes_and_an_open_one_gives_way_to_a_new_one(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site:
        site.add_chat("Keep me", [("q", "kept answer")])
        site.add_chat("Drop me", [("q", "dropped answer")], age=timedelta(minutes=1))
        async with visiting(browser, site.origin, "/#/c/s2") as visit:
            await shown(visit, "dropped answer")
            row = visit.page.locator(".chat-row", has_text="Drop me")
            await row.hover()
            await row.get_by_role("button", name="Delete “Drop me”").click()
            await visit.page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
            assert set(site.sessions) == {"s1", "s2"}
            await row.get_by_role("button", name="Delete “Drop me”").click()
            await visit.page.keyboard.press("Escape")
            assert set(site.sessions) == {"s1", "s2"}
            await row.get_by_role("button", name="Delete “Drop me”").click()
            await visit.page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
            await visit.page.wait_for_selector(".welcome")
            await row.wait_for(state="detached")
            assert set(site.sessions) == {"s1"}
            assert visit.page.url.endswith("#/new")


async def test_a_page_without_an_address_opens_the_chat_that_was_open_last(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site:
        site.add_chat("First", [("q", "first answer")])
        site.add_chat("Second", [("q", "second answer")], age=timedelta(days=1))
        async with visiting(browser, site.origin) as visit:
            await visit.page.wait_for_selector(".welcome")
            await visit.page.get_by_role("link", name="Second").click()
            await shown(visit, "second answer")
            await visit.page.goto(site.origin + "/")
            await shown(visit, "second answer")
            assert await visit.page.locator("[aria-current=page]").inner_text() == "Second"


async def test_a_long_chat_opens_at_its_end_and_shows_the_beginning_on_request(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site:
        sid = site.add_chat("Long", [(f"question {n}", f"answer {n}") for n in range(70)])
        async with visiting(browser, site.origin, f"/#/c/{sid}") as visit:
            await shown(visit, "answer 69")
            assert await visit.page.locator(".message").count() == 60
            for _ in range(2):
                await visit.page.get_by_role("button", name="Show earlier messages").click()
            assert await visit.page.locator(".message").count() == 140
            assert await visit.page.get_by_role("button", name="Show earlier messages").count() == 0
            assert await visit.page.locator(".question .bubble").first.inner_text() == "question 0"


@pytest.mark.parametrize("address", ["/#/c/none", "/#/c/%E0%A4%A"])
async def test_a_chat_that_is_gone_says_so(browser: Browser, address: str) -> None:
    async with ScriptedSite(lambda _: []) as site, visiting(browser, site.origin, address) as visit:
        await visit.page.get_by_text("This chat does not exist any more.").wait_for()


@pytest.mark.parametrize(
    ("locale", "greeting"),
    [("en-GB", "What can I help with?"), ("zh-CN", "有什么可以帮你?"), ("zh-TW", "有什么可以帮你?")],
)
async def test_the_page_speaks_the_language_of_the_browser(browser: Browser, locale: str, greeting: str) -> None:
    async with ScriptedSite(lambda _: []) as site, visiting(browser, site.origin, "/#/new", locale=locale) as visit:
        heading = await visit.page.locator(".welcome h2").inner_text()
        assert heading.replace("\uff1f", "?") == greeting
        assert await visit.page.evaluate("document.documentElement.lang") == (
            "en" if locale.startswith("en") else "zh-CN"
        )


@pytest.mark.parametrize("models", [(BUILT_IN,), (BUILT_IN, "large")])
async def test_the_built_in_model_and_the_owner_are_named_in_the_language_of_the_page(
    browser: Browser, models: tuple[str, ...]
) -> None:
    async with ScriptedSite(lambda _: [], models=models) as site:
        site.user = "owner"
        async with visiting(browser, site.origin, "/#/new", locale="zh-CN") as visit:
            await visit.page.wait_for_selector(".card")
            badge = visit.page.locator(".model-name, .model-choice option").first
            assert await badge.text_content() == "MoltBot 内置模型"
            assert await visit.page.inner_text(".welcome-sub") == "中文、英文都可以。回答者：MoltBot 内置模型。"
            assert await visit.page.inner_text(".who") == "所有者"
            await visit.page.get_by_role("button", name="Switch to English").click()
            assert await badge.text_content() == "MoltBot built-in model"
            assert "Answering: MoltBot built-in model." in await visit.page.inner_text(".welcome-sub")
            assert await visit.page.inner_text(".who") == "owner"


async def test_the_language_and_the_theme_are_remembered(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: []) as site,
        visiting(browser, site.origin, "/#/new", color_scheme="light") as visit,
    ):
        paper = "getComputedStyle(document.body).backgroundColor"
        light = await visit.page.evaluate(paper)
        await visit.page.get_by_role("button", name="切换到中文").click()
        await visit.page.get_by_role("button", name="主题").click()
        await visit.page.get_by_role("button", name="主题").click()
        dark = await visit.page.evaluate(paper)
        assert dark != light
        assert await visit.page.get_attribute("#message", "placeholder") == "给 MoltBot 发消息"
        await visit.page.reload()
        await visit.page.wait_for_selector("#message")
        assert await visit.page.evaluate(paper) == dark
        assert await visit.page.get_attribute("#message", "placeholder") == "给 MoltBot 发消息"
        await visit.page.get_by_role("button", name="主题").click()
        await visit.page.emulate_media(color_scheme="dark")
        assert await visit.page.evaluate(paper) == dark


async def test_the_switch_of_language_reaches_what_is_already_on_the_page(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Say(text="hello")]) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "hi")
        await answered(visit)
        await visit.page.get_by_role("button", name="切换到中文").click()
        assert await visit.page.locator(".answer-foot .copy").inner_text() == "复制"
        assert "首字" in await visit.page.locator(".meta").inner_text()


async def test_the_keyboard_reaches_everything(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Say(text="hello")]) as site:
        site.add_chat("Past", [("q", "past answer")])
        async with visiting(browser, site.origin, "/#/c/s1") as visit:
            await shown(visit, "past answer")
            await visit.page.evaluate("document.body.tabIndex = -1, document.body.focus()")
            await visit.page.keyboard.press("Tab")
            assert await visit.page.evaluate("document.activeElement.classList.contains('skip')") is True
            await visit.page.keyboard.press("Enter")
            assert await visit.page.evaluate("document.activeElement.id") == "message"
            await visit.page.keyboard.press("Control+k")
            await visit.page.wait_for_selector(".welcome")
            await visit.page.locator(".card").first.focus()
            outline = await visit.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid"
            await visit.page.keyboard.press("Enter")
            assert await answered(visit) == "hello"
            await visit.page.keyboard.press("Control+b")
            assert await visit.page.evaluate("document.querySelector('.sidebar').inert") is True
            await visit.page.keyboard.press("Control+b")
            assert await visit.page.evaluate("document.querySelector('.sidebar').inert") is False
            assert await visit.page.evaluate(UNNAMED) == []


async def test_screen_readers_hear_whole_paragraphs(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="One two.\n\nThree.\nFour "), Hold(gate="end"), Say(text="five.")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        await ask(visit, "hi")
        await shown(visit, "Four")
        live = visit.page.locator("[aria-live=polite] p")
        assert await live.all_text_contents() == ["MoltBot is answering", "One two."]
        site.gate("end").set()
        await answered(visit)
        assert await live.all_text_contents() == [
            "MoltBot is answering",
            "One two.",
            "Three.Four five.",
            "End of the answer",
        ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_has_enough_contrast(browser: Browser, scheme: str) -> None:
    steps: list[Step] = [
        Emit(kind="routed", data={"plugin": "p", "reason": "r"}),
        Emit(kind="notice", data={"code": "failover", "from": "a", "to": "b", "reason": "r"}),
        Emit(kind="reasoning_delta", data={"text": "Hm."}),
        Emit(kind="tool_finished", data={"call_id": "1", "tool": "t", "is_error": True, "duration_ms": 1}),
        Say(text=RICH),
        Emit(kind="failed", data={"code": "UNAVAILABLE", "message": "m", "retryable": True}),
    ]
    async with ScriptedSite(lambda _: steps) as site:
        site.add_chat("Past", [("q", "a")])
        async with visiting(browser, site.origin, "/#/new", color_scheme=scheme, reduced_motion="reduce") as visit:
            assert await visit.page.evaluate(CONTRAST) == []
            await ask(visit, "hi")
            await visit.page.wait_for_selector(".problem")
            await visit.page.click(".thoughts summary")
            assert await visit.page.evaluate(CONTRAST) == []
            await visit.page.hover(".chat-row")
            await visit.page.locator(".chat-row .small").first.click()
            assert await visit.page.evaluate(CONTRAST) == []


async def test_a_phone_scrolls_in_one_direction_only(browser: Browser) -> None:
    wide = (
        f"{RICH}\n\n{'W' * 300}\n\n```\n{'x' * 300}\n```\n\n|{'a long heading|' * 12}\n|{'-|' * 12}\n|{'cell|' * 12}\n"
    )
    async with ScriptedSite(lambda _: [Say(text=wide)]) as site:
        options = {"viewport": PHONE, "is_mobile": True, "has_touch": True}
        async with visiting(browser, site.origin, "/#/new", **options) as visit:
            await visit.page.wait_for_selector(".scroller")
            fits = "document.documentElement.scrollWidth <= innerWidth && document.querySelector('.scroller').scrollWidth <= innerWidth"
            assert await visit.page.evaluate(fits)
            await ask(visit, "W" * 200)
            await answered(visit)
            assert await visit.page.evaluate(fits)
            assert await visit.page.evaluate("innerWidth") == PHONE["width"]
            assert (
                await visit.page.evaluate("parseFloat(getComputedStyle(document.querySelector('#message')).fontSize)")
                >= 16
            )
            send = await visit.page.locator(".round.send").bounding_box()
            assert send is not None
            assert send["x"] + send["width"] <= PHONE["width"]
            assert send["y"] + send["height"] <= PHONE["height"]


@pytest.mark.parametrize("models", [("builtin",), ("builtin", "large")])
async def test_the_title_on_a_phone_has_the_width_between_the_buttons_whatever_the_model_is_called(
    browser: Browser, models: tuple[str, ...]
) -> None:
    names = tuple(f"{name} with a name that is far too long for any phone" for name in models)
    async with ScriptedSite(lambda _: [], models=names) as site:
        site.add_chat("怎么用 OpenAI 客户端连接 MoltBot", [("q", "a")])
        options = {"viewport": PHONE, "is_mobile": True, "has_touch": True, "locale": "zh-CN"}
        async with visiting(browser, site.origin, "/#/c/s1", **options) as visit:
            await visit.page.locator(".chat-name", has_text="OpenAI").wait_for()
            title = visit.page.locator(".chat-name")
            assert await title.evaluate("node => node.scrollWidth <= node.clientWidth && node.clientWidth > 250")
            boxes = [await visit.page.locator(one).bounding_box() for one in (".chat-name", ".head [class^=model-]")]
            assert boxes[0] is not None
            assert boxes[1] is not None
            assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"] + 1
            assert boxes[1]["x"] + boxes[1]["width"] < PHONE["width"] - 40


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
async def test_code_fades_into_its_box_on_the_side_where_it_goes_on(browser: Browser, viewport: dict[str, int]) -> None:
    async with ScriptedSite(lambda _: [Say(text=f"```\n{'x' * 300}\n\n\n```\n")]) as site:
        async with visiting(browser, site.origin, "/#/new", color_scheme="light", viewport=viewport) as visit:
            await ask(visit, "hi")
            await answered(visit)
            box = visit.page.locator(".code pre")
            full = (await ink(visit, box))["first"]
            for scrolled, left, right in ((0, False, True), (200, True, True), (99_999, True, False)):
                await box.evaluate("(node, to) => { node.scrollLeft = to; }", scrolled)
                seen = await ink(visit, box)
                assert (10 < seen["left"] < 0.8 * full) == left, seen
                assert (10 < seen["right"] < 0.6 * full) == right, seen
                assert seen["near"] > 0.8 * full, "the text is whole up to the fade, and its end is readable"
                assert seen["stripe"] < 10, "nothing but the text fades"


async def ink(visit: Visit, box: Locator) -> dict[str, float]:
    """How dark the text of a box is at its edges, at its first letter and near its right edge; and any stripe above it."""
    await visit.page.mouse.move(0, 0)
    picture = base64.b64encode(await box.screenshot(animations="disabled")).decode()
    seen: dict[str, float] = await visit.page.evaluate(INK, picture)
    return seen


async def test_no_dot_stands_at_either_end_of_a_line_of_facts(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Say(text="hello")]) as site:
        async with visiting(browser, site.origin, "/#/new", viewport=PHONE, is_mobile=True) as visit:
            await ask(visit, "hi")
            await answered(visit)
            facts = """() => [...document.querySelectorAll(".meta span")].map((node) => {
              const cut = parseFloat(getComputedStyle(node.parentElement).clipPath.split(" ").at(-1));
              const dot = getComputedStyle(node, "::before");
              const left = node.getBoundingClientRect().left - node.parentElement.getBoundingClientRect().left;
              return { line: node.offsetTop, dot: dot.content.includes("·"), shown: left + parseFloat(dot.width) > cut + 1, after: getComputedStyle(node, "::after").content };
            })"""
            seen = await visit.page.evaluate(facts)
            lines = [fact["line"] for fact in seen]
            assert len(set(lines)) > 1
            assert all(fact["dot"] and fact["after"] == "none" for fact in seen)
            assert [fact["shown"] for fact in seen] == [n > 0 and line == lines[n - 1] for n, line in enumerate(lines)]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
@pytest.mark.parametrize(
    ("locale", "words"),
    [
        ("en-US", ["中文", "Theme: system", "ada", "Sign out"]),
        ("zh-CN", ["English", "主题：跟随系统", "ada", "退出登录"]),
    ],
)
async def test_every_control_below_the_list_says_in_words_what_it_does(
    browser: Browser, viewport: dict[str, int], locale: str, words: list[str]
) -> None:
    async with ScriptedSite(lambda _: []) as site:
        async with visiting(browser, site.origin, "/#/new", viewport=viewport, locale=locale) as visit:
            await visit.page.wait_for_selector(".card")
            if viewport == PHONE:
                await visit.page.click(".opener")
            await visit.page.locator(".who").wait_for()
            controls = visit.page.locator(".sidebar-foot > *")
            assert [text.strip() for text in await controls.all_inner_texts()] == words
            assert await controls.evaluate_all("nodes => nodes.every((node) => node.scrollWidth <= node.clientWidth)")


async def test_a_server_that_goes_away_is_told_before_the_next_message(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site, visiting(browser, site.origin, "/#/new") as visit:
        await visit.page.wait_for_selector(".card")
        banner = visit.page.locator(".away")
        for away in ("down", "core_away"):
            setattr(site, away, True)
            await visit.page.evaluate("dispatchEvent(new Event('focus'))")
            await banner.get_by_text("MoltBot cannot be reached.").wait_for()
            assert await visit.page.evaluate(CONTRAST) == []
            setattr(site, away, False)
            await banner.get_by_text("MoltBot cannot be reached.").wait_for(state="detached")
        assert await visit.page.locator(".welcome").is_visible()


async def test_a_chat_whose_answer_ends_while_the_server_leaves_is_not_shown_as_being_answered_for_ever(
    browser: Browser,
) -> None:
    steps: list[Step] = [Say(text="one"), Hold(gate="end")]
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "a")
        dot = visit.page.locator(".chat-row .pulse")
        await dot.wait_for()
        await visit.page.route("**/api/sessions**", lambda route: route.fulfill(status=500))
        async with visit.page.expect_response("**/api/sessions**"):
            site.gate("end").set()
        await answered(visit)
        assert await dot.is_visible()
        await visit.page.unroute("**/api/sessions**")
        await dot.wait_for(state="detached")


async def test_the_drawer_of_a_phone_opens_closes_and_leads_to_a_chat(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site:
        site.add_chat("Past", [("q", "past answer")])
        async with visiting(browser, site.origin, "/#/new", viewport=PHONE, is_mobile=True, has_touch=True) as visit:
            assert not await visit.page.locator(".sidebar").is_visible()
            await visit.page.get_by_role("button", name="Show the list of chats").click()
            assert await visit.page.evaluate("document.querySelector('.main').inert") is True
            await visit.page.keyboard.press("Escape")
            await visit.page.locator(".sidebar").wait_for(state="hidden")
            await visit.page.get_by_role("button", name="Show the list of chats").click()
            await visit.page.get_by_role("link", name="Past").click()
            await shown(visit, "past answer")
            await visit.page.locator(".sidebar").wait_for(state="hidden")


async def test_a_choice_of_models_is_offered_and_sent(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Say(text="ok")], models=("builtin", "large")) as site:
        async with visiting(browser, site.origin, "/#/new") as visit:
            await visit.page.get_by_label("Model").select_option("large")
            await ask(visit, "hi")
            await answered(visit)
            assert site.started()[0]["model"] == "large"


async def test_nothing_moves_for_those_who_asked_for_it(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Hold(gate="never")]) as site:
        async with visiting(browser, site.origin, "/#/new", reduced_motion="reduce") as visit:
            await ask(visit, "hi")
            await visit.page.wait_for_selector(".dots")
            assert (
                await visit.page.evaluate("getComputedStyle(document.querySelector('.dots i')).animationIterationCount")
                == "1"
            )


SOURCES = sorted(path for path in STATIC.rglob("*") if path.is_file())


async def test_the_page_is_small_plain_and_builds_nodes_only_by_hand() -> None:
    assert sum(path.stat().st_size for path in SOURCES) < 146 * 1024
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|DOMParser|document\.write|createContextualFragment|setHTML|\beval\(|new Function|\.cssText|style=|<style|"
        r"setAttribute\(.style|createElement\(.script"
    )
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 500, path.name
        assert not forbidden.search(text), path.name
        addresses = set(re.findall(r"https?://[\w.-]+", text))
        assert addresses <= {"http://www.w3.org"}, path.name


async def test_every_sentence_exists_in_both_languages_and_is_used() -> None:
    source = (STATIC / "i18n.js").read_text(encoding="utf-8")
    sentences = {
        key: (english, chinese)
        for key, english, chinese in re.findall(r'^  "([\w.]+)": \["(.*)", "(.*)"\],$', source, re.M)
    }
    assert len(sentences) == len(re.findall(r'^  "', source, re.M)) > 90
    for key, (english, chinese) in sentences.items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), key
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in SOURCES if path.suffix == ".js" and path.name != "i18n.js"
    )
    code += source.split("const LANGUAGES")[1]
    built = re.compile(r"theme\.(system|light|dark)|try\.\d\.(title|text)")
    assert [key for key in sentences if f'"{key}"' not in code and not built.fullmatch(key)] == []
    used = set(re.findall(r'(?:\bt|say|label)\([^"\n]*?"([a-z]+(?:\.[\w.]+)?)"', code))
    assert {key for key in used if "." in key} <= sentences.keys()
