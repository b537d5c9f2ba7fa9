"""Who may use which route: one table, and no route without an entry."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Access(enum.Enum):
    """What a route asks of its caller."""

    PUBLIC = "public"
    """Nothing."""
    COOKIE = "cookie"
    """A browser that is signed in."""
    BEARER = "bearer"
    """An `Authorization: Bearer` key; whether it is good is for the core to say."""
    LOCAL = "local"
    """A program on this machine, reached without a proxy."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route asks, and whether a browser must prove that its own page sent the request."""

    access: Access
    same_origin: bool = False


_PUBLIC = Rule(Access.PUBLIC)
_BROWSER = Rule(Access.COOKIE, same_origin=True)
_BEARER = Rule(Access.BEARER)

POLICY: Mapping[tuple[str, str], Rule] = {
    ("GET", "/"): _PUBLIC,  # the same page for all; it asks for sign-in itself
    ("GET", "/login"): _PUBLIC,
    ("GET", "/static/{name}"): _PUBLIC,
    ("GET", "/health"): _PUBLIC,  # one word for strangers, more for this machine
    ("GET", "/metrics"): Rule(Access.LOCAL),
    ("POST", "/api/login"): Rule(Access.PUBLIC, same_origin=True),
    ("POST", "/api/logout"): Rule(Access.PUBLIC, same_origin=True),
    ("GET", "/api/me"): _BROWSER,
    ("GET", "/api/sessions"): _BROWSER,
    ("DELETE", "/api/sessions/{session}"): _BROWSER,
    ("GET", "/api/sessions/{session}/messages"): _BROWSER,
    ("POST", "/api/turns"): _BROWSER,
    ("GET", "/api/sessions/{session}/turns/{turn}/events"): _BROWSER,
    ("POST", "/api/sessions/{session}/turns/{turn}/cancel"): _BROWSER,
    ("POST", "/v1/chat/completions"): _BEARER,
    ("GET", "/v1/models"): _BEARER,
    ("GET", "/v1/models/{model}"): _BEARER,
}
"""(method, route template) -> rule. HEAD is judged like GET."""


def rule_for(method: str, template: str) -> Rule | None:
    """Returns the rule of a route, or None: then nobody may use it."""
    return POLICY.get(("GET" if method == "HEAD" else method, template))
