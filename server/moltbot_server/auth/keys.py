"""Credentials: a key of the workspace becomes a principal. What is compared with a stranger's words is a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from moltbot_server.auth.policy import POLICY
from moltbot_server.errors import PermissionDenied, Unauthenticated
from moltbot_server.turns import Principal

_SCHEME = "bearer "
_LONGEST = 512
_MOST_HEADERS = 1024

ANONYMOUS = Principal(workspace="", key_id="", role="public")


class Authenticator:
    """Knows the keys of this core by their digests."""

    def __init__(self, keys: Mapping[str, Principal]) -> None:
        """`keys` maps each key's text to whom it stands for."""
        self._principals = {_digest(key): principal for key, principal in keys.items()}
        self._admitted: dict[str, Principal] = {}

    def admit(self, method: str, authorization: str | None) -> Principal:
        """Return who calls a method with an `authorization` header.

        Raises:
            Unauthenticated: there is no credential, or it is not known.
            PermissionDenied: the credential may not call the method, or the method has no rule.
        """
        try:
            roles = POLICY[method]
        except KeyError:
            raise PermissionDenied("this method has no access rule and is closed") from None
        if roles is None:
            return ANONYMOUS
        # Headers that were good once are told by a hash with a secret seed; only what is new costs a digest.
        principal = self._admitted.get(authorization or "") or self._principal(authorization)
        if principal.role not in roles:
            raise PermissionDenied("this key's role may not do that")
        return principal

    def _principal(self, authorization: str | None) -> Principal:
        if not authorization or authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthenticated(
                "no credential: send the metadata `authorization: Bearer <key>`; `moltbot init` makes the key"
            )
        if len(authorization) <= _LONGEST:
            # A look-up by digest tells nothing through its timing: nobody can choose digests that are nearly right.
            principal = self._principals.get(_digest(authorization[len(_SCHEME) :].strip()))
            if principal is not None:
                if len(self._admitted) < _MOST_HEADERS:
                    self._admitted[authorization] = principal
                return principal
        raise Unauthenticated(
            "this key is not known here; use the one in the workspace's `key` file, and restart MoltBot if that is new"
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
