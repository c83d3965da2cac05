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
from codream.linear import Input, OneHots, dense, joined
from codream.nets import CNN, MLP, DeconvCNN

__all__ = ["Categorical", "Change", "Representation", "representation"]

# Of z in front of heads: from 1 to 10 doubles the speed at which they learn what a touch is (docs/results.md).
SEEN_SCALE = 10.0
# Of basis functions in front of heads.
NEAR_SCALE = 3.0
# Of z, where distances are looked at: the square of e^40 is still a float32.
FARTHEST = 40.0
# The longest vector whose points are compared pairwise, and the longest in which points start at every entry.
MOST_PAIRED = 48
MOST_OVERLAPPING = 24

# z: in training with its gradient; as data an index for each variable.
Latent = Float[Array, " z"] | OneHots

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
            # Between `encoder.out` and the first layer of `encoder_out` is no activation, so the two products could be
            # one: none of the `encoder_layers` activations is missing, but there is a layer too many. It stays, because
            # checkpoints have it.
            layers = max(config.encoder_layers - 1, 0)
            self.encoder = MLP(spec.obs_size, config.units, config.units, layers, k1)
            self.encoder_out = MLP(config.units, self.size, config.units, 1, k2)
            self.decoder = MLP(self.size, spec.obs_size, config.units, config.encoder_layers, k3)
        self.dynamics = MLP(config.hidden, self.size, config.units, config.head_layers, k4)

    @property
    def size(self) -> int:
        """Entries of a flat z."""
        return self.groups * self.classes

    def seen(self, z: Latent) -> Latent:
        """z as actors, critics and outcome heads see it."""
        return z

    @property
    def outcome_size(self) -> int:
        """Length of `outcome_input`."""
        return self.size

    def outcome_input(self, h: Float[Array, " hidden"], z_next: Latent) -> Input:
        """h_t and z_{t+1} as the reward and continue heads see them."""
        return joined(h, z_next)

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

    def encode(self, obs: Shaped[Array, "*shape"], key: PRNGKeyArray) -> OneHots:
        """A sample of z as data: its ones."""
        return self.drawn(self.encoder_out.product(self.encoder(self.observed(obs))), self.encoder_out.out.bias, key)

    def drawn(self, logits: Float[Array, " z"], bias: Float[Array, " z"], key: PRNGKeyArray) -> OneHots:
        """A sample of z as data, its bias still to be added to the logits."""
        logits, bias = (x.reshape(self.groups, self.classes) for x in (logits, bias))
        dtype = jnp.uint8 if self.classes <= 256 else jnp.int32
        return OneHots(sample_index(key, logits, self.unimix, bias, dtype), self.classes)

    def prior(self, h: Float[Array, " hidden"], z: Latent) -> Float[Array, "groups classes"]:
        """Logits of p(z_{t+1}|h_t), before the uniform mixture."""
        return self.dynamics(h).reshape(self.groups, self.classes)

    def next(
        self,
        prior: Float[Array, "groups classes"],
        z: Latent,
        valid: Bool[Array, " size"],
        key: PRNGKeyArray,
    ) -> Latent:
        """A sample of z_{t+1}: as data where z is."""
        if isinstance(z, OneHots):
            return self.drawn(prior.reshape(-1), jnp.zeros(self.size), key)
        return sample_onehot(key, unimix(prior, self.unimix), self.gradient).reshape(-1)

    def next_mean(
        self, prior: Float[Array, "groups classes"], z: Latent, valid: Bool[Array, " size"]
    ) -> Float[Array, " z"]:
        """E[z_{t+1}]: the class probabilities."""
        return jnp.exp(unimix(prior, self.unimix)).reshape(-1)

    def decode(self, z: Latent) -> Float[Array, "*shape"]:
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
        sg, prior = jax.lax.stop_gradient, unimix(prior, self.unimix)
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
    near: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, spec: EnvSpec, config: WorldModelConfig, key: PRNGKeyArray):
        self.size, self.bins, self.reach = spec.obs_size, config.change_bins, config.change_range
        self.near = config.near
        self.dynamics = MLP(
            config.hidden + self.outcome_size + 2 * len(self.near) * self._vectors.shape[-1],
            self.size * self.bins,
            config.units,
            config.head_layers,
            key,
            out_gain=0.1,
        )

    def seen(self, z: Latent) -> Float[Array, " size"]:
        """Enlarged: what matters about two bodies is often whether they are a tenth of a unit apart."""
        return SEEN_SCALE * dense(z)

    @property
    def _vectors(self) -> Float[np.ndarray, "two size vectors"]:
        """The matrix that takes o to all points (a point is two neighbouring entries) and all differences of two."""
        start = np.arange(0, self.size - 1, 1 if self.size <= MOST_OVERLAPPING else 2)
        point = np.eye(self.size, dtype=np.float32)[:, np.stack([start, start + 1])].swapaxes(0, 1)
        i, j = np.triu_indices(len(start) if self.size <= MOST_PAIRED else 0, 1)
        return np.concatenate([point, point[..., i] - point[..., j]], axis=-1)

    def _relations(
        self, z: Float[Array, " size"]
    ) -> tuple[Float[Array, "two vectors"], Float[Array, "widths vectors"]]:
        """Every point of o and every difference of two points, as vectors d; and how near 0 they are,
        exp(−|d|²/w²) for every width w (radial basis functions)."""
        z = jnp.clip(z, -FARTHEST, FARTHEST)
        # Differences of what is nearly equal: not with the few digits that an accelerator gives by itself.
        d = jnp.einsum("s,tsv->tv", symexp(z), self._vectors, precision=jax.lax.Precision.HIGHEST)
        width = jnp.asarray(self.near)[:, None]
        return d, jnp.exp(-jnp.sum(d**2, axis=0) / width**2)

    @property
    def outcome_size(self) -> int:
        """Entries of `outcome_input` beside h."""
        return self.size + len(self.near) * self._vectors.shape[-1]

    def outcome_input(self, h: Float[Array, " hidden"], z_next: Latent) -> Float[Array, " x"]:
        """h_t and z_{t+1} as the reward and continue heads see them, with how near points are: a reward often
        depends on a touch. h is reduced, since it changes all through training and its entries outnumber z's."""
        _, near = self._relations(dense(z_next))
        return jnp.concatenate([0.1 * h, self.seen(z_next), NEAR_SCALE * near.reshape(-1)])

    def _dynamics_input(self, h: Float[Array, " hidden"], z: Float[Array, " size"]) -> Float[Array, " x"]:
        """h_t and z_t, with how near points are and in which direction: what pushes two bodies apart."""
        d, near = self._relations(z)
        towards = (d[:, None] / jnp.asarray(self.near)[:, None]) * near
        return jnp.concatenate([h, self.seen(z), NEAR_SCALE * near.reshape(-1), NEAR_SCALE * towards.reshape(-1)])

    @property
    def _bins(self) -> Any:
        return change_bins(self.bins, self.reach)

    def observed(self, obs: Float[Array, " size"]) -> Float[Array, " size"]:
        return symlog(obs)

    def posterior(
        self, obs: Float[Array, " size"], key: PRNGKeyArray
    ) -> tuple[Float[Array, " size"], Float[Array, "0"]]:
        return symlog(obs), jnp.zeros(0)

    def encode(self, obs: Float[Array, " size"], key: PRNGKeyArray) -> Float[Array, " size"]:
        return symlog(obs)

    def prior(self, h: Float[Array, " hidden"], z: Latent) -> Float[Array, "size bins"]:
        """Logits of each entry's change."""
        return self.dynamics(self._dynamics_input(h, dense(z))).reshape(self.size, self.bins)

    def next(
        self,
        prior: Float[Array, "size bins"],
        z: Latent,
        valid: Bool[Array, " size"],
        key: PRNGKeyArray,
    ) -> Float[Array, " size"]:
        change = jnp.asarray(self._bins)[sample_index(key, prior)]
        return dense(z) + jnp.where(valid, change, 0.0)

    def next_mean(
        self, prior: Float[Array, "size bins"], z: Latent, valid: Bool[Array, " size"]
    ) -> Float[Array, " size"]:
        return dense(z) + jnp.where(valid, two_hot_mean(prior, self._bins), 0.0)

    def decode(self, z: Latent) -> Float[Array, " size"]:
        return symexp(dense(z))

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
