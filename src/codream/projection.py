"""Self-projection: what would become of us if everyone acted as I do?

From real steps, my policy is rolled out through the world model in the place of every agent, and what that earns,
`R = (1 − α) R_self + α R_mean`, improves my policy (a categorical imperative). Two ways to its gradient:
straight through the samples and the model (Jang et al. 2017, arXiv:1611.01144), or by the log-probabilities of the
imagined actions, weighted with their advantages (REINFORCE: Williams 1992; Sutton et al. 2000).
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
from codream.ppo import Learner, gae, normalised, observed

__all__ = ["Projection", "imagined_return", "model_without_gradient", "project", "projection_loss", "symmetry_ratio"]


class Projection(eqx.Module):
    """One imagined trajectory of T steps in which everyone acts as I do (or as `imagined_partners` says)."""

    reward: Float[Array, " T"]  # R, in reward scales
    cont: Float[Array, " T"]  # predicted probability that the game goes on after the step
    log_prob: Float[Array, " T"]  # of all actions of my policy that the model's rewards of mine have seen
    x: Float[Array, "T_1 *shape"]  # what I see before each step, and after the last

    @property
    def alive(self) -> Float[Array, " T"]:
        """Π_{k<t} c_k: the probability that the game still goes on before each step."""
        return jnp.concatenate([jnp.ones(1), jnp.cumprod(self.cont)[:-1]])


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
) -> tuple[Float[Array, "agents actions"], Float[Array, ""]]:
    """What every agent does, in the environment's order: samples, each with its own noise; or, where the world model
    expects them, probabilities of the others. And ln π of the samples of my policy that the model is told."""
    spec, settings, n = model.spec, config.projection, model.spec.num_agents
    own_key, other_key = jax.random.split(key)
    me = jax.nn.one_hot(focal, n)[:, None]
    sample = lambda key, log_probs: sample_onehot(key, log_probs, "gumbel", settings.temperature)  # noqa: E731
    if config.imagined_partners == "mirrored":
        log_probs = jnp.broadcast_to(jax.vmap(mine.log_probs)(x, mask), (n, spec.max_actions))
        actions = sample(own_key, log_probs)
        told = jnp.ones((n, 1))
        if settings.actions != "joint":
            actions, told = me * actions + (1 - me) * jnp.exp(log_probs), me
    else:
        log_probs = mine.log_probs(x[0], mask[0])[None]
        others = jnp.zeros((n, spec.max_actions))
        if model.team is not None and config.imagined_partners == "predicted":
            theirs = model.others(z[0], focal)
            answer = sample(other_key, theirs) if settings.actions == "joint" else jnp.exp(theirs)
            others = others.at[jnp.asarray(own_first(n))[focal, 1:]].set(answer)
        actions, told = me * sample(own_key, log_probs[0]) + (1 - me) * others, me
    if settings.gradient == "reinforce":
        actions = jax.lax.stop_gradient(actions)
    chosen = told * actions
    # A forbidden action has ln π = −∞ and is never chosen.
    return actions, jnp.sum(jnp.where(chosen > 0, chosen * log_probs, 0.0))


def project(
    mine: Learner,
    model: MarkovModel,
    obs: Shaped[Array, "agents *shape"],
    mask: Bool[Array, "agents actions"],
    focal: Int[Array, ""],
    alpha: Float[Array, ""],
    key: PRNGKeyArray,
    config: Config,
) -> Projection:
    """Imagine `projection.imagination_steps` steps from what all agents saw.

    `mine` is the policy of agent `focal`. With mirrored partners and `view=each` the latents of all agents are
    imagined, each by its own step of the model under the same joint action, and my copies see what the agents in
    whose place they act would see; else only my own latent is. Rewards and continuing are those my own latent
    predicts.
    """
    settings, n = config.projection, model.spec.num_agents
    each = config.imagined_partners == "mirrored" and settings.view == "each"
    views = jnp.arange(n) if each else focal[None]
    mine_at = focal if each else 0
    code = model.representation
    start_key, key = jax.random.split(key)
    z, _ = jax.vmap(code.posterior)(obs[views], jax.random.split(start_key, len(views)))
    order = jnp.asarray(own_first(n))[views]

    def step(carry: tuple[Array, ...], key: PRNGKeyArray) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        z, x, mask = carry
        act_key, model_key = jax.random.split(key)
        actions, log_prob = _actions(model, mine, z, x, mask, focal, config, act_key)
        h = jax.vmap(model.step)(z, actions[order], views)
        rewards = model.reward(h[mine_at])  # mine first
        reward = (1 - alpha) * rewards[0] + alpha * jnp.mean(rewards)
        cont = jax.nn.sigmoid(model.cont(h[mine_at])[0])
        z = jax.vmap(model.next)(h, z, jax.random.split(model_key, len(views)))
        there = (z, jax.vmap(code.decoder)(z), jax.vmap(model.allowed)(z, views))
        if settings.gradient == "reinforce":
            there = jax.lax.stop_gradient(there)  # what is imagined is data
        return there, (reward, cont, log_prob, x[mine_at])

    first = (z, observed(model.spec, obs[views]), mask[views])
    last, (reward, cont, log_prob, x) = jax.lax.scan(step, first, jax.random.split(key, settings.imagination_steps))
    return Projection(reward, cont, log_prob, jnp.concatenate([x, last[1][None, mine_at]]))


def imagined_return(trajectory: Projection, gamma: float) -> Float[Array, ""]:
    """Σ_t γ^t (Π_{k<t} c_k) R_t. There is no bootstrap at its end."""
    return jnp.sum(gamma ** jnp.arange(len(trajectory.reward)) * trajectory.alive * trajectory.reward)


def projection_loss(
    mine: Learner,
    trajectories: Projection,
    valid: Bool[Array, " n"],
    scale: Float[Array, ""],
    config: Config,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What self-projection adds to PPO's loss, and its metrics, over those of n trajectories that are `valid`.

    `straight_through`: −coef × the imagined return in units of the return scale (`scale` = rewards' / returns').
    `reinforce`: −coef · E[(Π c) Â ln π] + value_weight · ½ E[(Π c)(v̂ − target)²], where v̂ is the learner's critic of
    projected returns, with which advantages Â are estimated and bootstrapped as PPO's own are (γ, λ), and
    normalised over the batch as PPO's are: at `coef` 1 what everyone's doing so would earn counts as much as what
    I earn.
    """
    ppo, coef = config.ppo, config.projection.coef
    weight = valid / jnp.maximum(jnp.sum(valid), 1)
    imagined = scale * jnp.sum(weight * jax.vmap(imagined_return, in_axes=(0, None))(trajectories, ppo.gamma))
    metrics = {"imagined_return": imagined, "imagined_reward": jnp.sum(weight * jnp.mean(trajectories.reward, axis=1))}
    if config.projection.gradient == "straight_through":
        return -coef * imagined, metrics

    data = jax.lax.stop_gradient(trajectories)
    values = jax.vmap(jax.vmap(mine.projected_value))(data.x)
    v = jax.lax.stop_gradient(values)
    going = jnp.ones_like(data.cont, bool)
    advantage = jax.vmap(lambda r, v, ends, going: gae(r, v, ends, going, ppo.gamma, ppo.lam))(
        scale * data.reward, v, 1 - data.cont, going
    )
    weight = weight[:, None] * jax.vmap(lambda one: one.alive)(data)
    weight = weight / jnp.maximum(jnp.sum(weight), 1e-8)
    target = advantage + v[:, :-1]
    critic = 0.5 * jnp.sum(weight * (values[:, :-1] - target) ** 2)
    better = jnp.sum(weight * normalised(advantage, weight) * trajectories.log_prob)
    metrics |= {"projected_value": jnp.sum(weight * v[:, :-1]), "projected_critic_loss": critic}
    return ppo.value_weight * critic - coef * better, metrics


def model_without_gradient(model: MarkovModel) -> MarkovModel:
    """The same model; whatever is differentiated through it, its weights are constants."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, model)
