"""What several tests share."""

import dataclasses
from typing import Any

from codream import Config, preset


def tiny_config(**changes: Any) -> Config:
    """`small` with tiny nets, on 4 copies of simple_tag; all copies' episodes end together every 100 steps."""
    base = preset("small")
    config = dataclasses.replace(
        base,
        num_envs=4,
        total_steps=400,
        warmup=100,
        checkpoint_every=200,
        log_every=100,
        world_model_every=50,
        agents_every=50,
        world_model=dataclasses.replace(
            base.world_model,
            hidden=16,
            heads=2,
            units=16,
            encoder_layers=1,
            head_layers=1,
            team_hidden=16,
            team_heads=2,
            reward_bins=15,
            change_bins=11,
            groups=4,
            classes=4,
            image_depth=2,
            batch=4,
            length=8,
        ),
        agents=dataclasses.replace(base.agents, units=16, context=4, horizon=3, starts=4, value_bins=15),
        replay=dataclasses.replace(base.replay, capacity=400),
    )
    return dataclasses.replace(config, **changes)
