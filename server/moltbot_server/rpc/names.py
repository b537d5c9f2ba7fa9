"""Resource names: `sessions/{session}/turns/{turn}` and their kin, read and written."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Annotated, Any

import msgspec

from moltbot_server.errors import InvalidField, InvalidPageToken
from moltbot_server.turns import SessionKey, TurnKey

_SESSION = re.compile(r"sessions/(?!\.+\Z)([A-Za-z0-9._~-]{1,128})\Z")
_TURN = re.compile(r"sessions/(?!\.+/)([A-Za-z0-9._~-]{1,128})/turns/([1-9][0-9]{0,17})\Z")
_MODEL = re.compile(r"models/([A-Za-z0-9._~:/-]{1,128})\Z")
_DELIVERY = re.compile(r"deliveries/([0-9a-f]{24})\Z")
_CHANNEL = re.compile(r"[a-z0-9_-]{1,32}\Z")
_PLUGIN = re.compile(r"plugins/([A-Za-z0-9._~-]{1,128})\Z")


def session_name(session: str) -> str:
    """Return `sessions/{session}`."""
    return f"sessions/{session}"


def turn_name(session: str, ordinal: int) -> str:
    """Return `sessions/{session}/turns/{turn}`."""
    return f"sessions/{session}/turns/{ordinal}"


def message_name(session: str, message: str) -> str:
    """Return `sessions/{session}/messages/{message}`."""
    return f"sessions/{session}/messages/{message}"


def read_session(workspace: str, name: str, field: str) -> SessionKey:
    """Return the key of a session's name.

    Raises:
        InvalidField: it is not `sessions/{session}`.
    """
    found = _SESSION.match(name)
    if found is None:
        raise InvalidField(
            field, "use `sessions/{session}` with 1 to 128 characters of A-Z a-z 0-9 . _ ~ -, not only dots"
        )
    return SessionKey(workspace=workspace, session=found[1])


def read_segment(prefix: str, name: str, field: str) -> str:
    """Return what follows the prefix of a name, for somebody else to check; empty stays empty.

    Raises:
        InvalidField: it does not begin with the prefix, or nothing follows.
    """
    if not name:
        return ""
    if not name.startswith(prefix) or len(name) == len(prefix):
        raise InvalidField(field, f"use `{prefix}` and 1 to 128 characters of A-Z a-z 0-9 . _ ~ -")
    return name[len(prefix) :]


def read_turn(workspace: str, name: str, field: str) -> TurnKey:
    """Return the key of a turn's name.

    Raises:
        InvalidField: it is not `sessions/{session}/turns/{turn}`.
    """
    found = _TURN.match(name)
    if found is None:
        raise InvalidField(field, "use `sessions/{session}/turns/{turn}`, as the `accepted` event names it")
    return TurnKey(session=SessionKey(workspace=workspace, session=found[1]), ordinal=int(found[2]))


def read_model(name: str, field: str) -> str:
    """Return the id of a model's name; empty stays empty.

    Raises:
        InvalidField: it is not `models/{model}`.
    """
    if not name:
        return ""
    found = _MODEL.match(name)
    if found is None:
        raise InvalidField(field, "use `models/{model}`")
    return found[1]


def delivery_name(id: str) -> str:
    """Return `deliveries/{delivery}`."""
    return f"deliveries/{id}"


def read_delivery(name: str, field: str) -> str:
    """Return the id of a delivery's name.

    Raises:
        InvalidField: it is not `deliveries/{delivery}`.
    """
    found = _DELIVERY.match(name)
    if found is None:
        raise InvalidField(field, "use `deliveries/{delivery}`, as the delivery is named")
    return found[1]


def read_channel(name: str, field: str) -> str:
    """Return the name of a channel that deliveries are made to.

    Raises:
        InvalidField: it cannot be one.
    """
    if not _CHANNEL.match(name):
        raise InvalidField(field, "use 1 to 32 characters of a-z 0-9 _ -, such as `slack`")
    return name


def read_plugin(name: str, field: str) -> str:
    """Return the id of a plugin's name.

    Raises:
        InvalidField: it is not `plugins/{plugin}`.
    """
    found = _PLUGIN.match(name)
    if found is None:
        raise InvalidField(field, "use `plugins/{plugin}`")
    return found[1]


def page_size(asked: int, *, default: int, most: int) -> int:
    """Return how many entries a page is to hold.

    Raises:
        InvalidField: it is negative.
    """
    if asked < 0:
        raise InvalidField("page_size", f"use 1 to {most}, or 0 for {default}")
    return min(asked, most) or default


def write_token(scope: tuple[str, ...], position: tuple[float | str, ...]) -> str:
    """Return an opaque page token for a position; only the list that `scope` names takes it back."""
    return base64.urlsafe_b64encode(msgspec.json.encode((_mark(scope), *position))).decode().rstrip("=")


def read_time_token(scope: tuple[str, ...], token: str) -> tuple[float, str] | None:
    """Return the position of a token of a list ordered by time, or None for the first page.

    Raises:
        InvalidPageToken: this list did not give it.
    """
    if not token:
        return None
    at, name = _read_token(scope, token, tuple[str, float, str])
    return at, name


def read_place_token(scope: tuple[str, ...], token: str) -> tuple[int, int]:
    """Return the position of a token of a list of messages; the first page is (0, 0).

    Raises:
        InvalidPageToken: this list did not give it.
    """
    if not token:
        return 0, 0
    ordinal, index = _read_token(scope, token, tuple[str, _Place, _Place])
    return ordinal, index


def read_text_token(scope: tuple[str, ...], token: str) -> tuple[str, str, str] | None:
    """Return the position of a token of a list ordered by three texts, or None for the first page.

    Raises:
        InvalidPageToken: this list did not give it.
    """
    if not token:
        return None
    first, second, third = _read_token(scope, token, tuple[str, str, str, str])
    return first, second, third


_Place = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


def _read_token(scope: tuple[str, ...], token: str, form: Any) -> Any:
    try:
        raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        mark, *position = msgspec.json.decode(raw, type=form)
    except (ValueError, msgspec.MsgspecError):
        mark, position = "", []
    if mark != _mark(scope):
        raise InvalidPageToken("page_token", "this list did not give that token; start again without one")
    return position


def _mark(scope: tuple[str, ...]) -> str:
    return hashlib.blake2b(msgspec.json.encode(scope), digest_size=6).hexdigest()
