"""What workers tell each other in a file: read by all, written by one at a time, of no use after a boot or a crash."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
from pathlib import Path

import msgspec
import pytest
from moltbot_server.models import board as boards
from moltbot_server.models.board import SIZE, Board
from moltbot_server.models.providers.cooldowns import Cause, Cooldowns, Place, Rest
from moltbot_server.models.routing.breaker import Breaker, BreakerState, Limits, Resting
from moltbot_server.models.routing.breakers import Breakers


class Fact(msgspec.Struct, array_like=True):
    """Something that workers know."""

    name: str
    number: int


def count(path: Path, times: int) -> None:
    """Add one to the number that stands there, so many times."""
    mine = Board(path, Fact)
    done = 0
    while done < times:
        with mine.held() as holds:
            facts = mine.read()
            assert facts is not None
            if holds:
                mine.write([Fact("sum", facts[0].number + 1)])
                done += 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a board is."""
    return tmp_path / "facts.board"


def write(board: Board[Fact], *facts: Fact) -> None:
    """Write facts."""
    with board.held() as holds:
        assert holds
        board.write(facts)


def test_what_one_writes_is_news_for_the_others_once(path: Path) -> None:
    one, other = Board(path, Fact), Board(path, Fact)
    assert not one.has_news
    assert not other.has_news
    assert other.read() is None
    write(one, Fact("a", 1))
    assert other.has_news
    assert not one.has_news
    assert other.read() == [Fact("a", 1)]
    assert not other.has_news
    write(other)
    assert one.read() == []
    assert path.stat().st_mode & 0o777 == 0o600


async def test_what_others_have_written_is_taken_over_by_the_owning_thread_alone(path: Path) -> None:
    one, other = (Cooldowns(lambda: 1000.0, Board(path, Rest)) for _ in range(2))
    one.failed(PLACE, Cause.LIMIT, 20)
    assert await asyncio.to_thread(len, other) == 0, "as metrics are asked for"
    assert len(other) == 1
    assert await asyncio.to_thread(len, other) == 1


def test_of_many_who_write_each_finds_what_the_one_before_has_written(path: Path) -> None:
    write(Board(path, Fact), Fact("sum", 0))
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=count, args=(path, 300)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert Board(path, Fact).read() == [Fact("sum", 900)]


def test_nothing_is_written_while_another_one_does(path: Path) -> None:
    one, other = Board(path, Fact), Board(path, Fact)
    with one.held() as holds, other.held() as too:
        assert (holds, too) == (True, False)
    with other.held() as then:
        assert then


def test_what_a_killed_worker_has_half_written_is_taken_for_nothing_until_somebody_writes(path: Path) -> None:
    one = Board(path, Fact)
    write(one, Fact("a", 1))
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"\xff\xff")
    newcomer = Board(path, Fact)
    assert newcomer.read() is None
    assert not newcomer.has_news, "it is not read again with each turn"
    write(one, Fact("b", 2))
    assert newcomer.has_news
    assert newcomer.read() == [Fact("b", 2)]


def test_a_file_that_somebody_cuts_ends_nobody_and_takes_nothing_back(path: Path) -> None:
    one, other = (Cooldowns(lambda: 1000.0, Board(path, Rest)) for _ in range(2))
    one.failed(PLACE, Cause.LIMIT, 20)
    assert other.rest(PLACE) == 20
    for size in (10, 0):
        os.truncate(path, size)
        assert one.rest(PLACE) == other.rest(PLACE) == 20
    one.failed(PLACE._replace(key="other"), Cause.LIMIT, 20)
    assert len(other) == 2, "who writes next mends it"


def test_a_file_that_somebody_fills_with_nonsense_is_mended_by_whoever_writes_next(path: Path) -> None:
    one, other = (Cooldowns(lambda: 1000.0, Board(path, Rest)) for _ in range(2))
    for nonsense in (b"\xff" * 5000, os.urandom(3000), bytes(100), b"\xff" * 2_000_000):
        path.write_bytes(nonsense)
        assert other.rest(PLACE) == 0
        one.failed(PLACE, Cause.LIMIT, 20)
        assert other.rest(PLACE) == 20
        other.forget_refusals()
        one._rests.clear()
        other._rests.clear()


def test_a_disk_without_room_leaves_each_what_it_knows(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, content: bytes, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    one, other = (Cooldowns(lambda: 1000.0, Board(path, Rest)) for _ in range(2))
    monkeypatch.setattr(os, "pwrite", full)
    one.failed(PLACE, Cause.LIMIT, 20)
    assert (one.rest(PLACE), other.rest(PLACE)) == (20, 0)
    assert "cannot tell each other" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_file_is_not_opened(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(OSError):  # noqa: PT011  (each has an errno of its own)
        Board(path, Fact)
    assert not (path.parent / "elsewhere").exists()


def test_who_reads_while_another_one_writes_hears_of_it_afterwards(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Board(path, Fact), Board(path, Fact)
    write(one, Fact("a", 1))
    write(one, Fact("a", 1))
    assert other.read() == [Fact("a", 1)]
    put, found = os.pwrite, []

    def slowly(descriptor: int, content: bytes, at: int) -> int:
        done = put(descriptor, content, at)
        found.append((other.has_news, other.read()))
        return done

    monkeypatch.setattr(os, "pwrite", slowly)
    write(one, Fact("b", 2))
    assert found == [(False, None), (True, [Fact("b", 2)])]


def test_what_cannot_be_understood_is_of_no_use(path: Path) -> None:
    class Other(msgspec.Struct, array_like=True):
        name: int

    write(Board(path, Fact), Fact("a", 1))
    assert Board(path, Other).read() is None


def test_what_was_written_before_the_machine_was_started_is_of_no_use(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Board(path, Fact), Fact("a", 1))
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr(boards, "_BOOT", boot)
    assert Board(path, Fact).read() == ()


def test_what_has_no_room_is_left_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = Board(path, Fact), Board(path, Fact)
    write(one, Fact("a", 1))
    write(one, Fact("b" * SIZE, 1))
    assert other.read() == [Fact("a", 1)]
    assert "more to tell each other" in caplog.text


# --- what stands there -----------------------------------------------------------------------------------------------

PLACE = Place("p", "m", "k")


def test_a_provider_that_one_worker_must_leave_alone_is_left_alone_by_all(path: Path) -> None:
    now = [1000.0]
    one, other = (Cooldowns(lambda: now[0], Board(path, Rest)) for _ in range(2))
    assert other.is_quiet
    one.failed(PLACE, Cause.LIMIT, 20)
    assert (other.is_quiet, other.rest(PLACE), other.cause(PLACE), len(other)) == (False, 20, Cause.LIMIT, 1)
    newcomer = Cooldowns(lambda: now[0], Board(path, Rest))
    assert newcomer.rest(PLACE) == 20
    now[0] += 20
    assert other.failed(PLACE, Cause.LIMIT) == 2, "it is the second one in a row"
    now[0] += 2
    newcomer.worked(PLACE)
    assert one.is_quiet
    assert other.is_quiet


def test_keys_that_were_refused_are_tried_again_by_all_when_somebody_has_changed_something(path: Path) -> None:
    one, other = (Cooldowns(lambda: 1000.0, Board(path, Rest)) for _ in range(2))
    one.failed(PLACE, Cause.CREDENTIAL)
    one.failed(PLACE._replace(key="limited"), Cause.LIMIT, 20)
    other.forget_refusals()
    assert one.rest(PLACE) == 0
    assert one.rest(PLACE._replace(key="limited")) == 20


def broken(breaker: Breaker, now: float, times: int = 5) -> None:
    """Let a model fail at once so many times."""
    for _ in range(times):
        breaker.failed(breaker.begin(now), now, "it broke")


def test_a_model_that_one_worker_puts_to_rest_is_tried_by_one_and_is_back_for_all(path: Path) -> None:
    one, other, third = (Breakers(lambda: 1.0, Board(path, Resting)) for _ in range(3))
    name, limits = ("route", "model"), Limits(cooldown=10.0)
    mine, theirs = one.of(*name, limits), other.of(*name, limits)
    late = theirs.begin(99.0)
    broken(mine, 100.0)
    assert other.has(*name)
    assert theirs.state(100.0) is BreakerState.OPEN
    assert (theirs.rest(100.0), theirs.reason) == (mine.rest(100.0), "it broke")
    assert not theirs.is_last_resort
    theirs.failed(late, 101.0, "too late")
    assert theirs.rest(100.0) == mine.rest(100.0), "what was under way says nothing new"
    assert not third.has(*name)
    assert third.of(*name, limits).state(100.0) is BreakerState.OPEN, "a worker that comes later knows as well"

    then = 100.0 + mine.rest(100.0)
    assert theirs.may_ask(then)
    assert mine.may_ask(then)
    trial = theirs.begin(then)
    assert trial.probe
    assert one.has(*name)
    assert not mine.may_ask(then), "another worker tries it"
    theirs.failed(trial, then, "it broke again")
    assert one.has(*name)
    assert mine.rest(then) == theirs.rest(then) == 9.0

    trial = mine.begin(then + 9.0)
    mine.spoke(trial, then + 9.5, in_time=True)
    for breakers in (one, other, third):
        assert breakers.has(*name)
        assert breakers.of(*name, limits).state(then + 9.5) is BreakerState.CLOSED
    broken(theirs, then + 10.0)
    assert theirs.rest(then + 10.0) == 9.0, "it broke again soon after, which the others have seen"


def test_what_is_known_of_a_model_is_forgotten_by_all(path: Path) -> None:
    one, other = (Breakers(lambda: 1.0, Board(path, Resting)) for _ in range(2))
    limits = Limits()
    for model in ("a", "b"):
        broken(one.of("kept", model, limits), 100.0)
    broken(one.of("gone", "a", limits), 100.0)
    other.has("kept", "a")
    one.forget("b")
    one.retain(["kept"])
    other.has("kept", "a")
    resting = {name: other.of(*name, limits).is_open for name in (("kept", "a"), ("kept", "b"), ("gone", "a"))}
    assert resting == {("kept", "a"): True, ("kept", "b"): False, ("gone", "a"): False}
