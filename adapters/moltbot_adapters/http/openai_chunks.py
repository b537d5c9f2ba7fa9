"""The pieces of a Chat Completions answer: chunks of a stream, and the whole."""

import hashlib
import json
import time
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from moltbot.v1 import chat_pb2, message_pb2

from moltbot_adapters.http import web_events

DONE = b"data: [DONE]\n\n"

# The API has no word for a turn that was cancelled: that is an error there. One that broke off is not whole either.
FINISH = {
    message_pb2.FINISH_REASON_STOP: "stop",
    message_pb2.FINISH_REASON_STOP_TEXT: "stop",
    message_pb2.FINISH_REASON_LENGTH: "length",
    message_pb2.FINISH_REASON_UPSTREAM_ERROR: "length",
    message_pb2.FINISH_REASON_CONTENT_FILTER: "content_filter",
    message_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}

Calls = Sequence[dict[str, Any]]
"""Tools to be called, as the API has them."""


def id_of(request_id: str) -> str:
    """Returns the id of the answer to a request, which is the same when that is repeated with its key."""
    return f"chatcmpl-{hashlib.sha256(request_id.encode()).hexdigest()[:24]}"


def usage(value: message_pb2.Usage) -> dict[str, Any]:
    """Returns the tokens read and written, as the API names them."""
    return {
        "prompt_tokens": value.input_tokens,
        "completion_tokens": value.output_tokens,
        "total_tokens": value.input_tokens + value.output_tokens,
        "prompt_tokens_details": {"cached_tokens": value.cached_input_tokens},
    }


def whole_answer(answer: chat_pb2.Completed, model: str, calls: Calls, *, id: str) -> dict[str, Any]:
    """Returns the body of an answer that is not streamed."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if calls:
        message |= {"content": answer.text or None, "tool_calls": calls}
    return {
        "id": id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": web_events.model_id(answer.model) or model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer, calls)}],
        "usage": usage(answer.usage),
        "timings": web_events.timings(answer.timings),
        "cached": answer.cached,
    }


def _finish(answer: chat_pb2.Completed, calls: Calls) -> str:
    reason = FINISH.get(answer.finish_reason, "stop")
    return "tool_calls" if calls and reason == "stop" else reason


class Chunks:
    """Writes the chunks of one stream. What is the same in all of them is serialised once."""

    def __init__(self, model: str, *, id: str, with_usage: bool) -> None:
        self._with_usage = with_usage
        self._start = f'data: {{"id":"{id}","object":"chat.completion.chunk","created":{int(time.time())},'
        self._tail = ',"usage":null}\n\n' if with_usage else "}\n\n"
        self._after = f'}},"logprobs":null,"finish_reason":null}}]{self._tail}'
        self.rename(model)

    def rename(self, model: str) -> None:
        """Says in the chunks that follow that this model writes them."""
        self._head = f'{self._start}"model":{quoted(model)},'
        self._delta = f'{self._head}"choices":[{{"index":0,"delta":{{'
        self._before = f'{self._delta}"content":'

    def role(self) -> bytes:
        """Returns the first chunk."""
        return f'{self._delta}"role":"assistant","content":"","refusal":null{self._after}'.encode()

    def text(self, text: str) -> bytes:
        """Returns the chunk of a piece of text.

        Written in ASCII: some clients split lines at characters such as U+2028, which JSON leaves as they are.
        """
        return f"{self._before}{quoted(text)}{self._after}".encode()

    def thought(self, text: str) -> bytes:
        """Returns the chunk of a piece of what the model thinks before it answers, named as others name it."""
        return f'{self._delta}"reasoning_content":{quoted(text)}{self._after}'.encode()

    def call(self, index: int, call: dict[str, Any]) -> bytes:
        """Returns the chunk of a tool to be called, with all its arguments."""
        told = json.dumps([{"index": index, **call}], separators=(",", ":"))
        return f'{self._delta}"tool_calls":{told}{self._after}'.encode()

    def last(self, answer: chat_pb2.Completed, calls: Calls) -> bytes:
        """Returns the end of the stream: why it ended, the usage when it was asked for, and `[DONE]`."""
        timings = json.dumps(web_events.timings(answer.timings), separators=(",", ":"))
        cached = "true" if answer.cached else "false"
        end = (
            f'{self._head}"timings":{timings},"cached":{cached},'
            f'"choices":[{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"{_finish(answer, calls)}"}}]'
            f"{self._tail}"
        ).encode()
        if self._with_usage:
            counted = json.dumps(usage(answer.usage), separators=(",", ":"))
            end += f'{self._head}"choices":[],"usage":{counted}}}\n\n'.encode()
        return end + DONE
