"""Attention, and attention of one token over what a sequence remembers: on a GPU a kernel of its own, because as two
products with one row each it takes XLA two and a half times as long."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from codream import kernels

__all__ = ["attention", "recall"]

LONGEST = 64
"""Keys up to which the kernel is used: they are written out, one after the other."""


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
    """`attention` where every query has keys of its own."""
    if kernels.suits(*q.shape) and k.shape[1] <= LONGEST:
        return _recalled(q, k, v, allowed)
    return attention(q, k, v, allowed)


_Given = tuple[Array, Array, Array, Array]


@jax.custom_vjp
def _recalled(q: Array, k: Array, v: Array, allowed: Array) -> Array:
    return kernels.recall(q, k, v, allowed).astype(jnp.float32)


def _forward(q: Array, k: Array, v: Array, allowed: Array) -> tuple[Array, _Given]:
    return _recalled(q, k, v, allowed), (q, k, v, allowed)


def _backward(given: _Given, grad: Array) -> tuple[Array | None, ...]:
    q, k, v, allowed = given
    return *jax.vjp(lambda q, k, v: attention(q, k, v, allowed), q, k, v)[1](grad), None


_recalled.defvjp(_forward, _backward)
