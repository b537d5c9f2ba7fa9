"""The pieces of a Chat Completions answer: chunks of a stream, and the whole."""

import json
import secrets
import time
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from moltbot.v1 import chat_pb2, message_pb2

from moltbot_adapters.http import web_events

DONE = b"data: [DONE]\n\n"

# The API has no word for a turn that was cancelled: that is an error there.
FINISH = {
    message_pb2.FINISH_REASON_STOP: "stop",
    message_pb2.FINISH_REASON_STOP_TEXT: "stop",
    message_pb2.FINISH_REASON_LENGTH: "length",
    message_pb2.FINISH_REASON_CONTENT_FILTER: "content_filter",
    message_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def new_id() -> str:
    """Returns an id for an answer."""
    return f"chatcmpl-{secrets.token_hex(12)}"


def usage(value: message_pb2.Usage) -> dict[str, Any]:
    """Returns the tokens read and written, as the API names them."""
    return {
        "prompt_tokens": value.input_tokens,
        "completion_tokens": value.output_tokens,
        "total_tokens": value.input_tokens + value.output_tokens,
        "prompt_tokens_details": {"cached_tokens": value.cached_input_tokens},
    }


def whole_answer(answer: chat_pb2.Completed, model: str) -> dict[str, Any]:
    """Returns the body of an answer that is not streamed."""
    return {
        "id": new_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": web_events.last_of(answer.model) or model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                "finish_reason": FINISH.get(answer.finish_reason, "stop"),
            }
        ],
        "usage": usage(answer.usage),
        "timings": web_events.timings(answer.timings),
    }


class Chunks:
    """Writes the chunks of one stream. What is the same in all of them is serialised once."""

    def __init__(self, model: str, *, with_usage: bool) -> None:
        self._with_usage = with_usage
        self._head = (
            f'data: {{"id":"{new_id()}","object":"chat.completion.chunk","created":{int(time.time())},'
            f'"model":{quoted(model)},'
        )
        self._tail = ',"usage":null}\n\n' if with_usage else "}\n\n"
        self._before = f'{self._head}"choices":[{{"index":0,"delta":{{"content":'
        self._after = f'}},"logprobs":null,"finish_reason":null}}]{self._tail}'

    def role(self) -> bytes:
        """Returns the first chunk."""
        return (
            f'{self._head}"choices":[{{"index":0,"delta":{{"role":"assistant","content":"","refusal":null}},'
            f'"logprobs":null,"finish_reason":null}}]{self._tail}'
        ).encode()

    def text(self, text: str) -> bytes:
        """Returns the chunk of a piece of text.

        Written in ASCII: some clients split lines at characters such as U+2028, which JSON leaves as they are.
        """
        return f"{self._before}{quoted(text)}{self._after}".encode()

    def last(self, answer: chat_pb2.Completed) -> bytes:
        """Returns the end of the stream: why it ended, the usage when it was asked for, and `[DONE]`."""
        reason = FINISH.get(answer.finish_reason, "stop")
        timings = json.dumps(web_events.timings(answer.timings), separators=(",", ":"))
        end = (
            f'{self._head}"timings":{timings},'
            f'"choices":[{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"{reason}"}}]{self._tail}'
        ).encode()
        if self._with_usage:
            counted = json.dumps(usage(answer.usage), separators=(",", ":"))
            end += f'{self._head}"choices":[],"usage":{counted}}}\n\n'.encode()
        return end + DONE
