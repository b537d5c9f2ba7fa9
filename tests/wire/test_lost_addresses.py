"""Addresses that lead nowhere: a page for who opens them in a browser, the JSON of the API for all others."""

import re

import aiohttp
import pytest
from scripted_core import KEY

CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"
BROWSER = {"Accept": CHROME, "Accept-Language": "en-US,en;q=0.9"}
PROTECTING = (
    "Content-Security-Policy",
    "Cross-Origin-Opener-Policy",
    "Cross-Origin-Resource-Policy",
    "Referrer-Policy",
    "Server",
    "X-Content-Type-Options",
    "X-Frame-Options",
)


async def _is_json(answer: aiohttp.ClientResponse) -> None:
    assert (answer.status, answer.content_type) == (404, "application/json")
    error = (await answer.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")


async def test_a_browser_gets_a_page_that_leads_back(http):
    async with http.get("/nothing", headers=BROWSER) as answer:
        page = await answer.text()
        assert (answer.status, answer.content_type, answer.charset) == (404, "text/html", "utf-8")
        assert answer.headers["Content-Language"] == "en"
        assert answer.headers["Cache-Control"] == "no-store"
        assert {name.strip() for name in answer.headers["Vary"].split(",")} == {"Accept", "Accept-Language"}
        assert '<html lang="en">' in page
        assert "There is no page at this address" in page
        assert '<a href="/"' in page
    for path in re.findall(r'(?:href|src)="(/[^"]*)"', page):
        async with http.get(path) as linked:
            assert linked.status == (401 if path == "/" else 200), path


async def test_the_page_carries_the_same_protecting_headers_as_the_chat_page(http):
    async with http.get("/", headers=BROWSER) as chat, http.get("/nothing", headers=BROWSER) as lost:
        for name in PROTECTING:
            assert lost.headers[name] == chat.headers[name], name
        assert lost.headers["X-Request-Id"].startswith("req_")
        page = await lost.text()
    assert not re.search(r"<script>|<style|style=|https?://| on\w+=", page), "the policy refuses it"


@pytest.mark.parametrize(
    ("languages", "expected"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("zh-TW", "zh"),
        ("ZH", "zh"),
        ("en-GB,zh;q=0.5", "en"),
        ("en;q=0.5,zh;q=0.7", "zh"),
        ("fr,zh;q=0.9,en;q=0.8", "zh"),
        ("zh;q=0,fr", "en"),
        ("fr", "en"),
        ("*", "en"),
        ("", "en"),
        ("zh;q=x, ;;,=", "en"),
    ],
)
async def test_the_page_speaks_the_language_that_the_browser_prefers(http, languages, expected):
    async with http.get("/nothing", headers={"Accept": CHROME, "Accept-Language": languages}) as answer:
        page = await answer.text()
    assert ("这个地址没有页面" in page) == (expected == "zh")
    assert ('<html lang="zh-CN">' in page) == (expected == "zh")
    assert ("There is no page at this address" in page) == (expected == "en")


@pytest.mark.parametrize(
    "accept", [CHROME, "text/html", "text/html;q=0.5, application/json;q=0.4", "TEXT/HTML", "text/*"]
)
async def test_who_prefers_html_gets_the_page(http, accept):
    async with http.get("/nothing", headers={"Accept": accept}) as answer:
        assert (answer.status, answer.content_type) == (404, "text/html")


@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "",
        "application/json",
        "application/json, text/plain, */*",
        "application/json, text/html;q=0.9",
        "text/html, application/json",
        "text/html;q=0, */*",
        "text/event-stream",
        "text/html;q=nan",
        "text/html;q=2",
        "text/html;q=",
        ";q=1,,/",
        "image/png",
    ],
)
async def test_everyone_else_gets_the_json_of_the_api(http, accept):
    async with http.get("/nothing", headers={"Accept": accept}) as answer:
        await _is_json(answer)


async def test_the_api_answers_with_json_to_a_browser_too(http):
    for path in ("/v1", "/v1/", "/v1/nothing", "/v1/chat/nothing", "/%761/nothing"):
        async with http.get(path, headers={**BROWSER, "Authorization": f"Bearer {KEY}"}) as answer:
            await _is_json(answer)


async def test_other_methods_are_answered_with_json(http):
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        async with http.request(method, "/nothing", headers=BROWSER) as answer:
            await _is_json(answer)


async def test_a_file_of_the_page_that_there_is_not_is_an_address_like_others(http):
    async with http.get("/static/nothing.js", headers=BROWSER) as answer:
        assert (answer.status, answer.content_type) == (404, "text/html")
    async with http.get("/static/nothing.js", headers={"Accept": "*/*"}) as answer:
        await _is_json(answer)


@pytest.mark.parametrize(("headers", "kind"), [(BROWSER, "text/html"), ({}, "application/json")])
async def test_head_tells_what_get_would_and_sends_no_body(http, headers, kind):
    async with http.get("/nothing", headers=headers) as whole, http.head("/nothing", headers=headers) as head:
        assert (head.status, head.content_type) == (404, kind)
        assert await head.read() == b""
        assert head.headers["Content-Length"] == whole.headers["Content-Length"]
        assert head.headers["Content-Security-Policy"] == whole.headers["Content-Security-Policy"]


async def test_nothing_of_the_address_is_told_back(http):
    hostile = "/%3Cscript%3Ealert(1)%3C/script%3E/needle%22%27?q=%3Cb%3Eneedle"
    async with http.get(hostile, headers=BROWSER) as answer, http.get("/nothing", headers=BROWSER) as plain:
        page = await answer.read()
        assert answer.status == 404
        assert page == await plain.read()
        assert not any("needle" in value for value in answer.headers.values())


async def test_a_foreign_name_gets_no_page(http):
    async with http.get("/nothing", headers={**BROWSER, "Host": "evil.example"}) as answer:
        assert (answer.status, answer.content_type) == (403, "application/json")
