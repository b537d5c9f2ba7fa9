"""Keys become principals, and only keys."""

from __future__ import annotations

import pytest
from moltbot_server.auth.keys import ANONYMOUS, Authenticator
from moltbot_server.auth.policy import MEMBER, OWNER, POLICY
from moltbot_server.errors import PermissionDenied, Unauthenticated
from moltbot_server.turns import Principal
from moltbot_server.workspace import make_key

RUN = "/moltbot.v1.ChatService/RunTurn"
KEY = make_key().text
ADA = Principal(workspace="w", key_id="ada", role=OWNER)


def _without_key(header: str | None) -> str:
    """Name a case alike in every process that collects it: the key is another one in each."""
    return ascii(header).replace(KEY.swapcase(), "swapped").replace(KEY, "key").replace(KEY[:-1], "cut")


@pytest.fixture
def authenticator() -> Authenticator:
    """Knows one owner and one member."""
    return Authenticator({KEY: ADA, "member": Principal(workspace="w", key_id="m", role=MEMBER)})


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY} "], ids=_without_key)
def test_a_known_key_is_its_principal(authenticator: Authenticator, header: str) -> None:
    assert authenticator.admit(RUN, header) == ADA


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer{KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer {KEY.swapcase()}",
        "Bearer \x00",
        "Bearer \udcff",
        "Bearer ü",
        f"Bearer {KEY} {KEY}",
        "Bearer " + "x" * 9999,
    ],
    ids=_without_key,
)
def test_anything_else_is_nobody(authenticator: Authenticator, header: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        authenticator.admit(RUN, header)

    assert KEY not in caught.value.message


def test_no_keys_means_nobody_gets_in() -> None:
    with pytest.raises(Unauthenticated):
        Authenticator({}).admit(RUN, f"Bearer {KEY}")


def test_a_method_without_a_rule_is_closed_even_to_the_owner(authenticator: Authenticator) -> None:
    for method in ("/moltbot.v1.ChatService/Other", "", "RunTurn", RUN + "/", RUN.lower()):
        with pytest.raises(PermissionDenied):
            authenticator.admit(method, f"Bearer {KEY}")


def test_a_role_does_what_its_rules_say(authenticator: Authenticator) -> None:
    for method, roles in POLICY.items():
        if roles is None:
            assert authenticator.admit(method, None) == ANONYMOUS
        elif MEMBER in roles:
            assert authenticator.admit(method, "Bearer member").key_id == "m"
        else:
            with pytest.raises(PermissionDenied):
                authenticator.admit(method, "Bearer member")
        if roles is not None:
            assert OWNER in roles


def test_the_text_of_a_key_is_kept_nowhere(authenticator: Authenticator) -> None:
    assert KEY not in repr(vars(authenticator))
    assert KEY.encode() not in b"".join(authenticator._principals)


@pytest.mark.parametrize("header", ["Basic bW9sdGJvdA==", "Bearer", "mb_0123"])
def test_another_way_to_sign_in_is_told_the_one_that_is_taken(header: str) -> None:
    authenticator = Authenticator({})
    with pytest.raises(Unauthenticated, match="Bearer <key>"):
        authenticator.admit(RUN, header)
