"""What an algorithm's state is made of, as shapes, for `codream.inspection`; and WM-RND taken apart that way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from codream import wm_rnd
from codream.config import Config
from codream.curiosity import errors
from codream.envs import EnvSpec, TimeStep
from codream.ppo import observed
from codream.projection import project

__all__ = ["Apart", "Work", "dims", "first_agent", "wm_rnd_apart"]

# By name: a function and its arguments, whose operations are counted.
Work = dict[str, tuple[Any, tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Apart:
    """An algorithm's state in pieces; arrays are shapes."""

    model: Any
    """The world model; None where there is none."""
    agent: dict[str, Any]
    """One agent's modules, by what they are called in the table."""
    shapes: Iterator[tuple[str, str, str]]
    """The dry run: part, what goes in, what comes out."""
    work: Work
    held: dict[str, Any]
    """What takes memory; its `parameters` are all that is learned."""


def dims(x: Any) -> str:
    """The shape of an array, as text."""
    return "(" + ", ".join(str(n) for n in x.shape) + ("," if len(x.shape) == 1 else "") + ")"


def first_agent(tree: Any) -> Any:
    """Of modules stacked on an agent axis, the first agent's."""
    return eqx.filter_eval_shape(lambda s: jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, s), tree)


def wm_rnd_apart(spec: EnvSpec, config: Config) -> Apart:
    """WM-RND's state in pieces."""
    state = eqx.filter_eval_shape(lambda k: wm_rnd.init(k, spec, config), jax.random.key(0))
    one, model = first_agent(state.learners), state.world_model
    held = {
        "parameters": (model, state.learners),
        "optimisers": (state.model_optimiser, state.optimiser),
        "rollout": state.rollout,
        "curiosity (networks and optimiser)": state.curiosity,
    }
    names = ("encoder", "actor", "critic", "projected")
    parts = {name: getattr(one, name) for name in names if getattr(one, name) is not None}
    return Apart(model, parts, _dry_run(state, one, config), _work(state, one, config), held)


def _work(state: Any, one: Any, config: Config) -> Work:
    spec, model, key = state.spec, state.world_model, jax.random.key(0)
    work: Work = {}
    if model is not None:
        share = max(1, config.projection.starts // spec.num_agents)
        steps = config.projection.imagination_steps
        work["world-model update"] = (lambda s: wm_rnd.train_model(s, key, config)[0], (state,))
        work[f"imagination of one agent ({share} starts × {steps} steps, forwards)"] = (
            lambda learner, model: _imagined(learner, model, share, config),
            (one, model),
        )
    work["all updates of one rollout"] = (lambda s: wm_rnd.learn(s, key, config)[0], (state,))
    work[f"acting, {config.num_envs} copies"] = (
        lambda s, here: wm_rnd.act(s, wm_rnd.Memory(), here, key, config)[0],
        (state, eqx.filter_eval_shape(TimeStep.blank, spec, config.num_envs)),
    )
    return work


def _imagined(learner: Any, model: Any, starts: int, config: Config) -> Any:
    spec = model.spec
    obs = jnp.zeros((starts, spec.num_agents, *spec.obs_shape), spec.obs_dtype)
    mask = jnp.ones((starts, spec.num_agents, spec.max_actions), bool)
    one = lambda obs, mask, key: project(  # noqa: E731
        learner, model, obs, mask, jnp.zeros((), jnp.int32), jnp.ones(()), key, config
    )
    return jax.vmap(one)(obs, mask, jax.random.split(jax.random.key(0), starts))


def _dry_run(state: Any, one: Any, config: Config) -> Iterator[tuple[str, str, str]]:
    """Every part once on one example, as shapes."""
    model, spec, shape = state.world_model, state.spec, eqx.filter_eval_shape
    obs = jax.ShapeDtypeStruct(spec.obs_shape, spec.obs_dtype)
    allowed = jax.ShapeDtypeStruct((spec.max_actions,), bool)
    x = shape(lambda o: observed(spec, o), obs)
    yield "actor (each agent)", f"o {dims(obs)}", f"ln π {dims(shape(one.log_probs, x, allowed))}"
    yield "critic (each agent)", f"o {dims(obs)}", f"v {dims(shape(one.value, x))}"
    if one.projected is not None:
        yield "critic of self-projection (each agent)", f"o {dims(obs)}", f"v̂ {dims(shape(one.projected_value, x))}"
    if model is not None:
        yield from _dry_run_of_model(model, obs)
    if state.curiosity is not None:
        rows = jax.ShapeDtypeStruct((1, spec.num_agents, *spec.obs_shape), spec.obs_dtype)
        error = shape(lambda c, o: errors(c, o, config.curiosity), state.curiosity, rows)
        yield f"curiosity ({config.curiosity.sharing})", f"o′ of all {dims(rows)}", f"errors {dims(error)}"


def _dry_run_of_model(model: Any, obs: Any) -> Iterator[tuple[str, str, str]]:
    code, spec, shape = model.representation, model.spec, eqx.filter_eval_shape
    focal = jax.ShapeDtypeStruct((), jnp.int32)
    z, _ = shape(code.posterior, obs, jax.random.key(0))
    yield f"encoder ({type(code).__name__.lower()})", f"o {dims(obs)}", f"z {dims(z)}"
    yield "decoder", f"z {dims(z)}", f"ô {dims(shape(code.decode, z))}"
    actions = jax.ShapeDtypeStruct((spec.num_agents, spec.max_actions), jnp.float32)
    told = {"joint": "everyone’s actions", "own": "own action", "predicted": "own action, p̂ of the others"}
    h = shape(model.step, z, actions, focal)
    yield "action mixer", f"z {dims(z)}, who, {told[model.actions]}", f"h {dims(h)}"
    yield "dynamics", f"h {dims(h)}", f"p(z′) {dims(shape(code.prior, h, z))}"
    yield "rewards of all", f"h {dims(h)}", f"r {dims(shape(model.reward, h))}"
    yield "continue", f"h {dims(h)}", f"logit {dims(shape(model.cont, h))}"
    if model.mask is not None:
        yield "mask", f"z {dims(z)}", f"logits {dims(shape(model.mask, z))}"
    if model.team is not None:
        yield "teammate predictor", f"z {dims(z)}, who", f"p̂ {dims(shape(model.others, z, focal))}"
