"""Cross-play and acting: the right pairings, the right count of episodes, the same actions on raw
observations."""

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from helpers import Toy, ppo_config, tiny_config, toy_config
from mpe2 import simple_tag_v3

from codream import (
    Agents,
    ConfigError,
    EnvironmentFailure,
    EnvSpec,
    Run,
    RunError,
    TimeStep,
    evaluate,
    load,
    make_env,
    report,
    scoring,
    train,
    watch,
)
from codream.envs.own import apart
from codream.evaluation import CrossPlay, Row, _line_ups, _opponents, _row
from codream.model_quality import sequences_of
from codream.playing import EndlessEpisode, play
from codream.report.dreams import dream, recorded
from codream.report.measures import _affordable
from codream.trainer import named
from codream.training import driver_for


@pytest.fixture(scope="module")
def agents(host_run: Run) -> Agents:
    return load(host_run)


@pytest.fixture(scope="module")
def result(agents: Agents) -> CrossPlay:
    return evaluate(agents, episodes=4, progress=False)


def test_every_side_plays_every_reference(result: CrossPlay, agents: Agents) -> None:
    sides = [row.sides for row in result.rows]
    pairings = [
        ("self", "self"),
        *(("self", name) for name in ("random", "still", "flee")),
        *((name, "self") for name in ("random", "still", "chase")),
    ]
    assert sides == [{"adversary": adversary, "agent": agent} for adversary, agent in pairings]
    assert result.environment == "mpe2:simple_tag_v3"
    assert agents.steps == 400
    written = json.loads(json.dumps(result.to_json()))
    # Every number says how it came about.
    told = {"environment": "mpe2:simple_tag_v3", "steps": 400, "episodes": 4, "seeds": 1, "greedy": False}
    assert told.items() <= written.items()
    assert written["version"].startswith("mpe2 ")
    assert written["device"].startswith("cpu")
    assert written["run"] == agents.name
    assert written["seconds"] > 0
    assert written["members"]["agent"] == ["agent_0"]
    assert set(written) == {*told, "version", "device", "run", "seconds", "members", "rows", "env_kwargs"}
    assert set(written["rows"][0]) == {"sides", "returns", "stderr", "side_stderr"}
    for row in written["rows"]:
        assert list(row["returns"]) == list(row["stderr"]) == list(agents.spec.agents)
    chased = result.mean("agent", adversary="chase", agent="self")
    assert chased[0] < result.mean("agent", adversary="still", agent="self")[0]
    with pytest.raises(KeyError, match="no row has"):
        result.mean("agent", adversary="flee", agent="self")


def test_conditions_are_said(result: CrossPlay) -> None:
    text = result.conditions()
    for part in ("after 400 steps", "sampled actions", "4 episodes", "1 seed", "mpe2 1.", "cpu", "host"):
        assert part in text
    table = result.table()
    assert [str(column.header) for column in table.columns][1:] == ["self", "random", "still", "flee"]


def test_a_report_shows_no_evaluation_of_others(result: CrossPlay, host_run: Run) -> None:
    sides = {"adversary": ["adversary_0"], "agent": ["agent_0"]}
    for change in ({"run": "runs/other"}, {"steps": 200}, {"environment": "toy"}, {"members": sides}):
        other = dataclasses.replace(result, **change)
        (name,) = change
        with pytest.raises(ConfigError, match=rf"latest checkpoint: {name} .*; got one of {name} .*\. Give evaluate\("):
            report(host_run, cross_play=other, progress=False)


def test_greedy_play_against_another_run_repeats(agents: Agents, host_run: Run) -> None:
    play_it = lambda: evaluate(  # noqa: E731
        agents, episodes=3, seeds=2, greedy=True, against=["flee", host_run.path], progress=False
    )
    one, two = play_it(), play_it()
    assert one.to_json() | {"seconds": 0} == two.to_json() | {"seconds": 0}
    assert one.episodes == 6
    path = str(host_run.path)
    assert [tuple(row.sides.values()) for row in one.rows] == [
        ("self", "self"),
        ("self", "flee"),
        ("self", path),
        (path, "self"),
    ]
    # The other run is the same one, and greedy play has no chance in it.
    assert one.rows[0].returns == one.rows[2].returns == one.rows[3].returns


def test_every_seed_plays_episodes_of_its_own(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def played(env: Any, players: Any, episodes: int, seed: int = 0, *rest: Any, **more: Any) -> Any:
        seeds.append(seed)
        return np.zeros((episodes, len(agents.spec.agents)))

    monkeypatch.setattr(sys.modules[evaluate.__module__], "play", played)
    result = evaluate(agents, episodes=1, seeds=3, against="random", progress=False)
    assert seeds == [0, 1, 2] * len(result.rows)


def test_opponents_that_do_not_exist(agents: Agents, host_run: Run) -> None:
    with pytest.raises(ConfigError, match=r"chaze is neither a reference \(random, still, .*\) nor a run"):
        evaluate(agents, episodes=1, against=["chaze"], progress=False)
    with pytest.raises(ConfigError, match="episodes must be 1 or more, got 0"):
        evaluate(agents, episodes=0)
    with pytest.raises(RunError, match="does not exist"):
        evaluate("no-such-run")


def names(spec: EnvSpec, against: list[str] | None = None) -> list[tuple[str, ...]]:
    opponents = _opponents(spec, against, False, None, "runs")
    return [tuple(sides.values()) for sides, _ in _line_ups(spec, object(), opponents)]


def test_one_side_and_three_sides() -> None:
    one = EnvSpec("spread", ("agent_0", "agent_1"), ((2,), (2,)), (2, 2))
    assert names(one) == [("self",), ("random",), ("still",)]
    assert names(one, ["random"]) == [("self",), ("random",)]
    assert names(one, []) == [("self",)]
    three = EnvSpec("three", ("cat_0", "dog_0", "mouse_0"), ((2,),) * 3, (2,) * 3)
    assert names(three, ["random"]) == [
        ("self", "self", "self"),
        ("self", "random", "random"),
        ("random", "self", "random"),
        ("random", "random", "self"),
    ]
    rows = [Row({"agent": "self"}, {"agent_0": 1.0, "agent_1": 2.0}, {"agent_0": 0.1, "agent_1": 0.3}, {"agent": 0.2})]
    shown = CrossPlay("e", None, "r", 1, 1, 1, False, "cpu", 1.0, {"agent": ["agent_0", "agent_1"]}, rows)
    assert shown.table().row_count == 1
    assert shown.mean("agent", agent="self") == pytest.approx((1.5, 0.2))
    rows = [Row({"side": "self", "self": "x"}, {"side_0": 1.0, "self_0": 2.0}, {}, {"side": 0.1, "self": 0.2})]
    named_so = dataclasses.replace(shown, members={"side": ["side_0"], "self": ["self_0"]}, rows=rows)
    assert named_so.mean("self", side="self", self="x") == (2.0, 0.2)


def test_what_one_agent_wins_and_another_loses_is_no_error_of_their_side() -> None:
    spec = EnvSpec("one", ("a_0", "a_1"), ((2,), (2,)), (2, 2))
    returns = np.asarray([[1.0, -1.0], [-3.0, 3.0], [2.0, -2.0]])
    row = _row(spec, {"a": "self"}, returns)
    assert row.side_stderr == {"a": 0.0}
    assert row.stderr["a_0"] == pytest.approx(np.std(returns[:, 0], ddof=1) / np.sqrt(3))


def test_one_opponent_or_a_run_may_be_given_as_it_is(agents: Agents, host_run: Run) -> None:
    assert names_of(agents, "random") == ["random"]
    assert names_of(agents, host_run) == names_of(agents, host_run.path) == [str(host_run.path)]
    assert names_of(agents, agents) == names_of(agents, ("random", agents))[1:] == [str(host_run.path)]
    for play_them in (evaluate, watch, dream):
        for asked in ({"checkpoint": 200}, {"env_kwargs": {"max_cycles": 3}}):
            with pytest.raises(ConfigError, match=rf"loaded already: codream\.load\(run, {next(iter(asked))}=…"):
                play_them(agents, **asked)
    with pytest.raises(ConfigError, match="file that ends in"):  # agents are what it takes
        watch(agents, out="film.mov")
    for with_runs_only, message in (
        (report, r"codream\.report\('.*host'\)"),
        (Run.open, "expected a run, by its folder"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(with_runs_only)(agents)  # as it is without the tests' check of annotations


def test_trained_agents_play_where_the_environment_has_other_keywords(agents: Agents, host_run: Run) -> None:
    shorter = load(host_run, env_kwargs={"max_cycles": 3})
    assert len(recorded(shorter, 2, limit=None)[0]) == 3 + 1 < len(recorded(agents, 2, limit=None)[0])
    result = evaluate(host_run, episodes=2, against=[], env_kwargs={"max_cycles": 3}, progress=False)
    assert result.env_kwargs == result.to_json()["env_kwargs"] == {"max_cycles": 3}
    assert "simple_tag_v3 (mpe2 1." in result.conditions()
    assert ' with {"max_cycles": 3}, cpu' in result.conditions()
    assert eqx.tree_equal(shorter.state, agents.state)
    with pytest.raises(RunError, match="was trained on another environment: agents was"):
        load(host_run, env_kwargs={"num_adversaries": 2})
    with pytest.raises(ConfigError, match=r"simple_tag with {'max_cycle': 3} cannot be used"):
        load(host_run, env_kwargs={"max_cycle": 3})
    with pytest.raises(ConfigError, match=r"latest checkpoint: env_kwargs {}; got one of env_kwargs {'max_cycles': 3}"):
        report(host_run, cross_play=result)


def test_policies_of_ones_own_are_opponents_by_name(agents: Agents) -> None:
    result = evaluate(agents, episodes=4, against={"mine": Same(), "twin": agents}, progress=False)
    opponents = [("self", "self"), ("self", "mine"), ("self", "twin"), ("mine", "self"), ("twin", "self")]
    assert [tuple(row.sides.values()) for row in result.rows] == opponents
    for given, message in (
        (Same(), r'got Same: give \{"mine": Same'),
        ([3], "got int"),
        ({"self": Same()}, "other than self"),
        ({"mine": Same}, "expected mine to be a policy, .* got the class Same"),
        ({"mine": 3}, "got int"),
        ([agents, load(agents.name)], "two opponents are called"),
    ):
        with pytest.raises(ConfigError, match=message):
            names_of(agents, given)
    policy = _opponents(agents.spec, {"mine": SimpleNamespace(act=lambda here, rng: [0.5])}, False, None, "runs")
    with pytest.raises(ConfigError, match=r"mine answered with float64 of shape \(1,\); expected whole .*\(2, 4\)"):
        policy["mine"]["agent"].act(TimeStep.blank(agents.spec, 2), np.random.default_rng(0))


def names_of(agents: Agents, against: Any) -> list[str]:
    return list(_opponents(agents.spec, against, False, None, "runs"))


def test_an_episode_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[play.__module__], "LONGEST", 5)
    with pytest.raises(EndlessEpisode, match="an episode of toy has not ended after 5 steps"):
        play(make_env(Toy, 2), {"cat": Same(), "mouse": Same()}, episodes=2)
    assert len(play(make_env(lambda: Toy(length=5), 2), {"cat": Same(), "mouse": Same()}, episodes=7)) == 7


class Counted(Toy):
    """Counts how often one of them was closed."""

    closed = 0

    def close(self) -> None:
        Counted.closed += 1


def test_what_make_env_made_can_be_trained_on_and_evaluated_with(runs: Path) -> None:
    """Any number of its copies is made for playing; and a name given as the environment is one."""
    made = make_env(Counted, 2)
    run = train(ppo_config(), env=made, name="made", root=runs, progress=False)
    assert Counted.closed == 0  # it is not ours
    assert evaluate(run, env=made, episodes=3, against="random", progress=False).rows
    assert Counted.closed == 3  # the copies that were made of it
    train(ppo_config(), env=Counted, name="of-a-class", root=runs, progress=False)
    assert Counted.closed == 5
    with pytest.raises(EnvironmentFailure, match="out of the bag"):
        evaluate(run, env=lambda: Counted(broken_at=2), episodes=3, progress=False)
    assert Counted.closed == 8
    more = make_env(apart(make_env("simple_tag", 2, max_cycles=7)), 3)
    assert (more.spec.name, getattr(more, "num_envs", 0)) == ("mpe2:simple_tag_v3", 3)
    config, env = named(tiny_config(), "jaxmarl:simple_tag")
    assert (config.env, env) == ("jaxmarl:simple_tag", None)


class Two:
    """Two copies of `Toy` that are stepped by an object of the user's."""

    num_envs = 2

    def __init__(self) -> None:
        self.inner: Any = make_env(lambda: Counted(uneven=True), 2)
        self.spec = self.inner.spec

    def reset(self, seeds: Any) -> TimeStep:
        assert seeds.shape == (2,)
        return self.inner.reset(seeds)

    def step(self, actions: Any, seeds: Any) -> TimeStep:
        return self.inner.step(actions, seeds)

    def close(self) -> None:
        self.inner.close()


def test_an_object_that_steps_its_own_copies_is_played_as_it_is_and_left_open(runs: Path) -> None:
    own, before = Two(), Counted.closed
    run = train(ppo_config(), env=own, name="two", root=runs, progress=False)
    assert evaluate(run, env=own, episodes=5, against="random", progress=False).episodes == 5
    agents = load(run, env=own)
    steps, actions = recorded(agents, 5, limit=None)  # in three rounds
    assert len(steps) == len(actions) + 1
    assert {step.first.shape for step in steps} == {(5,)}
    ended = np.stack([step.last for step in steps])
    assert ended.any(axis=0).all()
    assert sequences_of(steps, actions, 2).acting.any(axis=(1, 2)).all()
    assert 2 <= _affordable(agents) <= 40
    assert Counted.closed == before
    own.close()
    assert Counted.closed == before + 2


class Same:
    """Everyone takes action 1 always, so every step of `Toy` pays the cat 1."""

    def act(self, timestep: Any, rng: Any) -> Any:
        return np.ones(timestep.acting.shape, int)


def test_play_counts_whole_episodes_fairly() -> None:
    env = make_env(lambda: Toy(uneven=True), 3)
    returns = play(env, {"cat": Same(), "mouse": Same()}, episodes=400)
    assert returns.shape == (400, 2)
    lengths = returns[:, 0]
    assert set(lengths) == set(range(3, 10))
    # Lengths are uniform on 3…9; were short episodes preferred, their mean would be far below 6.
    assert abs(lengths.mean() - 6) < 4 * lengths.std() / 20
    np.testing.assert_array_equal(returns[:, 1], -lengths)
    assert len(play(env, {"cat": Same(), "mouse": Same()}, episodes=2)) == 2


def test_what_chose_a_checkpoint_is_not_what_it_is_judged_by() -> None:
    """The same seed gives the score and `evaluate` other starts, and each its own again."""
    began: list[int] = []

    class Noted(Toy):
        def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
            began.extend([seed] if seed else [])  # without one, only the spaces are looked at
            return super().reset(seed, options)

    def starts(**stream: int) -> list[int]:
        began.clear()
        play(make_env(Noted, 2), {"cat": Same(), "mouse": Same()}, 6, 3, **stream)
        return list(began)

    assert starts() == starts(stream=0)
    assert starts(stream=scoring.STREAM) == starts(stream=scoring.STREAM)
    assert not set(starts()) & set(starts(stream=scoring.STREAM))
    config = ppo_config(checkpoints_best="cat:self", checkpoints_best_episodes=6, seed=3)
    make = lambda copies: make_env(Noted, copies)  # noqa: E731
    driver = driver_for(make_env(Toy, 2), config.resolve(make_env(Toy).spec))
    began.clear()
    scoring.Scorer(config, driver.spec, make)(driver.start(jax.random.key(0)).state, 0)
    chose = list(began)
    assert len(chose) >= 6
    assert not set(starts()) & set(chose)


def test_acting_on_raw_observations_is_acting_in_the_environment(agents: Agents) -> None:
    host = make_env("simple_tag")
    here = host.reset(np.asarray([7]))
    player, rng = agents.player(greedy=True), np.random.default_rng(0)
    env = simple_tag_v3.parallel_env()
    for _ in range(2):  # the second episode starts from nothing, too
        obs, infos = env.reset(seed=7)
        agents.reset()
        while env.agents:
            actions = agents.act({a: obs[a] for a in env.agents}, infos, greedy=True)
            expected = player.act(here, rng)[0]
            assert actions == dict(zip(agents.spec.agents, expected.tolist(), strict=True))
            obs, _, _, _, infos = env.step(actions)
            here = host.step(expected[None], np.asarray([7]))
        player.act(here, rng)
        here = host.step(expected[None], np.asarray([7]))


def test_absent_agents_get_no_action(agents: Agents) -> None:
    env = simple_tag_v3.parallel_env()
    obs, _ = env.reset(seed=1)
    agents.reset(seed=3)
    del obs["adversary_1"]
    first = agents.act(obs)
    assert list(first) == list(obs)
    agents.reset(seed=3)
    assert agents.act(obs) == first
    with pytest.raises(ValueError, match=r"has the agents adversary_0, .*; got an observation of prey_7"):
        agents.act({"prey_7": obs["agent_0"]})


def test_an_environment_that_has_our_interface_has_no_raw_observations(agents: Agents) -> None:
    ours = Agents(
        agents.state, agents.config, steps=0, env=SimpleNamespace(spec=agents.spec), make=agents.make_env, name="ours"
    )
    with pytest.raises(TypeError, match=r"agents\.player\(\)\.act\(timestep, rng\)"):
        ours.act({})


def test_a_run_on_an_object_needs_it_again(runs: Path) -> None:
    run = train(toy_config(), env=Toy, name="toy", root=runs, progress=False)
    with pytest.raises(RunError, match=r"pass it again: .* --env-from helpers:Toy, in Python env=…"):
        load(run)
    result = evaluate(run, env=Toy, episodes=6, against=["random", run.path], progress=False)
    assert result.version is None
    assert len(result.rows) == 5
    assert run.to_resume() == f"codream train --resume {run.path} --env-from helpers:Toy"
    assert run.typed("report") == f"codream report {run.path} --env-from helpers:Toy"
    with pytest.raises(RunError, match="another environment: name was toy, now it is"):
        load(run, env=simple_tag_v3.parallel_env)
