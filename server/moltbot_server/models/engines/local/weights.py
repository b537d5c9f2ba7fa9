"""What a model's weights file says of its sizes, without loading it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_ATTENTION = re.compile(r"decoder/layer_(\d+)/self_attention/linear_([01])/weight(_0)?$")
_FLOAT = 4


def context_bytes(weights: Path) -> int | None:
    """Return how many bytes the model keeps for each token of a context on a processor; None where it does not say.

    Each layer keeps a key and a value, which are what the first matrix of its attention makes beside the query; the
    second matrix takes as many columns as the query has.
    """
    made: dict[str, int] = {}
    asked: dict[str, int] = {}
    try:
        with weights.open("rb") as file:
            for name, shape in _variables(file):
                if (found := _ATTENTION.match(name)) and len(shape) == 2:
                    layer, matrix, _ = found.groups()
                    (made if matrix == "0" else asked)[layer] = shape[0 if matrix == "0" else 1]
    except (OSError, struct.error, UnicodeDecodeError):
        return None
    kept = [made[layer] - asked[layer] for layer in made.keys() & asked.keys()]
    return _FLOAT * sum(kept) if kept and min(kept) > 0 else None


def _variables(file: BinaryIO) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each matrix of a file in CTranslate2's format, version 6."""
    _number(file, "I")
    _text(file)
    _number(file, "I")
    for _ in range(_number(file, "I")):
        name = _text(file)
        shape = tuple(_number(file, "I") for _ in range(_number(file, "B")))
        _number(file, "B")
        size = _number(file, "I")
        file.seek(size, 1)
        yield name, shape


def _number(file: BinaryIO, kind: str) -> int:
    (value,) = struct.unpack(kind, file.read(struct.calcsize(kind)))
    return int(value)


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()
