"""MoltBot whose Redis is away or takes no writes: it says so everywhere, goes on trying, and is back when Redis is."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from cli_process import Home, Started
from redis.asyncio import Redis
from redis_process import RedisProcess
from web.browser import answered, ask, chromium, find_chromium, visiting


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    """A Redis that writes down all that it is given."""
    async with RedisProcess.keeping(tmp_path) as process:
        yield process


@pytest.fixture
def home(tmp_path: Path, redis: RedisProcess) -> Home:
    """A home folder whose workspace keeps its turns in Redis."""
    folder = tmp_path / "home"
    folder.mkdir()
    home = Home(folder)
    home.variables |= {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(redis.port)}
    home.variables |= {"MOLTBOT_DRAIN_GRACE": "1"}
    return home


def health(started: Started) -> tuple[int, Any]:
    """Return what the core says of itself."""
    return answer_of(f"{started.told()['metrics']}/health")


def answer_of(request: urllib.request.Request | str) -> tuple[int, Any]:
    """Return the status and the JSON of an answer, whatever it says."""
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def complete(started: Started) -> tuple[int, Any]:
    """Ask by the OpenAI API, and return the status and what was said."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
    key = (started.home.workspace / "key").read_text().strip()
    request = urllib.request.Request(
        f"{started.told()['http']}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    return answer_of(request)


async def until(started: Started, status: str) -> Any:
    """Wait until the core says that it is in such a state, and return all that it says."""
    async with asyncio.timeout(30):
        while True:
            try:
                found = await asyncio.to_thread(health, started)
            except OSError:  # it is being started
                found = (0, {})
            if found[1].get("status") == status:
                return found
            await asyncio.sleep(0.05)


async def test_a_first_start_without_redis_says_what_to_do_and_may_be_tried_again(
    home: Home, redis: RedisProcess
) -> None:
    await redis.kill()
    ended = await home.run("start", "--port", "0", "--grpc-port", "0", "--metrics-port", "0")
    assert ended.status == 69
    assert f"Redis at 127.0.0.1:{redis.port} does not answer (connection refused): start it, or" in ended.err
    assert "Traceback" not in ended.err


async def test_a_store_that_is_away_is_told_and_costs_a_question_ten_seconds(home: Home, redis: RedisProcess) -> None:
    place = f"Redis at 127.0.0.1:{redis.port}"
    async with home.started() as started:
        assert (await asyncio.to_thread(health, started))[1]["store"] == "ok"
        assert f"there        {place}" in (await home.run("status")).out
        await redis.kill()
        code, found = await until(started, "store away")
        assert (code, found["store"], found["store_address"]) == (503, "away: connection refused", place)
        said: Any = {"status": "ok"}
        async with asyncio.timeout(10):
            while said["status"] == "ok":
                code, said = await asyncio.to_thread(answer_of, f"{started.told()['http']}/health")
        assert (code, said["status"], said["store"]) == (200, "store away", "away")

        ended = await home.run("status", "--json")
        assert (ended.status, ended.json["healthy"], ended.json["core"]["healthy"]) == (1, False, True)
        assert (ended.json["store"]["healthy"], ended.json["store"]["where"]) == (False, place)
        assert ended.json["store"]["away_s"] >= 0
        told = (await home.run("status")).out
        assert f"AWAY         {place} for " in told
        assert f"start {place}" in told

        began = time.monotonic()
        asked, (status, refusal) = await asyncio.gather(home.run("chat", "Hi"), asyncio.to_thread(complete, started))
        assert (status, refusal["error"]["code"]) == (503, "storage_unavailable")
        assert "cannot reach its store" in refusal["error"]["message"]
        assert asked.status == 69
        assert f"the core cannot reach its store ({place}); waiting for it" in asked.err
        assert "the core cannot reach its store (Redis) now" in asked.err
        assert time.monotonic() - began < 20  # its patience is 10 s

        await redis.start()
        await until(started, "ok")
        assert (await home.run("chat", "Hi")).out == "You said: Hi\n"
        assert (await home.run("status")).status == 0
    assert started.said.count("Redis is away; turns are refused") == 1


async def test_the_page_says_that_the_store_is_away_and_goes_on_by_itself(home: Home, redis: RedisProcess) -> None:
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    away = "The server cannot reach its store. Trying again…"
    async with home.started() as started, chromium() as browser:
        link = urlsplit(next(link for link in re.findall(r"http://\S+", started.said) if "/login?code=" in link))
        async with visiting(browser, f"{link.scheme}://{link.netloc}", f"{link.path}?{link.query}") as visit:
            await ask(visit, "first words")
            await answered(visit)
            await redis.kill()
            await until(started, "store away")
            await visit.page.reload()
            banner = visit.page.locator(".away")
            await banner.get_by_text(away).wait_for()
            assert await visit.page.locator(".thread").inner_text() != ""
            await visit.page.get_by_role("button", name="New chat").first.click()
            await ask(visit, "second words")
            status = visit.page.locator(".answer .status")
            await status.get_by_text(away).wait_for(timeout=30_000)
            async with visit.page.expect_request("**/api/turns"):
                pass
            assert away in await status.inner_text()
            await redis.start()
            assert await answered(visit) == "You said: second words"
            await visit.page.get_by_role("link", name="first words").wait_for()
            await banner.get_by_text(away).wait_for(state="detached")
            assert visit.problems == []


async def test_an_answer_that_stands_still_because_of_the_store_says_so_and_goes_on(
    home: Home, redis: RedisProcess
) -> None:
    async with home.started() as started:
        process = await home.spawn("chat", "#100 pace=0.05")
        assert process.stdout is not None
        assert process.stderr is not None
        begun = await process.stdout.read(20)
        await redis.kill()
        async with asyncio.timeout(30):
            told = (await process.stderr.readline()).decode()
        assert told == (
            f"moltbot: the core cannot reach its store (Redis at 127.0.0.1:{redis.port}); "
            "the answer goes on when it can …\n"
        )
        await redis.start()
        async with asyncio.timeout(60):
            rest, complaints = await process.communicate()
        assert (process.returncode, complaints.decode()) == (0, "")
        assert len((begun + rest).decode().split()) == 100
        await until(started, "ok")


async def test_a_core_that_cannot_start_again_without_redis_is_tried_until_it_can(
    home: Home, redis: RedisProcess
) -> None:
    async with home.started() as started:
        await redis.kill()
        psutil.Process(started.told()["processes"]["core"]).kill()
        told = await started.line("cannot start as things are; it is tried again")
        assert 'how="ended with status 69"' in told
        assert started.process.returncode is None
        await redis.start()
        await until(started, "ok")
        assert (await home.run("chat", "Hi")).out == "You said: Hi\n"


async def test_a_redis_without_memory_is_told_as_a_store_that_takes_no_writes_and_once_by_the_log(
    home: Home, redis: RedisProcess
) -> None:
    place = f"Redis at 127.0.0.1:{redis.port}"
    async with home.started() as started, Redis(host="127.0.0.1", port=redis.port, protocol=2) as client:
        session = (await home.run("chat", "--json", "Hi")).json["session"]
        await client.config_set("maxmemory", "1mb")
        code, found = await until(started, "store away")
        problem = "its memory is used up, so it takes no writes (OOM): raise its maxmemory, or make room in it"
        assert (code, found["store"], found["store_address"]) == (503, f"away: {problem}", place)
        status, refusal = await asyncio.to_thread(complete, started)
        assert (status, refusal["error"]["code"]) == (507, "storage_full")
        asked = await home.run("chat", "Hi")
        assert (asked.status, asked.out) == (1, "")
        assert "Redis has no memory left: nothing was stored" in asked.err
        assert "cannot reach" not in asked.err

        ended = await home.run("status", "--json")
        assert (ended.status, ended.json["healthy"], ended.json["core"]["healthy"]) == (1, False, True)
        assert (ended.json["store"]["healthy"], ended.json["store"]["problem"]) == (False, problem)
        told = await home.run("status")
        assert told.status == 1
        assert f"AWAY         {place} for " in told.out
        assert problem in told.out
        assert "Nothing new is taken before Redis takes writes" in told.out
        assert "start Redis" not in told.out

        ended = await home.run("session", "delete", session)
        assert (ended.status, ended.out, ended.err) == (0, "1 session was deleted.\n", "")
        await client.config_set("maxmemory", "0")
        await until(started, "ok")
        assert (await home.run("chat", "--session", session, "Hi")).out == "You said: Hi\n"
        assert (await home.run("status")).status == 0
    for line in ("Redis takes no writes; turns are refused until it does again", "Redis takes writes again"):
        assert started.said.count(line) == 1
    assert "Redis refused a command" not in started.said
