"""What several tests share."""

import dataclasses
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from gymnasium import spaces

from codream import Config, Run, kernels, preset
from codream.checkpoint import find


def tiny_config(**changes: Any) -> Config:
    """`small` with tiny nets, on 4 copies of simple_tag; all copies' episodes end together every 100
    steps."""
    base = preset("small")
    config = dataclasses.replace(
        base,
        num_envs=4,
        total_steps=400,
        warmup=100,
        checkpoint_every=200,
        log_every=100,
        world_model_every=50,
        agents_every=50,
        world_model=dataclasses.replace(
            base.world_model,
            hidden=16,
            heads=2,
            units=16,
            encoder_layers=1,
            head_layers=1,
            team_hidden=16,
            team_heads=2,
            reward_bins=15,
            change_bins=11,
            groups=4,
            classes=4,
            image_depth=2,
            batch=4,
            length=8,
        ),
        agents=dataclasses.replace(base.agents, units=16, context=4, horizon=3, starts=4, value_bins=15),
        replay=dataclasses.replace(base.replay, capacity=400),
    )
    return dataclasses.replace(config, **changes)


def replaced(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with options changed, by their paths."""
    parts: dict[str, Any] = {}
    for path, value in changes.items():
        part, _, name = path.rpartition(".")
        if part:
            parts[part] = dataclasses.replace(parts.get(part, getattr(config, part)), **{name: value})
        else:
            parts[name] = value
    return dataclasses.replace(config, **parts)


class Toy:
    """A parallel environment of two sides: `cat_0` is paid for moving like `mouse_0`. Episodes last `length`
    steps; with `uneven`, 3 to 9, as the seed wants it. Raises at the step `broken_at` of any episode, sleeps at the
    step `hangs_at`."""

    metadata: ClassVar[dict[str, Any]] = {"name": "toy"}
    possible_agents: ClassVar[list[str]] = ["cat_0", "mouse_0"]

    def __init__(
        self, length: int = 6, uneven: bool = False, broken_at: int | None = None, hangs_at: int | None = None
    ):
        self.length, self.uneven, self.broken_at, self.hangs_at = length, uneven, broken_at, hangs_at
        self.agents: list[str] = []

    @property
    def unwrapped(self) -> "Toy":
        return self

    def observation_space(self, agent: str) -> spaces.Space:
        del agent
        return spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def action_space(self, agent: str) -> spaces.Space:
        del agent
        return spaces.Discrete(3)

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        del options
        self.rng = np.random.default_rng(seed)
        self.left = int(self.rng.integers(3, 10)) if self.uneven else self.length
        self.taken = 0
        self.agents = list(self.possible_agents)
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        self.taken += 1
        self.left -= 1
        if self.taken == self.broken_at:
            raise ZeroDivisionError("the cat is out of the bag")
        if self.taken == self.hangs_at:
            time.sleep(1e6)
        same = float(actions["cat_0"] == actions["mouse_0"])
        everyone, over = list(self.agents), self.left == 0
        obs = self._observe()
        if over:
            self.agents = []
        return (
            obs,
            {"cat_0": same, "mouse_0": -same},
            dict.fromkeys(everyone, False),
            dict.fromkeys(everyone, over),
            {agent: {} for agent in everyone},
        )

    def _observe(self) -> dict[str, np.ndarray]:
        return {agent: self.rng.normal(size=2).astype(np.float32) for agent in self.possible_agents}

    def close(self) -> None:
        pass


def toy_config(**changes: Any) -> Config:
    """`tiny_config` for 2 copies of `Toy`."""
    return tiny_config(
        **{
            "num_envs": 2,
            "total_steps": 120,
            "warmup": 40,
            "checkpoint_every": 40,
            "log_every": 40,
            "world_model_every": 10,
            "agents_every": 10,
            **changes,
        }
    )


def ppo_config(**changes: Any) -> Config:
    """Independent PPO, tiny, on 2 copies of `Toy`: what compiles fastest."""
    base = preset("ippo")
    config = dataclasses.replace(
        base,
        num_envs=2,
        total_steps=144,
        checkpoint_every=48,
        log_every=24,
        ppo=dataclasses.replace(base.ppo, units=8, layers=1, rollout=8, epochs=1, minibatches=2),
    )
    return dataclasses.replace(config, **changes)


def wm_rnd_config(**changes: Any) -> Config:
    """`ppo_config` with a world model and self-projection, as small."""
    base = preset("wm_rnd")
    tiny = {"groups": 2, "classes": 4, "hidden": 8, "units": 8, "encoder_layers": 1, "team_hidden": 8}
    model = dataclasses.replace(base.world_model, **tiny, heads=2, team_heads=2, batch=2, length=4)
    projection = dataclasses.replace(base.projection, imagination_steps=2, starts=4)
    return ppo_config(
        algo="wm_rnd", preset="wm_rnd", world_model_every=8.0, world_model=model, projection=projection, **changes
    )


def arrays(run: Run, steps: int | None = None) -> dict[str, np.ndarray]:
    """Everything that a checkpoint of a run holds."""
    return find(run.path, steps).arrays()


def timeless(run: Run) -> list[dict[str, float]]:
    """A run's metrics, but for what clocks said."""
    clocks = ("seconds", "steps_per_second", "checkpoint/")
    return [{name: x for name, x in line.items() if not name.startswith(clocks)} for line in run.metrics()]


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Equal leaf by leaf, bit by bit."""
    assert one.keys() == other.keys()
    for place, value in one.items():
        np.testing.assert_array_equal(value, other[place], err_msg=place)


def copy_until(run: Run, steps: int, folder: Path) -> Run:
    """A copy of a run as it was just after it wrote the checkpoint at `steps`, as if it had been killed
    then."""
    shutil.copytree(run.path, folder)
    for later in (folder / "checkpoints").iterdir():
        if int(later.name) > steps:
            shutil.rmtree(later)
    return Run(folder)


def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced from here on is what a GPU would get; its kernels are interpreted."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "_ampere", lambda device: True)
    for name in set(kernels.__all__) - {"fits", "suits"}:
        monkeypatch.setattr(kernels, name, partial(getattr(kernels, name), interpret=True))
