"""Who is let in: the policy, sign-in, one-time links, foreign pages, rebound names, proxies."""

import asyncio
import hashlib
import os
import stat
import time
from ipaddress import ip_network

import aiohttp
import pytest
from moltbot_adapters.http.errors import HttpError
from moltbot_adapters.http.pages import Assets
from moltbot_adapters.http.policy import POLICY, Access, rule_for
from moltbot_adapters.http.settings import Settings, UnsafeSettings
from moltbot_adapters.http.signin import COOKIE, KeyFile, SignIn
from running_adapter import RunningAdapter
from scripted_core import KEY

BEARER = {"Authorization": f"Bearer {KEY}"}
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def _routes(adapter):
    return {(route.method, route.resource.canonical) for route in adapter.app.router.routes()}


async def test_every_route_has_a_rule_and_every_rule_a_route(adapter):
    routes = _routes(adapter)
    assert {route for route in routes if rule_for(*route) is None} == set()
    assert set(POLICY) - routes == set()


async def test_a_route_without_a_rule_is_closed_to_all(http, monkeypatch):
    monkeypatch.delitem(POLICY, ("GET", "/health"))
    async with http.get("/health") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "permission_denied")


async def test_no_route_lets_a_stranger_further_than_its_rule(adapter, http, core):
    for (method, template), rule in POLICY.items():
        path = template.replace("{session}", "first").replace("{turn}", "t1").replace("{model}", "demo")
        headers = {"X-MoltBot": "1", "Origin": adapter.url, "X-Forwarded-For": "127.0.0.1"}
        async with http.request(method, path.replace("{name}", "index.html"), headers=headers) as answer:
            expected = {Access.COOKIE: {401}, Access.BEARER: {401}, Access.LOCAL: {403}}
            allowed = expected.get(rule.access, {200, 204, 303, 401, 415})
            assert answer.status in allowed, (method, path, answer.status)
    assert set(core.names()) <= {"Check"}


async def test_a_cookie_opens_no_bearer_route_and_a_key_no_cookie_route(browser, http):
    async with browser.get("/v1/models") as answer:
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    async with http.get("/api/me", headers=BEARER) as answer:
        assert answer.status == 401


@pytest.mark.parametrize("value", ["", "Basic abc", "Bearer", "Bearer a b", "Bearer \u00e9", "Bearer " + "x" * 5000])
async def test_a_malformed_key_is_refused_without_asking_the_core(http, core, value):
    async with http.get("/v1/models", headers={"Authorization": value}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")
    assert core.calls == []


async def test_a_key_that_the_core_does_not_know_is_refused_as_http_wants_it(http):
    async with http.get("/v1/models", headers={"Authorization": f"Bearer {KEY[:-1]}"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_the_page_is_shown_to_all_and_says_who_is_signed_in(browser, http):
    async with browser.get("/") as answer:
        assert (answer.status, answer.content_type) == (200, "text/html")
        assert answer.headers["Content-Security-Policy"] == CSP
        page = await answer.read()
    async with http.get("/") as answer:
        assert answer.status == 401
        assert await answer.read() == page


async def test_a_wrong_key_signs_nobody_in(adapter, http):
    headers = {"X-MoltBot": "1", "Origin": adapter.url}
    for wrong in ("", "x", KEY + "x", KEY[:-1], "é" * 100, 5, None, ["a"]):
        async with http.post("/api/login", json={"key": wrong}, headers=headers) as answer:
            assert answer.status in (400, 401)
            assert "Set-Cookie" not in answer.headers


async def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(adapter, http):
    headers = {"X-MoltBot": "1", "Origin": adapter.url}
    async with http.post("/api/login", json={"key": KEY}, headers=headers) as answer:
        cookie = answer.headers["Set-Cookie"]
    attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/", "max-age=2592000"} <= attributes
    assert "secure" not in attributes
    assert KEY not in cookie


async def test_signing_out_takes_the_cookie_away(browser):
    async with browser.post("/api/logout") as answer:
        assert answer.status == 204
    async with browser.get("/api/me") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "signed_out")


async def test_a_link_works_once(adapter, http):
    link = adapter.link("code-1")
    async with http.get(link, allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (303, "/")
        assert COOKIE in answer.cookies
    async with http.get(link, allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (303, "/?error=link")
        assert COOKIE not in answer.cookies


async def test_of_many_who_follow_a_link_at_once_one_gets_in(adapter, settings):
    link = adapter.link("code-2")
    async with RunningAdapter(settings) as second, aiohttp.ClientSession() as session:
        links = [link, link.replace(adapter.url, second.url)] * 10

        async def follow(address: str) -> str:
            async with session.get(address, allow_redirects=False) as answer:
                return answer.headers["Location"]

        assert sorted(await asyncio.gather(*map(follow, links))) == ["/"] + ["/?error=link"] * 19


async def test_a_browser_that_only_guesses_uses_no_link_up(adapter, http):
    link = adapter.link("guessed")
    for header in ({"Sec-Purpose": "prefetch;prerender"}, {"Purpose": "prefetch"}):
        async with http.get(link, headers=header, allow_redirects=False) as answer:
            assert (answer.status, answer.cookies) == (503, {})
    async with http.get(link, allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (303, "/")


async def test_links_that_are_old_unknown_or_odd_are_refused(adapter, http):
    codes = [adapter.link("old", lives_s=-1).rpartition("=")[2], "unknown", "", "../cookie.key", "%00", "x" * 5000]
    (adapter.settings.state / "links" / hashlib.sha256(b"broken").hexdigest()).write_text("soon")
    for code in [*codes, "broken"]:
        async with http.get(f"/login?code={code}", allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (303, "/?error=link"), code
    async with http.head("/login?code=unknown") as answer:
        assert answer.status == 405


def test_a_cookie_is_worth_nothing_once_anything_about_it_changes(tmp_path, monkeypatch):
    key = tmp_path / "key"
    key.write_text(KEY)
    signin = SignIn(tmp_path / "state", KeyFile(key))
    good = signin.cookie()
    assert signin.user(good) == "owner"
    version, user, expiry, mac = good.split(".")
    forged = [
        None, "", ".", "....", "v1", good[:-1], good + "=", good.upper(), f"{version}.{user}.{int(expiry) + 1}.{mac}",
        f"{version}.YWRtaW4.{expiry}.{mac}", f"{version}.{user}.{expiry}.", "é" * 40, "x" * 5000,
    ]  # fmt: skip
    assert [signin.user(cookie) for cookie in forged] == [None] * len(forged)
    next_month = time.time() + 31 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: next_month)
    assert signin.user(good) is None


def test_a_new_workspace_key_signs_every_browser_out(tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY)
    signin = SignIn(tmp_path / "state", KeyFile(key))
    cookie = signin.cookie()
    key.write_text("mb_another_key")
    assert signin.user(cookie) is None
    assert signin.user(signin.cookie()) == "owner"


def test_workers_share_one_cookie_key_that_only_its_owner_reads(tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY)
    first, second = (SignIn(tmp_path / "state", KeyFile(key)) for _ in range(2))
    assert second.user(first.cookie()) == "owner"
    assert stat.S_IMODE((tmp_path / "state" / "cookie.key").stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["cookie.key", "links"]


def _without(headers, *names):
    return {name: value for name, value in headers.items() if name not in names}


async def test_a_foreign_page_can_do_nothing_with_the_cookie(adapter, browser, core):
    good = dict(browser.headers)
    cookie = {"Cookie": "; ".join(f"{c.key}={c.value}" for c in browser.cookie_jar)}
    bad = [
        _without(good, "X-MoltBot"),
        _without(good, "Origin", "Sec-Fetch-Site"),
        {**good, "X-MoltBot": "true"},
        {**good, "Origin": "https://evil.example"},
        {**good, "Origin": "null"},
        {**good, "Origin": f"http://localhost:{adapter.port}"},
        {**good, "Origin": adapter.url.replace("http", "https")},
        {**good, "Sec-Fetch-Site": "cross-site"},
        {**good, "Sec-Fetch-Site": "same-site"},
        {**good, "Sec-Fetch-Site": "none"},
    ]
    async with aiohttp.ClientSession(adapter.url) as session:
        for headers in bad:
            for method, path in (("DELETE", "/api/sessions/first"), ("POST", "/api/turns"), ("POST", "/api/logout")):
                async with session.request(method, path, headers={**headers, **cookie}, json={}) as answer:
                    assert answer.status == 403, (headers, path)
        async with session.get("/api/me", headers={**cookie, "Sec-Fetch-Site": "same-site"}) as answer:
            assert answer.status == 403
        async with session.get("/api/me", headers={**cookie, "Sec-Fetch-Site": "same-origin"}) as answer:
            assert answer.status == 200
    assert core.names() == ["ListModels"]


async def test_no_other_site_is_invited(browser, http):
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    async with http.options("/api/turns", headers=preflight) as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")
        assert not any(name.lower().startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "[", ""])
async def test_a_name_rebound_to_this_machine_is_refused(http, host):
    for path in ("/", "/api/me", "/v1/models", "/static/index.html", "/nowhere"):
        async with http.get(path, headers={"Host": host, **BEARER}) as answer:
            assert answer.status == 403, path


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST:9"])
async def test_the_names_of_this_machine_are_served(http, host):
    async with http.get("/v1/models", headers={"Host": host, **BEARER}) as answer:
        assert answer.status == 200


async def test_metrics_are_for_this_machine_and_not_for_what_a_proxy_forwards(http, settings):
    async with http.get("/metrics") as answer:
        assert answer.status == 200
    for header in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
        async with http.get("/metrics", headers={header: "127.0.0.1"}) as answer:
            assert answer.status == 403
        async with http.get("/health", headers={header: "127.0.0.1"}) as answer:
            assert await answer.json() == {"status": "ok"}
    proxies = (ip_network("127.0.0.0/8"),)
    async with (
        RunningAdapter(settings, trusted_proxies=proxies) as proxied,
        http.get(f"{proxied.url}/metrics") as answer,
    ):
        assert answer.status == 403
    async with RunningAdapter(settings, public_metrics=True) as public:
        forwarded = http.get(f"{public.url}/metrics", headers={"Via": "x"})
        async with forwarded as answer:
            assert answer.status == 200


async def test_a_trusted_proxy_tells_the_scheme_and_others_do_not(http, settings, adapter):
    headers = {"X-MoltBot": "1", "Host": "chat.example.org", "Origin": "https://chat.example.org"}
    async with RunningAdapter(settings, trusted_proxies=(ip_network("127.0.0.1/32"),)) as proxied:
        login = f"{proxied.url}/api/login"
        async with http.post(login, json={"key": KEY}, headers={**headers, "X-Forwarded-Proto": "https"}) as answer:
            assert answer.status == 204
            assert "secure" in answer.headers["Set-Cookie"].lower()
        async with http.post(login, json={"key": KEY}, headers=headers) as answer:
            assert answer.status == 403
    headers = {**headers, "Host": "localhost", "Origin": "https://localhost", "X-Forwarded-Proto": "https"}
    async with http.post(f"{adapter.url}/api/login", json={"key": KEY}, headers=headers) as answer:
        assert answer.status == 403


async def test_a_refusal_through_a_proxy_that_is_not_named_says_what_to_name_and_the_log_does_once(
    http, settings, caplog
):
    body = {"key": KEY}
    near = {"X-MoltBot": "1", "Host": "localhost", "Origin": "https://localhost", "X-Forwarded-Proto": "https"}
    far = {**near, "Host": "chat.example.org", "Origin": "https://chat.example.org"}
    evil = {**near, "Origin": "https://evil.example"}
    for _ in range(2):
        for headers, code in ((near, "foreign_origin"), (far, "host_not_allowed")):
            async with http.post("/api/login", json=body, headers=headers) as answer:
                error = (await answer.json())["error"]
                assert (answer.status, error["code"]) == (403, code)
                assert "`trusted_proxies` in moltbot.yaml" in error["message"]
    said = [record for record in caplog.records if "trusted_proxies" in record.getMessage()]
    assert [(record.levelname, record.name) for record in said] == [("WARNING", "moltbot.http")]
    for headers in (evil, {**evil, "Sec-Fetch-Site": "cross-site"}, {**near, "X-Forwarded-Proto": ""}):
        bare = {name: value for name, value in headers.items() if value}
        async with http.post("/api/login", json=body, headers=bare) as answer:
            error = (await answer.json())["error"]
            assert (error["code"], "trusted_proxies" in error["message"]) == ("foreign_origin", False)
    async with (
        RunningAdapter(settings, trusted_proxies=(ip_network("127.0.0.1/32"),)) as proxied,
        http.post(f"{proxied.url}/api/login", json=body, headers=evil) as answer,
    ):
        assert "trusted_proxies" not in (await answer.json())["error"]["message"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_settings_that_open_the_port_without_tls_cannot_exist(tmp_path, host):
    common = {"port": 0, "core": "127.0.0.1:1", "key_file": tmp_path, "state": tmp_path}
    with pytest.raises(UnsafeSettings, match="--trusted-proxy"):
        Settings(host=host, **common)
    assert not Settings(host=host, trusted_proxies=(ip_network("10.0.0.0/8"),), **common).loopback_only
    assert Settings(host="127.0.0.1", **common).loopback_only


async def test_every_answer_carries_the_headers_that_protect_it(browser, http):
    for session, path in (
        (browser, "/"),
        (browser, "/api/me"),
        (http, "/v1/models"),
        (http, "/nope"),
        (http, "/health"),
    ):
        async with session.get(path) as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Request-Id"].startswith("req_")
            assert answer.headers["Server"] == "moltbot"


async def test_assets_are_checked_for_news_and_lead_nowhere_else(http):
    async with http.get("/static/index.html") as answer:
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-cache")
        tag = answer.headers["ETag"]
    async with http.get("/static/index.html", headers={"If-None-Match": f'"x", W/{tag}'}) as answer:
        assert (answer.status, await answer.read()) == (304, b"")
    for name in (
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "/etc/passwd",
        ".hidden",
        "a//b",
        "nothing.js",
        "a%00b",
        "view",
    ):
        async with http.get(f"/static/{name}") as answer:
            assert answer.status == 404, name


async def test_a_link_out_of_the_folder_is_no_asset(tmp_path):
    (tmp_path / "outside").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink(tmp_path / "outside", folder / "inside.js")
    with pytest.raises(HttpError):
        Assets(folder).get("inside.js")
