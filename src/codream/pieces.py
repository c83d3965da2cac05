"""Work in pieces that stay in a CPU's cache: on an accelerator everything at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

__all__ = ["each_agent", "mapped", "one_by_one", "pieces", "summed", "unrolled"]

MOST_TURNS = 32


def pieces(total: int, most: int) -> int:
    """Into how many equal pieces `total` is to be cut so that none is larger than `most`; on an accelerator 1."""
    if jax.default_backend() != "cpu":
        return 1
    return next(n for n in range(1, total + 1) if total % n == 0 and total // n <= most)


def mapped(function: Callable[[Any], Any], count: int, tree: Any, axis: int = 0) -> Any:
    """`function` of `tree`, piece after piece along `axis` of its arrays; arrays of the result are joined there."""
    if count == 1:
        return function(tree)
    size = jax.tree.leaves(tree)[0].shape[axis] // count
    piece = lambda at: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, size, axis), tree)  # noqa: E731

    def room(one: Any) -> Any:
        return jnp.zeros((*one.shape[:axis], count * size, *one.shape[axis + 1 :]), one.dtype)

    def body(found: Any, at: Any) -> tuple[Any, None]:
        put = lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one, at, axis)  # noqa: E731
        return jax.tree.map(put, found, function(piece(at))), None

    # Written to its place: stacked, what is joined along another axis than the first would be copied as a whole.
    empty = jax.tree.map(room, jax.eval_shape(function, piece(0)))
    return jax.lax.scan(body, empty, size * jnp.arange(count))[0]


def summed(function: Callable[[Any], tuple[Any, Any]], count: int, tree: Any) -> tuple[Any, Any]:
    """`function` of `tree` gives (a mean, something for every row): of the pieces, the mean and all rows."""
    if count == 1:
        return function(tree)
    cut = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)
    first = jax.tree.map(lambda x: x[0], cut)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)[0])

    def body(total: Any, piece: Any) -> tuple[Any, Any]:
        mean, rows = function(piece)
        return jax.tree.map(lambda a, b: a + b / count, total, mean), rows

    total, rows = jax.lax.scan(body, zeros, cut)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def each_agent(function: Callable[..., Any], *args: Any) -> Any:
    """`function` of every agent's share of the arguments, whose arrays have a leading agent axis.

    On a CPU one agent after the other: the products of one fill it, and memory is that of one.
    """
    if jax.default_backend() != "cpu":
        return eqx.filter_vmap(function)(*args)
    arrays, static = eqx.partition(args, eqx.is_array)
    rest: list[Any] = []

    def one(arrays: Any) -> Any:
        out, other = eqx.partition(function(*eqx.combine(arrays, static)), eqx.is_array)
        rest.append(other)
        return out

    return eqx.combine(jax.lax.map(one, arrays), rest[0])


def unrolled(turns: int) -> int:
    """How many turns of a loop of next to no work are written out: elsewhere than on a CPU all, up to MOST_TURNS, as a
    loop's kernels are started turn by turn."""
    return 1 if jax.default_backend() == "cpu" else max(1, min(turns, MOST_TURNS))


def one_by_one(function: Callable[[Any], Any], xs: Any, apart: bool) -> Any:
    """`function` of every row of the tree `xs`; `apart`: one after the other, where all at once would not fit."""
    return jax.lax.map(function, xs) if apart else jax.vmap(function)(xs)
