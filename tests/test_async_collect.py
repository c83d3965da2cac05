"""Learning from a step while the environment takes the next one."""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Toy, arrays, assert_same, copy_until, ppo_config, toy_config

from codream import ConfigError, Run, TrainingDiverged, train
from codream.training import HostDriver


@pytest.fixture(scope="module")
def ahead(runs: Path) -> Run:
    return train(toy_config(async_collect=True), env=Toy, name="ahead", root=runs, progress=False)


@pytest.fixture(scope="module")
def in_turn(runs: Path) -> Run:
    return train(toy_config(), env=Toy, name="in-turn", root=runs, progress=False)


def test_only_what_was_not_yet_learned_differs(ahead: Run, in_turn: Run) -> None:
    """The same steps, keys and updates; the same actions for as long as nothing was learned."""
    assert [line["steps"] for line in ahead.metrics()] == [line["steps"] for line in in_turn.metrics()]
    one, other = arrays(ahead), arrays(in_turn)
    assert_same({"key": one["key"]}, {"key": other["key"]})
    assert int(one["state.world_model_updates"]) == int(other["state.world_model_updates"]) > 0
    before = toy_config().warmup // 2  # rows of both copies
    for what in ("obs", "action", "reward"):
        rows = [found[f"state.replay.{what}"] for found in (one, other)]
        np.testing.assert_array_equal(rows[0][:before], rows[1][:before])


def steps_of(run: Run) -> list[int]:
    return sorted(int(path.name) for path in run.checkpoints.iterdir())


def test_it_goes_on_as_if_it_had_never_stopped(ahead: Run, runs: Path) -> None:
    killed = copy_until(ahead, steps_of(ahead)[1], runs / "ahead-killed")
    train(resume=killed, env=Toy, progress=False)
    assert_same(arrays(killed), arrays(ahead))


def test_the_environment_steps_before_learning_is_waited_for(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    """Actions of a step are chosen before the update of the step before begins."""
    order: list[str] = []
    made = HostDriver.__init__

    def watched(self: HostDriver, *args: Any) -> None:
        made(self, *args)

        def noted(name: str, function: Any) -> Any:
            return lambda *given: (order.append(name), function(*given))[1]

        for name in ("_learn", "_choose"):
            setattr(self, name, noted(name, getattr(self, name)))

    monkeypatch.setattr(HostDriver, "__init__", watched)
    config = toy_config(async_collect=True, total_steps=24)
    train(config, env=Toy, name="order", root=runs, progress=False)
    assert order[:5] == ["_choose", "_choose", "_learn", "_choose", "_learn"]


@pytest.mark.parametrize("async_collect", [False, True])
def test_a_fault_is_named_at_its_step(async_collect: bool, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights become NaN after 30 steps of the driver; nothing is logged or saved for a while."""
    advance, count = HostDriver.advance, [0]

    def poisoned(self: HostDriver, runner: Any) -> Any:
        count[0] += 1
        if count[0] == 30:
            actor = jax.tree.map(lambda x: x * jnp.nan if eqx.is_inexact_array(x) else x, runner.state.agents.actor)
            runner = eqx.tree_at(lambda r: r.state.agents.actor, runner, actor)
        return advance(self, runner)

    monkeypatch.setattr(HostDriver, "advance", poisoned)
    config = toy_config(log_every=1_000, async_collect=async_collect)
    with pytest.raises(TrainingDiverged, match=r"became nan at step 60; training has stopped"):
        train(config, env=Toy, name=f"ill-{async_collect}", root=runs, progress=False)
    assert steps_of(Run(runs / f"ill-{async_collect}"))[-1] < 60


def test_where_it_means_nothing_it_is_refused(runs: Path) -> None:
    with pytest.raises(ConfigError, match="PPO learns from what its current policy did"):
        ppo_config(async_collect=True)
    config = dataclasses.replace(toy_config(), env="jaxmarl:coin_game", env_kwargs={}, async_collect=True)
    with pytest.raises(ConfigError, match="async_collect is for environments on the host"):
        train(config, root=runs, progress=False)
