"""Metrics of updates, as sums and counts, so that means can be taken over any stretch of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

__all__ = ["Metrics", "Sums", "added", "repeat", "zeros_like_result"]

# name → (sum, count)
Metrics = dict[str, tuple[Float[Array, ""], Num[Array, ""]]]


class Sums(eqx.Module, Mapping[str, tuple[Any, Any]]):
    """Metrics as one array: a hundred numbers by themselves are as many buffers, and take the compiler long.

    A mapping still: name → (sum, count).
    """

    numbers: Float[Array | np.ndarray, "*s names 2"]
    names: tuple[str, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, metrics: Metrics) -> Sums:
        """Counts become float32, which is exact up to 16 million of them in a line of the log."""
        numbers = [jnp.asarray(x, jnp.float32) for pair in metrics.values() for x in pair]
        return cls(jnp.stack(numbers).reshape(-1, 2), tuple(metrics))

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        if name not in self.names:
            raise KeyError(name)
        place = self.names.index(name)
        return self.numbers[..., place, 0], self.numbers[..., place, 1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def added(total: Float[Array, "*s"], more: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Sum of metrics. Once an entry is not finite all stay as they are: it would only infect the rest."""
    return jnp.where(jnp.all(jnp.isfinite(total)), total + more, total)


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
        return params, added(total, ravel_pytree(metrics)[0])

    zeros, metrics_of = ravel_pytree(zeros_like_result(once, params, key, given)[1])
    params, total = jax.lax.fori_loop(0, count, body, (params, zeros))
    return eqx.combine(params, static), metrics_of(total)
