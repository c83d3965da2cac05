"""Configuration of WM-RND's parts: PPO, self-projection, curiosity. `codream.config` puts them together."""

from __future__ import annotations

import dataclasses
from typing import Literal

__all__ = ["CuriosityConfig", "PPOConfig", "ProjectionConfig"]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Only with --algo wm_rnd. Independent PPO, one learner for each agent (Schulman et al. 2017, arXiv:1707.06347)."""

    units: int = 64
    """Width of actor and critic."""
    layers: int = 2
    """Hidden layers of actor and critic."""
    image_depth: int = 8
    """Channels of the image encoder's first layer; doubled at each further one."""
    rollout: int = 32
    """Steps of each copy between two updates."""
    epochs: int = 4
    """Passes over a rollout."""
    minibatches: int = 4
    """Parts of a rollout in each pass, drawn for every agent by itself."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    clip_ratio: float = 0.2
    """ε: how far a probability ratio may leave 1 before it earns nothing more."""
    clip: float = 0.5
    """Largest norm of the gradient, for each agent by itself."""
    gamma: float = 0.99
    """Discount γ, of imagined rewards too."""
    lam: float = 0.95
    """λ of the generalised advantage estimate."""
    entropy: float = 1e-2
    """Weight of the policy's entropy."""
    value_weight: float = 0.5
    """Weight of the value loss."""


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """Only with --algo wm_rnd. Self-projection: what if everyone acted as I do? Imagined from real steps, through a
    learned model."""

    coef: float = 0.0
    """Weight of the imagined return in an agent's loss. At 0 nothing is imagined, and no model is made."""
    gradient: Literal["straight_through", "reinforce"] = "reinforce"
    """How the imagined return improves a policy. `straight_through`: it is differentiated through the model and the
    samples, imagined anew for every minibatch. `reinforce`: PPO's clipped loss of the imagined actions, with a critic
    of their own; imagined once for all epochs."""
    imagination_steps: int = 15
    """Imagined steps."""
    starts: int = 64
    """Imagined trajectories in a minibatch, shared out equally over the agents."""
    actions: Literal["joint", "own", "predicted"] = "joint"
    """Actions that the world model sees: everyone's; only the focal agent's (the others are noise); or its own
    and the teammate predictor's probabilities of the others'."""
    view: Literal["each", "focal"] = "each"
    """What the copies of my policy see. `each`: what the agent that they stand for would see, so all views are
    imagined. `focal`: all of them see what I see, and only my view is imagined."""
    temperature: float = 1.0
    """Temperature of the Gumbel-softmax through which gradients pass a sampled action (`straight_through`)."""
    symmetry: float = 1.0
    """Symmetry ratio α at the start: reward is (1 − α) R_self + α R_mean."""
    symmetry_end: float = 1.0
    """α at the end of training. Not used by `constant`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How α goes from start to end over `total_steps`."""


@dataclasses.dataclass(frozen=True)
class CuriosityConfig:
    """Random network distillation (Burda et al. 2018, arXiv:1810.12894)."""

    kind: Literal["none", "rnd"] = "none"
    """Intrinsic reward: none, or the error with which a network predicts another, random one."""
    sharing: Literal["shared", "individual", "hybrid"] = "shared"
    """One pair of networks for all (what A has seen is known to B), one for each agent, or both."""
    hybrid_weight: float = 0.5
    """Share of the common pair's reward in `hybrid`; the rest is the agent's own pair's."""
    coef: float = 0.1
    """Weight of the intrinsic reward, whose returns have standard deviation 1 (as in wm_rnd those of the rewards do; in
    matwm rewards are in the game's own units)."""
    lr: float = 3e-4
    """Learning rate of Adam, of the predictor."""
    units: int = 64
    """Width of target and predictor."""
    layers: int = 2
    """Hidden layers of target and predictor."""
    features: int = 32
    """Outputs of the target, which the predictor predicts."""
    image_depth: int = 4
    """Channels of the image encoders' first layer; doubled at each further one."""
