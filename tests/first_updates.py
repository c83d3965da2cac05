"""A program for tests/test_devices.py: the first update of each part of a learner, on whatever device JAX finds, to a
file.

python tests/first_updates.py matwm|wm_rnd OUT.npz
"""

import sys

import equinox as eqx
import jax
import numpy as np
from helpers import tiny_config, wm_rnd_config

from codream import make_env
from codream.training import GraphDriver

LR = 1e-3
"""Learning rate of every optimiser."""
OPTIMISER_STEPS = 2
"""Steps of an optimiser within an update, at most."""


def main(algo: str, out: str) -> None:
    env = make_env("jaxmarl:coin_game")
    config = wm_rnd_config(num_envs=2)
    if algo == "matwm":
        config = tiny_config(num_envs=2, warmup=0, world_model_every=64.0, agents_every=64.0)
    config = config.resolve(env.spec)
    # No step follows the update: weights whose gradient is nothing but rounding move either way, and so do actions.
    driver = GraphDriver(env, config, chunk=8 if algo == "wm_rnd" else 1)
    runner, metrics = driver.advance(driver.start(jax.random.key(0)))
    while algo == "matwm" and not int(runner.state.agents_updates):
        runner, metrics = driver.advance(runner)
    found = {f"metrics {name}": np.asarray(total) for name, (total, count) in metrics.items() if count > 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(runner.state, eqx.is_inexact_array)):
        place = jax.tree_util.keystr(path)
        if "optimiser" not in place:
            found[f"state {place}"] = np.asarray(leaf)
    print(jax.devices()[0].platform, sum(name.startswith("metrics") for name in found))
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
