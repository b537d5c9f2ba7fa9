"""How the core and its store are, as the core's health service says: asked often here, and seldom there."""

import time

from moltbot_adapters.core_client import CoreClient

_GOOD = "SERVING"
_FRESH_S = 1.0
_FRESH_BAD_S = 0.1  # who waits for the core to start must not wait for the news of it
_STORE = "moltbot.store"
_STORES = {_GOOD: "ok", "NOT_SERVING": "away"}


class CoreWatch:
    """What was heard of the core a moment ago at most."""

    def __init__(self, core: CoreClient) -> None:
        self._core = core
        self._ask_again = 0.0
        self.core = "UNKNOWN"
        """What the core's health service says, such as `SERVING`."""
        self.store = "unknown"
        """`ok`, `away`, or `unknown` where the core does not say: it is not there, or of an older release."""

    @property
    def serves(self) -> bool:
        """True when the core takes calls."""
        return self.core == _GOOD

    async def look(self) -> None:
        """Hears how the core is, unless that was heard just now."""
        now = time.monotonic()
        if now < self._ask_again:
            return
        self._ask_again = now + _FRESH_BAD_S
        self.core = await self._core.health()
        self.store = _STORES.get(await self._core.health(_STORE), "unknown") if self.serves else "unknown"
        if self.serves and self.store != "away":
            self._ask_again = now + _FRESH_S
