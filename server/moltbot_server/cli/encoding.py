"""What the command line reads and writes is any text, whatever the locale says of the terminal."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys

_HANDLER = "moltbot.escaped"


def leave_ascii() -> None:
    """Begin again with UTF-8 where the locale knows ASCII alone, which most of what people say is not; may not return.

    The processes that are started from here get it, too.
    """
    done = os.environ.get("PYTHONUTF8") == "1" or sys.flags.ignore_environment
    if sys.getfilesystemencoding() == "ascii" and not done:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


def open_all() -> None:
    """Let an output that was closed take anything, and an input that was have nothing: `moltbot chat hi >&-`.

    What is opened next would have its number otherwise, and get what is meant for it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as we run
            setattr(sys, name, stream)


def take_anything() -> None:
    r"""Let both outputs write what their encoding lacks as `\u4f60`, which is the same text where it is JSON.

    What is typed and is no text is read with replacement characters.
    """
    codecs.register_error(_HANDLER, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def readable(word: str) -> bool:
    """Return whether an argument, a variable or a path is text in the encoding of the locale."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def replaced(text: str) -> str:
    """Return what was typed with a replacement character for each byte that is no text."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
