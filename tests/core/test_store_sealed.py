"""Kept values with a checksum: whatever a disk does to them is noticed."""

from __future__ import annotations

import msgspec
import pytest
from moltbot_server.store.sealed import Changed, Sealed, seal
from moltbot_server.turns import Part, TextPart, encode

PARTS = (TextPart(text="Der Rest ist für dich."), TextPart(text="没有别的"))
reader: Sealed[tuple[Part, ...]] = Sealed(tuple[Part, ...])


def test_what_was_kept_is_read_again_also_without_a_checksum_as_before() -> None:
    assert reader.decode(seal(PARTS)) == PARTS
    assert reader.decode(encode(PARTS)) == PARTS
    assert reader.decode(seal(())) == reader.decode(encode(())) == ()


def test_each_flipped_bit_is_noticed() -> None:
    kept = seal(PARTS)
    for bit in range(8 * len(kept)):
        changed = bytearray(kept)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Changed, msgspec.MsgspecError)):
            reader.decode(bytes(changed))


def test_what_is_cut_or_empty_is_noticed() -> None:
    kept = seal(PARTS)
    for length in range(len(kept)):
        with pytest.raises((Changed, msgspec.MsgspecError)):
            reader.decode(kept[:length])
