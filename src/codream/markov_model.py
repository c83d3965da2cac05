"""WM-RND's world model: from one agent's observation and the actions, its next latent and everyone's rewards.

It has no memory: what is not seen now is noise. The latent is MATWM's categorical code. Its target cannot collapse,
because the code must also reconstruct the observation: a constant code would leave the whole of `rec`. The measure
that would show a collapse is the effective rank of the code over a batch (`latent_rank`), logged beside `rec`.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from codream.config import Config
from codream.envs import EnvSpec
from codream.health import dead_classes
from codream.linear import dense
from codream.nets import MLP
from codream.partners import TeammatePredictor, others_of
from codream.representation import Categorical
from codream.rollout import Rollout, flat

__all__ = ["MarkovModel", "Transition", "code_measures", "latent_rank", "markov_loss", "own_first", "transitions"]


def own_first(num_agents: int) -> Int[np.ndarray, "agents agents"]:
    """For each focal agent, itself and then the others in order: how it numbers the agents."""
    return np.concatenate([np.arange(num_agents, dtype=np.int32)[:, None], others_of(num_agents)], axis=1)


class Transition(eqx.Module):
    """Steps as their focal agents saw them. Actions and rewards are of all agents, in the environment's order."""

    obs: Shaped[Array, "*b_shape"]
    mask: Bool[Array, "*b actions"]
    action: Int[Array, "*b agents"]
    acting: Bool[Array, "*b agents"]
    reward: Float[Array, "*b agents"]  # in units of the reward scale
    terminal: Bool[Array, "*b"]
    obs_next: Shaped[Array, "*b_shape"]
    seen: Bool[Array, "*b"]  # `obs` is the focal agent's: it acts, or its last action led here
    focal: Int[Array, "*b"]


def transitions(rollout: Rollout, at: Int[Array, " n"], scale: Float[Array, ""], spec: EnvSpec) -> Transition:
    """The steps at flat places `at`, each once for every agent as the focal one; one leading axis."""
    n, agents = len(at), spec.num_agents
    own = lambda x: jax.lax.collapse(flat(x)[at], 0, 2)  # noqa: E731
    common = lambda x: jnp.repeat(flat(x)[at], agents, axis=0)  # noqa: E731
    return Transition(
        obs=own(rollout.obs),
        mask=own(rollout.allowed(spec)),
        action=common(rollout.action),
        acting=common(rollout.acting),
        reward=common(rollout.reward) / scale,
        terminal=own(rollout.terminal),
        obs_next=own(rollout.every_obs[1:]),
        seen=own(rollout.seen),
        focal=jnp.tile(jnp.arange(agents), n),
    )


class MarkovModel(eqx.Module):
    """Encoder, decoder and dynamics (`representation`), action mixer, heads, teammate predictor."""

    representation: Categorical
    mixer: MLP
    reward: MLP
    cont: MLP
    mask: MLP | None
    team: TeammatePredictor | None
    actions: str = eqx.field(static=True)
    spec: EnvSpec = eqx.field(static=True)

    def __init__(self, spec: EnvSpec, config: Config, key: PRNGKeyArray):
        sizes, n = config.world_model, spec.num_agents
        k = jax.random.split(key, 6)
        self.spec, self.actions = spec, config.projection.actions
        self.representation = Categorical(spec, sizes, k[0])
        z = self.representation.size
        inputs = z + n + spec.max_actions * (1 if self.actions == "own" else n)
        self.mixer = MLP(inputs, sizes.hidden, sizes.units, 1, k[1])
        # A reward of 0 is predicted at first.
        self.reward = MLP(sizes.hidden, n, sizes.units, sizes.head_layers, k[2], 0.0)
        self.cont = MLP(sizes.hidden, 1, sizes.units, sizes.head_layers, k[3], 0.0)
        self.mask = MLP(z, spec.max_actions, sizes.units, sizes.head_layers, k[4]) if spec.has_mask else None
        predicts = n > 1 and "predicted" in (self.actions, config.imagined_partners)
        self.team = TeammatePredictor(z, spec, sizes, k[5]) if predicts else None

    def others(self, z: Float[Array, " z"], focal: Int[Array, ""]) -> Float[Array, "others actions"]:
        """ln p̂ of what the others do now, from this latent alone."""
        assert self.team is not None
        log_probs, _ = self.team.full(z[None], focal, jnp.zeros(1, jnp.int32), jnp.ones(1, bool))
        return log_probs[0]

    def step(
        self, z: Float[Array, " z"], actions: Float[Array, "agents actions"], focal: Int[Array, ""]
    ) -> Float[Array, " hidden"]:
        """h: the latent, who is focal, and the actions (one-hot or probabilities, the focal agent's first)."""
        seen = actions[:1] if self.actions == "own" else actions
        who = jax.nn.one_hot(focal, self.spec.num_agents)
        return jax.nn.silu(self.mixer(jnp.concatenate([z, who, seen.reshape(-1)])))

    def next(self, h: Float[Array, " hidden"], z: Float[Array, " z"], key: PRNGKeyArray) -> Float[Array, " z"]:
        """A sample of the next latent, with a gradient."""
        everything = jnp.ones(self.spec.obs_size, bool)
        return dense(self.representation.next(self.representation.prior(h, z), z, everything, key))

    def decoded(self, z: Float[Array, " z"], focal: Int[Array, ""]) -> Float[Array, "*shape"]:
        """The observation as the agent's policy would see it: where its own is shorter than others', 0 as in every
        real step, since nothing trains the decoder there."""
        x = self.representation.decoder(z)
        return x if self.spec.is_image else jnp.where(jnp.asarray(self.spec.obs_valid)[focal], x, 0.0)

    def allowed(self, z: Float[Array, " z"], agent: Int[Array, ""]) -> Bool[Array, " actions"]:
        """Actions that the agent may take, as predicted where the environment has masks."""
        exists = jnp.asarray(self.spec.action_valid)[agent]
        if self.mask is None:
            return exists
        mask = (self.mask(z) > 0) & exists
        return jnp.where(mask.any(), mask, exists)


def latent_rank(z: Float[Array, "n z"]) -> Float[Array, ""]:
    """Effective rank of latents over a batch (Roy and Vetterli 2007): exp of the entropy of the normalised singular
    values of the centred batch. 1 (or 0 / 0, given as 1) if all latents lie on a line, up to their length."""
    centred = z - jnp.mean(z, axis=0)
    squared = jnp.clip(jnp.linalg.eigvalsh(centred.T @ centred), 0.0)
    singular = jnp.sqrt(squared)
    share = singular / jnp.maximum(jnp.sum(singular), 1e-12)
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0)))


def code_measures(
    model: MarkovModel, obs: Shaped[Array, "n *shape"], seen: Bool[Array, " n"], key: PRNGKeyArray
) -> dict[str, Array]:
    """What would show that the code has collapsed: its effective rank, the mean deviation of an entry, and the share of
    classes that are never the most probable one, over 256 of the observations that were seen."""
    first = jnp.argsort(~seen)  # those that were, in their order
    some = obs[first[jax.random.randint(key, (256,), 0, jnp.maximum(jnp.sum(seen), 1))]]
    _, log_probs = jax.vmap(lambda o: model.representation.posterior(o, key))(some)
    codes = jnp.exp(log_probs).reshape(256, -1)
    return {
        "latent_rank": latent_rank(codes),
        "latent_std": jnp.mean(jnp.std(codes, axis=0)),
        "dead_classes": dead_classes(log_probs, jnp.ones(256, bool)),
    }


def _parts(model: MarkovModel, t: Transition, key: PRNGKeyArray) -> dict[str, Array]:
    """The losses of one transition, unweighted."""
    code, spec = model.representation, model.spec
    here_key, next_key = jax.random.split(key)
    z, _ = code.posterior(t.obs, here_key)
    z_next, posterior_next = code.posterior(t.obs_next, next_key)
    order = jnp.asarray(own_first(spec.num_agents))[t.focal]
    valid = jnp.asarray(spec.obs_valid)[t.focal]

    took = t.acting[order]
    actions = jax.nn.one_hot(t.action[order], spec.max_actions) * took[:, None]
    parts: dict[str, Array] = {}
    if model.team is not None:
        log_probs = model.others(z, t.focal)
        chosen = jnp.sum(log_probs * actions[1:], axis=-1)
        parts["team"] = -jnp.sum(jnp.where(took[1:], chosen, 0.0))
        hit = (jnp.argmax(log_probs, axis=-1) == t.action[order][1:]) & took[1:]
        parts["team_hits"], parts["team_actions"] = jnp.sum(hit), jnp.sum(took[1:])
        if model.actions == "predicted":
            actions = jnp.concatenate([actions[:1], jax.lax.stop_gradient(jnp.exp(log_probs))])
    h = model.step(z, actions, t.focal)
    parts["rec"] = code.reconstruction_loss(z, t.obs, valid)
    parts |= code.transition_loss(code.prior(h, z), z, z_next, posterior_next, valid)
    parts["reward"] = jnp.sum((model.reward(h) - t.reward[order]) ** 2)
    parts["continue"] = optax.sigmoid_binary_cross_entropy(model.cont(h)[0], 1.0 - t.terminal)
    if model.mask is not None:
        loss = optax.sigmoid_binary_cross_entropy(model.mask(z), t.mask.astype(jnp.float32))
        parts["mask"] = jnp.sum(jnp.where(jnp.asarray(spec.action_valid)[t.focal], loss, 0.0))
    return parts


def markov_loss(
    model: MarkovModel, batch: Transition, key: PRNGKeyArray, config: Config
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """L = rec + rew + con + team + β₁ (mask + dyn) + β₂ rep over the steps that the focal agent took, and its parts.

    rec is over all observations that it saw: an episode's last one is decoded too, where a step is imagined to lead
    there. Weights and the parts' names are the MATWM world model's (`world_model.*_weight`); rew is the squared error
    of all agents' rewards, whose mean it thus predicts. `batch` has a leading axis.
    """
    keys = jax.random.split(key, len(batch.focal))
    parts = jax.vmap(_parts, in_axes=(None, 0, 0))(model, batch, keys)
    took = jax.vmap(lambda t: t.acting[t.focal])(batch)
    mean = lambda x, where: jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(jnp.sum(where), 1)  # noqa: E731
    parts = {name: mean(x, batch.seen if name == "rec" else took) for name, x in parts.items()}
    if "team_hits" in parts:  # over all of the others' actions, as a step may have none
        hits, actions = parts.pop("team_hits"), parts.pop("team_actions")
        parts["team_accuracy"] = jnp.where(actions > 0, hits / actions, 0.0)
    w = config.world_model
    weights = {
        "rec": w.rec_weight,
        "reward": w.reward_weight,
        "continue": w.continue_weight,
        "dyn": w.dyn_weight,
        "rep": w.rep_weight,
        "mask": w.mask_weight,
        "team": w.team_weight,
    }
    total = jnp.asarray(sum(weight * parts[name] for name, weight in weights.items() if name in parts))
    return total, parts
