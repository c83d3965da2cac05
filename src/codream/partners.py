"""Who the others are in imagination. MATWM's answer: a predictor of what each of them does next."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from codream.config import WorldModelConfig
from codream.envs import EnvSpec
from codream.latents import log_softmax
from codream.linear import Linear, OneHots, joined, linear
from codream.nets import KVCache, Transformer

__all__ = ["TeammatePredictor", "others_of"]


def others_of(num_agents: int) -> Int[np.ndarray, "agents others"]:
    """For each focal agent, the other agents in order."""
    table = [[j for j in range(num_agents) if j != i] for i in range(num_agents)]
    return np.asarray(table, np.int32).reshape(num_agents, num_agents - 1)


class TeammatePredictor(eqx.Module):
    """p̂: a categorical over the action of each other agent, from the focal agent's latents z_0 … z_t.

    Latents enter with their gradient stopped, so that the predictor shapes no encoder (paper, section 4.2).
    """

    mix: Linear
    transformer: Transformer
    out: Linear
    agents: int = eqx.field(static=True)
    actions: int = eqx.field(static=True)
    action_counts: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, z_size: int, spec: EnvSpec, config: WorldModelConfig, key: PRNGKeyArray):
        k1, k2, k3 = jax.random.split(key, 3)
        self.agents, self.actions, self.action_counts = spec.num_agents, spec.max_actions, spec.num_actions
        self.mix = linear(z_size + self.agents, config.team_hidden, k1)
        self.transformer = Transformer(config.team_hidden, config.team_layers, config.team_heads, k2)
        self.out = linear(config.team_hidden, (self.agents - 1) * self.actions, k3, gain=0.1)

    @property
    def size(self) -> int:
        """Entries of a flat p̂."""
        return (self.agents - 1) * self.actions

    def _mixed(self, z: Float[Array, "..."] | OneHots, focal: Int[Array, ""]) -> Float[Array, " hidden"]:
        """As `mix` multiplies them, without its bias."""
        if isinstance(z, OneHots):
            return self.mix.product(joined(z, OneHots(focal[None], self.agents)))
        return self.mix.product(jnp.concatenate([jax.lax.stop_gradient(z), jax.nn.one_hot(focal, self.agents)]))

    def _log_probs(self, x: Float[Array, " hidden"], focal: Int[Array, ""]) -> Float[Array, "others actions"]:
        logits = self.out(x).reshape(self.agents - 1, self.actions)
        counts = jnp.asarray(self.action_counts)[jnp.asarray(others_of(self.agents))[focal]]
        return log_softmax(jnp.where(jnp.arange(self.actions) < counts[:, None], logits, -1e9))

    def full(
        self,
        z: Float[Array, "time z"],
        focal: Int[Array, ""],
        segment: Int[Array, " time"],
        valid: Bool[Array, " time"],
    ) -> tuple[Float[Array, "time others actions"], KVCache]:
        """Log-probabilities at every step of a sequence."""
        x = jax.vmap(self._mixed, in_axes=(0, None))(z, focal)
        x, cache = self.transformer.full(x, segment, valid, layer=self.mix)
        return jax.vmap(self._log_probs, in_axes=(0, None))(x, focal), cache

    def prefill(
        self,
        z: Float[Array, "time z"] | OneHots,
        focal: Int[Array, ""],
        segment: Int[Array, " time"],
        valid: Bool[Array, " time"],
        room: int,
    ) -> KVCache:
        """The memory after the latents of a sequence, one a step, with room for more."""
        x = jax.vmap(self._mixed, in_axes=(0, None))(z, focal)
        return self.transformer.prefill(x, segment, valid, room, self.mix)[1]

    def step(
        self, z: Float[Array, "..."] | OneHots, focal: Int[Array, ""], cache: KVCache
    ) -> tuple[Float[Array, "others actions"], KVCache]:
        """Log-probabilities after one more latent."""
        x, cache = self.transformer.step(self._mixed(z, focal), cache, self.mix)
        return self._log_probs(x, focal), cache
