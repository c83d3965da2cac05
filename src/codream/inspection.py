"""Taking a configuration apart: shapes, parameters, initialisation, operations and memory of every part.

Only shapes are traced, nothing is allocated, so `paper` can be inspected on a laptop in seconds.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from codream import checkpoint as checkpoints
from codream import matwm
from codream.algorithms import of_learner
from codream.building import build_env
from codream.config import Config
from codream.envs import EnvSpec, HostEnv, TimeStep
from codream.flops import both_counts
from codream.linear import Linear
from codream.parts import Apart, Work, dims, first_agent, wm_rnd_apart
from codream.presets import preset
from codream.representation import Change
from codream.runs import Run

__all__ = ["Inspection", "Layer", "inspect"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module of the tree. `parameters` counts one agent's where agents are stacked."""

    path: str
    kind: str
    shape: str
    """Shapes of its own arrays, outputs first."""
    parameters: int
    """Of itself and everything below."""
    start: str
    """How its weights start; empty for modules without weights of their own."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found out. Operations are per update, memory in bytes."""

    config: Config
    spec: EnvSpec
    shapes: tuple[tuple[str, str, str], ...]
    """Dry run: part, what goes in, what comes out."""
    layers: tuple[Layer, ...]
    parameters: dict[str, int]
    """World model and its parts, each agent, total."""
    flops: dict[str, tuple[int, float]]
    """By update: operations of matrix products with loops counted as often as they run; and the compiler's own count,
    in which the body of a loop counts once."""
    memory: dict[str, int]

    @property
    def kinds(self) -> dict[tuple[str, str], tuple[int, int]]:
        """By kind of layer and how its weights start: how many there are, and their parameters."""
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for layer in self.layers:
            if layer.start:
                number, size = found.get((layer.kind, layer.start), (0, 0))
                found[layer.kind, layer.start] = (number + 1, size + layer.parameters)
        return found

    def __rich__(self) -> Group:
        n = self.spec.num_agents
        head = Text(f"{self.spec.name}: {n} agents ({', '.join(self.spec.agents)}), preset {self.config.preset}")
        return Group(
            head,
            _table("Dry run", ("part", "in", "out"), self.shapes),
            _table(
                "Modules (of the actors and critics: one agent's)",
                ("module", "kind", "arrays", "parameters"),
                [(_tree(la.path), la.kind, la.shape, f"{la.parameters:,}") for la in self.layers],
            ),
            _table(
                "Layers by kind",
                ("kind", "count", "parameters", "weights start from"),
                [(kind, str(c), f"{size:,}", start) for (kind, start), (c, size) in self.kinds.items()],
            ),
            _table("Parameters", ("part", "parameters"), [(k, f"{v:,}") for k, v in self.parameters.items()]),
            _table(
                "Floating-point operations",
                ("per", "matrix products", "compiler's count*"),
                [(name, _si(ours), _si(theirs)) for name, (ours, theirs) in self.flops.items()],
            ),
            Text(
                "* XLA counts element-wise work too, but the body of a loop only once: too low wherever time "
                "is a loop.\n"
            ),
            _table("Memory", ("what", "bytes"), [(k, _bytes(v)) for k, v in self.memory.items()]),
        )


def inspect(
    config: Config | Run | str | Path | None = None, *, env: Any = None, root: str | Path = "runs"
) -> Inspection:
    """Take apart a configuration (default: preset `small`), or that of a run. `env`: the environment as an object; a
    run that has a checkpoint needs none, as its shapes are in there.

    Raises ConfigError or UnknownEnvironment for a configuration that cannot be built, RunError for a run that is not.
    """
    spec = None
    if config is None:
        config = preset("small")
    elif not isinstance(config, Config):
        run = Run.open(config, root)
        config = run.config
        if env is None:
            spec = _trained_on(run)
    if spec is None:
        spec = _spec_of(config, env)
    config = config.resolve(spec)
    taken = of_learner(_APART, config.algo, "codream.inspection._APART")(spec, config)
    gains = of_learner(_GAINS, config.algo, "codream.inspection._GAINS")
    if isinstance(getattr(taken.model, "representation", None), Change):
        gains = (*gains, _CHANGE_GAIN)
    modules = ({} if taken.model is None else {"world_model": taken.model}) | taken.agent
    return Inspection(
        config=config,
        spec=spec,
        shapes=tuple(taken.shapes),
        layers=tuple(layer for path, part in modules.items() for layer in _layers(part, path, gains)),
        parameters=_parameters(taken, spec),
        flops={name: both_counts(f, *args) for name, (f, args) in taken.work.items()},
        memory=_memory(taken.held),
    )


def _trained_on(run: Run) -> EnvSpec | None:
    """What a run's latest checkpoint says of its environment, so that it can be inspected where that is not installed;
    None if there is no checkpoint. Raises RunError where there is also no way to make the environment."""
    try:
        return checkpoints.while_it_goes_on(run.checkpoints, lambda: checkpoints.find(run.path)).spec
    except checkpoints.CheckpointError:
        run.refuse_without_its_environment(None)
        return None


def _spec_of(config: Config, env: Any) -> EnvSpec:
    made = build_env(config, config.num_envs, env)
    if isinstance(made, HostEnv):
        made.close()
    return made.spec


def _matwm_apart(spec: EnvSpec, config: Config) -> Apart:
    state = eqx.filter_eval_shape(lambda k: matwm.init(k, spec, config), jax.random.key(0))
    agents, one = state.agents, first_agent(state.agents)
    held = {
        "parameters": (state.world_model, agents.actor, agents.critic),
        "averaged critics": agents.slow_critic,
        "optimisers": (state.optimiser, agents.optimiser),
        "replay": state.replay,
        "earlier policies": state.past,
        "curiosity (networks and optimiser)": state.curiosity,
    }
    parts = {"actor": one.actor, "critic": one.critic}
    return Apart(state.world_model, parts, _dry_run(state, one, config), _matwm_work(state, config), held)


_APART = {"matwm": _matwm_apart, "wm_rnd": wm_rnd_apart}  # what gives an `Apart` of a learner


# ------------------------------------------------------------------------------------------ parts


def _dry_run(state: Any, one: Any, config: Config) -> Iterator[tuple[str, str, str]]:
    """Every part once on one example, as shapes."""
    model, spec = state.world_model, state.world_model.spec
    code, key = model.representation, jax.random.key(0)
    obs = jax.ShapeDtypeStruct(spec.obs_shape, spec.obs_dtype)
    focal = jax.ShapeDtypeStruct((), jnp.int32)
    shape = eqx.filter_eval_shape
    z, _ = shape(code.posterior, obs, key)
    yield f"encoder ({type(code).__name__.lower()})", f"o {dims(obs)}", f"z {dims(z)}"
    yield "decoder", f"z {dims(z)}", f"ô {dims(shape(code.decode, z))}"
    e = shape(model.mix, z, focal, focal)
    yield "action mixer", f"z {dims(z)}, ã one-hot ({model.action_size},)", f"e {dims(e)}"
    hidden = shape(lambda: model.empty(config.world_model.length))
    s, hidden = shape(model.features, z, focal, hidden)
    after = shape(model.act, z, focal, focal, hidden)
    yield "transformer, one step", f"e {dims(e)}", f"h {dims(after.h)}"
    prior = shape(code.prior, after.h, z)
    yield "dynamics", f"h {dims(after.h)}", f"p(z′) {dims(prior)}"
    reward, cont = shape(model.outcome, after.h, z)
    sees = f"h {dims(after.h)}" + (", z′" if config.world_model.outcome_sees_next else "")
    yield "reward", sees, f"two-hot logits {dims(reward)}"
    yield "continue", sees, f"logit {dims(cont)}"
    if model.mask is not None:
        yield "mask", f"z {dims(z)}", f"logits {dims(shape(model.mask, z))}"
    if model.team is not None:
        team, _ = shape(model.team.step, z, focal, hidden.team)
        yield "teammate predictor", f"z {dims(z)}, who {(spec.num_agents,)}", f"p̂ {dims(team)}"
    allowed = jax.ShapeDtypeStruct((spec.max_actions,), bool)
    yield "actor (each agent)", f"s {dims(s)}", f"ln π {dims(shape(one.actor, s, allowed))}"
    yield "critic (each agent)", f"s {dims(s)}", f"two-hot logits {dims(shape(one.critic, s))}"


def _layers(module: Any, path: str, gains: _Gains) -> Iterator[Layer]:
    """Every module of a tree, parents before children."""
    own, below = [], []
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        items = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        for k, item in items:
            name = field.name if k is None else f"{field.name}[{k}]"
            if isinstance(item, eqx.Module):
                below.append((name, item))
            elif _is_array(item):
                own.append(item)
    yield Layer(path, type(module).__name__, ", ".join(map(dims, own)), _size(module), _start(module, path, gains))
    for name, item in below:
        yield from _layers(item, f"{path}.{name}", gains)


def _start(module: Any, path: str, gains: _Gains) -> str:
    """How the weights of a module start, as `codream.nets` makes them; a test holds this against fresh weights."""
    if isinstance(module, eqx.nn.RMSNorm):
        return "ones"
    if not isinstance(module, Linear):
        return ""
    gain = next((gain for ends, gain in gains if re.search(ends, path)), "1")
    return "zeros" if gain == "0" else f"truncated normal at 2 σ, variance gain / fan-in, gain {gain}; bias 0"


_Gains = tuple[tuple[str, str], ...]

# By the end of a layer's path; any other has gain 1 (LeCun's).
_BLOCKS = (r"blocks\[\d+\]\.(out|down)$", "0.5 / blocks")  # the residual stream keeps its size
_GAINS: dict[str, _Gains] = {
    "matwm": (
        (r"world_model\.(reward|cont)\.out$", "0"),  # rewards of exactly 0 are predicted at first
        (r"critic\.net\.out$", "0"),
        (r"actor\.net\.out$", "0.01"),  # near-uniform policies
        (r"world_model\.team\.out$", "0.1"),
        _BLOCKS,
    ),
    "wm_rnd": (
        (r"world_model\.(reward|cont)\.out$", "0"),
        (r"^actor\.out$", "0.0001"),
        (r"world_model\.team\.out$", "0.1"),
        _BLOCKS,
    ),
}
_CHANGE_GAIN = (r"representation\.dynamics\.out$", "0.1")  # small changes at first


def _parameters(taken: Apart, spec: EnvSpec) -> dict[str, int]:
    found = {}
    if taken.model is not None:
        found["world model"] = _size(taken.model)
        for field in dataclasses.fields(taken.model):
            value = getattr(taken.model, field.name)
            if isinstance(value, eqx.Module):
                found[f"  {field.name}"] = _size(value)
    for agent in spec.agents:
        listed = " + ".join(f"{name.rpartition('.')[2]} {_size(part):,}" for name, part in taken.agent.items())
        found[f"agent {agent} ({listed})"] = _size(tuple(taken.agent.values()))
    found["total"] = _size(taken.held["parameters"])
    return found


def _matwm_work(state: Any, config: Config) -> Work:
    model, key = state.world_model, jax.random.key(0)
    spec = model.spec
    starts, horizon = config.agents.starts, config.agents.horizon
    memory = eqx.filter_eval_shape(lambda s: matwm.init_memory(s, config.num_envs, config), state)
    return {
        "world-model update": (lambda s: matwm.train_world_model(s, key, config), (state,)),
        f"imagination ({spec.num_agents} agents × {starts} starts × {horizon} steps)": (
            lambda s: matwm.imagine_for_agents(s, key, config),
            (state,),
        ),
        "update of all agents (with its imagination)": (lambda s: matwm.train_agents(s, key, config), (state,)),
        f"acting, {config.num_envs} copies": (
            lambda s, m, here: matwm.act(s, m, here, key, config)[0],
            (state, memory, eqx.filter_eval_shape(TimeStep.blank, spec, config.num_envs)),
        ),
    }


def _memory(held: dict[str, Any]) -> dict[str, int]:
    found = {name: _nbytes(tree) for name, tree in held.items() if tree is not None}
    found["total"] = sum(found.values())
    return found


# ------------------------------------------------------------------------------------------ counting, showing


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _arrays(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if _is_array(x)]


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in _arrays(tree) if jnp.issubdtype(x.dtype, jnp.floating))


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in _arrays(tree))


def _tree(path: str) -> str:
    depth = path.count(".")
    return "  " * depth + path.rpartition(".")[2]


def _table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    table = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        numeric = k and column in ("parameters", "count", "bytes", "matrix products", "compiler's count*")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _si(value: float) -> str:
    if not math.isfinite(value):
        return "unknown"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}FLOP"
    return f"{value:.0f} FLOP"


def _bytes(value: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"
