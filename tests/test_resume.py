"""A run that stopped and went on equals one that never stopped, leaf by leaf; and what stops a run."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Toy, arrays, assert_same, copy_until, replaced, timeless, tiny_config, toy_config

from codream import EnvironmentFailure, Run, RunError, TrainingDiverged, loop, make_env, preset, train
from codream.envs import EnvSpec
from codream.metrics import Sums
from codream.resuming import _jump
from codream.retention import saved
from codream.training import HostDriver, driver_for

_SPEC = EnvSpec("mpe2:simple_tag_v3", ("a", "b"), ((1,), (1,)), (2, 2))


def test_host_run_resumed_at_an_episodes_end_equals_the_uninterrupted_one(host_run: Run, runs: Path) -> None:
    half = train(tiny_config(total_steps=200), name="host-half", root=runs, progress=False)
    assert_same(arrays(half), arrays(host_run, 200))
    train(tiny_config(), resume=half, progress=False)
    whole, resumed = arrays(host_run), arrays(half)
    assert_same(whole, resumed)
    # It holds all that training needs to go on, and something happened in it.
    for part in (
        "state.world_model.",
        "state.optimiser",
        "state.agents.optimiser",
        "state.replay.obs",
        "key",
    ):
        assert any(place.startswith(part) for place in whole), part
    assert whole["state.steps"] == 400
    assert whole["state.world_model_updates"] > 2
    assert whole["state.agents_updates"] > 2
    assert timeless(half) == timeless(host_run)
    assert half.config == host_run.config


def test_graph_run_resumed_equals_the_uninterrupted_one(runs: Path) -> None:
    config = tiny_config(env="jaxmarl:simple_tag", total_steps=300, checkpoint_every=100)
    whole = train(config, name="graph", root=runs, progress=False)
    first = min(saved(whole.checkpoints))
    killed = copy_until(whole, first, runs / "graph-killed")
    train(resume=killed, progress=False)
    assert_same(arrays(whole), arrays(killed))
    assert timeless(whole) == timeless(killed)
    assert arrays(whole)["state.agents_updates"] > 1
    # What begins has the types of what goes on, so that one program serves both.
    env = make_env(config.env)
    begun = driver_for(env, config.resolve(env.spec)).start(jax.random.key(0))
    assert not any(getattr(x, "weak_type", False) for x in jax.tree.leaves(begun))


@pytest.mark.parametrize("ahead", [False, True])
def test_copies_that_end_early_wait_where_a_checkpoint_is_due(
    runs: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr(HostDriver, "cut", None)
    make = lambda: Toy(uneven=True)  # noqa: E731
    config = toy_config(async_collect=ahead)
    whole = train(config, env=make, name=f"waits-{ahead}", root=runs, progress=False)
    # Each comes at most an episode (9 steps) of every copy late, and the end too.
    steps = [0, *sorted(saved(whole.checkpoints))]
    assert len(steps) == 4
    assert all(40 <= after - before < 40 + 2 * 9 for before, after in itertools.pairwise(steps))
    after = arrays(whole)
    assert after["here.last"].all()
    # Whole episodes: each begins, goes on and ends; those who wait act as little as those who have ended.
    rows = int(after["state.replay.filled"])
    acting, other = np.moveaxis(after["state.replay.acting"][:rows], -1, 0)
    assert (acting == other).all()
    assert acting.sum() == steps[-1]
    lengths, waited = [], 0
    for copy in range(2):
        begins = np.flatnonzero(after["state.replay.first"][:rows, copy])
        for a, b in zip(begins, [*begins[1:], rows], strict=True):
            length = int(acting[a:b, copy].sum())
            assert acting[a : a + length, copy].all()
            lengths.append(length)
            waited += b - a - length - 1
    assert set(lengths) <= set(range(3, 10))
    assert waited > 0
    # In some a side plays at random; they do not count.
    assert len(lengths) / 3 < sum(line.get("episode/count", 0) for line in whole.metrics()) <= len(lengths)
    killed = copy_until(whole, steps[1], runs / f"waits-killed-{ahead}")
    train(resume=killed, env=make, progress=False)
    assert_same(arrays(whole), arrays(killed))
    assert timeless(whole) == timeless(killed)


def test_uneven_episodes_are_cut_where_no_common_end_comes(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PATIENCE", 2)
    cuts: list[int] = []
    cut = HostDriver.cut

    def counted(self: HostDriver, runner: Any) -> Any:
        cuts.append(int(runner.state.steps))
        return cut(self, runner)

    monkeypatch.setattr(HostDriver, "cut", counted)
    make = lambda: Toy(uneven=True)  # noqa: E731
    whole = train(toy_config(), env=make, name="uneven", root=runs, progress=False)
    assert cuts
    after = arrays(whole, cuts[0])
    assert after["here.last"].all()
    assert not after["here.acting"].any()
    assert not after["here.terminal"].any()  # a cut is a time limit, not the end of the game
    killed = copy_until(whole, min(saved(whole.checkpoints)), runs / "uneven-killed")
    train(resume=killed, env=make, progress=False)
    assert_same(arrays(whole), arrays(killed))
    with pytest.raises(RunError, match="given as an object; pass it again"):
        train(resume=killed, progress=False)


def test_only_some_options_may_change(host_run: Run, runs: Path) -> None:
    with pytest.raises(RunError, match=r"seed was 0, given is 5; num_envs was 4, given is 2"):
        train(tiny_config(seed=5, num_envs=2), resume=host_run, progress=False)
    model = tiny_config().world_model
    with pytest.raises(RunError, match=r"world_model\.hidden was 16, given is 32"):
        train(tiny_config(world_model=dataclasses.replace(model, hidden=32)), resume=host_run, progress=False)
    with pytest.raises(RunError, match=r"reached its total of 400 steps.*--total-steps 800"):
        train(tiny_config(), resume=host_run, progress=False)
    # All that may change, changed at once.
    run = copy_until(host_run, 200, runs / "changed")
    config = tiny_config(
        total_steps=300,
        checkpoint_every=50,
        checkpoints_kept=1,
        log_every=50,
        world_model_every=100,
        agents_every=100,
        world_model=dataclasses.replace(model, lr=2e-3),
        agents=dataclasses.replace(tiny_config().agents, lr=2e-3),
    )
    train(config, resume=run, progress=False)
    assert list(saved(run.checkpoints)) == [300]
    assert run.config.world_model.lr == 2e-3
    assert run.config.total_steps == 300


def test_an_earlier_checkpoint_can_be_chosen(host_run: Run, runs: Path) -> None:
    run = copy_until(host_run, 400, runs / "earlier")
    train(resume=run, checkpoint=200, progress=False)
    assert_same(arrays(run), arrays(host_run))
    assert (run.checkpoints / "set_aside" / "400" / "manifest.json").exists()
    assert timeless(run) == timeless(host_run)


def after(calls: int, monkeypatch: pytest.MonkeyPatch, do: Any) -> None:
    """Let `do(runner, metrics)` change what the driver answers from its `calls`-th step on."""
    advance, count = HostDriver.advance, [0]

    def changed(self: HostDriver, runner: Any) -> Any:
        count[0] += 1
        answer = advance(self, runner)
        return do(*answer) if count[0] >= calls else answer

    monkeypatch.setattr(HostDriver, "advance", changed)


def test_nan_stops_the_run_and_names_its_part(host_run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(runner: Any, metrics: Sums) -> Any:
        spoilt = ("world_model/reward", "world_model/loss", "agent/agent_0/actor_loss")
        places = jnp.array([metrics.names.index(name) for name in spoilt])
        return runner, Sums(metrics.numbers.at[places, 0].set(jnp.nan), metrics.names)

    run = copy_until(host_run, 200, runs / "nan")
    with monkeypatch.context() as patch:
        after(5, patch, poison)
        with pytest.raises(TrainingDiverged) as err:
            train(resume=run, progress=False)
    assert str(err.value).startswith("world_model/reward became nan at step 216; training has stopped")
    assert "checkpoints/200" in str(err.value)
    assert f"codream train --resume {run.path}" in str(err.value)
    assert list(saved(run.checkpoints)) == [200]
    assert all(np.isfinite(x) for line in run.metrics() for x in line.values())
    train(resume=run, progress=False)  # the broken state was not kept
    assert_same(arrays(run), arrays(host_run))


def test_later_nans_do_not_hide_the_first() -> None:
    def of(a: float, b: float) -> tuple[Sums]:
        return (Sums.of({"a": (jnp.asarray(a), jnp.asarray(1)), "b": (jnp.asarray(b), jnp.asarray(1))}),)

    totals, fine = loop._add(of(1.0, 1.0), of(1.0, np.nan))
    assert not fine.any()
    (total,), _ = loop._add(totals, of(np.nan, np.nan))
    assert total["a"] == (2, 2)
    assert np.isnan(total["b"][0])


def test_an_environment_that_raises(runs: Path) -> None:
    with pytest.raises(EnvironmentFailure) as err:
        train(toy_config(), env=lambda: Toy(broken_at=4), name="broken", root=runs, progress=False)
    text = str(err.value)
    assert "ZeroDivisionError: the cat is out of the bag" in text
    assert "after step 6 of the run" in text
    # Only the script that has the function can give it the environment again.
    assert f'There is no checkpoint yet; start over with\n  codream.train(resume="{runs / "broken"}", env=…)' in text
    # Started over, with an environment that works this time.
    run = train(resume=runs / "broken", env=Toy, progress=False)
    fresh = train(toy_config(), env=Toy, name="not-broken", root=runs, progress=False)
    assert_same(arrays(run), arrays(fresh))
    # And later on, with a checkpoint.
    with pytest.raises(
        EnvironmentFailure, match=r"after step 12\d of the run. The last checkpoint is .*/checkpoints/12"
    ):
        train(toy_config(total_steps=200), resume=run, env=lambda: Toy(broken_at=4), progress=False)


def test_an_interrupted_run_says_how_to_go_on(
    host_run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(runner: Any, metrics: Any) -> Any:
        raise KeyboardInterrupt

    run = copy_until(host_run, 200, runs / "interrupted")
    with monkeypatch.context() as patch:
        after(3, patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(resume=run, progress=True)
    assert f"go on with\n  codream train --resume {run.path}" in capsys.readouterr().out
    train(resume=run, progress=False)
    assert_same(arrays(run), arrays(host_run))


def test_a_longer_schedule_is_told_where_it_jumps() -> None:
    short = replaced(preset("wm_rnd"), {"total_steps": 1_000, "projection.symmetry_end": 0.0})
    long = dataclasses.replace(short, total_steps=2_000)
    told = _jump(short, long, 500) or ""
    assert "instead of 1,000 the symmetry ratio jumps from 0.500 to 0.750 at step 500" in told
    assert _jump(short, short, 500) is None
    fixed = replaced(short, {"projection.schedule": "constant"})
    assert _jump(fixed, dataclasses.replace(fixed, total_steps=2_000), 500) is None
    assert _jump(preset("small"), dataclasses.replace(preset("small"), total_steps=2_000), 500) is None


def test_a_run_folder_is_never_overwritten(host_run: Run, runs: Path) -> None:
    with pytest.raises(RunError, match=r"already exists and is never overwritten.*--resume"):
        train(tiny_config(), name="host", root=runs, progress=False)
    spec = json.loads((host_run.path / "run.json").read_text())
    assert spec["environment"]["version"].startswith("mpe2 ")
    names = [Run.create(tiny_config(), _SPEC, name=None, root=runs / "named").path.name for _ in "abc"]
    assert names == ["simple_tag-small-seed0", "simple_tag-small-seed0-2", "simple_tag-small-seed0-3"]
    with pytest.raises(RunError, match=r"hots does not exist; runs in .*/host, "):
        Run.open("hots", runs)
    with pytest.raises(RunError, match="is not a run"):
        Run.open(runs, runs)


def test_metrics_are_named_once_per_part(host_run: Run) -> None:
    lines = host_run.metrics()
    assert [line["steps"] for line in lines] == [100, 200, 300, 400]
    last = lines[-1]
    assert {"seconds", "steps_per_second", "world_model/loss", "agent/agent_0/actor_loss"} <= last.keys()
    assert "episode/return/adversary_2" in last
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
