"""`watch`: evaluation episodes of trained agents as GIF or MP4, beside what one of them imagined. Needs no display."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from codream.agents import Agents, loaded
from codream.config import ConfigError
from codream.envs import HostEnv
from codream.model_quality import Recording
from codream.progress import Bar
from codream.report.animation import scene_of
from codream.report.dreams import played_only, recorded
from codream.report.film import FPS, check_film, framed, frames_of, write_film
from codream.report.measures import scenes_of
from codream.runs import Run
from codream.training import common_reward

__all__ = ["watch"]

LIMIT = 500  # steps of an episode that are shown
HELD = 6  # frames for which an episode's last picture stands


def watch(
    run: Agents | str | Path | Run,
    *,
    out: str | Path | None = None,
    episodes: int = 3,
    dream: bool = True,
    agent: str | None = None,
    greedy: bool = False,
    seed: int = 0,
    fps: float = FPS,
    checkpoint: int | str | None = None,
    env: Any = None,
    env_kwargs: Mapping[str, Any] | None = None,
    root: str | Path = "runs",
    progress: bool = True,
) -> Path:
    """Play `episodes` evaluation episodes and write them as an animation. Returns its path.

    `run`: or its agents, loaded already. `out`: a file that ends in .gif or .mp4 (default: `watch.gif` in the run's
    folder). `dream`: beside each episode
    what `agent` (default: the first) imagined from its start on; where a game is long, its first 48 steps. Without,
    all of up to 500 steps. `greedy`: the most probable action instead of a sampled one. `env`: the environment,
    where the run was trained on one given as an object. `env_kwargs`: keywords that it is made with, besides those of
    training or instead of them (see `load`).

    Drawn are positions in the games of MPE whose layout is known, boards, and images as the agent sees them; elsewhere
    the environment's own picture where it is PettingZoo's and can make one, or the entries of the observation. Beside
    the agents' names is what they have earned so far, with `common_reward` everyone the sum of all.

    Raises RunError and CheckpointError as `load` does, ConfigError for an agent that is not there, another file name
    or a `checkpoint` or `env_kwargs` of loaded agents,
    ModuleNotFoundError where MP4 lacks its library.
    """
    folder = Path(run.name) if isinstance(run, Agents) else Run.open(run, root).path
    path = folder / "watch.gif" if out is None else Path(out)
    try:
        check_film(path)
    except ValueError as err:
        raise ConfigError(str(err)) from None
    if episodes < 1 or fps <= 0:
        raise ConfigError(f"episodes must be 1 or more and fps above 0, got {episodes} and {fps:g}")
    agents = loaded(run, checkpoint=checkpoint, env=env, env_kwargs=env_kwargs, root=root)
    spec = agents.spec
    if agent is not None and agent not in spec.agents:
        raise ConfigError(f"{spec.name} has the agents {', '.join(spec.agents)}, got {agent!r}")
    focal = 0 if agent is None else spec.agents.index(agent)
    with Bar("watch", 3, unit="parts", show=progress) as bar:
        bar.note("playing")
        played = recorded(agents, episodes, greedy=greedy, seed=seed, limit=LIMIT)
        bar.note("drawing")
        bar.update(1)
        frames = _frames(agents, played, episodes, focal, dream, greedy, seed)
        bar.note("writing")
        bar.update(2)
        write_film(path, frames, fps)
        bar.update(3, last=True)
    return path


def _frames(
    agents: Agents, played: Recording, episodes: int, focal: int, dream: bool, greedy: bool, seed: int
) -> list[Image.Image]:
    chosen = [(f"episode {k + 1}", k) for k in range(episodes)]
    spec = agents.spec
    dreams = dream and getattr(agents.state, "world_model", None) is not None
    scenes = scenes_of(agents, played, chosen) if dreams else []
    common = agents.config.common_reward
    if not scenes:
        scenes = [scene_of(episode, spec) for episode in played_only(spec, played, chosen, LIMIT, common=common)]
    if scenes[0]["kind"] == "curves":
        own = _own_pictures(agents, episodes, greedy, seed)
        if own:
            return own
    frames = []
    for scene in scenes:
        title = "" if dreams else scene["label"]
        drawn = frames_of(scene, focal, spec.sides, spec.agents, title)
        frames += drawn + [drawn[-1]] * HELD
    return frames


def _own_pictures(agents: Agents, episodes: int, greedy: bool, seed: int) -> list[Image.Image]:
    """Episodes as a PettingZoo environment draws them; none where it cannot."""
    try:
        env = agents.make_env(1, render_mode="rgb_array")
    except Exception:  # whatever it says to a keyword that it may not have
        return []
    if not isinstance(env, HostEnv):
        return []
    with contextlib.closing(env):
        return _pictured(agents, env, episodes, greedy, seed)


def _pictured(agents: Agents, env: Any, episodes: int, greedy: bool, seed: int) -> list[Image.Image]:
    if not hasattr(env, "picture") or env.spec != agents.spec:
        return []
    frames: list[Image.Image] = []
    rng = np.random.default_rng(seed)
    for k in range(episodes):
        player, here = agents.player(greedy=greedy), env.reset(np.asarray([seed + k]))
        total = np.zeros(agents.spec.num_agents)
        for t in range(LIMIT + 1):
            picture = _picture(env)
            if picture is None:
                return []
            frames.append(framed(picture, f"episode {k + 1}", t, agents.spec.agents, total, agents.spec.sides))
            if bool(here.last[0]):
                break
            before, here = here, env.step(player.act(here, rng), np.asarray([seed + k]))
            paid = common_reward(before, here) if agents.config.common_reward else here
            total = total + np.asarray(paid.reward)[0]
        frames += [frames[-1]] * HELD
    return frames


def _picture(env: Any) -> np.ndarray | None:
    """What the environment draws; None, and a note why, where that fails or is no picture."""
    try:
        picture = env.picture()
    except Exception as err:  # taking a render mode does not mean that there is a `render`
        got = f"raised {type(err).__name__}" + (f": {err}" if str(err) else "")
    else:
        if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[-1] in (3, 4) and picture.size:
            return picture
        got = f"gave an array of shape {picture.shape}" if isinstance(picture, np.ndarray) else f"gave {picture!r:.40}"
    print(
        f"codream: {env.spec.name} is shown as curves: its render was to give an RGB array [height, width, 3] "
        f"(render_mode rgb_array), but {got}",
        file=sys.stderr,
    )
    return None
