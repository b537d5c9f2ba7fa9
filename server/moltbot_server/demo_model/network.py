"""The decoder that the recipe trains: Llama's shape (RMSNorm, rotary positions, gated SiLU), tied embeddings, in JAX.

Only `train` and `export` import this module. JAX comes with the extra `train` alone: a running server never needs it.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

DEVICES = 4
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES}")  # a batch is shared out

jax: Any = importlib.import_module("jax")  # by name: type checkers run where the extra `train` is not installed
jnp: Any = importlib.import_module("jax.numpy")

Params = dict[str, Any]
EPSILON = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the decoder: vocabulary in pieces, width, layers, heads, and the width inside the feed-forward part."""

    vocabulary: int
    width: int = 160
    layers: int = 3
    heads: int = 4
    inner: int = 480


def init(shape: Shape, embeddings: np.ndarray, seed: int) -> Params:
    """Draws fresh weights, each matrix as [out, in] so that CTranslate2 takes it as it is."""
    rng = np.random.default_rng(seed)

    def normal(*size: int, std: float = 0.02) -> Any:
        return jnp.asarray(rng.normal(0.0, std, size), dtype=jnp.float32)

    params: Params = {
        "embed": jnp.asarray(embeddings, dtype=jnp.float32),
        "norm": jnp.full(shape.width, 0.3),  # the embeddings are large for the output's taste
    }
    narrow = 0.02 / (2 * shape.layers) ** 0.5  # what writes into the residual stream starts small
    for layer in range(shape.layers):
        params[f"layer{layer}"] = {
            "attend_norm": jnp.ones(shape.width),
            "qkv": normal(3 * shape.width, shape.width),
            "out": normal(shape.width, shape.width, std=narrow),
            "feed_norm": jnp.ones(shape.width),
            "gate": normal(shape.inner, shape.width),
            "up": normal(shape.inner, shape.width),
            "down": normal(shape.width, shape.inner, std=narrow),
        }
    return params


def as_arrays(params: Params) -> Params:
    """Puts plain weights where JAX computes."""
    return dict(jax.tree_util.tree_map(lambda value: jnp.asarray(value, dtype=jnp.float32), params))


def _rms(x: Any, gamma: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * gamma


def _rotate(x: Any, positions: Any) -> Any:
    """Turns [batch, time, heads, size] by its positions [batch, time]; halves, not interleaved pairs."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / (10000.0 ** (jnp.arange(half) / half))
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _drop(x: Any, key: Any, share: float) -> Any:
    """Silences a share of the values and makes up for it in the others."""
    kept = jax.random.bits(key, x.shape, dtype=jnp.uint8) >= round(256 * share)
    return jnp.where(kept, x / (1 - share), 0.0)


def hidden(
    params: Params, shape: Shape, tokens: Any, positions: Any, segments: Any, key: Any, dropout: float = 0.08
) -> Any:
    """Runs the decoder over packed rows [batch, time]; a token sees earlier tokens of its own segment only."""
    batch, time = tokens.shape
    keys = jax.random.split(key, 2)
    x = _drop(params["embed"][tokens], keys[0], dropout)
    causal = jnp.tril(jnp.ones((time, time), dtype=bool))
    mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
    scale = (shape.width // shape.heads) ** -0.5
    for layer in range(shape.layers):
        w = params[f"layer{layer}"]
        qkv = (_rms(x, w["attend_norm"]) @ w["qkv"].T).reshape(batch, time, 3, shape.heads, -1)
        q, k, v = _rotate(qkv[:, :, 0], positions), _rotate(qkv[:, :, 1], positions), qkv[:, :, 2]
        scores = jnp.where(mask, jnp.einsum("bthd,bshd->bhts", q * scale, k), -1e9)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
        x = x + mixed.reshape(batch, time, shape.width) @ w["out"].T
        h = _rms(x, w["feed_norm"])
        x = x + (jax.nn.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T
    return _drop(_rms(x, params["norm"]), keys[1], dropout)


def loss(params: Params, shape: Shape, batch: dict[str, Any], key: Any) -> Any:
    """Mean cross-entropy over the weighted target positions.

    `pick` and `goal` name the scored positions, as flat indices and piece ids; `weight` is 0 for their padding.
    Scoring these alone saves the large product with the vocabulary for everything the user said.
    """
    states = hidden(params, shape, batch["tokens"], batch["positions"], batch["segments"], key)
    states = states.reshape(-1, shape.width)[batch["pick"]]
    logits = states @ params["embed"].T
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, batch["goal"][:, None], axis=-1)[:, 0]
    return jnp.sum(nll * batch["weight"]) / jnp.sum(batch["weight"])


def optimizer_state(params: Params) -> dict[str, Any]:
    """Makes the zeroed moments of the optimizer."""

    def zeros() -> Any:
        return jax.tree_util.tree_map(jnp.zeros_like, params)

    return {"m": zeros(), "v": zeros(), "step": jnp.zeros((), dtype=jnp.int32)}


def _orthogonal(matrix: Any) -> Any:
    """Pulls all singular values of a matrix towards one, by five Newton-Schulz steps (Muon, K. Jordan et al. 2024)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def _direction(name: str, m: Any, v: Any) -> Any:
    """Where one weight moves: Muon for the matrices of the layers, Adam for embeddings and norms."""
    if m.ndim < 2 or name == "embed":
        return m / (jnp.sqrt(v) + 1e-8)
    parts = jnp.split(m, 3) if name == "qkv" else [m]
    scale = 0.2 * max(parts[0].shape) ** 0.5  # brings the step to the size of Adam's
    return jnp.concatenate([scale * _orthogonal(part) for part in parts])


def _update(
    params: Params, grads: Params, state: dict[str, Any], rate: Any, decay: float
) -> tuple[Params, dict[str, Any]]:
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree_util.tree_leaves(grads)))
    clip = jnp.minimum(1.0, 1.0 / (norm + 1e-6))
    step = state["step"] + 1
    m = jax.tree_util.tree_map(lambda old, g: 0.9 * old + 0.1 * g * clip, state["m"], grads)
    v = jax.tree_util.tree_map(lambda old, g: 0.95 * old + 0.05 * (g * clip) ** 2, state["v"], grads)
    fix_m, fix_v = 1 - 0.9**step, 1 - 0.95**step

    def move(path: Any, p: Any, m_: Any, v_: Any) -> Any:
        change = _direction(path[-1].key, m_ / fix_m, v_ / fix_v) * (0.4 if path[-1].key == "embed" else 1.0)
        return p - rate * (change + (decay * p if p.ndim > 1 else 0.0))

    return jax.tree_util.tree_map_with_path(move, params, m, v), {"m": m, "v": v, "step": step}


def key(seed: int, step: int) -> Any:
    """Makes the source of chance for one training step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_step(shape: Shape, decay: float = 0.1) -> Any:
    """Compiles one training step: (params, state, batch, rate, key) to (params, state, loss).

    The batch has a leading axis for the devices, of which a CPU shows as many as `XLA_FLAGS` says.
    """

    def lean(params: Params, batch: dict[str, Any], key: Any) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index("device"))
        return jax.lax.pmean(jax.value_and_grad(loss)(params, shape, batch, key), "device")

    leaning = jax.pmap(lean, axis_name="device", in_axes=(None, 0, None), out_axes=None)
    update = jax.jit(lambda params, grads, state, rate: _update(params, grads, state, rate, decay))

    def step(params: Params, state: dict[str, Any], batch: dict[str, Any], rate: Any, key: Any) -> Any:
        value, grads = leaning(params, batch, key)
        first = jax.local_devices()[0]
        params, state = update(params, jax.device_put(grads, first), state, rate)
        return params, state, value

    return step
