"""Numerical health: what is not finite is found where it appears, and measures that tell of trouble before.

Checks are computed with the updates and need no round trip to the host: each step's metrics say whether they are
finite, sums of metrics stop at the first step where one is not, and the count of steps stops with them (`STEPS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codream.envs import EnvSpec, TimeStep
from codream.metrics import Metrics, Sums

__all__ = ["STEPS", "TrainingDiverged", "checks", "dead_classes", "faults", "summed"]

STEPS = "steps taken"
"""Among metrics, but never logged: the environment steps that the sums cover, up to and with the first fault."""


class TrainingDiverged(RuntimeError):
    """A loss, an observation or another number became NaN or infinite; the message says which, and at which step."""


def checks(spec: EnvSpec, here: TimeStep, there: TimeStep) -> Metrics:
    """What the environment answered, as metrics that are never logged (their count is 0): 0, or NaN where it is not
    finite. And the number of steps taken, under `STEPS`."""
    taken = jnp.sum(~jnp.asarray(here.last)).astype(jnp.int32)
    none = jnp.zeros((), jnp.int32)
    found: Metrics = {STEPS: (taken.astype(jnp.float32), none)}
    acting = jnp.asarray(here.acting)
    bad = {"reward": acting & ~jnp.isfinite(there.reward)}
    if jnp.issubdtype(there.obs.dtype, jnp.floating):
        whole = jnp.all(jnp.isfinite(there.obs), axis=tuple(range(2, there.obs.ndim)))
        bad["observation"] = (acting | jnp.asarray(there.acting)) & ~whole
    for what, where in bad.items():
        for i, agent in enumerate(spec.agents):
            found[f"environment/{agent}/{what}"] = (jnp.where(jnp.any(where[:, i]), jnp.nan, 0.0), none)
    return found


def summed(metrics: Sums) -> Sums:
    """Metrics [steps] of consecutive steps as their sums, up to and with the first step that has a fault: later ones
    would only hide where it began."""
    fault = ~jnp.isfinite(metrics.numbers).all(axis=(1, 2))
    counts = jnp.cumsum(fault) - fault == 0
    return Sums(jnp.sum(jnp.where(counts[:, None, None], metrics.numbers, 0.0), axis=0), metrics.names)


def faults(totals: Mapping[str, tuple[Any, Any]]) -> str | None:
    """Which sums are not finite and what they are, origins only; None while all is well.

    What the environment spoils the world model learns from, and what that spoils the agents learn from.
    """
    bad = {name: float(total) for name, (total, _) in totals.items() if not np.isfinite(total)}
    for origin in ("environment/", "world_model/", "curiosity/", ""):
        names = [name for name in bad if name.startswith(origin)]
        if names:
            # A part of a loss says more than the loss, and that more than what follows from its gradient.
            parts = [name for name in names if not name.endswith(("/loss", "/grad_norm", "/update_ratio"))] or names
            return ", ".join(f"{name} became {bad[name]}" for name in parts)
    return None


def dead_classes(
    log_probs: Float[Array, "rows groups classes"],
    valid: Bool[Array, " rows"],
    total: Callable[[Any], Any] = lambda x: x,
) -> Float[Array, ""]:
    """Share of a latent's classes that are not the most probable one of their group in any valid row.

    `total`: the sum over all devices, where each has a share of the rows.
    """
    best: Int[Array, "rows groups"] = jnp.argmax(log_probs, axis=-1)
    chosen = jax.nn.one_hot(best, log_probs.shape[-1], dtype=bool) & valid[:, None, None]
    return 1.0 - jnp.mean(total(jnp.any(chosen, axis=0).astype(jnp.int32)) > 0)
