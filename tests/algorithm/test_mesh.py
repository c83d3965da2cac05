"""One run on several devices, and in half the precision, is the run on one in float32 up to rounding."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import SPEC, tiny

from codream.config import Config, ConfigError
from codream.mesh import data_mesh

SHARED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
from tiny import SPEC, tiny
from codream import matwm
from codream.flops import count_flops
from codream.mesh import placed

def trained(devices, precision="float32"):
    config = tiny(SPEC, {"latent": "categorical", "batch": 24}, {"starts": 16, "context": 4}, devices=devices,
                  precision=precision)
    state = matwm.init(jax.random.key(0), SPEC, config)
    shape, key = state.replay.action.shape, jax.random.key(1)
    time = jnp.arange(shape[0])
    parts = lambda s: (s.replay.obs, s.replay.reward, s.replay.acting, s.replay.first, s.replay.filled)
    state = eqx.tree_at(parts, state, (
        jax.random.normal(key, state.replay.obs.shape), jax.random.normal(key, shape),
        jnp.broadcast_to((time % 10 != 9)[:, None, None], shape),
        jnp.broadcast_to((time % 10 == 0)[:, None], shape[:2]), jnp.asarray(shape[0], jnp.int32)))
    state = placed(state, devices)

    def once(state, key):
        state, model = matwm.train_world_model(state, key, config)
        state, agents = matwm.train_agents(state, key, config)
        return state, model, agents

    flops, compiled = count_flops(once, state, key), eqx.filter_jit(once)
    losses = []
    for k in range(2):
        state, model, agents = compiled(state, jax.random.key(k))
        losses.append(jax.tree.map(lambda x: np.asarray(x).tolist(), {"model": model, "agents": agents}))
    trained = jax.tree.leaves(eqx.filter((state.world_model, state.optimiser, state.agents), eqx.is_array))
    on = {len(x.sharding.device_set) for x in jax.tree.leaves(eqx.filter(state, eqx.is_array))}
    return {"losses": losses, "on": sorted(on), "types": sorted({str(x.dtype) for x in trained}),
            "flops": flops}

print(json.dumps({"one": trained(1), "eight": trained(8), "half": trained(1, "bfloat16")}))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    """Two updates of everything, on one device, on eight simulated ones, and in bfloat16."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", SHARED, str(Path(__file__).parent)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_each_device_works_on_its_share(found: dict) -> None:
    """Products of one device, of eight, for the same updates: an eighth each of what batches are for."""
    share = found["eight"]["flops"] / found["one"]["flops"]
    assert share < 0.2, share


@pytest.mark.slow
def test_sharded_equals_unsharded(found: dict) -> None:
    """All losses and norms of gradients. Adam's first step is a sign, so weights whose gradient is nothing but rounding
    move either way, and then some imagined samples differ: agents agree less closely than the model."""
    assert found["eight"]["on"] == [8]
    close = {"model": {"rtol": 1e-4, "atol": 1e-5}, "agents": {"rtol": 1e-3, "atol": 1e-2}}
    for one, eight in zip(found["one"]["losses"], found["eight"]["losses"], strict=True):
        for part, tolerance in close.items():
            for name, expected in one[part].items():
                np.testing.assert_allclose(eight[part][name], expected, err_msg=name, **tolerance)


@pytest.mark.slow
def test_half_precision_is_only_of_products(found: dict) -> None:
    assert found["half"]["types"] == ["float32", "int32"]  # of all that is trained
    exact, half = (found[name]["losses"][-1] for name in ("one", "half"))
    assert exact["model"]["loss"] != half["model"]["loss"]
    np.testing.assert_allclose(half["model"]["loss"], exact["model"]["loss"], rtol=0.01)
    np.testing.assert_allclose(half["agents"]["critic_loss"], exact["agents"]["critic_loss"], rtol=0.01)


def test_shares_must_be_equal_and_devices_there() -> None:
    with pytest.raises(
        ConfigError,
        match=r"a multiple of devices.*got 6 \(a multiple of the 3 agents\) and 4; the nearest: 12",
    ):
        tiny(SPEC, devices=4)
    with pytest.raises(ConfigError, match="devices=64, but there"):
        data_mesh(64)
    with pytest.raises(ConfigError, match="options of algo=matwm"):
        dataclasses.replace(Config(), algo="wm_rnd", warmup=0, precision="bfloat16")
