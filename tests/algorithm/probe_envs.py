"""Probe environments: pure JAX games for two and more agents whose right answers are known on paper."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from codream.envs import EnvSpec, TimeStep


class ProbeState(eqx.Module):
    step: Int[Array, ""]
    cue: Int[Array, ""]  # drawn anew at every step
    before: Int[Array, ""]  # the cue of the step before
    last: Bool[Array, ""]


class Probe:
    """Episodes of `length` steps, each of which also ends with probability `stop`.

    The end is terminal for the agents in `terminal` and a time limit for the rest.
    Subclasses say what is seen (`look`) and what is paid (`pay`).
    """

    cues = 2

    def __init__(
        self,
        agents: tuple[str, ...],
        obs_sizes: tuple[int, ...],
        num_actions: tuple[int, ...],
        length: int,
        *,
        stop: float = 0.0,
        terminal: tuple[int, ...] = (),
        has_mask: bool = False,
    ):
        self.spec = EnvSpec(type(self).__name__, agents, tuple((size,) for size in obs_sizes), num_actions, has_mask)
        self.length, self.stop = length, stop
        self.terminal = np.isin(np.arange(len(agents)), terminal)

    def look(self, state: ProbeState) -> Float[Array, "agents size"]:
        raise NotImplementedError

    def pay(self, state: ProbeState, actions: Int[Array, " agents"]) -> Float[Array, " agents"]:
        raise NotImplementedError

    def playing(self, state: ProbeState) -> Bool[Array, " agents"]:
        """Agents that have not finished."""
        return jnp.ones(self.spec.num_agents, bool)

    def allowed(self, state: ProbeState) -> Bool[Array, "agents actions"]:
        return jnp.asarray(self.spec.action_valid)

    def _answer(self, state: ProbeState, reward: Array, terminal: Array, first: Any) -> TimeStep:
        return TimeStep(
            obs=self.look(state).astype(jnp.float32),
            mask=self.allowed(state),
            reward=reward.astype(jnp.float32),
            terminal=terminal,
            acting=self.playing(state) & ~state.last,
            first=jnp.asarray(first),
            last=state.last,
        )

    def reset(self, key: PRNGKeyArray) -> tuple[ProbeState, TimeStep]:
        cue = jax.random.randint(key, (), 0, self.cues)
        state = ProbeState(jnp.asarray(0), cue, jnp.asarray(0), jnp.asarray(False))
        none = jnp.zeros(self.spec.num_agents)
        return state, self._answer(state, none, none.astype(bool), True)

    def step(self, key: PRNGKeyArray, state: ProbeState, actions: Int[Array, " agents"]) -> tuple[ProbeState, TimeStep]:
        def advance() -> tuple[ProbeState, TimeStep]:
            cue_key, stop_key = jax.random.split(key)
            was = self.playing(state)
            last = (state.step + 1 >= self.length) | (jax.random.uniform(stop_key) < self.stop)
            cue = jax.random.randint(cue_key, (), 0, self.cues)
            after = ProbeState(state.step + 1, cue, state.cue, last)
            finished = was & ~self.playing(after)
            terminal = finished | (was & last & jnp.asarray(self.terminal))
            return after, self._answer(after, jnp.where(was, self.pay(state, actions), 0.0), terminal, False)

        return jax.lax.cond(state.last, lambda: self.reset(key), advance)


class ConstantReward(Probe):
    """Reward 1 at every step; every step ends the episode with probability `stop`.

    v = 1 / (1 − γ) where the end is a time limit; v = 1 / (1 − γ (1 − stop)) where it is terminal.
    """

    def __init__(self, agents: int = 2, stop: float = 0.25, terminal: tuple[int, ...] = (0,)):
        names = tuple(f"agent_{i}" for i in range(agents))
        super().__init__(names, (1,) * agents, (2,) * agents, 1_000, stop=stop, terminal=terminal)

    def look(self, state: ProbeState) -> Float[Array, "agents size"]:
        return jnp.ones((self.spec.num_agents, 1))

    def pay(self, state: ProbeState, actions: Int[Array, " agents"]) -> Float[Array, " agents"]:
        return jnp.ones(self.spec.num_agents)


class OtherActs(Probe):
    """The follower is paid for doing what the leader does at the same moment.

    Both see two signs; the leader, paid for showing whether they differ, also sees the answer. A linear actor
    cannot tell from two signs whether they differ: it can follow only by way of p̂.
    """

    cues = 4

    def __init__(self) -> None:
        super().__init__(("follower", "leader"), (2, 3), (2, 2), 8)

    @staticmethod
    def shown(cue: Int[Array, ""]) -> Float[Array, "2 3"]:
        """What both see. The two signs are small, so that they draw an actor no more than p̂ does."""
        left, right, differ = cue // 2, cue % 2, (cue // 2) ^ (cue % 2)
        row = jnp.array([0.3, 0.3, 1.0]) * (2.0 * jnp.stack([left, right, differ]) - 1)
        return jnp.stack([row.at[2].set(0.0), row])

    def look(self, state: ProbeState) -> Float[Array, "agents size"]:
        return self.shown(state.cue)

    def pay(self, state: ProbeState, actions: Int[Array, " agents"]) -> Float[Array, " agents"]:
        differ = (state.cue // 2) ^ (state.cue % 2)
        return jnp.stack([actions[0] == actions[1], actions[1] == differ]).astype(jnp.float32)


class Recall(Probe):
    """A cue is seen at even steps; at odd ones it is hidden, and repeating it pays 1. Best 4, by chance 2."""

    def __init__(self) -> None:
        super().__init__(("agent_0", "agent_1"), (2, 2), (2, 2), 8)

    def look(self, state: ProbeState) -> Float[Array, "agents size"]:
        shown = state.step % 2 == 0
        row = jnp.stack([jnp.where(shown, 2 * state.cue - 1, 0), shown])
        return jnp.broadcast_to(row, (2, 2))

    def pay(self, state: ProbeState, actions: Int[Array, " agents"]) -> Float[Array, " agents"]:
        return jnp.where(state.step % 2 == 1, (actions == state.before).astype(jnp.float32), 0.0)


class Mixed(Probe):
    """Three agents that differ in all: lengths of observations, action counts, masks; one finishes early."""

    cues = 3

    def __init__(self) -> None:
        super().__init__(
            ("hunter_0", "hunter_1", "prey_0"),
            (3, 2, 4),
            (3, 2, 4),
            5,
            stop=0.1,
            terminal=(1,),
            has_mask=True,
        )

    def look(self, state: ProbeState) -> Float[Array, "agents size"]:
        row = jnp.stack([state.cue, state.step, state.before, state.cue * state.step]).astype(jnp.float32)
        return jnp.where(jnp.asarray(self.spec.obs_valid), row, 0.0)

    def pay(self, state: ProbeState, actions: Int[Array, " agents"]) -> Float[Array, " agents"]:
        return (actions + jnp.roll(actions, 1) + state.cue).astype(jnp.float32)

    def playing(self, state: ProbeState) -> Bool[Array, " agents"]:
        return (jnp.arange(3) < 2) | (state.step < 3)

    def allowed(self, state: ProbeState) -> Bool[Array, "agents actions"]:
        """The cue's action is forbidden to all who have it."""
        return jnp.asarray(self.spec.action_valid) & (jnp.arange(4) != state.cue)


def play(
    env: Probe, actions: Int[Array, "time agents"], key: PRNGKeyArray
) -> tuple[TimeStep, Int[Array, "time agents"]]:
    """The answers to those actions, with a leading time axis; the first is that of `reset`."""
    state, here = env.reset(key)

    def body(carry: tuple, xs: tuple) -> tuple:
        state, here = carry
        key, action = xs
        return env.step(key, state, action), here

    keys = jax.random.split(key, len(actions))
    _, heres = jax.lax.scan(body, (state, here), (keys, actions))
    return heres, actions
