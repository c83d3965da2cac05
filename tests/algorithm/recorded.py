"""Play that was recorded with what the agents remembered."""

import equinox as eqx
import jax
from probe_envs import Mixed
from tiny import tiny

from codream import matwm


class Game:
    """Some recorded play of `Mixed`, or of another environment of its spec, through `matwm.act`: what tests of
    imagination and updates start from."""

    rows, copies = 24, 2

    def __init__(self, env=None):
        self.env = env or Mixed()
        self.config = tiny(
            self.env.spec,
            world_model={"latent": "change", "reward_bins": 31},
            agents={"context": 8, "horizon": 3, "starts": 4},
        )
        init = eqx.filter_jit(matwm.init)
        self.fresh = init(jax.random.key(0), self.env.spec, self.config)
        self.state, self.heres, self.memories = self._play(self.fresh)

    def _play(self, state):
        """The state after `rows` steps, and for every step what was seen and remembered *before* it."""
        env, config, copies = self.env, self.config, self.copies
        params, static = eqx.partition(state, eqx.is_array)

        def body(carry, key):
            params, memory, env_state, here = carry
            act_key, env_key = jax.random.split(key)
            state = eqx.combine(params, static)
            action, after = matwm.act(state, memory, here, act_key, config)
            env_state, there = jax.vmap(env.step)(jax.random.split(env_key, copies), env_state, action)
            state = matwm.observe(state, here, action, there)
            return (eqx.filter(state, eqx.is_array), after, env_state, there), (here, memory)

        @eqx.filter_jit
        def run(params, memory):
            env_state, here = jax.vmap(env.reset)(jax.random.split(jax.random.key(1), copies))
            keys = jax.random.split(jax.random.key(2), self.rows)
            (params, *_), recorded = jax.lax.scan(body, (params, memory, env_state, here), keys)
            return params, recorded

        params, (heres, memories) = run(params, matwm.init_memory(state, copies, config))
        return eqx.combine(params, static), heres, memories
