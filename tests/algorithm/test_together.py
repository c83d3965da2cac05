"""Several seeds as one program: each must be what it would be by itself, whatever happens to the others."""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Toy, arrays, assert_same, copy_until, ppo_config
from probe_envs import ConstantReward
from tiny import tiny

from codream import Config, ConfigError, Run, RunError, TrainingDiverged, preset, train, train_seeds
from codream.together import Together
from codream.trainer import _name_of_seeds, _Request

ENV = ConstantReward()
"""Its episodes end by chance, so that seeds do not take their steps in the same rhythm."""


def config(algo: str, **changes: Any) -> Config:
    if algo == "ppo":
        return ppo_config(env="jaxmarl:x", **changes)
    # Two updates: rounding grows with each.
    every = {"world_model_every": 24.0, "agents_every": 24.0}
    base = tiny(ENV.spec, env="jaxmarl:x", total_steps=48, checkpoint_every=48, log_every=24, **every)
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def two(runs: Path) -> list[Run]:
    """Seeds 3 and 4 of PPO. Tests must not change them."""
    return train_seeds(config("ppo", seed=3), seeds=2, env=ENV, name="two", root=runs, progress=False)


@pytest.mark.parametrize("algo", ["ppo", pytest.param("matwm", marks=pytest.mark.slow)])
def test_seeds_together_are_the_seeds_one_by_one(algo: str, runs: Path, request: pytest.FixtureRequest) -> None:
    if algo == "ppo":
        together = request.getfixturevalue("two")
    else:
        together = train_seeds(config(algo, seed=3), seeds=2, env=ENV, name="matwm", root=runs, progress=False)
    assert [run.path.name.partition("-")[2] for run in together] == ["seed3", "seed4"]
    alone = train(config(algo, seed=4), env=ENV, name=f"alone-{algo}", root=runs, progress=False)
    assert together[1].config == alone.config
    assert [line["steps"] for line in together[1].metrics()] == [line["steps"] for line in alone.metrics()]
    expected = arrays(alone)
    for place, value in arrays(together[1]).items():
        np.testing.assert_allclose(value, expected[place], rtol=1e-3, atol=1e-4, err_msg=place)
    assert (arrays(together[0])["key"] != expected["key"]).any()
    assert "shared by 2 seeds" in together[0].about["device"]


def test_they_go_on_from_wherever_each_stands(two: list[Run], runs: Path) -> None:
    """As after a kill that came between two checkpoints, and once more when one is complete."""
    first = copy_until(two[0], 48, runs / "killed-seed3")
    copy_until(two[1], 96, runs / "killed-seed4")
    gone_on = train_seeds(seeds=2, resume=first, env=ENV, progress=False)
    for run, original in zip(gone_on, two, strict=True):
        assert_same(arrays(run), arrays(original))
        assert [line["steps"] for line in run.metrics()] == [line["steps"] for line in original.metrics()]
    with pytest.raises(
        RunError,
        match=r"reached their total .* --resume .*killed-seed3 --env-from MODULE:NAME --seeds 2 --total-steps 288",
    ):
        train_seeds(seeds=2, resume=first, env=ENV, progress=False)
    copy_until(two[0], 144, runs / "one-seed3")
    late = copy_until(two[1], 96, runs / "one-seed4")
    assert len(train_seeds(seeds=2, resume=runs / "one-seed3", env=ENV, progress=False)) == 2
    assert max(line["steps"] for line in late.metrics()) >= 144


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the second run become NaN once, after the third chunk."""
    advance, count = Together.advance, [0]

    def changed(self: Together, runners: Any) -> Any:
        count[0] += 1
        if count[0] == 4:
            broken = jax.tree.map(
                lambda x: x.at[1].set(jnp.nan) if eqx.is_inexact_array(x) else x, runners.state.learners.actor
            )
            runners = eqx.tree_at(lambda r: r.state.learners.actor, runners, broken)
        return advance(self, runners)

    monkeypatch.setattr(Together, "advance", changed)


@pytest.mark.parametrize("on_nan", ["stop", "rollback"])
def test_one_that_diverges_leaves_the_others_alone(
    on_nan: Any, two: list[Run], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch)
    go = lambda: train_seeds(  # noqa: E731
        config("ppo", seed=3, on_nan=on_nan), seeds=2, env=ENV, name=on_nan, root=runs, progress=False
    )
    if on_nan == "stop":
        with pytest.raises(TrainingDiverged, match=r"became nan at step .*\n.*resume=.*stop-seed4"):
            go()
        assert "stop-seed4" in capsys.readouterr().err
    else:
        _, rolled_back = go()
        assert "rollback 1 of at most" in capsys.readouterr().err
        assert rolled_back.metrics()[-1]["rollbacks"] == 1
    assert_same(arrays(Run(runs / f"{on_nan}-seed3")), arrays(two[0]))


def test_seeds_without_a_name_get_one_by_which_they_find_each_other(tmp_path: Path) -> None:
    (tmp_path / "simple_tag-small-seed4").mkdir()
    requests = [_Request(dataclasses.replace(preset("small"), seed=seed), None, None, None) for seed in (3, 4)]
    assert _name_of_seeds(requests, tmp_path) == "simple_tag-small-2"
    (tmp_path / "simple_tag-small-2-seed3").mkdir()
    assert _name_of_seeds(requests, tmp_path) == "simple_tag-small-3"


def test_what_cannot_be_is_refused(two: list[Run], runs: Path) -> None:
    with pytest.raises(ConfigError, match="seeds must be at least 1, got 0"):
        train_seeds(config("ppo"), seeds=0, env=ENV, root=runs)
    with pytest.raises(ConfigError, match=r"runs on the host: .* codream sweep --env-from helpers:Toy --seeds 2"):
        train_seeds(ppo_config(), seeds=2, env=Toy, root=runs, progress=False)
    with pytest.raises(ConfigError, match="on one device; got devices=2"):
        train_seeds(config("matwm", devices=2), seeds=2, env=ENV, root=runs)
    with pytest.raises(RunError, match="two-seed3 already exists"):
        train_seeds(config("ppo", seed=2), seeds=3, env=ENV, name="two", root=runs, progress=False)
    assert not (runs / "two-seed2").exists()
    with pytest.raises(RunError, match="was trained on an environment given as an object; pass it again"):
        train_seeds(seeds=2, resume=two[0])  # whose name may stand for another
    odd = copy_until(two[0], 48, runs / "odd")
    with pytest.raises(RunError, match="does not end in -seed3"):
        train_seeds(seeds=2, resume=odd, env=ENV)
