"""Configurations and data small enough that a test is a matter of seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from codream.config import AgentConfig, Config, PartnerConfig, ReplayConfig, WorldModelConfig
from codream.envs import EnvSpec
from codream.world_model import Sequence

# Unequal observations and action counts, and masks.
SPEC = EnvSpec("mixed", ("hunter_0", "hunter_1", "prey_0"), ((5,), (3,), (4,)), (3, 2, 4), has_mask=True)
IMAGES = EnvSpec("images", ("left", "right"), ((16, 16, 1),) * 2, (3, 3))


def tiny(
    spec: EnvSpec,
    world_model: dict[str, Any] | None = None,
    agents: dict[str, Any] | None = None,
    replay: dict[str, Any] | None = None,
    partners: dict[str, Any] | None = None,
    **changes: Any,
) -> Config:
    """A resolved configuration of the smallest useful size, with changes."""
    base = Config(
        num_envs=2,
        warmup=0,
        world_model=WorldModelConfig(
            groups=4,
            classes=4,
            hidden=16,
            layers=1,
            heads=2,
            units=16,
            encoder_layers=1,
            image_depth=2,
            change_bins=11,
            reward_bins=15,
            team_hidden=16,
            team_layers=1,
            team_heads=2,
            batch=6,
            length=8,
            lr=3e-3,
        ),
        agents=AgentConfig(units=16, layers=1, context=4, horizon=3, starts=4, value_bins=15, lr=3e-3),
        replay=ReplayConfig(capacity=200, decay=0.99),
    )
    config = dataclasses.replace(
        base,
        world_model=dataclasses.replace(base.world_model, **(world_model or {})),
        agents=dataclasses.replace(base.agents, **(agents or {})),
        replay=dataclasses.replace(base.replay, **(replay or {})),
        partners=dataclasses.replace(PartnerConfig(), **(partners or {})),
        **changes,
    )
    return config.resolve(spec)


def batch_of(spec: EnvSpec, seed: int = 0, length: int = 8, boundary: int = 5) -> Sequence:
    """One sequence per agent. An episode ends with the observation in row boundary − 1; another starts."""
    keys = jax.random.split(jax.random.key(seed), spec.num_agents)
    rows = [_sequence(spec, focal, length, boundary, key) for focal, key in enumerate(keys)]
    return jax.tree.map(lambda *x: jnp.stack(x), *rows)


def _sequence(spec: EnvSpec, focal: int, length: int, boundary: int, key: Array) -> Sequence:
    n, time, keys = spec.num_agents, jnp.arange(length), jax.random.split(key, 4)
    if spec.is_image:
        obs = jax.random.randint(keys[0], (length, *spec.obs_shape), 0, 256).astype(jnp.uint8)
    else:
        obs = jax.random.normal(keys[0], (length, spec.obs_size)) * spec.obs_valid[focal]
    mask = jax.random.bernoulli(keys[1], 0.5, (length, spec.max_actions)) & spec.action_valid[focal]
    return Sequence(
        obs=obs,
        mask=mask if spec.has_mask else jnp.ones((length, 0), bool),
        action=jax.random.randint(keys[2], (length, n), 0, jnp.asarray(spec.num_actions)),
        reward=jax.random.normal(keys[3], (length,)),
        terminal=jnp.zeros(length, bool),
        acting=jnp.broadcast_to((time != boundary - 1)[:, None], (length, n)),
        first=(time == 0) | (time == boundary),
        focal=jnp.asarray(focal),
    )
