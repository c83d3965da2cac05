"""A run folder and measurements made by hand, so that drawing is tested without training or playing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from codream import Run, preset
from codream.envs import EnvSpec
from codream.envs.actions import action_names
from codream.report.animation import scene_of
from codream.report.dreams import Dreamed, Episode
from codream.report.measures import FORMAT

TAG = EnvSpec(
    "mpe2:simple_tag_v3",
    ("adversary_0", "adversary_1", "adversary_2", "agent_0"),
    ((16,), (16,), (16,), (14,)),
    (5,) * 4,
)


COINS = EnvSpec("jaxmarl:coin_game", ("agent_0", "agent_1"), ((36,), (36,)), (5, 5))


def lines(agents: tuple[str, ...], count: int = 60) -> list[dict[str, float]]:
    """Metrics of a run that learns."""
    found = []
    for k in range(count):
        share = k / count
        line: dict[str, float] = {"steps": 400 * (k + 1), "seconds": 3.0 * (k + 1), "episode/count": 16}
        line |= {
            "world_model/loss": 40 - 20 * share,
            "world_model/team": 4.8 - 2 * share,
            "world_model/dyn": 30 - 9 * share,
        }
        line |= {"world_model/reward": 0.7 - 0.6 * share, "world_model/continue": 0.01, "world_model/rec": 0.0}
        for i, agent in enumerate(agents):
            sign = -1 if agent.startswith("agent") else 1
            line[f"episode/return/{agent}"] = sign * (4 + 20 * share)
            line[f"agent/{agent}/actor_loss"] = 0.1 * math.sin(k + i)
            line[f"agent/{agent}/critic_loss"] = 6 - 4 * share + 0.1 * i
            line[f"agent/{agent}/imagined_reward"] = sign * share
            line[f"agent/{agent}/value"] = sign * 10 * share
        found.append(line)
    return found


def run_folder(
    folder: Path,
    *,
    name: str = "mpe2:simple_tag_v3",
    seed: int = 0,
    metrics: list[dict] | None = None,
    env_kwargs: dict | None = None,
    agents: tuple[str, ...] = TAG.agents,
) -> Run:
    """A finished run without checkpoints."""
    folder.mkdir(parents=True)
    config = dataclasses.replace(preset("small"), seed=seed, env_kwargs=env_kwargs or {})
    (folder / "config.json").write_text(config.to_json())
    about = {
        "versions": {"python": "3.11", "codream": "0.1.0", "jax": "0.6"},
        "device": "cpu (x86_64, 2 cores)",
        "environment": {"name": name, "version": "mpe2 1.1.1", "by_object": False, "agents": list(agents)},
    }
    (folder / "run.json").write_text(json.dumps(about))
    text = "".join(json.dumps(line) + "\n" for line in (lines(agents) if metrics is None else metrics))
    (folder / "metrics.jsonl").write_text(text)
    return Run(folder)


def episode_of(spec: EnvSpec, steps: int = 12, start: int = 4, dreams: int = 3) -> Episode:
    """An episode of wandering bodies (or noise) and dreams that drift away from it."""
    rng = np.random.default_rng(0)
    shape = (steps + 1, spec.num_agents, *spec.obs_shape)
    high = 255 if spec.is_image else 1
    obs = np.cumsum(rng.normal(size=shape), axis=0) * 0.05 if not spec.is_image else rng.integers(0, high, shape)
    made = []
    for focal in range(spec.num_agents):
        real = obs[:, focal].astype(float)
        drift = np.cumsum(rng.normal(size=(dreams, *real.shape)), axis=1) * 0.05
        drift[:, : start + 1] = 0
        probabilities = np.full((steps, spec.num_agents - 1, spec.max_actions), 1 / spec.max_actions)
        gap = np.where(np.arange(steps + 1) > start, 0.1 * np.arange(steps + 1), 0.0)
        made.append(
            Dreamed(
                focal=focal,
                obs=real + drift,
                others=probabilities if spec.num_agents > 1 else None,
                policy=np.full((steps, spec.max_actions), 1 / spec.max_actions),
                reward=np.zeros(steps),
                value=np.linspace(0, 3, steps),
                gap=gap,
                still=2 * gap,
            )
        )
    actions = rng.integers(0, spec.max_actions, (steps, spec.num_agents))
    return Episode(
        "a median episode", start, obs, actions, np.zeros((steps, spec.num_agents)), actions >= 0, tuple(made)
    )


def without_dreams(episode: Episode) -> Episode:
    """The same as a run without a world model has it."""
    bare = [dataclasses.replace(d, obs=None, reward=None, gap=None, still=None, others=None) for d in episode.dreams]
    return dataclasses.replace(episode, dreams=tuple(bare))


def measured(spec: EnvSpec = TAG, **changes: Any) -> dict[str, Any]:
    """What `measure_run` would have kept."""
    members = {side: [spec.agents[i] for i in ms] for side, ms in spec.sides.items()}
    n = spec.num_agents

    def row(*who: str) -> dict[str, Any]:
        return {
            "sides": dict(zip(members, who, strict=True)),
            "returns": {agent: 10.0 + i for i, agent in enumerate(spec.agents)},
            "stderr": dict.fromkeys(spec.agents, 0.5),
            "side_stderr": dict.fromkeys(members, 0.5),
        }

    table = [[None if i == j else 0.7 for j in range(n)] for i in range(n)]
    return {
        "format": FORMAT,
        "steps": 24_000,
        "seconds": 20.0,
        "sides": {side: list(ms) for side, ms in spec.sides.items()},
        "agents": list(spec.agents),
        "actions": action_names(spec),
        "num_actions": list(spec.num_actions),
        "cross_play": {
            "environment": spec.name,
            "version": None,
            "device": "cpu",
            "steps": 200,
            "episodes": 40,
            "greedy": False,
            "members": members,
            "rows": [row("self", "self"), row("self", "flee"), row("chase", "self")],
            "conditions": "Mean ± standard error over 40 episodes.",
        },
        "baselines": [
            {
                "sides": {"adversary": a, "agent": b},
                "returns": {"adversary": x, "agent": -x},
                "stderr": {"adversary": 0.5, "agent": None},
            }
            for a, b, x in (("random", "flee", 0.6), ("chase", "flee", 19.0), ("chase", "random", 64.0))
        ],
        "model": {
            "play": "trained play",
            "episodes": 40,
            "reconstruction": 0.0,
            "one_step": 0.07,
            "one_step_sampled": 0.16,
            "still": 0.15,
            "by_horizon": [0.1 * k for k in range(1, 13)],
            "still_by_horizon": [0.3 * k for k in range(1, 13)],
            "reward_ratio": 0.8,
            "elsewhere": 0.05,
            "elsewhere_absolute": 0.1,
            "accuracy": 0.7,
            "base_rate": 0.3,
            "foresight": {
                "agents": list(spec.agents),
                "accuracy": table,
                "log_loss": table,
                "calibration_error": [[x and 0.04 for x in r] for r in table],
                "base_rate": [[x and 0.3 for x in r] for r in table],
                "confidence": [None, None, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95],
                "hit_rate": [None, None, 0.3, 0.33, 0.44, 0.5, 0.6, 0.72, 0.83, 0.93],
                "steps": [0, 0, 5, 9, 20, 30, 40, 50, 60, 80],
            },
        },
        "scenes": [scene_of(episode_of(spec), spec)],
        **changes,
    }


def with_measures(run: Run, found: dict[str, Any]) -> Run:
    """The same run after a full report."""
    run.measured.write_text(json.dumps(found))
    return run
