"""Independent PPO: one actor and critic for each agent, stacked on an agent axis; advantages and losses.

Sources: Schulman et al. 2017 (PPO, arXiv:1707.06347) equation 7; Schulman et al. 2016 (GAE, arXiv:1506.02438).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from codream.actor_critic import masked_log_probs
from codream.config import PPOConfig
from codream.envs import EnvSpec
from codream.latents import symlog
from codream.nets import CNN, MLP
from codream.optimisers import adam

__all__ = [
    "Batch",
    "Learner",
    "clipped_loss",
    "gae",
    "init_learners",
    "normalised",
    "observed",
    "ppo_loss",
    "ppo_optimiser",
]


def observed(spec: EnvSpec, obs: Shaped[Array, "*b_shape"]) -> Float[Array, "*b_shape"]:
    """Observations as networks see them: images within ±½, vectors after symlog."""
    return obs.astype(jnp.float32) / 255.0 - 0.5 if spec.is_image else symlog(obs)


class Learner(eqx.Module):
    """π(a|o) and v(o) of one agent; images pass a common encoder first. Takes what `observed` gives."""

    encoder: CNN | None
    actor: MLP
    critic: MLP
    projected: MLP | None  # critic of self-projection, whose reward and partners are others

    def __init__(self, spec: EnvSpec, config: PPOConfig, key: PRNGKeyArray, projects: bool = False):
        encoder_key, actor_key, critic_key = jax.random.split(key, 3)
        self.encoder, size = None, spec.obs_size
        if spec.is_image:
            height, width, channels = spec.obs_shape
            self.encoder = CNN((height, width, channels), config.image_depth, encoder_key)
            size = self.encoder.out_size
        # Near-uniform at first.
        self.actor = MLP(size, spec.max_actions, config.units, config.layers, actor_key, 1e-4)
        self.critic = MLP(size, 1, config.units, config.layers, critic_key)
        projected_key = jax.random.fold_in(critic_key, 1)
        self.projected = MLP(size, 1, config.units, config.layers, projected_key) if projects else None

    def _encoded(self, x: Float[Array, "*shape"]) -> Float[Array, " features"]:
        return x if self.encoder is None else self.encoder(x)

    def log_probs(self, x: Float[Array, "*shape"], mask: Bool[Array, " actions"]) -> Float[Array, " actions"]:
        return masked_log_probs(self.actor(self._encoded(x)), mask)

    def value(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        """In units of the agent's return scale."""
        return self.critic(self._encoded(x))[0]

    def projected_value(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        """What R = (1 − α) R_self + α R_mean adds up to if everyone acts as I do, in units of the return scale."""
        assert self.projected is not None
        return self.projected(self._encoded(x))[0]


def init_learners(spec: EnvSpec, config: PPOConfig, key: PRNGKeyArray, projects: bool) -> tuple[Learner, Any]:
    """Fresh learners and optimisers, stacked on an agent axis; with critics of projected returns if `projects`."""
    keys = jax.random.split(key, spec.num_agents)
    learners = eqx.filter_vmap(lambda k: Learner(spec, config, k, projects))(keys)
    return learners, jax.vmap(ppo_optimiser(config).init)(eqx.filter(learners, eqx.is_array))


def ppo_optimiser(config: PPOConfig) -> optax.GradientTransformation:
    """For one agent; mapped over agents, so that clipping one does not scale the others."""
    return adam(config.lr, config.clip, eps=1e-5)


def gae(
    reward_t: Float[Array, " time"],
    value_t: Float[Array, " time_1"],
    terminal_t: Bool[Array, " time"] | Float[Array, " time"],
    acting_t: Bool[Array, " time"],
    gamma: float,
    lam: float,
) -> Float[Array, " time"]:
    """Â_t = δ_t + γ λ c_t Â_{t+1}, with δ_t = r_t + γ c_t v_{t+1} − v_t and c_t = 0 only at a true terminal, or the
    probability that it is none.

    Â is 0 where the agent does not act. An episode's last observation is such a row, so the sum ends there, while
    δ of the step before has bootstrapped from the value of that observation: a time limit is not a terminal.
    `value_t` has one entry more, the value after the last step.
    """

    def back(ahead: Array, step: tuple[Array, ...]) -> tuple[Array, Array]:
        reward, value, value_next, terminal, acting = step
        cont = 1.0 - terminal
        delta = reward + gamma * cont * value_next - value
        advantage = jnp.where(acting, delta + gamma * lam * cont * ahead, 0.0)
        return advantage, advantage

    steps = (reward_t, value_t[:-1], value_t[1:], terminal_t, acting_t)
    _, advantages = jax.lax.scan(back, jnp.zeros(()), steps, reverse=True)
    return advantages


class Batch(eqx.Module):
    """Steps of one agent (or of several, with an axis after the first). `log_prob` and `advantage` are as the policy
    was when it acted."""

    x: Float[Array, "n *a_shape"]
    mask: Bool[Array, "n *a actions"]
    action: Int[Array, "n *a"]
    acting: Bool[Array, "n *a"]
    log_prob: Float[Array, "n *a"]
    advantage: Float[Array, "n *a"]
    target: Float[Array, "n *a"]  # of the value: Â + v


def normalised(advantage: Float[Array, "*n"], weight: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """With mean 0 and deviation 1 under `weight`, which sums to 1."""
    centred = advantage - jnp.sum(weight * advantage)
    return centred / (jnp.sqrt(jnp.sum(weight * centred**2)) + 1e-8)


def clipped_loss(
    log_ratio: Float[Array, "*n"], advantage: Float[Array, "*#n"], weight: Float[Array, "*#n"], config: PPOConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """−Σ weight · min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â), ρ = exp(log_ratio); and its KL divergence and clipped share."""
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - config.clip_ratio, 1 + config.clip_ratio)
    loss = -jnp.sum(weight * jnp.minimum(ratio * advantage, clipped * advantage))
    return loss, {
        "kl": jnp.sum(weight * (ratio - 1 - log_ratio)),
        "clipped": jnp.sum(weight * (jnp.abs(ratio - 1) > config.clip_ratio)),
    }


def ppo_loss(learner: Learner, batch: Batch, config: PPOConfig) -> tuple[Float[Array, ""], dict[str, Array]]:
    """−E[min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â)] + value_weight · ½ E[(v − target)²] − entropy · E[H], over acting steps.

    Advantages are normalised over the batch. Returns the loss and its parts.
    """
    weight = batch.acting / jnp.maximum(jnp.sum(batch.acting), 1)
    mean = lambda x: jnp.sum(weight * x)  # noqa: E731
    advantage = normalised(batch.advantage, weight)

    log_probs = jax.vmap(learner.log_probs)(batch.x, batch.mask)
    chosen = jnp.take_along_axis(log_probs, batch.action[:, None], axis=-1)[:, 0]
    # Where the agent did not act, the stored action may be forbidden and its ratio infinite.
    log_ratio = jnp.where(batch.acting, chosen - batch.log_prob, 0.0)
    policy, metrics = clipped_loss(log_ratio, advantage, weight, config)
    values = jax.vmap(learner.value)(batch.x)
    critic = 0.5 * mean((values - batch.target) ** 2)
    entropy = mean(-jnp.sum(jnp.exp(log_probs) * jnp.maximum(log_probs, -1e6), axis=-1))
    loss = policy + config.value_weight * critic - config.entropy * entropy
    return loss, {
        "actor_loss": policy,
        "critic_loss": critic,
        "entropy": entropy,
        "value": mean(values),
        **metrics,
    }
