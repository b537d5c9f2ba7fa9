"""`moltbot start` with real processes: it serves, mends what crashes, and leaves nothing behind, however it ends."""

import asyncio
import http.client
import json
import re
import shlex
import signal
import socket
import sys
import time
from asyncio.subprocess import STDOUT
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import pytest
from cli_process import ANY_PORTS, Home, Started, all_gone, taken_behind_a_free_one
from moltbot_server.cli.children import Child, Plan
from moltbot_server.cli.ports import kept_port
from moltbot_server.cli.terminal import Failure, lasting

_AT_ONCE, _SOON = 3.0, 8.0  # they take 0.1 s and 1.2 s; the rest is for a busy machine


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home folder."""
    return Home(tmp_path)


@pytest.fixture
async def started(home: Home) -> AsyncIterator[Started]:
    """A MoltBot that is ready."""
    async with home.started() as started:
        yield started


def get(url: str) -> tuple[int, str]:
    """Return status and `Location` of a GET that follows nothing."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}")
        answer = connection.getresponse()
        return answer.status, answer.getheader("Location", "")
    finally:
        connection.close()


def read(url: str) -> str:
    """Return what a page says."""
    with urlopen(url, timeout=10) as page:
        return str(page.read().decode())


async def test_the_ready_lines_lead_to_what_serves(started: Started) -> None:
    links = re.findall(r"http://\S+", started.said)
    login = next(link for link in links if "/login?code=" in link)
    assert await asyncio.to_thread(get, login) == (303, "/")
    status, location = await asyncio.to_thread(get, login)
    assert (status, "error=link" in location) == (303, True)
    for page in links:
        if page.endswith(("/health", "/metrics")):
            assert (await asyncio.to_thread(get, page))[0] == 200
    again = (await started.home.run("link")).out.strip()
    assert await asyncio.to_thread(get, again) == (303, "/")


async def test_status_tells_what_runs_and_what_it_takes(started: Started) -> None:
    ended = await started.home.run("status", "--json")
    found = ended.json
    assert (ended.status, found["healthy"], found["model"]) == (0, True, "scripted")
    assert found["processes"].keys() == {"supervisor", "engine", "core", "http"}
    pids = {process.pid for process in started.processes()}
    assert {item["pid"] for item in found["processes"].values()} == pids
    if sys.platform.startswith("linux"):
        assert found["processes"]["supervisor"]["memory"] < 45e6
    assert found["engine"]["healthy"]
    assert found["engine"]["where"].startswith("unix:")
    words = (await started.home.run("status")).out
    assert words.count(" serving ") == 3
    assert re.search(r" runs in \S+ for \d+ s\.$", words.splitlines()[0])


async def test_the_engine_tells_how_it_does_at_the_port_behind_the_cores(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with home.started("--metrics-port", str(port)) as started:
        await home.run("chat", "Hi")
        where = (await home.run("status", "--json")).json["engine"]["metrics"]
        page = await asyncio.to_thread(read, f"{where}/metrics")
        health = json.loads(await asyncio.to_thread(read, f"{where}/health"))
        assert f"Engine  {where}/metrics" in started.said
        assert f"{where}/metrics" in (await home.run("status")).out
    assert int(where.rpartition(":")[2]) > port  # the next one, unless somebody else has it
    assert 'moltbot_grpc_calls_total{method="InferenceService/Generate",status="OK"}' in page
    assert "process_resident_memory_bytes" in page
    assert (health["status"], health["model"]) == ("ok", "scripted")


async def test_a_taken_port_for_the_metrics_of_the_engine_is_no_reason_not_to_start(home: Home) -> None:
    with taken_behind_a_free_one() as port:
        async with home.started("--metrics-port", str(port)) as started:
            where = (await home.run("status", "--json")).json["engine"]["metrics"]
            assert await asyncio.to_thread(read, f"{where}/metrics")
            assert "some metrics are at another port" in started.said
    assert int(where.rpartition(":")[2]) > port + 1


async def test_every_line_of_the_log_names_the_process_that_wrote_it(home: Home) -> None:
    home.variables |= {"WORKERS": "2"}
    async with home.started("--log-level", "debug") as started:
        await home.run("chat", "Hi")
    logged = [line for line in started.said.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    writers = {line.split()[2].partition("/")[0].rstrip(":") for line in logged}
    assert writers == {"start", "engine", "core-1", "core-2", "http-1", "http-2"}
    assert len(set(logged)) == len(logged), "no line comes twice"


async def test_logs_in_json_name_the_process_too(home: Home) -> None:
    home.variables |= {"MOLTBOT_LOG_JSON": "true"}
    async with home.started() as started:
        pass
    logged = [json.loads(line) for line in started.said.splitlines() if line.startswith("{")]
    assert {line["process"] for line in logged} == {"start", "engine", "core", "http"}
    (ready,) = (line for line in logged if line["message"] == "MoltBot is ready")
    assert ready["link"].endswith(" link")
    assert "login?code=" not in started.said, "whoever reads the log would get in"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (54.9, "54 s"), (125, "2 min 5 s"), (3600, "1 h"), (12000, "3 h 20 min"), (187205, "2 d 4 h")],
)
def test_a_time_is_told_in_its_two_largest_units(seconds: float, told: str) -> None:
    assert lasting(seconds) == told


@pytest.mark.parametrize("name", ["engine", "core", "http"])
async def test_a_killed_process_comes_back_and_sessions_are_kept(started: Started, name: str) -> None:
    home = started.home
    assert (await home.run("chat", "--session", "plan", "one")).status == 0
    killed = started.told()["processes"][name]
    psutil.Process(killed).send_signal(signal.SIGKILL)
    assert "was killed by SIGKILL" in await started.line("a process ended and is started again")
    await started.line("a process was started again")
    await started.line({"engine": "the engine is back", "core": "the core serves", "http": "listening"}[name])
    assert started.told()["processes"][name] != killed
    reply = (await home.run("chat", "--session", "plan", "--json", "two")).json
    assert (reply["text"], reply["timings"]["history_messages"]) == ("You said: two", 2)
    assert (await home.run("status")).status == 0


async def test_an_engine_elsewhere_is_missed_by_name_while_it_is_away_and_waited_for_at_the_start(home: Home) -> None:
    await home.run("init")
    engine = await home.spawn("engine", "--listen", f"unix:{home.folder}/elsewhere.sock")
    assert engine.stdout is not None
    home.variables["MOLTBOT_ENGINE"] = json.loads(await engine.stdout.readline())["engine"]
    async with home.started() as started:
        assert (await home.run("status")).status == 0
        engine.kill()
        await engine.wait()
        await started.line("the engine cannot be reached")
        told = await home.run("status")
        assert (told.status, "The engine runs elsewhere and cannot be reached" in told.out) == (1, True)

    starting = Started(home, await home.spawn("start", *ANY_PORTS, stderr=STDOUT))
    await starting.line("start `moltbot engine` there, or correct `engine` here")
    told = await home.run("status")
    assert (told.status, "is being started and does not serve yet" in told.out) == (69, True)
    starting.process.send_signal(signal.SIGINT)
    await starting.process.wait()


async def test_a_question_right_after_the_core_was_killed_waits_for_the_next_core(started: Started) -> None:
    core = psutil.Process(started.told()["processes"]["core"])
    core.kill()
    assert await all_gone([core])
    assert (await started.home.run("chat", "Hi")).out == "You said: Hi\n"


async def test_a_core_that_was_killed_is_soon_there_again(started: Started) -> None:
    core = psutil.Process(started.told()["processes"]["core"])
    began = time.monotonic()
    core.kill()
    warned = await started.line("a process ended and is started again")
    await started.line("the core serves")
    assert "in_seconds=0.1" in warned
    assert time.monotonic() - began < _SOON


async def test_whoever_calls_while_the_core_is_away_for_some_seconds_waits_for_it(started: Started) -> None:
    supervisor, core = psutil.Process(started.process.pid), psutil.Process(started.told()["processes"]["core"])
    supervisor.suspend()
    core.kill()
    chat = await started.home.spawn("chat", "Hi")
    assert chat.stderr is not None
    assert b"is being started again and does not answer yet; waiting for it" in await chat.stderr.readline()
    supervisor.resume()
    out, _ = await chat.communicate()
    assert (chat.returncode, out) == (0, b"You said: Hi\n")


async def test_a_core_that_stays_away_is_told_to_be_started_again(started: Started) -> None:
    supervisor, core = psutil.Process(started.process.pid), psutil.Process(started.told()["processes"]["core"])
    supervisor.suspend()  # so nobody starts it again
    core.kill()
    ended = await started.home.run("chat", "Hi")
    supervisor.resume()
    assert ended.status == 69
    assert "is being started again" in ended.err


async def test_hints_of_another_workspace_name_it_and_notices_are_told_once(home: Home) -> None:
    home.variables |= {"MOLTBOT_HTTP_WORKERS": "2", "MOLTBOT_AUTOSCALING_MIN_REPLICAS": "2"}
    (home.folder / ".env").write_text("CONTEXT_LENGHT=5\n")
    async with home.started("--workspace", "w2") as started:
        assert "link --workspace ~/w2" in started.said
        assert "chat --workspace ~/w2" in started.said
        assert "workers:" not in started.said
        if "the core serves" not in started.said:
            await started.line("the core serves")
        told = json.loads((home.folder / "w2" / "run" / "start.json").read_text())
        psutil.Process(told["processes"]["core"]).kill()
        await started.line("a process was started again")
        await started.line("the core serves")
        assert started.said.count("autoscaling:") == 1
        assert started.said.count(".env:1: CONTEXT_LENGHT is not known and not used; did you mean CONTEXT_LENGTH?") == 1


async def test_more_threads_than_processors_are_taken_and_told_at_the_start_and_in_the_status(home: Home) -> None:
    home.variables |= {"MOLTBOT_THREADS": "99", "MODEL_TYPE": ""}
    async with home.started() as started:
        told = re.compile(r"MOLTBOT_THREADS: threads is 99, more than the \d+ processors .*; 64 are the most")
        assert len(told.findall(started.said)) == 1
        assert told.search((await home.run("status")).out)
        found = (await home.run("status", "--json")).json
        assert told.search(found["notices"][0])
        assert found["healthy"]
    home.variables["MOLTBOT_THREADS"] = "1"
    async with home.started() as started:
        assert "threads is" not in started.said
        assert (await home.run("status", "--json")).json["notices"] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have another malloc")
@pytest.mark.parametrize("set_by_the_user", [None, "7"])
async def test_all_processes_hold_few_arenas_of_memory_unless_the_user_says_how_many(
    home: Home, set_by_the_user: str | None
) -> None:
    if set_by_the_user:
        home.variables["MALLOC_ARENA_MAX"] = set_by_the_user
    async with home.started() as started:
        processes = started.told()["processes"]
        arenas = {name: psutil.Process(pid).environ().get("MALLOC_ARENA_MAX") for name, pid in processes.items()}
    assert arenas == dict.fromkeys(("engine", "core", "http"), set_by_the_user or "2")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not show a process' environment")
@pytest.mark.parametrize(("log_json", "said"), [("true", "NONE"), ("false", None)])
async def test_with_logs_in_json_grpc_writes_no_lines_of_its_own(home: Home, log_json: str, said: str | None) -> None:
    home.variables["MOLTBOT_LOG_JSON"] = log_json
    async with home.started() as started:
        pids = started.told()["processes"].values()
        assert {psutil.Process(pid).environ().get("GRPC_VERBOSITY") for pid in pids} == {said}


async def test_a_first_start_has_the_model_measured_beside_and_takes_the_measurement_with_it(home: Home) -> None:
    home.variables = {"MODEL_TYPE": "", "MOLTBOT_FIRST_TUNING": ""}
    async with home.started() as started:
        supervisor = psutil.Process(started.process.pid)
        for _ in range(200):  # nothing tells us of another process's children
            if measuring := [child for child in supervisor.children() if "first_tuning" in " ".join(child.cmdline())]:
                break
            await asyncio.sleep(0.05)
        assert len(measuring) == 1
        everything = [supervisor, *supervisor.children(recursive=True)]
    assert not any(process.is_running() for process in everything)


async def test_a_second_start_in_the_workspace_is_refused(started: Started) -> None:
    ended = await started.home.run("start", *ANY_PORTS)
    assert ended.status == 69
    assert "runs in ~/.moltbot already" in ended.err
    assert f"Ctrl-C where it runs or with `kill {started.process.pid}`" in ended.err
    beside = shlex.split(ended.err.splitlines()[-1].partition(" start ")[2].partition(" start ")[2])
    flags = dict(zip(beside[::2], beside[1::2], strict=True))
    assert flags == {"--workspace": "~/.moltbot-2", "--port": "0", "--grpc-port": "0", "--metrics-port": "0"}
    assert (await started.home.run("status")).status == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_lets_answers_end_and_leaves_no_process(started: Started, number: int) -> None:
    processes = started.processes()
    chat = await started.home.spawn("chat", "--events", "#50 pace=0.02")
    assert chat.stdout is not None
    await chat.stdout.readline()  # accepted: the turn is under way
    started.process.send_signal(number)
    assert "Ctrl-C again leaves at once" in await started.line("Stopping")
    out, _ = await chat.communicate()
    assert chat.returncode == 0
    assert "completed" in out.decode().splitlines()[-1]
    assert await started.rest() == 0
    assert await all_gone(processes)
    assert not (started.home.workspace / "run" / "start.json").exists()


async def test_whoever_comes_while_it_is_stopping_hears_so_at_once(started: Started) -> None:
    home = started.home
    chat = await home.spawn("chat", "--events", "#400 pace=0.02")
    assert chat.stdout is not None
    await chat.stdout.readline()
    started.process.send_signal(signal.SIGINT)
    await started.line("Stopping")
    late, told = await asyncio.gather(home.run("chat", "Hi"), home.run("status"))
    as_json = await home.run("status", "--json")
    assert (late.status, late.out) == (69, "")
    assert "is stopping and takes nothing new" in late.err
    assert " start`" in late.err
    assert (told.status, "It is stopping" in told.out) == (1, True)
    assert (as_json.json["stopping"], as_json.json["healthy"]) == (True, False)
    assert chat.returncode is None, "the answer under way goes on"
    await chat.communicate()
    assert chat.returncode == 0
    assert await started.rest() == 0
    assert "is not running" in (await home.run("chat", "Hi")).err


async def test_the_second_signal_leaves_at_once(started: Started) -> None:
    processes = started.processes()
    chat = await started.home.spawn("chat", "--events", "#1000 pace=0.1")
    assert chat.stdout is not None
    await chat.stdout.readline()
    started.process.send_signal(signal.SIGINT)
    await started.line("Stopping")
    began = time.monotonic()
    started.process.send_signal(signal.SIGINT)
    assert await started.rest() == 130
    assert time.monotonic() - began < _AT_ONCE
    assert await all_gone(processes)
    assert {path.name for path in (started.home.workspace / "run").iterdir()} == {"lock", "moltbot.db.lock"}
    chat.kill()
    await chat.communicate()


async def test_the_second_signal_leaves_at_once_also_while_something_hangs(home: Home) -> None:
    async with home.started("--reload") as started:
        processes = started.processes()
        psutil.Process(started.told()["processes"]["core"]).suspend()
        (home.workspace / "moltbot.yaml").write_text("context_length: 4096\n")
        await started.line("a file has changed")
        began = time.monotonic()
        started.process.send_signal(signal.SIGINT)
        started.process.send_signal(signal.SIGTERM)
        assert await started.rest() == 130
        assert time.monotonic() - began < _AT_ONCE
        assert await all_gone(processes)


async def test_a_process_that_does_not_leave_is_killed_after_its_time(home: Home) -> None:
    home.variables["MOLTBOT_DRAIN_GRACE"] = "10ms"
    async with home.started() as started:
        processes = started.processes()
        psutil.Process(started.told()["processes"]["core"]).suspend()
        started.process.send_signal(signal.SIGTERM)
        assert "child=core" in await started.line("did not leave in time and is killed")
        assert await started.rest() == 0
        assert await all_gone(processes)


async def test_the_children_leave_when_the_supervisor_is_killed(started: Started) -> None:
    processes = started.processes()
    started.process.kill()
    assert await all_gone(processes)
    assert (await started.home.run("status")).status == 69  # what it told others is not believed any more


async def test_a_configuration_that_a_crashed_core_finds_wrong_ends_nothing_and_is_read_again(home: Home) -> None:
    async with home.started() as started:
        configuration = home.workspace / "moltbot.yaml"
        good = configuration.read_text()
        configuration.write_text("no_such_key: 1\n")
        psutil.Process(started.told()["processes"]["core"]).kill()
        assert "ended with status 78" in await started.line("cannot start as things are; it is tried again")
        assert started.process.returncode is None
        configuration.write_text(good)
        assert (await home.run("chat", "Hello")).out == "You said: Hello\n"


async def test_what_has_asked_the_first_question_is_reaped(home: Home) -> None:
    async with home.started("--first-question", "Are you there?") as started:
        await started.line("in all)")
        own, known = psutil.Process(started.process.pid), set(started.told()["processes"].values())
        async with asyncio.timeout(20):
            while {child.pid for child in own.children()} - known:  # noqa: ASYNC110 - not a process of ours
                await asyncio.sleep(0.02)


async def test_the_first_question_is_asked_and_its_times_are_told(home: Home) -> None:
    async with home.started("--first-question", "Are you there?") as started:
        await started.line("You      Are you there?")
        await started.line("MoltBot  You said: Are you there?")
        times = await started.line("to the first word")
    first, total = (float(number) for number in re.findall(r"([\d.]+) s", times))
    assert 0 < first <= total


async def test_reload_starts_everything_again_when_the_configuration_changes(home: Home) -> None:
    async with home.started("--reload") as started:
        before = started.told()["processes"]
        (home.workspace / "moltbot.yaml").write_text("context_length: 4096\n")
        await started.line("a file has changed")
        await started.line("the core serves")
        after = started.told()["processes"]
        assert not set(before.values()) & set(after.values())
        assert (await home.run("chat", "Hi")).out == "You said: Hi\n"
        (home.workspace / "moltbot.yaml").write_text("prot: 1\n")
        assert "did you mean `port`?" in await started.line("nothing is started again")
        assert started.told()["processes"] == after


def test_each_crash_doubles_the_pause_up_to_half_a_minute_and_a_healthy_minute_resets_it() -> None:
    child = Child(plan=Plan(name="core", module="moltbot_server.no_such_module", arguments=()))
    pauses = []
    for lived in [1.0] * 7 + [60.0]:
        child.start(now=100.0)
        assert child.process is not None
        child.process.wait()
        assert child.ended(now=100.0 + lived) not in (None, 0)
        assert child.due is not None
        pauses.append(child.due - 100.0 - lived)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 1]


def test_an_engine_is_back_within_a_few_seconds_however_often_it_died(tmp_path: Path) -> None:
    plan = Plan(name="engine", module="moltbot_server.no_such_module", arguments=(), pause=0.1, longest_pause=2.0)
    child = Child(plan=plan)
    pauses = []
    for _ in range(8):
        child.start(now=100.0)
        assert child.process is not None
        child.process.wait()
        child.ended(now=101.0)
        assert child.due is not None
        pauses.append(round(child.due - 101.0, 3))
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2]


async def test_several_processes_share_the_http_port(home: Home) -> None:
    home.variables["MOLTBOT_HTTP_WORKERS"] = "2"
    async with home.started() as started:
        while started.said.count("listening") < 2:
            await started.line("listening")
        told = started.told()
        assert told["processes"].keys() == {"engine", "core", "http-1", "http-2"}
        listening = {
            process.pid
            for process in started.processes()
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == urlsplit(told["http"]).port
        }
        assert listening == {told["processes"]["http-1"], told["processes"]["http-2"]}


async def test_a_process_tied_by_its_input_leaves_when_that_ends(home: Home) -> None:
    await home.run("init")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moltbot_server.cli.tied", "moltbot_server", "--grpc-port", "0", "--metrics-port", "0"),
        cwd=home.folder,
        env=home.environ,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(20):
        assert b'"ready": true' in await process.stdout.readline()
        process.stdin.close()
        assert await process.wait() == 0


def test_a_port_whose_connections_linger_can_be_kept_for_several_processes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # who closes first has the connection linger
            assert client.recv(1) == b""
    with kept_port("127.0.0.1", port):
        pass


def test_a_port_on_which_somebody_listens_is_not_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(Failure, match=f"cannot keep port {port}"), kept_port("127.0.0.1", port):
            pass
