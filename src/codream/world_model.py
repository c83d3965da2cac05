"""The shared world model: its parts, the unroll over real sequences, and the loss.

One instance serves every agent; who is focal is told by the scaled action ã and, to the teammate predictor, by
the agent's index. Source: Deihim, Alonso and Apostolopoulou 2025 (MATWM, arXiv:2506.18537), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped

from codream.config import WorldModelConfig
from codream.envs import EnvSpec
from codream.health import dead_classes
from codream.latents import two_hot_loss, two_hot_mean, value_bins
from codream.linear import Input, Linear, OneHots, joined, linear, tree_of
from codream.nets import MLP, KVCache, Transformer, products
from codream.partners import TeammatePredictor, others_of
from codream.representation import Categorical, Latent, Representation, representation

__all__ = ["Hidden", "LossParts", "Sequence", "WorldModel", "world_model_loss"]


class Sequence(eqx.Module):
    """Consecutive steps of one copy of the environment, as its focal agent saw them. May span episodes.

    `reward` and `terminal` follow the action of the same step. Where `acting` is false there was no action:
    the episode's last observation, or an agent that had finished.
    """

    obs: Shaped[Array, "time *shape"]
    mask: Bool[Array, "time actions"]
    action: Int[Array, "time agents"]  # of every agent
    reward: Float[Array, " time"]
    terminal: Bool[Array, " time"]
    acting: Bool[Array, "time agents"]
    first: Bool[Array, " time"]
    focal: Int[Array, ""]

    @property
    def segment(self) -> Int[Array, " time"]:
        """Counts episodes."""
        return jnp.cumsum(self.first)

    @property
    def seen(self) -> Bool[Array, " time"]:
        """Rows that hold an observation of the focal agent: those where it acts, and the one that its last action led
        to."""
        acts = self.acting[:, self.focal]
        return acts | jnp.pad(acts[:-1] & ~self.first[1:], (1, 0))


class Hidden(eqx.Module):
    """Memory of one agent's rollout: h after the last action, and the caches of both transformers."""

    h: Float[Array, " hidden"]
    dynamics: KVCache
    team: KVCache | None

    @staticmethod
    def axes(model: WorldModel) -> Hidden:
        """`vmap` axes of a batch of memories of that model, whose caches share one position."""
        team = None if model.team is None else KVCache.axes()
        return tree_of(Hidden, h=0, dynamics=KVCache.axes(), team=team)

    def cleared(self, where: Bool[Array, ""]) -> Hidden:
        """Forget where an episode starts; h is zero at its first step."""
        return Hidden(
            jnp.where(where, 0.0, self.h),
            self.dynamics.cleared(where),
            None if self.team is None else self.team.cleared(where),
        )


class WorldModel(eqx.Module):
    """Encoder, decoder and dynamics (`representation`), action mixer, transformer, heads, teammate predictor."""

    representation: Representation
    mixer: Linear
    transformer: Transformer
    reward: MLP
    cont: MLP
    mask: MLP | None
    team: TeammatePredictor | None
    spec: EnvSpec = eqx.field(static=True)
    config: WorldModelConfig = eqx.field(static=True)

    def __init__(self, spec: EnvSpec, config: WorldModelConfig, key: PRNGKeyArray):
        k = jax.random.split(key, 7)
        self.spec, self.config = spec, config
        self.representation = representation(spec, config, k[0])
        z = self.representation.size
        self.mixer = linear(z + self.action_size, config.hidden, k[1])
        self.transformer = Transformer(config.hidden, config.layers, config.heads, k[2])
        outcome = config.hidden + (self.representation.outcome_size if config.outcome_sees_next else 0)
        units, layers = config.units, config.head_layers
        # A reward of exactly 0 is predicted at first.
        coded = config.latent == "categorical"
        self.reward = MLP(outcome, config.reward_bins, units, layers, k[3], 0.0, norm_first=coded)
        self.cont = MLP(outcome, 1, units, layers, k[4], 0.0, norm_first=coded)
        self.mask = MLP(z, spec.max_actions, units, layers, k[5]) if spec.has_mask else None
        predicts = config.teammates and spec.num_agents > 1
        self.team = TeammatePredictor(z, spec, config, k[6]) if predicts else None

    @property
    def action_size(self) -> int:
        """Length of a one-hot ã."""
        return sum(self.spec.num_actions) if self.config.scale_actions else self.spec.max_actions

    @property
    def features_size(self) -> int:
        """Length of s = concat(z, h, p̂)."""
        return self.representation.size + self.config.hidden + (self.team.size if self.team else 0)

    @property
    def reward_bins(self) -> Float[np.ndarray, " bins"]:
        return value_bins(self.config.reward_bins)

    def obs_valid(self, focal: Int[Array, ""]) -> Bool[Array, " size"]:
        return jnp.asarray(self.spec.obs_valid)[focal]

    def mix(self, z: Latent, action: Int[Array, ""], focal: Int[Array, ""]) -> Float[Array, " hidden"]:
        """e without the layer's bias: the latent and the one-hot scaled action ã through one linear layer."""
        if self.config.scale_actions:
            action = action + jnp.asarray(self.spec.action_offsets)[focal]
        taken = OneHots(action[None], self.action_size)
        return self.mixer.product(joined(z, taken if isinstance(z, OneHots) else taken.flat()))

    def empty(self, size: int) -> Hidden:
        """Memory before an episode, for up to `size` steps of attention."""
        return Hidden(
            jnp.zeros(self.config.hidden),
            self.transformer.empty_cache(size),
            self.team.transformer.empty_cache(size) if self.team else None,
        )

    def unroll(
        self,
        z: Float[Array, "time z"],
        action: Int[Array, " time"],
        focal: Int[Array, ""],
        segment: Int[Array, " time"],
        valid: Bool[Array, " time"],
        room: int = 0,
    ) -> tuple[Float[Array, "time hidden"], KVCache]:
        """h_t after (z_0, ã_0) … (z_t, ã_t) of the same episode, for every t."""
        e = jax.vmap(self.mix, in_axes=(0, 0, None))(z, action, focal)
        return self.transformer.full(e, segment, valid, room, self.mixer)

    def prefill(
        self,
        z: Float[Array, "time z"] | OneHots,
        action: Int[Array, " time"],
        focal: Int[Array, ""],
        segment: Int[Array, " time"],
        valid: Bool[Array, " time"],
        room: int,
    ) -> Hidden:
        """The memory after the steps of a sequence, with room for more."""
        e = jax.vmap(self.mix, in_axes=(0, 0, None))(z, action, focal)
        h, dynamics = self.transformer.prefill(e, segment, valid, room, self.mixer)
        team = None if self.team is None else self.team.prefill(z, focal, segment, valid, room + 1)
        return Hidden(h, dynamics, team)

    def features(self, z: Latent, focal: Int[Array, ""], hidden: Hidden) -> tuple[Input, Hidden]:
        """s_t = concat(z_t, h_{t−1}, p̂_t), and the memory after the teammate predictor has seen z_t."""
        if self.team is None or hidden.team is None:
            return joined(self.representation.seen(z), hidden.h), hidden
        log_probs, cache = self.team.step(z, focal, hidden.team)
        others = jnp.concatenate([hidden.h, jnp.exp(log_probs).reshape(-1)])
        return joined(self.representation.seen(z), others), Hidden(hidden.h, hidden.dynamics, cache)

    def act(self, z: Latent, action: Int[Array, ""], focal: Int[Array, ""], hidden: Hidden) -> Hidden:
        """The memory after (z_t, a_t): h_t."""
        h, cache = self.transformer.step(self.mix(z, action, focal), hidden.dynamics, self.mixer)
        return Hidden(h, cache, hidden.team)

    def outcome(self, h: Float[Array, " hidden"], z_next: Latent) -> tuple[Float[Array, " bins"], Float[Array, ""]]:
        """Logits of reward and of continuing, from h_t (and, by option, z_{t+1})."""
        x = self.representation.outcome_input(h, z_next) if self.config.outcome_sees_next else h
        return self.reward(x), self.cont(x)[0]

    def imagine(
        self,
        z: Latent,
        action: Int[Array, ""],
        focal: Int[Array, ""],
        hidden: Hidden,
        key: PRNGKeyArray,
    ) -> tuple[Latent, Float[Array, ""], Float[Array, ""], Hidden]:
        """One imagined step: z_{t+1} ~ p, mean reward, probability of continuing, memory."""
        hidden, code = self.act(z, action, focal, hidden), self.representation
        if isinstance(code, Categorical) and isinstance(z, OneHots) and not self.config.outcome_sees_next:
            prior, reward, cont = products((code.dynamics, self.reward, self.cont), hidden.h)
            z_next = code.drawn(prior, code.dynamics.out.bias, key)
            reward, cont = self.reward.biased(reward), self.cont.biased(cont)[0]
        else:
            z_next = code.next(code.prior(hidden.h, z), z, self.obs_valid(focal), key)
            reward, cont = self.outcome(hidden.h, z_next)
        return z_next, two_hot_mean(reward, self.reward_bins), jax.nn.sigmoid(cont), hidden


LossParts = dict[str, Float[Array, ""]]


def world_model_loss(
    model: WorldModel, batch: Sequence, keys: Key[Array, " batch"], total: Callable[[Any], Any] = lambda x: x
) -> tuple[Float[Array, ""], LossParts]:
    """L = rec + rew + con + team + β₁ (mask + dyn) + β₂ rep, and its parts before weighting.

    Every part is averaged over its valid places: all observations for rec; steps that an agent took for mask, rew, con
    and team; steps whose successor is in the window for dyn and rep (and, with `outcome_sees_next`, rew and con).
    `batch` has a leading axis of sequences, each with a key of `keys`.

    Where several devices have a share of the batch each, `total` sums over them: the parts are then those of the whole
    batch, and the loss is what this share adds to it.
    """
    config, code = model.config, model.representation
    keys = jax.vmap(lambda key: jax.random.split(key, batch.obs.shape[1]))(keys)

    def mean(x: Float[Array, "batch time"], where: Bool[Array, "batch time"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(total(jnp.sum(where)), 1)

    z, posterior = jax.vmap(jax.vmap(code.posterior))(batch.obs, keys)

    acts = jax.vmap(lambda s: s.acting[:, s.focal])(batch)
    action = jax.vmap(lambda s: s.action[:, s.focal])(batch)
    seen, segment = jax.vmap(lambda s: (s.seen, s.segment))(batch)
    h, _ = jax.vmap(model.unroll)(z, action, batch.focal, segment, acts)

    valid = jax.vmap(model.obs_valid)(batch.focal)
    parts: LossParts = {}
    rec = jax.vmap(jax.vmap(code.reconstruction_loss, in_axes=(0, 0, None)))(z, batch.obs, valid)
    parts["rec"] = mean(rec, seen)

    # Step t leads to row t + 1; the window's last row has no successor here.
    led = acts[:, :-1]
    prior = jax.vmap(jax.vmap(code.prior))(h[:, :-1], z[:, :-1])
    losses = jax.vmap(jax.vmap(code.transition_loss, in_axes=(0, 0, 0, 0, None)))(
        prior, z[:, :-1], z[:, 1:], posterior[:, 1:], valid
    )
    parts["dyn"], parts["rep"] = mean(losses["dyn"], led), mean(losses["rep"], led)

    if config.outcome_sees_next:
        reward_logits, cont_logits = jax.vmap(jax.vmap(model.outcome))(h[:, :-1], z[:, 1:])
        reward, terminal, took = batch.reward[:, :-1], batch.terminal[:, :-1], led
    else:
        reward_logits, cont_logits = jax.vmap(jax.vmap(model.outcome))(h, z)
        reward, terminal, took = batch.reward, batch.terminal, acts
    parts["reward"] = mean(two_hot_loss(reward_logits, reward, model.reward_bins), took)
    parts["continue"] = mean(optax.sigmoid_binary_cross_entropy(cont_logits, 1.0 - terminal), took)

    loss = (
        config.rec_weight * parts["rec"]
        + config.reward_weight * parts["reward"]
        + config.continue_weight * parts["continue"]
        + config.dyn_weight * parts["dyn"]
        + config.rep_weight * parts["rep"]
    )
    if model.mask is not None:
        logits = jax.vmap(jax.vmap(model.mask))(z)
        exists = jnp.asarray(model.spec.action_valid)[batch.focal][:, None]
        wrong = optax.sigmoid_binary_cross_entropy(logits, batch.mask.astype(jnp.float32))
        parts["mask"] = mean(jnp.sum(jnp.where(exists, wrong, 0.0), axis=-1), acts)
        loss += config.mask_weight * parts["mask"]
    if model.team is not None:
        log_probs, _ = jax.vmap(model.team.full)(z, batch.focal, segment, seen)
        others = jnp.asarray(others_of(model.spec.num_agents))[batch.focal]
        took_other = jnp.take_along_axis(batch.acting, others[:, None], axis=-1)
        real = jnp.take_along_axis(batch.action, others[:, None], axis=-1)
        surprise = -jnp.take_along_axis(log_probs, real[..., None], axis=-1)[..., 0]
        parts["team"] = mean(jnp.sum(jnp.where(took_other, surprise, 0.0), axis=-1), acts)
        hit = (jnp.argmax(log_probs, axis=-1) == real) & took_other & acts[..., None]
        parts["team_accuracy"] = jnp.sum(hit) / jnp.maximum(total(jnp.sum(took_other & acts[..., None])), 1)
        loss += config.team_weight * parts["team"]
    parts = total(parts)
    if posterior.size:  # a code of classes
        rows = posterior.reshape(-1, *posterior.shape[2:])
        parts["dead_classes"] = dead_classes(rows, seen.reshape(-1), total)
    return loss, parts
