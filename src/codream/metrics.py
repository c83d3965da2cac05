"""Metrics of updates, as sums and counts, so that means can be taken over any stretch of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

__all__ = ["Metrics", "add_metrics", "repeat", "zeros_like_result"]

# name → (sum, count)
Metrics = dict[str, tuple[Float[Array, ""], Num[Array, ""]]]


def add_metrics(total: Any, more: Any) -> Any:
    """Sum of two trees of metrics. Once an entry is not finite all stay as they are: it would only infect the rest."""
    healthy = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(total)]))
    return jax.tree.map(lambda a, b: jnp.where(healthy, a + b, a), total, more)


def zeros_like_result(function: Callable[..., Any], *args: Any) -> Any:
    """Zeros in the shape of what `function(*args)` would give; computes nothing."""
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def repeat(train: Any, state: Any, count: int | Int[Array, ""], key: PRNGKeyArray, *args: Any) -> tuple[Any, Any]:
    """`count` times `state, metrics = train(state, key, *args)`, each with its own key; the metrics are summed."""
    params, static = eqx.partition(state, eqx.is_array)
    given, rest = eqx.partition(args, eqx.is_array)

    @jax.jit  # so that it is traced once, for the shapes and for the loop
    def once(params: Any, key: PRNGKeyArray, given: Any) -> tuple[Any, Any]:
        state, metrics = train(eqx.combine(params, static), key, *eqx.combine(given, rest))
        return eqx.filter(state, eqx.is_array), metrics

    def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, total = carry
        params, metrics = once(params, jax.random.fold_in(key, i), given)
        return params, add_metrics(total, metrics)

    zeros = zeros_like_result(once, params, key, given)[1]
    params, total = jax.lax.fori_loop(0, count, body, (params, zeros))
    return eqx.combine(params, static), total
