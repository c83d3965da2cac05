"""How good WM-RND's world model is, and what it imagines along an episode. See `codream.model_quality`.

It has no memory, so one real observation is all the context there is. What it is told of the others' actions is what it
is told in training: their real actions (`joint`), the teammate predictor's guess (`predicted`), or nothing (`own`).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from codream.envs import EnvSpec
from codream.markov_model import MarkovModel, own_first
from codream.partners import others_of
from codream.ppo import Learner, observed
from codream.world_model import Sequence

__all__ = ["imagine_along", "one_step", "open_loop", "squared", "was_there"]


def _told(
    model: MarkovModel,
    z: Float[Array, " z"],
    action: Int[Array, " agents"],
    acting: Bool[Array, " agents"],
    focal: Int[Array, ""],
) -> Float[Array, "agents actions"]:
    """The actions as the model sees them, the focal agent's first."""
    order = jnp.asarray(own_first(model.spec.num_agents))[focal]
    actions = jax.nn.one_hot(action[order], model.spec.max_actions) * acting[order][:, None]
    if model.team is not None and model.actions == "predicted":
        actions = jnp.concatenate([actions[:1], jnp.exp(model.others(z, focal))])
    return actions


def one_step(model: MarkovModel, s: Sequence, scale: Float[Array, ""], key: PRNGKeyArray) -> dict[str, Array]:
    """Per step: errors, predicted reward (`scale`: its unit), teammate log-probabilities. Step t predicts row t + 1."""
    code, valid, focal = model.representation, jnp.asarray(model.spec.obs_valid)[s.focal], s.focal
    z_key, sample_key = jax.random.split(key)
    z, _ = jax.vmap(code.posterior)(s.obs, jax.random.split(z_key, len(s.obs)))
    actions = jax.vmap(_told, in_axes=(None, 0, 0, 0, None))(model, z, s.action, s.acting, focal)
    h = jax.vmap(model.step, in_axes=(0, 0, None))(z, actions, focal)[:-1]
    now = z[:-1]
    prior = jax.vmap(code.prior)(h, now)
    mean = jax.vmap(code.next_mean, in_axes=(0, 0, None))(prior, now, valid)
    sample = jax.vmap(code.next, in_axes=(0, 0, None, 0))(prior, now, valid, jax.random.split(sample_key, len(now)))
    real = jax.vmap(code.observed)(s.obs)
    error = lambda z, target: squared(jax.vmap(code.decoder)(z), target, valid)  # noqa: E731
    out = {
        "acts": s.acting[:-1, focal],
        "reconstruction": error(now, real[:-1]),
        "one_step": error(mean, real[1:]),
        "one_step_sampled": error(sample, real[1:]),
        "still": squared(real[:-1], real[1:], valid),
        "reward": jax.vmap(model.reward)(h)[:, 0] * scale,
    }
    if model.team is not None:
        out["team"] = jax.vmap(model.others, in_axes=(0, None))(z, focal)
    return out


def open_loop(
    model: MarkovModel, s: Sequence, horizon: int, samples: int, context: int, key: PRNGKeyArray
) -> tuple[Float[Array, " horizon"], Float[Array, " horizon"]]:
    """Error after 1 … `horizon` steps from the `context`-th step on, and that of "nothing moves"."""
    code, valid = model.representation, jnp.asarray(model.spec.obs_valid)[s.focal]
    start_key, key = jax.random.split(key)
    z, _ = code.posterior(s.obs[context - 1], start_key)
    rows = slice(context - 1, context - 1 + horizon)

    def rollout(key: PRNGKeyArray) -> Array:
        def step(z: Array, inputs: tuple) -> tuple:
            action, acting, key = inputs
            h = model.step(z, _told(model, z, action, acting, s.focal), s.focal)
            z = model.next(h, z, key)
            return z, code.decoder(z)

        _, seen = jax.lax.scan(step, z, (s.action[rows], s.acting[rows], jax.random.split(key, horizon)))
        return seen

    mean = jnp.mean(jax.vmap(rollout)(jax.random.split(key, samples)), axis=0)
    real = jax.vmap(code.observed)(s.obs[context - 1 : context + horizon])
    return squared(mean, real[1:], valid), squared(jnp.broadcast_to(real[0], mean.shape), real[1:], valid)


def squared(a: Array, b: Array, valid: Array) -> Array:
    """Squared error of each row, summed over the entries that are `valid`."""
    return jnp.sum(jnp.where(valid, (a - b).reshape(len(a), -1), 0.0) ** 2, axis=-1)


def was_there(acts: Bool[Array, " time"]) -> Bool[Array, " time"]:
    """Rows that hold an observation of an agent that acts at `acts`: those, and the one that its last action led to."""
    return acts | jnp.roll(acts, 1).at[0].set(False)


def imagine_along(
    model: MarkovModel | None,
    spec: EnvSpec,
    learners: Learner,
    s: Sequence,
    start: Int[Array, ""] | int,
    reward_scale: Float[Array, ""],
    return_scales: Float[Array, " agents"],
    keys: Key[Array, " dreams"],
    *,
    mirrored: bool,
) -> dict[str, Array]:
    """Step through an episode with every agent; up to `start` it sees the real observation, then what it imagines.

    `s` has a leading agent axis. Axes of the result: [agents, dreams, time]. Without a model there is no dream: only
    what each policy and critic make of the real observations. `others` is what the predictor expects or, where partners
    are `mirrored`, what the focal agent itself would do in the others' place.
    """
    mask = s.mask & jnp.asarray(spec.action_valid)[:, None]
    x = jax.vmap(jax.vmap(lambda o: observed(spec, o)))(s.obs)

    def of_one(learner: Learner, mine: Sequence, scale: Array) -> dict[str, Array]:
        others = jnp.asarray(others_of(spec.num_agents))[mine.focal]
        policy = jax.vmap(jax.vmap(learner.log_probs))
        in_their_place = {"others": jnp.exp(jnp.swapaxes(policy(x[others], mask[others]), 0, 1))} if mirrored else {}

        def one(key: PRNGKeyArray) -> dict[str, Array]:
            out, seen = ({}, x[mine.focal]) if model is None else _along(model, mine, x[mine.focal], start, key)
            if "reward" in out:
                out["reward"] = out["reward"] * reward_scale
            out["policy"] = jnp.exp(jax.vmap(learner.log_probs)(seen, mask[mine.focal]))
            out["value"] = jax.vmap(learner.value)(seen) * scale
            return in_their_place | out

        return jax.vmap(one)(keys)

    return eqx.filter_vmap(of_one)(learners, s, return_scales)


def _along(
    model: MarkovModel, s: Sequence, x: Float[Array, "time *shape"], start: Int[Array, ""] | int, key: PRNGKeyArray
) -> tuple[dict[str, Array], Float[Array, "time *shape"]]:
    """One dream, and what its agent sees: the real observations `x`, after `start` the imagined ones."""
    code, valid, time = model.representation, jnp.asarray(model.spec.obs_valid)[s.focal], jnp.arange(len(x))
    first_key, key = jax.random.split(key)
    real, _ = jax.vmap(code.posterior)(s.obs, jax.random.split(first_key, len(x)))

    def step(imagined: Array, inputs: tuple) -> tuple[Array, dict[str, Array]]:
        t, seen, action, acting, key = inputs
        z = jnp.where(t <= start, seen, imagined)
        h = model.step(z, _told(model, z, action, acting, s.focal), s.focal)
        found = {"z": z, "reward": model.reward(h)[0]}
        if model.team is not None:
            found["others"] = jnp.exp(model.others(z, s.focal))
        return model.next(h, z, key), found

    _, out = jax.lax.scan(step, real[0], (time, real, s.action, s.acting, jax.random.split(key, len(x))))
    z = out.pop("z")
    decoded = jax.vmap(lambda z: model.decoded(z, s.focal))(z)
    dreaming = time > start
    compared = dreaming & was_there(s.acting[:, s.focal])
    out["obs"] = jax.vmap(code.decode)(z)
    out["gap"] = jnp.where(compared, squared(decoded, x, valid), 0.0)
    out["still"] = jnp.where(compared, squared(jnp.broadcast_to(x[start], x.shape), x, valid), 0.0)
    return out, jnp.where(dreaming.reshape(-1, *[1] * (x.ndim - 1)), decoded, x)
