# ruff: noqa: E501, RUF001, SIM117 (scripts for the browser, hostile texts and Chinese are written as they are)
"""Asking and answering in the page: streaming, stopping, and every way in which a connection can break."""

from __future__ import annotations

import pytest
from browser import PHONE, Visit, answered, ask, shown, visiting
from playwright.async_api import Browser
from scripted_site import Cut, Emit, Hold, Say, ScriptedSite, Step, error

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = "\n\n".join(f"Paragraph {n}: 你好，世界 🎉 and some words to read." for n in range(40))


async def questions(visit: Visit) -> list[str]:
    """Every message of the person that the page shows."""
    return await visit.page.locator(".question .bubble").all_inner_texts()


async def test_an_answer_is_readable_while_it_is_still_being_written(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="Hello **wor"), Hold(gate="rest"), Say(text="ld** of streams")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        await ask(visit, "hi")
        await shown(visit, "wor")
        assert await visit.page.locator(".answer").last.get_attribute("aria-busy") == "true"
        site.gate("rest").set()
        assert await answered(visit) == "Hello world of streams"
        assert await visit.page.locator(".answer-foot .meta").inner_text() == (
            "Model builtin\n·\nfirst word 18 ms\n·\ntotal 861 ms\n·\n24 tokens in, 6 out".replace("\n·\n", "\n")
        )
        assert "/#/c/" in visit.page.url
        assert await visit.page.evaluate("document.activeElement.id") == "message"
        assert visit.problems == []


ENDS = {
    "empty": ("The model gave no answer. Ask in other words.", "模型没有给出回答，请换个说法再问。"),
    "length": ("Length limit reached. Ask for less at once.", "回答达到了长度上限，请一次少问一些。"),
}


@pytest.mark.parametrize("end", ENDS)
async def test_an_empty_or_a_cut_answer_says_so_in_one_line_with_a_next_step(browser: Browser, end: str) -> None:
    cut = Emit(kind="completed", data={"text": "Some wor", "finish_reason": "length", "model": "builtin"})
    steps: list[Step] = [Say(text="Some wor"), cut] if end == "length" else []
    english, chinese = ENDS[end]
    async with ScriptedSite(lambda _: steps) as site:
        for locale, words in (("en-US", english), ("zh-CN", chinese)):
            async with visiting(browser, site.origin, "/#/new", locale=locale, viewport=PHONE) as visit:
                await ask(visit, "hi")
                await answered(visit)
                told = visit.page.locator(".chip.ending")
                assert await told.inner_text() == words
                box = await told.bounding_box()
                assert box is not None
                assert box["height"] < 34, "one line"
                assert "18" not in await visit.page.locator(".meta").inner_text(), "a time of no word"


async def test_an_empty_answer_of_a_past_chat_says_so_too(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site:
        site.add_chat("Past", [("q", ""), ("q", "words")])
        async with visiting(browser, site.origin, "/#/c/s1") as visit:
            await shown(visit, "words")
            assert await visit.page.locator(".chip.ending").all_inner_texts() == [ENDS["empty"][0]]


async def test_an_answer_of_a_past_chat_that_was_cut_or_stopped_says_so_as_it_did_then(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site:
        site.add_chat("Past", [("q", "Some wor"), ("q", "Half of it"), ("q", "Whole.")])
        for number, reason in ((1, "length"), (3, "cancelled"), (5, "stop")):
            site.sessions["s1"].messages[number]["finish_reason"] = reason
        async with visiting(browser, site.origin, "/#/c/s1") as visit:
            await shown(visit, "Whole.")
            ends = [
                await answer.locator(".chip.ending").all_inner_texts()
                for answer in await visit.page.locator(".answer").all()
            ]
            assert ends == [[ENDS["length"][0]], ["Stopped"], []]


@pytest.mark.parametrize("way", ["Escape", "button"])
async def test_stopping_keeps_what_was_written_and_says_so(browser: Browser, way: str) -> None:
    async with ScriptedSite(lambda _: [Say(text="Half of it"), Hold(gate="never"), Say(text=" and more")]) as site:
        async with visiting(browser, site.origin, "/#/new") as visit:
            await ask(visit, "hi")
            await shown(visit, "Half of it")
            if way == "Escape":
                await visit.page.keyboard.press("Escape")
            else:
                await visit.page.click(".round.stop")
            assert await answered(visit) == "Half of it"
            assert await visit.page.locator(".chip.ending").inner_text() == "Stopped"
            assert [path.rsplit("/", 1)[1] for method, path, _ in site.calls if path.endswith("cancel")] == ["cancel"]
            await ask(visit, "again")
            await shown(visit, "Half of it")
            assert await questions(visit) == ["hi", "again"]


async def test_a_message_that_was_never_accepted_can_be_stopped_too(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Say(text="late")]) as site, visiting(browser, site.origin, "/#/new") as visit:
        site.slow_accept = True
        await ask(visit, "hi")
        await visit.page.wait_for_selector(".dots")
        await visit.page.keyboard.press("Escape")
        await visit.page.wait_for_selector(".chip.ending")
        assert await visit.page.locator(".chip.ending").inner_text() == "Stopped"
        assert await visit.page.locator(".round.send").is_visible()
        site.gate("accept").set()


async def test_a_reload_in_the_middle_goes_on_with_the_same_answer(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Say(text=LONG[:600]), Hold(gate="rest"), Say(text=LONG[600:])]) as site:
        async with visiting(browser, site.origin, "/#/new") as visit:
            await ask(visit, "long")
            await shown(visit, "Paragraph 8")
            await visit.page.reload()
            await shown(visit, "Paragraph 8")
            site.gate("rest").set()
            assert await answered(visit) == LONG
            assert await questions(visit) == ["long"]
            assert len(site.started()) == 1


async def test_a_reload_before_the_turn_is_accepted_sends_the_same_request_again(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="Only once")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        site.slow_accept = True
        await ask(visit, "hi")
        await visit.page.wait_for_selector(".dots")
        await visit.page.reload()
        await visit.page.wait_for_selector(".dots")
        site.gate("accept").set()
        assert await answered(visit) == "Only once"
        ids = [body["request_id"] for body in site.started()]
        assert len(ids) == 2
        assert len(set(ids)) == 1
        assert len(site.by_request) == 1
        assert await questions(visit) == ["hi"]
        await visit.page.reload()
        assert await answered(visit) == "Only once"
        assert len(site.started()) == 2


@pytest.mark.parametrize("overlap", [0, 3])
async def test_a_connection_that_breaks_again_and_again_leaves_no_gap_and_no_repeat(
    browser: Browser, overlap: int
) -> None:
    steps: list[Step] = []
    for start in range(0, len(LONG), 400):
        steps += [Say(text=LONG[start : start + 400], chunk=7, pace=0.002), Cut()]
    steps.append(Hold(gate="end"))
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        site.overlap = overlap
        await ask(visit, "go")
        last = visit.page.get_by_text("Paragraph 39: 你好，世界 🎉 and some words to read.")
        await last.and_(visit.page.locator(".prose p")).wait_for(timeout=40_000)
        assert await visit.page.locator(".prose").inner_text() == LONG  # before the whole text comes once more
        site.gate("end").set()
        assert await answered(visit) == LONG
        resumed = [path for _, path, _ in site.calls if "/events?after=" in path]
        assert resumed
        assert all(int(path.rsplit("=", 1)[1]) > 0 for path in resumed)
        assert len(site.started()) == 1
        assert await visit.page.locator(".status").last.is_hidden()


async def test_frames_and_characters_cut_anywhere_arrive_whole(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text=LONG, chunk=3)]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        site.shred = 5
        await ask(visit, "你好 🎉")
        assert await answered(visit) == LONG
        assert await questions(visit) == ["你好 🎉"]
        assert site.started()[0]["text"] == "你好 🎉"


async def test_a_reset_replaces_what_is_shown_and_unknown_kinds_are_skipped(browser: Browser) -> None:
    steps: list[Step] = [
        Say(text="Wrong start"),
        Emit(kind="sparkle", data={"colour": "green"}),
        Hold(gate="seen"),
        Emit(kind="reset", data={"text": "Right ", "reason": "failover"}),
        Emit(kind="notice", data={"code": "failover", "from": "opus", "to": "builtin", "reason": "latency"}),
        Say(text="answer"),
    ]
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "hi")
        await shown(visit, "Wrong start")
        site.gate("seen").set()
        assert await answered(visit) == "Right answer"
        assert await visit.page.locator(".notice").all_inner_texts() == [
            "The answer was started again",
            "Switched from opus to builtin: latency",
        ]
        assert visit.problems == []


async def test_waiting_routing_and_tools_are_visible(browser: Browser) -> None:
    steps: list[Step] = [
        Emit(kind="queued", data={"position": 3}),
        Hold(gate="queue"),
        Emit(kind="routed", data={"plugin": "weather", "reason": "pattern"}),
        Emit(kind="tool_started", data={"call_id": "c1", "tool": "forecast", "arguments": "{}"}),
        Hold(gate="tool"),
        Emit(kind="tool_finished", data={"call_id": "c1", "tool": "forecast", "is_error": False, "duration_ms": 41.2}),
        Say(text="Sunny"),
    ]
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "weather")
        await visit.page.get_by_text("Waiting in line, position 3").wait_for()
        site.gate("queue").set()
        await visit.page.get_by_text("Running forecast").wait_for()
        site.gate("tool").set()
        assert await answered(visit) == "Sunny"
        assert await visit.page.locator(".chips .chip").all_inner_texts() == ["Plugin weather", "forecast · 41 ms"]


async def test_a_line_that_breaks_before_the_first_event_is_tried_again_with_the_same_request(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="There you are")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        site.refusals = [None, None]
        await ask(visit, "hi")
        assert await answered(visit) == "There you are"
        assert len(site.started()) == 3
        assert len({body["request_id"] for body in site.started()}) == 1


async def test_a_server_that_refuses_gets_the_same_request_again_when_the_person_asks(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="Now it works")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        site.refusals = [error(503, "The core is not there.", "unavailable") for _ in range(3)]
        await ask(visit, "hi")
        problem = visit.page.locator(".problem")
        await problem.wait_for()
        assert "The model did not answer." in await problem.inner_text()
        await problem.get_by_role("button", name="Try again").click()
        assert await answered(visit) == "Now it works"
        assert await problem.count() == 0
        assert len({body["request_id"] for body in site.started()}) == 1
        assert await questions(visit) == ["hi"]


async def test_a_refused_message_comes_back_for_editing(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site, visiting(browser, site.origin, "/#/new") as visit:
        site.refusals = [error(413, "At most 32768 characters.", "too_large")]
        await ask(visit, "a very long text")
        problem = visit.page.locator(".problem")
        await problem.wait_for()
        assert "The message is too long." in await problem.inner_text()
        assert await problem.get_by_role("button").count() == 0
        assert await visit.page.input_value("#message") == "a very long text"
        site.refusals = [error(403, "Not sent by this server's own page.", "foreign_origin")]
        await visit.page.keyboard.press("Enter")
        await visit.page.get_by_text("MoltBot refused this; the details say why.").wait_for()
        await visit.page.get_by_text("Details: Not sent by this server's own page.").wait_for()


REASONS = {
    "CONTEXT_LENGTH_EXCEEDED": ("INVALID_ARGUMENT", "too long for the model", "超出了模型能读的长度"),
    "CONTENT_TOO_LARGE": ("INVALID_ARGUMENT", "The message is too long.", "消息太长了"),
    "EMPTY_MESSAGE": ("INVALID_ARGUMENT", "The message is empty.", "消息是空的"),
    "QUEUE_FULL": ("RESOURCE_EXHAUSTED", "MoltBot is busy right now.", "现在很忙"),
    "STORAGE_FULL": ("RESOURCE_EXHAUSTED", "disk is full", "磁盘已满"),
    "MODEL_UNAVAILABLE": ("UNAVAILABLE", "The model cannot answer right now.", "模型暂时无法回答"),
    "NOT_SERVING": ("UNAVAILABLE", "starting or stopping", "正在启动或停止"),
    "DEADLINE_EXCEEDED": ("DEADLINE_EXCEEDED", "The answer took too long.", "回答用时过长"),
    "UNAUTHENTICATED": ("UNAUTHENTICATED", "did not accept the access key", "不接受访问密钥"),
}


def failing(reason: str) -> Emit:
    """The end of a turn that failed for a reason."""
    data = {"code": REASONS[reason][0], "reason": reason, "message": "m", "retryable": False, "retry_after_ms": None}
    return Emit(kind="failed", data={**data, "timings": {}})


async def test_each_important_reason_has_words_of_its_own_in_both_languages(browser: Browser) -> None:
    async with ScriptedSite(lambda text: [failing(text)]) as site, visiting(browser, site.origin, "/#/new") as visit:
        for n, (reason, (_, english, chinese)) in enumerate(REASONS.items(), 1):
            await ask(visit, reason)
            problem = visit.page.locator(".problem")
            await problem.nth(n - 1).wait_for()
            assert english in await problem.last.inner_text(), reason
            await visit.page.get_by_role("button", name="切换到中文").click()
            assert chinese in await problem.last.inner_text(), reason
            await visit.page.get_by_role("button", name="Switch to English").click()


async def test_a_text_that_the_model_cannot_take_comes_back_and_never_over_another_draft(browser: Browser) -> None:
    steps: list[Step] = [Hold(gate="typed"), failing("CONTEXT_LENGTH_EXCEEDED")]
    async with ScriptedSite(lambda _: steps) as site, visiting(browser, site.origin, "/#/new") as visit:
        site.gate("typed").set()
        await ask(visit, "far too long")
        await visit.page.locator(".problem").wait_for()
        assert await visit.page.input_value("#message") == "far too long"
        assert await visit.page.locator(".problem button").count() == 0
        site.gate("typed").clear()
        await visit.page.keyboard.press("Enter")
        await visit.page.locator(".answer[aria-busy]").wait_for()
        await visit.page.fill("#message", "another thought")
        site.gate("typed").set()
        edit = visit.page.get_by_role("button", name="Edit the message")
        await edit.wait_for()
        assert await visit.page.input_value("#message") == "another thought"
        await edit.click()
        await edit.click()
        assert await visit.page.input_value("#message") == "far too long\n\nanother thought"
        assert await visit.page.evaluate("document.activeElement.id") == "message"


async def test_a_refused_text_of_a_past_chat_waits_for_its_button(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [failing("CONTENT_TOO_LARGE")]) as site:
        async with visiting(browser, site.origin, "/#/new") as visit:
            await ask(visit, "far too long")
            await visit.page.locator(".problem").wait_for()
            await visit.page.fill("#message", "")
            await visit.page.reload()
            edit = visit.page.get_by_role("button", name="Edit the message")
            await edit.wait_for()
            assert await visit.page.input_value("#message") == ""
            await edit.click()
            assert await visit.page.input_value("#message") == "far too long"


async def test_a_busy_server_says_when_to_come_back(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site, visiting(browser, site.origin, "/#/new") as visit:
        site.refusals = [error(429, "Too many turns.", "busy", {"Retry-After": "7"}) for _ in range(3)]
        await ask(visit, "hi")
        await visit.page.get_by_text("MoltBot is busy right now. Try again in 7.0 s.").wait_for()


async def test_a_turn_that_failed_is_asked_again_as_a_new_turn(browser: Browser) -> None:
    failed = Emit(
        kind="failed",
        data={
            "code": "UNAVAILABLE",
            "reason": "ENGINE_LOST",
            "message": "gone",
            "retryable": True,
            "retry_after_ms": None,
            "timings": {},
        },
    )
    answers: list[list[Step]] = [[Say(text="Beginning"), failed], [Say(text="Complete")]]
    async with ScriptedSite(lambda _: answers.pop(0)) as site, visiting(browser, site.origin, "/#/new") as visit:
        await ask(visit, "hi")
        problem = visit.page.locator(".problem")
        await problem.wait_for()
        assert "The answer broke off" in await problem.inner_text()
        await problem.get_by_role("button", name="Try again").click()
        await shown(visit, "Complete")
        assert len({body["request_id"] for body in site.started()}) == 2


async def test_a_server_that_stays_away_leaves_a_button_that_picks_the_answer_up(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="First half, "), Hold(gate="away"), Cut(), Say(text="second half")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        await visit.page.clock.install()
        await ask(visit, "hi")
        await shown(visit, "First half")
        site.down = True
        site.gate("away").set()
        for _ in range(30):
            await visit.page.clock.run_for(9_000)
            if await visit.page.locator(".problem").count():
                break
        problem = visit.page.locator(".problem")
        assert "pick the answer up" in await problem.inner_text()
        site.down = False
        await problem.get_by_role("button", name="Continue").click()
        await visit.page.clock.resume()
        await shown(visit, "First half, second half")
        assert len(site.started()) == 1


async def test_a_chat_that_is_left_goes_on_and_is_joined_again(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Say(text="Part one. "), Hold(gate="on"), Say(text="Part two.")]) as site:
        site.add_chat("Old chat", [("old question", "old answer")])
        async with visiting(browser, site.origin, "/#/new") as visit:
            await ask(visit, "tell me")
            await shown(visit, "Part one.")
            await visit.page.click(".chat-row[data-session='s1'] a")
            await shown(visit, "old answer")
            assert await visit.page.locator(".round.send").is_visible()
            await visit.page.get_by_role("link", name="tell me").click()
            await shown(visit, "Part one.")
            site.gate("on").set()
            assert await answered(visit) == "Part one. Part two."
            await visit.page.go_back()
            await shown(visit, "old answer")


async def test_a_sign_in_that_ends_in_the_middle_asks_for_the_key_and_goes_on(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Say(text="Welcome back")], key="secret") as site:
        async with visiting(browser, site.origin, "/#/new") as visit:
            await visit.page.fill("#key", "secret")
            await visit.page.keyboard.press("Enter")
            await visit.page.wait_for_selector("#message")
            await visit.page.context.clear_cookies()
            await ask(visit, "are you there?")
            await visit.page.get_by_text("Your sign-in has ended.").wait_for()
            await visit.page.fill("#key", "secret")
            await visit.page.keyboard.press("Enter")
            await shown(visit, "Welcome back")
            assert await questions(visit) == ["are you there?"]


async def test_reading_further_up_is_left_in_peace_until_the_reader_jumps_back(browser: Browser) -> None:
    async with ScriptedSite(
        lambda _: [Say(text=LONG), Hold(gate="more"), Say(text="\n\n" + LONG), Hold(gate="end")]
    ) as site:
        async with visiting(browser, site.origin, "/#/new") as visit:
            await ask(visit, "long")
            await shown(visit, "Paragraph 39")
            at_end = "() => { const s = document.querySelector('.scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight < 3; }"
            await visit.page.wait_for_function(at_end)
            await visit.page.hover(".scroller")
            await visit.page.mouse.wheel(0, -600)
            await visit.page.locator(".jump").wait_for()
            top = await visit.page.evaluate("document.querySelector('.scroller').scrollTop")
            site.gate("more").set()
            await visit.page.locator(".prose p").nth(79).wait_for()
            assert await visit.page.evaluate("document.querySelector('.scroller').scrollTop") == top
            await visit.page.get_by_role("button", name="Jump to latest").click()
            await visit.page.wait_for_function(at_end)
            assert await visit.page.locator(".jump").is_hidden()
            site.gate("end").set()


async def test_enter_sends_and_shift_enter_breaks_the_line_and_a_composing_enter_does_neither(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [Say(text="ok")]) as site, visiting(browser, site.origin, "/#/new") as visit:
        cdp = await visit.page.context.new_cdp_session(visit.page)
        await visit.page.focus("#message")
        await cdp.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
        await visit.page.keyboard.press("Enter")
        await visit.page.dispatch_event("#message", "keydown", {"key": "Enter", "keyCode": 229, "isComposing": True})
        assert site.started() == []
        await visit.page.fill("#message", "")
        await visit.page.keyboard.type("一")
        await visit.page.keyboard.press("Shift+Enter")
        await visit.page.keyboard.type("二")
        assert site.started() == []
        await visit.page.keyboard.press("Enter")
        await answered(visit)
        assert [body["text"] for body in site.started()] == ["一\n二"]
        await visit.page.keyboard.press("Enter")
        assert len(site.started()) == 1


async def test_the_next_message_can_be_typed_but_not_sent_while_an_answer_is_written(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [Say(text="busy"), Hold(gate="end")]) as site,
        visiting(browser, site.origin, "/#/new") as visit,
    ):
        await ask(visit, "one")
        await shown(visit, "busy")
        await ask(visit, "two")
        assert await visit.page.input_value("#message") == "two"
        site.gate("end").set()
        await answered(visit)
        await visit.page.keyboard.press("Enter")
        await visit.page.locator(".question").nth(1).wait_for()
        assert [body["text"] for body in site.started()] == ["one", "two"]
        assert site.started()[1]["session"] == next(iter(site.sessions))


async def test_a_draft_survives_a_reload(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site, visiting(browser, site.origin, "/#/new") as visit:
        await visit.page.fill("#message", "not yet sent")
        await visit.page.reload()
        await visit.page.wait_for_selector("#message")
        assert await visit.page.input_value("#message") == "not yet sent"


async def test_a_page_that_opens_while_the_server_is_away_finds_it_by_itself(browser: Browser) -> None:
    async with ScriptedSite(lambda _: []) as site, visiting(browser, site.origin, "/#/new") as visit:
        await visit.page.route("**/api/me", lambda route: route.abort())
        await visit.page.reload()
        await visit.page.get_by_text("MoltBot cannot be reached.").wait_for()
        await visit.page.unroute("**/api/me")
        await visit.page.wait_for_selector("#message")
