"""codream: teams of agents that learn inside learned models of their shared world."""

from codream.agents import Agents, load
from codream.checkpoint import CheckpointError
from codream.config import Config, ConfigError, preset
from codream.envs import EnvironmentFailure, EnvSpec, TimeStep, UnknownEnvironment, available_envs, make_env
from codream.evaluation import CrossPlay, evaluate
from codream.runs import Run, RunError
from codream.trainer import TrainingDiverged, train

__all__ = [
    "Agents",
    "CheckpointError",
    "Config",
    "ConfigError",
    "CrossPlay",
    "EnvSpec",
    "EnvironmentFailure",
    "Run",
    "RunError",
    "TimeStep",
    "TrainingDiverged",
    "UnknownEnvironment",
    "available_envs",
    "evaluate",
    "load",
    "make_env",
    "preset",
    "train",
]
