"""Credentials: a key of the workspace becomes a principal. Keys are kept as digests only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from moltbot_server.auth.policy import POLICY
from moltbot_server.errors import PermissionDenied, Unauthenticated
from moltbot_server.turns import Principal

_SCHEME = "bearer "
_LONGEST = 512

ANONYMOUS = Principal(workspace="", key_id="", role="public")


class Authenticator:
    """Knows the keys of this core by their digests."""

    def __init__(self, keys: Mapping[str, Principal]) -> None:
        """`keys` maps each key's text to whom it stands for; the text is not kept."""
        self._principals = {_digest(key): principal for key, principal in keys.items()}

    def admit(self, method: str, authorization: str | None) -> Principal:
        """Return who calls a method with an `authorization` header.

        Raises:
            Unauthenticated: there is no credential, or it is not known.
            PermissionDenied: the credential may not call the method, or the method has no rule.
        """
        if method not in POLICY:
            raise PermissionDenied("this method has no access rule and is closed")
        roles = POLICY[method]
        if roles is None:
            return ANONYMOUS
        principal = self._principal(authorization)
        if principal.role not in roles:
            raise PermissionDenied("this key's role may not do that")
        return principal

    def _principal(self, authorization: str | None) -> Principal:
        if not authorization:
            raise Unauthenticated(
                "no credential: send the metadata `authorization: Bearer <key>`; `moltbot init` makes the key"
            )
        if len(authorization) <= _LONGEST and authorization[: len(_SCHEME)].lower() == _SCHEME:
            # A look-up by digest tells nothing through its timing: nobody can choose digests that are nearly right.
            principal = self._principals.get(_digest(authorization[len(_SCHEME) :].strip()))
            if principal is not None:
                return principal
        raise Unauthenticated("this key is not known here; use the one in the workspace's `key` file")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
