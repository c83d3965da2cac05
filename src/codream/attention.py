"""Rotary attention: of all tokens of a sequence, and of one more token over what is remembered of it.

On a GPU the latter, and reading a context of which the memory is wanted, are kernels of their own (`codream.kernels`),
because as products with a row or a few each they take XLA two and a half times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codream import kernels

__all__ = ["Place", "attention", "place", "recall", "reread", "rotate", "turns"]

LONGEST = 64
"""Keys up to which kernels are used: they are written out, one after the other."""


def _rates(half: int) -> Float[np.ndarray, " half"]:
    """By which the angles grow from token to token."""
    return 10_000.0 ** (-np.arange(half) / half)


def turns(time: int, half: int) -> Float[np.ndarray, "time two half"]:
    """Cosine and sine of the angles of tokens 0, 1, …, as constants."""
    angles = np.arange(time)[:, None] * _rates(half)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class Place(NamedTuple):
    """Where one more token stands."""

    position: Int[Array, ""]
    slot: Int[Array, ""]  # of the ring
    turn: Float[Array, "two half"]  # cosine and sine of its angles


def place(position: Int[Array, ""], size: int, half: int) -> Place:
    """In a ring of that size. A program computes of it what its `recall` uses."""
    angles, quarters = position * _rates(half), jnp.array([0.0, math.pi / 2])
    turned = lambda quarter: jnp.cos(angles - quarter)  # noqa: E731
    # On a CPU in a loop: else XLA computes them anew for every entry that is turned.
    each = jax.lax.map if jax.default_backend() == "cpu" else lambda f, xs: jax.vmap(f)(xs)
    return Place(position, position % size, each(turned, quarters))


def rotate(x: Float[Array, "heads head"], turn: Float[Array, "two half"]) -> Float[Array, "heads head"]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34); `turn` is cosine and sine of the
    token's angles."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = turn
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


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
    qkv: Float[Array, "3 heads head"],
    bias: Float[Array, "3 heads head"],
    at: Place,
    keys: Float[Array, "heads time head"],
    values: Float[Array, "heads time head"],
    valid: Bool[Array, " time"],
) -> kernels.Remembered:
    """One more token's `attention` to what is valid of the memory and to itself, and the memory with it in its slot:
    keys, values, and what is valid.

    `qkv` is the token's query, key and value before their `bias` and their rotation; in its precision they are used.
    No gradient passes.
    """

    if _suits(*qkv.shape[1:], time=len(valid)):
        rates = jnp.asarray(_rates(at.turn.shape[1]), jnp.float32)
        seen, keys, values, valid = kernels.recall(qkv, bias, at.position, rates, keys, values, valid)
        return seen.astype(jnp.float32), keys, values, valid
    q, k, v = qkv + bias
    q, k, v = (x.astype(qkv.dtype) for x in (rotate(q, at.turn), rotate(k, at.turn), v))
    keys, values = _put(1)(keys, k, at.slot), _put(1)(values, v, at.slot)
    valid = valid | (jnp.arange(len(valid)) == at.slot)
    return attention(q, keys, values, valid), keys, values, valid


def reread(
    qkv: Float[Array, "time 3 heads head"],
    bias: Float[Array, "3 heads head"],
    turns: Float[Array, "time two half"],
    allowed: Bool[Array, "time time"],
    room: int,
    since: int,
    remembered: bool,
) -> tuple[Float[Array, "wanted heads head"], Float[Array, "heads all head"], Float[Array, "heads all head"]]:
    """`attention` of the tokens from `since` on, each of which may attend to itself and the others where allowed; and
    the memory of all, with room for more. `remembered`: whether it is the memory that is wanted, and no gradient."""

    if remembered and _suits(*qkv.shape[2:], time=len(qkv) + room):
        before = jnp.arange(len(qkv))[:, None] < since
        seen, keys, values = kernels.reread(qkv, bias, turns, allowed & ~before, room)
        return seen[since:].astype(jnp.float32), keys, values
    q = jax.vmap(rotate)(qkv[since:, 0] + bias[0], turns[since:])
    k, v = jax.vmap(rotate, out_axes=1)(qkv[:, 1] + bias[1], turns), jnp.moveaxis(qkv[:, 2] + bias[2], 0, 1)
    q, k, v = (x.astype(qkv.dtype) for x in (q, k, v))
    seen = jax.vmap(attention, in_axes=(0, None, None, 0))(q, k, v, allowed[since:])
    pad = ((0, 0), (0, room), (0, 0))
    return seen, jnp.pad(k, pad), jnp.pad(v, pad)


def _suits(heads: int, head: int, time: int) -> bool:
    return head > 1 and time <= LONGEST and kernels.suits(heads, head)


@cache
def _put(axis: int) -> Callable[[Array, Array, Int[Array, ""]], Array]:
    """(rows, row, slot) → `rows` with `row` at `slot` of that axis.

    Where a batch shares the slot it stays a plain update in place; JAX's own rule makes it a scatter, which reads what
    it is to replace.
    """

    def update(rows: Array, row: Array, slot: Int[Array, ""]) -> Array:
        return jax.lax.dynamic_update_index_in_dim(rows, row, slot, axis)

    put = jax.custom_batching.custom_vmap(update)

    @put.def_vmap
    def _(size: int, batched: list[bool], rows: Array, row: Array, slot: Int[Array, "*b"]) -> tuple[Array, bool]:
        if batched[2]:
            return jax.vmap(update, [0 if b else None for b in batched])(rows, row, slot), True
        each = lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape))  # noqa: E731
        return _put(axis + 1)(each(rows, batched[0]), each(row, batched[1]), slot), True

    return put
