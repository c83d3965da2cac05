"""The range of every number in a configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import attrgetter

__all__ = ["LARGEST", "RANGES", "out_of_range"]

# (lowest, highest); None is open. Every numeric option has a range, for each number of a list.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "seed": (0, 2**31 - 1),
    "num_envs": (1, 4096),
    "env_workers": (0, 4096),
    "total_steps": (1, None),
    "warmup": (0, None),
    "world_model_every": (1e-3, 1e9),
    "agents_every": (1e-3, 1e9),
    "checkpoint_every": (1, None),
    "checkpoints_kept": (1, None),
    "checkpoints_nth": (0, None),
    "checkpoints_best_episodes": (1, None),
    "rollbacks": (0, None),
    "env_time_limit": (0, None),
    "log_every": (1, None),
    "devices": (1, 65_536),
    "world_model.groups": (1, 1024),
    "world_model.classes": (2, 1024),
    "world_model.unimix": (0, 1),
    "world_model.change_bins": (3, 1025),
    "world_model.change_range": (1e-3, 1e3),
    "world_model.near": (1e-6, None),  # each of them
    "world_model.hidden": (2, None),
    "world_model.layers": (1, 64),
    "world_model.heads": (1, None),
    "world_model.units": (1, None),
    "world_model.encoder_layers": (0, 64),
    "world_model.head_layers": (0, 64),
    "world_model.image_depth": (1, None),
    "world_model.reward_bins": (3, 1025),
    "world_model.team_hidden": (2, None),
    "world_model.team_layers": (1, 64),
    "world_model.team_heads": (1, None),
    "world_model.batch": (1, None),
    "world_model.length": (2, None),
    "world_model.lr": (0, 1),
    "world_model.outcome_lr": (0, 1),
    "world_model.clip": (1e-6, None),
    "world_model.rec_weight": (0, None),
    "world_model.reward_weight": (0, None),
    "world_model.continue_weight": (0, None),
    "world_model.team_weight": (0, None),
    "world_model.mask_weight": (0, None),
    "world_model.dyn_weight": (0, None),
    "world_model.rep_weight": (0, None),
    "world_model.free_nats": (0, None),
    "agents.units": (1, None),
    "agents.layers": (0, 64),
    "agents.lr": (0, 1),
    "agents.clip": (1e-6, None),
    "agents.context": (2, 1024),
    "agents.horizon": (1, 1024),
    "agents.starts": (1, None),
    "agents.gamma": (0, 1),
    "agents.lam": (0, 1),
    "agents.entropy": (0, None),
    "agents.critic_ema": (0, 1),
    "agents.critic_ema_weight": (0, None),
    "agents.return_ema": (0, 0.999999),
    "agents.value_bins": (3, 1025),
    "replay.capacity": (2, None),
    "replay.decay": (0.9, 1),
    "partners.random_share": (0, 1),
    "partners.past_share": (0, 1),
    "partners.past_every": (1, None),
    "partners.past_kept": (1, 64),
    "ppo.units": (1, None),
    "ppo.layers": (0, 64),
    "ppo.image_depth": (1, None),
    "ppo.rollout": (1, None),
    "ppo.epochs": (1, 1024),
    "ppo.minibatches": (1, None),
    "ppo.lr": (0, 1),
    "ppo.clip_ratio": (1e-6, None),
    "ppo.clip": (1e-6, None),
    "ppo.gamma": (0, 1),
    "ppo.lam": (0, 1),
    "ppo.entropy": (0, None),
    "ppo.value_weight": (0, None),
    "projection.coef": (0, None),
    "projection.imagination_steps": (1, 1024),
    "projection.starts": (1, None),
    "projection.temperature": (1e-3, 1e3),
    "projection.symmetry": (0, 1),
    "projection.symmetry_end": (0, 1),
    "curiosity.hybrid_weight": (0, 1),
    "curiosity.coef": (0, None),
    "curiosity.lr": (0, 1),
    "curiosity.units": (1, None),
    "curiosity.layers": (0, 64),
    "curiosity.features": (1, None),
    "curiosity.image_depth": (1, None),
}


LARGEST = 2**31 - 1
"""Counters are 32-bit integers."""


def out_of_range(config: object) -> Iterator[str]:
    """What is wrong with each number of `config`, given by its path, that lies outside its range. NaN and infinity
    always do."""
    for path, (low, high) in RANGES.items():
        value = attrgetter(path)(config)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None:
                continue
            # A comparison with NaN is false.
            if not ((low is None or number >= low) and (high is None or number <= high)):
                span = f"{low} to {high}" if high is not None else f"{low} or more"
                yield f"{path} must be {span}, got {number}"
            elif number == math.inf or (isinstance(number, int) and number > LARGEST):
                limit = f"at most {LARGEST}" if isinstance(number, int) else "finite"
                yield f"{path} must be {limit}, got {number}"
