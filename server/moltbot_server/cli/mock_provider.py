"""`moltbot mock-provider`: its options and its help. The provider itself is a process that the command becomes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

_WHAT = """\
Stand in for a remote model provider on this machine, and fail as told.
It speaks the OpenAI dialect (/v1/chat/completions, /v1/models) and the Anthropic one (/v1/messages), streamed or not.
What it answers and what goes wrong is its script: flags, a YAML file, and PUT /control/script while it runs.
A flag goes before the file's field of the same name. docs/mock-provider.md is the guide."""

_FAULTS = """\
faults: KIND, its options, and how often, in one word or with spaces in quotes; the first that a call meets counts
  error [status=500|502|503|529]   rate_limit [retry_after=1s]   unauthorized [status=401|403]   wrong_content_type
  slow [by=5s]   hang   hang_after_first   cut [after=CHUNKS]   empty   endless   huge [size=10MiB]   split_utf8
  broken_sse [how=not_json|truncated|no_done]
how often: share=10% of the calls, every=3 for each third one, until="5 calls" or until=30s; without, every call"""

_FIELDS = (
    *("seed", "text", "echo", "reasoning", "use_tools", "chunks", "first_token", "pace"),
    *("faults", "keys", "out_of_quota", "context_length"),
)
_Add = Callable[..., argparse.ArgumentParser]


def add_mock_provider(add: _Add) -> None:
    """Add the command."""
    added = add(
        "mock-provider",
        _run,
        _WHAT,
        "moltbot mock-provider --port 9090",
        "moltbot mock-provider --first-token 200ms-2s --pace 20ms --chunks 50",
        'moltbot mock-provider --fault "error status=503 share=10%" --fault "hang every=20" --seed 7',
        'moltbot mock-provider --fault "rate_limit retry_after=2s until=5 calls" --key one --key two',
        "moltbot mock-provider --script drill.yaml --json",
        """curl -X PUT localhost:9090/control/script -d '{"faults": [{"kind": "cut", "after": 3}]}'""",
        "curl localhost:9090/control/calls",
    )
    added.epilog = f"{added.epilog}\n\n{_FAULTS}"
    added.add_argument("--host", default="127.0.0.1", help="an address of the loopback (default: 127.0.0.1)")
    added.add_argument("--port", type=_port, default=0, help="its port; 0 takes any free one (default: 0)")
    added.add_argument("--json", action="store_true", help='print one JSON line {"address": …} when it is ready')
    added.add_argument("--script", metavar="FILE", help="a script in YAML")
    added.add_argument("--seed", metavar="N", help="what shares and ranges are drawn with (default: 0)")
    _add_answers(added)
    added.add_argument(
        "--fault", metavar="TEXT", dest="faults", help="what goes wrong; may be repeated", action="append"
    )
    added.add_argument(
        "--key", metavar="K", dest="keys", help="a good key, others get 401; may be repeated", action="append"
    )
    added.add_argument("--context-length", metavar="N", help="what its list of models says that they read, in tokens")
    added.add_argument("--out-of-quota", metavar="K", help="a key that gets 429; may be repeated", action="append")


def _add_answers(added: argparse.ArgumentParser) -> None:
    said = added.add_mutually_exclusive_group()
    said.add_argument("--text", help="what is answered (default: a greeting)")
    said.add_argument("--echo", action="store_const", const=True, help="answer with the user's last text")
    added.add_argument("--reasoning", metavar="TEXT", help="what is thought before the answer")
    added.add_argument(
        "--use-tools", action="store_const", const=True, help="call a tool where some are offered, then tell its answer"
    )
    added.add_argument("--chunks", metavar="N", help="stream in so many equal pieces (default: word by word)")
    added.add_argument("--first-token", metavar="TIME", help="how long to the first word: 300ms, or 200ms-2s")
    added.add_argument(
        "--usage", nargs=2, metavar=("INPUT", "OUTPUT"), help="the tokens it says it took (default: words)"
    )
    added.add_argument("--pace", metavar="TIME", help="how long between two chunks (default: 0)")


def _port(written: str) -> int:
    if not written.isascii() or not written.isdigit() or int(written) > 65535:
        raise argparse.ArgumentTypeError("must be a port from 0 to 65535")
    return int(written)


def _run(given: argparse.Namespace) -> int:
    script: dict[str, Any] = {name: getattr(given, name) for name in _FIELDS if getattr(given, name) is not None}
    if given.text is not None:
        script["echo"] = False  # a file's own echo gives way to the flag, and its text to the other
    elif given.echo:
        script["text"] = None
    if given.usage is not None:
        script["usage"] = dict(zip(("input", "output"), given.usage, strict=True))
    options = {"host": given.host, "port": given.port, "json": given.json, "file": given.script, "script": script}
    # It becomes the provider: signals, output and exit status are the provider's own.
    os.execv(sys.executable, [sys.executable, "-m", "moltbot_server.testing_provider", json.dumps(options)])
