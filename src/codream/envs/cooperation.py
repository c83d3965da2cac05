"""How often agents cooperate, where an environment defines it: counted from the states of JaxMARL's social dilemmas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["cooperation_counter"]

# (state before, state after) → per agent: cooperative choices made in between, and all choices
Counter = Callable[[Any, Any], Float[Array, "agents 2"]]


def _coin_game(before: Any, after: Any) -> Array:
    """Coins taken that are one's own, of all that were taken."""
    names = (("red_coop", "red_defect"), ("blue_coop", "blue_defect"))
    # Their int8 counters wrap around; so does a difference of them.
    taken = [[jnp.sum(getattr(after, name) - getattr(before, name)) for name in agent] for agent in names]
    counts = jnp.asarray(taken, jnp.float32)
    return jnp.stack([counts[:, 0], counts[:, 0] + counts[:, 1]], axis=1)


def _in_the_matrix(before: Any, after: Any) -> Array:
    """Resources picked up that stand for cooperation, the first of the two kinds, of all that were picked up."""

    def held(state: Any) -> Array:
        if hasattr(state, "agent_inventories"):
            return jnp.asarray(state.agent_inventories, jnp.float32)
        return jnp.stack([state.red_inventory, state.blue_inventory]).astype(jnp.float32)

    # After an interaction all resources are taken away again.
    gained = jnp.maximum(held(after) - held(before), 0.0)
    return jnp.stack([gained[:, 0], gained[:, 0] + gained[:, 1]], axis=1)


def cooperation_counter(env: Any) -> Counter | None:
    """The counter of cooperative choices for an environment of `codream.envs`; None where none is defined.

    coin_game: the share of coins taken that are one's own. storm (in the matrix): the share of resources picked up
    that are of the cooperative kind. Nothing is counted in a step that resets.
    """
    count = {"coin_game": _coin_game, "storm": _in_the_matrix}.get(getattr(env, "_family", ""))
    if count is None:
        return None
    return lambda before, after: jnp.where(before.last, 0.0, count(before.inner, after.inner))
