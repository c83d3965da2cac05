"""A run that stopped and went on equals one that never stopped, leaf by leaf."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import tiny_config

from codream import Config, EnvironmentFailure, Run, RunError, TrainingDiverged, train, trainer
from codream.checkpoint import find


def arrays(run: Run, steps: int | None = None) -> dict[str, np.ndarray]:
    return find(run.path, steps).arrays()


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for place, value in one.items():
        np.testing.assert_array_equal(value, other[place], err_msg=place)


def test_host_run_resumed_at_an_episodes_end_equals_the_uninterrupted_one(host_run: Run, runs: Path) -> None:
    half = train(tiny_config(total_steps=200), name="host-half", root=runs, progress=False)
    assert_same(arrays(half), arrays(host_run, 200))
    train(tiny_config(), resume=half, progress=False)
    whole, resumed = arrays(host_run), arrays(half)
    assert_same(whole, resumed)
    # It holds everything that the issue names, and something happened in it.
    for part in ("state.world_model.", "state.optimiser", "state.agents.optimiser", "state.replay.obs", "key"):
        assert any(place.startswith(part) for place in whole), part
    assert whole["state.steps"] == 400
    assert whole["state.world_model_updates"] > 2
    assert whole["state.agents_updates"] > 2
    strip = lambda run: [  # noqa: E731
        {k: v for k, v in line.items() if not k.startswith("seconds") and k != "steps_per_second"}
        for line in run.metrics()
    ]
    assert strip(half) == strip(host_run)
