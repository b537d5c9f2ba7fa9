"""Sentencepiece's tokenizers (`tokenizer.model`)."""

from __future__ import annotations

import sentencepiece

from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.detokenizer import Surfaces
from moltbot_server.models.folder import ModelFolder, check_vocabulary
from moltbot_server.models.markers import MARKER, Markers
from moltbot_server.models.pieces import FENCE

_SPACE = "\u2581"


class SentencePieces:
    """A sentencepiece model; markers are its control symbols and tokens that only the weights have."""

    def __init__(self, folder: ModelFolder, source: str) -> None:
        """Load the model. What `source`, the chat template, names is a marker too, where it is a token.

        Raises:
            ModelUnavailable: it cannot be read, or does not belong to the weights.
        """
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder.tokenizer))
        except (OSError, RuntimeError) as problem:
            raise ModelUnavailable(f"{folder.tokenizer} cannot be read as a sentencepiece model: {problem}.") from None
        self._words = [self._pieces.id_to_piece(index) for index in range(self._pieces.vocab_size())]
        check_vocabulary(folder, self._words)
        self.markers = self.borders = Markers(self._find_markers(folder, source))
        self._fence = len(self._pieces.encode(FENCE))
        self.longest = max(map(len, self._words))
        self.surfaces = self._look(folder.vocabulary)

    def encode(self, text: str, *, joined: bool = False) -> list[str]:
        """Return the tokens of a text; see `Pieces.encode`."""
        tokens: list[str] = []
        begin = 0
        for first, last in self.markers.places(text):
            if first > begin:
                tokens += self._plain(text[begin:first], joined)
            tokens.append(text[first:last])
            begin, joined = last, False
        if begin < len(text):
            tokens += self._plain(text[begin:], joined)
        return tokens

    def _plain(self, text: str, joined: bool) -> list[str]:
        ids = self._pieces.encode(FENCE + text)[self._fence :] if joined else self._pieces.encode(text)
        words = self._words
        return [words[index] for index in ids]

    def _find_markers(self, folder: ModelFolder, source: str) -> set[str]:
        pieces = self._pieces
        known = set(self._words)
        control = {word for index, word in enumerate(self._words) if pieces.is_control(index)}
        added = {token for token in folder.vocabulary if token not in known}
        named = {word for word in MARKER.findall(source) if word in known} & set(folder.vocabulary)
        return control | added | named

    def _look(self, vocabulary: tuple[str, ...]) -> Surfaces:
        pieces, words = self._pieces, self._words
        text, byte, spaced = [], [], []
        for token in vocabulary:
            index = int(pieces.piece_to_id(token))
            alien = index == pieces.unk_id() and token != words[pieces.unk_id()]
            if alien or pieces.is_control(index):
                text.append("")
            elif pieces.is_unknown(index):
                text.append(str(pieces.decode([index])))
            else:
                text.append("" if pieces.is_byte(index) else token.replace(_SPACE, " "))
            is_byte = not alien and pieces.is_byte(index)
            byte.append(bytes([int(token[3:5], 16)]) if is_byte else b"")
            spaced.append(not alien and token.startswith(_SPACE))
        sample = next((index for index, word in enumerate(words) if word[:1] == _SPACE and word != _SPACE), None)
        lone = int(pieces.piece_to_id(_SPACE))
        return Surfaces(
            text=text,
            byte=byte,
            spaced=spaced,
            drops_space=sample is not None and pieces.decode([sample]) == words[sample][1:].replace(_SPACE, " "),
            drops_spaces=words[lone] == _SPACE and not pieces.decode([lone, lone]),
        )
