"""codream: teams of agents that learn inside learned models of their shared world."""

from codream.accelerators import Devices, devices
from codream.agents import Agents, load
from codream.checkpoint import CheckpointError
from codream.config import Config, ConfigError
from codream.envs import EnvironmentFailure, EnvSpec, TimeStep, UnknownEnvironment, available_envs, make_env
from codream.evaluation import CrossPlay, evaluate
from codream.guards import Stopped
from codream.inspection import Inspection, inspect
from codream.playing import EndlessEpisode
from codream.presets import preset
from codream.report import Dreamed, Episode, compare, dream, report, watch
from codream.runs import Run, RunError
from codream.sweeps import Sweep, SweepFailed, sweep
from codream.trainer import TrainingDiverged, train, train_seeds

__all__ = [
    "Agents",
    "CheckpointError",
    "Config",
    "ConfigError",
    "CrossPlay",
    "Devices",
    "Dreamed",
    "EndlessEpisode",
    "EnvSpec",
    "EnvironmentFailure",
    "Episode",
    "Inspection",
    "Run",
    "RunError",
    "Stopped",
    "Sweep",
    "SweepFailed",
    "TimeStep",
    "TrainingDiverged",
    "UnknownEnvironment",
    "available_envs",
    "compare",
    "devices",
    "dream",
    "evaluate",
    "inspect",
    "load",
    "make_env",
    "preset",
    "report",
    "sweep",
    "train",
    "train_seeds",
    "watch",
]
