"""The weights of a `model.bin`, and how int8 ones stay within what any processor can add up.

Processors without VNNI (AVX2 alone) add the products of two neighbouring weights with activations of up to 255 in 16
bits. A sum that does not fit is cut off without a word, and its model answers otherwise than elsewhere.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 128
"""What two neighbours of one sign may come to: 255 times as much is the last multiple that fits into 16 bits."""


def variables(path: Path) -> dict[str, NDArray[Any]]:
    """Read what a `model.bin` of CTranslate2 holds, by name, as it is stored: int8 weights beside their `…_scale`."""
    content, at = path.read_bytes(), 0

    def take(layout: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{layout}", content, at)
        at += struct.calcsize(layout)
        return value

    def text() -> str:
        size = take("H")
        return str(take(f"{size}s").rstrip(b"\0").decode())

    take("I"), text(), take("I")  # version of the format, name of the architecture, its revision
    found: dict[str, NDArray[Any]] = {}
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        kind = (np.float32, np.int8, np.int16, np.int32, np.float16)[take("B")]
        size = take("I")
        found[name] = np.frombuffer(content, kind, size // np.dtype(kind).itemsize, at).reshape(shape)
        at += size
    return found


def pushes(weights: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return how far two neighbours can push one sum: `[rows, columns / 2]`, for weights of `[rows, columns]`."""
    first, second = np.moveaxis(weights.astype(np.int64).reshape(len(weights), -1, 2), -1, 0)
    return np.where(first * second > 0, abs(first + second), np.maximum(abs(first), abs(second)))


def fitted(weights: NDArray[np.int8], scales: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return weights of `[rows, columns]` and scales of `[rows]` that mean the same (`weights / scales`) and fit.

    A row is narrowed by as much as its heaviest pair asks for, which costs about a third of a bit.
    """
    by = np.minimum(1.0, MOST / np.maximum(1, pushes(weights).max(axis=1)))
    narrow = np.rint(weights * by[:, None]).astype(np.int8)
    seconds = narrow.reshape(len(narrow), -1, 2)[..., 1]
    seconds -= np.where(pushes(narrow) > MOST, np.sign(seconds), 0).astype(np.int8)  # where both were rounded up
    return narrow, (scales * by).astype(np.float32)
