"""Who plays while experience is collected: the current policies, a random player, or an earlier self.

Two sides that train only against each other adapt to each other; a share of other opponents keeps them general. Both
shares are options (`PartnerConfig`).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from codream.actor_critic import Actor, log_policy
from codream.config import PartnerConfig

__all__ = ["CURRENT", "RANDOM", "Past", "draw_players", "past_log_probs", "snapshot"]

# Players by number; from 2 on they are snapshots.
CURRENT, RANDOM, FIRST_SNAPSHOT = 0, 1, 2


class Past(eqx.Module):
    """Earlier actors, stacked on a leading snapshot axis before the agents."""

    actors: Actor
    count: Int[Array, ""]  # snapshots ever taken

    @staticmethod
    def empty(actor: Actor, kept: int) -> Past:
        repeated = jax.tree.map(lambda x: jnp.repeat(x[None], kept, axis=0) if eqx.is_array(x) else x, actor)
        return Past(repeated, jnp.zeros((), jnp.int32))


def draw_players(
    past: Past | None,
    player: Int[Array, "copies agents"],
    first: Bool[Array, " copies"],
    sides: dict[str, tuple[int, ...]],
    partners: PartnerConfig,
    key: PRNGKeyArray,
) -> Int[Array, "copies agents"]:
    """Where an episode starts, draw who plays: each side by itself is, in a share of episodes, random or a past
    self."""
    if partners.random_share == 0 and partners.past_share == 0:
        return player
    side_of = np.zeros(player.shape[1], int)
    for k, agents in enumerate(sides.values()):
        side_of[list(agents)] = k
    kind_key, past_key = jax.random.split(key)
    shape = (player.shape[0], len(sides))
    kind = jax.random.uniform(kind_key, shape)
    plays = jnp.where(kind < partners.random_share, RANDOM, CURRENT)
    if past is not None:
        kept = jnp.minimum(past.count, partners.past_kept)
        chosen = (kind >= partners.random_share) & (kind < partners.random_share + partners.past_share)
        one = FIRST_SNAPSHOT + jax.random.randint(past_key, shape, 0, jnp.maximum(kept, 1))
        plays = jnp.where(chosen & (kept > 0), one, plays)
    drawn = plays[:, side_of]
    return jnp.where(first[:, None], drawn, player)


def past_log_probs(
    past: Past,
    player: Int[Array, "copies agents"],
    s: Float[Array, "agents copies s"],
    mask: Bool[Array, "agents copies actions"],
    current: Float[Array, "copies agents actions"],
) -> Float[Array, "copies agents actions"]:
    """Log-probabilities of the snapshot that plays, and `current` where none does."""
    every = eqx.filter_vmap(log_policy, in_axes=(0, None, None))(past.actors, s, mask)
    every = jnp.moveaxis(every, 2, 1)  # [kept, copies, agents, actions]
    index = jnp.clip(player - FIRST_SNAPSHOT, 0)[None, ..., None]
    return jnp.where((player >= FIRST_SNAPSHOT)[..., None], jnp.take_along_axis(every, index, axis=0)[0], current)


def snapshot(
    past: Past,
    actor: Actor,
    before: Int[Array, ""],
    steps: Int[Array, ""],
    trained: Bool[Array, ""],
    partners: PartnerConfig,
) -> Past:
    """Where a multiple of `past_every` steps has been reached since `before`, the current actors take the place of the
    oldest snapshot."""
    due = (steps // partners.past_every > before // partners.past_every) & trained
    slot = past.count % partners.past_kept
    actors = jax.tree.map(
        lambda old, new: jnp.where(due, old.at[slot].set(new), old) if eqx.is_array(old) else old,
        past.actors,
        actor,
    )
    return Past(actors, past.count + due)
