"""MATWM takes updates on images, on action masks and in-graph: every part of every loss is finite, and weights move.
Where the host knows how many are due, they are the same."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from helpers import Toy, arrays, as_if_on_a_gpu, tiny_config, toy_config, wm_rnd_config

from codream import Config, make_env, train
from codream.algorithms import algorithm
from codream.config import UNREAD
from codream.training import HostDriver, choose, driver_for, learn


@pytest.mark.parametrize(
    ("env", "part"),
    [
        pytest.param("butterfly:cooperative_pong", "rec", marks=pytest.mark.slow),
        pytest.param("jaxmarl:smax_3m", "mask", marks=pytest.mark.slow),
        pytest.param("jaxmarl:MPE_simple_tag_v3", "team", marks=pytest.mark.slow),
    ],
)
def test_a_few_updates(env: str, part: str) -> None:
    config = dataclasses.replace(tiny_config(env=env), num_envs=2, warmup=40, world_model_every=20.0, agents_every=20.0)
    made = make_env(env, num_envs=2)
    config = config.resolve(made.spec)
    driver = driver_for(made, config)
    runner = driver.start(jax.random.key(0))
    before = jax.device_get(eqx.filter(runner.state.world_model, eqx.is_array))
    seen: dict[str, float] = {}
    while int(runner.state.agents_updates) < 3:
        runner, metrics = driver.advance(runner)
        seen |= {name: float(total) for name, (total, count) in metrics.items() if float(count) > 0}
        assert int(runner.state.steps) < 2_000, "updates should have come by now"
    assert int(runner.state.world_model_updates) >= 3
    assert f"world_model/{part}" in seen
    assert np.isfinite(list(seen.values())).all(), seen
    after = jax.device_get(eqx.filter(runner.state.world_model, eqx.is_array))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("async_collect", [False, True])
def test_updates_that_the_host_counts(
    uneven: bool, async_collect: bool, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: what is learned is the same, also where a run goes on, and the device is asked only for
    numbers that are neither none nor those of a full step."""
    config = toy_config(world_model_every=1, agents_every=2, async_collect=async_collect)
    env = partial(Toy, uneven=uneven)
    asked = arrays(train(config, env=env, name=f"asked{uneven}{async_collect}", root=runs, progress=False))
    made, told = HostDriver.__init__, []

    def counting(self: HostDriver, *args: Any) -> None:
        made(self, *args)
        self.counts_updates, learn = True, self._learn
        self._learn = lambda due, *given: (told.append(due), learn(due, *given))[1]

    monkeypatch.setattr(HostDriver, "__init__", counting)
    first = config if uneven else dataclasses.replace(config, total_steps=80)
    run = train(first, env=env, name=f"counted{uneven}{async_collect}", root=runs, progress=False)
    counted = arrays(run if uneven else train(config, resume=run, env=env, progress=False))
    assert {(0, 0), (2, 1)} <= set(told)
    assert (None in told) == uneven
    assert asked.keys() == counted.keys()
    for place, value in asked.items():
        if not jax.numpy.issubdtype(value.dtype, jax.numpy.inexact):
            np.testing.assert_array_equal(value, counted[place], err_msg=place)
    assert int(counted["state.world_model_updates"]) == int(asked["state.world_model_updates"]) > 50
    where = "state.world_model.mixer.weight"
    np.testing.assert_allclose(counted[where], asked[where], atol=0.02)


@pytest.mark.slow
def test_the_ways_of_an_accelerator_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles, no pieces, updates counted on the host, and the kernels, interpreted."""
    config = dataclasses.replace(tiny_config(), num_envs=2, warmup=40, world_model_every=2, agents_every=2)

    def first_updates() -> list[dict[str, float]]:
        made = make_env("simple_tag", num_envs=2)
        driver = driver_for(made, config.resolve(made.spec))
        assert isinstance(driver, HostDriver)
        assert driver.counts_updates == (jax.default_backend() == "gpu")
        runner, found = driver.start(jax.random.key(0)), []
        while int(runner.state.agents_updates) < 3:
            runner, metrics = driver.advance(runner)
            found.append({name: float(total) for name, (total, count) in metrics.items() if float(count) > 0})
        return found[-3:]

    here = first_updates()
    as_if_on_a_gpu(monkeypatch)
    there = first_updates()
    assert "world_model/loss" in here[0]
    # A class that lies on the border of its number may be drawn otherwise, and what follows is then another play.
    for name, value in here[0].items():
        np.testing.assert_allclose(there[0][name], value, rtol=1e-2, atol=1e-3, err_msg=name)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_allclose(other["world_model/loss"], one["world_model/loss"], rtol=1e-2)


@pytest.mark.parametrize("algo", ["matwm", "wm_rnd"])
def test_runs_that_differ_in_what_no_program_reads_share_programs(algo: str) -> None:
    base = toy_config() if algo == "matwm" else wm_rnd_config()
    changed = dataclasses.replace(
        base,
        env="other",
        env_kwargs={"length": 7},
        preset="paper",
        seed=7,
        checkpoint_every=17,
        checkpoints_kept=7,
        checkpoints_nth=7,
        checkpoints_best="cat:self",
        checkpoints_best_episodes=7,
        on_nan="rollback",
        rollbacks=7,
        env_time_limit=7.0,
        env_workers=7,
        log_every=7,
        async_collect=algo == "matwm",
        total_steps=base.total_steps + (7 if algo == "matwm" else 0),
    )
    env = make_env(Toy, num_envs=base.num_envs)
    first, second = base.resolve(env.spec), changed.resolve(env.spec)
    assert [name for name in UNREAD if getattr(first, name) == getattr(second, name)] == (
        [] if algo == "matwm" else ["async_collect"]
    )
    assert first.for_programs() == second.for_programs()
    assert first.for_programs() != dataclasses.replace(first, num_envs=2 * first.num_envs).for_programs()

    runner = HostDriver(env, first).template()
    arrays, static = eqx.partition(runner, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def program(config: Config) -> str:
        def step(arrays: Any) -> Any:
            runner = eqx.combine(arrays, static)
            choice = choose(runner.state, runner.memory, runner.here, runner.key, config)
            learned = learn(runner.state, runner.episode_return, runner.here, choice, runner.here, config)
            return eqx.filter(learned, eqx.is_array)

        return jax.jit(step).lower(arrays).as_text()

    assert program(first) == program(second)


def test_a_run_that_cannot_learn_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(toy_config(total_steps=40, warmup=40), env=Toy, name="warm", root=runs, progress=False)
    said = capsys.readouterr().err
    assert "will be learned: the first update comes after 40 steps (warmup is 40" in said
    assert "total_steps is 40" in said


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (toy_config(warmup=500), 500),
        # Four sequences of 8 steps: two of each agent from 4 copies, which need 16 rows.
        (dataclasses.replace(tiny_config(), warmup=0), 64),
        (wm_rnd_config(), 16),
    ],
)
def test_the_first_update_comes_when_it_is_said_to(config: Config, first: int) -> None:
    env = make_env(Toy, num_envs=config.num_envs)
    learner = algorithm(config)
    config = config.resolve(env.spec)
    said = learner.first_update(env.spec, config)
    assert said == first
    if learner.updates_due is None:
        assert said == config.ppo.rollout * config.num_envs
        return
    steps = next(n for n in range(0, 10_000, config.num_envs) if sum(due(learner, n, env.spec, config)) > 0)
    assert steps == said


def due(learner: Any, steps: int, spec: Any, config: Config) -> tuple[int, int]:
    filled = min(steps // config.num_envs, config.replay_rows)
    return learner.updates_due(10 * steps, 0, filled, spec, config) if steps >= config.warmup else (0, 0)
