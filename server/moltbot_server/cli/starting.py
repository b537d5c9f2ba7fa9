"""`moltbot start`: makes the workspace, runs the core and the HTTP adapter under one supervisor, says where to go."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

from moltbot_server.cli.children import Child, Plan
from moltbot_server.cli.model_check import model_problems
from moltbot_server.cli.plans import ADAPTERS, plans
from moltbot_server.cli.ports import Wanted, kept_port, near_port, port_problems, spare_ports, take_ports
from moltbot_server.cli.route_check import check_routes
from moltbot_server.cli.running import Running, joined, only_one, reachable
from moltbot_server.cli.supervisor import Supervisor, log
from moltbot_server.cli.terminal import Exit, Failure, answering, as_typed, command, shown
from moltbot_server.cli.watcher import Watcher
from moltbot_server.config import INLINE, ConfigError, Settings, load_settings, misspelled, overlooked
from moltbot_server.logs import configure_logging
from moltbot_server.models.cpus import too_many_threads
from moltbot_server.workspace import LINK_LIFE, Workspace


def start(workspace: Workspace, flags: Mapping[str, object], *, reload: bool, first_question: str) -> int:
    """Run MoltBot until it is asked to stop; return the exit status.

    Raises:
        WorkspaceError, ConfigError, Failure: it cannot start; nothing was left running.
    """
    began = time.monotonic()
    for done in workspace.create():
        print(done[0].upper() + done[1:] + ".", flush=True)
    settings = _load(workspace, flags)
    check_routes(settings)
    configure_logging(settings.log_level, as_json=settings.log_json, process="start")
    for notice in (*misspelled(os.environ), *overlooked(workspace.folder, os.environ)):
        log.warning("not used", extra={"notice": notice})
    for notice in settings.notices:
        log.warning("not used by this release", extra={"notice": notice})
    odd = _odd(settings)
    for notice in odd:
        log.warning("a setting does not suit this machine", extra={"notice": notice})
    if settings.workers > 1:
        log.info("several cores share the work", extra={"workers": settings.workers})
    extra = ["--reload"] * reload + ["--first-question", first_question] * bool(first_question)
    beside = partial(_beside, settings, flags, extra)
    with only_one(workspace, beside, grace=settings.leaving_time):
        settings = _with_ports(settings, lambda others: _typed(workspace, {**flags, **others}, extra))
        ports = _more_ports(settings)
        site = _Site(workspace=workspace, settings=settings, ports=ports, flags=flags, began=began, notices=odd)
        workspace.forget_boards()
        site.ask_early(first_question)
        supervisor = Supervisor(
            site.children,
            grace=settings.leaving_time,
            serving=site.serving,
            on_ready=site.ready,
            on_change=site.write,
            on_stop=site.stops,
            renew=site.renew,
            reap=site.reap,
            watcher=Watcher(workspace.folder) if reload else None,
        )
        shared = kept_port(settings.grpc_host, settings.grpc_port) if settings.workers > 1 else nullcontext()
        try:
            with shared:
                return supervisor.run()
        finally:
            site.close()


def _load(workspace: Workspace, flags: Mapping[str, object]) -> Settings:
    """Return the settings; what the processes would refuse, which are told of some flags alone, is told here.

    Raises:
        ConfigError: something is wrong with them.
    """
    settings = load_settings(workspace.folder, os.environ, flags, check=_problems)
    handed_on = ("grpc_port", "metrics_port", "log_level", *(["workers"] if settings.workers > 1 else []))
    load_settings(workspace.folder, os.environ, {name: flags.get(name) for name in handed_on})
    return settings


def _problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from model_problems(values)
    yield from port_problems(values)


def _beside(settings: Settings, flags: Mapping[str, object], extra: Sequence[str], other: Workspace) -> str:
    """Return the command line that starts one more in another workspace, on ports of its own."""
    return _typed(other, {**flags, **spare_ports(_wanted(settings))}, extra)


def _typed(workspace: Workspace, flags: Mapping[str, object], extra: Sequence[str]) -> str:
    """Return the command line that starts with these flags."""
    pairs = [("--" + name.replace("_", "-"), str(value)) for name, value in flags.items() if value is not None]
    return command(shlex.join(["start", *(word for pair in pairs for word in pair), *extra]), workspace)


def _with_ports(settings: Settings, again: Callable[[Mapping[str, object]], str]) -> Settings:
    """Return the settings with every port known and free: all processes can then start at the same time."""
    if settings.tls_cert is not None:
        raise Failure(
            "the HTTP adapter of this release cannot call a core that speaks TLS. Let a proxy end TLS and name it in "
            "`trusted_proxies`, or run the core by itself: python -m moltbot_server",
            Exit.CONFIG,
        )
    found = take_ports(_wanted(settings), again)
    return replace(settings, port=found["port"], grpc_port=found["grpc_port"], metrics_port=found["metrics_port"])


def _odd(settings: Settings) -> tuple[str, ...]:
    """Return what is said of settings that are followed and hardly meant."""
    here = settings.engine in ("", INLINE)
    text = too_many_threads(settings.threads or 0) if here else ""
    return (f"{settings.origin('threads')}: {text}",) if text else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _MorePorts:
    """Where processes tell how they do: the engine, 0 without one, and each core, the first one where it is told to."""

    engine: int
    cores: tuple[int, ...]


def _more_ports(settings: Settings) -> _MorePorts:
    """Return the ports behind that of the first core's metrics: the next one is the engine's, then come other cores'.

    Nobody is refused for them: where one is taken, another one is.
    """
    used = {settings.port, settings.grpc_port, settings.metrics_port}

    def near(what: str, distance: int) -> int:
        before = settings.metrics_port + distance - 1
        wanted = Wanted(key="", host=settings.metrics_host, port=before, what=f"metrics of {what}")
        found = near_port(wanted, used)
        used.add(found)
        if found != before + 1:
            log.warning("some metrics are at another port", extra={"of": what, "port": found})
        return found

    engine = near("the engine", 1) if settings.engine == "" else 0
    others = [near(f"core-{number}", number) for number in range(2, settings.workers + 1)]
    return _MorePorts(engine=engine, cores=(settings.metrics_port, *others))


def _wanted(settings: Settings) -> tuple[Wanted, ...]:
    return (
        Wanted(key="port", host=settings.host, port=settings.port, what="web chat and HTTP API"),
        Wanted(key="grpc_port", host=settings.grpc_host, port=settings.grpc_port, what="gRPC"),
        Wanted(key="metrics_port", host=settings.metrics_host, port=settings.metrics_port, what="metrics"),
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and what it has started."""
    if process.returncode is not None:
        return  # its id may be another's by now
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


_SCRIPTED = "scripted"  # as in models.folder, which would bring the code of models here

# What cannot change under processes that run: addresses that were told to others, and how many processes there are.
_FIXED = (
    *("host", "port", "grpc_host", "grpc_port", "metrics_host", "metrics_port"),
    *("workers", "http_workers", "engine"),
)


class _Site:
    """What is known of a MoltBot that starts: its processes, its addresses, its first words."""

    def __init__(
        self,
        *,
        workspace: Workspace,
        settings: Settings,
        ports: _MorePorts,
        flags: Mapping[str, object],
        began: float,
        notices: tuple[str, ...],
    ) -> None:
        """`notices`: what `moltbot status` is to say of the settings."""
        self._notices = notices
        self._workspace = workspace
        self._ports = ports
        self._flags = flags
        self._settings = settings
        self._began = began
        self._started = time.time()
        self._model, self._route = "", tuple[str, ...]()
        self._asking: subprocess.Popen[bytes] | None = None
        self._measuring: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self.http = joined(reachable(settings.host), settings.port)
        self.grpc = joined(reachable(settings.grpc_host), settings.grpc_port)
        self.metrics = joined(reachable(settings.metrics_host), settings.metrics_port)
        self.engine_metrics = joined(reachable(settings.metrics_host), ports.engine) if ports.engine else ""
        self.children = [Child(plan=plan) for plan in self._plans()]

    def _plans(self) -> list[Plan]:
        return plans(
            self._settings,
            self._workspace,
            core=self.grpc,
            metrics=self._ports.cores,
            engine_metrics=self._ports.engine,
        )

    def _core_metrics(self) -> dict[str, str]:
        """Return where each of several cores tells how it does."""
        names = [child.plan.name for child in self.children if child.plan.name.startswith("core")]
        host = reachable(self._settings.metrics_host)
        told = {name: f"http://{joined(host, port)}" for name, port in zip(names, self._ports.cores, strict=True)}
        return told if len(told) > 1 else {}

    def _adapters(self) -> list[str]:
        """Return the names of the processes that serve HTTP."""
        return [child.plan.name for child in self.children if child.plan.module == ADAPTERS]

    def renew(self) -> bool:
        """Read the settings again and plan by them, on the ports as they are; False when something is wrong there."""
        was = self._settings
        try:
            found = _load(self._workspace, self._flags)
            check_routes(found, engine_runs=True)
        except ConfigError as error:
            log.error("the configuration is wrong, so nothing is started again", extra={"problems": str(error)})
            return False
        kept = {name: getattr(was, name) for name in _FIXED}
        self._settings = replace(found, **kept)
        for child, plan in zip(self.children, self._plans(), strict=True):
            child.plan = plan
        return True

    def serving(self) -> bool:
        """Ask the HTTP adapter whether it and the core serve."""
        host, _, port = self.http.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=1) as connection:
                connection.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return b" 200 " in connection.recv(64)
        except OSError:
            return False

    def ready(self, core_said: Mapping[str, Any]) -> None:
        """Tell other commands and the person at the terminal."""
        self._model, self._route = str(core_said.get("model", "")), tuple(core_said.get("route", ()))
        what, name = answering(self._model, self._route)
        self.write()
        problem, notices = str(core_said.get("problem", "")), tuple(map(str, core_said.get("notices", ())))
        took = time.monotonic() - self._began
        if self._settings.log_json:
            self._tell_as_json(took, what, name, problem)
        else:
            self._tell(took, what, name, problem, notices)
        self.measure_once()
        if self._asking and self._asking.stdin:
            with contextlib.suppress(BrokenPipeError), self._asking.stdin as pipe:  # it has told why it left
                pipe.write(json.dumps({"address": self.grpc}).encode() + b"\n")

    def _tell_as_json(self, took: float, what: str, name: str, problem: str) -> None:
        """Say that it is ready as a line of the log, which many may read: without the link that opens the chat page."""
        fields = {"seconds": round(took, 1), what.lower(): name, "grpc": self.grpc, "metrics": f"http://{self.metrics}"}
        fields |= {"http": f"http://{self.http}", "link": command("link", self._workspace)}
        fields |= {"problem": as_typed(problem, self._workspace)} if problem else {}
        log.info("MoltBot is ready", extra=fields)

    def _tell(self, took: float, what: str, name: str, problem: str, notices: Sequence[str]) -> None:
        key = shown(self._workspace.key_file)
        chat = command("chat", self._workspace)
        lines = [
            f"MoltBot is ready ({took:.1f} s). {what}: {name or 'unknown'}.",
            *([f"It cannot answer yet: {as_typed(problem, self._workspace)}"] if problem else []),
            *(f"Take note: {notice}" for notice in notices),
            "",
            *self._web_chat(),
            f"  OpenAI API  http://{self.http}/v1   (API key: the line in {key})",
            f"  gRPC        {self.grpc}",
            f"  Health      http://{self.http}/health",
            f"  Metrics     http://{self.metrics}/metrics"
            + (f"   Engine  http://{self.engine_metrics}/metrics" if self.engine_metrics else ""),
            *(f"  {name:12}{metrics}/metrics" for name, metrics in [*self._core_metrics().items()][1:]),
            "",
            f"Talk in another terminal: {chat}   Stop: Ctrl-C",
        ]
        print("\n".join(lines), flush=True)

    def _web_chat(self) -> tuple[str, str]:
        """Return where the chat page is, and how it opens; a full disk has no room for the link, and ends nothing."""
        link = command("link", self._workspace)
        try:
            code = self._workspace.mint_link(time.time())
        except OSError as problem:
            why = f"no link that opens it ({problem.strerror}): make room, then type  {link}"
            return f"  Web chat    http://{self.http}", f"              {why}"
        opens = f"opens once, within {LINK_LIFE / 60:g} minutes; another link: {link}"
        return f"  Web chat    http://{self.http}/login?code={code}", f"              {opens}"

    def write(self) -> None:
        """Write down what runs, for `moltbot status` and the others. A full disk ends nothing that runs."""
        running = Running(
            pid=os.getpid(),
            started=self._started,
            version=metadata.version("moltbot"),
            http=f"http://{self.http}",
            grpc=self.grpc,
            metrics=f"http://{self.metrics}",
            model=self._model,
            route=self._route,
            processes={child.plan.name: child.pid for child in self.children},
            cores=self._core_metrics(),
            adapters={name: f"unix:{self._workspace.adapter_socket(name)}" for name in self._adapters()},
            stopping=self._stopping,
            notices=self._notices,
            engine_metrics=self.engine_metrics and f"http://{self.engine_metrics}",
        )
        try:
            running.write(self._workspace)
        except OSError as problem:
            place = shown(self._workspace.run / "start.json")
            print(
                f"moltbot: cannot write {place} ({problem.strerror}): MoltBot goes on, and `moltbot status` tells of "
                "processes as they were before",
                file=sys.stderr,
                flush=True,
            )

    def stops(self) -> None:
        """Let other commands know that this MoltBot takes nothing new."""
        self._stopping = True
        self.write()

    def ask_early(self, question: str) -> None:
        """Start the process that asks the first question, so that it has loaded what it needs when the core serves."""
        if question:
            module = [sys.executable, "-m", "moltbot_server.cli.first_question"]
            self._asking = subprocess.Popen(
                [*module, str(self._workspace.folder), question],
                stdin=subprocess.PIPE,
                process_group=0,
            )

    def measure_once(self) -> None:
        """Have it measured, if it never was, how the model runs best here: beside all else, for the starts to come."""
        own = self._settings.model_type.strip().lower() != _SCRIPTED and self._settings.engine in ("", INLINE)
        wanted = os.environ.get("MOLTBOT_FIRST_TUNING", "").strip().lower() != "off"
        # Tied to this process by its input, as the system would not tell it that we are gone.
        module = (sys.executable, "-m", "moltbot_server.cli.tied", "moltbot_server.cli.first_tuning")
        if own and wanted and self._measuring is None and not self._workspace.tuning_file.exists():
            self._measuring = subprocess.Popen(
                [*module, "--workspace", str(self._workspace.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
            )

    def reap(self) -> None:
        """Let processes that have done their part be gone from the system's list."""
        for process in filter(None, (self._asking, self._measuring)):
            process.poll()

    def close(self) -> None:
        """Take away what is left: helping processes that still run, and the socket of an engine that was killed."""
        if self._measuring is not None:
            _end(self._measuring)
        if self._ports.engine:
            self._workspace.engine_socket.unlink(missing_ok=True)
        for number in range(1, self._settings.workers + 1):
            self._workspace.core_socket(number).unlink(missing_ok=True)
        for name in self._adapters():
            self._workspace.adapter_socket(name).unlink(missing_ok=True)
        self._workspace.forget_boards()
        if self._asking is not None:
            if self._asking.stdin:
                self._asking.stdin.close()
            self._asking.terminate()
            self._asking.wait()
