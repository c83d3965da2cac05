"""What a report measures by playing: cross-play, the world model on held-out episodes, episodes and their dreams.

The result is kept as `measured.json` in the run's folder, so that a report can be drawn again without playing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from codream import retention
from codream.agents import Agents
from codream.config import ConfigError
from codream.envs import EnvSpec
from codream.envs.actions import action_names
from codream.envs.references import Random, references_for
from codream.evaluation import CrossPlay, evaluate
from codream.model_quality import Recording, measure
from codream.playing import as_host, play
from codream.progress import Bar
from codream.report.animation import scene_of
from codream.report.dreams import dreams_of, recorded, typical_episodes
from codream.runs import Run, replace_text

__all__ = ["FORMAT", "latest_measures", "measure_run", "saved_measures", "scenes_of"]

FORMAT = 6  # raised where what is measured changes, so that old measures are not put beside new ones
EPISODES = 40  # of every pairing, and for the world model, at most
BUDGET = 60.0  # seconds that all pairings together may take an environment that is slow
PAIRINGS = 20  # about as many as are played
LIMIT = 200  # steps of an episode that the world model is measured on
IMAGE_LIMIT, IMAGE_EPISODES = 60, 4  # the same for images, which are large
SAMPLES = 8  # dreams averaged for the error by horizon


def measure_run(
    run: Run,
    agents: Agents,
    *,
    cross_play: CrossPlay | None = None,
    episodes: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Play, measure, and keep the result in the run's folder. `cross_play`: an evaluation of the same agents, if there
    is one already. `episodes`: of every pairing; not given, as many as take about a minute, at most 40.

    Raises ConfigError for an evaluation of others."""
    began = time.monotonic()
    spec = agents.spec
    if cross_play is not None:
        _refuse_of_others(cross_play, run, agents)
    episodes = _affordable(agents) if episodes is None else episodes
    if cross_play is None:
        cross_play = evaluate(agents, episodes=episodes, progress=progress)
    with Bar("report", 4, unit="parts", show=progress) as bar:
        baselines = _baselines(agents, spec, episodes, cross_play)
        bar.note("playing held-out episodes")
        bar.update(1)
        count, limit = (min(episodes, IMAGE_EPISODES), IMAGE_LIMIT) if spec.is_image else (episodes, LIMIT)
        played = recorded(agents, count, seed=1, limit=limit)
        bar.note("measuring the world model")
        bar.update(2)
        quality = None
        if getattr(agents.state, "world_model", None) is not None:
            quality = measure(agents, agents.player(), "trained play", samples=SAMPLES, played=played)
        bar.note("dreaming")
        bar.update(3)
        chosen = typical_episodes(played, 1 if spec.is_image else 3)
        scenes = scenes_of(agents, played, chosen)
        bar.update(4, last=True)
    found = {
        "format": FORMAT,
        "steps": agents.steps,
        "seconds": round(time.monotonic() - began, 1),
        "sides": {side: list(members) for side, members in spec.sides.items()},
        "agents": list(spec.agents),
        "actions": action_names(spec),
        "num_actions": list(spec.num_actions),
        "cross_play": dataclasses.asdict(cross_play) | {"conditions": cross_play.conditions()},
        "baselines": baselines,
        "model": None if quality is None else dataclasses.asdict(quality),
        "scenes": scenes,
    }
    found = _finite(found)
    replace_text(run.measured, json.dumps(found) + "\n")
    return found


def _refuse_of_others(cross_play: CrossPlay, run: Run, agents: Agents) -> None:
    """Raise ConfigError where an evaluation is not of these agents: the report would show it as theirs."""
    sides = {side: [agents.spec.agents[i] for i in members] for side, members in agents.spec.sides.items()}
    folder = lambda path: Path(path).resolve().name  # noqa: E731
    for what, theirs, ours in (
        ("run", folder(cross_play.run), folder(run.path)),
        ("steps", cross_play.steps, agents.steps),
        ("environment", cross_play.environment, agents.spec.name),
        ("env_kwargs", cross_play.env_kwargs, agents.config.env_kwargs),
        ("members", cross_play.members, sides),
    ):
        if theirs != ours:
            raise ConfigError(
                f"expected cross_play to be an evaluation of what the report of {run.path} is about, its latest "
                f"checkpoint: {what} {ours}; got one of {what} {theirs}. Give evaluate({str(run.path)!r}), or none: it "
                "then plays by itself"
            )


def scenes_of(agents: Agents, played: Recording, chosen: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Recorded episodes and all agents' dreams of them, ready to be drawn."""
    predicts = getattr(getattr(agents.state, "world_model", None), "team", None) is not None
    others = "predicted" if predicts else "mirrored"
    common = agents.config.common_reward
    return [scene_of(episode, agents.spec, others, common) for episode in dreams_of(agents, played, chosen)]


def saved_measures(run: Run) -> dict[str, Any] | None:
    """What an earlier report measured; None if there is nothing, or nothing that this version can read."""
    try:
        found = json.loads((run.measured).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def latest_measures(run: Run) -> dict[str, Any] | None:
    """`saved_measures`, if they are of the run's latest checkpoint, or it has none (any more)."""
    found = saved_measures(run)
    latest = max(retention.saved(run.checkpoints), default=None)
    return found if found is not None and latest in (None, found["steps"]) else None


def _affordable(agents: Agents) -> int:
    """Episodes of every pairing that BUDGET allows, from the speed of one copy with random actions."""
    rng = np.random.default_rng(0)
    at_random = lambda here: np.asarray(Random().act(here, rng))  # noqa: E731
    with contextlib.closing(as_host(agents.make_env(1), 1)) as env:
        seeds = np.zeros(env.num_envs, int)
        here = env.step(at_random(env.reset(seeds)), seeds)  # what is compiled is compiled now
        steps, began = 0, time.monotonic()
        while not np.asarray(here.last).all() and steps < LIMIT and time.monotonic() - began < 2:
            here = env.step(at_random(here), seeds)
            steps += 1
        each = time.monotonic() - began
    if not np.asarray(here.last).all():  # a long game: five times as long as it was looked at
        each *= 5
    each /= len(seeds)  # an object that steps copies of its own plays an episode in each
    return int(np.clip(BUDGET / PAIRINGS / max(each, 1e-6), 2, EPISODES))


def _baselines(agents: Agents, spec: EnvSpec, episodes: int, cross_play: CrossPlay) -> list[dict[str, Any]]:
    """Returns of references against references, so that a reader sees where the trained agents stand between them. With
    one side the evaluation has them."""
    sides = list(spec.sides)
    if len(sides) > 2:
        return []
    if len(sides) == 1:
        means = lambda row: {sides[0]: float(np.mean(list(row.returns.values())))}  # noqa: E731
        alone = [row for row in cross_play.rows if row.sides[sides[0]] != "self"]
        return [{"sides": row.sides, "returns": means(row), "stderr": row.side_stderr} for row in alone]
    policies = references_for(spec)
    first, second = sides[0], sides[-1]
    pairs = [(one, other) for one in policies[first] for other in policies[second]]
    rows = []
    with contextlib.closing(as_host(agents.make_env(episodes), episodes)) as env:
        for one, other in pairs:
            players = {second: policies[second][other], first: policies[first][one]}
            returns = play(env, players, episodes)
            each = {side: returns[:, list(members)].mean(axis=1) for side, members in spec.sides.items()}
            value = {side: float(x.mean()) for side, x in each.items()}
            error = {side: float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None for side, x in each.items()}
            rows.append({"sides": {first: one, second: other}, "returns": value, "stderr": error})
    return rows


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
