"""An answer as it grows: what its events say so far, put together as the contract says."""

from __future__ import annotations

from moltbot.v1 import chat_pb2, message_pb2


class Answer:
    """What a reader is to be shown of a turn, event by event.

    `text` and `reasoning` are what was said and thought so far, without what was taken back. `model` is who answers,
    `models/{model}`, as far as that is known; `completed` the last event of a turn that ended well.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self.model = ""
        self.completed: chat_pb2.Completed | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return self.completed.text if self.completed is not None else "".join(self._pieces)

    @property
    def reasoning(self) -> str:
        """What the model thought so far, where it tells."""
        return self.completed.reasoning if self.completed is not None else "".join(self._thoughts)

    @property
    def tool_calls(self) -> list[message_pb2.ToolCall]:
        """The tools that the answer asks to be called; none before its end."""
        return tool_calls(self.completed) if self.completed is not None else []

    def add(self, event: chat_pb2.Event) -> None:
        """Take an event in; a `reset` takes back what was said before."""
        match event.WhichOneof("kind"):
            case "text_delta":
                self._pieces.append(event.text_delta.text)
            case "reasoning_delta":
                self._thoughts.append(event.reasoning_delta.text)
            case "reset":
                self._pieces, self._thoughts = [event.reset.text], []
            case "routed":
                self.model = event.routed.model
            case "completed":
                self.completed = event.completed
                self.model = event.completed.model or self.model


def tool_calls(completed: chat_pb2.Completed) -> list[message_pb2.ToolCall]:
    """Return the tools that a whole answer asks to be called, in order."""
    return [part.tool_call for part in completed.attachments if part.HasField("tool_call")]
