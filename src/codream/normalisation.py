"""What comes between linear layers: the bias, an RMS norm and SiLU, on a GPU as one kernel, which reads a product once.

Norms are those of `equinox.nn.RMSNorm` (Zhang and Sennrich 2019, arXiv:1910.07467).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codream import kernels
from codream.linear import Linear

__all__ = ["activated", "normalised"]

Norm = eqx.nn.RMSNorm | eqx.nn.Identity


def normalised(
    norm: Norm,
    layer: Linear,
    product: Float[Array, " size"],
    x: Float[Array, " size"] | None = None,
    silu: bool = False,
) -> tuple[Float[Array, " size"], Float[Array, " size"]]:
    """(norm(x), x) after the layer's output, whose product is given, has been added to x, or without an x is x. With
    `silu` the first goes through SiLU as well, and the second is for nobody."""
    if layer.frozen and isinstance(norm, eqx.nn.RMSNorm) and kernels.suits(len(product)):
        assert norm.weight is not None
        return kernels.normed(product, layer.bias, norm.weight, x, norm.eps, silu)
    plus = _plus if x is None or jax.default_backend() == "cpu" else _plus_apart
    total: Any = plus(product, layer.bias)
    y: Any = total if x is None else x + total
    return (jax.nn.silu(norm(y)) if silu else norm(y)), y


def activated(norm: Norm, layer: Linear, product: Float[Array, "*b size"]) -> Float[Array, "*b size"]:
    """The first of `normalised` with SiLU, of a batch with any leading axes."""
    rows = product.reshape(-1, product.shape[-1])
    if isinstance(norm, eqx.nn.RMSNorm) and kernels.suits(rows.shape[1]) and kernels.fits(*rows.shape):
        assert norm.weight is not None
        y: Any = _at_once(rows, layer.bias, norm.weight, norm.eps)
    else:
        y = jax.vmap(lambda row: normalised(norm, layer, row, silu=True)[0])(rows)
    return y.reshape(product.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _at_once(product: Array, bias: Array, scale: Array, eps: float) -> Array:
    return jax.vmap(lambda row: kernels.normed(row, bias, scale, None, eps, True)[0])(product)


def _at_once_forward(product: Array, bias: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, ...]]:
    return _at_once(product, bias, scale, eps), (product, bias, scale)


def _at_once_backward(eps: float, given: tuple[Array, Array, Array], grad: Array) -> tuple[Array, ...]:
    return kernels.normed_gradient(*given, grad, eps)


_at_once.defvjp(_at_once_forward, _at_once_backward)


def _plus(product: Array, bias: Array) -> Array:
    return product.astype(bias.dtype) + bias


_plus_apart = jax.custom_vjp(_plus)
"""With a gradient that XLA does not sum over rows in the kernel that computes it for each, as it would do slowly."""


def _plus_apart_backward(like: Array, grad: Any) -> tuple[Array, Array]:
    return grad.astype(like.dtype), jax.lax.optimization_barrier(grad)


_plus_apart.defvjp(lambda product, bias: (_plus(product, bias), jnp.zeros((), product.dtype)), _plus_apart_backward)
