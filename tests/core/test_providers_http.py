"""The wire of providers: responses cut anywhere, connections kept and lost, TLS, proxies, servers without manners."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moltbot_server.errors import ModelUnavailable, QueueFull
from moltbot_server.models.providers import Pools
from moltbot_server.models.providers.events import Broken, EventLines
from moltbot_server.models.providers.http_body import Chunked, Malformed, Sized, body_of, read_head
from moltbot_server.models.providers.pool import Origin, Pool, Unreachable, proxy_for
from moltbot_server.turns import GenerationOptions
from provider_kit import DONE, HELLO, STOP, Heard, Ring, Wire, answered, provider, response, started, stream, word

GOOD = stream(word("good"), STOP, DONE)


def pieces_of(data: bytes, seed: int) -> list[bytes]:
    """Cut bytes at random places."""
    edges = sorted(random.Random(seed).choices(range(len(data) + 1), k=12))
    return [data[begin:end] for begin, end in zip([0, *edges], [*edges, len(data)], strict=True)]


# --- bytes -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.integers(0, 2**32))
def test_a_body_in_chunks_is_read_however_it_is_cut(chunks: list[bytes], seed: int) -> None:
    written = b"".join(b"%X;x=1\r\n%b\r\n" % (len(each), each) for each in chunks) + b"0\r\nX-Trailer: 1\r\n\r\n"
    body = Chunked()
    read = b"".join(body.feed(piece) for piece in pieces_of(written, seed))
    assert (read, body.done, body.cut(), body.clean) == (b"".join(chunks), True, False, True)


@pytest.mark.parametrize("broken", [b"x\r\n", b"-5\r\nhello", b"5\r\nhello!\r\n", b"fffffffffff\r\n", b"1" * 300])
def test_chunks_that_are_none_are_found_out(broken: bytes) -> None:
    with pytest.raises(Malformed):
        Chunked().feed(broken)


def test_a_body_that_ends_before_its_end_is_known_to_be_cut() -> None:
    body = Chunked()
    body.feed(b"5\r\nhel")
    assert body.cut()
    sized = Sized(5)
    assert (sized.feed(b"hel"), sized.cut(), sized.feed(b"lo and more"), sized.done) == (b"hel", True, b"lo", True)
    assert not sized.clean


@given(st.binary(max_size=300))
def test_no_bytes_make_the_readers_of_a_response_raise_anything_else(data: bytes) -> None:
    for read in (lambda: read_head(data), lambda: Chunked().feed(data), lambda: EventLines().feed(data)):
        with contextlib.suppress(Malformed, Broken):
            read()


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH",
        b"HTTP/1.1 abc OK",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 200 OK\r\nno colon",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2",
    ],
)
def test_a_head_that_is_none_is_found_out(head: bytes) -> None:
    with pytest.raises(Malformed):
        read_head(head)


@pytest.mark.parametrize(
    "headers", [b"Transfer-Encoding: gzip, chunked", b"Content-Length: -1", b"Content-Length: 1e3"]
)
def test_a_body_that_cannot_be_measured_is_refused(headers: bytes) -> None:
    with pytest.raises(Malformed):
        body_of(read_head(b"HTTP/1.1 200 OK\r\n" + headers))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@given(st.integers(0, 2**32))
def test_events_are_read_however_they_are_cut_and_whatever_ends_a_line(end: str, seed: int) -> None:
    lines = [
        ": a comment",
        "event: x",
        'data: {"a":',
        "data:1}",
        "",
        "id: 3",
        "",
        "data: 你好🙂",
        "",
        "data",
        "",
        "data: [DONE]",
    ]
    data = end.join(lines).encode()
    events = EventLines()
    found = [payload for piece in pieces_of(data, seed) for payload in events.feed(piece)] + events.end()
    assert found == [b'{"a":\n1}', "你好🙂".encode(), b"", b"[DONE]"]


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        ("event: ping\ndata: {}", [b"{}"]),
        ("event: ping\ndata:{}", [b"{}"]),
        ("event: ping\ndata:  {}", [b" {}"]),
        ("event: data: 1\ndata: 2\ndata: 3", [b"2\n3"]),
        ("event: ping\ndata", []),
        ("event: ping\nid: data: 1", []),
        ("event: ping", []),
        ("event: ping\ndata: ", [b""]),
    ],
)
def test_the_name_of_an_event_is_left_out_and_its_data_is_whole(event: str, payload: list[bytes]) -> None:
    assert EventLines().feed(f"{event}\n\n".encode()) == payload


@pytest.mark.parametrize("first", ["data: one", "event: x\ndata: one", "data:one"])
def test_a_byte_order_mark_before_the_first_event_hides_it_not(first: str) -> None:
    events = EventLines()
    assert events.feed(f"\ufeff{first}\n\ndata: two\n\n".encode()) == [b"one", b"two"]
    events = EventLines()
    assert (events.feed(f"\ufeff{first}".encode()), events.end()) == ([], [b"one"])


def test_an_event_without_an_end_is_given_up() -> None:
    events = EventLines()
    events.feed(b"data: " + b"x" * (1 << 19))
    with pytest.raises(Broken, match="1 MiB"):
        events.feed(b"x" * (1 << 19))


# --- connections -----------------------------------------------------------------------------------------------------


async def test_one_connection_serves_one_answer_after_another() -> None:
    async with Wire(GOOD).running() as wire, started(provider(wire.address)) as engine:
        for _ in range(3):
            await answered(engine)
    assert (wire.connections, len(wire.requests)) == (1, 3)


async def test_a_connection_that_the_server_closes_politely_is_not_used_again() -> None:
    polite = GOOD.replace(b"Transfer-Encoding", b"Connection: close\r\nTransfer-Encoding")
    async with Wire(polite).running() as wire, started(provider(wire.address)) as engine:
        for _ in range(2):
            await answered(engine)
    assert wire.connections == 2


async def test_a_connection_that_was_closed_while_it_lay_idle_costs_nobody_an_answer() -> None:
    async with Wire(GOOD, close=True).running() as wire, started(provider(wire.address)) as engine:
        for _ in range(20):
            heard, _ = await answered(engine)
            assert heard.text == "good"


async def test_an_answer_that_ends_with_its_connection_is_read() -> None:
    old = (
        b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        + f"data: {word('old')}\n\ndata: {STOP}\n\ndata: [DONE]".encode()
    )
    async with Wire(old, close=True).running() as wire, started(provider(wire.address)) as engine:
        heard, _ = await answered(engine)
    assert heard.text == "old"


async def test_a_word_on_the_way_before_the_answer_is_passed_over() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n|PAUSE|"
    async with Wire(hints + GOOD).running() as wire, started(provider(wire.address)) as engine:
        heard, _ = await answered(engine)
    assert heard.text == "good"


async def test_what_comes_after_the_end_of_an_answer_is_not_waited_for() -> None:
    endless = GOOD.removesuffix(b"0\r\n\r\n")
    async with Wire(endless).running() as wire, started(provider(wire.address)) as engine:
        async with asyncio.timeout(0.5):
            for _ in range(3):
                heard, _ = await answered(engine)
                assert heard.text == "good"
        assert wire.connections == 3


async def test_an_answer_to_nobody_closes_the_connection() -> None:
    async with Wire(GOOD + b"HTTP/1.1 200 OK\r\n\r\n").running() as wire, started(provider(wire.address)) as engine:
        for _ in range(3):
            heard, _ = await answered(engine)
            assert heard.text == "good"


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", "headers are too large"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: zip\r\n\r\n", "transfer coding is not known"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzzz\r\n", "a chunk has no size"),
        (stream('{"choices":[]}' + " " * (2 << 20)), "larger than 1 MiB"),
        (response(b""), "broke off: its answer broke off"),
        (response(b"\n\n\n: nothing\n\n"), "broke off"),
        (stream(word("x"), DONE), "ended without a reason"),
        (stream("\x00"), "no chunk of an answer"),
        (stream("[" * 100_000), "no chunk of an answer"),
        (stream('{"choices": 5}'), "no chunk of an answer"),
        (
            response(
                b'{"error":{"message":"model overloaded","type":"overloaded_error"}}', content_type="application/json"
            ),
            r"failed \(500\)",
        ),
        (response(b'{"choices":[]}', content_type="application/json"), "sent no stream"),
        (response(b"<html>", content_type="text/html"), "a page for people"),
        (stream('{"error":{"message":"boom","code":502}}'), r"failed \(502\)"),
        (stream(word("x"), '{"error":"out of memory"}'), "failed: out of memory"),
        (stream(word("x"), '{"choices":[{"delta":{},"finish_reason":"network_error"}]}', DONE), "gave up"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
            "points to another address",
        ),
    ],
    ids=range(18),
)
async def test_servers_without_manners_are_told_as_what_they_are(sent: bytes, told: str) -> None:
    async with Wire(sent).running() as wire, started(provider(wire.address, idle_timeout=1.0)) as engine:
        with pytest.raises(ModelUnavailable, match=told) as caught:
            await answered(engine)
        assert len(caught.value.message) < 500
        assert wire.connections == 1


async def test_an_answer_that_is_packed_is_refused_before_it_is_unpacked() -> None:
    packed = response(gzip.compress(b"x" * 1000)).replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer")
    async with Wire(packed).running() as wire, started(provider(wire.address)) as engine:
        with pytest.raises(ModelUnavailable, match="packs its answers"):
            await answered(engine)
        assert b"Accept-Encoding: identity" in wire.requests[0]


async def test_an_answer_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moltbot_server.models.providers.drafts.LARGEST_ANSWER", 1000)
    long = stream(*[word("x" * 500)] * 4, STOP, DONE)
    async with Wire(long).running() as wire, started(provider(wire.address)) as engine:
        with pytest.raises(ModelUnavailable, match="has no end"):
            await answered(engine)


async def test_a_refusal_whose_text_never_ends_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moltbot_server.models.providers.answer._REFUSAL_WITHIN", 0.1)
    head = b"HTTP/1.1 429 No\r\nRetry-After: 3\r\nContent-Length: 100\r\n\r\n{"
    async with Wire(head).running() as wire, started(provider(wire.address)) as engine:
        with pytest.raises(QueueFull) as caught:
            await answered(engine)
        assert caught.value.retry_after == pytest.approx(3, abs=0.1)


async def test_bytes_that_keep_coming_keep_an_answer_alive() -> None:
    slow = b"|PAUSE|".join([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"7\r\n: ping\n\r\n"] * 30])
    rest = f"data: {word('late')}\n\ndata: {STOP}\n\ndata: [DONE]\n\n".encode()
    slow += b"1\r\n\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest)
    async with Wire(slow).running() as wire, started(provider(wire.address, idle_timeout=0.15)) as engine:
        heard, end = await answered(engine)
    assert heard.text == "late"
    assert end.first_token > 0.15


async def test_the_pool_is_closed_with_the_last_engine_of_an_origin() -> None:
    pools = Pools()
    async with Wire(GOOD).running() as wire:
        where = provider(wire.address)
        async with started(where, pools=pools) as first:
            pool = first.pool
            async with started(where, pools=pools) as second:
                await answered(second)
                assert second.pool is pool
            await answered(first)
            assert wire.connections == 1
        async with asyncio.timeout(1):
            await wire.empty.wait()
        with pytest.raises(Unreachable):
            await pool.connect(1.0)


async def test_a_name_with_an_address_that_does_not_work_is_reached_by_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Wire(GOOD).running() as wire:
        port = urlsplit(wire.address).port
        found = await asyncio.get_running_loop().getaddrinfo("127.0.0.1", port, type=1)
        dead = (found[0][0], found[0][1], 6, "", ("127.0.0.2", 9))

        loop = asyncio.get_running_loop()
        real = loop.getaddrinfo

        async def two(host: str, *rest: Any, **named: Any) -> list[Any]:
            return [dead, *found] if host == "two.test" else await real(host, *rest, **named)

        monkeypatch.setattr(loop, "getaddrinfo", two)
        connection = await Pool(Origin(False, "two.test", 0)).connect(2.0)
        assert not connection.closed
        connection.abort()


# --- TLS and proxies -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost and its key."""
    import subprocess

    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert]
    subprocess.run([*command, *subject], check=True, capture_output=True)
    return cert, key


async def test_a_provider_is_asked_in_tls_and_its_certificate_is_looked_at(certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    wire = Wire(GOOD)
    server = await asyncio.start_server(wire._serve, "127.0.0.1", 0, ssl=context)
    address = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    try:
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        async with started(provider(address), pools=Pools(tls=trusting)) as engine:
            for _ in range(2):
                heard, _ = await answered(engine)
                assert heard.text == "good"
        async with started(provider(address)) as engine:
            with pytest.raises(ModelUnavailable, match="certificate is not trusted"):
                await answered(engine)
    finally:
        server.close()
        await server.wait_closed()


def test_the_proxy_of_the_environment_is_used_but_not_for_this_machine() -> None:
    far, near, local = (
        Origin(True, "api.openai.com", 443),
        Origin(True, "x.corp.cn", 443),
        Origin(False, "127.0.0.1", 80),
    )
    environ = {"https": "http://10.0.0.1:7890", "http": "http://10.0.0.1:7890", "no": "localhost,.corp.cn"}
    found = proxy_for(far, environ)
    assert found is not None
    assert (found.hostname, found.port) == ("10.0.0.1", 7890)
    assert proxy_for(near, environ) is None
    assert proxy_for(local, environ) is None
    assert proxy_for(far, {"all": "socks5://10.0.0.1:1080"}) is None
    assert proxy_for(far, {**environ, "no": "*"}) is None
    assert proxy_for(far, {}) is None


async def test_a_request_goes_through_a_tunnel_of_the_proxy(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    wire = Wire(GOOD)
    server = await asyncio.start_server(wire._serve, "127.0.0.1", 0, ssl=context)
    target = server.sockets[0].getsockname()[1]
    asked: list[bytes] = []

    async def proxied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        there, back = await asyncio.open_connection("127.0.0.1", target)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_pump(reader, back), _pump(there, writer))

    proxy = await asyncio.start_server(proxied, "127.0.0.1", 0)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:word@127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    # A name that is not this machine's own, so that the proxy is asked; the certificate is for localhost.
    trusting.check_hostname = False
    try:
        async with started(provider("https://api.example.com"), pools=Pools(tls=trusting)) as engine:
            heard, _ = await answered(engine)
    finally:
        for each in (proxy, server):
            each.close()
            await each.wait_closed()
    assert heard.text == "good"
    assert asked[0].startswith(b"CONNECT api.example.com:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic bWU6d29yZA==" in asked[0]
    assert b"a-good-key" not in asked[0]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
    except ConnectionError:
        pass  # the other side has left
    finally:
        writer.close()


async def test_a_plain_request_names_the_whole_address_to_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Wire(GOOD).running() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        async with started(provider("http://gpu.lan:8000/v1")) as engine:
            heard, _ = await answered(engine)
    assert heard.text == "good"
    assert proxy.requests[0].startswith(
        b"POST http://gpu.lan:8000/v1/chat/completions HTTP/1.1\r\nHost: gpu.lan:8000\r\n"
    )


async def test_many_answers_at_once_that_are_stopped_leave_nothing_behind() -> None:
    async with Wire(stream(word("x"))[:-5] + b"|PAUSE|").running() as wire, started(provider(wire.address)) as engine:
        generations = []
        for at in range(50):
            heard = Heard()
            generations.append(engine.begin(HELLO, GenerationOptions(), heard))
            if at % 3 == 0:
                await asyncio.sleep(0)
            if at % 2 == 0:
                generations[at].stop()
        await heard.began.wait()
        for generation in generations:
            generation.stop()
        assert engine.numbers["answers"] == 0
        async with asyncio.timeout(2):
            await wire.empty.wait()
        assert len(engine.pool) == 0


async def test_a_ring_of_keys_is_asked_by_the_name_of_the_provider() -> None:
    ring = Ring("k" * 20)
    async with Wire(GOOD).running() as wire, started(provider(wire.address), ring) as engine:
        await answered(engine)
    assert set(ring.asked) == {"mock"}
    assert b"authorization: Bearer " + b"k" * 20 in wire.requests[0]
