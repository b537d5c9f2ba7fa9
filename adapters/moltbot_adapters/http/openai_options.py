"""The options of a Chat Completions request: read, checked, and refused where they cannot be honoured."""

from typing import Any

from moltbot.v1 import message_pb2

from moltbot_adapters.http.body import whole, wrong_type
from moltbot_adapters.http.errors import HttpError
from moltbot_adapters.http.openai_tools import tools_into

_INT32 = 2**31 - 1
_INT64 = 2**63 - 1


def options_of(body: dict[str, Any]) -> message_pb2.GenerationOptions:
    """Returns the contract's options. Raises `HttpError` 400, naming the parameter."""
    refuse_unsupported(body)
    options = message_pb2.GenerationOptions()
    for name in ("max_completion_tokens", "max_tokens"):
        if (limit := _integer(body, name, 1, _INT32)) is not None:
            options.max_output_tokens = limit
            break
    if (temperature := _number(body, "temperature", 0, 2)) is not None:
        options.temperature = temperature
    if (top_p := _number(body, "top_p", 0, 1)) is not None:
        options.top_p = top_p
    if (top_k := _integer(body, "top_k", 0, _INT32)) is not None:
        options.top_k = top_k
    if (penalty := _number(body, "repetition_penalty", 0, 10)) is not None:
        options.repetition_penalty = penalty
    if (seed := _integer(body, "seed", -_INT64 - 1, _INT64)) is not None:
        options.seed = seed
    options.stop.extend(_stop(body.get("stop")))
    tools_into(options, body)
    return options


def flag(body: dict[str, Any], name: str, *, default: bool = False, within: str = "") -> bool:
    """Returns a boolean of the body, or of the object `within` it; `default` when absent. Raises `HttpError` 400."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong_type(f"{within}.{name}" if within else name, "a boolean")
    return value


def refuse_unsupported(body: dict[str, Any]) -> None:
    """Raises `HttpError` 400 `unsupported_value` for what would change the answer, or may, and cannot be honoured."""
    for name, value in body.items():
        if value is None or name in _TAKEN or name in _HARMLESS or _same(value, _NEUTRAL.get(name, ())):
            continue
        name = name[:_LONGEST_NAME]
        raise HttpError(400, "unsupported_value", f"'{name}' is not supported; leave it out.", param=name)
    kind = body.get("response_format")
    if kind is not None and not (isinstance(kind, dict) and kind.get("type") == "text"):
        raise HttpError(400, "unsupported_value", "'response_format' must be of type 'text'.", param="response_format")


_LONGEST_NAME = 64
_TAKEN = frozenset(
    (
        *("model", "messages", "user", "stream", "stream_options", "tools", "tool_choice", "parallel_tool_calls"),
        *("max_completion_tokens", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"),
        "response_format",
    )
)
# What is for the books, the speed or the price of another provider; the answer is the same without it.
_HARMLESS = frozenset(
    (
        *("metadata", "store", "service_tier", "safety_identifier", "prediction"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    )
)
# What may be sent because it asks for nothing: the neutral values of options that are not supported.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "min_p": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}


def _same(value: Any, neutral: tuple[Any, ...]) -> bool:
    # `True == 1` in Python, and in nobody's request.
    return any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral)


def _integer(body: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "an integer")
    if not least <= value <= most:
        raise HttpError(400, "invalid_value", f"'{name}' must be between {least} and {most}.", param=name)
    return value


def _number(body: dict[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, "a number")
    if not least <= value <= most:
        raise HttpError(400, "invalid_value", f"'{name}' must be between {least} and {most}.", param=name)
    return float(value)


def _stop(value: Any) -> list[str]:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise wrong_type("stop", "a string or a list of strings")
    return [whole(text, "stop") for text in texts]
