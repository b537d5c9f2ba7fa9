"""The sentencepiece model of the built-in model, and the prompt format that the core keeps to as well."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

SYSTEM, USER, BOT, END = "<|system|>", "<|user|>", "<|bot|>", "<|end|>"
ROLES = (SYSTEM, USER, BOT, END)


def topic_token(topic: str) -> str:
    """Names the piece with which the model says to itself what it is going to talk about."""
    return f"<|topic:{topic}|>"


def train(lines: Iterable[str], path: Path, size: int, topics: Iterable[str] = ()) -> None:
    """Learns a byte-pair vocabulary of `size` pieces from the lines and writes it to `path`.

    Role markers and topic tokens are control symbols: no text that a user sends can produce them, and they decode to
    nothing. What the vocabulary lacks falls back to bytes, so every text can be encoded; nothing is normalised, so
    every text comes back as it was.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        control_symbols=[*ROLES, *map(topic_token, topics)],
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentencepiece_length=14,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


class Tokenizer:
    """Turns conversations into pieces and ids."""

    def __init__(self, path: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos = self.pieces.bos_id()
        self.system, self.user, self.bot, self.end = (self.pieces.piece_to_id(role) for role in ROLES)

    def __len__(self) -> int:
        return int(self.pieces.vocab_size())

    def topic(self, topic: str) -> int:
        """Returns the id of a topic's token."""
        return int(self.pieces.piece_to_id(topic_token(topic)))

    def vocabulary(self) -> list[str]:
        """Lists all pieces by id."""
        return [self.pieces.id_to_piece(index) for index in range(len(self))]

    def encode(self, text: str, dropout: float = 0.0) -> list[int]:
        """Encodes plain text; `dropout` is the share of merges left out at random (BPE-dropout), for training."""
        if dropout > 0:
            return list(self.pieces.encode(text, enable_sampling=True, alpha=dropout, nbest_size=-1))
        return list(self.pieces.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; markers vanish."""
        return str(self.pieces.decode(list(ids)))

    def prompt(self, messages: Sequence[tuple[str, str]], system: str = "") -> list[str]:
        """Lays out finished turns (user text, answer) and a last one whose answer is still empty, as pieces.

        `<s>`, the system prompt if any, then for each turn `<|user|>` text `<|bot|>` answer `<|end|>`; the last turn
        stops after `<|bot|>`.
        """
        ids = [self.bos]
        if system:
            ids += [self.system, *self.encode(system)]
        for said, answered in messages:
            ids += [self.user, *self.encode(said), self.bot]
            if answered:
                ids += [*self.encode(answered), self.end]
        return [self.pieces.id_to_piece(index) for index in ids]
