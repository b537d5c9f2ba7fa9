# ruff: noqa: E501 (hostile texts and scripts for the browser are written as they are)
"""The chat page against the real `moltbot start`: core, adapter and browser as a person has them, with a scripted model."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from cli_process import Home, Started
from playwright.async_api import Browser
from web.browser import PHONE, Visit, answered, ask, chromium, find_chromium, shown, visiting
from web.payloads import PAYLOADS

WORDS = " ".join(f"word{n}" for n in range(150))
SCRIPT = f"""
rules:
  - match: "^slow"
    template: "{WORDS}"
    pace: 0.02
  - match: "^endless"
    template: "{WORDS * 20}"
    pace: 0.02
  - match: "^markdown"
    template: "# Title\\n\\n- a\\n- **b**\\n\\n```python\\nprint('你好 🎉')\\n```\\n"
"""
WATCH = "window.__violations = []; addEventListener('securitypolicyviolation', (event) => window.__violations.push(event.violatedDirective));"


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[Started]:
    """A MoltBot that is ready, with a scripted model."""
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    script = tmp_path / "script.yaml"
    script.write_text(SCRIPT, encoding="utf-8")
    home = Home(tmp_path, {"MODEL_TYPE": "scripted", "MODEL_PATH": str(script)})
    async with home.started() as running:
        yield running


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A headless Chromium."""
    async with chromium() as started_browser:
        yield started_browser


@pytest.fixture
async def visit(started: Started, browser: Browser) -> AsyncIterator[Visit]:
    """The page, opened by the link that `start` printed."""
    link = urlsplit(next(link for link in re.findall(r"http://\S+", started.said) if "/login?code=" in link))
    async with visiting(browser, f"{link.scheme}://{link.netloc}", f"{link.path}?{link.query}") as opened:
        await opened.page.wait_for_selector("#message")
        yield opened


async def test_the_printed_link_leads_to_a_page_that_answers(visit: Visit) -> None:
    assert await visit.page.locator(".welcome").is_visible()
    await ask(visit, "markdown please")
    assert (await answered(visit)).split() == ["Title", "a", "b", "python", "Copy", "print('你好", "🎉')"]
    assert await visit.page.locator(".answer-foot .meta").inner_text() != ""
    await visit.page.locator(".chat-row", has_text="markdown please").wait_for()
    await visit.page.reload()
    await shown(visit, "Title")
    assert visit.problems == []
    assert visit.strangers == []


async def test_a_used_link_shows_the_sign_in_page_and_the_key_opens_it(
    visit: Visit, started: Started, browser: Browser
) -> None:
    used = next(link for link in re.findall(r"http://\S+", started.said) if "/login?code=" in link)
    async with visiting(browser, visit.origin, used.removeprefix(visit.origin)) as second:
        await second.page.get_by_text("This link was already used or has expired.").wait_for()
        await second.page.fill("#key", "not the key")
        await second.page.keyboard.press("Enter")
        await second.page.get_by_text("This key is not known here.").wait_for()
        await second.page.fill("#key", started.home.workspace.joinpath("key").read_text().strip())
        await second.page.keyboard.press("Enter")
        await second.page.wait_for_selector("#message")


async def test_an_address_that_leads_nowhere_is_a_page_with_a_way_back(visit: Visit, browser: Browser) -> None:
    answer = await visit.page.goto(f"{visit.origin}/nothing")
    assert answer is not None
    assert answer.status == 404
    mark = visit.page.locator("img.mark")
    assert await mark.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    await visit.page.get_by_role("link", name="Open the chat").click()
    await visit.page.wait_for_selector("#message")
    assert (visit.problems, visit.strangers) == ([], [])
    async with visiting(browser, visit.origin, "/nothing", locale="zh-CN", viewport=PHONE) as chinese:
        await chinese.page.get_by_role("link", name="打开对话").wait_for()
        assert await chinese.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert (chinese.problems, chinese.strangers) == ([], [])


async def test_a_reload_in_the_middle_of_an_answer_loses_and_repeats_nothing(visit: Visit) -> None:
    await ask(visit, "slow please")
    await shown(visit, "word20")
    await visit.page.reload()
    await shown(visit, "word20")
    assert await answered(visit) == WORDS
    assert await visit.page.locator(".question").count() == 1
    await visit.page.reload()
    await shown(visit, "word149")
    assert await visit.page.locator(".answer").count() == 1


async def test_stop_ends_the_turn_and_keeps_what_was_written(visit: Visit) -> None:
    await ask(visit, "endless please")
    await shown(visit, "word10")
    await visit.page.keyboard.press("Escape")
    text = await answered(visit)
    assert text.startswith("word0 word1")
    assert await visit.page.locator(".chip.ending").inner_text() == "Stopped"
    await ask(visit, "hello")
    await shown(visit, "You said: hello")


async def test_a_model_that_fails_is_said_plainly_with_a_way_on(visit: Visit) -> None:
    await ask(visit, "#8 fail=3")
    problem = visit.page.locator(".problem")
    await problem.wait_for()
    assert "The answer broke off" in await problem.inner_text()
    assert await problem.get_by_role("button", name="Try again").is_visible()


async def test_hostile_output_of_a_real_turn_runs_and_loads_nothing(visit: Visit) -> None:
    await visit.page.evaluate(WATCH)
    for start in range(0, len(PAYLOADS), 60):
        await visit.page.fill("#message", "\n\n".join(PAYLOADS[start : start + 60]) + f"\n\nEND{start}")
        await visit.page.keyboard.press("Enter")
        await visit.page.locator(".answer:last-child:not([aria-busy])", has_text=f"END{start}").wait_for()
    assert await visit.page.evaluate("[window.__pwned ?? null, window.__violations]") == [None, []]
    assert (
        await visit.page.locator(
            ".thread :is(img, script, iframe, object, embed, form, video, audio, link, style)"
        ).count()
        == 0
    )
    assert (visit.strangers, visit.problems) == ([], [])


@pytest.mark.parametrize("name", ["core", "engine", "http"])
async def test_a_page_goes_on_by_itself_when_a_process_dies_in_the_middle(
    visit: Visit, started: Started, name: str
) -> None:
    await ask(visit, "slow please")
    await shown(visit, "word10")
    psutil.Process(started.told()["processes"][name]).kill()
    assert await answered(visit) == WORDS
    assert await visit.page.locator(".problem").count() == 0
    assert await visit.page.get_by_text("The answer was started again").count() == 0
    await visit.page.reload()
    await shown(visit, "word149")
    assert await visit.page.locator(".question").count() == 1
    assert await visit.page.locator(".answer").count() == 1


async def test_an_answer_with_which_every_engine_dies_leaves_a_page_that_can_go_on(
    visit: Visit, started: Started
) -> None:
    await ask(visit, "endless please")
    for word in ("word10", "word40", "word70"):
        await shown(visit, word)
        psutil.Process(started.told()["processes"]["engine"]).kill()
    await visit.page.wait_for_selector(".answer:last-child:not([aria-busy])", state="attached", timeout=60_000)
    assert "The answer broke off" in await visit.page.locator(".problem").inner_text()
    await visit.page.get_by_role("button", name="Try again").click()
    await shown(visit, "word10")
    await visit.page.keyboard.press("Escape")
    await visit.page.locator(".chip.ending").wait_for()
    await visit.page.reload()
    await shown(visit, "word10")
    assert await visit.page.locator(".question").count() == 1
    assert visit.problems == []


async def test_a_chat_is_deleted_for_good(visit: Visit) -> None:
    await ask(visit, "first chat")
    await answered(visit)
    row = visit.page.locator(".chat-row", has_text="first chat")
    await row.hover()
    await row.get_by_role("button").click()
    await visit.page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    await row.wait_for(state="detached")
    await visit.page.reload()
    await visit.page.get_by_text("Chats held on this page will appear here.").wait_for()
