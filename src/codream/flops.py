"""Counting floating-point operations: matrix products in a traced function, loops counted as often as they run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from codream.products import PRODUCT

__all__ = ["both_counts", "count_flops", "matrix_rate", "memory_rate"]


Clock = Callable[[], float]


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of the matrix products in `function(*args)`: 2 · m · n · k each.

    A `scan` counts its body times its length. A loop whose length is known only when it runs counts once.
    Element-wise work is not counted. Arrays may be abstract (`jax.ShapeDtypeStruct`): nothing is computed.
    """
    return _count(_traced(function, args).jaxpr.jaxpr)


def both_counts(function: Callable[..., Any], *args: Any) -> tuple[int, float]:
    """`count_flops`, and what XLA's cost analysis says of the lowered program, element-wise work included; NaN where a
    backend has none. XLA counts the body of a loop once, however often it runs."""
    traced = _traced(function, args)
    cost = traced.lower().cost_analysis()
    cost = cost[0] if isinstance(cost, (list, tuple)) else cost
    return _count(traced.jaxpr.jaxpr), float(cost["flops"]) if cost and "flops" in cost else math.nan


def _traced(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    arrays, static = eqx.partition(args, lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct))
    return jax.jit(lambda a: eqx.filter(function(*eqx.combine(a, static)), eqx.is_array)).trace(arrays)


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", PRODUCT.name):
            # Factors of the second meet in their last axes.
            (contract, _), _ = eqn.params.get("dimension_numbers", (((-1,), (-1,)), None))
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = [_count(sub) for value in eqn.params.values() for sub in _jaxprs(value)]
        # Only one branch of a conditional runs.
        total += times * (max(inner, default=0) if eqn.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [sub for item in value for sub in _jaxprs(item)]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    return [value] if hasattr(value, "eqns") else []


def matrix_rate(
    size: int | None = None, repeats: int = 5, dtype: Any = jnp.float32, clock: Clock = time.perf_counter
) -> float:
    """Measured floating-point operations per second of a matrix product on the default device.

    `size`: of the square matrices; unset 2,048, on an accelerator 8,192, where starting a smaller one takes as long.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    # The products of layers: see `codream.linear`.
    sums = jnp.float32 if jax.default_backend() == "cpu" else dtype
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=sums))
    return 2 * size**3 / _fastest(product, a, repeats, clock)


def memory_rate(megabytes: int | None = None, repeats: int = 5, clock: Clock = time.perf_counter) -> float:
    """Measured bytes per second, read and written together, of adding 1 to an array that no cache holds.

    `megabytes`: its size; unset 256, on an accelerator 4,096.
    """
    megabytes = megabytes or (256 if jax.default_backend() == "cpu" else 4096)
    a = jnp.zeros(megabytes * 2**18)
    return 2 * a.nbytes / _fastest(jax.jit(lambda a: a + 1), a, repeats, clock)


def _fastest(function: Any, a: Any, repeats: int, clock: Clock) -> float:
    function(a).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        began = clock()
        function(a).block_until_ready()
        best = min(best, clock() - began)
    return best
