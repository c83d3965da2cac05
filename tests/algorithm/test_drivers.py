"""The host loop and the in-graph scan share every line of the algorithm: same transitions, same run."""

import dataclasses
import itertools
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import Mixed
from tiny import tiny

from codream import ConfigError, matwm, preset
from codream.building import build_env
from codream.envs import EnvironmentFailure, EnvSpec, GraphEnv, HostEnv, TimeStep, is_graph
from codream.envs.answers import check_answer
from codream.linear import tree_of
from codream.playing import GraphCopies, play
from codream.training import GraphDriver, HostDriver, Runner, driver_for

COPIES, STEPS = 3, 32


def seed_of(key):
    """How the host driver seeds an episode from a key."""
    return jax.random.randint(key, (), 0, 2**31 - 1)


class Seeded:
    """`Mixed`, but all of its chance comes from the seed that a host environment would get."""

    def __init__(self):
        self.inner = Mixed()
        self.spec = self.inner.spec

    def reset(self, key):
        return self.inner.reset(jax.random.key(seed_of(key)))

    def step(self, key, state, actions):
        return self.inner.step(jax.random.key(seed_of(key)), state, actions)


class OnTheHost:
    """The same game as copies of a host environment: state in Python, NumPy in and out."""

    num_envs = COPIES

    def __init__(self):
        self.inner = Mixed()
        self.spec = self.inner.spec
        self._reset = jax.jit(jax.vmap(lambda seed: self.inner.reset(jax.random.key(seed))))
        self._step = jax.jit(
            jax.vmap(lambda seed, state, actions: self.inner.step(jax.random.key(seed), state, actions))
        )
        self.state = None

    def reset(self, seeds):
        assert isinstance(seeds, np.ndarray)
        self.state, here = self._reset(seeds)
        return jax.tree.map(np.asarray, here)

    def step(self, actions, seeds):
        assert isinstance(actions, np.ndarray)
        self.state, there = self._step(seeds, self.state, actions)
        return jax.tree.map(np.asarray, there)

    def close(self):
        pass


@pytest.fixture(scope="module")
def both():
    """Runners and summed metrics after the same number of steps of either driver."""
    config = tiny(Mixed().spec, num_envs=COPIES, warmup=24, world_model_every=4, agents_every=6)
    graph = GraphDriver(Seeded(), config, chunk=STEPS)
    graph_runner, graph_metrics = next(graph.run(graph.start(jax.random.key(0))))
    host = HostDriver(OnTheHost(), config)
    steps = list(itertools.islice(host.run(host.start(jax.random.key(0))), STEPS))
    host_metrics = jax.tree.map(lambda *x: sum(x), *[metrics for _, metrics in steps])
    return (graph_runner, graph_metrics), (steps[-1][0], host_metrics)


def test_the_probes_are_what_they_pretend_to_be():
    assert isinstance(OnTheHost(), HostEnv)
    assert isinstance(Seeded(), GraphEnv)
    assert is_graph(Seeded())
    config = tiny(Mixed().spec, num_envs=COPIES)
    assert isinstance(driver_for(OnTheHost(), config), HostDriver)
    assert isinstance(driver_for(Seeded(), config), GraphDriver)


def test_a_configuration_that_is_not_resolved_is_refused():
    """`auto` is nobody: the others would stand still in imagination, or nothing would know such a latent."""
    for name, left in (("wm_rnd", "imagined_partners=auto"), ("small", "world_model.latent=auto")):
        with pytest.raises(ConfigError, match=rf"{left}.*; give the driver config\.resolve\(env\.spec\)"):
            driver_for(Seeded(), preset(name)).start(jax.random.key(0))
    with pytest.raises(ConfigError, match=r"resolved for Mixed.*world_model.latent=auto"):
        driver_for(OnTheHost(), dataclasses.replace(preset("small"), num_envs=COPIES)).start(jax.random.key(0))


def test_both_drivers_make_updates(both):
    (runner, metrics), _ = both
    assert int(runner.state.world_model_updates) > 5
    assert int(runner.state.agents_updates) > 3
    assert int(metrics["world_model/loss"][1]) == int(runner.state.world_model_updates)
    assert int(metrics["episode/return/prey_0"][1]) > 5


def test_both_drivers_give_the_same_updates_on_the_same_transitions(both):
    (graph, _), (host, _) = both
    for field in ("state", "memory", "here", "episode_return", "key"):
        one, two = (jax.tree_util.tree_leaves_with_path(getattr(runner, field)) for runner in (graph, host))
        assert [path for path, _ in one] == [path for path, _ in two]
        for (path, a), (_, b) in zip(one, two, strict=True):
            where = field + jax.tree_util.keystr(path)
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert a.dtype == b.dtype, where
            if jnp.issubdtype(a.dtype, jnp.floating):
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=where)
            else:
                np.testing.assert_array_equal(a, b, err_msg=where)


def test_both_drivers_report_the_same_metrics(both):
    (_, graph), (_, host) = both
    assert graph.keys() == host.keys()
    for name in graph:
        for a, b in zip(graph[name], host[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4, err_msg=name)


def test_an_episodes_return_is_the_sum_of_its_rewards(both):
    """From replay: all rows are kept, and rewards of every finished episode are counted once."""
    (graph, metrics), _ = both
    replay = graph.state.replay
    reward, last = np.asarray(replay.reward[:STEPS]), ~np.asarray(replay.acting[:STEPS]).any(-1)
    total = np.zeros(3)
    for copy in range(COPIES):
        done = np.flatnonzero(last[:, copy])
        total += reward[: done[-1], copy].sum(axis=0) if len(done) else 0.0
    ended = np.asarray(graph.here.last)
    for copy in np.flatnonzero(ended):
        done = np.flatnonzero(last[:, copy])
        total += reward[(done[-1] if len(done) else 0) :, copy].sum(axis=0)
    found = [metrics[f"episode/return/{agent}"][0] for agent in Mixed().spec.agents]
    np.testing.assert_allclose(found, total, rtol=1e-5)
    assert len(set(total)) == 3


def test_what_is_measured_of_an_agents_updates_is_its_own(both):
    (_, metrics), _ = both
    assert len({float(metrics[f"agent/{agent}/grad_norm"][0]) for agent in Mixed().spec.agents}) == 3


def test_the_host_counts_steps_and_what_they_buy():
    """Copies whose episode has ended take no step; only none or as many updates as a step of all copies buys are
    said beforehand."""
    config = tiny(Mixed().spec, num_envs=COPIES, world_model_every=3, agents_every=1.5)
    driver, steps, filled, row = HostDriver(OnTheHost(), config), 30, 13, np.zeros(COPIES, bool)
    driver.counts_updates = True
    there = TimeStep.blank(Mixed().spec, COPIES)
    state = SimpleNamespace(steps=np.asarray(steps), replay=SimpleNamespace(filled=np.asarray(filled)))
    driver._count(tree_of(Runner, state=state, here=dataclasses.replace(there, last=row)))
    said = []
    for ended in ((), (1,), (0,), (), (), (0, 1, 2), (), (2,), (0, 1), (), ()):
        before, steps, filled = steps, steps + COPIES - int(row.sum()), filled + 1
        row = np.isin(np.arange(COPIES), ended)
        due = matwm.updates_due(steps, before, filled, Mixed().spec, config)
        said.append(driver._stepped(dataclasses.replace(there, last=row)))
        assert said[-1] == (due if due in ((0, 0), (1, 2)) else None)
        assert driver._steps == steps
    assert set(said) == {(0, 0), (1, 2), None}


def test_programs_in_the_graph_serve_another_run_of_the_same_game() -> None:
    """By name there is one environment; what differs is what no program reads."""
    config = dataclasses.replace(preset("small"), env="jaxmarl:simple_tag")
    env = build_env(config, 4)
    assert build_env(config, 4) is env
    assert build_env(dataclasses.replace(config, env_kwargs={"max_steps": 9}), 4) is not env
    one, other = (driver_for(env, dataclasses.replace(config, seed=seed).resolve(env.spec)) for seed in (0, 1))
    assert isinstance(one, GraphDriver)
    assert isinstance(other, GraphDriver)
    assert one._programs[1] is other._programs[1]
    narrow = GraphDriver(env, dataclasses.replace(config, num_envs=2).resolve(env.spec))
    assert narrow._programs[1] is not one._programs[1]


class TeamPaid:
    """As many agents as copies, and one reward for the team, which would be paid across copies."""

    def __init__(self, field: str = "reward"):
        self.inner, self.field = Mixed(), field
        self.spec = self.inner.spec

    def reset(self, key):
        return self.inner.reset(key)

    def step(self, key, state, actions):
        state, there = self.inner.step(key, state, actions)
        wrong = {"reward": there.reward.sum(), "obs": there.obs[:, :-1], "acting": there.acting.astype(int)}
        return state, eqx.tree_at(lambda t: getattr(t, self.field), there, wrong[self.field])


def test_answers_of_other_shapes_than_the_spec_says_are_refused() -> None:
    env = TeamPaid()
    config = tiny(env.spec, num_envs=env.spec.num_agents)
    driver, message = GraphDriver(env, config), r"step answered .*`reward` of shape \(\), expected \(3,\) \(agents\)"
    runner = eqx.filter_eval_shape(driver.begun, jax.random.key(0))
    with pytest.raises(EnvironmentFailure, match=message):
        eqx.filter_eval_shape(driver.step, runner)
    for field, message in (
        ("reward", r"`reward` of shape \(3,\), expected \(3, 3\) \(copies, agents\)"),
        ("obs", r"`obs` of shape \(3, 3, 3\), expected \(3, 3, 4\) \(copies, agents, entries\)"),
        ("acting", "`acting` of int32, expected booleans"),
    ):
        with pytest.raises(EnvironmentFailure, match=message):
            play(GraphCopies(TeamPaid(field), 3), dict.fromkeys(env.spec.sides, Still()), 3)


class Still:
    def act(self, here, rng):
        return np.zeros(here.acting.shape, int)


class Wrong(OnTheHost):
    """On the host, a copy less than it says."""

    def reset(self, seeds):
        return jax.tree.map(lambda x: x[1:], super().reset(seeds))


def test_a_host_environment_of_other_shapes_is_refused() -> None:
    driver = HostDriver(Wrong(), tiny(Mixed().spec, num_envs=COPIES))
    with pytest.raises(EnvironmentFailure, match=r"reset answered for its copies .* of shape \(2, 3, 4\)"):
        driver._look_at(driver.env.reset(np.zeros(COPIES, int)), "reset")


def test_images_of_floats_are_refused() -> None:
    """They would be cast to bytes, all 0."""
    spec = EnvSpec("eyes", ("left",), ((16, 16, 3),), (2,))
    answer = TimeStep.blank(spec, 2)
    check_answer(answer, spec, 2, "reset")
    floats = eqx.tree_at(lambda t: t.obs, answer, answer.obs / 255)
    with pytest.raises(EnvironmentFailure, match=r"`obs` of float32, expected whole numbers within 0…255"):
        check_answer(floats, spec, 2, "reset")
