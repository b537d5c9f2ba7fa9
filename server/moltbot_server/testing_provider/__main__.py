"""The process behind `moltbot mock-provider`: `python -m moltbot_server.testing_provider OPTIONS`.

OPTIONS is one JSON object: `port`, `host`, `json`, `file` (a script in YAML) and `script` (what goes before the file).
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop
import yaml

from moltbot_server.testing_provider import MockProvider, Script, ScriptError
from moltbot_server.testing_provider.server import loopback

# Those of every command of ours; cli, which has their names, stands beside this and not below.
_USAGE, _UNAVAILABLE, _CONFIG, _INTERRUPTED = 2, 69, 78, 130


def main(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C and return the exit status."""
    if len(arguments) != 1:
        print(f"usage: {__doc__}", file=sys.stderr)
        return _USAGE
    options = json.loads(arguments[0])
    try:
        loopback(options["host"])
    except ValueError as error:
        return _fail(str(error), _USAGE)
    try:
        script = _script(options)
        return uvloop.run(_serve(script, options))
    except ScriptError as error:
        return _fail(f"the script cannot be followed: {error}", _CONFIG)
    except KeyboardInterrupt:  # before it was ready
        return _INTERRUPTED
    except OSError as error:
        text = f"cannot listen on {options['host']} port {options['port']}: {error.strerror or error}; try --port 0"
        return _fail(text, _UNAVAILABLE)


def _fail(message: str, status: int) -> int:
    print(f"moltbot: {message}", file=sys.stderr)
    return status


def _script(options: Mapping[str, Any]) -> Script:
    written: dict[str, Any] = {}
    if options.get("file"):
        path = Path(options["file"])
        try:
            found = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ScriptError(f"{path}: {error}") from None
        if not isinstance(found, dict | None):
            raise ScriptError(f"{path}: must be a mapping")
        written = found or {}
    return Script.read(written | options.get("script", {}))


async def _serve(script: Script, options: Mapping[str, Any]) -> int:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with MockProvider(script).running(options["port"], options["host"]) as provider:
        print(json.dumps({"address": provider.address}) if options.get("json") else _ready(provider), flush=True)
        await ended.wait()
    return 0


def _ready(provider: MockProvider) -> str:
    keys = [key for key in provider.script.keys if key not in provider.script.out_of_quota]
    # A key that was given is not said again on a screen.
    header = '"Authorization: Bearer $KEY"' if keys else "'Authorization: Bearer any-key-at-all'"
    body = '{"model": "mock-model", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'
    return (
        f"The mock provider is ready on {provider.address}. Ctrl-C ends it. Try:\n"
        f"  curl -N {provider.address}/v1/chat/completions -H {header} \\\n"
        f"    -H 'Content-Type: application/json' -d '{body}'"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
