"""`python -m moltbot_adapters ADAPTER ...`: starts one adapter as a process of its own."""

import importlib
import sys
from collections.abc import Sequence

# Each adapter names a module with `main(arguments) -> exit status`.
ADAPTERS = {"http": "moltbot_adapters.http.process"}


def main(arguments: Sequence[str]) -> int:
    """Runs the adapter that the first argument names and returns its exit status; 64 when there is no such adapter."""
    name = arguments[0] if arguments else ""
    if name not in ADAPTERS:
        print(f"usage: python -m moltbot_adapters {{{','.join(ADAPTERS)}}} ...", file=sys.stderr)
        return 64
    # Imported late on purpose: each adapter brings an SDK of its own and pays for no other.
    module = importlib.import_module(ADAPTERS[name])
    status: int = module.main(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
