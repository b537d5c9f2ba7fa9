"""The process of the HTTP adapter: settings, listening, signals, leaving."""

import asyncio
import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

import uvloop
from aiohttp import web

from moltbot_adapters import logs
from moltbot_adapters.http import pulse
from moltbot_adapters.http.app import build_app
from moltbot_adapters.http.metrics import forget_process
from moltbot_adapters.http.server import Runner
from moltbot_adapters.http.settings import Settings, UnsafeSettings, parse
from moltbot_adapters.http.signin import KeyFile
from moltbot_adapters.logs import fields

log = logging.getLogger("moltbot.http")


def main(arguments: Sequence[str]) -> int:
    """Runs the adapter until it is told to leave.

    Returns 0 after a signal, 1 when it cannot listen, 69 when the disk is full, 78 when the settings, the key file, the
    state folder or the place of its own socket are not usable.
    """
    try:
        settings = parse(arguments)
        KeyFile(settings.key_file)
    except (UnsafeSettings, OSError, ValueError) as error:
        print(f"moltbot http: {error}", file=sys.stderr)
        return os.EX_CONFIG
    logs.configure(settings.log_level, settings.log_json)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(settings))


async def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; a second one cuts the grace short. Returns the exit status."""
    leave, at_once = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (at_once if leave.is_set() else leave).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    try:
        runner = Runner(build_app(settings), settings)
        end_pulse = await pulse.listen(settings.pulse) if settings.pulse else None
    except (OSError, ValueError) as error:
        if _is_full(error) or _is_full(error.__cause__):
            print("moltbot http: the disk is full: make room, and start it again", file=sys.stderr)
            return os.EX_UNAVAILABLE
        print(f"moltbot http: {error}", file=sys.stderr)
        return os.EX_CONFIG
    try:
        await runner.setup()
        try:
            port = await _listen(runner, settings)
        except OSError as error:
            print(f"moltbot http: {_why(error, settings)}", file=sys.stderr)
            return 1
        if KeyFile(settings.key_file).readable_by_others():
            log.warning("other users can read the key file; its mode should be 0600")
        gc.collect()
        gc.freeze()  # what the start made stays; no collection has to walk it again
        log.info("listening", extra=fields(host=settings.host, port=port, core=settings.core, pid=os.getpid()))
        own = f"unix:{settings.pulse}" if settings.pulse else ""
        print(json.dumps({"ready": True, "port": port, "pulse": own}), flush=True)  # for whoever started this process
        await leave.wait()
        log.info("leaving", extra=fields(grace_s=settings.drain_s))
        return 0
    finally:
        await _clean_up(runner, at_once)
        if end_pulse is not None:
            end_pulse()
        forget_process()


async def _listen(runner: Runner, settings: Settings) -> int:
    # Without --reuse-port a second process on the same port must fail, not share it by chance.
    site = web.TCPSite(
        runner, settings.host, settings.port, backlog=512, reuse_address=True, reuse_port=settings.reuse_port or None
    )
    await site.start()
    port: int = runner.addresses[0][1]
    return port


async def _clean_up(runner: Runner, at_once: asyncio.Event) -> None:
    cleaning = asyncio.create_task(runner.cleanup())
    hurry = asyncio.create_task(at_once.wait())
    await asyncio.wait((cleaning, hurry), return_when=asyncio.FIRST_COMPLETED)
    if not cleaning.done():
        log.info("leaving at once")
        os._exit(0)  # asked for twice: nothing here needs to be saved
    hurry.cancel()
    await cleaning


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _why(error: OSError, settings: Settings) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {settings.port} on {settings.host} is in use; choose another one with --port"
    if error.errno == errno.EACCES:
        return f"port {settings.port} may not be used by this user; choose one above 1023 with --port"
    if isinstance(error, socket.gaierror):
        return f"{settings.host} is not an address of this machine"
    return f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}"
