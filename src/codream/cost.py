"""Operations and bytes of MATWM's updates, derived from the configuration: what no implementation can do without.

Operations are those of matrix products (2 m n k each). Bytes are what has to pass through memory once: parameters and
optimiser, what the gradient needs of the forward pass (written, read), what attention remembers (read at every step).
`docs/performance.md` has the derivation in words. For vectors under the `categorical` code: the paper’s.
"""

from __future__ import annotations

import dataclasses

import jax

from codream.config import Config
from codream.envs import EnvSpec

__all__ = ["Cost", "per_step", "update_cost"]

# Adam reads a parameter, its gradient and two moments, and writes all but the gradient.
ADAM = 7
FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one part of an update."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, matrix_rate: float, memory_rate: float) -> float:
        """Seconds below which no device of these rates can do it: computing and moving may overlap."""
        return max(self.flops / matrix_rate, self.bytes / memory_rate)


def _mlp(into: float, out: float, units: float, layers: int) -> float:
    """Parameters of an MLP's products; a row costs twice as many operations."""
    return into * units + (layers - 1) * units**2 + units * out if layers else into * out


class _Sizes:
    """Parameters of each part, in the names of the paper."""

    def __init__(self, spec: EnvSpec, config: Config):
        m, a = config.world_model, config.agents
        if m.latent != "categorical" or spec.is_image:
            raise ValueError(f"expected vectors and world_model.latent=categorical, got {m.latent} of {spec.obs_shape}")
        self.z, self.classes = m.groups * m.classes, m.classes
        self.actions = sum(spec.num_actions) if m.scale_actions else spec.max_actions
        self.team = (spec.num_agents - 1) * spec.max_actions if m.teammates and spec.num_agents > 1 else 0
        self.s = self.z + m.hidden + self.team
        self.encoder_in = spec.obs_size * m.units
        before = max(m.encoder_layers - 1, 0)
        self.encoder = _mlp(spec.obs_size, m.units, m.units, before) + _mlp(m.units, self.z, m.units, 1)
        self.decoder = _mlp(self.z, spec.obs_size, m.units, m.encoder_layers)
        self.mixer = (self.z + self.actions) * m.hidden
        self.dynamics = _mlp(m.hidden, self.z, m.units, m.head_layers)
        sees = m.hidden + (self.z if m.outcome_sees_next else 0)
        self.outcome = _mlp(sees, m.reward_bins, m.units, m.head_layers) + _mlp(sees, 1, m.units, m.head_layers)
        self.mask = _mlp(self.z, spec.max_actions, m.units, m.head_layers) if spec.has_mask else 0
        self.team_in = (self.z + spec.num_agents) * m.team_hidden if self.team else 0
        self.team_out = m.team_hidden * self.team
        self.actor = _mlp(self.s, spec.max_actions, a.units, a.layers)
        self.critic = _mlp(self.s, a.value_bins, a.units, a.layers)
        # Outputs of the layers that read s.
        self.actor_first, self.critic_first = (a.units, a.units) if a.layers else (spec.max_actions, a.value_bins)


def _block(width: int, seen: float) -> float:
    """Operations of a transformer block on one token that may look at `seen` of them."""
    return 24 * width**2 + 4 * width * seen


def update_cost(spec: EnvSpec, config: Config, *, rows_summed: bool | None = None) -> dict[str, Cost]:
    """The cost of every part of one update. `config` is resolved for `spec`.

    Parts: `world model`; of it the `teammate predictor`; `context`, `imagination`, `actors and critics`, which are one
    update of all agents. `rows_summed`: the layers that read a latent as data sum rows of their weights instead of
    multiplying by zeros, as they do on a CPU (unset: whether this is one). Raises ValueError for images and
    `world_model.latent=change`.
    """
    rows_summed = jax.default_backend() == "cpu" if rows_summed is None else rows_summed
    z = _Sizes(spec, config)
    model, team = _world_model(spec, config, z)
    context = _context(spec, config, z, rows_summed)
    imagination = _imagination(spec, config, z, rows_summed)
    improvement = _improvement(spec, config, z, rows_summed)
    return {
        "world model": model,
        "teammate predictor": team,
        "context": context,
        "imagination": imagination,
        "actors and critics": improvement,
    }


def _world_model(spec: EnvSpec, config: Config, z: _Sizes) -> tuple[Cost, Cost]:
    m = config.world_model
    rows, length = m.batch * m.length, m.length
    blocks = m.layers * _block(m.hidden, length)
    led = (length - 1) / length  # the last row leads nowhere
    outcome = z.outcome * (led if m.outcome_sees_next else 1)
    dense = 2 * (z.encoder + z.decoder + z.mixer + z.dynamics * led + outcome + z.mask)
    team = (2 * (z.team_in + z.team_out) + m.team_layers * _block(m.team_hidden, length)) if z.team else 0.0
    # A gradient costs each product twice more, but none flows to what was observed, nor from team to the latents.
    team_flops = rows * (3 * team - 2 * z.team_in)
    flops = rows * (3 * (dense + blocks) - 2 * z.encoder_in + 2 * z.z * z.classes) + team_flops
    weights = dense / 2 + 12 * m.layers * m.hidden**2
    team_weights = z.team_in + z.team_out + 12 * m.team_layers * m.team_hidden**2 if z.team else 0
    kept = (
        (m.encoder_layers * 2 + 3 * m.head_layers + 1) * m.units
        + 4 * z.z  # latents, and logits of posterior, prior
        + m.layers * (9 * m.hidden + m.heads * length)
        + m.reward_bins
    )
    team_kept = m.team_layers * (9 * m.team_hidden + m.team_heads * length) + z.team if z.team else 0
    team_cost = Cost(team_flops, FLOAT * (rows * 2 * team_kept + (ADAM + 2) * team_weights))
    return Cost(flops, FLOAT * (rows * 2 * kept + (ADAM + 2) * weights) + team_cost.bytes), team_cost


def _reads_z(outputs: float, z: _Sizes, rows_summed: bool) -> float:
    """Operations of a layer's product with z."""
    return 0.0 if rows_summed else 2 * z.z * outputs


def _context(spec: EnvSpec, config: Config, z: _Sizes, rows_summed: bool) -> Cost:
    m, a = config.world_model, config.agents
    trajectories, before = spec.num_agents * (a.starts or 0), a.context - 1

    def read(width: int, layers: int) -> float:
        """Of the last block only the last token goes past its keys and values."""
        whole = (layers - 1) * before * _block(width, before)
        return whole + 6 * width**2 * before + 18 * width**2 + 4 * width * before

    mixer = _reads_z(m.hidden, z, rows_summed) + (0.0 if rows_summed else 2 * z.actions * m.hidden)
    flops = a.context * 2 * (z.encoder + z.z * z.classes) + before * mixer + read(m.hidden, m.layers)
    kept = 2 * m.layers * m.hidden
    if z.team:
        mixer = _reads_z(m.team_hidden, z, rows_summed) + (0.0 if rows_summed else 2 * spec.num_agents * m.team_hidden)
        flops += before * mixer + read(m.team_hidden, m.team_layers)
        kept += 2 * m.team_layers * m.team_hidden
    return Cost(trajectories * flops, FLOAT * trajectories * before * kept)


def _imagination(spec: EnvSpec, config: Config, z: _Sizes, rows_summed: bool) -> Cost:
    m, a = config.world_model, config.agents
    horizon, trajectories = a.horizon or 0, spec.num_agents * (a.starts or 0)
    # Attention reads all the memory there is room for.
    seen = a.context - 1 + horizon
    blocks = m.layers * _block(m.hidden, seen)
    mixer = _reads_z(m.hidden, z, rows_summed) + (0.0 if rows_summed else 2 * z.actions * m.hidden)
    actor = 2 * (z.actor - z.z * z.actor_first) + _reads_z(z.actor_first, z, rows_summed)
    outcome = 2 * z.outcome
    if m.outcome_sees_next and rows_summed:
        outcome -= 2 * 2 * z.z * (m.units if m.head_layers else (m.reward_bins + 1) / 2)
    reads_mask = (z.z * m.units if m.head_layers else z.mask) if z.mask else 0
    mask = 2 * (z.mask - reads_mask if rows_summed else z.mask)
    sampling = 2 * z.z * z.classes + 2 * spec.max_actions**2
    step = mixer + blocks + 2 * z.dynamics + outcome + mask + actor + sampling
    remembered, features = 2 * m.layers * m.hidden, z.s - z.z
    team = 0.0
    if z.team:
        team = _reads_z(m.team_hidden, z, rows_summed) + (0.0 if rows_summed else 2 * spec.num_agents * m.team_hidden)
        team += m.team_layers * _block(m.team_hidden, seen + 1) + 2 * z.team_out
        remembered += 2 * m.team_layers * m.team_hidden
    flops = trajectories * (horizon * step + (horizon + 1) * team)
    # What is remembered grows by one step at a time.
    reads = sum(a.context - 1 + t + 1 for t in range(horizon)) * remembered
    codes = m.groups  # one byte each
    moved = FLOAT * (reads + (horizon + 1) * features) + (horizon + 1) * codes
    return Cost(flops, trajectories * moved)


def _improvement(spec: EnvSpec, config: Config, z: _Sizes, rows_summed: bool) -> Cost:
    a = config.agents
    horizon, trajectories = a.horizon or 0, spec.num_agents * (a.starts or 0)

    def spared(first: int) -> int:
        return 2 * z.z * first if rows_summed else 0

    def learn(parameters: float, first: int) -> float:
        # s is data: no gradient flows to it.
        return 3 * 2 * parameters - 2 * z.s * first - spared(first)

    critics = (horizon + 1) * learn(z.critic, z.critic_first) + horizon * (2 * z.critic - spared(z.critic_first))
    each = critics + horizon * learn(z.actor, z.actor_first)
    kept = 2 * a.layers * 3 * a.units + 2 * a.value_bins
    features = FLOAT * (z.s - z.z) + config.world_model.groups
    moved = (horizon + 1) * (2 * features + FLOAT * 2 * kept)
    weights = spec.num_agents * ((ADAM + 2) * (z.critic + z.actor) + 3 * z.critic)
    return Cost(trajectories * each, trajectories * moved + FLOAT * weights)


def per_step(cost: dict[str, Cost], config: Config) -> Cost:
    """Of one environment step with all the updates that it buys."""
    agents = cost["context"] + cost["imagination"] + cost["actors and critics"]
    model = cost["world model"]
    return Cost(
        model.flops / config.world_model_every + agents.flops / config.agents_every,
        model.bytes / config.world_model_every + agents.bytes / config.agents_every,
    )
