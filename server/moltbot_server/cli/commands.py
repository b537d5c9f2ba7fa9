"""The commands, their options and their help. What a command does is imported when it is run: help stays quick.

argparse, because every start of MoltBot and every `moltbot chat` in a script passes here: it costs 10 ms and 2 MB where
the frameworks that were tried cost 500 ms and 30 MB.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata

from moltbot_server.cli.cache import add_cache
from moltbot_server.cli.deadletters import add_deadletters
from moltbot_server.cli.failover import add_failover
from moltbot_server.cli.key import add_key
from moltbot_server.cli.mock_provider import add_mock_provider
from moltbot_server.cli.model import add_model
from moltbot_server.cli.route import add_route
from moltbot_server.cli.running import Running, is_held, joined, reachable
from moltbot_server.cli.session import add_session
from moltbot_server.cli.store import add_store
from moltbot_server.cli.terminal import Exit, Failure, check_readable, command, folder_is_there, shown
from moltbot_server.cli.under import folder
from moltbot_server.cli.usage import add_usage
from moltbot_server.config import ConfigError, load_settings
from moltbot_server.workspace import Workspace, WorkspaceError, find_workspace

_STATUSES = """\
exit status: 0 done; 1 failed; 2 wrong usage; 69 not running, a port is taken, or the store or the model
does not answer; 77 not allowed; 78 wrong configuration; 130 interrupted"""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave; every foreseen failure ends with one message and its exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["bench"]:
        # It has options of its own, and what it loads is of no use to the other commands.
        os.execv(sys.executable, [sys.executable, "-m", "moltbot_server.bench", *words[1:]])
    if words[:1] == ["--version"]:
        words[0] = "version"
    given = argparse.Namespace()
    try:
        for word in words:
            check_readable(word, "the argument")
        parser, names = _parser()
        if words and not words[0].startswith("-") and words[0] not in names:
            parser.error(_mistyped(words[0], names))
        given, rest = parser.parse_known_args(words or ["--help"], given)
        if rest:
            asked = next((names[word] for word in words if word in names), parser)
            asked.error(_not_known(rest, asked.format_usage()))
        sys.exit(given.run(given))
    except Failure as failure:
        _leave(failure.message, failure.status)
    except WorkspaceError as error:
        init = command("init", find_workspace(os.environ, getattr(given, "workspace", None)))
        _leave(str(error).replace("`moltbot init`", f"`{init}`"), Exit.CONFIG)
    except ConfigError as error:
        count = f"{len(error.problems)} things are" if len(error.problems) > 1 else "one thing is"
        problems = "\n".join(f"  {problem}" for problem in error.problems)
        _leave(f"{count} wrong with the configuration (docs/configuration.md has all keys):\n{problems}", Exit.CONFIG)
    except FileNotFoundError:
        if folder_is_there():
            raise
        _leave("the current folder is not there any more: go to another one with `cd`", Exit.CONFIG)
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has enough
        _give_output_up()
        sys.exit(Exit.FAILED)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP) and error.filename:
            _leave(f"cannot use {error.filename}: {error.strerror}", Exit.CONFIG)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        _give_output_up()
        _leave(f"cannot write {error.filename or 'the output'}: {error.strerror}", Exit.FAILED)


def _give_output_up() -> None:
    """Let what is still to be written go nowhere: it would fail once more when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(message: str, status: Exit) -> None:
    print(f"moltbot: {message}", file=sys.stderr)
    sys.exit(status)


def _mistyped(word: str, names: Collection[str]) -> str:
    import difflib  # late: only this message needs it

    near = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean `{command(near[0])}`?" if near else f"the commands are {', '.join(names)}"
    return f"there is no command {word!r}; {hint}"


def _not_known(words: Sequence[str], usage: str) -> str:
    """Return what is wrong with words that a command did not take, whose usage names all that it does."""
    import difflib

    options = re.findall(r"--[a-z-]+", usage) if words[0].startswith("--") else []
    near = difflib.get_close_matches(words[0].partition("=")[0], options, n=1)
    return f"unrecognized arguments: {shlex.join(words)}" + (f"; did you mean {near[0]}?" if near else "")


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser and those of its commands by name."""
    parser = argparse.ArgumentParser(
        prog="moltbot",
        description="A chatbot core that speaks gRPC, with a web chat and an OpenAI-compatible API beside it.",
        epilog=f"first steps:\n  moltbot start          then, in another terminal:\n  moltbot chat\n\n{_STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="the same as the command version")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], what: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n".join(f"  {example}" for example in examples)
        added = commands.add_parser(
            name,
            help=(what[0].lower() + what[1:]).partition(".")[0],
            description=what,
            epilog=f"examples:\n{lines}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(run=run)
        if name not in ("version", "mock-provider"):  # they need no workspace
            text = "the workspace folder (default: MOLTBOT_WORKSPACE, else ./.moltbot if it exists, else ~/.moltbot)"
            added.add_argument("-w", "--workspace", type=folder, metavar="DIR", help=text)
        return added

    add("init", _init, "Make a workspace: a private folder with a key and a commented configuration.\nSafe to repeat.",
        "moltbot init", "moltbot init --workspace ./bot")  # fmt: skip
    _add_start(add)
    _add_chat(add)
    _add_engine(add)
    add_model(add)
    add_key(add)
    add_session(add)
    add_usage(add)
    add_store(add)
    add_cache(add)
    add_deadletters(add)
    add_route(add)
    add_failover(add)
    add("link", _link, "Print a fresh link that opens the web chat once, within 15 minutes.", "moltbot link")
    status = add("status", _status, "Tell what runs, where, for how long, and what memory it takes.",
                 "moltbot status", "moltbot status --json")  # fmt: skip
    version = add("version", _version, "Print the version.", "moltbot version --json")
    for each in (status, version):
        each.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    commands.add_parser("bench", help="measure this machine (moltbot bench --help)", add_help=False)
    add_mock_provider(add)
    return parser, commands.choices


_Add = Callable[..., argparse.ArgumentParser]


def _add_start(add: _Add) -> None:
    start = add(
        "start",
        _start,
        "Start the core, the web chat and the HTTP API, and keep them running.\n"
        "What crashes is started again. Ctrl-C lets answers under way end; Ctrl-C twice leaves at once.",
        "moltbot start",
        "moltbot start --port 3000 --log-level debug",
        "moltbot start --workspace ./bot --reload",
    )
    start.add_argument("--host", help="where the web chat and HTTP API listen (default: 127.0.0.1)")
    start.add_argument("--port", type=int, help="port of the web chat and HTTP API (default: 8000)")
    start.add_argument("--grpc-port", type=int, metavar="PORT", help="port of the core (default: 50051)")
    start.add_argument("--metrics-port", type=int, metavar="PORT", help="port of the core's metrics (default: 9464)")
    start.add_argument("--workers", type=int, metavar="COUNT", help="cores that share the work (default: 1)")
    start.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error (default: info)")
    start.add_argument("--reload", action="store_true", help="start again when code or configuration changes")
    start.add_argument("--first-question", metavar="TEXT", default="", help="ask this as soon as MoltBot is ready")


def _add_chat(add: _Add) -> None:
    chat = add(
        "chat",
        _chat,
        "Talk in the terminal, or ask one question.\nA text, or one from a pipe, gets one answer, for scripts; "
        "without, a conversation begins.",
        "moltbot chat",
        'moltbot chat "What can you do?"',
        "moltbot chat --session plan --json Hello",
        "moltbot chat < letter.txt",
    )
    chat.add_argument("text", nargs="?", metavar="TEXT", help="what to say; - reads it from the standard input")
    chat.add_argument("--session", metavar="NAME", default="", help="go on with this session, or make it")
    chat.add_argument("--model", metavar="NAME", default="", help="the model that is to answer")
    form = chat.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the whole answer as one JSON object")
    form.add_argument("--events", action="store_true", help="print every event as a JSON line")
    chat.add_argument("--address", metavar="HOST:PORT", default="", help="the core (default: MOLTBOT_ADDRESS, or ours)")
    chat.add_argument("--tls", action="store_true", help="encrypt what passes to a core elsewhere")
    chat.add_argument("--tls-ca", metavar="FILE", default="", help="the same, believing who this PEM file names alone")


def _add_engine(add: _Add) -> None:
    engine = add(
        "engine",
        _engine,
        "Serve models to cores, in a process of its own: on this machine or on another one.\n"
        "`moltbot start` runs one by itself; name another one to it with `engine:` in the configuration.\n"
        "Cores open it with the key of its workspace.",
        "moltbot engine",
        "moltbot engine --listen 127.0.0.1:50061",
    )
    engine.add_argument("--listen", metavar="ADDRESS", help="unix:PATH or HOST:PORT (default: the workspace's socket)")
    engine.add_argument("--metrics-port", metavar="PORT", help="port of its /health and /metrics (default: none)")
    engine.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error (default: info)")


def _engine(given: argparse.Namespace) -> int:
    place = find_workspace(os.environ, given.workspace)
    place.create()
    words = ["engine", "--workspace", str(place.folder)]
    flags = {"--listen": given.listen, "--metrics-port": given.metrics_port, "--log-level": given.log_level}
    for flag, value in flags.items():
        words += [flag, value] if value else []
    # It becomes the engine: signals, output and exit status are the engine's own.
    os.execv(sys.executable, [sys.executable, "-m", "moltbot_server", *words])


def _init(given: argparse.Namespace) -> int:
    from moltbot_server.cli.key_keeping import vault_problem

    place = find_workspace(os.environ, given.workspace)
    had_key = place.key_file.exists()
    done = place.create()
    for line in done:
        print(line[0].upper() + line[1:] + ".")
    problem = vault_problem(place)
    if not done:
        complete = "was there already" if problem else "is complete already"
        print(f"The workspace {shown(place.folder)} {complete}; nothing was changed.")
    if problem:
        print(f"moltbot: {problem}", file=sys.stderr)
    if not is_held(place):
        print(f"Next: {command('start', place)}")
    elif had_key:
        print(f"MoltBot runs here. Next: {command('chat', place)}")
    else:
        print("MoltBot runs here with the key that it began with: stop it and start it again to use the new one.")
    return Exit.OK


def _start(given: argparse.Namespace) -> int:
    from moltbot_server.cli.starting import start

    names = ("host", "port", "grpc_port", "metrics_port", "workers", "log_level")
    flags = {name: getattr(given, name) for name in names}
    workspace = find_workspace(os.environ, given.workspace)
    return start(workspace, flags, reload=given.reload, first_question=given.first_question)


def _chat(given: argparse.Namespace) -> int:
    try:
        return _talk_or_ask(given)
    except (Failure, WorkspaceError) as failure:
        if not (given.json or given.events):
            raise
        status = failure.status if isinstance(failure, Failure) else Exit.CONFIG
        print(json.dumps({"error": _as_json(str(failure), status)}, ensure_ascii=False), flush=True)
        return status


def _as_json(message: str, status: Exit) -> dict[str, object]:
    """Return a failure before any call in the shape of one that the core told."""
    codes = {
        Exit.UNAVAILABLE: "UNAVAILABLE",
        Exit.USAGE: "INVALID_ARGUMENT",
        Exit.NOT_ALLOWED: "UNAUTHENTICATED",
        Exit.CONFIG: "FAILED_PRECONDITION",
    }
    return {
        "code": codes.get(status, "UNKNOWN"),
        "reason": "",
        "message": message,
        "retryable": status == Exit.UNAVAILABLE,
        "retry_after": None,
        "fields": {},
    }


def _talk_or_ask(given: argparse.Namespace) -> int:
    import asyncio

    from moltbot import MoltBotClientError

    from moltbot_server.cli.asking import Place, ask
    from moltbot_server.cli.looking import Trust
    from moltbot_server.cli.reaching import find_core, key_for, store_away, words_of

    workspace = find_workspace(os.environ, given.workspace)
    key = key_for(workspace)
    trust = Trust.of(given.tls, given.tls_ca)
    address = find_core(workspace, given.address, trust)
    place = Place(
        address=address,
        key=key,
        roots=None if trust is None else trust.pem,
        store_away=lambda: store_away(workspace, address),
        words=words_of(workspace, address),
        start=command("start", workspace),
        show=command("session show", workspace),
    )
    form = "events" if given.events else "json" if given.json else "text"
    text: str | None = given.text
    if text is None and sys.stdin.isatty() and form == "text":
        from moltbot_server.cli.talking import talk

        try:
            return asyncio.run(talk(place, workspace, session=given.session, model=given.model))
        except MoltBotClientError as error:
            raise place.failure(error, "") from None
    if text is None or text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    if not text.strip():
        example = command('chat "What can you do?"', workspace)
        raise Failure(f"there is nothing to say; say something: {example}", Exit.USAGE)
    return asyncio.run(ask(place, text, session=given.session, model=given.model, form=form))


def _link(given: argparse.Namespace) -> int:
    workspace = find_workspace(os.environ, given.workspace)
    workspace.read_key()
    running = Running.read(workspace)
    base = running.http if running else _adapter_alone(workspace)
    if not base:
        place = shown(workspace.folder)
        if is_held(workspace):
            text = f"MoltBot in {place} is being started: it prints a link itself when it is ready."
        else:
            text = f"MoltBot is not running in {place}: start it with `{command('start', workspace)}`."
        raise Failure(text, Exit.UNAVAILABLE)
    print(f"{base}/login?code={workspace.mint_link(time.time())}")
    return Exit.OK


def _adapter_alone(workspace: Workspace) -> str:
    """Return where an adapter listens that was not started by `moltbot start`, as in a container; empty for none."""
    from moltbot_server.cli.status import adapter_listens

    settings = load_settings(workspace.folder, os.environ)
    address = joined(reachable(settings.host), settings.port)
    return f"http://{address}" if settings.port and adapter_listens(address) else ""


def _status(given: argparse.Namespace) -> int:
    from moltbot_server.cli.status import status

    return status(find_workspace(os.environ, given.workspace), as_json=given.json)


def _version(given: argparse.Namespace) -> int:
    number = metadata.version("moltbot")
    if given.json:
        packages = {name: metadata.version(name) for name in ("grpcio", "protobuf")}
        print(json.dumps({"moltbot": number, "python": platform.python_version(), **packages}))
    else:
        print(f"moltbot {number} (Python {platform.python_version()})")
    return Exit.OK
