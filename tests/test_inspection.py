"""Taking configurations apart: what is counted is what is there, and what is said of initial weights is true."""

import io
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Toy, tiny_config
from rich.console import Console

import codream
from codream import ConfigError, Run, cli, matwm, preset
from codream.accelerators import _backend_versions, devices
from codream.config import Config
from codream.inspection import _APART, Inspection, inspect
from codream.matwm import State


@pytest.fixture(scope="module")
def small() -> tuple[Inspection, State]:
    """Preset small taken apart, and a real fresh state of it."""
    found = inspect(preset("small"))
    return found, eqx.filter_jit(lambda key: matwm.init(key, found.spec, found.config))(jax.random.key(0))


def count(tree: object) -> int:
    return sum(x.size for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def test_parameters_and_memory_are_those_of_a_real_state(small: tuple[Inspection, State]) -> None:
    found, state = small
    agents = (state.agents.actor, state.agents.critic)
    assert found.parameters["world model"] == count(state.world_model)
    assert found.parameters["total"] == count((state.world_model, agents))
    one = [n for name, n in found.parameters.items() if name.startswith("agent ")]
    assert sum(one) == count(agents)
    assert len(one) == 4
    assert found.layers[0].parameters == count(state.world_model)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))  # noqa: E731
    assert found.memory["replay"] == size(state.replay)
    assert found.memory["optimisers"] == size((state.optimiser, state.agents.optimiser))


def test_what_is_said_of_initial_weights_is_true(small: tuple[Inspection, State]) -> None:
    found, state = small
    first = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, state.agents)
    roots = {"world_model": state.world_model, "actor": first.actor, "critic": first.critic}
    checked = 0
    for layer in found.layers:
        if not layer.start:
            continue
        root, _, rest = layer.path.partition(".")
        module = eval(f"root.{rest}", {"root": roots[root]})
        weight = np.asarray(module.weight)
        if layer.start in ("ones", "zeros"):
            assert (weight == {"ones": 1, "zeros": 0}[layer.start]).all(), layer.path
        else:
            stated = re.search(r"gain ([\d.]+)( / blocks)?;", layer.start)
            assert stated is not None, layer
            measured = weight.var() * weight.shape[1]
            assert measured == pytest.approx(float(stated[1]), rel=0.2), layer.path  # one block in small
            assert (np.asarray(module.bias) == 0).all()
        checked += 1
    assert checked > 25


@pytest.mark.parametrize("name", ["small", "paper"])
def test_a_fresh_network_neither_vanishes_nor_explodes(name: str) -> None:
    """Every hidden activation of a deep stack stays of order 1, and no layer's gradient is lost or huge."""
    config = preset(name).world_model
    from codream.nets import MLP, Transformer

    key = jax.random.key(0)
    net = MLP(64, 32, 64, config.encoder_layers, key)
    transformer = Transformer(64, config.layers, 4, key)
    x = jax.random.normal(jax.random.key(1), (24, 64))
    time = jnp.zeros(24, int)
    middle, _ = transformer.full(x, time, jnp.ones(24, bool))
    out = jax.vmap(net)(middle)
    for activations in (middle, out):
        assert 0.5 < float(jnp.sqrt(jnp.mean(activations**2))) < 2.0

    def loss(nets: tuple[MLP, Transformer]) -> jax.Array:
        h, _ = nets[1].full(x, time, jnp.ones(24, bool))
        return jnp.mean((jax.vmap(nets[0])(h) - 1.0) ** 2)

    grads = jax.tree_util.tree_leaves_with_path(eqx.filter_grad(loss)((net, transformer)))
    sizes = {jax.tree_util.keystr(path): float(jnp.sqrt(jnp.sum(g**2))) for path, g in grads if g.ndim == 2}
    assert len(sizes) >= 4 * config.layers + config.encoder_layers
    assert max(sizes.values()) < 10, sizes
    assert min(sizes.values()) > 1e-4, sizes
    assert max(sizes.values()) / min(sizes.values()) < 1e3, sizes


def test_operations_grow_as_they_should() -> None:
    once, twice = (inspect(_with_horizon(h)).flops for h in (3, 6))
    imagined = [next(ours for name, (ours, _) in f.items() if name.startswith("imagination")) for f in (once, twice)]
    assert 1.2 < imagined[1] / imagined[0] < 2.0
    for ours, theirs in once.values():
        assert ours > 0
        assert theirs > 0


def _with_horizon(horizon: int) -> Config:
    config = tiny_config()
    return codream.config.dataclasses.replace(
        config, agents=codream.config.dataclasses.replace(config.agents, horizon=horizon)
    )


def test_paper_is_inspected_without_being_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--preset", "paper"]) == 0
    out = capsys.readouterr().out
    for part in ("Dry run", "encoder (categorical)", "Layers by kind", "truncated normal", "TFLOP", "replay", "MiB"):
        assert part in out, part


def test_a_run_and_an_environment_as_an_object(host_run: Run) -> None:
    assert inspect(host_run).config == host_run.config
    found = inspect(tiny_config(num_envs=1, env="toy"), env=Toy)
    assert found.spec.agents == ("cat_0", "mouse_0")
    console = Console(file=io.StringIO(), width=100)
    console.print(found)
    assert "cat_0" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_learner_that_is_not_known_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_APART, "matwm")
    with pytest.raises(ConfigError, match=r"algo=matwm is not in codream\.inspection\._APART, which has wm_rnd: add"):
        inspect(tiny_config())


def test_devices_say_where_codream_computes() -> None:
    found = devices()
    assert [d.platform for d in found.devices if d.used] == ["cpu"]
    assert "CPU" in found.message
    assert found.versions["jax"] == jax.__version__
    device = found.devices[0]
    assert device.memory is None or device.memory > 2**28
    assert device.in_use is None or 2**24 < device.in_use < (device.memory or math.inf)


def test_versions_of_a_backend() -> None:
    assert _backend_versions("PJRT C API\ncuda 13000") == {"cuda": "13.0"}
    assert _backend_versions("PJRT C API\ncuda 12080") == {"cuda": "12.8"}
    assert _backend_versions("TFRT TPU v4") == {"backend": "TFRT TPU v4"}


def test_a_gpu_that_jax_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codream.accelerators._nvidia", lambda: [("NVIDIA H100", "580.1")])
    found = devices()
    assert "falls back to the CPU" in found.message
    assert "NVIDIA H100" in found.message
    assert found.versions["driver"] == "580.1"
    assert math.isfinite(len(found.versions))
