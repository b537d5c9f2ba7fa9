"""What cuts text up into a model's tokens: one seam for every kind of tokenizer."""

from __future__ import annotations

from typing import Protocol

from moltbot_server.models.detokenizer import Surfaces
from moltbot_server.models.markers import Markers

FENCE = "\ue000"
"""A private character: no vocabulary joins it with its neighbours."""


class Pieces(Protocol):
    """The tokenizer of one model. Tokens are strings of the weights' vocabulary."""

    @property
    def markers(self) -> Markers:
        """The tokens that only a template may say."""

    @property
    def borders(self) -> Markers:
        """Those before which a text may be cut in two, and gives the same tokens."""

    @property
    def longest(self) -> int:
        """Characters of the longest piece."""

    @property
    def surfaces(self) -> Surfaces:
        """What the ids look like in text."""

    def encode(self, text: str, *, joined: bool = False) -> list[str]:
        """Return the tokens of a text, its markers among them.

        `joined`: the text goes on with another one, so that the tokenizer's own leading space does not come before it.
        """
