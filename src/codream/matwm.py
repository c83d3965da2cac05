"""MATWM: init, act, observe, update (Deihim, Alonso and Apostolopoulou 2025, arXiv:2506.18537, Algorithm 2).

Pure functions over one typed state; `first_update` and `updates_due` a host may ask as well. The drivers know nothing
else about the algorithm.
"""

from __future__ import annotations

from collections.abc import Hashable
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from codream.actor_critic import Actor, Agents, improve, init_agents, log_policy
from codream.config import Config, WorldModelConfig
from codream.curiosity import Curiosity, bonus, errors, init_curiosity, see, train_curiosity
from codream.envs import EnvSpec, TimeStep
from codream.imagination import Dream, dream
from codream.latents import sample_index
from codream.linear import lowered
from codream.mesh import everywhere, on_shares, total
from codream.metrics import Metrics, repeat
from codream.optimisers import applied, clip, norm
from codream.pieces import mapped, one_by_one, pieces
from codream.players import CURRENT, RANDOM, Past, draw_players, past_log_probs, snapshot
from codream.replay import Replay, sample_recent, sample_starts, sequences
from codream.world_model import Hidden, Sequence, WorldModel, world_model_loss

__all__ = [
    "Memory",
    "Metrics",
    "State",
    "act",
    "as_they_are",
    "first_update",
    "init",
    "init_memory",
    "observe",
    "update",
    "updates_due",
]


N = TypeVar("N", int, Int[Array, ""])

TRAJECTORIES = 512
"""Trajectories imagined at once on a CPU: what attention remembers of them stays in its cache."""


class State(eqx.Module):
    """Everything that training needs to go on."""

    world_model: WorldModel
    optimiser: Any
    agents: Agents
    past: Past | None
    replay: Replay
    steps: Int[Array, ""]  # environment steps, over all copies
    due_from: Int[Array, ""]  # steps already looked at by `update`
    world_model_updates: Int[Array, ""]
    agents_updates: Int[Array, ""]
    curiosity: Curiosity | None = None

    @property
    def spec(self) -> EnvSpec:
        return self.world_model.spec

    def for_acting(self) -> State:
        """The state without what only training needs: replay, optimisers, curiosity."""
        return eqx.tree_at(
            lambda s: (s.replay, s.optimiser, s.agents.optimiser, s.curiosity),
            self,
            (Replay.empty(self.spec, 1, 1), None, None, None),
            is_leaf=lambda x: x is None,
        )


class Memory(eqx.Module):
    """What the acting agents remember, per copy and agent; and who plays for whom (see `PartnerConfig`)."""

    hidden: Hidden
    player: Int[Array, "copies agents"]  # by number, see `codream.players`


def world_model_optimiser(config: WorldModelConfig) -> optax.GradientTransformation:
    """Adam after clipping; the outcome heads may have a learning rate of their own."""
    outcome_lr = config.lr if config.outcome_lr is None else config.outcome_lr
    rates: dict[Hashable, optax.GradientTransformation] = {
        "outcome": optax.adam(outcome_lr),
        "rest": optax.adam(config.lr),
    }

    def labels(model: Any) -> Any:
        rest = jax.tree.map(lambda _: "rest", model)
        outcome = jax.tree.map(lambda _: "outcome", (model.reward, model.cont))
        return eqx.tree_at(lambda m: (m.reward, m.cont), rest, outcome)

    return optax.chain(clip(config.clip), optax.multi_transform(rates, labels))


def init(key: PRNGKeyArray, spec: EnvSpec, config: Config) -> State:
    """A fresh state. `config` must be resolved for `spec`."""
    model_key, agents_key = jax.random.split(key)
    curiosity_key = jax.random.fold_in(key, 2)
    model = WorldModel(spec, config.world_model, model_key)
    coded = config.world_model.latent == "categorical"
    agents = init_agents(
        spec.num_agents, model.features_size, spec.max_actions, config.agents, agents_key, norm_first=coded
    )
    partners = config.partners
    past = Past.empty(agents.actor, partners.past_kept) if partners.past_share > 0 else None
    zero = jnp.zeros((), jnp.int32)
    state = State(
        world_model=model,
        optimiser=world_model_optimiser(config.world_model).init(eqx.filter(model, eqx.is_array)),
        agents=agents,
        past=past,
        replay=Replay.empty(spec, config.replay_rows, config.num_envs),
        steps=zero,
        due_from=zero,
        world_model_updates=zero,
        agents_updates=zero,
        curiosity=init_curiosity(spec, config.curiosity, curiosity_key),
    )
    # Every leaf a buffer of its own, so that drivers may donate the state.
    return jax.tree.map(lambda x: jnp.array(x) if eqx.is_array(x) else x, state)


def init_memory(state: State, copies: int, config: Config) -> Memory:
    """Memory before any episode; attention reaches as far back as a training sequence is long."""
    model = state.world_model
    agents = model.spec.num_agents
    empty = lambda _: model.empty(config.world_model.length)  # noqa: E731
    axes = Hidden.axes(model)
    hidden = jax.vmap(jax.vmap(empty, out_axes=axes), out_axes=axes)(jnp.zeros((copies, agents)))
    return Memory(hidden, jnp.zeros((copies, agents), jnp.int32))


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
    """Actions for every copy and agent.

    `collect`: as in training, with warm-up and partners; otherwise every agent plays its current policy.
    """
    model = state.world_model
    spec = model.spec
    player_key, encode_key, act_key, _random_key = jax.random.split(key, 4)
    copies = here.first.shape[0]
    axes = Hidden.axes(model)
    each = lambda f, i, o: jax.vmap(jax.vmap(f, i, o), i, o)  # noqa: E731

    hidden = memory.hidden
    # Positions are relative, so they may start again whenever no copy remembers anything.
    restart = jnp.all(here.first)
    hidden = eqx.tree_at(
        lambda m: [c.position for c in (m.dynamics, m.team) if c is not None],
        hidden,
        replace_fn=lambda p: jnp.where(restart, 0, p),
    )
    hidden = each(Hidden.cleared, (axes, 0), axes)(hidden, jnp.repeat(here.first[:, None], spec.num_agents, 1))

    keys = jax.random.split(encode_key, (copies, spec.num_agents))
    z, _ = each(model.representation.posterior, (0, 0), 0)(here.obs, keys)
    focal = jnp.broadcast_to(jnp.arange(spec.num_agents), (copies, spec.num_agents))
    s, hidden = each(model.features, (0, 0, axes), (0, axes))(z, focal, hidden)
    mask = jnp.asarray(here.mask) & jnp.asarray(spec.action_valid)
    mask = jnp.where(mask.any(axis=-1, keepdims=True), mask, jnp.asarray(spec.action_valid))

    swap = lambda x: jnp.swapaxes(x, 0, 1)  # noqa: E731
    log_probs = swap(log_policy(state.agents.actor, swap(s), swap(mask)))
    player = memory.player
    if collect:
        sides = spec.sides
        player = draw_players(state.past, player, jnp.asarray(here.first), sides, config.partners, player_key)
        if state.past is not None:
            log_probs = past_log_probs(state.past, player, swap(s), swap(mask), log_probs)
        at_random = (player == RANDOM) | (state.steps < config.warmup)
        uniform = jnp.where(mask, 0.0, -1e9)
        log_probs = jnp.where(at_random[..., None], uniform, log_probs)
    action = jnp.argmax(log_probs, axis=-1) if greedy else sample_index(act_key, log_probs)
    hidden = each(model.act, (0, 0, 0, axes), axes)(z, action, focal, hidden)
    # Who is not there yet remembers nothing of it, as in training.
    hidden = each(Hidden.cleared, (axes, 0), axes)(hidden, ~jnp.asarray(here.acting))
    return action, Memory(hidden, player)


def as_they_are(memory: Memory) -> Bool[Array, " copies"]:
    """In which copies every agent plays its current policy, not a random or an earlier one."""
    return jnp.all(memory.player == CURRENT, axis=-1)


def observe(state: State, here: TimeStep, action: Int[Array, "copies agents"], there: TimeStep) -> State:
    """Store one step of every copy, and count the environment steps (a reset is none)."""
    taken = jnp.sum(~jnp.asarray(here.last)).astype(jnp.int32)
    return eqx.tree_at(
        lambda s: (s.replay, s.steps),
        state,
        (state.replay.add(here, action, there), state.steps + taken),
    )


def first_update(spec: EnvSpec, config: Config) -> int:
    """Environment steps before the first update, at most: the warm-up, and as many as a first batch needs."""
    share = config.world_model.batch // spec.num_agents
    rows = 2 * config.world_model.length * -(-share // config.num_envs)
    return max(config.warmup, min(rows, config.replay_rows) * config.num_envs)


def updates_due(steps: N, due_from: N, filled: N, spec: EnvSpec, config: Config) -> tuple[N, N]:
    """Updates of the world model and of the agents that the steps from `due_from` to `steps` have bought, with
    `filled` rows in the replay buffer. Of integers as of arrays, so a host can know them without the device."""
    share = config.world_model.batch // spec.num_agents
    # Enough for as many disjoint windows as any draw can ask for.
    room = config.num_envs * (filled // (2 * config.world_model.length)) >= share
    room = room | (filled >= config.replay_rows)
    ready = (steps >= config.warmup) & room

    def bought(every: float) -> N:
        # In integers, as a float32 counts only to 16 million.
        apart, updates = Fraction(every).limit_denominator(1000).as_integer_ratio()
        until = lambda n: n // apart * updates + n % apart * updates // apart  # noqa: E731
        return ready * (until(steps) - until(due_from))

    return bought(config.world_model_every), bought(config.agents_every)


def train_world_model(state: State, key: PRNGKeyArray, config: Config) -> tuple[State, dict[str, Array]]:
    """One update of the shared world model on a batch with an equal share of every agent's sequences."""
    spec, length = state.world_model.spec, config.world_model.length
    share = config.world_model.batch // spec.num_agents
    decay = 1.0 if config.replay.uniform else config.replay.decay
    draw_key, loss_key = jax.random.split(key)
    age, copy = jax.vmap(lambda k: sample_recent(state.replay, share, length, decay, k))(
        jax.random.split(draw_key, spec.num_agents)
    )
    focal = jnp.repeat(jnp.arange(spec.num_agents), share)
    batch = sequences(state.replay, age.reshape(-1), copy.reshape(-1), focal, length)

    def gradients(model: WorldModel, share: tuple[Sequence, Array]) -> tuple[Any, Array, dict[str, Array]]:
        def loss_of(model: WorldModel) -> tuple[Array, dict[str, Array]]:
            return world_model_loss(lowered(model, config.precision), *share, lambda x: total(x, config.devices))

        (loss, parts), grads = eqx.filter_value_and_grad(loss_of, has_aux=True)(model)
        return *total((eqx.filter(grads, eqx.is_array), loss), config.devices), parts

    shares = (batch, jax.random.split(loss_key, len(focal)))
    grads, loss, parts = on_shares(gradients, config.devices, state.world_model, shares, axis=0)
    updates, optimiser = world_model_optimiser(config.world_model).update(grads, state.optimiser)
    model, ratio = applied(state.world_model, updates)
    state = eqx.tree_at(
        lambda s: (s.world_model, s.optimiser, s.world_model_updates),
        state,
        (model, optimiser, state.world_model_updates + 1),
    )
    state, curious = _seen(state, batch, config)
    sizes = {"grad_norm": norm(grads), "update_ratio": ratio}
    return everywhere(state, config.devices), {"loss": loss, **parts, **curious, **sizes}


def imagine_for_agents(state: State, key: PRNGKeyArray, config: Config) -> Dream:
    """Trajectories that every agent imagines with its current policy, from uniformly drawn real contexts."""
    model, actor = lowered((state.world_model, state.agents.actor), config.precision, frozen=True)
    settings = config.agents
    assert settings.starts is not None
    assert settings.horizon is not None
    start_key, dream_key = jax.random.split(key)

    def contexts(agent: Array, key: PRNGKeyArray) -> Any:
        assert settings.starts is not None
        age, copy = sample_starts(state.replay, agent, settings.starts, key)
        focal = jnp.full(settings.starts, agent)
        return sequences(state.replay, age + settings.context - 1, copy, focal, settings.context)

    agents, horizon = model.spec.num_agents, settings.horizon
    context = jax.vmap(contexts)(jnp.arange(agents), jax.random.split(start_key, agents))
    keys = jax.random.split(dream_key, (agents, settings.starts))

    def imagine(nets: tuple[WorldModel, Actor], share: tuple[Sequence, Array]) -> Dream:
        model, actor = nets
        policy = lambda s, mask: log_policy(actor, s, mask)  # noqa: E731
        count = pieces(share[1].shape[1], max(1, TRAJECTORIES // agents))
        return mapped(lambda piece: dream(model, policy, piece[0], horizon, piece[1]), count, share, axis=1)

    return on_shares(imagine, config.devices, (model, actor), (context, keys), axis=1, out=1)


def train_agents(state: State, key: PRNGKeyArray, config: Config) -> tuple[State, dict[str, Array]]:
    """One update of every agent's actor and critic on imagined trajectories. Metrics have an agent axis."""
    count = state.agents_updates + 1
    imagined = imagine_for_agents(state, key, config)
    intrinsic, curiosity = _imagined_bonus(state, imagined, config)
    if intrinsic is not None:
        imagined = eqx.tree_at(lambda d: d.reward, imagined, imagined.reward + config.curiosity.coef * intrinsic)
    trained, metrics = improve(state.agents, imagined, count, config.agents, config.precision, config.devices)
    if intrinsic is not None:
        metrics["intrinsic_reward"] = jnp.mean(intrinsic, axis=(1, 2))
        state = eqx.tree_at(lambda s: s.curiosity, state, curiosity)
    state = eqx.tree_at(lambda s: (s.agents, s.agents_updates), state, (trained, count))
    return everywhere(state, config.devices), metrics


def _imagined_bonus(
    state: State, imagined: Dream, config: Config
) -> tuple[Float[Array, "agents starts horizon"] | None, Curiosity | None]:
    """Intrinsic rewards of imagined steps, for the decoded observations that they lead to.

    Curiosity enters here and not in the stored reward, so that the world model learns the game's own reward, and
    what is rewarded is what is new now instead of when it was stored.
    """
    curiosity, spec = state.curiosity, state.spec
    if curiosity is None:
        return None, None
    decode = jax.vmap(jax.vmap(state.world_model.representation.decode))
    error_of = partial(errors, curiosity, config=config.curiosity)

    def after(latent: Any) -> Float[Array, "starts agents"]:
        """Errors at one imagined step of all trajectories."""
        obs = decode(latent)
        if not spec.is_image:
            obs = jnp.where(jnp.asarray(spec.obs_valid)[:, None], obs, 0.0)
        return error_of(jnp.swapaxes(obs, 0, 1))

    later = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 1:], 2, 0), imagined.latent)
    error = one_by_one(after, later, spec.is_image)
    reward, curiosity = bonus(curiosity, error, jnp.ones(error.shape, bool), config.agents.gamma)
    return jnp.moveaxis(reward, (0, 2), (2, 0)), curiosity


def _seen(state: State, batch: Sequence, config: Config) -> tuple[State, dict[str, Array]]:
    """One update of the predictors of curiosity on every observation in a world-model batch that its agent saw: the
    last of an episode too, since the bonus is for what steps lead to and it would stay new for ever."""
    if state.curiosity is None:
        return state, {}
    # An equal share of the batch is each agent's, in order.
    by_agent = lambda x: jnp.swapaxes(x.reshape(state.spec.num_agents, -1, *x.shape[2:]), 0, 1)  # noqa: E731
    obs, seen = by_agent(batch.obs), by_agent(jax.vmap(lambda s: s.seen)(batch))
    curiosity, loss = train_curiosity(see(state.curiosity, obs, seen), obs, seen, config.curiosity)
    return eqx.tree_at(lambda s: s.curiosity, state, curiosity), {"curiosity": loss}


def update(
    state: State, key: PRNGKeyArray, config: Config, due: tuple[int, int] | None = None
) -> tuple[State, Metrics]:
    """All updates that the environment steps since the last call have bought. `due`: how many, where that is known."""
    model_key, agents_key = jax.random.split(key)
    model_due, agents_due = due or updates_due(state.steps, state.due_from, state.replay.filled, state.spec, config)
    state, model_sums = repeat(train_world_model, state, model_due, model_key, config)
    state, agent_sums = repeat(train_agents, state, agents_due, agents_key, config)
    model_count, agents_count = jnp.asarray(model_due), jnp.asarray(agents_due)
    metrics: Metrics = {f"world_model/{name}": (sums, model_count) for name, sums in model_sums.items()}
    for i, agent in enumerate(state.world_model.spec.agents):
        for name, sums in agent_sums.items():
            metrics[f"agent/{agent}/{name}"] = (sums[i], agents_count)
    if state.past is not None:
        trained = state.agents_updates > 0
        past = snapshot(state.past, state.agents.actor, state.due_from, state.steps, trained, config.partners)
        state = eqx.tree_at(lambda s: s.past, state, past)
    state = eqx.tree_at(lambda s: s.due_from, state, state.steps)
    return state, metrics
