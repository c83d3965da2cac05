"""The named presets: the paper in two variants, `small` for a laptop, WM-RND and independent PPO."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from codream.config import (
    AgentConfig,
    Config,
    ConfigError,
    CuriosityConfig,
    PartnerConfig,
    ProjectionConfig,
    ReplayConfig,
    WorldModelConfig,
)
from codream.reading import flat

__all__ = ["PRESETS", "idle", "preset", "reads", "refuse_unread"]

_PAPER = Config(preset="paper", world_model=WorldModelConfig(latent="categorical"))
_SUMMARY = Config(
    preset="summary",
    total_steps=100_000,
    world_model=WorldModelConfig(latent="categorical", latent_gradient="gumbel", layers=4, lr=3e-4, team_weight=0.5),
    agents=AgentConfig(horizon=15, starts=768),
    replay=ReplayConfig(capacity=100_000, decay=0.995),
)
_SMALL = Config(
    preset="small",
    num_envs=16,
    world_model_every=4.0,
    agents_every=25.0,
    world_model=WorldModelConfig(
        hidden=128,
        layers=1,
        heads=4,
        units=128,
        head_layers=2,
        outcome_sees_next=True,
        team_hidden=64,
        team_layers=1,
        team_heads=4,
        reward_bins=63,
        batch=16,
        length=26,
        lr=1e-3,
        outcome_lr=1e-2,
        dyn_weight=1.0,
        image_depth=16,
        groups=16,
        classes=16,
    ),
    agents=AgentConfig(units=128, lr=1e-3, horizon=12, starts=64, gamma=0.95, entropy=3e-3, value_bins=63),
    replay=ReplayConfig(decay=0.9999),
    partners=PartnerConfig(random_share=0.22),
)
_IPPO = Config(
    algo="wm_rnd",
    preset="ippo",
    env="coin_game",
    num_envs=64,
    total_steps=500_000,
    warmup=0,
    world_model_every=64.0,
    checkpoint_every=50_000,
    log_every=4_096,
    world_model=WorldModelConfig(
        hidden=128,
        units=128,
        encoder_layers=2,
        groups=8,
        classes=16,
        image_depth=8,
        team_hidden=64,
        team_layers=1,
        batch=16,
        length=32,
        lr=2e-3,
        clip=100.0,
        latent_gradient="gumbel",
        rec_weight=50.0,  # at 1 the code of a sparse grid collapses: see world_model/latent_std
        dyn_weight=1.0,
        free_nats=0.1,
    ),
)
_IPPO_COMMON = dataclasses.replace(_IPPO, preset="ippo_common", common_reward=True)
_WM_RND = dataclasses.replace(
    _IPPO,
    preset="wm_rnd",
    projection=ProjectionConfig(coef=1.0, imagination_steps=8, starts=512, symmetry_end=0.8, schedule="linear"),
    curiosity=CuriosityConfig(kind="rnd"),
)
_ORIGINAL = dataclasses.replace(
    _WM_RND,
    preset="original",
    projection=ProjectionConfig(coef=0.1, gradient="straight_through", imagination_steps=32, view="focal"),
)

PRESETS: dict[str, Config] = {
    config.preset: config for config in (_PAPER, _SUMMARY, _SMALL, _IPPO, _IPPO_COMMON, _WM_RND, _ORIGINAL)
}


def preset(name: str) -> Config:
    """The preset of that name, with an `env_kwargs` of its own. Raises ConfigError that lists all, nearest first."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
        raise ConfigError(
            f"unknown preset {name!r}; presets: {', '.join(near + [p for p in PRESETS if p not in near])}"
        )
    return dataclasses.replace(PRESETS[name])  # which copies env_kwargs, see Config


# What one learner reads and the other does not: options, and whole groups of them. (Not `world_model.heads`, of which
# `hidden` must be a multiple for both.)
_OWN = {
    "matwm": (
        "agents",
        "agents_every",
        "partners",
        "replay",
        "world_model.change_bins",
        "world_model.change_range",
        "world_model.layers",
        "world_model.near",
        "world_model.outcome_lr",
        "world_model.outcome_sees_next",
        "world_model.reward_bins",
        "world_model.scale_actions",
        "world_model.teammates",
    ),
    "wm_rnd": ("ppo", "projection"),
}


def reads(algo: str, option: str) -> bool:
    """Whether a learner reads an option, e.g. `ppo.lr`; False for what only the other one does."""
    theirs = {name for other, own in _OWN.items() if other != algo for name in own}
    return option not in theirs and option.partition(".")[0] not in theirs


def refuse_unread(config: Config) -> None:
    """Raise ConfigError where an option of the other learner was changed, as it would do nothing."""
    for name, value in _asked_for(config).items():
        if not reads(config.algo, name):
            raise ConfigError(
                f"{name}={value} was asked for, but algo={config.algo} does not read it, only the other learner does"
            )


def idle(config: Config) -> list[str]:
    """Of each option that was changed and does nothing as others stand, why, in a sentence. It may be meant: in a sweep
    over the other option."""
    told = []
    for name, value in _asked_for(config).items():
        if name == "world_model.latent":  # filled in for the environment
            continue
        for beginnings, off, switch in _SWITCHES:
            if name.startswith(beginnings) and name != switch and off(config):
                told.append(f"{name}={value} does nothing while {switch} is {flat(config)[switch]}")
                break
    return told


_OF_CODES = tuple(
    f"world_model.{name}"
    for name in (
        "classes",
        "encoder_layers",
        "free_nats",
        "groups",
        "image_depth",
        "latent_gradient",
        "rec_weight",
        "rep_weight",
        "unimix",
    )
)
"""Options of the code that a categorical latent is. `change` takes vectors as they are."""

_SWITCHES: tuple[tuple[str | tuple[str, ...], Callable[[Config], bool], str], ...] = (
    ("curiosity.", lambda c: c.curiosity.kind == "none", "curiosity.kind"),
    ("curiosity.hybrid_weight", lambda c: c.curiosity.sharing != "hybrid", "curiosity.sharing"),
    (("projection.", "world_model"), lambda c: c.algo == "wm_rnd" and c.projection.coef == 0, "projection.coef"),
    ("projection.symmetry_end", lambda c: c.projection.schedule == "constant", "projection.schedule"),
    ("projection.temperature", lambda c: c.projection.gradient == "reinforce", "projection.gradient"),
    (_OF_CODES, lambda c: c.world_model.latent == "change", "world_model.latent"),
    (
        ("world_model.change_", "world_model.near"),
        lambda c: c.world_model.latent == "categorical",
        "world_model.latent",
    ),
    ("world_model.team_", lambda c: not c.world_model.teammates, "world_model.teammates"),
    ("partners.past_", lambda c: c.partners.past_share == 0, "partners.past_share"),
    ("replay.decay", lambda c: c.replay.uniform, "replay.uniform"),
    ("checkpoints_best_episodes", lambda c: c.checkpoints_best is None, "checkpoints_best"),
)
"""How the options begin that do nothing, when, and which other option switches them on. Of several that do, the first
is told."""


def _asked_for(config: Config) -> dict[str, Any]:
    """The options that are neither as the preset has them nor as they are by themselves."""
    usual = [flat(PRESETS.get(config.preset, Config())), flat(Config())]
    return {name: value for name, value in flat(config).items() if all(value != one[name] for one in usual)}
