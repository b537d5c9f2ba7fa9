"""Logs: one line an event on standard error, for people or as JSON. The text is static; what varies is in fields."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class PlainFormatter(logging.Formatter):
    """`12:00:00 info core/sessions: message field=value`: the process, the place in it, what happened."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, its traceback behind it."""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("moltbot_server.")
        if self._process and name != self._process:
            name = f"{self._process}/{name}"
        fields = "".join(f" {key}={_shown(value)}" for key, value in _fields(record))
        line = f"{at} {record.levelname.lower()} {name}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for an ELK stack: `@timestamp`, `level`, `process`, `logger`, `message`, the fields."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "@timestamp": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **dict(_fields(record)),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logging(level: str, *, as_json: bool, process: str = "") -> None:
    """Send all logs to standard error. Called once, before anything else runs.

    `process` is what the lines call this process: several write to one terminal.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if as_json else PlainFormatter(process))
    handler.addFilter(is_telling)
    wanted = logging.getLevelName(level.upper())
    # Libraries are heard when something is wrong; what they have to tell of their insides drowns what is ours.
    logging.basicConfig(level=max(wanted, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("moltbot_server").setLevel(wanted)


# What grpcio logs as its own errors, with a traceback each time, though it is what strangers do at any time: metadata
# that is no text, and a caller that leaves while its answer is written.
_OF_CALLERS = ("Invalid encoding on", "ExecuteBatchError raised in core by servicer method")


def is_telling(record: logging.LogRecord) -> bool:
    """Return False for what grpcio logs of callers' doings, which would let them fill the log."""
    return not (record.name.startswith("grpc.") and str(record.msg).startswith(_OF_CALLERS))


def _fields(record: logging.LogRecord) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in vars(record).items() if key not in _STANDARD]


def _shown(value: Any) -> str:
    text = str(value)
    plain = text and text.isprintable() and not any(c in ' "' for c in text)
    # Quoted, a value can neither end the line nor move a terminal's cursor.
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())
