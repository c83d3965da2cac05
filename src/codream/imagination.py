"""Imagination: from real contexts through the horizon, for all agents in one batch.

Every agent imagines alone; the others live in p̂ and in the dynamics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from codream.latents import sample_index
from codream.linear import Input
from codream.pieces import one_by_one
from codream.representation import Latent
from codream.world_model import Hidden, Sequence, WorldModel

__all__ = ["Dream", "Policy", "dream", "from_context"]

# (features [agents, starts, s], masks [agents, starts, actions]) → log-probabilities
Policy = Callable[[Input, Bool[Array, "agents starts actions"]], Float[Array, "agents starts actions"]]


class Dream(eqx.Module):
    """Imagined trajectories. Step t holds what the actor saw, what it did, and what followed."""

    features: Input  # s_0 … s_L: [agents, starts, horizon + 1, …], categorical latents as indices
    latent: Any
    mask: Bool[Array, "agents starts horizon actions"]
    action: Int[Array, "agents starts horizon"]
    reward: Float[Array, "agents starts horizon"]
    cont: Float[Array, "agents starts horizon"]


def from_context(model: WorldModel, context: Sequence, room: int, key: PRNGKeyArray) -> tuple[Latent, Hidden]:
    """The last observation's latent, and the memory of the real steps before it, ready for `room` more.

    Equal to acting through the context step by step (a parity test holds this).
    """
    code = model.representation
    keys = jax.random.split(key, len(context.obs))
    # The images of all contexts at once, taken apart for the convolutions, would not fit.
    z = one_by_one(lambda x: code.encode(*x), (context.obs, keys), model.spec.is_image)
    past, now = jax.tree.map(lambda x: x[:-1], z), jax.tree.map(lambda x: x[-1], z)
    segment, fresh = context.segment, context.first[-1]
    acts = context.acting[:-1, context.focal]
    hidden = model.prefill(past, context.action[:-1, context.focal], context.focal, segment[:-1], acts, room)
    # Without an action of this episode right before, there is no h.
    h = jnp.where(acts[-1], hidden.h, 0.0)
    return now, Hidden(h, hidden.dynamics, hidden.team).cleared(fresh)


def dream(
    model: WorldModel,
    policy: Policy,
    context: Sequence,
    horizon: int,
    keys: Key[Array, "agents starts"],
) -> Dream:
    """Imagine `horizon` steps from the last step of every context. `context` has axes [agents, starts].

    A trajectory's noise comes from its own key alone, so it is the same whichever others are imagined beside it.
    """
    agents, starts = context.first.shape[:2]
    merge = lambda x: x.reshape(agents * starts, *x.shape[2:])  # noqa: E731
    split = lambda tree: jax.tree.map(lambda x: x.reshape(agents, starts, *x.shape[1:]), tree)  # noqa: E731
    context = jax.tree.map(merge, context)
    focal = context.focal
    exists = jnp.asarray(model.spec.action_valid)[focal]
    start_keys, keys = jnp.moveaxis(jax.vmap(jax.random.split)(merge(keys)), 1, 0)
    axes = Hidden.axes(model)
    z, hidden = jax.vmap(from_context, in_axes=(None, 0, None, 0), out_axes=(0, axes))(
        model, context, horizon, start_keys
    )
    # The context's positions are the same for all, so the caches share them.
    features = jax.vmap(model.features, in_axes=(0, 0, axes), out_axes=(0, axes))
    imagine = jax.vmap(model.imagine, in_axes=(0, 0, 0, axes, 0), out_axes=(0, 0, 0, axes))

    def step(carry: tuple[Any, Array | None, Hidden], keys: Key[Array, "three batch"]) -> tuple[tuple, tuple]:
        z, mask, hidden = carry
        mask_keys, act_keys, model_keys = keys
        s, hidden = features(z, focal, hidden)
        log_probs = policy(split(s), split(exists if mask is None else mask))
        action = jax.vmap(sample_index)(act_keys, merge(log_probs))
        z_next, reward, cont, hidden = imagine(z, action, focal, hidden, model_keys)
        return (z_next, predicted_mask(z_next, mask_keys), remembered(hidden)), (kept(s), z, mask, action, reward, cont)

    def kept(s: Input) -> Input:
        """s as those read it who learn from it: the first thing that they do is to round it to their weights."""
        floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(model.mixer.weight.dtype) if floating(x) else x, s)

    def remembered(hidden: Hidden) -> Hidden:
        """With h likewise: what reads it are layers too."""
        return eqx.tree_at(lambda hidden: hidden.h, hidden, kept(hidden.h))

    def noise(key: PRNGKeyArray, time: Int[Array, ""]) -> Key[Array, " three"]:
        return jax.random.split(jax.random.fold_in(key, time), 3)

    def predicted_mask(z: Any, keys: Key[Array, " batch"]) -> Bool[Array, "batch actions"] | None:
        if model.mask is None:
            return None
        return usable(jax.vmap(jax.random.bernoulli)(keys, jax.nn.sigmoid(jax.vmap(model.mask)(z))) & exists)

    def usable(mask: Bool[Array, "batch actions"]) -> Bool[Array, "batch actions"]:
        """An agent always has an action."""
        return jnp.where(mask.any(axis=-1, keepdims=True), mask, exists)

    mask = None if model.mask is None else usable(context.mask[:, -1] & exists)
    every = jax.vmap(lambda time: jax.vmap(lambda key: noise(key, time), out_axes=1)(keys))(jnp.arange(horizon))
    (z, _, hidden), steps = jax.lax.scan(step, (z, mask, remembered(hidden)), every)
    s_last = kept(features(z, focal, hidden)[0])
    s, latent, masks, action, reward, cont = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), steps)
    if masks is None:
        masks = jnp.broadcast_to(exists[:, None], (len(exists), horizon, exists.shape[1]))
    ended = lambda x, last: jnp.concatenate([x, last[:, None]], axis=1)  # noqa: E731
    return Dream(
        features=split(jax.tree.map(ended, s, s_last)),
        latent=split(jax.tree.map(ended, latent, z)),
        mask=split(masks),
        action=split(action),
        reward=split(reward),
        cont=split(cont),
    )
