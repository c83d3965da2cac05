"""Self-projection: what would become of us if everyone acted as I do?

From real steps, my policy is rolled out through the world model in the place of every agent, and the discounted sum
of `R = (1 − α) R_self + α R_mean` is differentiated through the model into my policy (a categorical imperative).
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from codream.config import Config
from codream.latents import sample_onehot
from codream.markov_model import MarkovModel, own_first
from codream.ppo import Learner, observed

__all__ = ["imagined_return", "model_without_gradient", "symmetry_ratio"]


def symmetry_ratio(steps: Int[Array, ""], config: Config) -> Float[Array, ""]:
    """α after `steps` environment steps: `constant`, or from `symmetry` to `symmetry_end` over `total_steps`, by a
    straight line or by half a cosine."""
    projection = config.projection
    start, end = projection.symmetry, projection.symmetry_end
    done = jnp.clip(steps / config.total_steps, 0.0, 1.0)
    if projection.schedule == "constant":
        return jnp.full((), start)
    if projection.schedule == "cosine":
        done = 0.5 * (1 - jnp.cos(math.pi * done))
    return start + (end - start) * done


def _actions(
    model: MarkovModel,
    mine: Learner,
    z: Float[Array, "views z"],
    x: Float[Array, "views *shape"],
    mask: Bool[Array, "views actions"],
    focal: Int[Array, ""],
    config: Config,
    key: PRNGKeyArray,
) -> Float[Array, "agents actions"]:
    """What every agent does, in the environment's order: samples with a straight-through gradient, each with its own
    noise; or, where the world model expects them, probabilities of the others."""
    spec, settings, n = model.spec, config.projection, model.spec.num_agents
    own_key, other_key = jax.random.split(key)
    me = jax.nn.one_hot(focal, n)[:, None]
    if config.imagined_partners == "mirrored":
        log_probs = jnp.broadcast_to(jax.vmap(mine.log_probs)(x, mask), (n, spec.max_actions))
        sampled = sample_onehot(own_key, log_probs, "gumbel", settings.temperature)
        others = sampled if settings.actions == "joint" else jnp.exp(log_probs)
        return me * sampled + (1 - me) * others
    own = sample_onehot(own_key, mine.log_probs(x[0], mask[0]), "gumbel", settings.temperature)
    others = jnp.zeros((n, spec.max_actions))
    if model.team is not None and config.imagined_partners == "predicted":
        log_probs = model.others(z[0], focal)
        answer = jnp.exp(log_probs)
        if settings.actions == "joint":
            answer = sample_onehot(other_key, log_probs, "gumbel", settings.temperature)
        others = others.at[jnp.asarray(own_first(n))[focal, 1:]].set(answer)
    return me * own + (1 - me) * others


def imagined_return(
    mine: Learner,
    model: MarkovModel,
    obs: Shaped[Array, "agents *shape"],
    mask: Bool[Array, "agents actions"],
    focal: Int[Array, ""],
    alpha: Float[Array, ""],
    key: PRNGKeyArray,
    config: Config,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Σ_t γ^t (Π c) [(1 − α) R_self + α R_mean] of one imagined trajectory, and the mean of R, in reward scales.

    `mine` is the policy of agent `focal`. With mirrored partners and `view=each` the latents of all agents are
    imagined, each by its own step of the model under the same joint action, and my copies see what the agents in
    whose place they act would see; else only my own latent is. Rewards and continuing are those my own latent
    predicts. There is no bootstrap at the end, since no critic knows the others' rewards.
    """
    settings, n = config.projection, model.spec.num_agents
    each = config.imagined_partners == "mirrored" and settings.view == "each"
    views = jnp.arange(n) if each else focal[None]
    mine_at = focal if each else 0
    code = model.representation
    start_key, key = jax.random.split(key)
    z, _ = jax.vmap(code.posterior)(obs[views], jax.random.split(start_key, len(views)))
    order = jnp.asarray(own_first(n))[views]

    def step(carry: tuple[Array, ...], key: PRNGKeyArray) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        z, x, mask, weight = carry
        act_key, model_key = jax.random.split(key)
        actions = _actions(model, mine, z, x, mask, focal, config, act_key)
        h = jax.vmap(model.step)(z, actions[order], views)
        rewards = model.reward(h[mine_at])  # mine first
        reward = (1 - alpha) * rewards[0] + alpha * jnp.mean(rewards)
        paid = weight * reward
        weight = weight * config.ppo.gamma * jax.nn.sigmoid(model.cont(h[mine_at])[0])
        z = jax.vmap(model.next)(h, z, jax.random.split(model_key, len(views)))
        return (z, jax.vmap(code.decoder)(z), jax.vmap(model.allowed)(z, views), weight), (paid, reward)

    first = (z, observed(model.spec, obs[views]), mask[views], jnp.ones(()))
    _, (paid, reward) = jax.lax.scan(step, first, jax.random.split(key, settings.imagination_steps))
    return jnp.sum(paid), jnp.mean(reward)


def model_without_gradient(model: MarkovModel) -> MarkovModel:
    """The same model; whatever is differentiated through it, its weights are constants."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, model)
