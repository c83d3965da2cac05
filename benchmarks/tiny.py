"""MATWM with the smallest networks, for benchmarks of everything but learning."""

from __future__ import annotations

import dataclasses
from typing import Any

from codream import Config, preset

__all__ = ["tiny"]


def tiny(capacity: int, **changes: Any) -> Config:
    """Preset `small` with tiny networks and batches, a replay of `capacity` steps, and changes."""
    base = preset("small")
    sizes = {"hidden": 16, "heads": 2, "units": 16, "encoder_layers": 1, "head_layers": 1, "team_hidden": 16}
    sizes |= {"team_heads": 2, "reward_bins": 15, "change_bins": 11, "batch": 4, "length": 8}
    agents = {"units": 16, "context": 4, "horizon": 3, "starts": 4, "value_bins": 15}
    return dataclasses.replace(
        base,
        world_model=dataclasses.replace(base.world_model, **sizes),
        agents=dataclasses.replace(base.agents, **agents),
        replay=dataclasses.replace(base.replay, capacity=capacity),
        **changes,
    )
