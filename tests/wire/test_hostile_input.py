"""Bad input of every kind: a clear status in the four-key form, never a 500, and the adapter goes on."""

import asyncio
import gzip
import json
import random

import pytest
from running_adapter import RunningAdapter
from scripted_core import KEY

URL = "/v1/chat/completions"
JSON = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
HELLO = {"role": "user", "content": "hello"}


async def _refused(answer, *statuses: int) -> dict:
    assert answer.status in statuses, (answer.status, await answer.text())
    error = (await answer.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["X-Request-Id"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nul", b"[]", b'"text"', b"1", b"null", b"\xff\xfe{}", b'{"a":"\xc3\x28"}', "\ufeff{}".encode(),
        b'{"messages":NaN}', b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b'{"n":1}x', "{}".encode("utf-16"),
    ],
    ids=range(16),
)  # fmt: skip
async def test_what_is_no_json_object_is_a_400(http, core, body):
    async with http.post(URL, data=body, headers=JSON) as answer:
        assert (await _refused(answer, 400))["code"] == "invalid_json"
    assert core.calls == []


def _said(*content) -> dict:
    return {"messages": [{"role": "user", "content": list(content)}]}


def _pictured(url) -> dict:
    return _said({"type": "image_url", "image_url": {"url": url}})


def _and(**fields) -> dict:
    return {"messages": [HELLO], **fields}


WRONG_MESSAGES = [
    {}, {"messages": None}, {"messages": []}, {"messages": "hello"}, {"messages": [None]}, {"messages": [[]]},
    {"messages": [{}]}, {"messages": [{"role": "boss", "content": "x"}]}, {"messages": [{"role": [], "content": "x"}]},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 5}]},
    _said(5), _said({"type": "x"}), _said({"type": "text"}), _said({"type": "text", "text": "\ud800"}),
    _said({"type": "image_url"}), _said({"type": "file", "file": {"file_id": "f"}}), _said({"type": "file", "file": 1}),
    _said({"type": "input_audio", "input_audio": {"data": "", "format": "x"}}), _said({"type": "input_audio"}),
    _pictured("http://a/b.png"), _pictured("file:///etc/passwd"), _pictured("data:image/png;base64,%"), _pictured(None),
    {"messages": [HELLO, {"role": "assistant", "content": "prefill"}]},
    {"messages": [{"role": "system", "content": "only rules"}]},
    {"messages": [{"role": "system", "content": [{"type": "file", "file": {"file_data": ""}}]}, HELLO]},
    {"messages": [{"role": "assistant", "tool_calls": "x"}, HELLO]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": 1}]}, HELLO]},
    {"messages": [{"role": "user", "content": "\ud800"}]},
]  # fmt: skip
WRONG_OPTIONS = [
    _and(model=5), _and(model="\udfff"), _and(stream="yes"), _and(max_tokens=0), _and(max_tokens=2**31),
    _and(max_tokens="5"), _and(max_tokens=True), _and(max_tokens=1.5), _and(temperature=float("inf")),
    _and(temperature=-1), _and(temperature=[]), _and(top_p=2), _and(seed=2**63), _and(seed=-(2**63) - 1),
    _and(stop=5), _and(stop=[5]), _and(stop="\ud800"), _and(stream=True, stream_options=[]),
    _and(stream=True, stream_options={"include_usage": 1}), _and(user=5), _and(user="x" * 1000), _and(n=True),
    _and(n="1"), _and(response_format="json"), _and(tools={}), _and(modalities=["text", "audio"]),
    _and(repetition_penalty="1"), _and(repetition_penalty=-1), _and(repetition_penalty=11), _and(**{"\ud800" * 99: 1}),
]  # fmt: skip


@pytest.mark.parametrize("fields", WRONG_MESSAGES + WRONG_OPTIONS)
async def test_a_field_that_is_wrong_is_a_400_that_names_it(http, core, fields):
    body = json.dumps(fields).replace("Infinity", "1e400")
    async with http.post(URL, data=body, headers=JSON) as answer:
        error = await _refused(answer, 400, 404)
        assert error["type"] == "invalid_request_error"
        assert error["param"]
    assert core.calls == []


async def test_a_field_within_another_is_named_by_its_path(http):
    fields = _and(stream=True, stream_options={"include_usage": "yes"})
    async with http.post(URL, json=fields, headers=JSON) as answer:
        error = await _refused(answer, 400)
    assert (error["param"], error["message"]) == (
        "stream_options.include_usage",
        "'stream_options.include_usage' must be a boolean.",
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("X-Session-Id", ["", " ", "a b", "a/b", "x" * 129, "é"]),
        ("Idempotency-Key", ["", " ", "a b", "x" * 129, "é"]),
        ("X-Request-Timeout", ["", "x", "-1", "1e9", "0", "inf", "1" * 20]),
    ],
)
async def test_a_header_that_is_wrong_is_a_400(http, name, values):
    for value in values:
        async with http.post(URL, json={"messages": [HELLO]}, headers={**JSON, name: value}) as answer:
            assert (await _refused(answer, 400))["param"] == name


async def test_a_time_of_nothing_is_told_to_be_above_it(http):
    async with http.post(URL, json={"messages": [HELLO]}, headers={**JSON, "X-Request-Timeout": "0"}) as answer:
        assert "a number of seconds above 0" in (await _refused(answer, 400))["message"]


async def test_other_kinds_of_bodies_are_a_415(http):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", ""):
        async with http.post(URL, data=b"{}", headers={**JSON, "Content-Type": kind}) as answer:
            await _refused(answer, 415)
    packed = gzip.compress(b" " * 50_000_000)
    async with http.post(URL, data=packed, headers={**JSON, "Content-Encoding": "gzip"}) as answer:
        await _refused(answer, 415)


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(adapter):
    reader, writer = await asyncio.open_connection("127.0.0.1", adapter.port)
    writer.write(
        f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 5000000000\r\n\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in head
    writer.close()


async def test_a_chunked_body_that_is_too_large_is_refused(http):
    async def endless():
        for _ in range(64):
            yield b" " * 65536

    async with http.post(URL, data=endless(), headers=JSON) as answer:
        assert (await _refused(answer, 413))["code"] == "request_too_large"


async def test_a_body_that_does_not_come_is_given_up(settings):
    async with RunningAdapter(settings, body_limit_s=0.2) as hasty:
        reader, writer = await asyncio.open_connection("127.0.0.1", hasty.port)
        writer.write(
            f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            "Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{".encode()
        )
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 408 ")
        writer.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 500 + b"\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /api/turns HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /api/turns HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nCookie: \xff\xfe=\x01; moltbot_session=\"\\777\"; ;;=;\r\n\r\n",
    ],
    ids=range(12),
)  # fmt: skip
async def test_broken_http_gets_an_answer_below_500_and_harms_nobody(adapter, http, raw):
    reader, writer = await asyncio.open_connection("127.0.0.1", adapter.port)
    writer.write(raw)
    async with asyncio.timeout(3):
        status = int((await reader.readline()).split()[1])
        head = await reader.readuntil(b"\r\n\r\n")
    assert 400 <= status < 500
    if status == 400:
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        assert set(json.loads(await reader.readexactly(length))["error"]) == {"message", "type", "param", "code"}
        assert b"X-Request-Id" in head
    writer.close()
    async with http.get("/health") as answer:
        assert answer.status == 200


@pytest.mark.parametrize("line", [f"POST {URL}", "GET /health", "GET /", "HEAD /health", "GET /nothing", "PUT /health"])
async def test_what_nobody_can_expect_is_a_417(adapter, http, caplog, line):
    method, path = line.split()
    async with http.request(method, path, headers={"Expect": "foo"}) as answer:
        assert (answer.status, answer.headers["Connection"]) == (417, "close")
        if method != "HEAD":
            assert (await _refused(answer, 417))["code"] == "expectation_failed"
    assert [record for record in caplog.records if record.exc_info] == []
    async with http.get("/metrics") as answer:
        assert 'status="417"' in await answer.text()


async def test_who_waits_to_send_a_body_is_told_to_go_on(http):
    async with http.post(URL, json={"messages": [HELLO]}, headers=JSON, expect100=True) as answer:
        assert answer.status == 200
    async with http.get("/nothing", headers=JSON, expect100=True) as answer:
        await _refused(answer, 404)


async def test_wrong_methods_and_routes_are_told(http):
    async with http.get(URL, headers=JSON) as answer:
        await _refused(answer, 405)
        assert answer.headers["Allow"] == "POST"
    for path in ("/v1", "/v2/models", "/%ff", "/a/../b", "/api/sessions//messages", "/v1/models/"):
        async with http.get(path, headers=JSON) as answer:
            await _refused(answer, 404)


async def test_noise_is_never_a_500(http, browser):
    """Bodies mutated at random; seeded, so that a failure can be seen again."""
    dice = random.Random(7)
    asked = {
        "model": "moltbot",
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
        "temperature": 0.5,
        "stop": ["x"],
        "stream_options": {"include_usage": True},
    }
    turn = {"model": "moltbot", "session": "", "text": "hello", "request_id": "r"}
    values = [None, True, 0, -1, 2**70, 1e308, "", "\ud800", "x" * 3000, [], {}, [[]], {"type": {}}, "\x00"]

    def mutate(value):
        if dice.random() < 0.15:
            return dice.choice(values)
        if isinstance(value, dict):
            return {key: mutate(inner) for key, inner in value.items() if dice.random() > 0.05}
        return [mutate(inner) for inner in value] if isinstance(value, list) else value

    for session, path, good in (http, URL, asked), (browser, "/api/turns", turn):
        for _ in range(400):
            body = json.dumps(mutate(good)).encode()
            if dice.random() < 0.3:
                place = dice.randrange(len(body))
                body = body[:place] + bytes([dice.randrange(256)]) + body[place + 1 :]
            async with session.post(path, data=body, headers=JSON) as answer:
                assert answer.status < 500, (path, body)
                await answer.read()
