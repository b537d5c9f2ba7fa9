"""One line an event, for people or as JSON, whatever the values hold."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from moltbot_server.logs import JsonFormatter, PlainFormatter, configure_logging


def record(message: str = "a turn failed", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("moltbot_server.pipeline", logging.ERROR, "x.py", 1, message, (), None)
    vars(made).update(fields)
    return made


def test_a_line_for_people_holds_level_place_message_and_fields() -> None:
    line = PlainFormatter().format(record(incident="ab12", seconds=0.5, note="two words", empty=""))

    assert line.partition(" ")[2] == 'error pipeline: a turn failed incident=ab12 seconds=0.5 note="two words" empty=""'


@pytest.mark.parametrize(
    "value", ["a\nb", "a\r\nERROR forged", "\x1b[2J", "a\tb", "a\u2028b", "\u202eevil", "\x00", 'a"b', "\x7f", "\x9b"]
)
def test_a_value_can_neither_end_the_line_nor_steer_the_terminal(value: str) -> None:
    line = PlainFormatter().format(record(value=value))

    assert line.isprintable()
    assert json.loads(line.partition("value=")[2]) == value


def test_chinese_is_shown_as_it_is() -> None:
    assert PlainFormatter().format(record(value="你好")).endswith("value=你好")


def test_a_line_of_json_has_what_an_elk_stack_reads() -> None:
    entry = json.loads(JsonFormatter().format(record(incident="ab12", value="a\nb", odd=object)))

    assert entry["level"] == "error"
    assert entry["logger"] == "moltbot_server.pipeline"
    assert entry["message"] == "a turn failed"
    assert (entry["incident"], entry["value"]) == ("ab12", "a\nb")
    assert entry["@timestamp"].endswith("Z")
    assert "\n" not in JsonFormatter().format(record(value="a\nb"))


def test_a_line_names_its_process_where_several_write() -> None:
    assert " error core/pipeline: a turn failed" in PlainFormatter("core").format(record())
    assert " error pipeline: a turn failed" in PlainFormatter("pipeline").format(record()), "not the same word twice"
    assert json.loads(JsonFormatter("core").format(record()))["process"] == "core"
    assert "process" not in json.loads(JsonFormatter().format(record()))


def test_a_traceback_comes_behind_its_line() -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        failed = record()
        failed.exc_info = sys.exc_info()

    assert "ValueError: inside" in PlainFormatter().format(failed)
    assert "ValueError: inside" in json.loads(JsonFormatter().format(failed))["exception"]


def test_logs_go_to_standard_error_from_the_wanted_level_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    ours = logging.getLogger("moltbot_server")
    levels = root.level, ours.level
    try:
        for as_json, level in ((False, "warning"), (True, "debug")):
            configure_logging(level, as_json=as_json)
            logging.getLogger("grpc._cython.cygrpc").info("what a library has to tell of its insides")
            assert logging.getLogger("moltbot_server.x").isEnabledFor(logging.DEBUG) == (level == "debug")
            logging.getLogger("moltbot_server.x").log(logging.INFO if level == "warning" else 5, "quiet")
            logging.getLogger("moltbot_server.x").warning("loud", extra={"n": 1})
            grpcio = logging.getLogger("grpc._cython.cygrpc")
            grpcio.error("Invalid encoding on %s", b"\xff what a stranger sent")
            grpcio.error("ExecuteBatchError raised in core by servicer method [/moltbot.v1.ChatService/RunTurn]")
    finally:
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
    out, err = capsys.readouterr()

    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("warning x: loud n=1")
    assert json.loads(lines[1])["n"] == 1
