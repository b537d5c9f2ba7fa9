"""The short commands: what they print, how they end, and that each message says what to do next."""

import asyncio
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
from asyncio.subprocess import PIPE
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread

import pytest
from cli_process import ANY_PORTS, COMMAND, Ended, Home
from moltbot_server.auth.vault import Vault
from moltbot_server.config import defaults
from moltbot_server.testing import free_port
from moltbot_server.workspace import Workspace


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home folder."""
    return Home(tmp_path)


async def test_version_is_told_in_words_and_as_json(home: Home) -> None:
    number = metadata.version("moltbot")
    assert (await home.run("version")).out.startswith(f"moltbot {number} ")
    assert (await home.run("version", "--json")).json["moltbot"] == number
    assert (await home.run("--version")).out == (await home.run("version")).out


def test_version_takes_less_than_three_tenths_of_a_second(home: Home) -> None:
    def seconds() -> float:
        process = subprocess.Popen([*COMMAND, "version"], stdout=subprocess.DEVNULL, env=home.environ)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        return usage.ru_utime + usage.ru_stime  # its own time, whatever else this machine does

    assert min(seconds() for _ in range(3)) < 0.3


def test_the_supervisor_loads_neither_model_nor_grpc_nor_asyncio() -> None:
    heavy = "{'ctranslate2', 'grpc', 'google', 'asyncio', 'yaml', 'numpy'}"
    code = f"import sys, moltbot_server.cli.starting; print(*sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


async def test_init_makes_a_private_workspace_once_and_names_the_next_command(home: Home) -> None:
    first = await home.run("init")
    assert (first.status, first.err) == (0, "")
    assert "Next:" in first.out
    assert " start" in first.out
    key = home.workspace / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    text = key.read_text()
    again = await home.run("init")
    assert (again.status, key.read_text()) == (0, text)
    assert "nothing was changed" in again.out


async def test_init_tells_of_a_vault_whose_key_is_lost_and_does_not_call_the_workspace_complete(home: Home) -> None:
    await home.run("init")
    Vault(Workspace(folder=home.workspace), {}).add("openai", "sk-not-a-real-key-0123456789")
    (home.workspace / "vault.key").unlink()
    again = await home.run("init")
    assert again.status == 0
    assert "complete" not in again.out
    assert again.err.startswith("moltbot: the vault's master key is missing")


async def test_init_where_moltbot_runs_says_so_instead_of_how_to_start_it(home: Home) -> None:
    async with home.started():
        again = await home.run("init")
        (home.workspace / "key").unlink()
        anew = await home.run("init")
    assert "MoltBot runs here. Next: " in again.out
    assert again.out.rstrip().endswith(" chat")
    assert "stop it and start it again to use the new one" in anew.out


async def test_init_takes_a_folder_and_repeats_it_in_the_next_command(home: Home) -> None:
    ended = await home.run("init", "--workspace=bot")
    assert (home.folder / "bot" / "key").exists()
    assert "start --workspace ~/bot" in ended.out


@pytest.mark.parametrize("words", [("init",), ("start",), ("model", "list"), ("failover", "test")])
async def test_an_empty_workspace_names_no_folder(home: Home, words: tuple[str, ...]) -> None:
    ended = await home.run(*words, "--workspace", "")
    assert (ended.status, ended.out) == (2, "")
    assert "argument -w/--workspace: it is empty, which names no folder" in ended.err
    assert list(home.folder.iterdir()) == []


async def test_init_leaves_a_folder_for_everybody_as_it_is_and_says_what_to_do(home: Home) -> None:
    everybodys = home.folder / "tmp"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    for name in ("init", "start"):
        ended = await home.run(name, "--workspace", "tmp")
        assert (ended.status, ended.out) == (78, "")
        assert f"others may write into {everybodys}" in ended.err
    assert stat.S_IMODE(everybodys.stat().st_mode) == 0o1777
    assert (await home.run("init", "--workspace", "tmp/moltbot")).status == 0


@pytest.mark.parametrize("words", [("init",), ("start",), ("status",), ("model", "list"), ("model", "tune")])
async def test_a_path_that_is_too_long_is_told_in_one_line(home: Home, words: tuple[str, ...]) -> None:
    ended = await home.run(*words, "--workspace", "x" * 300)
    assert (ended.status, ended.out) == (78, "")
    assert "File name too long" in ended.err
    assert ended.err.startswith("moltbot: ")
    assert ended.err.count("\n") == 1


async def test_an_argument_that_is_no_text_is_a_wrong_use(home: Home) -> None:
    ended = await home.run("init", "--workspace", "bot\udcff")
    assert (ended.status, ended.out, ended.err) == (2, "", "moltbot: the argument 'bot\\xff' is no text in UTF-8\n")
    home.variables["MOLTBOT_WORKSPACE"] = "bot\udcff"
    ended = await home.run("init")
    assert (ended.status, ended.out) == (78, "")
    assert "is no text; choose another folder" in ended.err
    assert list(home.folder.iterdir()) == []


async def test_a_locale_of_ascii_alone_holds_up_no_command(home: Home) -> None:
    home.variables |= {"LC_ALL": "C", "PYTHONUTF8": "0"}
    ended = await home.run("init", "-w", "工作")
    assert (ended.status, ended.err) == (0, "")
    assert f"Made a key in {home.folder}/工作/key" in ended.out
    home.variables["PYTHONIOENCODING"] = "ascii"
    ended = await home.run("init", "-w", "工作")
    assert (ended.status, ended.err) == (0, "")
    assert r"The workspace ~/\u5de5\u4f5c is complete already" in ended.out


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
async def test_a_closed_input_or_output_holds_up_no_command(home: Home, closing: str) -> None:
    assert (await home.run("init")).status == 0
    ended = await shell(home, f'exec "$@" {closing}', "chat", "hi")
    assert ended.status == 69, "nothing runs"
    assert "Traceback" not in ended.err
    assert ("MoltBot is not running" in ended.err) is ("2>&-" not in closing)
    assert (await shell(home, f'exec "$@" {closing}', "init")).status == 0


async def test_a_current_folder_that_is_gone_is_told(home: Home) -> None:
    for words in (("status",), ("init",), ("chat", "hi")):
        ended = await shell(home, 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', *words)
        assert (ended.status, ended.out) == (78, "")
        assert ended.err == "moltbot: the current folder is not there any more: go to another one with `cd`\n"


async def shell(home: Home, script: str, *words: str) -> Ended:
    """Run a command by a shell, which finds it in its arguments."""
    command = ["sh", "-c", script, "sh", *COMMAND, *words]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=home.folder, env=home.environ, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(status=process.returncode, out=out.decode(), err=err.decode())


async def test_ctrl_c_before_a_command_has_begun_ends_it_without_a_word(home: Home) -> None:
    home.variables["PYTHONPROFILEIMPORTTIME"] = "1"  # tells of each import
    process = await home.spawn("start", *ANY_PORTS)
    assert process.stderr is not None
    async with asyncio.timeout(20):
        while b"moltbot_server.cli.cache\n" not in await process.stderr.readline():
            assert process.returncode is None
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert b"Traceback" not in err
    assert process.returncode in (-signal.SIGINT, 130)
    assert out == b""


async def test_help_lists_the_commands_and_teaches_each_by_example(home: Home) -> None:
    overview = (await home.run()).out
    assert overview == (await home.run("--help")).out
    for name in ("init", "start", "chat", "engine", "model", "link", "status", "version"):
        assert f"\n    {name} " in overview
        assert f"\n  moltbot {name}" in (await home.run(name, "--help")).out
    assert "\n    bench " in overview


@pytest.mark.parametrize("arguments", [("foo",), ("start", "--prt", "1"), ("chat", "--json", "--events", "Hi")])
async def test_a_wrong_use_ends_with_status_2(home: Home, arguments: tuple[str, ...]) -> None:
    ended = await home.run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert "usage: moltbot" in ended.err


async def test_a_mistyped_command_is_told_the_one_that_was_meant(home: Home) -> None:
    meant = await home.run("strat")
    assert (meant.status, meant.out) == (2, "")
    assert "there is no command 'strat'; did you mean `" in meant.err
    assert meant.err.endswith(" start`?\n")
    listed = (await home.run("qqq")).err
    assert "the commands are init, start, chat, engine, model, key, " in listed
    assert listed.endswith(", link, status, version, bench, mock-provider\n")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            ("start", "--worker", "2"),
            "moltbot start: error: unrecognized arguments: --worker 2; did you mean --workers?",
        ),
        (("start", "--prot=1"), "moltbot start: error: unrecognized arguments: --prot=1; did you mean --port?"),
        (("chat", "Hi", "there"), "moltbot chat: error: unrecognized arguments: there"),
        (("-x", "status"), "moltbot status: error: unrecognized arguments: -x"),
    ],
)
async def test_a_mistyped_option_is_told_the_one_that_was_meant(home: Home, typed: tuple[str, ...], said: str) -> None:
    ended = await home.run(*typed)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.endswith(f"\n{said}\n")


async def test_what_needs_a_running_moltbot_says_how_to_start_it(home: Home) -> None:
    await home.run("init")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as web:
        grpc_port, port = taken.getsockname()[1], web.getsockname()[1]
    (home.workspace / ".env").write_text(f"MOLTBOT_GRPC_PORT={grpc_port}\nMOLTBOT_PORT={port}\n")
    chat = await home.run("chat", "Hi")
    assert (chat.status, chat.out) == (69, "")
    assert "MoltBot is not running" in chat.err
    assert " start`" in chat.err
    status = await home.run("status")
    assert status.status == 69
    assert "MoltBot is not running" in status.out
    assert (await home.run("status", "--json")).json["running"] is False
    link = await home.run("link")
    assert (link.status, link.out) == (69, "")
    assert "MoltBot is not running" in link.err


async def test_a_link_leads_to_an_adapter_that_was_started_by_itself_and_to_no_other_program(home: Home) -> None:
    await home.run("init")
    paths = ("--key-file", str(home.workspace / "key"), "--state", str(home.workspace / "http"))
    adapter = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moltbot_adapters", "http", *paths, "--port", "0", "--core", "127.0.0.1:1",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert adapter.stdout is not None
    try:
        port = json.loads(await asyncio.wait_for(adapter.stdout.readline(), 20))["port"]
        (home.workspace / ".env").write_text(f"MOLTBOT_PORT={port}\n")
        link = await home.run("link")
    finally:
        adapter.terminate()
        await adapter.wait()
    assert (link.status, link.err) == (0, "")
    assert link.out.startswith(f"http://127.0.0.1:{port}/login?code=")
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        (home.workspace / ".env").write_text(f"MOLTBOT_PORT={other.server_port}\n")
        link = await home.run("link")
        other.shutdown()
    assert (link.status, link.out) == (69, "")
    assert "MoltBot is not running" in link.err


@pytest.mark.parametrize("arguments", [("chat", "Hi"), ("link",)])
async def test_without_a_workspace_the_message_says_how_to_make_one(home: Home, arguments: tuple[str, ...]) -> None:
    ended = await home.run(*arguments)
    assert (ended.status, ended.out) == (78, "")
    assert " init`, or name one with --workspace" in ended.err


async def test_all_mistakes_of_a_configuration_end_the_start_with_status_78(home: Home) -> None:
    home.workspace.mkdir()
    (home.workspace / "moltbot.yaml").write_text("prot: 1\nworkers: many\n")
    ended = await home.run("start")
    assert ended.status == 78
    assert f"{home.workspace}/moltbot.yaml:1: unknown key `prot`; did you mean `port`?" in ended.err
    assert f"{home.workspace}/moltbot.yaml:2: workers: found 'many', expected a whole number" in ended.err


@pytest.mark.parametrize(
    ("text", "flags", "told"),
    [
        ("port: nope", ("--port", "0"), "port: found 'nope'"),
        ("log_level: loud", ("--log-level", "info"), "log_level: found 'loud'"),
        ("host: 0.0.0.0", ("--host", "127.0.0.1"), "host 0.0.0.0 can be reached from other machines"),
        ("{workers: 3, store: {type: memory}}", ("--workers", "1"), "store.type is memory"),
    ],
)
async def test_what_is_wrong_beneath_a_flag_is_told_before_anything_starts(
    home: Home, text: str, flags: tuple[str, ...], told: str
) -> None:
    home.workspace.mkdir()
    home.variables |= {"MOLTBOT_PORT": "0"} if "--port" not in flags else {}
    (home.workspace / "moltbot.yaml").write_text(text)
    ended = await home.run("start", "--grpc-port", "0", "--metrics-port", "0", *flags)
    assert ended.status == 78
    assert f"{home.workspace}/moltbot.yaml:1: {told}" in ended.err
    assert "level=" not in ended.err
    assert "child" not in ended.err


async def test_the_port_of_the_page_may_be_given_to_cores_and_not_to_both(home: Home) -> None:
    home.workspace.mkdir()
    ended = await home.run("start", "--port", "0", "--grpc-port", "1234", "--metrics-port", "1234")
    assert ended.status == 78
    assert "--metrics-port: metrics_port and grpc_port are both 1234; give each its own" in ended.err
    default = str(defaults()["port"])
    ended = await home.run("start", "--grpc-port", default)
    assert ended.status == 78
    assert f"--grpc-port: grpc_port and port are both {default}; give each its own" in ended.err

    port = str(free_port())
    (home.workspace / "moltbot.yaml").write_text(f"port: {port}")
    async with home.started("--grpc-port", port) as started:
        assert f":{port}" in started.said
        assert "child" not in started.said


async def test_ports_that_only_the_file_gives_twice_are_no_matter_where_flags_give_others(home: Home) -> None:
    home.workspace.mkdir()
    (home.workspace / "moltbot.yaml").write_text("port: 50051")
    async with home.started() as started:
        assert "child" not in started.said


async def test_a_start_beyond_this_machine_without_encryption_is_refused(home: Home) -> None:
    ended = await home.run("start", "--host", "0.0.0.0")
    assert ended.status == 78
    assert "--host: host 0.0.0.0 can be reached from other machines" in ended.err


@pytest.mark.parametrize("kind", ["", "MODEL_TYPE=llama2\n"])
async def test_a_model_that_is_not_there_is_told_by_file_and_line_with_the_rest(home: Home, kind: str) -> None:
    home.variables = {}
    home.workspace.mkdir()
    (home.workspace / ".env").write_text(f"{kind}WORKERS=many\nMODEL_PATH=/nowhere/at/all\n")
    ended = await home.run("start", *ANY_PORTS)
    line = 2 + bool(kind)
    assert ended.status == 78
    assert f"{home.workspace}/.env:{line}: /nowhere/at/all: found nothing; expected the folder" in ended.err
    assert f"{home.workspace}/.env:{line - 1}: workers: found 'many'" in ended.err
    assert "level=" not in ended.err  # nothing had begun


async def test_a_context_beyond_the_models_is_told_by_file_and_line_before_anything_starts(home: Home) -> None:
    home.variables = {}
    home.workspace.mkdir()
    (home.workspace / "moltbot.yaml").write_text("log_level: info\ncontext_length: 1000000\n")
    ended = await home.run("start", *ANY_PORTS)
    assert ended.status == 78
    assert f"{home.workspace}/moltbot.yaml:2: CONTEXT_LENGTH is 1000000; expected 16 to " in ended.err
    assert "listening" not in ended.err


async def test_a_route_to_nobody_is_told_by_file_and_line_before_anything_starts(home: Home) -> None:
    home.workspace.mkdir()
    (home.workspace / "moltbot.yaml").write_text("models:\n  primary: opnai/gpt-4o\n")
    ended = await home.run("start", *ANY_PORTS)
    assert ended.status == 78
    assert f"{home.workspace}/moltbot.yaml:2: models.primary: No provider is known to serve 'opnai/gpt-4o'" in ended.err
    assert "listening" not in ended.err


async def test_a_family_that_is_not_known_is_told_at_the_line_of_the_model_type(home: Home) -> None:
    home.variables = {}
    home.workspace.mkdir()
    (home.workspace / "model").mkdir()
    (home.workspace / ".env").write_text("MODEL_PATH=model\nMODEL_TYPE=lama2\n")
    ended = await home.run("start", *ANY_PORTS)
    assert ended.status == 78
    assert f"{home.workspace}/.env:2: MODEL_TYPE is 'lama2'" in ended.err


async def test_a_port_in_use_is_named_with_a_command_that_works(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag in ("--port", "--grpc-port", "--metrics-port"):
            flags = {"--port": "0", "--grpc-port": "0", "--metrics-port": "0", flag: str(port)}
            ended = await home.run("start", *(word for pair in flags.items() for word in pair))
            assert ended.status == 69
            assert f"port {port} (" in ended.err
            assert f"{flag} " in ended.err.partition(" start ")[2]


async def test_all_ports_in_use_are_told_at_once_with_the_whole_command_that_works(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [server.getsockname()[1] for server in (one, two)]
        given = ("--port", str(ports[0]), "--grpc-port", str(ports[1]), "--metrics-port", "0", "--log-level", "error")
        ended = await home.run("start", "--workspace", "my bot", *given)
    assert ended.status == 69
    assert all(f"port {port} (" in ended.err for port in ports)
    words = shlex.split(ended.err.splitlines()[-1].partition(" start ")[2])
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert (flags["--workspace"], flags["--log-level"]) == ("~/my bot", "error")
    assert {flags["--port"], flags["--grpc-port"]}.isdisjoint(map(str, ports))
    assert flags["--port"] != flags["--grpc-port"]


async def test_chat_as_json_tells_that_nothing_runs_as_json(home: Home) -> None:
    await home.run("init")
    ended = await home.run("chat", "--json", "Hi")
    assert (ended.status, ended.err) == (69, "")
    assert (ended.json["error"]["code"], ended.json["error"]["retryable"]) == ("UNAVAILABLE", True)
    assert "MoltBot is not running" in ended.json["error"]["message"]


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:", "127.0.0.1:99999"])
async def test_an_address_that_is_none_is_a_wrong_use(home: Home, address: str) -> None:
    await home.run("init")
    ended = await home.run("chat", "--address", address, "Hi")
    assert ended.status == 2
    assert f"{address!r} is no HOST:PORT" in ended.err


async def test_a_port_beyond_all_ports_is_told_without_saying_its_name_twice(home: Home) -> None:
    assert "--port: found '80000', expected a port" in (await home.run("start", "--port", "80000")).err
