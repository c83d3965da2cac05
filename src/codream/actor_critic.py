"""Actors and critics: heads, λ-returns, return scale, both losses, and the update on imagined trajectories.

Sources: MATWM (arXiv:2506.18537) section 4.3; DreamerV3 (arXiv:2301.04104) for the percentile return scale and the
critic's regression to its own average.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from codream.config import AgentConfig
from codream.imagination import Dream
from codream.latents import cross_entropy, two_hot, two_hot_mean, value_bins
from codream.linear import Input, lowered
from codream.mesh import gathered, on_shares, total
from codream.nets import MLP
from codream.optimisers import adam, applied, norm
from codream.pieces import each_agent, pieces, summed, unrolled

__all__ = [
    "Actor",
    "Agents",
    "Critic",
    "actor_loss",
    "agent_optimiser",
    "critic_loss",
    "improve",
    "init_agents",
    "lambda_returns",
    "log_policy",
    "masked_log_probs",
    "return_range",
]


ROWS = 2048
"""Imagined steps of which an actor or a critic learns at once on a CPU: what they leave for the gradient stays in its
cache."""


def masked_log_probs(logits: Float[Array, "*b actions"], mask: Bool[Array, "*b actions"]) -> Float[Array, "*b actions"]:
    """Log-probabilities over the allowed actions; the others get probability 0."""
    return jax.nn.log_softmax(jnp.where(mask, logits, -1e9))


class Actor(eqx.Module):
    """π(a|s) of one agent."""

    net: MLP

    def __init__(self, features: int, actions: int, config: AgentConfig, key: PRNGKeyArray, norm_first: bool = True):
        # Near-uniform at first, so that early data are as varied as random play.
        self.net = MLP(features, actions, config.units, config.layers, key, 0.01, norm_first)

    def __call__(self, s: Input, mask: Bool[Array, "*b actions"]) -> Float[Array, "*b actions"]:
        """Log-probabilities, of one s or a batch."""
        return masked_log_probs(self.net.rows(s), mask)


class Critic(eqx.Module):
    """v(s) of one agent, as a two-hot distribution. Semi-centralised: it sees the others only as p̂ within s."""

    net: MLP
    bins: int = eqx.field(static=True)

    def __init__(self, features: int, config: AgentConfig, key: PRNGKeyArray, norm_first: bool = True):
        self.net = MLP(features, config.value_bins, config.units, config.layers, key, 0.0, norm_first)
        self.bins = config.value_bins

    @property
    def places(self) -> Float[np.ndarray, " bins"]:
        return value_bins(self.bins)

    def __call__(self, s: Input) -> Float[Array, "*b bins"]:
        """Logits, of one s or a batch."""
        return self.net.rows(s)

    def value(self, s: Input) -> Float[Array, "*b"]:
        return two_hot_mean(self(s), self.places)


def lambda_returns(
    reward_t: Float[Array, " horizon"],
    cont_t: Float[Array, " horizon"],
    value_tp1: Float[Array, " horizon"],
    gamma: float,
    lam: float,
) -> Float[Array, " horizon"]:
    """G_t = r_t + γ c_t [(1 − λ) v_{t+1} + λ G_{t+1}], with G_L = v_L."""

    def back(g_tp1: Float[Array, ""], step: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, cont, value = step
        g_t = reward + gamma * cont * ((1 - lam) * value + lam * g_tp1)
        return g_t, g_t

    steps, turns = (reward_t, cont_t, value_tp1), unrolled(len(reward_t))
    _, returns = jax.lax.scan(back, value_tp1[-1], steps, reverse=True, unroll=turns)
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
    target = two_hot(sg(returns), bins) + slow_weight * two_hot(sg(slow_values), bins)
    return jnp.mean(weight * cross_entropy(target, logits))


class Agents(eqx.Module):
    """Actors, critics and their training state, stacked on a leading agent axis."""

    actor: Actor
    critic: Critic
    slow_critic: Critic
    optimiser: Any
    return_scale: Float[Array, " agents"]


def agent_optimiser(config: AgentConfig) -> optax.GradientTransformation:
    """For one agent; mapped over agents, so that clipping one does not scale the others."""
    return adam(config.lr, config.clip, eps=1e-5)


def init_agents(
    agents: int, features: int, actions: int, config: AgentConfig, key: PRNGKeyArray, norm_first: bool
) -> Agents:
    """Fresh actors and critics for s of length `features`."""

    def one_agent(key: PRNGKeyArray) -> tuple[Actor, Critic]:
        actor_key, critic_key = jax.random.split(key)
        return (
            Actor(features, actions, config, actor_key, norm_first),
            Critic(features, config, critic_key, norm_first),
        )

    actor, critic = eqx.filter_vmap(one_agent)(jax.random.split(key, agents))
    return Agents(
        actor=actor,
        critic=critic,
        slow_critic=critic,
        optimiser=jax.vmap(agent_optimiser(config).init)(eqx.filter((actor, critic), eqx.is_array)),
        return_scale=jnp.zeros(agents),
    )


def log_policy(actor: Actor, s: Input, mask: Bool[Array, "agents *b actions"]) -> Float[Array, "agents *b actions"]:
    """Every agent's own actor on its own rows."""
    return each_agent(lambda actor, s, mask: actor(s, mask), actor, s, mask)


def improve(
    agents: Agents,
    imagined: Dream,
    count: Int[Array, ""],
    settings: AgentConfig,
    precision: str = "float32",
    devices: int = 1,
) -> tuple[Agents, dict[str, Float[Array, " agents"]]]:
    """One update of every agent's actor and critic; `count` is its number, from 1.

    The trajectories are data: no gradient reaches the model that imagined them.
    """

    def learn(given: tuple[Agents, Array], imagined: Dream) -> Any:
        return _improve(*given, imagined, settings, precision, devices)

    return on_shares(learn, devices, (agents, count), jax.lax.stop_gradient(imagined), axis=1)


def _improve(
    agents: Agents, count: Int[Array, ""], imagined: Dream, settings: AgentConfig, precision: str, devices: int
) -> tuple[Agents, dict[str, Float[Array, " agents"]]]:
    """`improve` on one device, which has a share of the trajectories."""
    mean = lambda tree: jax.tree.map(lambda x: x / devices, total(tree, devices))  # noqa: E731
    starts, horizon = imagined.reward.shape[1:]
    count_of_pieces = pieces(starts, max(1, ROWS // horizon))
    returns_of = jax.vmap(lambda r, c, v: lambda_returns(r, c, v, settings.gamma, settings.lam))

    def judge(critic: Critic, slow: Critic, d: Dream) -> tuple[Array, tuple[Array, Array, Array]]:
        critic, slow = lowered((critic, slow), precision)
        logits = critic(d.features)
        values = jax.lax.stop_gradient(two_hot_mean(logits, critic.places))
        returns, weight = returns_of(d.reward, d.cont, values[:, 1:]), _goes_on(d)
        slow_values = slow.value(_acted(d))
        loss = critic_loss(logits[:, :-1], returns, slow_values, weight, critic.places, settings.critic_ema_weight)
        return loss, (loss, values, returns)

    def act(actor: Actor, d: Dream, advantage: Array) -> tuple[Array, tuple[Array, Array]]:
        log_probs = lowered(actor, precision)(_acted(d), d.mask)
        loss, entropy = actor_loss(log_probs, d.action, advantage, _goes_on(d), settings.entropy)
        return loss, (loss, entropy)

    def gradients(actor: Actor, critic: Critic, slow: Critic, scale: Array, d: Dream) -> Any:
        def judged(d: Dream) -> Any:
            grads, (loss, values, returns) = eqx.filter_grad(judge, has_aux=True)(critic, slow, d)
            return (eqx.filter(grads, eqx.is_array), loss, jnp.mean(values)), (values[:, :-1], returns)

        found, (values, returns) = summed(judged, count_of_pieces, d)
        critic_grads, regression, value = mean(found)
        spread = return_range(gathered(returns, devices))
        scale = settings.return_ema * scale + (1 - settings.return_ema) * spread
        unbiased = scale / (1 - settings.return_ema**count)
        advantage = (returns - values) / jnp.maximum(1.0, unbiased)

        def acted(piece: tuple[Dream, Array]) -> Any:
            grads, (loss, entropy) = eqx.filter_grad(act, has_aux=True)(actor, *piece)
            return (eqx.filter(grads, eqx.is_array), loss, entropy), None

        actor_grads, policy, entropy = mean(summed(acted, count_of_pieces, (d, advantage))[0])
        metrics = {
            "actor_loss": policy,
            "critic_loss": regression,
            "entropy": entropy,
            "imagined_reward": mean(jnp.mean(d.reward)),
            "value": value,
            "return_scale": unbiased,
        }
        return (actor_grads, critic_grads), scale, metrics

    def updated(actor: Actor, critic: Critic, slow: Critic, optimiser: Any, grads: Any) -> Any:
        updates, optimiser = agent_optimiser(settings).update(grads, optimiser)
        (actor, critic), ratio = applied((actor, critic), updates)
        slow = jax.tree.map(
            lambda a, b: settings.critic_ema * a + (1 - settings.critic_ema) * b if eqx.is_array(a) else a,
            slow,
            critic,
        )
        return (actor, critic, slow, optimiser), (norm(grads), ratio)

    nets = (agents.actor, agents.critic, agents.slow_critic)
    grads, scale, metrics = each_agent(gradients, *nets, agents.return_scale, imagined)
    trained, (metrics["grad_norm"], metrics["update_ratio"]) = eqx.filter_vmap(updated)(*nets, agents.optimiser, grads)
    actor, critic, slow, optimiser = trained
    return Agents(actor, critic, slow, optimiser, scale), metrics


def _acted(d: Dream) -> Input:
    """s_0 … s_{L−1}."""
    return jax.tree.map(lambda x: x[:, :-1], d.features)


def _goes_on(d: Dream) -> Float[Array, "starts horizon"]:
    """The probability that the trajectory still goes on at each step."""
    return jnp.cumprod(jnp.concatenate([jnp.ones_like(d.cont[:, :1]), d.cont[:, :-1]], axis=1), axis=1)
