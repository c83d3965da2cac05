"""Running mean and variance, for scaling observations, rewards and errors."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["Moments"]


class Moments(eqx.Module):
    """Mean and variance of everything seen so far, entry by entry (Chan et al. 1979, the parallel update)."""

    mean: Float[Array, "*s"]
    variance: Float[Array, "*s"]
    count: Float[Array, "*s"]

    @staticmethod
    def empty(shape: tuple[int, ...]) -> Moments:
        return Moments(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape))

    @property
    def scale(self) -> Float[Array, "*s"]:
        """The standard deviation; 1 where nothing has varied yet, but for the rounding of sums."""
        std = jnp.sqrt(self.variance)
        return jnp.where(std > 1e-6 * jnp.maximum(1.0, jnp.abs(self.mean)), std, 1.0)

    def seen(self, x: Float[Array, "n *s"], where: Bool[Array, "n *s"]) -> Moments:
        """After the rows of `x`, without the entries at which `where` is false."""
        count = jnp.sum(where, axis=0).astype(jnp.float32)
        safe = jnp.maximum(count, 1.0)
        mean = jnp.sum(jnp.where(where, x, 0.0), axis=0) / safe
        variance = jnp.sum(jnp.where(where, (x - mean) ** 2, 0.0), axis=0) / safe
        total = jnp.maximum(self.count + count, 1.0)
        apart = mean - self.mean
        share = count / total
        return Moments(
            self.mean + share * apart,
            (1 - share) * self.variance + share * variance + share * (1 - share) * apart**2,
            self.count + count,
        )
