"""Tokenizers of Hugging Face's library (`tokenizer.json`): byte-level ones and those with a mark for the space."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from typing import Any

import tokenizers

from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.detokenizer import Surfaces
from moltbot_server.models.folder import ModelFolder, check_vocabulary
from moltbot_server.models.markers import MARKER, Markers
from moltbot_server.models.pieces import FENCE

_SPACE = "\u2581"
# One text at a time is read: the library's own threads would only stand in the way of the model's.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class JsonPieces:
    """A `tokenizer.json`; markers are its special tokens and added ones that look like markers."""

    def __init__(self, folder: ModelFolder) -> None:
        """Load the file.

        Raises:
            ModelUnavailable: it cannot be read, does not belong to the weights, or its text cannot be streamed.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder.tokenizer))
            written = json.loads(folder.tokenizer.read_bytes())
            self._decoders = _decoders(written.get("decoder"))
        except Exception as problem:  # the library raises nothing more precise
            raise ModelUnavailable(f"{folder.tokenizer} cannot be read as a tokenizer: {problem}.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._words = [self._tokenizer.id_to_token(index) or "" for index in range(size)]
        check_vocabulary(folder, [word for word in self._words if word])
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        marked = {index for index, token in added.items() if token.special or MARKER.fullmatch(token.content)}
        # What a tokenizer does not know becomes its unknown token, though nobody spelt it.
        self._control = frozenset(marked - {_unknown(self._tokenizer, written["model"])})
        self.markers = Markers(added[index].content for index in marked)
        alone = (token for index, token in added.items() if index in marked and not token.lstrip)
        self.borders = Markers(token.content for token in alone if not token.single_word and not token.normalized)
        self.longest = max(map(len, self._words))
        self.surfaces = self._look(folder)
        self._fence = self._read(FENCE)
        self._fenced = self._read(FENCE + "a")[len(self._fence) :] != self._read("a")

    def encode(self, text: str, *, joined: bool = False) -> list[str]:
        """Return the tokens of a text; see `Pieces.encode`."""
        words = self._words
        return [words[index] for index in self._ids(text, joined)]

    def _ids(self, text: str, joined: bool) -> list[int]:
        ids = self._after_fence(text) if joined and self._fenced else self._read(text)
        if not self._control.isdisjoint(ids):
            places = list(self.markers.places(text))
            if sum(index in self._control for index in ids) > len(places):
                return self._without_strays(text, joined, {begin for begin, _ in places})
        return ids

    def _read(self, text: str) -> list[int]:
        # A third cheaper than `encode`, which notes where each token came from.
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _after_fence(self, text: str) -> list[int]:
        ids = self._read(FENCE + text)
        size = len(self._fence)
        return ids[size:] if ids[:size] == self._fence else self._read(text)

    def _without_strays(self, text: str, joined: bool, begins: set[int]) -> list[int]:
        """Return the tokens of a text without the control tokens that it does not spell.

        A tokenizer that rewrites texts before it looks for its tokens may find one where none was typed.
        """
        found = self._tokenizer.encode(text, add_special_tokens=False)
        spans = list(zip(found.ids, found.offsets, strict=True))
        strays = {span for index, span in spans if index in self._control and span[0] not in begins}
        cuts = [begin + 1 for begin, end in strays if end - begin > 1]
        if not cuts:
            return [index for index, span in spans if span not in strays]
        ids: list[int] = []
        for begin, end in pairwise([0, *sorted(cuts), len(text)]):
            ids += self._ids(text[begin:end], joined or begin > 0)
        return ids

    def _look(self, folder: ModelFolder) -> Surfaces:
        ids = {word: index for index, word in enumerate(self._words) if word}
        byte_level = self._decoders == ["ByteLevel"]
        text, byte, spaced = [], [], []
        for token in folder.vocabulary:
            index = ids.get(token)
            silent = index is None or index in self._special
            raw = b"" if silent else _bytes(token, byte_level=byte_level, fallback="ByteFallback" in self._decoders)
            byte.append(raw)
            text.append("" if silent or raw else token.replace(_SPACE, " "))
            spaced.append(not silent and not raw and token.startswith(_SPACE))
        first = next((index for index, word in enumerate(self._words) if word[:1] == _SPACE and len(word) > 1), None)
        drops = first is not None and not byte_level and not self._tokenizer.decode([first]).startswith(" ")
        return Surfaces(text=text, byte=byte, spaced=spaced, drops_space=drops, whole_bytes=byte_level)


def _decoders(decoder: dict[str, Any] | None) -> list[str]:
    """Return the kinds of the decoders, checked: those whose text can be told token by token."""
    if decoder is None:
        raise ValueError("it has no decoder")
    steps = decoder.get("decoders", [decoder])
    kinds = [str(step["type"]) for step in steps]
    replaced = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    known = set(kinds) <= {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"} and kinds
    if kinds != ["ByteLevel"] and not (known and set(replaced) <= {(_SPACE, " ")}):
        raise ValueError(f"its decoder is {', '.join(kinds)}; expected ByteLevel, Metaspace, or one with ByteFallback")
    return kinds


def _unknown(tokenizer: tokenizers.Tokenizer, model: dict[str, Any]) -> int | None:
    """Return the id that stands for what the tokenizer has no token for."""
    if "unk_id" in model:
        return int(model["unk_id"]) if model["unk_id"] is not None else None
    return tokenizer.token_to_id(str(model.get("unk_token")))


def _bytes(token: str, *, byte_level: bool, fallback: bool) -> bytes:
    """Return the bytes that a token stands for; none where it stands for its characters."""
    if byte_level:
        try:
            return bytes(map(_ALPHABET.__getitem__, token))
        except KeyError:
            return token.encode()
    if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return b""


def _alphabet() -> dict[str, int]:
    """Return the bytes by the characters that GPT-2's tokenizer writes for them: itself where it can be printed."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


_ALPHABET = _alphabet()
