"""The command `moltbot`."""


def main() -> None:
    """Run the command line and leave with its exit status."""
    # Late: the children of `moltbot start` import this package too and need nothing of it.
    from moltbot_server.cli.commands import run

    run()
