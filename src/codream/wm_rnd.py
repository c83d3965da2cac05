"""WM-RND: init, act, observe, update. PPO on real steps, self-projection on imagined ones, curiosity.

With `projection.coef = 0` and no curiosity this is independent PPO: no model is made and nothing is imagined.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from codream.config import Config
from codream.curiosity import Curiosity, bonus, errors, init_curiosity, see, train_curiosity
from codream.envs import EnvSpec, TimeStep
from codream.latents import sample_index
from codream.markov_model import MarkovModel, code_measures, markov_loss, transitions
from codream.metrics import Metrics, repeat, zeros_like_result
from codream.moments import Moments
from codream.optimisers import adam, applied, norm
from codream.ppo import Batch, Learner, gae, init_learners, observed, ppo_loss, ppo_optimiser
from codream.projection import (
    Imagined,
    Starts,
    World,
    draw_starts,
    imagine,
    model_without_gradient,
    projection_loss,
    straight_through_loss,
    symmetry_ratio,
    trajectories,
)
from codream.rollout import Rollout, flat

__all__ = ["Memory", "State", "act", "as_they_are", "first_update", "init", "init_memory", "learn", "observe", "update"]


LEAST_ACTING = 0.25
"""Share of a rollout's rows in which some agent acts, below which it is not learned from."""


class State(eqx.Module):
    """Everything that training needs to go on."""

    learners: Learner  # stacked on a leading agent axis
    optimiser: Any
    world_model: MarkovModel | None
    model_optimiser: Any
    curiosity: Curiosity | None
    rollout: Rollout
    returns: Moments  # of discounted returns, per agent: their scale
    running_return: Float[Array, "copies agents"]  # discounted, since the episode's start
    rewards: Moments  # of all agents' rewards together
    steps: Int[Array, ""]  # environment steps, over all copies
    updates: Int[Array, ""]
    spec: EnvSpec = eqx.field(static=True)

    def for_acting(self) -> State:
        """The state without what only training needs: rollout, optimisers, curiosity."""
        return eqx.tree_at(
            lambda s: (s.rollout, s.optimiser, s.model_optimiser, s.curiosity),
            self,
            (Rollout.empty(self.spec, 1, 1), None, None, None),
            is_leaf=lambda x: x is None,
        )


class Memory(eqx.Module):
    """The policies see the current observation only, so there is nothing to remember."""


def model_optimiser(config: Config) -> optax.GradientTransformation:
    """Adam after clipping, for the world model."""
    return adam(config.world_model.lr, config.world_model.clip)


def init(key: PRNGKeyArray, spec: EnvSpec, config: Config) -> State:
    """A fresh state. `config` must be resolved for `spec`."""
    learner_key, model_key, curiosity_key = jax.random.split(key, 3)
    projects = config.projection.coef > 0 and config.projection.gradient == "reinforce"
    learners, optimiser = init_learners(spec, config.ppo, learner_key, projects)
    model = MarkovModel(spec, config, model_key) if config.projection.coef > 0 else None
    zero = jnp.zeros((), jnp.int32)
    state = State(
        learners=learners,
        optimiser=optimiser,
        world_model=model,
        model_optimiser=None if model is None else model_optimiser(config).init(eqx.filter(model, eqx.is_array)),
        curiosity=init_curiosity(spec, config.curiosity, curiosity_key),
        rollout=Rollout.empty(spec, config.ppo.rollout, config.num_envs),
        returns=Moments.empty((spec.num_agents,)),
        running_return=jnp.zeros((config.num_envs, spec.num_agents)),
        rewards=Moments.empty(()),
        steps=zero,
        updates=zero,
        spec=spec,
    )
    # Every leaf a buffer of its own, so that drivers may donate the state.
    return jax.tree.map(lambda x: jnp.array(x) if eqx.is_array(x) else x, state)


def init_memory(state: State, copies: int, config: Config) -> Memory:
    """Memory before any episode."""
    del state, copies, config
    return Memory()


def act(
    state: State,
    memory: Memory,
    here: TimeStep,
    key: PRNGKeyArray,
    config: Config,
    *,
    collect: bool = True,
    greedy: bool = False,
) -> tuple[Int[Array, "copies agents"], Memory]:
    """Actions for every copy and agent. Agents play their current policies, while collecting too."""
    del config, collect
    mask = jnp.asarray(here.mask) & jnp.asarray(state.spec.action_valid)
    mask = jnp.where(mask.any(axis=-1, keepdims=True), mask, jnp.asarray(state.spec.action_valid))
    x = observed(state.spec, jnp.asarray(here.obs))
    log_probs = _each_agent(lambda learner, x, mask: jax.vmap(learner.log_probs)(x, mask), state.learners, x, mask)
    return jnp.argmax(log_probs, axis=-1) if greedy else sample_index(key, log_probs), memory


def _each_agent(function: Any, learners: Learner, *rows: Array) -> Array:
    """Every agent's own learner on its own rows [n, agents, …]."""
    return eqx.filter_vmap(function, in_axes=(0, *[1] * len(rows)), out_axes=1)(learners, *rows)


def as_they_are(memory: Memory) -> bool:
    """Every agent plays its current policy, in every copy."""
    del memory
    return True


def observe(state: State, here: TimeStep, action: Int[Array, "copies agents"], there: TimeStep) -> State:
    """Store one step of every copy, and count the environment steps (a reset is none)."""
    taken = jnp.sum(~jnp.asarray(here.last)).astype(jnp.int32)
    return eqx.tree_at(
        lambda s: (s.rollout, s.steps),
        state,
        (state.rollout.add(here, action, there), state.steps + taken),
    )


def first_update(spec: EnvSpec, config: Config) -> int:
    """Environment steps before the first update, at most: a rollout."""
    del spec
    return config.ppo.rollout * config.num_envs


updates_due = None  # nothing but the rollout tells, which is on the device


def update(state: State, key: PRNGKeyArray, config: Config) -> tuple[State, Metrics]:
    """Learn from the rollout when it is full."""
    params, static = eqx.partition(state, eqx.is_array)

    @jax.jit  # so that it is traced once, for the shapes and for the loop
    def learned(params: Any, key: PRNGKeyArray) -> tuple[Any, dict[str, Array]]:
        state, values = learn(eqx.combine(params, static), key, config)
        return eqx.filter(state, eqx.is_array), values

    zeros = zeros_like_result(learned, params, key)[1]
    # While copies wait for each other at a checkpoint, a rollout may hold little more than rows in which nobody acts.
    worth = jnp.mean(state.rollout.acting.any(axis=-1)) >= LEAST_ACTING
    count = (state.rollout.full & worth).astype(jnp.int32)
    # A loop of one turn or none: unlike a branch it stays one where several seeds are mapped over.
    params, values = jax.lax.fori_loop(0, count, lambda _, carry: learned(carry[0], key), (params, zeros))
    state = eqx.combine(params, static)
    dropped = state.rollout.full  # and with it where episodes ended
    state = eqx.tree_at(
        lambda s: (s.rollout.filled, s.running_return),
        state,
        (jnp.where(dropped, 0, state.rollout.filled), jnp.where(dropped, 0.0, state.running_return)),
    )
    return state, {name: (x, count) for name, x in values.items()}


# ------------------------------------------------------------------------------------------ learning


def learn(state: State, key: PRNGKeyArray, config: Config) -> tuple[State, dict[str, Array]]:
    """World model, agents and curiosity learn from a full rollout, which is then emptied. Metrics by name."""
    model_key, starts_key, imagine_key, agents_key, curiosity_key = jax.random.split(key, 5)
    state = _scaled(state, config)
    state, batch, metrics = _judged(state, config)
    projected, dreamt = None, {}
    if state.world_model is not None:
        count = max(1, round(config.ppo.rollout * config.num_envs / config.world_model_every))
        state, sums = repeat(train_model, state, count, model_key, config)
        assert state.world_model is not None
        obs, seen = state.rollout.obs.reshape(-1, *state.spec.obs_shape), state.rollout.seen.reshape(-1)
        code = code_measures(state.world_model, obs, seen, model_key)
        sums = {name: total / count for name, total in sums.items()} | code
        metrics |= {f"world_model/{name}": x for name, x in sums.items()}
        world = imagined_world(state, config)
        metrics["symmetry_ratio"] = world.alpha
        projected = draw_starts(state.rollout, state.spec, starts_key, config)
        if config.projection.gradient == "reinforce":
            projected, dreamt = imagine(state.learners, world, projected, imagine_key, config)
    state, sums = repeat(train_agents, state, config.ppo.epochs, agents_key, batch, projected, config)
    each = config.ppo.epochs * config.ppo.minibatches
    per_agent = {name: total / each for name, total in sums.items()} | dreamt | {"return_scale": state.returns.scale}
    if "imagined_reward" in per_agent:
        per_agent["imagined_reward"] *= state.rewards.scale
    for i, agent in enumerate(state.spec.agents):
        metrics |= {f"agent/{agent}/{name}": x[i] for name, x in per_agent.items()}
    if state.curiosity is not None:
        state, total = repeat(_train_curiosity, state, config.ppo.epochs, curiosity_key, config)
        metrics["curiosity/loss"] = total / each
    done = eqx.tree_at(lambda s: (s.rollout, s.updates), state, (state.rollout.emptied(), state.updates + 1))
    return done, metrics


def _scaled(state: State, config: Config) -> State:
    """Take the rollout's rewards into the scales of rewards and of discounted returns."""
    rollout = state.rollout

    def forward(total: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, acting = row
        total = jnp.where(acting, config.ppo.gamma * total + reward, 0.0)
        return total, total

    running, totals = jax.lax.scan(forward, state.running_return, (rollout.reward, rollout.acting))
    return eqx.tree_at(
        lambda s: (s.running_return, s.returns, s.rewards),
        state,
        (
            running,
            state.returns.seen(flat(totals), flat(rollout.acting)),
            state.rewards.seen(rollout.reward.reshape(-1), rollout.acting.reshape(-1)),
        ),
    )


def _judged(state: State, config: Config) -> tuple[State, Batch, dict[str, Array]]:
    """The rollout with advantages and log-probabilities under the policies that acted, as [n, agents, …]."""
    rollout, spec, ppo = state.rollout, state.spec, config.ppo
    x = observed(spec, rollout.every_obs)
    mask = flat(rollout.allowed(spec))
    values = _each_agent(lambda learner, x: jax.vmap(learner.value)(x), state.learners, flat(x))
    values = values.reshape(rollout.rows + 1, *rollout.action.shape[1:])
    log_probs = _each_agent(
        lambda learner, x, mask: jax.vmap(learner.log_probs)(x, mask), state.learners, flat(x[:-1]), mask
    )
    reward, metrics = rollout.reward / state.returns.scale, {}
    if state.curiosity is not None:
        state, intrinsic = _intrinsic(state, config)
        reward = reward + config.curiosity.coef * intrinsic
        count = jnp.maximum(jnp.sum(rollout.acting, axis=(0, 1)), 1)
        for i, agent in enumerate(spec.agents):
            metrics[f"agent/{agent}/intrinsic_reward"] = jnp.sum(intrinsic[..., i]) / count[i]
    advantage = jax.vmap(
        jax.vmap(lambda r, v, t, a: gae(r, v, t, a, ppo.gamma, ppo.lam), in_axes=1, out_axes=1),
        in_axes=2,
        out_axes=2,
    )(reward, values, rollout.terminal, rollout.acting)
    chosen = jnp.take_along_axis(log_probs, flat(rollout.action)[..., None], axis=-1)[..., 0]
    batch = Batch(
        x=flat(x[:-1]),
        mask=mask,
        action=flat(rollout.action),
        acting=flat(rollout.acting),
        log_prob=chosen,
        advantage=flat(advantage),
        target=flat(advantage + values[:-1]),
    )
    return state, batch, metrics


def _intrinsic(state: State, config: Config) -> tuple[State, Float[Array, "rows copies agents"]]:
    """Normalised intrinsic rewards for the observations that the rollout's steps led to."""
    assert state.curiosity is not None
    rollout = state.rollout
    nexts, acting = rollout.every_obs[1:], rollout.acting
    curiosity = see(state.curiosity, flat(nexts), flat(acting))
    error = errors(curiosity, flat(nexts), config.curiosity).reshape(acting.shape)
    intrinsic, curiosity = bonus(curiosity, error, acting, config.ppo.gamma)
    return eqx.tree_at(lambda s: s.curiosity, state, curiosity), intrinsic


def _train_curiosity(state: State, key: PRNGKeyArray, config: Config) -> tuple[State, Array]:
    """One pass of the predictors over the rollout, and the sum of the errors."""
    assert state.curiosity is not None
    rollout, parts = state.rollout, config.ppo.minibatches
    nexts, acting = flat(rollout.every_obs[1:]), flat(rollout.acting)
    places = jax.random.permutation(key, len(acting)).reshape(parts, -1)
    params, static = eqx.partition(state.curiosity, eqx.is_array)

    def body(params: Any, at: Array) -> tuple[Any, Array]:
        curiosity, loss = train_curiosity(eqx.combine(params, static), nexts[at], acting[at], config.curiosity)
        return eqx.filter(curiosity, eqx.is_array), loss

    params, losses = jax.lax.scan(body, params, places)
    return eqx.tree_at(lambda s: s.curiosity, state, eqx.combine(params, static)), jnp.sum(losses)


def train_model(state: State, key: PRNGKeyArray, config: Config) -> tuple[State, dict[str, Array]]:
    """One update of the world model on random steps of the rollout, each as every agent saw it."""
    assert state.world_model is not None
    draw_key, loss_key = jax.random.split(key)
    spec, rollout = state.spec, state.rollout
    rows = max(1, config.world_model.batch * config.world_model.length // spec.num_agents)
    at = jax.random.randint(draw_key, (rows,), 0, rollout.rows * rollout.action.shape[1])
    batch = transitions(rollout, at, state.rewards.scale, spec)
    (loss, parts), grads = eqx.filter_value_and_grad(markov_loss, has_aux=True)(
        state.world_model, batch, loss_key, config
    )
    updates, optimiser = model_optimiser(config).update(grads, state.model_optimiser)
    model, ratio = applied(state.world_model, updates)
    state = eqx.tree_at(lambda s: (s.world_model, s.model_optimiser), state, (model, optimiser))
    sizes = {"grad_norm": norm(grads), "update_ratio": ratio}
    return state, {"loss": loss, **parts, **sizes}


def imagined_world(state: State, config: Config) -> World:
    """In which agents imagine now."""
    assert state.world_model is not None
    return World(
        model_without_gradient(state.world_model),
        symmetry_ratio(state.steps, config),
        state.rewards.scale / state.returns.scale,
    )


def train_agents(
    state: State, key: PRNGKeyArray, batch: Batch, projected: Imagined | Starts | None, config: Config
) -> tuple[State, dict[str, Array]]:
    """One pass over the rollout, and over what is or will be imagined from it, in minibatches, drawn for every agent
    by itself. Metrics are summed over minibatches and have an agent axis."""
    agents, parts = state.spec.num_agents, config.ppo.minibatches
    world = imagined_world(state, config) if isinstance(projected, Starts) else None
    real_key, projected_key, key = jax.random.split(key, 3)

    def shuffled(key: PRNGKeyArray, size: int) -> Int[Array, "parts agents n"]:
        places = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, agents))
        return jnp.swapaxes(places.reshape(agents, parts, size // parts), 0, 1)

    def body(carry: Any, xs: tuple[Array, Array | None, Array]) -> tuple[Any, dict[str, Array]]:
        at, projected_at, key = xs
        rows = lambda x, at: jax.tree.map(lambda x: x[at], x)  # noqa: E731
        mine = jax.vmap(rows, in_axes=(1, 0))(batch, at)
        some = None if projected is None else jax.vmap(rows)(projected, projected_at)
        one = lambda learner, optimiser, mine, some, focal, key: _improve(  # noqa: E731
            learner, optimiser, mine, some, focal, world, config, key
        )
        learners, optimiser = carry
        learners, optimiser, metrics = eqx.filter_vmap(one)(
            eqx.combine(learners, static), optimiser, mine, some, jnp.arange(agents), jax.random.split(key, agents)
        )
        return (eqx.filter(learners, eqx.is_array), optimiser), metrics

    params, static = eqx.partition(state.learners, eqx.is_array)
    places = shuffled(real_key, len(batch.acting))
    projected_places = None if projected is None else shuffled(projected_key, jax.tree.leaves(projected)[0].shape[1])
    rows = (places, projected_places, jax.random.split(key, parts))
    (params, optimiser), metrics = jax.lax.scan(body, (params, state.optimiser), rows)
    trained = eqx.tree_at(lambda s: (s.learners, s.optimiser), state, (eqx.combine(params, static), optimiser))
    return trained, {name: jnp.sum(x, axis=0) for name, x in metrics.items()}


def _improve(
    learner: Learner,
    optimiser: Any,
    batch: Batch,
    projected: Imagined | Starts | None,
    focal: Int[Array, ""],
    world: World | None,
    config: Config,
    key: PRNGKeyArray,
) -> tuple[Learner, Any, dict[str, Array]]:
    """One gradient step of one agent on PPO's loss and that of self-projection: on what was imagined, or straight
    through what it imagines now from `Starts` in `world`."""

    def loss(learner: Learner) -> tuple[Array, dict[str, Array]]:
        total, metrics = ppo_loss(learner, batch, config.ppo)
        if projected is None:
            return total, metrics
        if isinstance(projected, Imagined):
            more, measures = projection_loss(learner, projected, config)
        else:
            assert world is not None
            dreams = trajectories(learner, world, projected, focal, key, config)
            more, measures = straight_through_loss(dreams, projected.valid, world.scale[focal], config)
        return total + more, metrics | measures

    (_, metrics), grads = eqx.filter_value_and_grad(loss, has_aux=True)(learner)
    updates, optimiser = ppo_optimiser(config.ppo).update(grads, optimiser)
    learner, ratio = applied(learner, updates)
    metrics |= {"grad_norm": norm(grads), "update_ratio": ratio}
    return learner, optimiser, metrics
