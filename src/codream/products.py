"""Products on a CPU: in float32, of factors in float32 or rounded to bfloat16, in gradients as well.

A CPU that multiplies bfloat16 (AVX512-BF16, AMX) does so twice as fast as float32, but only with float32 results, and
the gradient of JAX's own such product has a factor in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

__all__ = ["PRODUCT", "product", "rounded_product"]


def product(x: Float[Array, "*b in"], weight: Float[Array, "out in"]) -> Float[Array, "*b out"]:
    """x Wᵀ in float32, from factors in the precision of the weight."""
    return rounded_product(x, weight) if weight.dtype == jnp.bfloat16 else x @ weight.T


def rounded_product(x: Float[Array, "*b in"], weight: Float[Array, "out in"]) -> Float[Array, "*b out"]:
    """x Wᵀ in float32, from factors in bfloat16."""
    return PRODUCT.bind(x, weight, batch=0)


def _rounded(x: Float[Array, "... in"], y: Float[Array, "*b out in"], batch: int) -> Float[Array, "... out"]:
    """Σ x y over the last axes: [*b, *rows, in] and [*b, out, in], with `batch` axes b, give [*b, *rows, out]."""
    shared = tuple(range(batch))
    dimensions = (((x.ndim - 1,), (y.ndim - 1,)), (shared, shared))
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _shape(x: Any, y: Any, batch: int) -> Any:
    return x.update(shape=(*x.shape[:-1], y.shape[-2]), dtype=jnp.dtype("float32"), weak_type=False)


def _of_x(grad: Array, x: Any, y: Array, batch: int) -> Array:
    """The gradient of x, a product as well: of the output's and y, over `out`."""
    return PRODUCT.bind(grad, jnp.swapaxes(y, -1, -2), batch=batch).astype(x.aval.dtype)


def _of_y(grad: Array, x: Array, y: Any, batch: int) -> Array:
    """The gradient of y: of the output's and x, over all rows."""
    rows = lambda a: jnp.swapaxes(a.reshape(*a.shape[:batch], -1, a.shape[-1]), -1, -2)  # noqa: E731
    return PRODUCT.bind(rows(grad), rows(x), batch=batch).astype(y.aval.dtype)


def _batched(args: tuple[Array, Array], axes: tuple[Any, Any], batch: int) -> tuple[Array, int]:
    """Another axis of x alone is one more of rows, so that a gradient of y is summed in its product and not after."""
    (x, y), (x_axis, y_axis) = args, axes
    if y_axis is None:
        return PRODUCT.bind(jnp.moveaxis(x, x_axis, batch), y, batch=batch), batch
    y = jnp.moveaxis(y, y_axis, 0)
    x = jnp.broadcast_to(x, (len(y), *x.shape)) if x_axis is None else jnp.moveaxis(x, x_axis, 0)
    return PRODUCT.bind(x, y, batch=batch + 1), 0


# A function with a gradient of its own (`jax.custom_vjp`) would give, under `vmap`, one gradient of y for every row.
PRODUCT = Primitive("rounded_product")
PRODUCT.def_impl(jax.jit(_rounded, static_argnames="batch"))
PRODUCT.def_abstract_eval(_shape)
mlir.register_lowering(PRODUCT, mlir.lower_fun(_rounded, multiple_results=False))
ad.defbilinear(PRODUCT, _of_x, _of_y)
batching.primitive_batchers[PRODUCT] = _batched
