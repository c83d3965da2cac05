"""Rotary attention: of all tokens of a sequence, and of one more token over what is remembered of it.

On a GPU the latter, and reading a context of which the memory is wanted, are kernels of their own (`codream.kernels`),
because as products with a row or a few each they take XLA two and a half times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codream import kernels

__all__ = ["attention", "recall", "reread", "rotate"]

LONGEST = 64
"""Keys up to which kernels are used: they are written out, one after the other."""


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
    turn: Float[Array, "two half"],
    slot: Int[Array, ""],
    keys: Float[Array, "heads time head"],
    values: Float[Array, "heads time head"],
    valid: Bool[Array, " time"],
) -> tuple[Float[Array, "heads head"], Float[Array, "heads time head"], Float[Array, "heads time head"]]:
    """One more token's `attention` to what is valid of the memory and to itself, and the memory with it at `slot`.

    `qkv` is the token's query, key and value before their `bias` and their rotation; in its precision they are used.
    No gradient passes.
    """

    if _suits(*qkv.shape[1:], time=len(valid)):
        seen, keys, values = kernels.recall(qkv, bias, turn, slot, keys, values, valid)
        return seen.astype(jnp.float32), keys, values
    q, k, v = qkv + bias
    q, k, v = (x.astype(qkv.dtype) for x in (rotate(q, turn), rotate(k, turn), v))
    keys, values = _put(1)(keys, k, slot), _put(1)(values, v, slot)
    return attention(q, keys, values, valid | (jnp.arange(len(valid)) == slot)), keys, values


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
