"""What both dialects need of the parts of messages: pictures, arguments as JSON, words for what is left out."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import msgspec

from moltbot_server.errors import UnsupportedContent
from moltbot_server.turns import MediaPart, Message, Part, TextPart, Tool

_PICTURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def is_plain(parts: Sequence[Part]) -> bool:
    """Tell whether parts are nothing but text."""
    return all(isinstance(part, TextPart) for part in parts)


def media_type(part: MediaPart) -> str:
    """Return the media type of a picture, by its first bytes where nobody said it."""
    if part.media_type:
        return part.media_type
    return next((kind for begin, kind in _PICTURES.items() if part.data.startswith(begin)), "image/png")


def as_base64(part: MediaPart) -> str:
    """Return the bytes of a picture as text."""
    return base64.b64encode(part.data).decode("ascii")


def address(part: MediaPart) -> str:
    """Return the address of a picture that is sent by reference.

    Raises:
        UnsupportedContent: a provider could not fetch it.
    """
    if not part.uri.startswith(("https://", "http://", "data:image/")):
        raise UnsupportedContent("parts", "send the picture by value, or by an https address that the provider reaches")
    return part.uri


def left_out(part: MediaPart) -> str:
    """Return the words that stand for media which a model cannot read, from turns that another model answered."""
    return f"[{part.kind}: {part.alt_text or part.filename}]" if part.alt_text or part.filename else f"[{part.kind}]"


def schema(tool: Tool) -> msgspec.Raw:
    """Return the JSON Schema of a tool's arguments; the empty object where it takes none."""
    return msgspec.Raw((tool.parameters_json or '{"type":"object","properties":{}}').encode())


def arguments(text: str) -> msgspec.Raw:
    """Return the arguments of a call as JSON; an empty object where they are none."""
    try:
        if isinstance(msgspec.json.decode(text), dict):
            return msgspec.Raw(text.encode())
    except (ValueError, RecursionError):
        pass  # what an earlier model wrote
    return msgspec.Raw(b"{}")


_PER_TOKEN = 3.5  # letters of a Latin script; what is written without spaces takes about a token for each character
_PER_PICTURE = 1200
_PER_MESSAGE = 4


def estimate(message: Message) -> int:
    """Return about how many tokens a message takes, rather too many than too few."""
    total = _PER_MESSAGE
    for part in message.parts:
        if isinstance(part, TextPart):
            total += estimate_text(part.text)
        elif isinstance(part, MediaPart):
            total += _PER_PICTURE
        else:
            given = part.output if hasattr(part, "output") else part.arguments_json
            total += 8 + estimate_text(given)
    return total


def estimate_text(text: str) -> int:
    """Return about how many tokens a text takes.

    In UTF-8 a character beyond ASCII has one to three bytes more than a letter. Half of these is a good guess of its
    tokens in any script: one for Chinese, a half for Cyrillic, one and a half for an emoji.
    """
    if text.isascii():
        return int(len(text) / _PER_TOKEN) + 1 if text else 0
    more = (len(text.encode("utf-8", "surrogatepass")) - len(text)) / 2
    return int(max(0.0, len(text) - more) / _PER_TOKEN + more) + 1
