"""`moltbot chat` where more happens than words: thoughts, a switch of the model, an answer that begins anew."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from cli_process import Home
from cli_terminal import terminal
from google.protobuf.duration_pb2 import Duration
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2, model_pb2, model_pb2_grpc

DIM, BRIGHT = "\x1b[2m", "\x1b[22m"
REASON = "no first token within 3000 ms"
ANEW = "moltbot: what was written so far is void, the answer begins anew: it broke off\n"


class TellingCore(chat_pb2_grpc.ChatServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """A core that tells the same events of every turn."""

    def __init__(self, *events: chat_pb2.Event) -> None:
        self._events = [chat_pb2.Event(accepted=chat_pb2.Accepted(turn="sessions/s/turns/1", session="sessions/s"))]
        self._events += events
        for sequence, event in enumerate(self._events, 1):
            event.sequence = sequence

    async def StreamTurn(  # noqa: N802 (the contract's name)
        self, request: chat_pb2.StreamTurnRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[chat_pb2.StreamTurnResponse]:
        for event in self._events:
            yield chat_pb2.StreamTurnResponse(event=event)

    async def ListModels(  # noqa: N802 (the contract's name)
        self, request: model_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="models/a", display_name="A")])


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home folder in which nothing runs."""
    return Home(tmp_path, {"MOLTBOT_KEY": "mb_live_x"})


@asynccontextmanager
async def telling(home: Home, *events: chat_pb2.Event) -> AsyncIterator[None]:
    """Serve a core that tells these events; the home's commands find it."""
    server = grpc.aio.server()
    core = TellingCore(*events)
    chat_pb2_grpc.add_ChatServiceServicer_to_server(core, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(core, server)
    home.variables["MOLTBOT_ADDRESS"] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def _text(text: str) -> chat_pb2.Event:
    return chat_pb2.Event(text_delta=chat_pb2.TextDelta(text=text))


def _thought(text: str) -> chat_pb2.Event:
    return chat_pb2.Event(reasoning_delta=chat_pb2.ReasoningDelta(text=text))


def _reset(text: str) -> chat_pb2.Event:
    return chat_pb2.Event(reset=chat_pb2.Reset(text=text, reason="it broke off"))


def _end(text: str, **fields: object) -> chat_pb2.Event:
    completed = chat_pb2.Completed(text=text, finish_reason=message_pb2.FINISH_REASON_STOP, **fields)  # type: ignore[arg-type]
    return chat_pb2.Event(completed=completed)


SWITCH = chat_pb2.Event(
    notice=chat_pb2.Notice(code="FAILOVER", **{"from": "models/opus"}, to="models/gpt", reason=REASON)
)


WARNING = chat_pb2.Event(notice=chat_pb2.Notice(code="BUDGET", reason="The workspace has used 90 % of its\nbudget."))


async def test_a_pipe_gets_the_answer_alone(home: Home) -> None:
    async with telling(home, _thought("Hm."), _text("Hello"), _end("Hello", reasoning="Hm.")):
        ended = await home.run("chat", "Hi")
    assert (ended.status, ended.out, ended.err) == (0, "Hello\n", "")


async def test_notices_of_a_single_question_are_a_line_each_beside_the_answer(home: Home) -> None:
    async with telling(home, WARNING, SWITCH, _text("Hello"), _end("Hello")):
        ended = await home.run("chat", "Hi")
        told = await home.run("chat", "--json", "Hi")
    assert (ended.status, ended.out) == (0, "Hello\n")
    assert ended.err.splitlines() == [
        "moltbot: The workspace has used 90 % of its budget.",
        f"moltbot: switched from opus to gpt: {REASON}",
    ]
    assert told.err == ""
    assert told.json["notices"] == [
        {"code": "BUDGET", "from": "", "to": "", "reason": "The workspace has used 90 % of its\nbudget."},
        {"code": "FAILOVER", "from": "models/opus", "to": "models/gpt", "reason": REASON},
    ]


async def test_what_is_told_beside_an_answer_is_dim_at_a_terminal_and_apart_from_it(home: Home) -> None:
    queued = chat_pb2.Event(queued=chat_pb2.Queued(position=3))
    events = (queued, SWITCH, _thought("Let me"), _thought(" see."), _text("Hel"), _text("lo"), _end("Hello"))
    async with telling(home, *events), terminal(home, "Hi") as screen:
        await screen.until("Hello\r\n")
        assert screen.shown == (
            f"{DIM}[3 are ahead]{BRIGHT}\r\n{DIM}[switched from opus to gpt: {REASON}]{BRIGHT}\r\n"
            f"{DIM}Let me{BRIGHT}{DIM} see.{BRIGHT}\r\nHello\r\n"
        )


async def test_a_terminal_without_colours_gets_none(home: Home) -> None:
    home.variables["NO_COLOR"] = "1"
    async with telling(home, SWITCH, _text("Hello"), _end("Hello")), terminal(home, "Hi") as screen:
        await screen.until("Hello\r\n")
        assert screen.shown == f"[switched from opus to gpt: {REASON}]\r\nHello\r\n"


async def test_nothing_that_is_told_can_command_the_terminal(home: Home) -> None:
    red = "\x1b[31m"
    notice = chat_pb2.Event(notice=chat_pb2.Notice(code="X", reason=f"{red}reason"))
    events = (notice, _thought(f"{red}thought"), _text(f"{red}text"), _end("text"))
    async with telling(home, *events), terminal(home, "Hi") as screen:
        await screen.until("[31mtext")
        assert red not in screen.shown


async def test_an_answer_that_begins_anew_is_printed_anew(home: Home) -> None:
    events = (_text("Half an"), _reset(""), _text("Whole"), _end("Whole"))
    async with telling(home, *events):
        ended = await home.run("chat", "Hi")
        assert (ended.status, ended.out, ended.err) == (0, "Half an\nWhole\n", ANEW)
        assert (await home.run("chat", "--json", "Hi")).json["text"] == "Whole"
        async with terminal(home, "Hi") as screen:
            await screen.until("Whole\r\n")
            assert screen.shown == f"Half an\r\n{DIM}[the answer begins anew]{BRIGHT}\r\nWhole\r\n"


async def test_an_answer_that_goes_on_elsewhere_is_printed_once(home: Home) -> None:
    async with telling(home, _text("Half an"), _reset("Half an answer"), _text("."), _end("Half an answer.")):
        ended = await home.run("chat", "Hi")
    assert (ended.out, ended.err) == ("Half an answer.\n", "")


async def test_an_answer_that_says_the_same_once_more_is_printed_once(home: Home) -> None:
    again = (_text("Ha"), _text("lf an ans"), _text("wer."))
    async with telling(home, _text("Half"), _text(" an"), _reset(""), *again, _end("Half an answer.")):
        ended = await home.run("chat", "Hi")
        assert (ended.out, ended.err) == ("Half an answer.\n", "")
    async with telling(home, _text("Half an"), _reset(""), _text("Half"), _end("Half")):
        ended = await home.run("chat", "Hi")
        assert (ended.out, ended.err) == ("Half an\nHalf\n", ANEW)
    async with telling(home, _text("Half an"), _reset(""), _text("Half"), _reset("H"), _text("all"), _end("Hall")):
        ended = await home.run("chat", "Hi")
        assert (ended.out, ended.err) == ("Half an\nHall\n", ANEW)


async def test_blanks_that_are_taken_back_are_not_worth_a_word(home: Home) -> None:
    async with telling(home, _text("\n"), _reset(""), _text("Whole"), _end("Whole")):
        ended = await home.run("chat", "Hi")
    assert (ended.out, ended.err) == ("\nWhole\n", "")


async def test_a_conversation_shows_switches_and_thoughts_too(home: Home) -> None:
    events = (SWITCH, _thought("Hm."), _text("Half"), _reset("Whole"), _end("Whole"))
    async with telling(home, *events), terminal(home) as screen:
        place = await screen.until("Ctrl-D leaves")
        screen.type("Hi\r")
        place = await screen.until(f"{DIM}[switched from opus to gpt: {REASON}]{BRIGHT}", after=place)
        place = await screen.until(f"{DIM}Hm.{BRIGHT}", after=place)
        await screen.until(f"Half\r\n{DIM}[the answer begins anew]{BRIGHT}\r\nWhole", after=place)


async def test_json_tells_thoughts_the_models_asked_and_whether_the_answer_was_kept(home: Home) -> None:
    log = [
        chat_pb2.Attempt(model="models/opus", outcome="MODEL_UNAVAILABLE", reason="HTTP 503", total=_ms(5)),
        chat_pb2.Attempt(model="models/gpt", outcome="ANSWERED", start=_ms(5), first_token=_ms(2), total=_ms(9)),
    ]
    end = _end("Hello", reasoning="Hm.", model="models/gpt", timings=chat_pb2.Timings(attempts=2, attempt_log=log))
    async with telling(home, end):
        told = json.loads((await home.run("chat", "--json", "Hi")).out)
    assert (told["reasoning"], told["cached"], told["model"], told["timings"]["attempts"]) == (
        "Hm.",
        False,
        "models/gpt",
        2,
    )
    assert told["attempts"] == [
        {
            "model": "models/opus",
            "outcome": "MODEL_UNAVAILABLE",
            "reason": "HTTP 503",
            "start_ms": 0,
            "first_token_ms": None,
            "total_ms": 5,
        },
        {
            "model": "models/gpt",
            "outcome": "ANSWERED",
            "reason": "",
            "start_ms": 5,
            "first_token_ms": 2,
            "total_ms": 9,
        },
    ]
    async with telling(home, _end("Hello", cached=True)):
        assert (await home.run("chat", "--json", "Hi")).json["cached"] is True


def _ms(milliseconds: int) -> Duration:
    return Duration(nanos=milliseconds * 1_000_000)
