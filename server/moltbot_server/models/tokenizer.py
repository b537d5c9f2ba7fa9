"""Conversations to tokens: what people write as ordinary pieces, what only the template may say as markers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.chat_template import JinjaLayout, Layout, PrefixLayout, Said, TemplateRefused
from moltbot_server.models.detokenizer import Surfaces
from moltbot_server.models.folder import ModelFolder
from moltbot_server.models.markers import APART, CUT
from moltbot_server.models.pieces import Pieces
from moltbot_server.models.repeats import without_repeats
from moltbot_server.turns import Message, Role, TextPart

_KEPT = 4096
_KEPT_CHARACTERS = 8192
_REASONING = ("<think>", "</think>")
"""Markers that models write as text; templates look for them in earlier answers, to leave the reasoning out."""


class Tokenizer:
    """The tokenizer of one model folder. Tokens are the strings and ids of the weights' own vocabulary.

    A conversation is laid out as one text, in which a private character breaks whatever people wrote that reads as a
    marker. The text is cut before its markers, and what lies between is kept with its tokens: of a conversation that
    goes on, only what is new is read.
    """

    def __init__(self, folder: ModelFolder) -> None:
        """Load the tokenizer and the chat template.

        Raises:
            ModelUnavailable: one of them cannot be read, does not belong to the weights, or lacks what the other needs.
        """
        self._ids = {token: index for index, token in enumerate(folder.vocabulary)}
        self._layout = _open_layout(folder)
        self._pieces = _open_pieces(folder, self._layout.source)
        if folder.template.bos and folder.template.bos not in self._ids:
            bos = folder.template.bos
            raise ModelUnavailable(f"{folder.path}: the chat template begins with {bos!r}, which is no token.")
        self._kept: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._most_characters = self._pieces.longest * folder.context_length
        self._repeats = folder.repeats
        self.surfaces: Surfaces = self._pieces.surfaces
        self.overhead = self._measure_overhead()

    def id(self, token: str) -> int | None:
        """Return the id of a token in the weights' vocabulary, None when it is no token."""
        return self._ids.get(token)

    def count(self, message: Message) -> int:
        """Return how many tokens a message takes in the midst of a conversation, its markers included.

        What belongs to no message, such as a system prompt of the template's own, is the `overhead`. A text that is too
        long for any context is not cut up: the least that it can take is returned.
        """
        text = message.text
        if len(text) > self._most_characters:
            return len(text) // self._pieces.longest
        return sum(map(len, self._tokens(self._laid_out(message))))

    def count_whole(self, message: Message) -> int:
        """Return how many tokens a message takes however long it is; may be called from any thread."""
        return sum(map(len, self._tokens(self._laid_out(message), self._encode)))

    def _laid_out(self, message: Message) -> str:
        said = self._said(message)
        around = self._layout.around[said.role]
        return around.prefix + said.text + around.suffix

    def prompt(self, messages: Sequence[Message], begun: str = "") -> list[str]:
        """Return the tokens of a conversation, ready for the answer, or for more of the one that is `begun`.

        Raises:
            InvalidField: the model's chat template refuses this order of roles.
        """
        text = self._layout.prompt([self._said(message) for message in messages])
        if begun:
            answer = self._said(Message(role=Role.ASSISTANT, parts=(TextPart(text=begun.rstrip()),))).text
            text += answer if self._layout.around[Role.ASSISTANT].prefix else APART + answer
        return [token for tokens in self._tokens(text) for token in tokens]

    def _said(self, message: Message) -> Said:
        role = message.role if message.role in (Role.SYSTEM, Role.ASSISTANT) else Role.USER
        text = message.text
        if self._repeats and role is Role.USER:
            text = text.strip() or text  # a lone blank behind a question is a token that says nothing
        text = self._pieces.markers.guarded(text)
        if role is Role.ASSISTANT and CUT in text:
            for word in _REASONING:
                text = text.replace(word[0] + CUT + word[1:], word)
        return Said(role, text)

    def _tokens(self, text: str, part: Callable[[str], tuple[str, ...]] | None = None) -> Iterator[tuple[str, ...]]:
        """Yield the tokens of a text that was laid out, from one marker to the next; `part` makes them."""
        part = part or self._part
        for whole in text.split(APART):
            begin = 0
            for border, _ in self._pieces.borders.places(whole):
                if border > begin:
                    yield part(whole[begin:border])
                begin = border
            if begin < len(whole):
                yield part(whole[begin:])

    def _part(self, text: str) -> tuple[str, ...]:
        kept = self._kept.get(text)
        if kept is not None:
            self._kept.move_to_end(text)
            return kept
        tokens = self._encode(text)
        if len(text) <= _KEPT_CHARACTERS:
            self._kept[text] = tokens
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return tokens

    def _encode(self, text: str) -> tuple[str, ...]:
        first, *rest = text.split(CUT)
        encode = self._pieces.encode
        tokens = (*(encode(first) if first else ()), *(token for part in rest for token in encode(part, joined=True)))
        return without_repeats(tokens, self._repeats) if self._repeats else tokens

    def _measure_overhead(self) -> int:
        """Return how many tokens of a prompt belong to no message."""
        said = Said(Role.USER, "Hello")
        around = self._layout.around[Role.USER]
        alone = sum(map(len, self._tokens(around.prefix + said.text + around.suffix)))
        return max(sum(map(len, self._tokens(self._layout.prompt([said])))) - alone, 0)


def _open_layout(folder: ModelFolder) -> Layout:
    if not folder.jinja:
        return PrefixLayout(folder.template)
    # Imported late: Jinja takes a tenth of a second, and most folders' templates are prefixes and suffixes.
    from moltbot_server.models.chat_template_sandbox import compile_template

    try:
        return JinjaLayout(folder.jinja, compile_template(folder.jinja, folder.template_options))
    except TemplateRefused as problem:
        raise ModelUnavailable(f"{folder.path}: its chat template cannot be used: {problem}.") from None


def _open_pieces(folder: ModelFolder, source: str) -> Pieces:
    # Imported late: each kind has a native library of its own, and a model needs one of them.
    if folder.tokenizer.suffix == ".json":
        from moltbot_server.models.pieces_json import JsonPieces

        return JsonPieces(folder)
    from moltbot_server.models.pieces_sentencepiece import SentencePieces

    return SentencePieces(folder, source)
