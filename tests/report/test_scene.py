"""Positions decoded from observations are those of the environment's own bodies."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenes import TAG, episode_of, run_folder

import codream
from codream import cli
from codream.envs import EnvSpec
from codream.report import watching
from codream.report.animation import scene_of
from codream.report.curves import curves_of, point
from codream.report.dreams import typical_episodes
from codream.report.film import film, frames_of, write_film
from codream.report.scene import layouts
from codream.report.storyboard import storyboard


@pytest.mark.parametrize("name", ["simple_tag", "simple_spread", "simple_adversary", "simple"])
def test_positions_are_those_of_the_world(name: str) -> None:
    env = codream.make_env(f"mpe2:{name}")
    here = env.reset(np.array([3]))
    found = layouts(env.spec)
    assert found is not None
    world = env._copies.envs[0].unwrapped.world
    truly = np.array([body.state.p_pos for body in world.agents])
    places = np.array([body.state.p_pos for body in world.landmarks])
    for i, layout in enumerate(found):
        middle = np.zeros(2) if layout.own is not None else truly[i]
        obs = np.asarray(here.obs)[0, i]
        np.testing.assert_allclose(layout.agents(obs, env.spec.num_agents), truly - middle, atol=1e-5)
        np.testing.assert_allclose(layout.places(obs), places - middle, atol=1e-5)
    env.close()


def test_other_games_have_no_layout() -> None:
    assert layouts(EnvSpec("mine", ("a", "b"), ((4,), (4,)), (2, 2))) is None
    assert layouts(EnvSpec("mpe2:simple_tag_v3", ("adversary_0", "agent_0"), ((5,), (5,)), (5, 5))) is None
    assert layouts(EnvSpec("mpe2:simple_push_v3", ("adversary_0", "agent_0"), ((8,), (19,)), (5, 5))) is None


def test_the_gap_is_the_distance_between_dream_and_reality() -> None:
    episode = episode_of(TAG, dreams=1)
    scene = scene_of(episode, TAG)
    for view in scene["views"]:
        apart = np.linalg.norm(np.array(view["real"]) - np.array(view["dream"]), axis=-1).mean(axis=-1)
        np.testing.assert_allclose(view["gap"], apart, atol=2e-3)
        assert view["gap"][: episode.start + 1] == [0] * (episode.start + 1)


@pytest.mark.parametrize(
    "spec",
    [TAG, EnvSpec("own", ("a", "b"), ((3,), (5,)), (2, 2)), EnvSpec("seen", ("a", "b"), ((16, 16, 1),) * 2, (2, 2))],
    ids=lambda spec: spec.name,
)
def test_a_film_has_a_frame_for_every_step(spec: EnvSpec) -> None:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(film(scene_of(episode_of(spec), spec), 1, spec.sides))) as gif:
        assert getattr(gif, "n_frames", 1) == 13


# JAX warns of any fork, this one only becomes ffmpeg; imageio_ffmpeg leaves the pipes of a reader to the collector.
@pytest.mark.filterwarnings(r"ignore:os\.fork:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_an_mp4_can_be_read_back(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    scene = scene_of(episode_of(TAG), TAG)
    frames = frames_of(scene, 1, TAG.sides, TAG.agents)
    path = tmp_path / "new" / "film.mp4"
    write_film(path, frames, fps=4)
    reader = ffmpeg.read_frames(str(path))
    about = next(reader)
    assert about["fps"] == 4
    width, height = about["size"]
    assert (width, height) == (frames[0].width // 2 * 2, frames[0].height // 2 * 2)
    read = [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    assert len(read) == len(frames) == 13
    for there, drawn in zip(read, frames, strict=True):
        difference = there.astype(float) - np.asarray(drawn)[:height, :width]
        assert np.abs(difference).mean() < 4  # of 255: the codec loses a little


def test_mp4_without_its_library_is_refused_before_playing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(watching, "loaded", None)  # nothing is loaded, let alone played
    run = run_folder(tmp_path / "run")
    assert cli.main(["watch", str(run.path), "--out", str(tmp_path / "film.mp4")]) == 2
    assert 'pip install "codream[video]", or choose a .gif' in capsys.readouterr().err


def test_the_episodes_shown_are_the_median_the_liveliest_and_the_quietest() -> None:
    env = codream.make_env("simple_tag", num_envs=5)
    here = env.reset(np.arange(5))
    steps = [here]
    for k in range(3):
        step = env.step(np.zeros((5, 4), int), np.arange(5))
        reward = np.zeros((5, 4))
        if k == 1:
            reward[:, 0] = [0, 4, -3, 1, 2]
        steps.append(type(step)(**{**vars(step), "reward": reward}))
    env.close()
    assert typical_episodes((steps, []), 3) == [
        ("a median episode", 4),
        ("the most eventful", 1),
        ("the quietest", 0),
    ]


def test_the_curves_are_those_of_the_entries_that_change_most() -> None:
    spec = EnvSpec("own", ("a_0", "b_0"), ((3,), (60,)), (2, 3))
    episode = episode_of(spec)
    dreamed = episode.dreams[1]
    assert dreamed.obs is not None
    dreamed.obs[0, -1, :] = 1e6  # a dream that runs away
    view = curves_of(episode.obs[:, 1], dreamed, 60, episode.start)
    spread = episode.obs[:, 1].std(axis=0)
    assert len(view["entries"]) == 12
    assert view["left_out"] == 48
    assert spread[view["entries"]].min() >= np.delete(spread, view["entries"]).max()
    np.testing.assert_allclose(view["real"], episode.obs[:, 1, view["entries"]], atol=1e-4)
    assert (np.asarray(view["low"]) <= np.asarray(view["dream"])[episode.start :]).all()
    assert (np.asarray(view["high"]) >= np.asarray(view["dream"])[episode.start :]).all()
    for k, (low, high) in enumerate(view["span"]):
        happened = [row[k] for row in view["real"]]
        assert low < min(happened) <= max(happened) < high
        assert high - low < 3 * (max(happened) - min(happened))
        for t, value in enumerate(happened):
            assert point(view, k, 12, t, value) == pytest.approx((t / 12, (high - value) / (high - low)))
    assert point(view, 0, 12, 12, 1e6) == (1.0, 0.0)


def test_entries_that_never_change_have_no_curve_and_small_ones_do() -> None:
    spec = EnvSpec("own", ("a_0", "b_0"), ((3,), (3,)), (2, 3))
    episode = episode_of(spec)
    real = episode.obs[:, 0] * 1e-7
    real[:, 1] = 5.0
    dreamed = dataclasses.replace(episode.dreams[0], obs=np.stack([real, real]))
    view = curves_of(real, dreamed, 3, episode.start)
    assert view["entries"] == [0, 2]
    assert view["left_out"] == 1
    assert len({point(view, 0, 12, t, row[0])[1] for t, row in enumerate(view["real"])}) > 10
    scene = scene_of(dataclasses.replace(episode, obs=np.ones_like(episode.obs), dreams=episode.dreams), spec)
    assert scene["views"][0]["entries"] == []
    assert "<svg" not in storyboard(scene, 0, spec.agents)
    assert film(scene, 0, spec.sides).startswith(b"GIF8")


class Undrawn:
    """Copies that take a render mode, and have no picture."""

    spec, num_envs = TAG, 1

    def __init__(self, gives: Any) -> None:
        self.gives = gives

    def reset(self, seeds: Any) -> None:
        del seeds

    def step(self, actions: Any, seeds: Any) -> None:
        del actions, seeds

    def picture(self) -> Any:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("gives", "note"),
    [
        (NotImplementedError(), "but raised NotImplementedError"),
        ("a text", "but gave 'a text'"),
        (np.zeros((4, 4)), r"but gave an array of shape (4, 4)"),
        (None, "but gave None"),
    ],
)
def test_an_environment_that_takes_a_render_mode_need_not_draw(
    gives: Any, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    agents = object.__new__(codream.Agents)  # nothing is loaded
    vars(agents).update(spec=TAG, make_env=lambda *_, **__: Undrawn(gives), player=lambda **_: None)
    assert watching._own_pictures(agents, 1, False, 0) == []
    assert note in capsys.readouterr().err
