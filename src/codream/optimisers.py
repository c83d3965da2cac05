"""Adam after clipping by the norm of all gradients, and norms: what every algorithm learns with."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

__all__ = ["adam", "clip", "norm", "update_ratio"]

SMALL = 2**16
"""Numbers up to which an array goes as it is into the one sum of a norm, of the others the sums of their rows: on a GPU
a hundred sums of their own take longer."""


def norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm of all numbers in a tree."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    if jax.default_backend() == "cpu":
        return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in leaves), jnp.zeros(())))

    def squares(x: Array) -> Array:
        return jnp.sum(jnp.square(x), axis=-1).reshape(-1) if x.size > SMALL else jnp.square(x).reshape(-1)

    # Without the barrier XLA takes them apart again.
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate([squares(x) for x in leaves]))))


def clip(most: float) -> optax.GradientTransformation:
    """Scales gradients whose norm is larger down to `most`. NaN where one is not finite."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, most / norm(updates))
        return jax.tree.map(lambda x: x * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adam(lr: float, most: float, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2014, arXiv:1412.6980) after `clip`."""
    return optax.chain(clip(most), optax.adam(lr, eps=eps))


def update_ratio(updates: Any, parameters: Any) -> Float[Array, ""]:
    """‖Δθ‖ / ‖θ‖: how far one update moves the parameters. Not finite as soon as an update or a parameter is not."""
    if jax.default_backend() != "cpu":
        # Summed in the same kernel that writes them, parameters could not be updated in place.
        updates, parameters = jax.lax.optimization_barrier(
            (eqx.filter(updates, eqx.is_inexact_array), eqx.filter(parameters, eqx.is_inexact_array))
        )
    return norm(updates) / jnp.maximum(norm(parameters), 1e-12)
