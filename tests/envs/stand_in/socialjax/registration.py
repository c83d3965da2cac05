from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

REGISTERED_ENVS = ["coin_game", "one_agent"]


class Discrete:
    def __init__(self, n: int) -> None:
        self.n = n


class State(NamedTuple):
    inner_t: Any  # a Python number after `reset`, an array after `step`
    luck: jax.Array


class Game:
    """An agent is paid its action's number; observations are [agent, 11, 11, 2]: the step, and a number drawn at
    reset plus the agent's own number."""

    def __init__(self, agents: int = 2, num_inner_steps: int = 1000) -> None:
        self.agents = list(range(agents))
        self.num_inner_steps = num_inner_steps

    def action_space(self) -> Discrete:
        return Discrete(7)

    def _obs(self, state: State) -> jax.Array:
        own = state.luck + jnp.arange(len(self.agents))
        planes = jnp.stack([jnp.broadcast_to(state.inner_t, own.shape).astype(jnp.float32), own], axis=-1)
        return jnp.broadcast_to(planes[:, None, None], (len(self.agents), 11, 11, 2))

    def reset(self, key: jax.Array) -> tuple[jax.Array, State]:
        state = State(0, jax.random.uniform(key))
        return self._obs(state), state

    def step(self, key: jax.Array, state: State, actions: Any) -> tuple[Any, ...]:
        if isinstance(actions, dict):
            raise TypeError("actions must be a list or an array")
        now = State(state.inner_t + 1, state.luck)
        over = now.inner_t == self.num_inner_steps
        _, fresh = self.reset(key)
        now = jax.tree.map(lambda a, b: jnp.where(over, a, b), fresh, now)
        done = {**{str(agent): over for agent in self.agents}, "__all__": over}
        reward = jnp.asarray(actions, jnp.int16).squeeze()
        return self._obs(now), now, reward, done, {"shaped_rewards": reward}


def make(env_id: str, **kwargs: Any) -> Game:
    return Game(**{"agents": 1 if env_id == "one_agent" else 2, **kwargs})
