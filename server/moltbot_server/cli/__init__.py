"""The command `moltbot`."""

import signal


def main() -> None:
    """Run the command line and leave with its exit status."""
    # Ctrl-C ends what is not there yet at once, and does not tell at which line of which import it was.
    waiting = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waiting:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Late: the children of `moltbot start` import this package too and need nothing of it.
    from moltbot_server.cli.encoding import leave_ascii, open_all, take_anything

    leave_ascii()
    open_all()
    take_anything()
    from moltbot_server.cli.commands import run

    if waiting:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
