"""The smallest useful configurations of WM-RND, and probe games for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from probe_envs import Probe, ProbeState

from codream.config import Config, CuriosityConfig, PPOConfig, ProjectionConfig, WorldModelConfig


def unresolved(
    projection: dict[str, Any] | None = None,
    curiosity: dict[str, Any] | None = None,
    ppo: dict[str, Any] | None = None,
    **changes: Any,
) -> Config:
    """Two copies, rollouts of 8 steps, nets of width 8; changes are merged into the parts."""
    config = Config(
        algo="wm_rnd",
        preset="wm_rnd",
        num_envs=2,
        warmup=0,
        total_steps=64,
        checkpoint_every=32,
        log_every=16,
        world_model_every=8.0,
        world_model=WorldModelConfig(
            groups=2,
            classes=4,
            hidden=8,
            units=8,
            heads=2,
            encoder_layers=1,
            image_depth=2,
            team_hidden=8,
            team_layers=1,
            team_heads=2,
            batch=2,
            length=4,
            lr=1e-3,
            latent_gradient="gumbel",
        ),
        ppo=PPOConfig(**{"units": 8, "layers": 1, "rollout": 8, "epochs": 1, "minibatches": 2, **(ppo or {})}),
        projection=ProjectionConfig(**{"coef": 0.1, "imagination_steps": 2, "starts": 4, **(projection or {})}),
        curiosity=CuriosityConfig(**{"units": 8, "layers": 1, "features": 4, **(curiosity or {})}),
    )
    return dataclasses.replace(config, **changes)


class Bandit(Probe):
    """Action 1 pays 1 and action 0 nothing, whatever the other does."""

    def __init__(self, agents: int = 2) -> None:
        super().__init__(tuple(f"agent_{i}" for i in range(agents)), (1,) * agents, (2,) * agents, 4)

    def look(self, state: ProbeState) -> Float[Array, "agents size"]:
        return jnp.ones((self.spec.num_agents, 1))

    def pay(self, state: ProbeState, actions: Int[Array, " agents"]) -> Float[Array, " agents"]:
        return actions.astype(jnp.float32)


class Same(Bandit):
    """Both are paid 1 if they do the same."""

    def pay(self, state: ProbeState, actions: Int[Array, " agents"]) -> Float[Array, " agents"]:
        return jnp.broadcast_to((actions[0] == actions[1]).astype(jnp.float32), actions.shape)


class Different(Bandit):
    """Both are paid 1 if they do different things, though they see the same: roles complete each other."""

    def pay(self, state: ProbeState, actions: Int[Array, " agents"]) -> Float[Array, " agents"]:
        return jnp.broadcast_to((actions[0] != actions[1]).astype(jnp.float32), actions.shape)


class Helping(Bandit):
    """Action 1 costs its agent 1 and pays the other 3: selfish agents take 0, together they should take 1."""

    def pay(self, state: ProbeState, actions: Int[Array, " agents"]) -> Float[Array, " agents"]:
        gives = actions.astype(jnp.float32)
        return 3.0 * jnp.flip(gives) - gives
