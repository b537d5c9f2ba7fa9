"""`python -m moltbot_server.cli.tied MODULE ...`: runs a module that is asked to leave when the standard input ends.

For systems whose kernel does not tell a child that its parent died.
"""

import os
import runpy
import signal
import sys
import threading


def _leave_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
