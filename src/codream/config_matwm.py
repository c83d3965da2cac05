"""Configuration of MATWM's parts: world model, actor-critic, replay, partners. `codream.config` puts them together."""

from __future__ import annotations

import dataclasses
from typing import Literal

__all__ = ["AgentConfig", "PartnerConfig", "ReplayConfig", "WorldModelConfig"]


@dataclasses.dataclass(frozen=True)
class WorldModelConfig:
    """The shared world model: sizes, loss weights, optimiser (MATWM, Table C.6)."""

    latent: Literal["auto", "categorical", "change"] = "auto"
    """How an observation becomes z. `categorical`: the paper's one-hot code. `change`: vectors as they are,
    and for each entry a two-hot distribution of its change. `auto`: `change` for vectors, else `categorical`."""
    latent_gradient: Literal["straight_through", "gumbel"] = "straight_through"
    """How gradients pass a categorical sample: straight-through, or hard Gumbel-softmax."""
    groups: int = 32
    """Categorical variables in a latent."""
    classes: int = 32
    """Classes of each categorical variable."""
    unimix: float = 0.01
    """Share of the uniform distribution mixed into every categorical latent."""
    change_bins: int = 41
    """Bins of each entry's change."""
    change_range: float = 3.0
    """Largest change of an entry (after symlog) that the bins reach, either way."""
    near: tuple[float, ...] = (0.05, 0.1, 0.2)
    """For `change`: distances, in the environment's units, at which two points (pairs of neighbouring entries)
    count as near each other. Empty: distances are not looked at."""
    hidden: int = 512
    """Width of the dynamics transformer."""
    layers: int = 2
    """Blocks of the dynamics transformer."""
    heads: int = 8
    """Attention heads."""
    units: int = 512
    """Width of encoder, decoder and heads."""
    encoder_layers: int = 3
    """Hidden layers of the vector encoder and decoder."""
    head_layers: int = 1
    """Hidden layers of the dynamics, reward, continue and mask heads."""
    image_depth: int = 32
    """Channels of the image encoder's first layer; doubled at each further one."""
    outcome_sees_next: bool = False
    """Whether reward and continue heads also see the next latent. Off in the paper."""
    reward_bins: int = 255
    """Bins of the reward's symlog two-hot distribution."""
    teammates: bool = True
    """Ablation switch: the teammate predictor, and p̂ among what actor and critic see."""
    team_hidden: int = 128
    """Width of the teammate predictor's transformer."""
    team_layers: int = 2
    """Blocks of the teammate predictor's transformer."""
    team_heads: int = 4
    """Attention heads of the teammate predictor."""
    scale_actions: bool = True
    """Ablation switch: ã = a + the number of actions of all agents before, so that ids never overlap."""
    batch: int = 16
    """Sequences in a world-model batch, shared out equally over the agents: the nearest multiple of their number."""
    length: int = 64
    """Steps in a sequence."""
    lr: float = 3e-5
    """Learning rate of Adam."""
    outcome_lr: float | None = None
    """Learning rate of the reward and continue heads. Unset: the same."""
    clip: float = 1000.0
    """Largest global norm of the gradient."""
    rec_weight: float = 1.0
    reward_weight: float = 1.0
    continue_weight: float = 1.0
    team_weight: float = 1.0
    mask_weight: float = 0.5
    """β₁ for the mask loss."""
    dyn_weight: float = 0.5
    """β₁ for the dynamics loss."""
    rep_weight: float = 0.1
    """β₂ for the representation loss."""
    free_nats: float = 1.0
    """Dynamics and representation losses of a categorical latent below this count as this."""

    def __post_init__(self) -> None:
        if isinstance(self.near, list):  # as programs are kept by their configuration, it holds nothing that changes
            object.__setattr__(self, "near", tuple(self.near))


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Only with --algo matwm. Actors and critics, trained in imagination."""

    units: int = 512
    """Width of actor and critic."""
    layers: int = 2
    """Hidden layers of actor and critic."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    clip: float = 100.0
    """Largest norm of the gradient, for each agent by itself."""
    context: int = 8
    """Real steps before and with the start of an imagined trajectory."""
    horizon: int | None = None
    """Imagined steps. Unset: the paper's rule, 16 up to 3 agents, 12 up to 6, else 8."""
    starts: int | None = None
    """Imagined trajectories per agent and update. Unset: 512 up to 3 agents, 768 up to 6, else 1024."""
    gamma: float = 0.99
    """Discount γ."""
    lam: float = 0.95
    """λ of the λ-returns."""
    entropy: float = 3e-4
    """Weight η of the policy's entropy."""
    critic_ema: float = 0.98
    """Decay of the averaged critic."""
    critic_ema_weight: float = 1.0
    """Weight of the critic's regression to its own average."""
    return_ema: float = 0.99
    """Decay of the return scale's percentiles."""
    value_bins: int = 255
    """Bins of the critic's symlog two-hot distribution."""


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Only with --algo matwm. Replay: one buffer per agent, stored as one array with an agent axis."""

    capacity: int = 50_000
    """Steps kept for each agent."""
    decay: float = 0.9998
    """World-model sequences are drawn with weight decay^age, age in environment steps."""
    uniform: bool = False
    """Ablation switch: draw world-model sequences uniformly."""


@dataclasses.dataclass(frozen=True)
class PartnerConfig:
    """Only with --algo matwm. Who plays besides the current policies while experience is collected. All off: plain
    self-play."""

    random_share: float = 0.0
    """Share of episodes in which a side plays uniformly at random. Each side is drawn by itself."""
    past_share: float = 0.0
    """Share of episodes in which a side plays with an earlier policy of its own."""
    past_every: int = 2_500
    """Steps between two snapshots for `past_share`."""
    past_kept: int = 4
    """Snapshots kept; the oldest goes first."""
