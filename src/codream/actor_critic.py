"""Actors and critics: heads, λ-returns, return scale, and both losses.

Sources: MATWM (arXiv:2506.18537) section 4.3; DreamerV3 (arXiv:2301.04104) for the percentile return scale and the
critic's regression to its own average.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from codream.config import AgentConfig
from codream.latents import two_hot_loss, two_hot_mean, value_bins
from codream.nets import MLP

__all__ = ["Actor", "Critic", "actor_loss", "critic_loss", "lambda_returns", "masked_log_probs", "return_range"]


def masked_log_probs(
    logits: Float[Array, "*b actions"], mask: Bool[Array, "*b actions"]
) -> Float[Array, "*b actions"]:
    """Log-probabilities over the allowed actions; the others get probability 0."""
    return jax.nn.log_softmax(jnp.where(mask, logits, -1e9))


class Actor(eqx.Module):
    """π(a|s) of one agent."""

    net: MLP

    def __init__(self, features: int, actions: int, config: AgentConfig, key: PRNGKeyArray, norm_first: bool):
        # Near-uniform at first, so that early data are as varied as random play.
        self.net = MLP(features, actions, config.units, config.layers, key, 0.01, norm_first)

    def __call__(self, s: Float[Array, " s"], mask: Bool[Array, " actions"]) -> Float[Array, " actions"]:
        """Log-probabilities."""
        return masked_log_probs(self.net(s), mask)


class Critic(eqx.Module):
    """v(s) of one agent, as a two-hot distribution. Semi-centralised: it sees the others only as p̂ within s."""

    net: MLP
    bins: int = eqx.field(static=True)

    def __init__(self, features: int, config: AgentConfig, key: PRNGKeyArray, norm_first: bool):
        self.net = MLP(features, config.value_bins, config.units, config.layers, key, 0.0, norm_first)
        self.bins = config.value_bins

    @property
    def places(self) -> Float[np.ndarray, " bins"]:
        return value_bins(self.bins)

    def __call__(self, s: Float[Array, " s"]) -> Float[Array, " bins"]:
        return self.net(s)

    def value(self, s: Float[Array, " s"]) -> Float[Array, ""]:
        return two_hot_mean(self(s), self.places)


def lambda_returns(
    reward_t: Float[Array, " horizon"],
    cont_t: Float[Array, " horizon"],
    value_tp1: Float[Array, " horizon"],
    gamma: float,
    lam: float,
) -> Float[Array, " horizon"]:
    """G_t = r_t + γ c_t [(1 − λ) v_{t+1} + λ G_{t+1}], with G_L = v_L (SPEC: imagination and agents)."""

    def back(g_tp1: Float[Array, ""], step: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, cont, value = step
        g_t = reward + gamma * cont * ((1 - lam) * value + lam * g_tp1)
        return g_t, g_t

    _, returns = jax.lax.scan(back, value_tp1[-1], (reward_t, cont_t, value_tp1), reverse=True)
    return returns


def return_range(returns: Float[Array, "..."], low: float = 5.0, high: float = 95.0) -> Float[Array, ""]:
    """S: the 95th minus the 5th percentile."""
    places = jnp.percentile(returns, jnp.array([low, high]))
    return places[1] - places[0]


def actor_loss(
    log_probs: Float[Array, "*b actions"],
    action: Int[Array, "*b"],
    advantage: Float[Array, "*b"],
    weight: Float[Array, "*b"],
    entropy_weight: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean of −sg(A_t) ln π(a_t|s_t) − η H[π], and the mean entropy. `weight` is the probability that the
    trajectory still goes on."""
    chosen = jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * jnp.maximum(log_probs, -1e6), axis=-1)
    loss = -jax.lax.stop_gradient(advantage) * chosen - entropy_weight * entropy
    return jnp.mean(weight * loss), jnp.mean(entropy)


def critic_loss(
    logits: Float[Array, "*b bins"],
    returns: Float[Array, "*b"],
    slow_values: Float[Array, "*b"],
    weight: Float[Array, "*b"],
    bins: Float[np.ndarray, " bins"],
    slow_weight: float,
) -> Float[Array, ""]:
    """Two-hot regression to sg(G) and, weighted, to the averaged critic's own prediction."""
    sg = jax.lax.stop_gradient
    loss = two_hot_loss(logits, sg(returns), bins) + slow_weight * two_hot_loss(logits, sg(slow_values), bins)
    return jnp.mean(weight * loss)
