"""Where a request comes from: the peer behind proxies, the host it was sent to, the page that sent it."""

import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from moltbot_adapters.http.errors import HttpError
from moltbot_adapters.http.settings import Settings, is_loopback

_FORWARDED = ("X-Forwarded-For", "Forwarded", "X-Real-Ip", "Via")


class Origin:
    """Judges where requests come from. Headers of proxies count only when the peer is one that was named."""

    def __init__(self, settings: Settings) -> None:
        self._proxies = settings.trusted_proxies
        self._loopback_only = settings.loopback_only
        self._bound_host = settings.host

    def is_local(self, request: web.Request) -> bool:
        """Tells whether a program on this machine sent the request itself.

        A proxy on this machine speaks for others, so whatever it sends is not local.
        """
        if any(name in request.headers for name in _FORWARDED) or self._from_proxy(request):
            return False
        return is_loopback(_peer(request))

    def is_https(self, request: web.Request) -> bool:
        """Tells whether the browser's side of the connection is encrypted, as a trusted proxy says."""
        said = request.headers.get("X-Forwarded-Proto", "") if self._from_proxy(request) else ""
        return said.rpartition(",")[2].strip().lower() == "https"

    def check_host(self, request: web.Request) -> None:
        """Refuses requests sent to a name that is not ours: a page elsewhere whose name was rebound to this machine."""
        if not self._loopback_only:
            return
        host = _hostname(request.headers.get("Host", ""))
        if not host or not (is_loopback(host) or host == self._bound_host):
            raise HttpError(403, "host_not_allowed", "This server answers to localhost only; open it as localhost.")

    def check_same_origin(self, request: web.Request) -> None:
        """Refuses a browser's request that the chat page itself did not send."""
        site = request.headers.get("Sec-Fetch-Site")
        origin = request.headers.get("Origin")
        safe = request.method in ("GET", "HEAD")
        if site is not None and site != "same-origin" and not (safe and site == "none"):
            raise _foreign()
        if origin is not None and not self._own_origin(request, origin):
            raise _foreign()
        if safe:
            return
        if site is None and origin is None:
            raise _foreign()
        if request.headers.get("X-MoltBot") != "1":
            raise HttpError(403, "header_missing", "The header X-MoltBot: 1 is missing.")

    def _own_origin(self, request: web.Request, origin: str) -> bool:
        scheme = "https" if self.is_https(request) else "http"
        return origin.lower() == f"{scheme}://{request.headers.get('Host', '')}".lower()

    def _from_proxy(self, request: web.Request) -> bool:
        if not self._proxies:
            return False
        try:
            peer = ipaddress.ip_address(_peer(request))
        except ValueError:
            return False
        return any(peer in network for network in self._proxies)


def _foreign() -> HttpError:
    return HttpError(403, "foreign_origin", "The request was not sent by this server's own page.")


def _peer(request: web.Request) -> str:
    # Not request.remote: that one can be overridden.
    name = request.transport.get_extra_info("peername") if request.transport else None
    address = str(name[0]) if name else ""
    return address.removeprefix("::ffff:")


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
