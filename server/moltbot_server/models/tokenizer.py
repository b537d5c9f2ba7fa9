"""Conversations to tokens: sentencepiece for what people write, ids for what only the template may say."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

import sentencepiece

from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.detokenizer import Surfaces
from moltbot_server.models.folder import Entry, ModelFolder
from moltbot_server.turns import Message, Role

_SPACE = "\u2581"
_FENCE = "\ue000"  # a private character: no vocabulary joins it with its neighbours
_KEPT = 4096
_KEPT_CHARACTERS = 8192
_ADDED = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")


class Tokenizer:
    """The tokenizer of one model folder. Tokens are the strings and ids of the weights' own vocabulary.

    Markers (control symbols of the tokenizer, tokens that only the weights have) are inserted where the template names
    them; what a user writes is always cut into ordinary pieces, even when it looks like a marker.
    """

    def __init__(self, folder: ModelFolder) -> None:
        """Load the sentencepiece model.

        Raises:
            ModelUnavailable: it cannot be read, does not belong to the weights, or lacks a marker of the template.
        """
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder.tokenizer))
        except (OSError, RuntimeError) as problem:
            raise ModelUnavailable(f"{folder.tokenizer} cannot be read as a sentencepiece model: {problem}.") from None
        self._vocabulary = folder.vocabulary
        self._ids = {token: index for index, token in enumerate(folder.vocabulary)}
        self._template = folder.template
        self._words = [self._pieces.id_to_piece(index) for index in range(self._pieces.vocab_size())]
        self._check(folder)
        self._markers = self._find_markers()
        self._fence = len(self._pieces.encode(_FENCE))
        typed = [word for word in self._markers if self._pieces.encode(word)[-1:] == [self._id_of(word)]]
        self._typed = re.compile("|".join(map(re.escape, typed))) if typed else None
        self._longest_piece = max(map(len, self._words))
        self._most_characters = self._longest_piece * folder.context_length
        self.surfaces = self._surfaces()
        self._kept: OrderedDict[tuple[Role, str, bool], tuple[str, ...]] = OrderedDict()
        self._joints = self._find_joints()
        self._opening = self._laid_out(Entry(prefix=self._template.bos))

    def id(self, token: str) -> int | None:
        """Return the id of a token in the weights' vocabulary, None when it is no token."""
        return self._ids.get(token)

    def count(self, message: Message) -> int:
        """Return how many tokens a message takes, its markers included.

        A text that is too long for any context is not cut up: the least that it can take is returned.
        """
        text = message.text
        if len(text) > self._most_characters:
            return len(text) // self._longest_piece
        return len(self._message(message.role, text, False))

    def prompt(self, messages: Sequence[Message]) -> list[str]:
        """Return the tokens of a conversation, ready for the answer."""
        tokens = list(self._opening)
        before: Role | None = None
        for message in messages:
            role = message.role
            if self._template.system_in_user and before is Role.SYSTEM and role is Role.USER:
                tokens += self._laid_out(Entry(suffix=self._template.user.suffix), message.text, joined=True)
            else:
                tokens += self._message(role, message.text, (before, role) in self._joints)
            before = role
        answer = Entry(prefix=self._template.assistant.prefix)
        tokens += self._laid_out(answer, joined=(before, Role.ASSISTANT) in self._joints)
        return tokens

    def _message(self, role: Role, text: str, joined: bool) -> tuple[str, ...]:
        key = (role, text, joined)
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        tokens = tuple(self._laid_out(self._entry(role), text, joined=joined))
        if len(text) <= _KEPT_CHARACTERS:
            self._kept[key] = tokens
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return tokens

    def _entry(self, role: Role) -> Entry:
        template = self._template
        return {Role.SYSTEM: template.system, Role.ASSISTANT: template.assistant}.get(role, template.user)

    def _find_joints(self) -> set[tuple[Role | None, Role]]:
        """Return which roles follow each other in the midst of plain text, so that no leading space comes between."""
        ends = {role for role in Role for _, marker in self._cut(self._entry(role).suffix)[-1:] if not marker}
        begins = {role for role in Role for _, marker in self._cut(self._entry(role).prefix)[:1] if not marker}
        return {(before, after) for before in ends for after in begins}

    def _laid_out(self, entry: Entry, text: str = "", *, joined: bool = False) -> list[str]:
        """Return a message between its prefix and suffix. `joined`: it goes on with the text of the message before."""
        tokens: list[str] = []
        space = ""
        for part, marker in (*self._cut(entry.prefix), (text, False), *self._cut(entry.suffix)):
            if marker:
                if space:
                    tokens += self._encode(space, joined)
                tokens.append(part)
                joined, space = False, ""
            elif part:
                # A space at the end belongs to the next word, as it would if the text were cut up as a whole.
                part = space + part
                space = " " if part.endswith(" ") else ""
                body = part[:-1] if space else part
                if body:
                    tokens += self._encode(body, joined)
                    joined = True
        if space:
            tokens += self._encode(space, joined)
        return tokens

    def _encode(self, text: str, joined: bool) -> list[str]:
        """Cut plain text into pieces; without the tokenizer's own leading space where it goes on with other text."""
        tokens: list[str] = []
        begin = 0
        # Where the tokenizer would read a marker, the text is cut within it, so that it stays what it looks like.
        for at in (*self._typed_places(text), len(text)):
            part = text[begin:at]
            ids = self._pieces.encode(_FENCE + part)[self._fence :] if joined else self._pieces.encode(part)
            tokens += [self._words[index] for index in ids]
            begin, joined = at, True
        return tokens

    def _typed_places(self, text: str) -> list[int]:
        if self._typed is None:
            return []
        return [match.start() + 1 for match in self._typed.finditer(text)]

    def _cut(self, text: str) -> list[tuple[str, bool]]:
        """Cut a template's text at its markers: (text, whether it is a marker)."""
        if not text:
            return []
        pattern = "|".join(re.escape(word) for word in sorted(self._markers, key=len, reverse=True))
        parts = re.split(f"({pattern})", text) if pattern else [text]
        return [(part, index % 2 == 1) for index, part in enumerate(parts) if part]

    def _id_of(self, word: str) -> int:
        return int(self._pieces.piece_to_id(word))

    def _find_markers(self) -> set[str]:
        """Return what the template may insert by id: control symbols, and tokens of the weights that are no pieces."""
        pieces = self._pieces
        control = {word for index, word in enumerate(self._words) if pieces.is_control(index)}
        known = set(self._words)
        added = {token for token in self._vocabulary if token not in known}
        template = self._template
        entries = (template.system, template.user, template.assistant)
        said = "".join((template.bos, *(entry.prefix + entry.suffix for entry in entries), *template.stop))
        named = {word for word in _ADDED.findall(said) if word in self._ids and word in known}
        return control | added | named

    def _check(self, folder: ModelFolder) -> None:
        missing = [word for word in self._words if word not in self._ids]
        if len(missing) > len(self._words) // 100:
            raise ModelUnavailable(
                f"{folder.tokenizer} does not belong to the weights beside it: {len(missing)} of its "
                f"{len(self._words)} pieces, such as {missing[0]!r}, are not among their {len(self._ids)} tokens."
            )
        template = folder.template
        if template.bos and template.bos not in self._ids:
            raise ModelUnavailable(f"{folder.path}: the chat template begins with {template.bos!r}, which is no token.")

    def _surfaces(self) -> Surfaces:
        pieces = self._pieces
        text, byte, spaced = [], [], []
        for token in self._vocabulary:
            index = self._id_of(token)
            alien = index == pieces.unk_id() and token != self._words[pieces.unk_id()]
            if alien or pieces.is_control(index):
                text.append("")
            elif pieces.is_unknown(index):
                text.append(str(pieces.decode([index])))
            else:
                text.append("" if pieces.is_byte(index) else token.replace(_SPACE, " "))
            is_byte = not alien and pieces.is_byte(index)
            byte.append(bytes([int(token[3:5], 16)]) if is_byte else b"")
            spaced.append(not alien and token.startswith(_SPACE))
        sample = next((index for index, word in enumerate(self._words) if word[:1] == _SPACE and word != _SPACE), None)
        lone = self._id_of(_SPACE)
        return Surfaces(
            text=text,
            byte=byte,
            spaced=spaced,
            drops_space=sample is not None and pieces.decode([sample]) == self._words[sample][1:].replace(_SPACE, " "),
            drops_spaces=self._words[lone] == _SPACE and not pieces.decode([lone, lone]),
        )
