"""The two drivers: a host loop around Python environments, an in-graph scan around JAX ones.

Both call the same `choose` and `learn`, so they share every line of the algorithm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from codream.algorithms import algorithm
from codream.compiled import Compiled, quick_jit
from codream.config import Config, ConfigError
from codream.envs import EnvironmentFailure, EnvSpec, GraphEnv, HostEnv, TimeStep
from codream.envs.answers import check_answer
from codream.guards import TimeLimit
from codream.health import checks, summed
from codream.hosts import is_first
from codream.mesh import placed
from codream.metrics import Sums
from codream.reading import flat

__all__ = ["GraphDriver", "HostDriver", "Runner", "choose", "common_reward", "driver_for", "learn"]


class Runner(eqx.Module):
    """A run in progress, and all of it: this is what a checkpoint holds."""

    state: Any  # see `codream.algorithms.State`
    memory: Any  # what acting agents remember, as the algorithm has it
    here: TimeStep  # where every copy of the environment stands
    env_state: Any  # of an in-graph environment; None on the host
    episode_return: Float[Array, "copies agents"]
    key: PRNGKeyArray


class Choice(eqx.Module):
    """What `choose` hands to the environment and to `learn`."""

    action: Int[Array, "copies agents"]
    memory: Any
    env_keys: Key[Array, " copies"]  # one for each copy
    update_key: PRNGKeyArray
    key: PRNGKeyArray


def choose(state: Any, memory: Any, here: TimeStep, key: PRNGKeyArray, config: Config) -> Choice:
    """Act in every copy, and split the key for what follows."""
    key, act_key, env_key, update_key = jax.random.split(key, 4)
    action, memory = algorithm(config).act(state, memory, here, act_key, config)
    return Choice(action, memory, jax.random.split(env_key, len(action)), update_key, key)


def common_reward(here: TimeStep, there: TimeStep) -> TimeStep:
    """`there` with every agent paid the sum of what all who acted in `here` earned."""
    total = jnp.sum(jnp.where(here.acting, there.reward, 0.0), axis=-1, keepdims=True)
    return eqx.tree_at(lambda t: t.reward, there, jnp.broadcast_to(total, there.reward.shape))


def learn(
    state: Any,
    episode_return: Float[Array, "copies agents"],
    here: TimeStep,
    choice: Choice,
    there: TimeStep,
    config: Config,
    due: tuple[int, int] | None = None,
) -> tuple[Any, Float[Array, "copies agents"], Sums]:
    """Observe the step that was taken, then make every update that is due (`due`, where the host knows it).

    Gives what it changes of a runner: what it only handed on, a device would copy.
    """
    learner = algorithm(config)
    paid = common_reward(here, there) if config.common_reward else there
    state = learner.observe(state, here, choice.action, paid)
    state, metrics = learner.update(state, choice.update_key, config, *([] if due is None else [due]))
    metrics |= checks(state.spec, here, there)
    # A step that resets carries no reward; the first step of an episode starts the sum anew.
    total = jnp.where(here.first[:, None], 0.0, episode_return)
    total = total + jnp.where(here.acting, there.reward, 0.0)
    ended = jnp.asarray(there.last) & ~jnp.asarray(here.last)
    ended = ended & learner.as_they_are(choice.memory)  # what random or earlier players earn says nothing of these
    count = jnp.sum(ended)
    for i, agent in enumerate(state.spec.agents):
        metrics[f"episode/return/{agent}"] = (jnp.sum(jnp.where(ended, total[:, i], 0.0)), count)
    return state, total, Sums.of(metrics)


def _start(key: PRNGKeyArray, spec: EnvSpec, config: Config) -> tuple[Any, Any, Float[Array, "copies agents"]]:
    learner = algorithm(config)
    state = learner.init(key, spec, config)
    memory = learner.init_memory(state, config.num_envs, config)
    return state, memory, jnp.zeros((config.num_envs, spec.num_agents))


# As one program: run piece by piece, a fresh state compiles dozens of small ones.
_compiled_start = quick_jit(_start)


@jax.jit
@jax.vmap
def _seeds(key: Key[Array, ""]) -> Int[Array, ""]:
    """What host environments are reset with."""
    return jax.random.randint(key, (), 0, 2**31 - 1)


@lru_cache(maxsize=2)
def _host_programs(config: Config, backend: str) -> tuple[Compiled, Callable[[tuple[int, int] | None], Compiled]]:
    """`choose`, and `learn` by what is due, compiled. They are kept, so that a process which trains again, with another
    seed or from a checkpoint, need not trace them anew. (What is traced also depends on the backend.)"""

    def chosen(state: Any, memory: Any, here: TimeStep, key: PRNGKeyArray) -> tuple[Choice, Any]:
        choice = choose(state, memory, here, key, config)
        return choice, (choice.action, _seeds(choice.env_keys))

    @cache
    def learner(due: tuple[int, int] | None) -> Compiled:
        # The state's buffers are reused for the next one, replay included.
        return Compiled(partial(learn, config=config, due=due), donate=(0, 1))

    return Compiled(chosen), learner


class HostDriver:
    """Steps Python environments between two compiled functions; the runner stays on the device."""

    def __init__(self, env: HostEnv, config: Config):
        self.env, self.config, self.spec = env, config, env.spec
        # Other hosts wait for the first, also while it saves or plays; it tells them where its environment hangs.
        self._limit = TimeLimit(config.env_time_limit if is_first() else 0.0, EnvironmentFailure)
        self._resting = True  # no episode is running, so the next step starts one in every copy
        self._holding = False  # copies whose episode has ended wait for the others
        self._chosen: tuple[Choice, Any] | None = None  # for the next step already, see `config.async_collect`
        self._steps: int | None = None  # counted here, so that nobody waits for the device to know them
        self._filled = 0  # rows of the replay buffer, likewise
        self._last = np.zeros(0, bool)
        self._looked_at: set[str] = set()  # of reset and step, whose first answer was
        # On a CPU asking costs nothing, and compiling much.
        self.counts_updates = jax.default_backend() != "cpu" and algorithm(config).updates_due is not None
        self._choose, learner = _host_programs(config.for_programs(), jax.default_backend())
        self._learn = lambda due, *given: learner(due)(*given)

    def start(self, key: PRNGKeyArray) -> Runner:
        """A new runner. Raises ConfigError where the configuration is not resolved for the environment."""
        _refuse_unresolved(self.config, self.spec)
        init_key, env_key, key = jax.random.split(key, 3)
        state, memory, returns = _compiled_start(init_key, self.spec, self.config.for_programs())
        seeds = np.asarray(_seeds(jax.random.split(env_key, self.config.num_envs)))
        with self._limit(f"reset of {self.spec.name}"):
            here = self.env.reset(seeds)
        self._look_at(here, "reset")
        self._new(resting=False)
        return Runner(state, memory, jax.device_put(here, may_alias=False), None, returns, key)

    def advance(self, runner: Runner) -> tuple[Runner, Sums]:
        """One step of all copies, and the updates it buys. `runner` is used up.

        With a new environment `runner` must be `whole`: its copies are reset, as they would have been anyway. With
        `config.async_collect` the next actions are chosen before the device begins to learn from this step: it learns
        while the environment takes the next one.
        """
        if self._resting and not self.whole(runner):
            raise ValueError("a run on a host environment can only go on from where all its copies' episodes end")
        choice, wanted = self._chosen or self._choose(runner.state, runner.memory, runner.here, runner.key)
        if self._steps is None:
            self._count(runner)
        action, seeds = jax.device_get(wanted)
        call = "reset" if self._resting else "step"
        with self._limit(f"{call} of {self.spec.name}"):
            there = self.env.reset(seeds) if self._resting else self.env.step(action, seeds)
        self._look_at(there, call)
        self._resting = False
        if self._holding:
            there = self._held(there)
        due = self._stepped(there)
        there = placed(jax.device_put(there, may_alias=False), self.config.devices)  # as the runner is
        if self.config.async_collect:
            self._chosen = self._choose(runner.state, choice.memory, there, choice.key)
        state, total, metrics = self._learn(due, runner.state, runner.episode_return, runner.here, choice, there)
        return Runner(state, choice.memory, there, None, total, choice.key), metrics

    def _look_at(self, answer: TimeStep, call: str) -> None:
        """Refuse an environment whose first answer is not of the shapes that its spec says."""
        if call not in self._looked_at:
            check_answer(answer, self.spec, self.config.num_envs, call)
            self._looked_at.add(call)

    def _count(self, runner: Runner) -> None:
        """Where `runner` is, from which the host goes on counting."""
        filled = runner.state.replay.filled if self.counts_updates else 0
        steps, filled, self._last = jax.device_get((runner.state.steps, filled, runner.here.last))
        self._steps, self._filled = int(steps), int(filled)

    def _stepped(self, there: TimeStep) -> tuple[int, int] | None:
        """Count a step of all copies. Gives the updates it buys where they are always as many, or none: a program that
        need not ask for their number, which stops a GPU twice. Any other number would be a program more."""
        before, config = self._steps or 0, self.config
        self._steps, self._last = before + int(np.sum(~self._last)), np.asarray(there.last)
        self._filled = min(self._filled + 1, config.replay_rows)
        counted = algorithm(config).updates_due
        if not self.counts_updates or counted is None:
            return None
        due = counted(self._steps, before, self._filled, self.spec, config)
        always = config.num_envs / config.world_model_every, config.num_envs / config.agents_every
        return due if due in ((0, 0), always) and all(n.is_integer() for n in always) else None

    def steps(self, runner: Runner) -> int:
        """Environment steps that `runner`, the latest, has done."""
        return int(runner.state.steps) if self._steps is None else self._steps

    def _new(self, *, resting: bool) -> None:
        """The next runner is not the one that `advance` gave last."""
        self._resting, self._holding, self._chosen, self._steps = resting, False, None, None

    def run(self, runner: Runner) -> Iterator[tuple[Runner, Sums]]:
        """Yield the runner and its metrics after every step of all copies."""
        while True:
            runner, metrics = self.advance(runner)
            yield runner, metrics

    def template(self) -> Runner:
        """The shapes of a runner, and all of it that is not an array; computes nothing."""
        spec = self.spec

        def build(key: PRNGKeyArray) -> Runner:
            state, memory, returns = _start(key, spec, self.config)
            return Runner(state, memory, TimeStep.blank(spec, self.config.num_envs), None, returns, key)

        return eqx.filter_eval_shape(build, jax.random.key(0))

    def cut(self, runner: Runner) -> Runner:
        """End every running episode here, as a time limit would."""
        self._new(resting=True)
        here = runner.here
        return eqx.tree_at(
            lambda r: (r.here.last, r.here.acting),
            runner,
            (jnp.ones_like(here.last), jnp.zeros_like(here.acting)),
        )

    def hold(self) -> None:
        """From now on copies whose episode has ended wait for the others, until the runner is `whole`."""
        self._holding = True

    def _held(self, there: TimeStep) -> TimeStep:
        """The copies that had ended already stay there: nobody acts, and what they have begun instead counts for
        nothing."""
        waits = self._last[:, None]
        there = TimeStep(
            there.obs,
            there.mask,
            reward=np.where(waits, np.zeros_like(there.reward), there.reward),
            terminal=there.terminal & ~waits,
            acting=there.acting & ~waits,
            first=there.first & ~self._last,
            last=there.last | self._last,
        )
        if there.last.all():
            self._resting, self._holding = True, False
        return there

    def whole(self, runner: Runner) -> bool:
        """Whether a run can be resumed exactly from here: every copy is at its episode's end."""
        return bool(np.all(np.asarray(runner.here.last)))

    def rest(self) -> None:
        """The next runner comes from a checkpoint: its copies' episodes have ended."""
        self._new(resting=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _Itself:
    """Something as a key by which it is known: equal to nothing but itself."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


@lru_cache(maxsize=2)
def _graph_programs(
    env: _Itself, config: Config, chunk: int, backend: str
) -> tuple[Callable[[PRNGKeyArray], Runner], Compiled]:
    """How a runner begins, and a chunk of its steps, compiled; kept as `_host_programs` are."""
    traced = GraphDriver(env.thing, config, chunk)
    return quick_jit(traced.begun), Compiled(traced.scanned, donate=(0,))


class GraphDriver:
    """Acting, stepping and learning as one compiled scan of `chunk` steps."""

    def __init__(self, env: GraphEnv, config: Config, chunk: int = 16):
        self.env, self.config, self.spec, self.chunk = env, config, env.spec, chunk

    @cached_property
    def _programs(self) -> tuple[Callable[[PRNGKeyArray], Runner], Compiled]:
        return _graph_programs(_Itself(self.env), self.config.for_programs(), self.chunk, jax.default_backend())

    def begun(self, key: PRNGKeyArray) -> Runner:
        """What `start` compiles."""
        init_key, env_key, key = jax.random.split(key, 3)
        state, memory, returns = _start(init_key, self.spec, self.config)
        env_state, here = eqx.filter_jit(jax.vmap(self.env.reset))(jax.random.split(env_key, self.config.num_envs))
        check_answer(here, self.spec, self.config.num_envs, "reset", graph=True)
        return Runner(state, memory, here, env_state, returns, key)

    def start(self, key: PRNGKeyArray) -> Runner:
        """A new runner. Raises ConfigError where the configuration is not resolved for the environment."""
        _refuse_unresolved(self.config, self.spec)
        runner = self._programs[0](key)
        # Every leaf a buffer of its own, since the chunks reuse them, and of no weak type, as in a checkpoint: else a
        # run that goes on would be compiled anew.
        return jax.tree.map(lambda x: jnp.array(x, x.dtype) if eqx.is_array(x) else x, runner)

    def template(self) -> Runner:
        """The shapes of a runner, and all of it that is not an array; computes nothing."""
        return eqx.filter_eval_shape(self.begun, jax.random.key(0))

    def step(self, runner: Runner) -> tuple[Runner, Sums]:
        choice = choose(runner.state, runner.memory, runner.here, runner.key, self.config)
        env_state, there = jax.vmap(self.env.step)(choice.env_keys, runner.env_state, choice.action)
        check_answer(there, self.spec, self.config.num_envs, "step", graph=True)
        state, total, metrics = learn(runner.state, runner.episode_return, runner.here, choice, there, self.config)
        return Runner(state, choice.memory, there, env_state, total, choice.key), metrics

    def scanned(self, runner: Runner) -> tuple[Runner, Sums]:
        """What `advance` compiles."""
        params, static = eqx.partition(runner, eqx.is_array)

        def body(params: Any, _: None) -> tuple[Any, Sums]:
            runner, metrics = self.step(eqx.combine(params, static))
            return eqx.filter(runner, eqx.is_array), metrics

        params, metrics = jax.lax.scan(body, params, None, self.chunk)
        return eqx.combine(params, static), summed(metrics)

    def advance(self, runner: Runner) -> tuple[Runner, Sums]:
        """One chunk of steps and updates, and the sums of their metrics. `runner` is used up."""
        return self._programs[1](runner)

    def steps(self, runner: Runner) -> int:
        """Environment steps that `runner` has done."""
        return int(runner.state.steps)

    def run(self, runner: Runner) -> Iterator[tuple[Runner, Sums]]:
        """Yield the runner and its summed metrics after every chunk."""
        while True:
            runner, metrics = self.advance(runner)
            yield runner, metrics

    def whole(self, runner: Runner) -> bool:
        """The environment's state is part of the runner, so every moment will do."""
        del runner
        return True

    def hold(self) -> None:
        """Never needed, see `whole`."""

    def cut(self, runner: Runner) -> Runner:
        """Never needed, see `whole`."""
        return runner

    def rest(self) -> None:
        """Nothing to do: the runner holds where its copies stand."""


def _refuse_unresolved(config: Config, spec: EnvSpec) -> None:
    """Raise ConfigError for what no program can read yet, such as `auto`, or would take for something else."""
    before, after = flat(config), flat(config.resolve(spec))
    if left := [name for name in after if before[name] != after[name]]:
        raise ConfigError(
            f"expected a configuration that is resolved for {spec.name}, got "
            f"{', '.join(f'{name}={before[name]}' for name in left)}; give the driver config.resolve(env.spec)"
        )


def driver_for(env: HostEnv | GraphEnv, config: Config) -> HostDriver | GraphDriver:
    """The driver for an environment. Raises ConfigError where it cannot be; `config` must be resolved for it, see
    `Config.resolve`, or `start` refuses it."""
    if isinstance(env, HostEnv):
        return HostDriver(env, config)
    for option in ("async_collect", "env_workers"):
        if getattr(config, option):
            raise ConfigError(f"{option} is for environments on the host; {config.env} is part of the program")
    return GraphDriver(env, config)
