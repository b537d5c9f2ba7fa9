"""Texts to vectors: an encoder of CTranslate2 (the BERT family), pooled and normalised."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ctranslate2
import numpy as np
import tokenizers

from moltbot_server.errors import InvalidField, ModelUnavailable, QueueFull
from moltbot_server.models.encoder_folder import EncoderFolder
from moltbot_server.models.engine import Embedded

MAX_WAITING = 1024
_BATCH_TOKENS = 4096
_CHARACTERS_A_TOKEN = 32
_log = logging.getLogger(__name__)


class Encoder:
    """A model folder that embeds. One batch is computed at a time, on `threads` threads of the native code."""

    def __init__(self, folder: EncoderFolder, *, threads: int = 1, max_waiting: int = MAX_WAITING) -> None:
        """Describe the model; nothing is loaded before `start`. `max_waiting` is in texts."""
        self.id = folder.id
        self.display_name = folder.display_name
        self.type = folder.family
        self.context_length = folder.context_length
        self.memory_bytes = (folder.path / "model.bin").stat().st_size
        self._folder = folder
        self._threads = threads
        self._max_waiting = max_waiting
        self._waiting = 0
        self._left = threading.Event()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"encoder-{folder.id}")
        self._loaded: _Loaded | None = None

    @property
    def healthy(self) -> bool:
        """Whether the model is loaded."""
        return self._loaded is not None

    async def start(self) -> None:
        """Load the model and let it embed once.

        Raises:
            ModelUnavailable: the model cannot be loaded; the text says what was found and what was expected.
        """
        loop = asyncio.get_running_loop()
        loaded = await loop.run_in_executor(self._worker, _Loaded, self._folder, self._threads)
        await loop.run_in_executor(self._worker, loaded.embed, ["Hello"], self._left)
        self._loaded = loaded

    async def close(self) -> None:
        """Let the batch under way end, refuse the rest, and free the model."""
        self._loaded = None
        self._left.set()
        await asyncio.to_thread(self._worker.shutdown)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Return the vector of each text. What is longer than the model reads loses its end.

        Raises:
            InvalidField: a text has nothing that the model reads.
            QueueFull: too many texts wait already.
            ModelUnavailable: the model is not loaded, or fails.
        """
        loaded = self._loaded
        if loaded is None:
            raise ModelUnavailable(f"The model {self.id} is not loaded.")
        if self._waiting and self._waiting + len(texts) > self._max_waiting:
            raise QueueFull(f"{self._waiting} texts wait to be embedded already.", retry_after=1.0)
        self._waiting += len(texts)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._worker, loaded.embed, list(texts), self._left)
        except RuntimeError as problem:
            _log.error("texts could not be embedded", exc_info=problem, extra={"model": self.id})
            raise ModelUnavailable(f"The model {self.id} failed; the log says why.") from None
        finally:
            self._waiting -= len(texts)


class _Loaded:
    """The model in memory; its methods belong to the worker's thread."""

    def __init__(self, folder: EncoderFolder, threads: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder.tokenizer))
        except Exception as problem:  # the library raises nothing more precise
            raise ModelUnavailable(f"{folder.tokenizer} cannot be read as a tokenizer: {problem}.") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(folder.context_length)
        self._longest = folder.context_length * _CHARACTERS_A_TOKEN
        self._pooling = folder.pooling
        try:
            self._encoder = ctranslate2.Encoder(
                str(folder.path), device="cpu", inter_threads=1, intra_threads=threads, max_queued_batches=-1
            )
        except (RuntimeError, ValueError, MemoryError) as problem:
            raise ModelUnavailable(
                f"{folder.path} cannot be loaded: {problem}; expected a whole CTranslate2 encoder model."
            ) from None

    def embed(self, texts: list[str], left: threading.Event) -> Embedded:
        """Return the vectors of texts, computed in batches of like lengths.

        Raises:
            InvalidField: the model's tokenizer finds nothing in a text.
        """
        # What no token reaches need not be cut up.
        read = [self._tokenizer.encode(text[: self._longest]) for text in texts]
        ids = [list(encoding.ids) for encoding in read]
        for index, row in enumerate(ids):
            if not row:
                raise InvalidField(f"texts[{index}]", "has nothing that the model reads")
        vectors: list[list[float]] = [[] for _ in texts]
        for batch in _batches([len(row) for row in ids]):
            if left.is_set():
                raise RuntimeError("the model was closed")
            for index, vector in zip(batch, self._encode([ids[index] for index in batch]), strict=True):
                vectors[index] = vector.tolist()
        cut = [
            bool(encoding.overflowing) or len(text) > self._longest for encoding, text in zip(read, texts, strict=True)
        ]
        return Embedded(vectors, sum(map(len, ids)), cut)

    def _encode(self, ids: list[list[int]]) -> np.ndarray:
        # A copy: the native code's own array lives no longer than its output.
        states = np.array(self._encoder.forward_batch(ids).last_hidden_state, dtype=np.float32)
        lengths = np.array([len(row) for row in ids])
        if self._pooling == "cls":
            pooled = states[:, 0]
        elif self._pooling == "lasttoken":
            pooled = states[np.arange(len(ids)), lengths - 1]
        else:
            inside = (np.arange(states.shape[1]) < lengths[:, None])[:, :, None]
            if self._pooling == "max":
                pooled = np.where(inside, states, -np.inf).max(axis=1)
            else:
                pooled = np.where(inside, states, 0.0).sum(axis=1) / lengths[:, None]
        norms = np.linalg.norm(pooled, axis=1, keepdims=True)
        return np.asarray(pooled / np.maximum(norms, 1e-12), dtype=np.float32)


def _batches(lengths: list[int]) -> list[list[int]]:
    """Return the indices of texts in batches of like lengths, each of at most so many tokens, padding counted."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        # The first of a batch is its longest: all others are padded to it.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= _BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
