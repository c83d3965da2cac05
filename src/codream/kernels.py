"""Kernels for a GPU, in Pallas: of what XLA would pass through memory several times, every number is read once.

They take one example; `vmap` makes a program of each. What they are measured against is in docs/performance.md.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["draw", "recall", "suits"]

NUMBERS = 512
"""That a warp of threads works on at once: 16 in each thread."""


def suits(*sizes: int) -> bool:
    """Whether there is a GPU that the kernels are for, and all sizes are powers of two, as they need."""
    powers = all(size > 0 and size & (size - 1) == 0 for size in sizes)
    return powers and jax.default_backend() == "gpu" and _ampere(jax.devices()[0])


def _ampere(device: Any) -> bool:
    """Whether it is NVIDIA's and of 2020 or later: Triton makes programs for no older one."""
    capability = str(getattr(device, "compute_capability", ""))
    return capability.replace(".", "").isdigit() and float(capability) >= 8


def recall(
    q: Float[Array, "heads head"],
    k: Float[Array, "heads time head"],
    v: Float[Array, "heads time head"],
    allowed: Bool[Array, " time"],
    interpret: bool = False,
) -> Float[Array, "heads head"]:
    """softmax(q kᵀ / √head) v over the allowed tokens, in the precision of v, sums in float32."""

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, allowed_ref: Any, out_ref: Any) -> None:
        heads, size = q_ref.shape
        q = q_ref[...].astype(jnp.float32) / math.sqrt(size)
        # The softmax as it goes (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3).
        top, total, out = jnp.full(heads, -1e30), jnp.zeros(heads), jnp.zeros((heads, size))
        for t in range(k_ref.shape[1]):
            score = jnp.where(allowed_ref[t], jnp.sum(q * k_ref[:, t].astype(jnp.float32), axis=-1), -1e30)
            higher = jnp.maximum(top, score)
            kept, weight = jnp.exp(top - higher), jnp.exp(score - higher)
            total, top = total * kept + weight, higher
            out = out * kept[:, None] + weight[:, None] * v_ref[:, t].astype(jnp.float32)
        out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)

    return _called("recall", kernel, jax.ShapeDtypeStruct(q.shape, v.dtype), q.size, interpret, q, k, v, allowed)


def draw(
    logits: Float[Array, "groups classes"], u: Float[Array, " groups"], share: float = 0.0, interpret: bool = False
) -> Int[Array, " groups"]:
    """A class of each categorical by its number u from [0, 1): see `codream.latents.sample_index`."""

    def kernel(logits_ref: Any, u_ref: Any, out_ref: Any) -> None:
        logits = logits_ref[...].astype(jnp.float32)
        weights = jnp.exp(logits - jnp.max(logits, axis=-1)[:, None])
        if share:
            weights = (1 - share) * weights + share / logits.shape[1] * jnp.sum(weights, axis=-1)[:, None]
        total = jnp.cumsum(weights, axis=-1)
        end = jnp.max(total, axis=-1)[:, None]
        passed = (total <= u_ref[...][:, None] * end) & (total < end)
        out_ref[...] = jnp.sum(passed.astype(jnp.int32), axis=-1)

    return _called("draw", kernel, jax.ShapeDtypeStruct(u.shape, jnp.int32), logits.size, interpret, logits, u)


def _called(name: str, kernel: Any, out: jax.ShapeDtypeStruct, numbers: int, interpret: bool, *given: Array) -> Array:
    from jax.experimental import pallas  # here, as it is slow to import and not needed on a CPU
    from jax.experimental.pallas import triton

    settings = triton.CompilerParams(num_warps=max(1, min(8, numbers // NUMBERS)), num_stages=1)
    return pallas.pallas_call(kernel, out_shape=out, compiler_params=settings, interpret=interpret, name=name)(*given)
