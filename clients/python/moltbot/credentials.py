"""Where a client finds the core and its key when it is told neither."""

from __future__ import annotations

import json
import os
from pathlib import Path

import grpc

from moltbot.errors import MoltBotClientError

DEFAULT_ADDRESS = "127.0.0.1:50051"


def find_address() -> str:
    """Return the address of the variable `MOLTBOT_ADDRESS`, or else of what runs in this user's workspace.

    Where nothing runs there, it is the address that `moltbot start` takes by default.
    """
    if told := os.environ.get("MOLTBOT_ADDRESS", "").strip():
        return told
    try:
        running = json.loads((_workspace() / "run" / "start.json").read_text("utf-8"))
        return str(running["grpc"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_ADDRESS


def find_key() -> str:
    """Return the key of the variable `MOLTBOT_KEY`, or else that of this user's workspace.

    The workspace is the folder of `MOLTBOT_WORKSPACE`, or `./.moltbot` if it exists, or `~/.moltbot`.

    Raises:
        MoltBotClientError: there is no key, UNAUTHENTICATED with the reason NO_KEY.
    """
    if key := os.environ.get("MOLTBOT_KEY", "").strip():
        return key
    try:
        return (_workspace() / "key").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MoltBotClientError(
            grpc.StatusCode.UNAUTHENTICATED,
            f"no key: pass key=..., set MOLTBOT_KEY, or make a workspace with `moltbot init` ({error})",
            reason="NO_KEY",
        ) from None


def _workspace() -> Path:
    named, here = os.environ.get("MOLTBOT_WORKSPACE"), Path.cwd() / ".moltbot"
    return Path(named).expanduser() if named else here if here.is_dir() else Path.home() / ".moltbot"
