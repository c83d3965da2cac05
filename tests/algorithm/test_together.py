"""The benchmark of social dilemmas trains all seeds in one program: each must be what it would be by itself."""

import importlib.util
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from tiny_wm_rnd import Helping, unresolved

from codream.training import GraphDriver

FILE = Path(__file__).parents[2] / "benchmarks" / "social_dilemmas.py"


@pytest.mark.slow
def test_seeds_together_are_the_seeds_one_by_one():
    spec = importlib.util.spec_from_file_location("social_dilemmas", FILE)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    env = Helping()
    config = unresolved({"coef": 0.0}, {"kind": "rnd"})
    together = benchmark.Together(env, config, chunk=8)
    arrays = together.start([3, 4])
    alone = GraphDriver(env, config.resolve(env.spec), chunk=8)
    runner = alone.start(jax.random.key(4))
    for _ in range(2):
        arrays, metrics = together.advance(arrays)
        runner, expected = alone.advance(runner)
    # An update was made at the end of each chunk, as it would have been alone.
    assert together.steps(arrays) == int(runner.state.steps)
    mine = jax.tree.leaves(eqx.filter(together.state(arrays, 1).learners, eqx.is_array))
    own = jax.tree.leaves(eqx.filter(runner.state.learners, eqx.is_array))
    for one, other in zip(mine, own, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    for name, (total, _) in expected.items():
        np.testing.assert_allclose(np.asarray(metrics[name][0])[1], total, rtol=1e-3, atol=1e-5)
