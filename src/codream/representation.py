"""How an observation becomes a latent z, and how the next z is predicted from the hidden state h.

`Categorical` is the paper's one-hot code. `Change` is for vectors: z is the observation itself (after symlog),
and the dynamics predict, entry by entry, a two-hot distribution of its change. Both answer the same questions.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from codream.config import WorldModelConfig
from codream.envs import EnvSpec
from codream.latents import (
    change_bins,
    kl,
    sample_index,
    sample_onehot,
    symexp,
    symlog,
    two_hot_loss,
    two_hot_mean,
    unimix,
)
from codream.nets import CNN, MLP, DeconvCNN

__all__ = ["Categorical", "Change", "Representation", "representation"]

# Of z in front of heads: from 1 to 10 doubles the speed at which they learn what a touch is (docs/results.md).
SEEN_SCALE = 10.0
# Width of "near", in the environment's units, and the longest vector whose entries are compared pairwise.
NEAR = 0.1
MOST_PAIRED = 48

Losses = dict[str, Float[Array, ""]]


class Categorical(eqx.Module):
    """32 categorical variables of 32 classes, with encoder and decoder for vectors or images."""

    encoder: MLP | CNN
    encoder_out: MLP
    decoder: MLP | DeconvCNN
    dynamics: MLP
    groups: int = eqx.field(static=True)
    classes: int = eqx.field(static=True)
    unimix: float = eqx.field(static=True)
    gradient: str = eqx.field(static=True)
    free_nats: float = eqx.field(static=True)
    is_image: bool = eqx.field(static=True)

    def __init__(self, spec: EnvSpec, config: WorldModelConfig, key: PRNGKeyArray):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        self.groups, self.classes = config.groups, config.classes
        self.unimix, self.gradient = config.unimix, config.latent_gradient
        self.free_nats, self.is_image = config.free_nats, spec.is_image
        if spec.is_image:
            height, width, channels = spec.obs_shape
            self.encoder = CNN((height, width, channels), config.image_depth, k1)
            self.encoder_out = MLP(self.encoder.out_size, self.size, config.units, 0, k2)
            self.decoder = DeconvCNN(self.size, (height, width, channels), config.image_depth, k3)
        else:
            layers = max(config.encoder_layers - 1, 0)
            self.encoder = MLP(spec.obs_size, config.units, config.units, layers, k1)
            self.encoder_out = MLP(config.units, self.size, config.units, 1, k2)
            self.decoder = MLP(self.size, spec.obs_size, config.units, config.encoder_layers, k3)
        self.dynamics = MLP(config.hidden, self.size, config.units, config.head_layers, k4)

    @property
    def size(self) -> int:
        """Entries of a flat z."""
        return self.groups * self.classes

    def seen(self, z: Float[Array, " z"]) -> Float[Array, " z"]:
        """z as actors, critics and outcome heads see it."""
        return z

    @property
    def outcome_size(self) -> int:
        """Length of `outcome_input`."""
        return self.size

    def outcome_input(self, h: Float[Array, " hidden"], z_next: Float[Array, " z"]) -> Float[Array, " x"]:
        """h_t and z_{t+1} as the reward and continue heads see them."""
        return jnp.concatenate([h, z_next])

    def observed(self, obs: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The observation as networks see it, and as the decoder's squared error is measured."""
        return obs.astype(jnp.float32) / 255.0 - 0.5 if self.is_image else symlog(obs)

    def posterior(
        self, obs: Shaped[Array, "*shape"], key: PRNGKeyArray
    ) -> tuple[Float[Array, " z"], Float[Array, "groups classes"]]:
        """q(z|o): a sample, and the log-probabilities that it was drawn from."""
        logits = self.encoder_out(self.encoder(self.observed(obs)))
        log_probs = unimix(logits.reshape(self.groups, self.classes), self.unimix)
        return sample_onehot(key, log_probs, self.gradient).reshape(-1), log_probs

    def prior(self, h: Float[Array, " hidden"], z: Float[Array, " z"]) -> Float[Array, "groups classes"]:
        """p(z_{t+1}|h_t) as log-probabilities."""
        return unimix(self.dynamics(h).reshape(self.groups, self.classes), self.unimix)

    def next(
        self,
        prior: Float[Array, "groups classes"],
        z: Float[Array, " z"],
        valid: Bool[Array, " size"],
        key: PRNGKeyArray,
    ) -> Float[Array, " z"]:
        """A sample of z_{t+1}."""
        return sample_onehot(key, prior, self.gradient).reshape(-1)

    def next_mean(
        self, prior: Float[Array, "groups classes"], z: Float[Array, " z"], valid: Bool[Array, " size"]
    ) -> Float[Array, " z"]:
        """E[z_{t+1}]: the class probabilities."""
        return jnp.exp(prior).reshape(-1)

    def decode(self, z: Float[Array, " z"]) -> Float[Array, "*shape"]:
        """ô in the environment's units."""
        out = self.decoder(z)
        return (out + 0.5) * 255.0 if self.is_image else symexp(out)

    def reconstruction_loss(
        self, z: Float[Array, " z"], obs: Shaped[Array, "*shape"], valid: Bool[Array, " size"]
    ) -> Float[Array, ""]:
        """Squared error summed over the entries that are real."""
        error = (self.decoder(z) - self.observed(obs)).reshape(-1)
        return jnp.sum(jnp.where(valid, error, 0.0) ** 2)

    def transition_loss(
        self,
        prior: Float[Array, "groups classes"],
        z: Float[Array, " z"],
        z_next: Float[Array, " z"],
        posterior_next: Float[Array, "groups classes"],
        valid: Bool[Array, " size"],
    ) -> Losses:
        """dyn and rep: KL[q ‖ p] with the gradient stopped on one side and the other, free up to `free_nats`."""
        sg = jax.lax.stop_gradient
        return {
            "dyn": jnp.maximum(self.free_nats, kl(sg(posterior_next), prior)),
            "rep": jnp.maximum(self.free_nats, kl(posterior_next, sg(prior))),
        }


class Change(eqx.Module):
    """z is the padded observation after symlog; its change is predicted. Nothing is coded, so nothing is lost."""

    dynamics: MLP
    size: int = eqx.field(static=True)
    bins: int = eqx.field(static=True)
    reach: float = eqx.field(static=True)

    def __init__(self, spec: EnvSpec, config: WorldModelConfig, key: PRNGKeyArray):
        self.size, self.bins, self.reach = spec.obs_size, config.change_bins, config.change_range
        self.dynamics = MLP(
            config.hidden + self.outcome_size,
            self.size * self.bins,
            config.units,
            config.head_layers,
            key,
            out_gain=0.1,
        )

    def seen(self, z: Float[Array, " size"]) -> Float[Array, " size"]:
        """Enlarged: what matters about two bodies is often whether they are a tenth of a unit apart."""
        return SEEN_SCALE * z

    @property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every two entries, up to a size at which they are too many."""
        return np.triu_indices(self.size if self.size <= MOST_PAIRED else 0, 1)

    @property
    def outcome_size(self) -> int:
        """Entries of `outcome_input` beside h."""
        return 2 * self.size + len(self._pairs[0])

    def _contacts(self, z: Float[Array, " size"]) -> Float[Array, " x"]:
        """z enlarged, and which entries of o are near 0 or near each other (radial basis functions).

        Rewards and collisions depend on whether two bodies touch, a sharp function of a difference of entries: a
        plain network needs several times as many touches before it predicts one.
        """
        o = symexp(z)
        i, j = self._pairs
        near = jnp.exp(-((jnp.concatenate([o, o[i] - o[j]]) / NEAR) ** 2))
        return jnp.concatenate([self.seen(z), 3.0 * near])

    def outcome_input(self, h: Float[Array, " hidden"], z_next: Float[Array, " size"]) -> Float[Array, " x"]:
        """h_t and z_{t+1} as the reward and continue heads see them. h is reduced, since it changes all through
        training and its entries outnumber those of z."""
        return jnp.concatenate([0.1 * h, self._contacts(z_next)])

    @property
    def _bins(self) -> Any:
        return change_bins(self.bins, self.reach)

    def observed(self, obs: Float[Array, " size"]) -> Float[Array, " size"]:
        return symlog(obs)

    def posterior(
        self, obs: Float[Array, " size"], key: PRNGKeyArray
    ) -> tuple[Float[Array, " size"], Float[Array, "0"]]:
        return symlog(obs), jnp.zeros(0)

    def prior(self, h: Float[Array, " hidden"], z: Float[Array, " size"]) -> Float[Array, "size bins"]:
        """Logits of each entry's change."""
        return self.dynamics(jnp.concatenate([h, self._contacts(z)])).reshape(self.size, self.bins)

    def next(
        self,
        prior: Float[Array, "size bins"],
        z: Float[Array, " size"],
        valid: Bool[Array, " size"],
        key: PRNGKeyArray,
    ) -> Float[Array, " size"]:
        change = jnp.asarray(self._bins)[sample_index(key, prior)]
        return z + jnp.where(valid, change, 0.0)

    def next_mean(
        self, prior: Float[Array, "size bins"], z: Float[Array, " size"], valid: Bool[Array, " size"]
    ) -> Float[Array, " size"]:
        return z + jnp.where(valid, two_hot_mean(prior, self._bins), 0.0)

    def decode(self, z: Float[Array, " size"]) -> Float[Array, " size"]:
        return symexp(z)

    def reconstruction_loss(
        self, z: Float[Array, " size"], obs: Float[Array, " size"], valid: Bool[Array, " size"]
    ) -> Float[Array, ""]:
        return jnp.zeros(())

    def transition_loss(
        self,
        prior: Float[Array, "size bins"],
        z: Float[Array, " size"],
        z_next: Float[Array, " size"],
        posterior_next: Float[Array, "0"],
        valid: Bool[Array, " size"],
    ) -> Losses:
        """dyn: cross-entropy of every real entry's change; there is no code, so rep is 0."""
        loss = two_hot_loss(prior, z_next - z, self._bins)
        return {"dyn": jnp.sum(jnp.where(valid, loss, 0.0)), "rep": jnp.zeros(())}


Representation = Categorical | Change


def representation(spec: EnvSpec, config: WorldModelConfig, key: PRNGKeyArray) -> Representation:
    return {"categorical": Categorical, "change": Change}[config.latent](spec, config, key)
