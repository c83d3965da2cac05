"""What is not finite is named where it appears, and a run goes back if it is told to."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Toy, arrays, assert_same, copy_until, ppo_config

from codream import Run, TrainingDiverged, checkpoint, make_env, train
from codream.envs import EnvSpec, TimeStep
from codream.health import STEPS, checks, dead_classes, faults, summed
from codream.metrics import Sums
from codream.optimisers import applied
from codream.training import HostDriver

SPEC = EnvSpec("two", ("cat_0", "mouse_0"), ((3,), (3,)), (2, 2))
nan = jnp.nan


def test_sums_stop_at_the_first_fault() -> None:
    def of(*sums: list[float]) -> Sums:
        values = [[(float(total), 1.0) for total in step] for step in zip(*sums, strict=True)]
        return jax.jit(summed)(Sums(jnp.array(values), ("a", "b")))

    total = of([1.0, 2.0, nan, 4.0], [1.0, 2.0, 3.0, nan])
    assert np.isnan(total["a"][0])
    assert float(total["b"][0]) == 6.0
    assert int(total["a"][1]) == 3
    fine = of([0.0, 1.0, 2.0, 3.0], [0.0] * 4)
    assert (float(fine["a"][0]), int(fine["a"][1])) == (6.0, 4)
    assert faults(total) == "a became nan"
    assert faults(fine) is None


def answer(reward: Any = 0.0, obs: Any = 0.0, acting: Any = True, last: bool = False) -> TimeStep:
    """Of two copies of two agents with three numbers to see."""
    pairs = lambda x: jnp.broadcast_to(jnp.asarray(x), (2, 2))  # noqa: E731
    return TimeStep(
        obs=jnp.broadcast_to(pairs(obs)[..., None], (2, 2, 3)).astype(jnp.float32),
        mask=jnp.ones((2, 2, 2), bool),
        reward=pairs(reward).astype(jnp.float32),
        terminal=pairs(False),
        acting=pairs(acting),
        first=jnp.zeros(2, bool),
        last=jnp.full(2, last),
    )


def test_what_an_environment_answers_is_checked() -> None:
    found = checks(SPEC, answer(), answer(reward=[[0.0, nan], [0.0, 0.0]], obs=[[jnp.inf, 0.0], [0.0, 0.0]]))
    bad = {name for name, (total, _) in found.items() if not np.isfinite(total)}
    assert bad == {"environment/mouse_0/reward", "environment/cat_0/observation"}
    assert all(int(count) == 0 for _, count in found.values())  # never logged
    assert int(found[STEPS][0]) == 2
    # Nobody looks at what an agent gets that takes no part.
    idle = answer(reward=nan, obs=nan, acting=False)
    assert faults(checks(SPEC, idle, idle)) is None
    assert int(checks(SPEC, answer(last=True), answer())[STEPS][0]) == 0


def test_the_origin_is_named() -> None:
    one = (1.0, 1)
    broken = {"agent/a/value": (np.nan, 1), "world_model/loss": (np.inf, 1), "world_model/rec": (np.inf, 1), "x": one}
    assert faults(broken) == "world_model/rec became inf"
    assert faults({"agent/a/update_ratio": (np.nan, 1), "x": one}) == "agent/a/update_ratio became nan"
    assert faults(broken | {"environment/a/reward": (np.nan, 0)}) == "environment/a/reward became nan"
    assert faults({"x": one}) is None


def test_measures() -> None:
    weights = {"w": jnp.array([2.7, 3.6]), "step": jnp.asarray(7)}
    moved, ratio = applied(weights, {"w": jnp.array([0.3, 0.4]), "step": None})
    assert float(ratio) == pytest.approx(0.1)
    np.testing.assert_allclose(moved["w"], [3.0, 4.0])
    assert int(moved["step"]) == 7
    assert np.isnan(applied(weights, {"w": jnp.array([nan, 0.4]), "step": None})[1])
    # Two groups of four classes: the first uses two, the second one.
    rows = jnp.log(
        jnp.array([[[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]], [[0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]]])
    )
    assert float(dead_classes(rows, jnp.array([True, True]))) == pytest.approx(5 / 8)
    assert float(dead_classes(rows, jnp.array([True, False]))) == pytest.approx(6 / 8)


class Broken:
    """An in-graph game of ten steps whose reward of `mouse_0` is NaN from the `at`-th step of a copy on, if its key
    says so: by chance `share`."""

    spec = SPEC

    def __init__(self, at: int):
        self.at = at

    def reset(self, key: Any) -> tuple[Any, TimeStep]:
        return self._answer(key, jnp.zeros((), int), jnp.zeros((), int), True)

    def step(self, key: Any, state: Any, actions: Any) -> tuple[Any, TimeStep]:
        del actions
        taken, total = state
        again = lambda: self._answer(key, jnp.zeros((), int), total, True)  # noqa: E731
        return jax.lax.cond(taken == 10, again, lambda: self._answer(key, taken + 1, total + 1, False))

    def _answer(self, key: Any, taken: Any, total: Any, first: bool) -> tuple[Any, TimeStep]:
        one = jax.tree.map(lambda x: x[0], answer())
        last, reward = taken == 10, jnp.where(total >= self.at, jnp.array([0.0, nan]), 0.0)
        return (taken, total), TimeStep(
            jax.random.normal(key, (2, 3)), one.mask, reward, one.terminal, one.acting & ~last, jnp.asarray(first), last
        )


def test_nan_within_a_chunk_is_named_at_its_step(runs: Path) -> None:
    """The reward of the 21st step of either copy, in a chunk of 16 steps of the environment; two resets are none."""
    with pytest.raises(TrainingDiverged) as err:
        train(ppo_config(env="jaxmarl:x"), env=Broken(21), name="health-graph", root=runs, progress=False)
    assert str(err.value).startswith("environment/mouse_0/reward became nan at step 42; training has stopped")
    assert "There is no checkpoint yet" in str(err.value)
    assert [line["steps"] for line in Run(runs / "health-graph").metrics()] == [30]


def poisoned(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Weights of the second agent become NaN after the 34th step of the driver, `times` times."""
    advance, count = HostDriver.advance, [0, times]

    def changed(self: HostDriver, runner: Any) -> Any:
        count[0] += 1
        if count[0] >= 34 and count[1]:
            count[1] -= 1
            runner = eqx.tree_at(
                lambda r: r.state.learners.actor,
                runner,
                jax.tree.map(lambda x: x.at[1].set(nan) if eqx.is_array(x) else x, runner.state.learners.actor),
            )
            count[0] = 10 if count[1] else count[0]
        return advance(self, runner)

    monkeypatch.setattr(HostDriver, "advance", changed)


def test_rollback(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = train(ppo_config(), env=Toy, name="health-plain", root=runs, progress=False)
    config = ppo_config(on_nan="rollback", rollbacks=2)
    with monkeypatch.context() as patch:
        poisoned(patch, 1)
        run = train(config, env=Toy, name="health-rollback", root=runs, progress=False)
    err = capsys.readouterr().err
    assert "agent/mouse_0/" in err
    assert "agent/cat_0/" not in err
    assert "going on from step 48 with a new key (rollback 1 of at most 2)" in err
    lines = run.metrics()
    assert [line["steps"] for line in lines] == [24, 48, 72, 96, 120, 144]
    assert [line.get("rollbacks", 0) for line in lines] == [0, 0, 1, 1, 1, 1]
    assert checkpoint.find(run.path).manifest.rollbacks == 1
    assert_same(arrays(run, 48), arrays(plain, 48))
    key, before = arrays(run)["key"], arrays(plain)["key"]
    assert (key != before).any()
    # A run that was rolled back and then killed goes on as it would have, too.
    killed = copy_until(run, 96, runs / "health-killed")
    train(resume=killed, env=Toy, progress=False)
    assert_same(arrays(killed), arrays(run))
    # There is an end to it.
    with monkeypatch.context() as patch:
        poisoned(patch, 3)
        with pytest.raises(TrainingDiverged, match=r"training has stopped after 2 rollbacks"):
            train(config, env=Toy, name="health-thrice", root=runs, progress=False)


@pytest.mark.parametrize("algo", ["matwm", "wm_rnd"])
def test_health_is_logged(algo: str, runs: Path, request: pytest.FixtureRequest) -> None:
    if algo == "matwm":
        last = request.getfixturevalue("host_run").metrics()[-1]
        parts = {"world_model/": ("grad_norm", "update_ratio")}
    else:
        from helpers import wm_rnd_config

        config = wm_rnd_config()
        last = train(config, env=Toy, name="health-wm-rnd", root=runs, progress=False).metrics()[-1]
        parts = {"world_model/": ("grad_norm", "update_ratio", "dead_classes", "latent_rank")}
    agent = "agent/adversary_0/" if algo == "matwm" else "agent/cat_0/"
    parts[agent] = ("grad_norm", "update_ratio", "entropy", "return_scale")
    for part, names in parts.items():
        for name in names:
            assert np.isfinite(last[part + name])
    assert 0 < last["world_model/update_ratio"] < 1
    assert STEPS not in last
    assert not any(name.startswith("environment/") for name in last)


def test_the_same_seed_gives_the_same_run_to_the_last_bit(runs: Path) -> None:
    """In-graph; tests/test_resume.py and tests/test_cli.py show it of the host."""
    env = make_env("jaxmarl:coin_game")
    config = ppo_config(env="jaxmarl:coin_game", total_steps=64, checkpoint_every=64)
    one, other = (train(config, env=env, name=f"health-{i}", root=runs, progress=False) for i in (1, 2))
    assert_same(arrays(one), arrays(other))
