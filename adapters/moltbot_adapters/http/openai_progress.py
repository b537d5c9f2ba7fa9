"""How far a streamed answer of the OpenAI-compatible API has come: what its reader has, and what is missing."""

from moltbot.v1 import chat_pb2

from moltbot_adapters.http import web_events
from moltbot_adapters.http.openai_chunks import Calls, Chunks


class Progress:
    """What the reader of one stream has been shown."""

    def __init__(self, model: str, *, with_usage: bool) -> None:
        self._model = model
        self._with_usage = with_usage
        self._chunks: Chunks | None = None
        self._shown: list[str] = []
        self._length = 0
        self._thought = False

    @property
    def begun(self) -> bool:
        """Tells whether the reader has anything."""
        return self._chunks is not None

    def rename(self, model: str) -> None:
        """Takes note of who writes from now on; an empty name is no news."""
        if model and model != self._model:
            self._model = model
            if self._chunks is not None:
                self._chunks.rename(model)

    def add(self, text: str) -> bytes:
        """Returns the bytes that show more text; the first ones bring the role along."""
        self._shown.append(text)
        self._length += len(text)
        head, chunks = self._writer()
        return head + chunks.text(text) if text else head

    def think(self, text: str) -> bytes:
        """Returns the bytes that show more of what the model thinks."""
        self._thought = True
        head, chunks = self._writer()
        return head + chunks.thought(text)

    def replace(self, text: str) -> bytes | None:
        """Returns the bytes after which `text` is shown instead; None where visible words would have to be unsaid."""
        shown = "".join(self._shown)
        if not shown.strip():
            self._shown, self._length = [], 0  # blanks before an answer are as good as nothing
            return self.add(text) if text else b""
        if not text.startswith(shown):
            return None
        return self.add(text[len(shown) :]) if text != shown else b""

    def end(self, answer: chat_pb2.Completed, calls: Calls) -> bytes:
        """Returns the bytes that bring what is missing of an answer, and its end."""
        self.rename(web_events.model_id(answer.model))
        data = self.think(answer.reasoning) if answer.reasoning and not self._thought else b""
        if self._length < len(answer.text):
            data += self.replace(answer.text) or b""
        head, chunks = self._writer()
        told = b"".join(chunks.call(index, call) for index, call in enumerate(calls))
        return data + head + told + chunks.last(answer, calls)

    def _writer(self) -> tuple[bytes, Chunks]:
        """Returns what has to come before the next chunk, and who writes it."""
        if self._chunks is not None:
            return b"", self._chunks
        self._chunks = Chunks(self._model, with_usage=self._with_usage)
        return self._chunks.role(), self._chunks
