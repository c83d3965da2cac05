"""MATWM takes updates on images, on action masks and in-graph: every part of every loss is finite, and weights move."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest
from helpers import tiny_config

from codream import make_env
from codream.training import driver_for


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ("butterfly:cooperative_pong", "rec"),
        pytest.param("jaxmarl:smax_3m", "mask", marks=pytest.mark.slow),
        pytest.param("jaxmarl:MPE_simple_tag_v3", "team", marks=pytest.mark.slow),
    ],
)
def test_a_few_updates(env: str, part: str) -> None:
    config = dataclasses.replace(tiny_config(env=env), num_envs=2, warmup=40, world_model_every=20.0, agents_every=20.0)
    made = make_env(env, num_envs=2)
    config = config.resolve(made.spec)
    driver = driver_for(made, config)
    runner = driver.start(jax.random.key(0))
    before = jax.device_get(eqx.filter(runner.state.world_model, eqx.is_array))
    seen: dict[str, float] = {}
    while int(runner.state.agents_updates) < 3:
        runner, metrics = driver.advance(runner)
        seen |= {name: float(total) for name, (total, count) in metrics.items() if float(count) > 0}
        assert int(runner.state.steps) < 2_000, "updates should have come by now"
    assert int(runner.state.world_model_updates) >= 3
    assert f"world_model/{part}" in seen
    assert np.isfinite(list(seen.values())).all(), seen
    after = jax.device_get(eqx.filter(runner.state.world_model, eqx.is_array))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
