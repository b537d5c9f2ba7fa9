"""How far a streamed answer of the OpenAI-compatible API has come: what its reader has, and what is missing."""

from moltbot.v1 import chat_pb2

from moltbot_adapters.http import web_events
from moltbot_adapters.http.openai_chunks import Calls, Chunks


class Said:
    """A text that a reader has, piece by piece, though the answer behind it may be begun anew.

    A new answer often says the first one's words once more: where models do not throw dice, always. They are not told
    twice, and only where it says something else there is no way to go on.
    """

    __slots__ = ("_ahead", "_pieces", "length")

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._ahead = ""  # what the reader has, and the answer has not said yet
        self.length = 0

    def add(self, text: str) -> str | None:
        """Returns what the reader is to be given of more text; None where it contradicts what the reader has."""
        if ahead := self._ahead:
            if ahead.startswith(text):
                self._ahead = ahead[len(text) :]
                return ""
            if not text.startswith(ahead):
                return None
            self._ahead, text = "", text[len(ahead) :]
        self._pieces.append(text)
        self.length += len(text)
        return text

    def anew(self, text: str) -> str | None:
        """Returns what the reader is to be given where the answer is `text` so far; None as above."""
        had = "".join(self._pieces)
        if not had.strip():  # blanks before an answer are as good as nothing
            self._pieces, self._ahead, self.length = [], "", 0
        else:
            self._ahead = had
        return self.add(text)

    def whole(self, text: str) -> str | None:
        """Returns what the reader lacks of the whole text; None as above."""
        if not self._ahead and self.length >= len(text):
            return ""
        more = self.anew(text)
        return None if self._ahead else more


class Progress:
    """What the reader of one stream has been shown."""

    def __init__(self, model: str, *, id: str, with_usage: bool) -> None:
        self._model = model
        self._id = id
        self._with_usage = with_usage
        self._chunks: Chunks | None = None
        self._text = Said()
        self._thoughts = Said()
        self.turn = ""
        """The turn, once it is known: `sessions/{session}/turns/{turn}`."""
        self.over = False
        """True when the turn has ended, or was never begun."""

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

    def add(self, text: str) -> bytes | None:
        """Returns the bytes that show more text; the first ones bring the role along. None: it contradicts."""
        return self._shown(self._text.add(text))

    def replace(self, text: str) -> bytes | None:
        """Returns the bytes after which `text` is shown instead; None where visible words would have to be unsaid."""
        self._thoughts.anew("")
        more = self._text.anew(text)
        return self._shown(more) if more is None or more else b""

    def think(self, text: str) -> bytes:
        """Returns the bytes that show more of what the model thinks; nothing where it has changed its mind."""
        more = self._thoughts.add(text)
        if not more:
            return b""
        head, chunks = self._writer()
        return head + chunks.thought(more)

    def end(self, answer: chat_pb2.Completed, calls: Calls) -> bytes | None:
        """Returns the bytes that bring what is missing of an answer, and its end. None: it contradicts."""
        self.rename(web_events.model_id(answer.model))
        data = self.think(answer.reasoning) if answer.reasoning and not self._thoughts.length else b""
        more = self._text.whole(answer.text)
        if more is None:
            return None
        data += self._shown(more) or b""
        head, chunks = self._writer()
        told = b"".join(chunks.call(index, call) for index, call in enumerate(calls))
        return data + head + told + chunks.last(answer, calls)

    def _shown(self, text: str | None) -> bytes | None:
        if text is None:
            return None
        head, chunks = self._writer()
        return head + chunks.text(text) if text else head

    def _writer(self) -> tuple[bytes, Chunks]:
        """Returns what has to come before the next chunk, and who writes it."""
        if self._chunks is not None:
            return b"", self._chunks
        self._chunks = Chunks(self._model, id=self._id, with_usage=self._with_usage)
        return self._chunks.role(), self._chunks
