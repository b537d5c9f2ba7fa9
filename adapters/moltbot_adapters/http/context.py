"""What belongs to one request: its id, its caller, its route, and how it ended."""

import secrets
import time
from dataclasses import dataclass, field

from aiohttp import web

from moltbot_adapters.core_client import Caller
from moltbot_adapters.http.errors import HttpError
from moltbot_adapters.http.leaving import Handling


@dataclass(slots=True)
class RequestContext:
    """Grows as the request passes the guard; handlers read it."""

    request_id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    began: float = field(default_factory=time.perf_counter)
    route: str = "unknown"
    key: str = field(default="", repr=False)
    user: str = ""
    handling: Handling | None = None
    reason: str = ""
    """An error code of ours when the answer was, or ended in, an error."""

    @property
    def caller(self) -> Caller:
        """On whose behalf the core is called."""
        return Caller(key=self.key, request_id=self.request_id)

    @property
    def out_of_time(self) -> bool:
        """True when the process leaves and could wait no longer for the answer."""
        return self.handling is not None and self.handling.out_of_time

    def seconds(self) -> float:
        """Returns the time since the request came in."""
        return time.perf_counter() - self.began

    def fail(self, error: HttpError) -> HttpError:
        """Notes an error as the request's outcome and returns it."""
        self.reason = error.code or "error"
        return error


CONTEXT = web.RequestKey("context", RequestContext)
