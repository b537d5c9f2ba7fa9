"""How a benchmark is stopped: Ctrl-C says one line, ends what was begun, removes its folder and leaves with 130."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import psutil

STATUS = 130
_WAIT = 10.0
_AGAIN = 2.0
"""Seconds after which an interrupt that nothing came of is raised again."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_when_stopped() -> None:
    """Let a signal end this process at once: nothing was begun yet, and whatever it loads need not be told of it."""
    for number in _SIGNALS:
        signal.signal(number, _leave)


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Let the first signal raise KeyboardInterrupt in the body, and end whatever the body leaves behind.

    Signals after the first are not heard, for this process is about to end; after a body that ended by itself they mean
    what they meant before. Temporary folders of the body are made in one that is removed with it.
    Where the interpreter ignores what is raised, as while it frees an object, the interrupt is lost: it is raised again
    then, until the body has ended.
    """
    unraisable, known = sys.unraisablehook, set(psutil.Process().children())
    with tempfile.TemporaryDirectory(prefix="moltbot-bench-", ignore_cleanup_errors=True) as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        handlers = {number: signal.signal(number, _clean_up) for number in _SIGNALS}
        try:
            yield
        except KeyboardInterrupt:
            handlers.clear()
            raise
        finally:
            for number in (*_SIGNALS, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = unraisable
            # Between a process' start and whoever ends it in order a signal may have come.
            left = _begun_since(known)
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, _WAIT)
            tempfile.tempdir = before
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _begun_since(known: set[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that this one has begun, with all of theirs, except for those `known`."""
    found: list[psutil.Process] = []
    for process in set(psutil.Process().children()) - known:
        with suppress(psutil.NoSuchProcess):
            found += [process, *process.children(recursive=True)]
    return found


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    _say()
    os._exit(STATUS)


def _clean_up(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _say()
    sys.unraisablehook = _tell_others
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
    raise KeyboardInterrupt


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _tell_others(unraisable: sys.UnraisableHookArgs) -> None:
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _say() -> None:
    os.write(2, b"\nmoltbot: the benchmark was stopped; what it began is ended and removed.\n")
