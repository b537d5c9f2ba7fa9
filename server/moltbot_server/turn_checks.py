"""What a turn must look like to be begun or carried on, and what makes it the same as another one."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from moltbot_server.errors import DeadlineExceeded, EmptyMessage, InvalidField, MoltBotError, TurnInterrupted
from moltbot_server.models.engine import Engine
from moltbot_server.models.limits import check_content
from moltbot_server.store.protocol import Orphan
from moltbot_server.turns import TextPart, TurnInput, encode

_NAME = re.compile(r"(?!\.+\Z)[A-Za-z0-9._~-]{1,128}\Z")  # dots alone are no name but a way up, in a path or a URL
_CHANNEL = re.compile(r"[a-z0-9_-]{0,32}\Z")
_MOST_CORES = 5
"""A turn that so many cores did not survive is given up: it may be what ends them."""
_OLDEST = 3600.0
"""Seconds after which nobody waits for an answer any more."""

# A text says something when anything of it can be seen: not blanks, controls, fillers, joiners, marks of direction,
# byte order or variation (Unicode's Default_Ignorable_Code_Point, the blank Braille pattern and the format controls).
_VISIBLE = re.compile(
    "[^\\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def check_turn(turn: TurnInput) -> None:
    """Refuse what no model could answer.

    Raises:
        InvalidField: names what is wrong.
    """
    parts = turn.parts
    if not parts:
        raise EmptyMessage("turn.parts", "the message is empty; send at least one part")
    for part in parts:
        if not isinstance(part, TextPart) or _VISIBLE.search(part.text):
            break
    else:
        raise EmptyMessage("turn.parts", "the message is blank; say something")
    if turn.session:
        if not _NAME.match(turn.session):
            raise InvalidField(
                "turn.session", "use `sessions/` and 1 to 128 characters of A-Z a-z 0-9 . _ ~ -, not only dots"
            )
        if turn.transcript is not None:
            raise InvalidField("turn.transcript", "leave turn.session empty: a transcript stands in for a session")
    if len(turn.request_id) > 128 or not turn.request_id.isprintable():
        raise InvalidField("turn.request_id", "use at most 128 printable characters; a UUID is recommended")
    if turn.channel and not _CHANNEL.match(turn.channel):
        raise InvalidField("turn.channel", "use at most 32 characters of a-z 0-9 _ -")
    if len(turn.user) > 256:
        raise InvalidField("turn.user", "use at most 256 characters")
    if turn.reply_to is not None:
        if not turn.reply_to.channel or not _CHANNEL.match(turn.reply_to.channel):
            raise InvalidField("turn.reply_to.channel", "use 1 to 32 characters of a-z 0-9 _ -")
        if not 1 <= len(turn.reply_to.address) <= 512:
            raise InvalidField("turn.reply_to.address", "use 1 to 512 characters")


def check_for_model(turn: TurnInput, engine: Engine) -> None:
    """Refuse what this model cannot read or honour.

    Raises:
        InvalidField: names it.
    """
    try:
        engine.check(turn.options)
        check_content(turn.parts, engine.capabilities)
    except InvalidField as error:
        raise error.under("turn") from None
    for index, message in enumerate(turn.transcript or ()):
        try:
            check_content(message.parts, engine.capabilities)
        except InvalidField as error:
            raise error.under(f"turn.transcript.messages[{index}]") from None


def digest_of(turn: TurnInput) -> bytes:
    """Return a digest of what a turn asks and from where, so that a repeated call can be told from a reused request_id.

    It stays the same across releases: calls are repeated while cores are being renewed.
    """
    content: tuple[Any, ...] = (
        turn.session, turn.parts, turn.model, turn.options, turn.system_prompt, turn.transcript, turn.user
    )  # fmt: skip
    if turn.channel or turn.reply_to is not None:
        content += (turn.channel, turn.reply_to)
    return hashlib.blake2b(encode(content), digest_size=16).digest()


def unfinishable(orphan: Orphan, left: float | None, *, now: float) -> MoltBotError | None:
    """Return why a turn of a core that is gone is not carried on, if so.

    `left` is how many seconds it has until its deadline, None without one; `now` is a Unix time.
    """
    if left is not None and left <= 0:
        return DeadlineExceeded("the deadline passed while the core was away")
    if orphan.epoch > _MOST_CORES or now - orphan.turn.create_time > _OLDEST:
        return TurnInterrupted("the core stopped while the turn ran, again and again or long ago")
    return None
