"""Self-projection: what would become of us if everyone acted as I do?

From real steps, my policy is rolled out through the world model in the place of every agent, and what that earns,
`R = (1 − α) R_self + α R_mean`, improves my policy (a categorical imperative). Two ways to its gradient:
straight through the samples and the model (Jang et al. 2017, arXiv:1611.01144), or by the log-probabilities of the
imagined actions, weighted with their advantages (REINFORCE, Williams 1992, clipped as in PPO).
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from codream.config import Config
from codream.envs import EnvSpec
from codream.latents import sample_onehot
from codream.markov_model import MarkovModel, own_first
from codream.ppo import Learner, clipped_loss, gae, normalised, observed
from codream.rollout import Rollout, flat

__all__ = [
    "Imagined",
    "Projection",
    "Starts",
    "World",
    "draw_starts",
    "imagine",
    "imagined_return",
    "judged",
    "model_without_gradient",
    "project",
    "projection_loss",
    "straight_through_loss",
    "symmetry_ratio",
    "trajectories",
]


class Projection(eqx.Module):
    """One imagined trajectory of T steps in which everyone acts as I do (or as `imagined_partners` says).

    Copies are the agents whose actions my policy has drawn for the world model: all of them, or only myself.
    """

    reward: Float[Array, " T"]  # R, in reward scales
    cont: Float[Array, " T"]  # predicted probability that the game goes on after the step
    x: Float[Array, "T_1 *shape"]  # what I see before each step, and after the last
    seen: Float[Array, "T copies *shape"]  # what my copies see
    mask: Bool[Array, "T copies actions"]
    action: Int[Array, "T copies"]

    @property
    def alive(self) -> Float[Array, " T"]:
        """Π_{k<t} c_k: the probability that the game still goes on before each step."""
        return jnp.concatenate([jnp.ones(1), jnp.cumprod(self.cont)[:-1]])

    def log_prob(self, mine: Learner) -> Float[Array, "T copies"]:
        """ln π of what my copies did."""
        log_probs = jax.vmap(jax.vmap(mine.log_probs))(self.seen, self.mask)
        return jnp.take_along_axis(log_probs, self.action[..., None], axis=-1)[..., 0]


class Starts(eqx.Module):
    """Real steps from which an agent imagines; what all agents saw and might do there."""

    obs: Shaped[Array, "*b_agents_shape"]
    mask: Bool[Array, "*b agents actions"]
    valid: Bool[Array, "*b"]  # everyone acted


class World(eqx.Module):
    """What all agents of an update imagine in."""

    model: MarkovModel  # its weights are constants
    alpha: Float[Array, ""]  # the symmetry ratio
    scale: Float[Array, " agents"]  # of rewards, in that of each agent's returns


class Imagined(eqx.Module):
    """Trajectories as PPO learns from them, judged by the policy and the critic that imagined them."""

    trajectory: Projection
    log_prob: Float[Array, "*b T copies"]
    advantage: Float[Array, "*b T"]
    target: Float[Array, "*b T"]  # of the critic of projected returns
    weight: Float[Array, "*b T"]  # Π c of those that count


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
    views: Int[Array, " views"],
    focal: Int[Array, ""],
    config: Config,
    key: PRNGKeyArray,
) -> Float[Array, "views agents actions"]:
    """What every agent does, in the environment's order, as each view's step of the world model expects it: samples,
    each with its own noise; or only that of the agent whose view it is, and probabilities of the others."""
    spec, settings, n = model.spec, config.projection, model.spec.num_agents
    own_key, other_key = jax.random.split(key)
    own = jax.nn.one_hot(views, n)[..., None]
    sample = lambda key, log_probs: sample_onehot(key, log_probs, "gumbel", settings.temperature)  # noqa: E731
    if config.imagined_partners == "mirrored":
        log_probs = jnp.broadcast_to(jax.vmap(mine.log_probs)(x, mask), (n, spec.max_actions))
        actions = sample(own_key, log_probs)
        others = actions if settings.actions == "joint" else jnp.exp(log_probs)
        return own * actions + (1 - own) * others
    others = jnp.zeros((n, spec.max_actions))
    if model.team is not None and config.imagined_partners == "predicted":
        theirs = model.others(z[0], focal)
        answer = sample(other_key, theirs) if settings.actions == "joint" else jnp.exp(theirs)
        others = others.at[jnp.asarray(own_first(n))[focal, 1:]].set(answer)
    return own * sample(own_key, mine.log_probs(x[0], mask[0])) + (1 - own) * others


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
    mirrored = config.imagined_partners == "mirrored"
    each = mirrored and settings.view == "each"
    everyone = mirrored and settings.actions == "joint"
    views = jnp.arange(n) if each else focal[None]
    mine_at = focal if each else 0
    code = model.representation
    start_key, key = jax.random.split(key)
    z, _ = jax.vmap(code.posterior)(obs[views], jax.random.split(start_key, len(views)))
    order = jnp.asarray(own_first(n))[views]

    def of_copies(per_view: Shaped[Array, "views *s"]) -> Shaped[Array, "copies *s"]:
        return jnp.broadcast_to(per_view, (n, *per_view.shape[1:])) if everyone else per_view[mine_at][None]

    def step(carry: tuple[Array, ...], key: PRNGKeyArray) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        z, x, mask = carry
        act_key, model_key = jax.random.split(key)
        actions = _actions(model, mine, z, x, mask, views, focal, config, act_key)
        h = jax.vmap(lambda z, table, order, view: model.step(z, table[order], view))(z, actions, order, views)
        rewards = model.reward(h[mine_at])  # mine first
        reward = (1 - alpha) * rewards[0] + alpha * jnp.mean(rewards)
        cont = jax.nn.sigmoid(model.cont(h[mine_at])[0])
        table = actions[mine_at]
        chosen = jnp.argmax(table if everyone else table[focal][None], axis=-1)
        z = jax.vmap(model.next)(h, z, jax.random.split(model_key, len(views)))
        there = (z, jax.vmap(model.decoded)(z, views), jax.vmap(model.allowed)(z, views))
        return there, (reward, cont, x[mine_at], of_copies(x), of_copies(mask), chosen)

    first = (z, observed(model.spec, obs[views]), mask[views])
    keys = jax.random.split(key, settings.imagination_steps)
    last, (reward, cont, x, seen, masks, action) = jax.lax.scan(step, first, keys)
    return Projection(reward, cont, jnp.concatenate([x, last[1][None, mine_at]]), seen, masks, action)


def draw_starts(rollout: Rollout, spec: EnvSpec, key: PRNGKeyArray, config: Config) -> Starts:
    """Steps of the rollout, drawn for every agent by itself, [agents, n]: `projection.starts` for each minibatch."""
    agents, parts = spec.num_agents, config.ppo.minibatches
    acting = flat(rollout.acting)
    count = parts * min(max(1, config.projection.starts // agents), len(acting) // parts)
    at = jax.vmap(lambda k: jax.random.permutation(k, len(acting))[:count])(jax.random.split(key, agents))
    return Starts(flat(rollout.obs)[at], flat(rollout.allowed(spec))[at], jnp.all(acting[at], axis=-1))


def trajectories(
    mine: Learner, world: World, starts: Starts, focal: Int[Array, ""], key: PRNGKeyArray, config: Config
) -> Projection:
    """One trajectory from each of n starts."""
    return jax.vmap(project, in_axes=(None, None, 0, 0, None, None, 0, None))(
        mine, world.model, starts.obs, starts.mask, focal, world.alpha, jax.random.split(key, len(starts.valid)), config
    )


def imagine(
    learners: Learner, world: World, starts: Starts, key: PRNGKeyArray, config: Config
) -> tuple[Imagined, dict[str, Float[Array, " agents"]]]:
    """What every agent imagines, once for the whole update, [agents, n]; and metrics of it."""

    def one(mine: Learner, starts: Starts, focal: Array, key: PRNGKeyArray) -> tuple[Imagined, dict[str, Array]]:
        dreams = trajectories(mine, world, starts, focal, key, config)
        return judged(mine, dreams, starts.valid, world.scale[focal], config)

    agents = len(world.scale)
    return eqx.filter_vmap(one)(learners, starts, jnp.arange(agents), jax.random.split(key, agents))


def imagined_return(trajectory: Projection, gamma: float) -> Float[Array, ""]:
    """Σ_t γ^t (Π_{k<t} c_k) R_t. There is no bootstrap at its end."""
    return jnp.sum(gamma ** jnp.arange(len(trajectory.reward)) * trajectory.alive * trajectory.reward)


def straight_through_loss(
    dreams: Projection, valid: Bool[Array, " n"], scale: Float[Array, ""], config: Config
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """−coef × the imagined return in units of the return scale (`scale` = rewards' / returns'), over those of n
    trajectories that are `valid`; and its metrics."""
    metrics = _measures(dreams, valid, scale, config)
    return -config.projection.coef * metrics["imagined_return"], metrics


def _measures(
    dreams: Projection, valid: Bool[Array, " n"], scale: Float[Array, ""], config: Config
) -> dict[str, Array]:
    weight = valid / jnp.maximum(jnp.sum(valid), 1)
    returns = jax.vmap(imagined_return, in_axes=(0, None))(dreams, config.ppo.gamma)
    return {
        "imagined_return": scale * jnp.sum(weight * returns),
        "imagined_reward": jnp.sum(weight * jnp.mean(dreams.reward, axis=1)),
    }


def judged(
    mine: Learner, dreams: Projection, valid: Bool[Array, " n"], scale: Float[Array, ""], config: Config
) -> tuple[Imagined, dict[str, Array]]:
    """Imagined trajectories as PPO learns from them, and metrics: advantages as of real steps (γ, λ), with the
    learner's critic of projected returns, in units of the return scale (`scale` = rewards' / returns')."""
    values = jax.vmap(jax.vmap(mine.projected_value))(dreams.x)
    going = jnp.ones_like(dreams.cont, bool)
    advantage = jax.vmap(lambda r, v, ends, going: gae(r, v, ends, going, config.ppo.gamma, config.ppo.lam))(
        scale * dreams.reward, values, 1 - dreams.cont, going
    )
    weight = valid[:, None] * jax.vmap(lambda one: one.alive)(dreams)
    log_prob = jax.vmap(lambda one: one.log_prob(mine))(dreams)
    metrics = _measures(dreams, valid, scale, config)
    metrics["projected_value"] = jnp.sum(weight * values[:, :-1]) / jnp.maximum(jnp.sum(weight), 1e-8)
    return Imagined(dreams, log_prob, advantage, advantage + values[:, :-1], weight), metrics


def projection_loss(mine: Learner, imagined: Imagined, config: Config) -> tuple[Float[Array, ""], dict[str, Array]]:
    """coef × PPO's clipped loss of every copy's action, summed over copies, + value_weight · ½ E[(v̂ − target)²],
    where v̂ is the critic of projected returns; and metrics.

    Steps count as much as they are probable (Π c). Advantages are normalised over the batch as PPO's are: at `coef` 1
    what everyone's doing so would earn counts as much as what I earn.
    """
    weight = imagined.weight / jnp.maximum(jnp.sum(imagined.weight), 1e-8)
    advantage = normalised(imagined.advantage, weight)[..., None]
    log_prob = jax.vmap(lambda one: one.log_prob(mine))(imagined.trajectory)
    policy, metrics = clipped_loss(log_prob - imagined.log_prob, advantage, weight[..., None], config.ppo)
    values = jax.vmap(jax.vmap(mine.projected_value))(imagined.trajectory.x[:, :-1])
    critic = 0.5 * jnp.sum(weight * (values - imagined.target) ** 2)
    copies = log_prob.shape[-1]
    metrics = {f"projected_{name}": x / copies for name, x in metrics.items()} | {"projected_critic_loss": critic}
    return config.projection.coef * policy + config.ppo.value_weight * critic, metrics


def model_without_gradient(model: MarkovModel) -> MarkovModel:
    """The same model; whatever is differentiated through it, its weights are constants."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, model)
