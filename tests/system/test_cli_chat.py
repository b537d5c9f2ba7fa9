"""`moltbot chat`: one question for scripts, and a conversation at a terminal."""

import asyncio
import json
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from cli_process import Home, Started
from cli_terminal import terminal
from moltbot import MoltBot
from moltbot_server.cli.asking import Place
from moltbot_server.cli.running import Running
from moltbot_server.cli.talking import Talk
from moltbot_server.workspace import Workspace

RED = "\x1b[31m"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """A home folder with a MoltBot that runs, for all tests of this file."""
    home = Home(tmp_path_factory.mktemp("home"))
    script = home.folder / "script.yaml"
    script.write_text("rules: [{match: '^At length', template: 'On and on', finish_reason: length}]\n")
    home.variables["MODEL_PATH"] = str(script)
    async with home.started():
        yield home.folder


@pytest.fixture
def home(folder: Path) -> Home:
    """The home with variables of one's own."""
    return Home(folder)


async def test_one_question_gets_the_answers_text_and_nothing_else(home: Home) -> None:
    ended = await home.run("chat", "Hi there")
    assert (ended.status, ended.out, ended.err) == (0, "You said: Hi there\n", "")


async def test_the_text_may_come_from_a_pipe(home: Home) -> None:
    assert (await home.run("chat", text="你好\n")).out == "You said: 你好\n"
    assert (await home.run("chat", "-", text="Hi")).out == "You said: Hi\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
async def test_output_that_cannot_be_written_is_told_in_one_line(home: Home) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    process = await home.spawn("chat", "Hi there", stdout=full)
    os.close(full)
    _, err = await process.communicate()
    assert (process.returncode, err.decode()) == (1, "moltbot: cannot write the output: No space left on device\n")


async def test_nothing_to_say_is_a_wrong_use(home: Home) -> None:
    ended = await home.run("chat", text=" \n")
    assert (ended.status, ended.out) == (2, "")
    assert "there is nothing to say" in ended.err


TOO_LONG = "that is too long: 5,000,"


async def test_a_text_that_the_core_does_not_take_at_once_is_told_with_the_limit(home: Home) -> None:
    ended = await home.run("chat", text="a" * 5_000_000)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith(f"moltbot: {TOO_LONG}")
    assert "4,194,304 at once (`max_message_bytes`" in ended.err
    assert ended.err.count("\n") == 1
    error = (await home.run("chat", "--json", text="a" * 5_000_000)).json["error"]
    assert error["message"].startswith(TOO_LONG)
    assert error["code"] == "RESOURCE_EXHAUSTED"


async def test_a_conversation_goes_on_after_a_text_that_is_too_long(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(folder=home.workspace)
    running = Running.read(workspace)
    assert running is not None
    place = Place(address=running.grpc, key=workspace.read_key())
    said = iter(["one", "a" * 5_000_000, "two"])

    async def read() -> str:
        if (text := next(said, None)) is None:
            raise EOFError
        return text

    conversation = Talk(place, session="sessions/long", model="")
    async with conversation.bot as bot:
        await conversation.run(read)
        kept = [message.parts[0].text async for message in bot.messages("sessions/long")]
    shown = capsys.readouterr()
    assert kept == ["one", "You said: one", "two", "You said: two"]
    assert shown.err.startswith(f"! {TOO_LONG}")


async def test_an_answer_that_is_empty_or_was_cut_is_told_beside_the_answer(home: Home) -> None:
    ended = await home.run("chat", "#0")
    assert (ended.status, ended.out.strip(), ended.err) == (0, "", "moltbot: the answer is empty\n")
    ended = await home.run("chat", "At length")
    assert (ended.out, ended.err) == ("On and on\n", "moltbot: the answer was cut at the limit of its length\n")
    assert (await home.run("chat", "--json", "At length")).err == ""


async def test_json_is_one_object_with_all_that_is_known(home: Home) -> None:
    reply = (await home.run("chat", "--json", "--session", "plan", "Hi")).json
    assert reply["text"] == "You said: Hi"
    assert (reply["session"], reply["turn"]) == ("sessions/plan", "sessions/plan/turns/1")
    assert (reply["model"], reply["finish_reason"]) == ("models/scripted", "stop")
    assert reply["usage"]["output_tokens"] > 0
    assert reply["timings"]["total_ms"] > 0
    assert (await home.run("chat", "--json", "--session", "plan", "Hi")).json["timings"]["history_messages"] == 2


async def test_events_are_json_lines_of_the_contracts_events(home: Home) -> None:
    lines = [json.loads(line) for line in (await home.run("chat", "--events", "#3 pace=0.01")).out.splitlines()]
    kinds = [next(key for key in line if key not in ("sequence", "create_time")) for line in lines]
    assert (kinds[0], kinds[-1]) == ("accepted", "completed")
    text = "".join(line["text_delta"]["text"] for line in lines if "text_delta" in line)
    assert text == lines[-1]["completed"]["text"] == "one two three"


async def test_a_failure_ends_with_a_message_in_words_or_as_json(home: Home) -> None:
    ended = await home.run("chat", "#5 fail=2")
    assert (ended.status, ended.out) == (69, "one two\n")
    assert ended.err.startswith("moltbot: ")
    assert "(MODEL_UNAVAILABLE)" in ended.err
    assert "answer is kept" not in ended.err, "it has failed, and none comes"
    assert (await home.run("chat", "--session", "broken", "#5 fail=2")).status == 69
    shown = (await home.run("session", "show", "broken")).out
    assert shown.endswith("\n(There is no answer: the turn has failed, or was cancelled before its first word.)\n")
    ended = await home.run("chat", "--json", "#5 fail=2")
    assert (ended.status, ended.err) == (69, "")
    assert (ended.json["error"]["reason"], ended.json["error"]["retryable"]) == ("MODEL_UNAVAILABLE", True)
    ended = await home.run("chat", "--model", "nobody", "Hi")
    assert ended.status == 1
    assert "(MODEL_NOT_FOUND)" in ended.err


async def test_a_key_that_the_core_does_not_know_is_not_allowed(home: Home) -> None:
    home.variables["MOLTBOT_KEY"] = "mb_live_wrong"
    ended = await home.run("chat", "Hi")
    assert (ended.status, ended.out) == (77, "")
    assert "MoltBot does not know the key in MOLTBOT_KEY: unset that" in ended.err


@pytest.mark.parametrize("text", ["ключ", "\udcff", "mb_live_\x07"])
async def test_what_cannot_be_a_key_is_told_before_anything_is_asked(home: Home, text: str) -> None:
    home.variables["MOLTBOT_KEY"] = text
    for words in (("chat", "Hi"), ("model", "list"), ("session", "list")):
        ended = await home.run(*words)
        assert (ended.status, ended.out) == (77, "")
        assert ended.err.startswith("moltbot: what MOLTBOT_KEY holds is no key: unset that")
    assert (await home.run("chat", "--json", "Hi")).json["error"]["code"] == "UNAUTHENTICATED"


@pytest.mark.parametrize("words", [("bad\udcff",), ("--session", "s\udcff", "Hi"), ("--model", "m\udcff", "Hi")])
async def test_bytes_that_are_no_text_are_a_wrong_use(home: Home, words: tuple[str, ...]) -> None:
    ended = await home.run("chat", *words)
    assert (ended.status, ended.out) == (2, "")
    assert r"\xff' is no text in UTF-8" in ended.err


async def test_an_answer_is_told_whatever_the_locale_knows(home: Home) -> None:
    home.variables |= {"LC_ALL": "C", "PYTHONUTF8": "0"}
    assert (await home.run("chat", "你好")).out == "You said: 你好\n"
    home.variables["PYTHONIOENCODING"] = "ascii"
    assert (await home.run("chat", "你好")).out == "You said: \\u4f60\\u597d\n"
    ended = await home.run("chat", "--json", "é👍")
    assert (ended.out.isascii(), ended.json["text"]) == (True, "You said: é👍")


async def test_a_line_that_is_no_text_does_not_end_a_conversation(home: Home) -> None:
    async with terminal(home) as screen:
        place = await screen.until("Ctrl-D leaves")
        screen.type("\udcff\udcfe hi\r")
        place = await screen.until("You said: \ufffd\ufffd hi", after=place)
        screen.type("Still there?\r")
        await screen.until("You said: Still there?", after=place)


async def test_an_address_may_be_given_or_come_from_the_environment(home: Home) -> None:
    address = Started(home, None).told()["grpc"]  # type: ignore[arg-type]  # only what it tells is read
    assert (await home.run("chat", "--address", address, "Hi")).out == "You said: Hi\n"
    home.variables["MOLTBOT_ADDRESS"] = "127.0.0.1:1"
    assert "nothing answers at 127.0.0.1:1" in (await home.run("chat", "Hi")).err


@pytest.mark.parametrize("name", ["http", "metrics"])
async def test_the_address_of_an_http_port_is_told_to_be_no_core(home: Home, name: str) -> None:
    http = Started(home, None).told()[name].removeprefix("http://")  # type: ignore[arg-type]  # only what it tells
    ended = await home.run("chat", "--address", http, "Hi")
    assert (ended.status, ended.out) == (69, "")
    assert f"{http} does not speak gRPC" in ended.err


async def test_a_workspace_where_nothing_runs_does_not_speak_to_the_core_of_another(home: Home) -> None:
    await home.run("init", "--workspace", "other")
    port = Started(home, None).told()["grpc"].rpartition(":")[2]  # type: ignore[arg-type]  # only what it tells is read
    (home.folder / "other" / ".env").write_text(f"MOLTBOT_GRPC_PORT={port}\n")
    ended = await home.run("chat", "--workspace", "other", "Hi")
    assert (ended.status, ended.out) == (69, "")
    assert "MoltBot is not running in ~/other: start it with" in ended.err
    assert "start --workspace ~/other`" in ended.err


async def test_ctrl_c_cancels_the_turn_and_keeps_what_was_said(home: Home) -> None:
    process = await home.spawn("chat", "--session", "cut", "#1000 pace=0.02")
    assert process.stdout is not None
    first = await process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(10):
        rest, err = await process.communicate()
    assert process.returncode == 130
    assert err == b""
    assert (first + rest).startswith(b"one")
    reply = (await home.run("chat", "--session", "cut", "--json", "Hi")).json
    assert reply["timings"]["history_messages"] == 2  # the cut answer is part of the session


async def test_a_second_ctrl_c_leaves_a_core_that_does_not_answer(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = await home.spawn("chat", "--address", f"127.0.0.1:{server.getsockname()[1]}", "Hi")
        async with asyncio.timeout(20):
            # The first only looks whether somebody is there; the second is the channel, which gets no answer.
            connections = [(await asyncio.to_thread(server.accept))[0] for _ in range(2)]
            ended = asyncio.create_task(process.communicate())
            while not ended.done():  # two signals at the same moment would count as one
                process.send_signal(signal.SIGINT)
                await asyncio.wait({ended}, timeout=0.3)
        for connection in connections:
            connection.close()
        assert process.returncode == 130
        assert (await ended)[1] == b""


async def test_a_conversation_streams_remembers_and_is_left_by_ctrl_d(home: Home) -> None:
    async with terminal(home) as screen:
        place = await screen.until("Ctrl-D leaves")
        screen.type("Hello you\r")
        place = await screen.until("You said: Hello you", after=place)
        screen.type("/sessions\r")
        place = await screen.until("Hello you", after=place + 20)
        screen.type("/new\r")
        place = await screen.until("A new conversation.", after=place)
        screen.type("/sessions 1\r")
        place = await screen.until("bot: You said: Hello you", after=place)
        screen.type("/nonsense\r")
        place = await screen.until("/nonsense is no command", after=place)
        screen.type("//slash\r")
        place = await screen.until("You said: /slash", after=place)
        screen.type("/help\r")
        place = await screen.until("/quit            leave", after=place)
        await screen.until("You", after=place)  # before the prompt, Ctrl-D is no key yet
        screen.type("\x04")
        async with asyncio.timeout(10):
            assert await screen.process.wait() == 0
    history = home.workspace / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "Hello you" in history.read_text()


async def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(home: Home) -> None:
    async with terminal(home) as screen:
        place = await screen.until("Ctrl-D leaves")
        screen.type("#1000 pace=0.02\r")
        place = await screen.until("one two", after=place)
        screen.type("\x03")
        place = await screen.until("[stopped]", after=place)
        screen.type("Still there?\r")
        place = await screen.until("You said: Still there?", after=place)
        screen.type("/quit\r")
        async with asyncio.timeout(10):
            assert await screen.process.wait() == 0


async def test_a_conversation_tells_of_a_cut_answer_a_wrong_number_and_a_list_that_is_cut_off(home: Home) -> None:
    address = Started(home, None).told()["grpc"]  # type: ignore[arg-type]  # only what it tells is read
    async with MoltBot(address, (home.workspace / "key").read_text().strip()) as bot:
        for _ in range(20):
            await bot.run_turn("Hi", channel="cli")
    async with terminal(home) as screen:
        place = await screen.until("Ctrl-D leaves")
        screen.type("/sessions 999\r")
        place = await screen.until("There is no number 999: the list goes from 1 to 20", after=place)
        screen.type("At length\r")
        place = await screen.until("! the answer was cut at the limit of its length", after=place)
        screen.type("/sessions\r")
        place = await screen.until("These are the 20 used last; there are older ones.", after=place)
        screen.type("/sessions 1\r")
        await screen.until("bot: On and on", after=place)


async def test_a_refusal_in_a_conversation_is_told_and_the_conversation_goes_on(home: Home) -> None:
    async with terminal(home) as screen:
        place = await screen.until("Ctrl-D leaves")
        screen.type("#5 fail=2\r")
        place = await screen.until("(MODEL_UNAVAILABLE)", after=place)
        screen.type("/model nobody\r")
        place = await screen.until("(MODEL_NOT_FOUND)", after=place)
        screen.type("/model scripted\r")
        place = await screen.until("From now on", after=place)
        screen.type("Hi\r")
        await screen.until("You said: Hi", after=place)


async def test_who_waits_behind_an_answer_is_told(home: Home) -> None:
    async with terminal(home, "--session", "busy", "#120 pace=0.05") as first:
        await first.until("one two")
        async with terminal(home, "--session", "busy", "and me?") as second:
            place = await second.until("[one is ahead; waiting for its end]")
            shown = await home.run("session", "show", "busy")
            assert shown.out.endswith("\n(An answer is being written, or waits for its turn.)\n")
            told = (await home.run("session", "show", "busy", "--json")).json
            assert told["session"]["active_turn"].startswith("sessions/busy/turns/")
            await second.until("You said: and me?", after=place)


async def test_an_answer_cannot_command_the_terminal_but_reaches_a_file_as_it_is(home: Home) -> None:
    async with terminal(home, f"{RED}red") as screen:
        await screen.until("[31mred")
        async with asyncio.timeout(10):
            await screen.process.wait()
        assert RED not in screen.shown
    assert (await home.run("chat", f"{RED}red")).out == f"You said: {RED}red\n"


async def test_a_conversation_whose_output_goes_to_a_file_leaves_the_answers_alone_there(
    home: Home, tmp_path: Path
) -> None:
    file = tmp_path / "answers"
    async with terminal(home, file=file) as screen:
        place = await screen.until("Ctrl-D leaves")
        place = await screen.until("You", after=place)
        screen.type("Hello\r")
        place = await screen.until("Hello", after=place)
        place = await screen.until("You", after=place)
        screen.type("\x04")
        async with asyncio.timeout(10):
            assert await screen.process.wait() == 0
    assert file.read_text() == "You said: Hello\n\n"
