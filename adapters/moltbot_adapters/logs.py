"""Structured logs on stderr: a static message and fields, as text or as JSON."""

import json
import logging
import os
import sys
import time
from typing import Any

PROCESS = "MOLTBOT_PROCESS"
"""The variable by which whoever starts several adapters tells each what its lines are to call it, such as `http-2`."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str, as_json: bool) -> None:
    """Sends the logs of this process to stderr. Called once, before any channel exists."""
    handler = logging.StreamHandler(sys.stderr)
    process = os.environ.get(PROCESS, "")
    handler.setFormatter(JsonFormatter(process) if as_json else TextFormatter(process))
    # Libraries are heard when something is wrong: what they say at other levels is theirs, not fields of ours.
    logging.basicConfig(level=max(LEVELS[level], logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("moltbot").setLevel(LEVELS[level])
    logging.raiseExceptions = False  # a closed stderr must not turn into output of its own


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Returns the `extra` argument of a log call that carries these fields."""
    return {"fields": values}


def _timestamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    values: dict[str, Any] = getattr(record, "fields", {})
    return values


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object on one line."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; control characters are escaped, so a field cannot forge a second one."""
        entry: dict[str, Any] = {
            "@timestamp": _timestamp(record),
            "level": record.levelname.lower(),
            **self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Writes a record for people: `12:00:00 info http-2/http: message field=value`."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; text values are quoted with control characters escaped."""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("moltbot.")
        if self._process and name != self._process:
            name = f"{self._process}/{name}"
        message = json.dumps(record.getMessage(), ensure_ascii=False)[1:-1]
        values = "".join(f" {key}={_plain(value)}" for key, value in _fields(record).items())
        line = f"{at} {record.levelname.lower()} {name}: {message}{values}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _plain(value: object) -> str:
    text = str(value)
    bare = text.isascii() and text.isprintable() and " " not in text and '"' not in text
    return text if bare and text else json.dumps(text)
