"""Reports of WM-RND: its own panels, dreams of a model without memory, boards, and runs without any world model."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import COINS, episode_of, run_folder, without_dreams
from test_report import checked

import codream
from codream import Run, cli, preset
from codream.config import Config
from codream.envs import EnvSpec
from codream.envs.actions import action_names
from codream.inspection import inspect
from codream.report.animation import scene_of
from codream.report.entries import conditions, entry_of, measured, units
from codream.report.film import film
from codream.report.grids import grids
from codream.report.html import run_page
from codream.report.panels import training_panels


def short(name: str, **changes: object) -> Config:
    """A preset on coin_game with tiny nets and episodes."""
    base = preset(name)
    return dataclasses.replace(
        base,
        env="coin_game",
        env_kwargs={"num_inner_steps": 6, "num_outer_steps": 1},
        num_envs=4,
        total_steps=64,
        checkpoint_every=64,
        log_every=32,
        world_model_every=16.0,
        world_model=dataclasses.replace(
            base.world_model,
            hidden=8,
            units=8,
            groups=2,
            classes=4,
            batch=2,
            length=4,
            team_hidden=8,
            team_heads=2,
            heads=2,
        ),
        ppo=dataclasses.replace(base.ppo, units=8, layers=1, rollout=8, epochs=1, minibatches=2),
        curiosity=dataclasses.replace(base.curiosity, units=8, features=4),
        **changes,
    )


@pytest.fixture(scope="module")
def coins(runs: Path) -> Run:
    """WM-RND after a few steps, and its full report."""
    config = short("wm_rnd")
    config = dataclasses.replace(
        config, projection=dataclasses.replace(config.projection, imagination_steps=2, starts=4)
    )
    run = codream.train(config, name="coins", root=runs, progress=False)
    codream.report(run, episodes=2, progress=False)
    return run


def test_a_report_of_a_social_dilemma(coins: Run) -> None:
    text = checked(coins.path / "report.html")
    for said in (
        "What if everyone acted as I do?",
        "Symmetry ratio",
        "Has the code collapsed?",
        "Curiosity: intrinsic reward",
        "Social outcomes",
        "efficiency",
        "How well they play together",
        "told everyone’s actions",
        "Discs are agents, diamonds are coins",
    ):
        assert said in text, said
    for other in ("Teammate loss", "Who predicts whom", "Nothing was logged"):
        assert other not in text, other
    found = json.loads((coins.path / "measured.json").read_text())
    scene = found["scenes"][0]
    assert scene["kind"] == "grid"
    assert scene["others"] == "mirrored"
    view = scene["views"][1]
    assert np.asarray(view["real"]).shape == np.asarray(view["dream"]).shape == (scene["steps"] + 1, 9, 4)
    assert np.asarray(view["real"]).sum(axis=(1, 2)).tolist() == [4.0] * (scene["steps"] + 1)
    assert np.asarray(view["others"]).sum(axis=-1) == pytest.approx(1.0, abs=0.01)
    assert len(found["model"]["by_horizon"]) == scene["steps"] < 12  # as far as its episodes go
    assert np.isfinite(found["model"]["by_horizon"]).all()


def test_compared_it_says_what_its_numbers_are(coins: Run) -> None:
    entry = entry_of(coins)
    scores = measured({"coins": [entry]}, {"agent": (0, 1)})
    social = json.loads((coins.path / "measured.json").read_text())["cross_play"]["social"]
    assert scores["cooperation"] == {"coins": [social["cooperation"]["all"][0]]}
    assert "per episode; efficiency: the sum of all agents’; equality: 1 − Gini; " in units(scores)
    assert units({}) == "return of one agent per episode"
    told = r"Sampled actions, 2 episodes of every pairing after [\d,]+ steps; jaxmarl [\d.]+; cpu \(.*\)\."
    assert re.fullmatch(told, conditions({"coins": [entry]}) or "")
    assert conditions({}) is None


def test_watching_it(coins: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gif = tmp_path / "coins.gif"
    assert cli.main(["watch", str(coins.path), "--out", str(gif), "--episodes", "1", "--agent", "agent_1"]) == 0
    assert f"Written to {gif}" in capsys.readouterr().out
    with Image.open(gif) as film:
        assert film.n_frames >= 6  # pyright: ignore[reportAttributeAccessIssue]
    assert cli.main(["watch", str(coins.path), "--out", "coins.avi"]) == 2
    assert "ends in .gif or .mp4" in capsys.readouterr().err
    assert cli.main(["watch", str(coins.path), "--agent", "agent_7"]) == 2
    assert "has the agents agent_0, agent_1" in capsys.readouterr().err


def test_a_model_free_run(runs: Path) -> None:
    run = codream.train(short("ippo"), name="ippo", root=runs, progress=False)
    text = checked(codream.report(run, episodes=2, progress=False))
    assert "This run has no world model" in text
    assert "How far ahead" not in text
    assert "World model: total loss" not in text
    assert "Size of the policy steps" in text
    assert codream.watch(run, episodes=1, progress=False).stat().st_size > 1_000


def test_panels_are_those_that_a_run_can_fill() -> None:
    line = {"steps": 10.0, "episode/return/a": 1.0, "episode/count": 2.0, "agent/a/actor_loss": 0.1}
    keys = [panel.key for panel in training_panels([line], ("a",), {"a": (0,)}, None, "wm_rnd")]
    assert keys == ["returns", "cumulative", "actors", "critics", "values", "entropy", "kl"]
    with_model = {**line, "world_model/loss": 1.0, "agent/a/imagined_return": 0.0, "agent/a/intrinsic_reward": 0.1}
    keys = [panel.key for panel in training_panels([with_model], ("a",), {"a": (0,)}, None, "wm_rnd")]
    assert keys[7:] == ["imagined", "symmetry", "world-model", "parts", "code", "rank", "curiosity"]


def test_a_board_is_what_the_agent_sees() -> None:
    found = grids(COINS)
    assert found is not None
    obs = np.zeros((3, 3, 4))
    obs[2, 0, 0] = obs[1, 1, 3] = 1  # itself below on the left, a coin of the other's in the middle
    cells = found[1].cells(obs.reshape(-1))
    assert [(c, found[1].things[k]) for c, k in np.argwhere(cells)] == [
        (4, found[1].things[3]),
        (6, found[1].things[0]),
    ]
    assert (found[1].things[3].kind, found[1].things[3].agent) == ("coin", 0)
    assert grids(dataclasses.replace(COINS, name="jaxmarl:other")) is None
    assert action_names(COINS)[0] == "right"
    words = EnvSpec("mpe2:simple_speaker_listener_v4", ("speaker_0", "listener_0"), ((3,), (11,)), (3, 5))
    assert action_names(words) == ["0", "1", "2", "3", "4"]  # the speaker's are no moves


@pytest.mark.parametrize("spec", [COINS, EnvSpec("own", ("a_0", "b_0"), ((3,), (60,)), (2, 3))], ids=lambda s: s.name)
def test_episodes_without_dreams_can_be_drawn(spec: EnvSpec, tmp_path: Path) -> None:
    scene = scene_of(without_dreams(episode_of(spec)), spec)
    assert all(view["dream"] is None for view in scene["views"])
    assert film(scene, 0, spec.sides).startswith(b"GIF8")
    run = run_folder(tmp_path / "run")
    assert run_page("x", run.config, run.about, [], [], None, spec.sides, []).endswith("</html>\n")


@pytest.mark.parametrize("name", ["wm_rnd", "ippo"])
def test_inspection_takes_it_apart(name: str) -> None:
    found = inspect(short(name))
    parts = [part for part, _, _ in found.shapes]
    assert parts[0] == "actor (each agent)"
    assert ("rewards of all" in parts) == (name == "wm_rnd")
    assert ("world model" in found.parameters) == (name == "wm_rnd")
    each = sum(n for part, n in found.parameters.items() if part.startswith("agent "))
    assert found.parameters["total"] == each + found.parameters.get("world model", 0)
    assert all(ours > 0 for ours, _ in found.flops.values())
    assert found.memory["rollout"] > 0
