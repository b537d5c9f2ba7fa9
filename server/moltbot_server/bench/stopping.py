"""How a benchmark is stopped: Ctrl-C says one line, ends what was begun, removes its folder and leaves with 130."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import psutil

STATUS = 130
_WAIT = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_when_stopped() -> None:
    """Let a signal end this process at once: nothing was begun yet, and whatever it loads need not be told of it."""
    for number in _SIGNALS:
        signal.signal(number, _leave)


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Let the first signal raise KeyboardInterrupt in the body, and end whatever the body leaves behind.

    Signals after the first are not heard. Temporary folders of the body are made in one that is removed with it.
    """
    with tempfile.TemporaryDirectory(prefix="moltbot-bench-", ignore_cleanup_errors=True) as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        for number in _SIGNALS:
            signal.signal(number, _clean_up)
        try:
            yield
        finally:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            # Between a process' start and whoever ends it in order a signal may have come.
            left = psutil.Process().children(recursive=True)
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, _WAIT)
            tempfile.tempdir = before


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    _say()
    os._exit(STATUS)


def _clean_up(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _say()
    raise KeyboardInterrupt


def _say() -> None:
    os.write(2, b"\nmoltbot: the benchmark was stopped; what it began is ended and removed.\n")
