# ruff: noqa: RUF001 (Chinese is written as it is)
"""Signing in on the page: by key or link, and what is said of a refusal."""

from __future__ import annotations

import pytest
from aiohttp import web
from browser import visiting
from playwright.async_api import Browser
from scripted_site import ScriptedSite, error
from test_page_shell import CONTRAST

pytestmark = pytest.mark.asyncio(loop_scope="module")

NO_PROXY = "The request was not sent by this server's own page."


async def test_signing_in_with_a_key_and_the_words_for_a_used_link(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [], key="secret") as site,
        visiting(browser, site.origin, "/login?code=used") as visit,
    ):
        await visit.page.get_by_text("This link was already used or has expired.").wait_for()
        for told in ("“moltbot link”", "“.venv/bin/moltbot link”", "~/.moltbot/key"):
            assert told in await visit.page.inner_text(".signin-also")
            assert told in (await visit.page.inner_text(".signin-card")).split("最简单")[0]
        await visit.page.fill("#key", "wrong")
        await visit.page.get_by_role("button", name="Sign in").click()
        told = await visit.page.get_by_text("This key is not known here.").inner_text()
        assert "file “key” of the workspace" in told
        assert "“moltbot link”" in told
        await visit.page.get_by_role("button", name="切换到中文").click()
        await visit.page.get_by_text("登录 MoltBot").wait_for()
        await visit.page.fill("#key", "wrong")
        await visit.page.keyboard.press("Enter")
        told = await visit.page.get_by_text("这里不认识这个密钥。").inner_text()
        assert "工作区的 key 文件" in told
        assert "“moltbot link”" in told
        assert await visit.page.evaluate(CONTRAST) == []
        await visit.page.fill("#key", "secret")
        await visit.page.keyboard.press("Enter")
        await visit.page.wait_for_selector("#message")
        assert "error" not in visit.page.url
        await visit.page.get_by_role("button", name="退出登录").click()
        await visit.page.wait_for_selector("#key")


async def test_a_refusal_that_is_not_about_the_key_gives_its_reason_and_leaves_the_key_alone(browser: Browser) -> None:
    async with (
        ScriptedSite(lambda _: [], key="secret") as site,
        visiting(browser, site.origin, "/login?code=used") as visit,
    ):
        problem = visit.page.locator(".signin-problem")
        for refusal in (
            error(403, NO_PROXY, "foreign_origin"),
            error(429, NO_PROXY, "rate_limit_exceeded"),
            error(500, NO_PROXY, "internal_error"),
        ):
            site.login_refusals = [refusal]
            await visit.page.fill("#key", "secret")
            await visit.page.keyboard.press("Enter")
            await problem.get_by_text(f"MoltBot refused this; the details say why. Details: {NO_PROXY}").wait_for()
            assert "key" not in await problem.inner_text()
            await visit.page.reload()
        site.login_refusals = [error(403, NO_PROXY, "foreign_origin")]
        await visit.page.get_by_role("button", name="切换到中文").click()
        await visit.page.fill("#key", "secret")
        await visit.page.keyboard.press("Enter")
        await problem.get_by_text(f"MoltBot 拒绝了这个请求，原因见详情。 详情：{NO_PROXY}").wait_for()
        assert await visit.page.evaluate(CONTRAST) == []
        await visit.page.fill("#key", "secret")
        await visit.page.keyboard.press("Enter")
        await visit.page.wait_for_selector("#message")


async def test_a_server_that_is_away_is_not_a_wrong_key(browser: Browser) -> None:
    async with ScriptedSite(lambda _: [], key="secret") as site, visiting(browser, site.origin, "/") as visit:
        site.login_refusals = [web.Response(status=502, text="Bad Gateway")]
        await visit.page.fill("#key", "secret")
        await visit.page.keyboard.press("Enter")
        await visit.page.get_by_text("The server cannot be reached.").wait_for()
