"""`python -m moltbot_server.cli`: the same as the command `moltbot`."""

from moltbot_server.cli import main

main()
