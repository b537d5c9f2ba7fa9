"""What a provider's refusal means: whose fault it is, whether another key helps, and what may be told of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from moltbot_server.errors import (
    ContentTooLarge,
    ContextLengthExceeded,
    InvalidField,
    ModelCredential,
    ModelUnavailable,
    MoltBotError,
    QueueFull,
)
from moltbot_server.models.providers.cooldowns import Cause
from moltbot_server.models.providers.keys import scrubbed
from moltbot_server.models.providers.waits import asked_wait

_LONGEST_TEXT = 300
_TOO_LONG = re.compile(
    r"context.{0,3}length|context.{0,3}window|maximum context|prompt is too long|exceed_context_size|too many tokens"
    r"|input length|token limit|prompt.{0,3}超长|model_max_prompt_tokens|\b1261\b",
    re.IGNORECASE,
)
_FILTERED = frozenset({"content_filter", "data_inspection_failed", "datainspectionfailed", "1301", "sensitive"})
_SPENT = frozenset(
    {"insufficient_quota", "insufficient_balance", "exceeded_current_quota_error", "arrearage", "billing_error", "1113"}
)
_SPENT_TEXT = re.compile(r"credit balance is too low|insufficient.balance|余额不足|欠费", re.IGNORECASE)
_NO_MODEL = frozenset({"model_not_found", "invalid_model", "modelnotfound", "deploymentnotfound", "1211"})
_BUSY = frozenset({"rate_limit_error", "rate_limit_exceeded", "1302", "1303", "1305"})
_WRONG_KEY = frozenset({"authentication_error", "permission_error", "invalid_api_key", "invalidapikey"})
_OUTAGE = frozenset({"overloaded_error", "api_error", "server_error", "timeout_error", "internal_server_error"})
_FIELDS = {
    "temperature": "options.temperature",
    "top_p": "options.top_p",
    "top_k": "options.top_k",
    "max_tokens": "options.max_output_tokens",
    "max_completion_tokens": "options.max_output_tokens",
    "stop": "options.stop",
    "stop_sequences": "options.stop",
    "seed": "options.seed",
    "tools": "options.tools",
    "tool_choice": "options.tool_choice",
}


class Refusal(NamedTuple):
    """A refusal: what is told, what has to rest because of it, for how long where the provider said.

    `filtered`: the provider found the question or the answer unfit, which ends an answer and is no fault.
    """

    error: MoltBotError
    cause: Cause | None = None
    after: float | None = None
    filtered: bool = False


class Said(NamedTuple):
    """What the body of a refusal says: its code and its type in small letters, its text, what it blames."""

    code: str = ""
    kind: str = ""
    text: str = ""
    param: str = ""

    @property
    def names(self) -> frozenset[str]:
        """The code and the type."""
        return frozenset({self.code, self.kind})


def said_in(body: bytes | object) -> Said:
    """Return what a refusal says in one of the forms that providers have for it; nothing of a body that has none."""
    if isinstance(body, bytes):
        try:
            body = msgspec.json.decode(body)
        except (ValueError, RecursionError):
            return Said()
    if isinstance(body, list) and body:  # Google's form is a list of one
        body = body[0]
    if not isinstance(body, dict):
        return Said(text=body) if isinstance(body, str) else Said()
    inner: Any = body.get("error")
    if isinstance(inner, str):
        return Said(text=inner, code=_word(body.get("code")))
    if not isinstance(inner, dict):
        inner = body
    text = inner.get("message", inner.get("detail", inner.get("msg", "")))
    kind = inner.get("type", inner.get("status", ""))
    return Said(_word(inner.get("code")), _word(kind), text if isinstance(text, str) else "", _word(inner.get("param")))


def refusal(
    title: str, model: str, status: int, headers: Mapping[str, str], body: bytes, secrets: Sequence[str]
) -> Refusal:
    """Return what a response with a status of an error means.

    `secrets` are the keys that were sent, which appear in nothing that is told.
    """
    return meaning(title, model, status, said_in(body), asked_wait(headers), secrets)


def refusal_in_stream(title: str, model: str, found: object, secrets: Sequence[str]) -> Refusal:
    """Return what an error inside a response means that had begun well; bytes are the whole body."""
    said = said_in(found if isinstance(found, bytes) else {"error": found})
    if said == Said():
        return Refusal(ModelUnavailable(f"{title} sent no stream of an answer."))
    return meaning(title, model, _status(said), said, None, secrets)


def meaning(title: str, model: str, status: int, said: Said, after: float | None, secrets: Sequence[str]) -> Refusal:
    """Return what a status and what was said with it mean together."""
    if said.names & _FILTERED:
        return Refusal(ModelUnavailable(f"{title} found the conversation unfit."), filtered=True)
    if status == 402 or said.names & _SPENT or _SPENT_TEXT.search(said.text[:2000]):
        text = f"{title} does not answer with this key: its quota or balance is used up."
        return Refusal(ModelCredential(text), Cause.CREDENTIAL, after)
    if status in (401, 403):
        # What it says here may show a part of the key; the status says enough.
        text = f"{title} refuses the key ({status}): it is wrong, was withdrawn, or may not use {model}."
        return Refusal(ModelCredential(text), Cause.CREDENTIAL, after)
    if status == 429:
        text = f"{title} takes no more requests for {model} with this key now."
        return Refusal(QueueFull(text, retry_after=after), Cause.LIMIT, after)
    told = _told(said.text, secrets)
    if status == 404 or said.names & _NO_MODEL:
        return Refusal(ModelUnavailable(f"{title} has no model {model}, or the address is wrong{told}."))
    if status in (400, 413, 422):
        return Refusal(_unfit(title, model, status, said, told))
    if 300 <= status < 400:
        return Refusal(ModelUnavailable(f"{title} points to another address ({status}); correct `base_url`."))
    text = f"{title} failed ({status})." if status >= 400 else f"{title} failed{told}."
    return Refusal(ModelUnavailable(text, retry_after=after), Cause.OUTAGE if after is not None else None, after)


def _unfit(title: str, model: str, status: int, said: Said, told: str) -> MoltBotError:
    """Return the error of a request that the provider would refuse again."""
    if _TOO_LONG.search(said.code) or _TOO_LONG.search(said.kind) or _TOO_LONG.search(said.text[:2000]):
        return ContextLengthExceeded("parts", f"the conversation is longer than {model} reads{told}")
    if status == 413:
        return ContentTooLarge("parts", f"{title} takes less at once{told}")
    field = _FIELDS.get(said.param.partition(".")[0].partition("[")[0], "parts")
    return InvalidField(field, f"{title} refuses the request{told}")


def _status(said: Said) -> int:
    """Return the status that an error inside a stream would have had; 500 where it does not tell."""
    if said.code.isascii() and said.code.isdigit() and 400 <= int(said.code[:4]) <= 599:
        return int(said.code[:4])
    for names, status in ((_WRONG_KEY, 401), (_BUSY, 429), (_OUTAGE, 500), ({"invalid_request_error"}, 400)):
        if said.names & names:
            return status
    return 0


def _told(text: str, secrets: Sequence[str]) -> str:
    """Return what may be told of a provider's text: one line, cut, without keys."""
    # Cut first, but not in the middle of a key that would then no longer be found.
    line = " ".join(scrubbed(text[:20_000], secrets).split())
    line = "".join(letter for letter in line if letter.isprintable()).rstrip(".")
    if not line:
        return ""
    return f": {line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 1] + '…'}"


def _word(value: object) -> str:
    if isinstance(value, str):
        return value[:64].lower()
    return str(value)[:64] if isinstance(value, int) and not isinstance(value, bool) else ""
