"""Attention of one token over what a sequence remembers. On a GPU one kernel, which reads every key and value once: as
two products with one row each XLA takes two and a half times as long (docs/performance.md)."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["attention", "recall"]

LONGEST = 64
"""Keys up to which the kernel is written out, one after the other."""

LANES = 512
"""Numbers of a query per warp of threads: 16 in each thread."""


def attention(
    q: Float[Array, "heads head"],
    k: Float[Array, "heads time head"],
    v: Float[Array, "heads time head"],
    allowed: Bool[Array, " time"],
) -> Float[Array, "heads head"]:
    """softmax(q kᵀ / √head) v over the allowed tokens, sums in float32."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("hd,htd->ht", q, k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30))
    return product("ht,htd->hd", weights.astype(v.dtype), v)


def recall(
    q: Float[Array, "heads head"],
    k: Float[Array, "heads time head"],
    v: Float[Array, "heads time head"],
    allowed: Bool[Array, " time"],
) -> Float[Array, "heads head"]:
    """`attention`, where every query has keys of its own."""
    _, time, _ = k.shape
    powers = all(n & (n - 1) == 0 for n in q.shape)
    if jax.default_backend() != "gpu" or not powers or time > LONGEST:
        return attention(q, k, v, allowed)
    return kernel()(q, k, v, allowed)


@cache
def kernel(interpret: bool = False) -> Any:
    """`attention` as a kernel, one program for each query of all heads; its gradient is that of `attention`.

    Needs a power of two as the number of heads and as their size. `interpret`: on a CPU, for tests.
    """
    from jax.experimental import pallas as pl  # not needed on a CPU, and slow to import
    from jax.experimental.pallas import triton

    def read(q_ref: Any, k_ref: Any, v_ref: Any, allowed_ref: Any, out_ref: Any) -> None:
        heads, size = q_ref.shape
        q = q_ref[...].astype(jnp.float32) / math.sqrt(size)
        # The softmax as it goes (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3).
        top, total, out = jnp.full(heads, -1e30), jnp.zeros(heads), jnp.zeros((heads, size))
        for t in range(k_ref.shape[1]):
            score = jnp.where(allowed_ref[t], jnp.sum(q * k_ref[:, t].astype(jnp.float32), axis=-1), -1e30)
            higher = jnp.maximum(top, score)
            kept, weight = jnp.exp(top - higher), jnp.exp(score - higher)
            total, top = total * kept + weight, higher
            out = out * kept[:, None] + weight[:, None] * v_ref[:, t].astype(jnp.float32)
        out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)

    def call(q: Array, k: Array, v: Array, allowed: Array) -> Array:
        return pl.pallas_call(
            read,
            out_shape=jax.ShapeDtypeStruct(q.shape, v.dtype),
            compiler_params=triton.CompilerParams(num_warps=max(1, q.size // LANES), num_stages=1),
            interpret=interpret,
            name="recall",
        )(q, k, v, allowed)

    recalled = jax.custom_vjp(lambda *given: call(*given).astype(jnp.float32))

    def forward(*given: Array) -> tuple[Array, tuple[Array, ...]]:
        return recalled(*given), given

    def backward(given: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
        *data, allowed = given
        return *jax.vjp(lambda *data: attention(*data, allowed), *data)[1](grad), None

    recalled.defvjp(forward, backward)
    return recalled
