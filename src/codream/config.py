"""Configuration: frozen dataclasses, and what is refused. `codream.presets` has the named ones.

The dataclass is the configuration file, the help text and the type check. Fields left at `None` follow a
rule that needs the environment (`Config.resolve`), such as the paper's rule for the horizon.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

from codream.config_matwm import AgentConfig, PartnerConfig, ReplayConfig, WorldModelConfig
from codream.config_wm_rnd import CuriosityConfig, PPOConfig, ProjectionConfig
from codream.envs import EnvSpec
from codream.ranges import out_of_range
from codream.reading import build, check

__all__ = [
    "KEEPING",
    "UNREAD",
    "AgentConfig",
    "Config",
    "ConfigError",
    "CuriosityConfig",
    "PPOConfig",
    "PartnerConfig",
    "ProjectionConfig",
    "ReplayConfig",
    "WorldModelConfig",
]


class ConfigError(ValueError):
    """A value out of range, an unknown name, or a combination that means nothing."""


_WORLD_MODEL, _AGENTS, _REPLAY, _PARTNERS = WorldModelConfig(), AgentConfig(), ReplayConfig(), PartnerConfig()
_CURIOSITY, _PPO, _PROJECTION = CuriosityConfig(), PPOConfig(), ProjectionConfig()


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run, besides library versions and the device."""

    algo: Literal["matwm", "wm_rnd"] = "matwm"
    """The learner. `matwm`: actors and critics trained in imagination (`agents`, `replay`). `wm_rnd`: PPO on real
    steps, and imagined ones (`ppo`, `projection`)."""
    env: str = "simple_tag"
    """Environment, e.g. simple_tag, mpe2:simple_spread_v3, jaxmarl:smax_3m."""
    env_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Keyword arguments of the environment: what JSON can hold, as a run keeps them in a file."""
    preset: str = "own"
    """The preset this configuration started from; `own`: none."""
    seed: int = 0
    """Of everything random: nets, environment, actions, what is drawn for learning."""
    num_envs: int = 1
    """Copies of the environment stepped together."""
    env_workers: int = 0
    """Processes that step the copies of a host environment, this one among them; what comes out is the same. 0: one for
    every 4 copies, up to 8 and as far as there are cores, of an environment given by name; 1 for one given as an
    object."""
    total_steps: int = 50_000
    """Environment steps, over all copies; a few more where episodes that still run are finished, or on in-graph
    environments up to a chunk of 16 steps of every copy."""
    warmup: int = 1_000
    """Steps with uniformly random actions. Training begins after them, once the buffer has enough for a batch."""
    world_model_every: float = 1.0
    """Environment steps for each world-model update; below 1 there are several a step. With `algo=wm_rnd`, which learns
    from whole rollouts, at least one a rollout."""
    agents_every: float = 1.0
    """Environment steps for each update of all agents."""
    checkpoint_every: int = 5_000
    """Environment steps between checkpoints; on a host environment each waits for running episodes to end."""
    checkpoints_kept: int = 3
    """Latest checkpoints kept."""
    checkpoints_nth: int = 0
    """Also keep every n-th checkpoint for good; 0: none."""
    checkpoints_best: str | None = None
    """Also keep the checkpoint with the best score in cross-play, given as SIDE:OPPONENT: the return of one agent of
    SIDE while OPPONENT (a reference, or self) plays the other sides, e.g. adversary:flee. Unset: nobody plays."""
    checkpoints_best_episodes: int = 40
    """Episodes that `checkpoints_best` plays at every checkpoint."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """What to do when anything becomes NaN or infinite. `rollback`: go on from the last checkpoint with a new key."""
    rollbacks: int = 3
    """Rollbacks, at most, in the whole run; after them it stops."""
    env_time_limit: float = 600.0
    """Seconds after which a host environment that does not answer counts as hung, and the run stops. 0: no limit."""
    log_every: int = 400
    """Environment steps between two lines of metrics."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the products of matwm's networks are computed in. Parameters, sums, returns and losses are float32."""
    devices: int = 1
    """Devices that share the batches of sequences and of imagined trajectories."""
    async_collect: bool = False
    """Learn from a step while a host environment takes the next one: actions are by the policy of an update earlier."""
    world_model: WorldModelConfig = _WORLD_MODEL
    agents: AgentConfig = _AGENTS
    replay: ReplayConfig = _REPLAY
    partners: PartnerConfig = _PARTNERS
    imagined_partners: Literal["auto", "implicit", "predicted", "mirrored"] = "auto"
    """Who the others are in imagination. `implicit`: part of the dynamics. `predicted`: as the teammate predictor
    has them. `mirrored`: copies of the agent that imagines. `auto`: for matwm by `world_model.teammates`; for wm_rnd
    `implicit` with the action input `own`, `mirrored` with `joint` where all agents are alike, else `predicted`."""
    common_reward: bool = False
    """Pay every agent the sum of all agents' rewards. Logged and evaluated returns stay each agent's own."""
    curiosity: CuriosityConfig = _CURIOSITY
    ppo: PPOConfig = _PPO
    projection: ProjectionConfig = _PROJECTION

    def __post_init__(self) -> None:
        try:
            check(self)
        except ValueError as err:
            raise ConfigError(str(err)) from None
        object.__setattr__(self, "env_kwargs", _as_json(self.env_kwargs))
        _check_numbers(self)
        _check_design(self)

    def resolve(self, spec: EnvSpec) -> Config:
        """Fill in what depends on the environment; refuse what does not fit it."""
        if self.algo == "wm_rnd":
            return self._resolve_wm_rnd(spec)
        latent = self.world_model.latent
        teammates = self.world_model.teammates and self.imagined_partners != "implicit"
        if latent == "auto":
            latent = "categorical" if spec.is_image else "change"
        elif latent == "change" and spec.is_image:
            raise ConfigError(
                f"world_model.latent=change predicts vectors, but {spec.name} has images of shape "
                f"{spec.obs_shape}; use categorical (or auto)"
            )
        n = spec.num_agents
        horizon, starts = (16, 512) if n <= 3 else (12, 768) if n <= 6 else (8, 1024)
        batch = max(n, round(self.world_model.batch / n) * n) if self.world_model.batch % n else self.world_model.batch
        resolved = dataclasses.replace(
            self,
            world_model=dataclasses.replace(self.world_model, latent=latent, batch=batch, teammates=teammates),
            agents=dataclasses.replace(
                self.agents, horizon=self.agents.horizon or horizon, starts=self.agents.starts or starts
            ),
        )
        resolved._check_shares(n)
        length, share = self.world_model.length, batch // n
        each = -(-share // self.num_envs)  # sequences of one copy; each keeps others from 2 × length − 1 places
        least = self.num_envs * ((each - 1) * (2 * length - 1) + length)
        if self.replay_rows * self.num_envs < least:
            raise ConfigError(
                f"replay.capacity {self.replay.capacity} is too small: a batch has {share} sequences of each agent, of "
                f"world_model.length {length}, and no two may overlap, wherever they are drawn; use at least {least}"
            )
        return resolved

    def for_programs(self) -> Config:
        """As compiled functions are given it: with the defaults of what none of them reads, so that runs which differ
        in nothing else share them."""
        default, unread = Config(), [*UNREAD, *(["total_steps"] if self.algo == "matwm" else [])]
        return dataclasses.replace(self, **{name: getattr(default, name) for name in unread})

    def _check_shares(self, agents: int) -> None:
        for name, size in {"world_model.batch": self.world_model.batch, "agents.starts": self.agents.starts}.items():
            if size is not None and size % self.devices:
                together = math.lcm(agents, self.devices) if name == "world_model.batch" else self.devices
                raise ConfigError(
                    f"{name} must be a multiple of devices, so that each gets an equal share; got {size}"
                    + (f" (a multiple of the {agents} agents)" if together > self.devices else "")
                    + f" and {self.devices}; the nearest: {max(together, round(size / together) * together)}"
                )

    def _resolve_wm_rnd(self, spec: EnvSpec) -> Config:
        alike = len(set(spec.obs_shapes)) == 1 and len(set(spec.num_actions)) == 1
        rows, parts = self.ppo.rollout * self.num_envs, self.ppo.minibatches
        if rows % parts:
            raise ConfigError(
                f"ppo.minibatches must divide the {rows} steps of a rollout (ppo.rollout {self.ppo.rollout} × "
                f"num_envs {self.num_envs}); got {parts}"
            )
        partners = self.imagined_partners
        if partners == "auto":
            by_input = {"own": "implicit", "predicted": "predicted", "joint": "mirrored" if alike else "predicted"}
            partners = by_input[self.projection.actions]
        if partners == "mirrored" and self.projection.coef > 0 and not alike:
            raise ConfigError(
                f"imagined_partners=mirrored lets every agent act by one policy, but those of {spec.name} differ: "
                f"observations {spec.obs_shapes}, actions {spec.num_actions}; use predicted, or implicit with "
                "projection.actions=own"
            )
        return dataclasses.replace(
            self,
            world_model=dataclasses.replace(self.world_model, latent="categorical"),
            imagined_partners=partners,
        )

    @property
    def replay_rows(self) -> int:
        """Rows of the replay buffer; each holds one step of every copy."""
        return self.replay.capacity // self.num_envs

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Config:
        """Inverse of `to_json`. Raises ConfigError for what is no JSON object, for a field that does not exist, naming
        the nearest, and for a value of the wrong type or out of range."""
        try:
            return build(Config, json.loads(text))
        except (ValueError, RecursionError) as err:
            raise ConfigError(str(err) or type(err).__name__) from err


def _as_json(value: Any) -> Any:
    """Keywords of an environment as config.json will have them: a tuple becomes a list."""
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(
        f"env_kwargs can hold what JSON can, as a run keeps them in a file, got {value!r}; give other keywords to an "
        "environment of your own: env=lambda: Game(keyword=…), on the command line --env-from"
    )


def _check_numbers(config: Config) -> None:
    """Refuse numbers that are out of range, and those that do not go together."""
    for wrong in out_of_range(config):
        raise ConfigError(wrong)
    for part, width in (("", config.world_model.hidden), ("team_", config.world_model.team_hidden)):
        heads = getattr(config.world_model, f"{part}heads")
        if width % (2 * heads):
            raise ConfigError(
                f"world_model.{part}hidden must be a multiple of 2 × world_model.{part}heads "
                f"(rotary positions pair the entries of a head); got {width} and {heads}"
            )
    if config.partners.random_share + config.partners.past_share > 1:
        raise ConfigError(
            "partners.random_share + partners.past_share must be at most 1, got "
            f"{config.partners.random_share} + {config.partners.past_share}"
        )
    if config.algo == "matwm" and config.replay_rows < config.world_model.length + 1:
        raise ConfigError(
            f"replay.capacity {config.replay.capacity} over num_envs {config.num_envs} keeps {config.replay_rows} "
            f"steps of each copy, fewer than a sequence (world_model.length = {config.world_model.length}) needs"
        )


KEEPING = (
    "env_workers",
    "checkpoint_every",
    "checkpoints_kept",
    "checkpoints_nth",
    "checkpoints_best",
    "checkpoints_best_episodes",
    "on_nan",
    "rollbacks",
    "env_time_limit",
    "log_every",
)
"""Options of how a run is kept and watched over. No compiled function reads them. What is learned they change only
where copies of a host environment wait for each other at a checkpoint, by which copy takes which step when."""

UNREAD = ("env", "env_kwargs", "preset", "seed", "async_collect", *KEEPING)
"""Options that no compiled function reads."""

# Partners in imagination that fit what the world model of WM-RND sees of actions.
_FITTING = {"own": ("implicit",), "joint": ("mirrored", "predicted"), "predicted": ("predicted", "mirrored")}


def _check_design(config: Config) -> None:
    """Refuse combinations of learner, partners, curiosity and objective that mean nothing, with the reason."""
    partners, projection = config.imagined_partners, config.projection
    if config.algo == "matwm":
        if partners == "mirrored":
            raise ConfigError(
                "imagined_partners=mirrored needs every agent's view in imagination, but each agent of matwm "
                "imagines its own alone; use predicted or implicit, or algo=wm_rnd"
            )
        if partners == "predicted" and not config.world_model.teammates:
            raise ConfigError(
                "imagined_partners=predicted needs the predictor that world_model.teammates=False removes"
            )
        if projection.coef > 0:
            raise ConfigError(
                "projection.coef > 0 adds a gradient through imagination to PPO's loss, but matwm has no PPO; "
                "use algo=wm_rnd (preset wm_rnd), or projection.coef=0"
            )
        return
    if config.precision != "float32" or config.devices != 1:
        raise ConfigError(
            f"precision and devices are options of algo=matwm; got {config.precision} and {config.devices}, use "
            "float32 and 1"
        )
    if config.async_collect:
        raise ConfigError("PPO learns from what its current policy did, so algo=wm_rnd has no async_collect")
    if config.partners.random_share > 0 or config.partners.past_share > 0 or config.warmup > 0:
        raise ConfigError(
            "PPO learns from its own actions only, so algo=wm_rnd needs partners.random_share, partners.past_share "
            f"and warmup to be 0, got {config.partners.random_share}, {config.partners.past_share} and "
            f"{config.warmup}; start from preset wm_rnd"
        )
    if config.world_model.latent == "change":
        raise ConfigError(
            "world_model.latent=change samples without a gradient, which self-projection needs; use categorical or auto"
        )
    fitting = _FITTING[projection.actions]
    if partners not in ("auto", *fitting):
        raise ConfigError(
            f"imagined_partners={partners} does not fit projection.actions={projection.actions}: "
            + {
                "own": "the world model does not see what the others do",
                "joint": "the world model needs to be told what the others do",
                "predicted": "the world model needs probabilities of what the others do",
            }[projection.actions]
            + f"; use {' or '.join(fitting)}"
        )
    if projection.coef == 0 and projection.schedule != "constant":
        raise ConfigError(
            f"projection.schedule={projection.schedule} changes the symmetry ratio of an imagined return, but with "
            "projection.coef=0 nothing is imagined; use constant, or a coef above 0"
        )
