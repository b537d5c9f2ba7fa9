"""`python -m moltbot_server.cli.first_question WORKSPACE TEXT`: asks once the line with the address has come in.

A process of its own, so that the supervisor need not load gRPC; started early, so that nobody waits for that.
"""

import asyncio
import json
import sys
from pathlib import Path

from moltbot import MoltBotClientError

from moltbot_server.cli.asking import Place, ask_first, failure
from moltbot_server.cli.encoding import take_anything
from moltbot_server.cli.terminal import Failure
from moltbot_server.workspace import Workspace


def main() -> int:
    """Wait for the address, ask, print; return the exit status."""
    take_anything()
    folder, text = sys.argv[1:]
    line = sys.stdin.readline()
    if not line:
        return 0  # MoltBot never became ready and has said why
    place = Place(address=json.loads(line)["address"], key=Workspace(folder=Path(folder)).read_key())
    try:
        asyncio.run(ask_first(place, text))
    except (MoltBotClientError, Failure) as error:
        shown = failure(error) if isinstance(error, MoltBotClientError) else error
        print(f"\nmoltbot: the first question was not answered: {shown.message}", file=sys.stderr)
        return int(shown.status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
