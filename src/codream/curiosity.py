"""Curiosity: what is worth seeking because it is new. Random network distillation (RND).

A predictor learns what a fixed random network makes of observations; its error is large where it has not been.
Source: Burda et al. 2018, arXiv:1810.12894, section 2. `shared`, `individual` and `hybrid` are ours: one pair of
networks for all agents, a pair for each, or both.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from codream.config import CuriosityConfig
from codream.envs import EnvSpec
from codream.moments import Moments
from codream.nets import CNN, MLP
from codream.optimisers import norm

__all__ = ["Curiosity", "bonus", "errors", "init_curiosity", "see", "train_curiosity"]

CLIP = 5.0  # of normalised observations (section 2.4)


class Features(eqx.Module):
    """A network from one normalised observation to features."""

    encoder: CNN | None
    mlp: MLP

    def __init__(self, spec: EnvSpec, config: CuriosityConfig, layers: int, key: PRNGKeyArray):
        encoder_key, key = jax.random.split(key)
        self.encoder, size = None, spec.obs_size
        if spec.is_image:
            height, width, channels = spec.obs_shape
            self.encoder = CNN((height, width, channels), config.image_depth, encoder_key)
            size = self.encoder.out_size
        self.mlp = MLP(size, config.features, config.units, layers, key)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, " features"]:
        return self.mlp(x if self.encoder is None else self.encoder(x))


class Pair(eqx.Module):
    """The fixed random target, and the predictor with its optimiser."""

    target: Features
    predictor: Features
    optimiser: Any

    @staticmethod
    def fresh(spec: EnvSpec, config: CuriosityConfig, key: PRNGKeyArray) -> Pair:
        target_key, predictor_key = jax.random.split(key)
        # The predictor has a hidden layer more, so that it can become the target (section 3.1).
        predictor = Features(spec, config, config.layers + 1, predictor_key)
        return Pair(
            Features(spec, config, config.layers, target_key),
            predictor,
            optax.adam(config.lr).init(eqx.filter(predictor, eqx.is_array)),
        )

    def error(self, x: Float[Array, "*shape"]) -> Float[Array, ""]:
        """Mean squared difference of the features."""
        return _error(self.predictor, self.target, x)


def _error(predictor: Features, target: Features, x: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.mean((predictor(x) - jax.lax.stop_gradient(target(x))) ** 2)


class Curiosity(eqx.Module):
    """The pairs of networks, and the scales of what goes in and comes out."""

    shared: Pair | None
    individual: Pair | None  # stacked on a leading agent axis
    obs: Moments  # of all agents' observations together
    returns: Moments  # of discounted sums of errors, per agent
    sizes: tuple[int, ...] | None = eqx.field(static=True)  # entries of each agent's observation; None of images

    def real(self, obs: Shaped[Array, "n agents *shape"]) -> Bool[Array, "..."]:
        """Which entries are no padding."""
        if self.sizes is None:
            return jnp.ones((1,) * (obs.ndim - 1), bool)
        return jnp.arange(obs.shape[-1]) < jnp.asarray(self.sizes)[:, None]


def init_curiosity(spec: EnvSpec, config: CuriosityConfig, key: PRNGKeyArray) -> Curiosity | None:
    """Fresh networks; None where `config.kind` is `none`."""
    if config.kind == "none":
        return None
    shared_key, own_key = jax.random.split(key)
    fresh = lambda key: Pair.fresh(spec, config, key)  # noqa: E731
    return Curiosity(
        shared=fresh(shared_key) if config.sharing != "individual" else None,
        individual=eqx.filter_vmap(fresh)(jax.random.split(own_key, spec.num_agents))
        if config.sharing != "shared"
        else None,
        obs=Moments.empty(spec.obs_shape),
        returns=Moments.empty((spec.num_agents,)),
        sizes=None if spec.is_image else tuple(shape[0] for shape in spec.obs_shapes),
    )


def _normalised(curiosity: Curiosity, obs: Shaped[Array, "n agents *shape"]) -> Float[Array, "n agents *shape"]:
    moments = curiosity.obs
    x = jnp.clip((obs.astype(jnp.float32) - moments.mean) / moments.scale, -CLIP, CLIP)
    return jnp.where(curiosity.real(obs), x, 0.0)


def errors(
    curiosity: Curiosity, obs: Shaped[Array, "n agents *shape"], config: CuriosityConfig
) -> Float[Array, "n agents"]:
    """How new each agent's observation is: the predictor's error, in `hybrid` the weighted sum of both pairs'."""
    x = _normalised(curiosity, obs)
    common = own = jnp.zeros(obs.shape[:2])
    if curiosity.shared is not None:
        common = jax.vmap(jax.vmap(curiosity.shared.error))(x)
    if curiosity.individual is not None:
        own = eqx.filter_vmap(lambda pair, x: jax.vmap(pair.error)(x), in_axes=(0, 1), out_axes=1)(
            curiosity.individual, x
        )
    weight = {"shared": 1.0, "individual": 0.0, "hybrid": config.hybrid_weight}[config.sharing]
    return weight * common + (1 - weight) * own


def bonus(
    curiosity: Curiosity,
    error: Float[Array, "time rows agents"],
    where: Bool[Array, "time rows agents"],
    gamma: float,
) -> tuple[Float[Array, "time rows agents"], Curiosity]:
    """Intrinsic rewards: errors over the running standard deviation of their discounted sums (section 2.4).

    Sums start at 0 with the first step given and run on across ends of episodes, since what is new does not end
    with one. Where `where` is false there is no reward.
    """
    error = jnp.where(where, error, 0.0)

    def forward(total: Array, now: Array) -> tuple[Array, Array]:
        total = gamma * total + now
        return total, total

    _, sums = jax.lax.scan(forward, jnp.zeros_like(error[0]), error)
    merge = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    returns = curiosity.returns.seen(merge(sums), merge(where))
    return error / returns.scale, eqx.tree_at(lambda c: c.returns, curiosity, returns)


def see(curiosity: Curiosity, obs: Shaped[Array, "n agents *shape"], valid: Bool[Array, "n agents"]) -> Curiosity:
    """Count the valid observations in the scale of what goes in."""
    merge = lambda x: x.reshape(-1, *obs.shape[2:])  # noqa: E731
    # Padding says nothing of the entries of those who have them.
    where = valid.reshape(*valid.shape, *[1] * (obs.ndim - 2)) & jnp.broadcast_to(curiosity.real(obs), obs.shape)
    flat, where = merge(obs.astype(jnp.float32)), merge(where)
    return eqx.tree_at(lambda c: c.obs, curiosity, curiosity.obs.seen(flat, where))


def train_curiosity(
    curiosity: Curiosity,
    obs: Shaped[Array, "n agents *shape"],
    valid: Bool[Array, "n agents"],
    config: CuriosityConfig,
) -> tuple[Curiosity, Float[Array, ""]]:
    """One update of every predictor on the valid observations: a common one learns from all agents', an agent's own
    from that agent's. Returns the mean error before it."""
    x = _normalised(curiosity, obs)

    def one(pair: Pair, x: Array, valid: Array) -> tuple[Pair, Array]:
        def loss(predictor: Features) -> Array:
            error = jax.vmap(lambda x: _error(predictor, pair.target, x))(x)
            return jnp.sum(jnp.where(valid, error, 0.0)) / jnp.maximum(jnp.sum(valid), 1)

        value, grads = eqx.filter_value_and_grad(loss)(pair.predictor)
        updates, optimiser = optax.adam(config.lr).update(grads, pair.optimiser)
        value = value + 0.0 * norm(updates)  # NaN as soon as an update is
        return Pair(pair.target, eqx.apply_updates(pair.predictor, updates), optimiser), value

    values = []
    shared, individual = curiosity.shared, curiosity.individual
    if shared is not None:
        shared, value = one(shared, x.reshape(-1, *x.shape[2:]), valid.reshape(-1))
        values.append(value)
    if individual is not None:
        individual, value = eqx.filter_vmap(one, in_axes=(0, 1, 1))(individual, x, valid)
        values.append(jnp.mean(value))
    trained = eqx.tree_at(
        lambda c: (c.shared, c.individual), curiosity, (shared, individual), is_leaf=lambda x: x is None
    )
    return trained, jnp.mean(jnp.stack(values))
