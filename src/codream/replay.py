"""Replay: one buffer per agent, stored as one ring of rows with a copy and an agent axis.

A row is one step of every copy of the environment. Sampling is exact and costs the same however full the ring is.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from codream.envs import EnvSpec, TimeStep
from codream.pieces import unrolled
from codream.world_model import Sequence

__all__ = ["Replay", "sample_recent", "sample_starts", "sequences", "unwritten", "written"]

BLOCK = 64
"""Weights in a block."""


def unwritten(spec: EnvSpec, rows: int, copies: int) -> dict[str, Any]:
    """Rows of what a step leaves behind, by name, with nothing in them yet. `mask` only where the game has one."""
    lead = (rows, copies, spec.num_agents)
    return {
        "obs": jnp.zeros((*lead, *spec.obs_shape), spec.obs_dtype),
        "mask": jnp.zeros((*lead, spec.max_actions), bool) if spec.has_mask else None,
        "action": jnp.zeros(lead, jnp.int32),
        "reward": jnp.zeros(lead),
        "terminal": jnp.zeros(lead, bool),
        "acting": jnp.zeros(lead, bool),
    }


def written(
    rows: Any, at: Int[Array, ""], here: TimeStep, action: Int[Array, "copies agents"], there: TimeStep
) -> dict[str, Any]:
    """`rows` (with the fields of `unwritten`) after the step from `here` by `action` to `there` in row `at`.

    Who takes no action leaves 0: no action, no reward, no end.
    """
    took = here.acting
    step = {
        "obs": here.obs,
        "mask": here.mask,
        "action": jnp.where(took, action, 0),
        "reward": jnp.where(took, there.reward, 0.0),
        "terminal": took & there.terminal,
        "acting": took,
    }
    return {
        name: None if (old := getattr(rows, name)) is None else old.at[at].set(jnp.asarray(new, old.dtype))
        for name, new in step.items()
    }


class Replay(eqx.Module):
    """Ring of the last `rows` steps of each copy. Row (next − 1) mod rows is the newest."""

    obs: Shaped[Array, "rows copies agents *shape"]
    mask: Bool[Array, "rows copies agents actions"] | None
    action: Int[Array, "rows copies agents"]
    reward: Float[Array, "rows copies agents"]
    terminal: Bool[Array, "rows copies agents"]
    acting: Bool[Array, "rows copies agents"]
    first: Bool[Array, "rows copies"]
    next: Int[Array, ""]
    filled: Int[Array, ""]

    @staticmethod
    def empty(spec: EnvSpec, rows: int, copies: int) -> Replay:
        return Replay(
            **unwritten(spec, rows, copies),
            first=jnp.zeros((rows, copies), bool),
            next=jnp.zeros((), jnp.int32),
            filled=jnp.zeros((), jnp.int32),
        )

    @property
    def rows(self) -> int:
        return self.obs.shape[0]

    def add(self, here: TimeStep, action: Int[Array, "copies agents"], there: TimeStep) -> Replay:
        """Store the step from `here` by `action` to `there`; at an episode's last step, its last observation."""
        return Replay(
            **written(self, self.next, here, action, there),
            first=self.first.at[self.next].set(jnp.asarray(here.first)),
            next=(self.next + 1) % self.rows,
            filled=jnp.minimum(self.filled + 1, self.rows),
        )

    def row_of(self, age: Int[Array, "*s"]) -> Int[Array, "*s"]:
        """Place in the ring of the row that is `age` rows older than the newest."""
        return (self.next - 1 - age) % self.rows


def _drawn(uniform: Float[Array, "*s"], weights: Float[Array, " n"]) -> Int[Array, "*s"]:
    """Indices with probability proportional to `weights`, by inverting their running sum: of blocks of blocks, of the
    blocks in one, of the weights in one of these (a running sum of all would take longer than everything else)."""
    levels = [weights]
    while len(levels[-1]) > 1:
        levels.append(jnp.sum(_blocks(levels[-1]), axis=1))
    rest = uniform * levels.pop()[0]
    place = jnp.zeros(uniform.shape, jnp.int32)
    for level in reversed(levels):
        running = jnp.cumsum(_blocks(level)[place], axis=-1)
        # The second condition: rounding may step past the last weight that is not zero.
        before = (running <= rest[..., None]) & (running < running[..., -1:])
        rest = jnp.maximum(rest - jnp.max(jnp.where(before, running, 0.0), axis=-1), 0.0)
        place = place * BLOCK + jnp.sum(before, axis=-1)
    return place


def _blocks(weights: Float[Array, " n"]) -> Float[Array, "blocks block"]:
    return jnp.pad(weights, (0, -len(weights) % BLOCK)).reshape(-1, BLOCK)


def sample_recent(
    replay: Replay, count: int, length: int, decay: float | Float[Array, ""], key: PRNGKeyArray
) -> tuple[Int[Array, " count"], Int[Array, " count"]]:
    """Windows of one agent: (age in rows of the first step, copy), without any overlap.

    Each is drawn with probability ∝ decay^(age in environment steps) among the windows that overlap none drawn
    before (every row is as many environment steps as there are copies).
    """
    copies = replay.first.shape[1]
    # Index = age of the window's last row; windows reach back `length` rows from there.
    ends = jnp.arange(replay.rows - length + 1)
    weight = jnp.maximum(jnp.asarray(decay, jnp.float32) ** (ends * copies), 1e-30)  # never lost to underflow
    weight = jnp.where(ends + length <= replay.filled, weight, 0.0)

    def draw(free: Bool[Array, "ends copies"], by: Float[Array, " two"]) -> tuple[Bool[Array, "ends copies"], tuple]:
        end = _drawn(by[0], weight * jnp.sum(free, axis=1))
        copy = _drawn(by[1], free[end].astype(jnp.float32))
        near = (jnp.abs(ends - end) < length)[:, None] & (jnp.arange(copies) == copy)
        return free & ~near, (end + length - 1, copy)

    free = jnp.ones((len(ends), copies), bool)
    # Random numbers of all draws at once: within a draw they would be kernels of their own.
    each = jax.vmap(jax.random.split)(jax.random.split(key, count))
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(each)
    _, (age, copy) = jax.lax.scan(draw, free, uniform, unroll=unrolled(count))
    return age, copy


def sample_starts(
    replay: Replay, agent: Int[Array, ""], count: int, key: PRNGKeyArray
) -> tuple[Int[Array, " count"], Int[Array, " count"]]:
    """Steps at which the agent acted, uniformly: (age in rows, copy)."""
    copies = replay.first.shape[1]
    ages = replay.row_of(jnp.arange(replay.rows))  # of every row: as far from the newest as the newest is from it
    acted = replay.acting[:, :, agent] & (ages < replay.filled)[:, None]
    flat = _drawn(jax.random.uniform(key, (count,)), acted.reshape(-1).astype(jnp.float32))
    return ages[flat // copies], flat % copies


def sequences(
    replay: Replay,
    age: Int[Array, " count"],
    copy: Int[Array, " count"],
    focal: Int[Array, " count"],
    length: int,
) -> Sequence:
    """Windows of `length` rows that begin `age` rows ago. Rows older than the oldest kept are marked `acting`
    false and belong to an episode of their own."""

    def one(age: Int[Array, ""], copy: Int[Array, ""], focal: Int[Array, ""]) -> Sequence:
        ages = age - jnp.arange(length)
        rows = replay.row_of(ages)
        kept = ages < replay.filled
        oldest = ages == replay.filled - 1
        acting = replay.acting[rows, copy] & kept[:, None]
        mask = jnp.ones((length, 0), bool) if replay.mask is None else replay.mask[rows, copy, focal]
        return Sequence(
            obs=replay.obs[rows, copy, focal],
            mask=mask,
            action=replay.action[rows, copy],
            reward=replay.reward[rows, copy, focal],
            terminal=replay.terminal[rows, copy, focal],
            acting=acting,
            first=(replay.first[rows, copy] & kept) | oldest,
            focal=focal,
        )

    return jax.vmap(one)(age, copy, focal)
