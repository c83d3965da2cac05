"""Adam after clipping by the norm of all gradients, and norms: what every algorithm learns with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

__all__ = ["adam", "applied", "clip", "norm"]

T = TypeVar("T")

SMALL = 2**16
"""Numbers up to which an array goes as it is into the one sum of a norm, of the others the sums of their rows: on a GPU
a hundred sums of their own take longer."""


def norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm of all numbers in a tree."""
    return _norms(tree)[0]


def _norms(*trees: Any) -> list[Float[Array, ""]]:
    """Those of trees of the same arrays."""
    if jax.default_backend() == "cpu":
        return [jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in _numbers(tree)), jnp.zeros(()))) for tree in trees]
    return list(jnp.sqrt(jnp.sum(_squares(*trees), axis=1)))


def _numbers(tree: Any) -> list[Array]:
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))


def _squares(*trees: Any) -> Float[Array, "trees n"]:
    """Of all their numbers, summed over the rows of large arrays: those of all trees in one kernel."""

    def squares(*each: Array) -> Sequence[Array]:
        squared = [jnp.square(x) for x in each]
        if each[0].size > SMALL:
            add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]  # noqa: E731
            squared = jax.lax.reduce(squared, [0.0] * len(each), add, (each[0].ndim - 1,))
        return [x.reshape(-1) for x in squared]

    found = zip(*(squares(*each) for each in zip(*map(_numbers, trees), strict=True)), strict=True)
    whole = jnp.concatenate([x for tree in found for x in tree])
    # Without the barrier XLA takes them apart again.
    return jax.lax.optimization_barrier(whole).reshape(len(trees), -1)


def clip(most: float) -> optax.GradientTransformation:
    """Scales gradients whose norm is larger down to `most`. NaN where one is not finite."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        if jax.default_backend() == "cpu":
            scale = jnp.minimum(1.0, most / norm(updates))
            return jax.tree.map(lambda x: x * scale, updates), state
        squares = _squares(updates)[0]
        scale = jnp.minimum(1.0, most / jnp.sqrt(jnp.sum(squares)))
        # The same number along a row: XLA updates arrays of one shape in one kernel if they share more than a number.
        row = jnp.where(squares[: max(map(_width, _numbers(updates)))] >= 0, scale, jnp.nan)
        row = jax.lax.optimization_barrier(row)
        fits = lambda x: 0 < _width(x) <= len(row)  # noqa: E731
        return jax.tree.map(lambda x: x * (row[: _width(x)] if fits(x) else scale), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _width(x: Array) -> int:
    """Of its rows; 0 of a number."""
    return x.shape[-1] if x.ndim else 0


def adam(lr: float, most: float, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2014, arXiv:1412.6980) after `clip`."""
    return optax.chain(clip(most), optax.adam(lr, eps=eps))


def applied(parameters: T, updates: Any) -> tuple[T, Float[Array, ""]]:
    """The parameters θ after an update Δθ, and ‖Δθ‖ / ‖θ‖: how far it moves them. Not finite as soon as an update or a
    parameter is not."""
    arrays, rest = eqx.partition(eqx.apply_updates(parameters, updates), eqx.is_inexact_array)
    updates = eqx.filter(updates, eqx.is_inexact_array)
    if jax.default_backend() != "cpu":
        # Summed in the same kernel that writes them, parameters could not be updated in place.
        updates, arrays = jax.lax.optimization_barrier((updates, arrays))
    moved, size = _norms(updates, arrays)
    return eqx.combine(arrays, rest), moved / jnp.maximum(size, 1e-12)
