"""Where a request comes from: the peer behind proxies, the host it was sent to, the page that sent it."""

import ipaddress
import logging
from urllib.parse import urlsplit

from aiohttp import web

from moltbot_adapters.http.errors import HttpError
from moltbot_adapters.http.settings import Settings, is_loopback
from moltbot_adapters.logs import fields

log = logging.getLogger("moltbot.http")

_FORWARDED = ("X-Forwarded-For", "Forwarded", "X-Real-Ip", "Via")
_UNNAMED = (
    "It came through a proxy that `trusted_proxies` in moltbot.yaml does not name; "
    "if that proxy is meant to be there, add its address and start MoltBot again."
)


class Origin:
    """Judges where requests come from. Headers of proxies count only when the peer is one that was named."""

    def __init__(self, settings: Settings) -> None:
        self._proxies = settings.trusted_proxies
        self._loopback_only = settings.loopback_only
        self._bound_host = settings.host
        self._told = False

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
            told = "This server answers to localhost only; open it as localhost."
            raise self._refusal(request, "host_not_allowed", told, self._from_stranger(request))

    def check_same_origin(self, request: web.Request) -> None:
        """Refuses a browser's request that the chat page itself did not send."""
        site = request.headers.get("Sec-Fetch-Site")
        origin = request.headers.get("Origin")
        safe = request.method in ("GET", "HEAD")
        if site is not None and site != "same-origin" and not (safe and site == "none"):
            raise self._foreign(request)
        if origin is not None and not self._own_origin(request, origin, https=self.is_https(request)):
            unsaid = self._from_stranger(request) and self._own_origin(request, origin, https=True)
            raise self._foreign(request, unnamed_proxy=unsaid)
        if safe:
            return
        if site is None and origin is None:
            raise self._foreign(request)
        if request.headers.get("X-MoltBot") != "1":
            raise HttpError(403, "header_missing", "The header X-MoltBot: 1 is missing.")

    def _own_origin(self, request: web.Request, origin: str, *, https: bool) -> bool:
        scheme = "https" if https else "http"
        return origin.lower() == f"{scheme}://{request.headers.get('Host', '')}".lower()

    def _foreign(self, request: web.Request, *, unnamed_proxy: bool = False) -> HttpError:
        told = "The request was not sent by this server's own page."
        return self._refusal(request, "foreign_origin", told, unnamed_proxy)

    def _refusal(self, request: web.Request, code: str, told: str, unnamed_proxy: bool) -> HttpError:
        if not unnamed_proxy:
            return HttpError(403, code, told)
        if not self._told:
            self._told = True
            log.warning(
                "requests through a proxy are refused that `trusted_proxies` in moltbot.yaml does not name: "
                "add its address if it is meant to be there, and start MoltBot again",
                extra=fields(peer=_peer(request), reason=code),
            )
        return HttpError(403, code, f"{told} {_UNNAMED}")

    def _from_stranger(self, request: web.Request) -> bool:
        forwarded = any(name in request.headers for name in (*_FORWARDED, "X-Forwarded-Proto"))
        return forwarded and not self._from_proxy(request)

    def _from_proxy(self, request: web.Request) -> bool:
        if not self._proxies:
            return False
        try:
            peer = ipaddress.ip_address(_peer(request))
        except ValueError:
            return False
        return any(peer in network for network in self._proxies)


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
