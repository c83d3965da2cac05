"""Symlog, two-hot distributions over values, and categorical latents.

Sources: Hafner et al. 2023 (DreamerV3, arXiv:2301.04104) for symlog, two-hot and the uniform mixture; Jang et al.
2017 (arXiv:1611.01144) for the hard Gumbel-softmax.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from codream import kernels

__all__ = [
    "Bins",
    "change_bins",
    "cross_entropy",
    "kl",
    "log_softmax",
    "sample_index",
    "sample_onehot",
    "symexp",
    "symlog",
    "two_hot",
    "two_hot_loss",
    "two_hot_mean",
    "unimix",
    "value_bins",
]

FEW = 16  # columns, up to which a running sum is no product on an accelerator


Bins = Float[Array | np.ndarray, " bins"]


def symlog(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """sign(x) ln(1 + |x|)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """sign(x) (e^|x| − 1), the inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def value_bins(bins: int, limit: float = 15.0) -> Float[np.ndarray, " bins"]:
    """Bins for rewards and values: even in symlog space from −limit to limit, given in the values' own units.

    Averaging in the values' own units keeps the mean of a two-hot distribution unbiased, which matters for
    rare large rewards. An odd count puts one bin at exactly 0.
    """
    grid = np.linspace(-limit, limit, bins)
    return (np.sign(grid) * np.expm1(np.abs(grid))).astype(np.float32)


def change_bins(bins: int, reach: float) -> Float[np.ndarray, " bins"]:
    """Bins for the change of an entry from −reach to reach: evenly spaced under asinh, so finest around 0."""
    scale = 0.05
    grid = np.linspace(-1, 1, bins) * np.arcsinh(reach / scale)
    return (np.sinh(grid) * scale).astype(np.float32)


def two_hot(x: Float[Array, "*s"], bins: Bins) -> Float[Array, "*s bins"]:
    """The distribution on the two bins around x whose mean is x (clipped to the outermost bins)."""
    x = jnp.clip(x, bins[0], bins[-1])[..., None]
    apart = bins[1:] - bins[:-1]
    left, right = 1 / jnp.append(apart[0], apart), 1 / jnp.append(apart, apart[-1])
    # A hat on every bin, so that nothing has to be searched for and looked up.
    return jnp.maximum(1 + jnp.minimum((x - bins) * left, (bins - x) * right), 0.0)


def two_hot_loss(logits: Float[Array, "*s bins"], x: Float[Array, "*s"], bins: Bins) -> Float[Array, "*s"]:
    """Cross-entropy −Σ two_hot(x) ln softmax(logits)."""
    return cross_entropy(two_hot(x, bins), logits)


def cross_entropy(target: Float[Array, "*s classes"], logits: Float[Array, "*s classes"]) -> Float[Array, "*s"]:
    """−Σ target ln softmax(logits)."""
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def two_hot_mean(logits: Float[Array, "*s bins"], bins: Bins) -> Float[Array, "*s"]:
    """Σ softmax(logits) · bins, for bins that are symmetric about 0.

    Of opposite bins the probabilities are subtracted before anything is multiplied: a symmetric distribution, such as
    that of a new network, has mean exactly 0 on every device, also where products and sums are fused.
    """
    probs, middle = jax.nn.softmax(logits), len(bins) // 2
    reach = (bins[-middle:] - bins[:middle][::-1]) / 2
    return jnp.sum((probs[..., -middle:] - probs[..., :middle][..., ::-1]) * reach, axis=-1)


def unimix(logits: Float[Array, "*s classes"], share: float) -> Float[Array, "*s classes"]:
    """Log-probabilities of (1 − share) softmax(logits) + share / classes."""
    if share == 0:
        return jax.nn.log_softmax(logits)
    return jnp.log((1 - share) * jax.nn.softmax(logits) + share / logits.shape[-1])


def log_softmax(logits: Float[Array, "*s classes"]) -> Float[Array, "*s classes"]:
    """`jax.nn.log_softmax`; on an accelerator of few classes entry by entry, as part of what reads it: else it is a
    kernel by itself."""
    if jax.default_backend() == "cpu" or logits.shape[-1] > FEW:
        return jax.nn.log_softmax(logits)
    each = jnp.split(logits, logits.shape[-1], axis=-1)
    top = jax.lax.stop_gradient(reduce(jnp.maximum, each))
    return logits - top - jnp.log(reduce(jnp.add, [jnp.exp(x - top) for x in each]))


def sample_index(
    key: PRNGKeyArray,
    logits: Float[Array, "*s classes"],
    share: float = 0.0,
    bias: Float[Array, "*s classes"] | None = None,
    dtype: Any = jnp.int32,
) -> Integer[Array, "*s"]:
    """A sample of each categorical, with a `share` of the uniform one mixed in as in `unimix`. `bias`: still to be
    added to the logits.

    By inverting its running sum: one random number each, not one a class, and no division or logarithm."""
    u, n = jax.random.uniform(key, logits.shape[:-1]), logits.shape[-1]
    if logits.ndim == 2 and kernels.suits(*logits.shape):
        bias = jnp.zeros(logits.shape) if bias is None else bias
        return kernels.draw(jax.lax.stop_gradient(logits), bias, u, share, dtype)
    logits = logits if bias is None else logits.astype(bias.dtype) + bias
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    if share:
        weights = (1 - share) * weights + share / n * jnp.sum(weights, axis=-1, keepdims=True)
    total = _running_sum(weights)
    # The second condition: an impossible class after the last possible one is not drawn, however u is rounded.
    passed = (total <= u[..., None] * total[..., -1:]) & (total < total[..., -1:])
    return jnp.sum(passed, axis=-1).astype(dtype)


def _running_sum(x: Float[Array, "*s n"]) -> Float[Array, "*s n"]:
    """Along the last axis; as a product, which is faster than a scan. Elsewhere than on a CPU products are rounded to
    fewer bits by default, and one of a few columns is a kernel by itself."""
    n = x.shape[-1]
    upto = np.triu(np.ones((n, n), bool))
    if jax.default_backend() == "cpu":
        return x @ upto.astype(x.dtype)
    if n <= FEW:
        return jnp.sum(jnp.where(upto, x[..., :, None], 0.0), axis=-2)
    return jnp.matmul(x, upto.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)


def sample_onehot(
    key: PRNGKeyArray,
    log_probs: Float[Array, "*s classes"],
    gradient: str = "straight_through",
    temperature: float = 1.0,
) -> Float[Array, "*s classes"]:
    """A one-hot sample whose gradient is that of the probabilities (`straight_through`), or of the
    Gumbel-softmax at `temperature` with the sample's own noise (`gumbel`)."""
    if gradient == "straight_through":
        index, soft = sample_index(key, jax.lax.stop_gradient(log_probs)), jnp.exp(log_probs)
    else:
        noisy = log_probs + jax.random.gumbel(key, log_probs.shape)
        index, soft = jnp.argmax(noisy, axis=-1), jax.nn.softmax(noisy / temperature)
    hard = jax.nn.one_hot(index, log_probs.shape[-1])
    return hard + soft - jax.lax.stop_gradient(soft)


def kl(p: Float[Array, "groups classes"], q: Float[Array, "groups classes"]) -> Float[Array, ""]:
    """KL[p ‖ q] of independent categoricals given as log-probabilities, summed over groups."""
    return jnp.sum(jnp.exp(p) * (p - q))
