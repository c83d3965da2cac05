"""The rollout that PPO learns from: the last few steps of every copy, used once and overwritten."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from codream.envs import EnvSpec, TimeStep
from codream.replay import unwritten, written

__all__ = ["Rollout", "flat"]


class Rollout(eqx.Module):
    """Row t holds what was seen, done and paid at step t; `final` is what was seen after the last row.

    The observation after row t is that of row t + 1: an episode's last one has a row of its own, in which nobody
    acts, and the next episode starts in the row after it.
    """

    obs: Shaped[Array, "rows copies agents *shape"]
    mask: Bool[Array, "rows copies agents actions"] | None
    action: Int[Array, "rows copies agents"]
    reward: Float[Array, "rows copies agents"]
    terminal: Bool[Array, "rows copies agents"]
    acting: Bool[Array, "rows copies agents"]
    final: Shaped[Array, "copies agents *shape"]
    filled: Int[Array, ""]

    @staticmethod
    def empty(spec: EnvSpec, rows: int, copies: int) -> Rollout:
        return Rollout(
            **unwritten(spec, rows, copies),
            final=jnp.zeros((copies, spec.num_agents, *spec.obs_shape), spec.obs_dtype),
            filled=jnp.zeros((), jnp.int32),
        )

    @property
    def rows(self) -> int:
        return self.obs.shape[0]

    def add(self, here: TimeStep, action: Int[Array, "copies agents"], there: TimeStep) -> Rollout:
        """Write the step from `here` by `action` to `there` into the next row."""
        return Rollout(
            **written(self, self.filled, here, action, there),
            final=jnp.asarray(there.obs, self.final.dtype),
            filled=self.filled + 1,
        )

    @property
    def full(self) -> Bool[Array, ""]:
        return self.filled == self.rows

    def emptied(self) -> Rollout:
        """Ready for the next rows; what is there will be overwritten."""
        return eqx.tree_at(lambda r: r.filled, self, jnp.zeros_like(self.filled))

    @property
    def seen(self) -> Bool[Array, "rows copies agents"]:
        """Where an agent saw the observation of its row: it acts there, or its last action led there."""
        led_here = jnp.pad(self.acting[:-1], ((1, 0), (0, 0), (0, 0)))  # to the first row: not known any more
        return self.acting | led_here

    @property
    def every_obs(self) -> Shaped[Array, "rows_1 copies agents *shape"]:
        """The observations of all rows and the one after."""
        return jnp.concatenate([self.obs, self.final[None]])

    def allowed(self, spec: EnvSpec) -> Bool[Array, "rows copies agents actions"]:
        """Actions that could be taken."""
        exists = jnp.asarray(spec.action_valid)
        if self.mask is None:
            return jnp.broadcast_to(exists, (*self.action.shape, spec.max_actions))
        mask = self.mask & exists
        return jnp.where(mask.any(axis=-1, keepdims=True), mask, exists)


def flat(x: Shaped[Array, "rows copies *s"]) -> Shaped[Array, "n *s"]:
    """Rows and copies as one axis."""
    return jax.lax.collapse(x, 0, 2)
