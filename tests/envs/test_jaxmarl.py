"""The graph adapter: time limits against true ends, corrections, masks, and mpe2's twin."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jaxmarl
import numpy as np
import pytest
from mpe2 import simple_tag_v3

from codream.envs import GraphEnv, TimeStep, is_graph, make_env
from codream.envs.jaxmarl import JaxMARLEnv
from codream.envs.registry import _resolve


def graph(name: Any, **kwargs: Any) -> GraphEnv:
    env = make_env(name, **kwargs)
    assert is_graph(env)
    return env


def rollout(env: GraphEnv, steps: int, copies: int = 4, seed: int = 0) -> tuple[Any, TimeStep]:
    """States and answers [copies, time, …] of random play, in one compiled scan."""

    def one(key: jax.Array) -> Any:
        key, start = jax.random.split(key)
        state, ts = env.reset(start)

        def body(carry: Any, key: jax.Array) -> Any:
            state, ts = carry
            choose, go = jax.random.split(key)
            noise = jnp.where(ts.mask, jax.random.uniform(choose, ts.mask.shape), -1.0)
            following = env.step(go, state, noise.argmax(-1))
            return following, following

        _, out = jax.lax.scan(body, (state, ts), jax.random.split(key, steps))
        return out

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), copies)))


def test_the_same_state_and_actions_give_mpe2s_transition() -> None:
    """Positions, rewards and the end of the episode, over 20 episodes of 25 injected states."""
    zoo = simple_tag_v3.parallel_env()
    host = make_env(zoo)
    twin = graph("jaxmarl:MPE_simple_tag_v3")
    assert host.spec.agents == twin.spec.agents
    assert host.spec.obs_shapes == twin.spec.obs_shapes
    assert host.spec.num_actions == twin.spec.num_actions
    world = zoo.unwrapped.world
    step = jax.jit(twin.step)
    fresh, _ = jax.jit(twin.reset)(jax.random.key(0))
    rng = np.random.default_rng(0)
    caught = 0
    for episode in range(20):
        host.reset(np.asarray([episode]))
        state = fresh
        for t in range(25):
            inner = state.inner.replace(
                p_pos=jnp.asarray([entity.state.p_pos for entity in world.entities], jnp.float32),
                p_vel=jnp.asarray([entity.state.p_vel for entity in world.entities], jnp.float32),
            )
            # Half of the time all run for the middle, so that there are touches to compare.
            toward = np.where(rng.random(4) < 0.5, [chase_middle(a.state.p_pos) for a in world.agents], 0)
            actions = np.where(toward > 0, toward, rng.integers(0, 5, 4))
            ts = host.step(actions[None], np.asarray([0]))
            state, twin_ts = step(jax.random.key(t), dataclasses.replace(state, inner=inner), jnp.asarray(actions))
            np.testing.assert_allclose(twin_ts.obs, ts.obs[0], atol=1e-5)
            np.testing.assert_allclose(twin_ts.reward, ts.reward[0], atol=1e-5)
            for field in ("terminal", "acting", "mask", "first", "last"):
                np.testing.assert_array_equal(getattr(twin_ts, field), getattr(ts, field)[0])
            caught += ts.reward[0, 0] > 0
        assert ts.last.all()
    assert caught >= 5


def chase_middle(position: np.ndarray) -> int:
    axis = int(np.argmax(np.abs(position)))
    return 1 + 2 * axis + int(position[axis] < 0)


def test_simple_tag_corrections() -> None:
    env = graph("jaxmarl:MPE_simple_tag_v3")
    states, ts = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 500))
    landmarks = np.abs(states.inner.p_pos[:, 4:])
    assert 0.88 < landmarks.max() <= 0.9
    assert np.abs(states.inner.p_pos[:, :4]).max() > 0.95
    np.testing.assert_allclose(ts.obs[:, 0, 4:6], states.inner.p_pos[:, 4] - states.inner.p_pos[:, 0], atol=1e-6)
    _, ts = rollout(env, 55)
    assert ts.reward.dtype == np.float32
    assert np.argwhere(ts.last[0]).ravel().tolist() == [24, 50]  # 25 steps, a reset, 25 steps
    assert not ts.terminal.any()
    _, ts = rollout(graph("jaxmarl:simple_tag", max_steps=7), 8)
    assert np.argwhere(ts.last[0]).ravel().tolist() == [6]
    with pytest.raises(ValueError, match=r"num_good_agents=2.*rewards and shapes are wrong.*mpe2:simple_tag_v3"):
        make_env("jaxmarl:MPE_simple_tag_v3", num_good_agents=2)


@pytest.mark.filterwarnings("ignore:OvercookedV2 is now released:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "obs_shape", "num_actions"),
    [
        ("coin_game", (36,), 5),
        ("overcooked", (4 * 5 * 26,), 6),
        ("storm_2p", (5 * 5 * 10 + 6,), 5),  # a grid, then the inventory
        ("MPE_simple_world_comm_v3", None, 20),  # its actions are continuous unless told otherwise
    ],
)
def test_spaces_become_vectors(name: str, obs_shape: tuple[int, ...] | None, num_actions: int) -> None:
    spec = graph(f"jaxmarl:{name}").spec
    assert all(agent.rpartition("_")[0] for agent in spec.agents)
    assert spec.max_actions == num_actions
    if obs_shape:
        assert spec.obs_shapes == (obs_shape,) * 2


def test_the_riddle_ends_truly_by_telling_and_else_by_the_clock() -> None:
    env = graph("jaxmarl:switch_riddle")
    state, _ = env.reset(jax.random.key(0))
    tell = jnp.full(env.spec.num_agents, env._env.game_actions["TELL"])  # type: ignore[attr-defined]
    _, ts = env.step(jax.random.key(1), state, tell)
    assert ts.last
    assert ts.terminal.all()
    step = jax.jit(env.step)
    wait = jnp.full(env.spec.num_agents, env._env.game_actions["NOTHING"])  # type: ignore[attr-defined]
    for t in range(200):
        state, ts = step(jax.random.key(t), state, wait)
        if ts.last:
            break
    assert ts.last
    assert not ts.terminal.any()


def test_smax_battles_end_truly_masks_hold_and_the_dead_wait() -> None:
    env = graph("smax_3m", max_steps=20)
    assert env.spec.name == "jaxmarl:smax_3m"
    assert env.spec.sides == {"ally": (0, 1, 2)}
    assert env.spec.has_mask
    states, ts = rollout(env, 50, copies=8)
    alive = states.inner.state.unit_alive
    decided = (~alive[..., :3].any(-1) | ~alive[..., 3:].any(-1)) & ~ts.first
    assert decided.any()
    assert (ts.last & ~decided).any()  # the clock
    np.testing.assert_array_equal(ts.last & decided, decided)
    np.testing.assert_array_equal(ts.terminal, np.repeat(decided[..., None], 3, -1))
    dead = ~alive[..., :3] & ts.acting
    assert dead.any()
    stop = np.arange(env.spec.max_actions) == 4
    assert (ts.mask[dead] == stop).all()


# ---------------------------------------------------------------------- objects and refusals


class Space:
    def __init__(self, n: int | None = None, high: float = 1.0) -> None:
        if n is not None:
            self.n = n
        self.high = high


class Discrete(Space):
    pass


class Painting:
    """As much of JaxMARL's interface as the adapter needs, with images within 0…1."""

    name = "painting"
    agents = ("left", "right")
    max_steps = 3
    shape = (32, 48, 3)

    def action_space(self, agent: str) -> Space:
        return Discrete(2)

    def observation_space(self, agent: str) -> Space:
        return Space()

    def get_obs(self, state: Any) -> dict[str, jax.Array]:
        image = jnp.full(self.shape, state["step"] / 10)
        return {"left": image, "right": image, "world_state": jnp.zeros(99)}

    def reset(self, key: jax.Array) -> Any:
        state = {"step": 0}  # a Python number, as some of JaxMARL's resets have
        return self.get_obs(state), state

    def step_env(self, key: jax.Array, state: Any, actions: Any) -> Any:
        state = {"step": state["step"] + 1}
        done = state["step"] >= self.max_steps
        dones = {"left": done, "right": done, "__all__": done}
        return self.get_obs(state), state, {"left": 1, "right": actions["right"]}, dones, {}


def test_images_of_the_graph_are_resized_bytes() -> None:
    env = graph(Painting())
    assert isinstance(env, JaxMARLEnv)
    assert env.spec.obs_shape == (64, 64, 3)
    _, ts = rollout(env, 5)
    assert ts.obs.dtype == np.uint8
    np.testing.assert_array_equal(ts.obs[0, :, 0, 0, 0, 0], [26, 51, 76, 0, 26])
    assert ts.last[0].tolist() == [False, False, True, False, False]


def test_what_the_graph_adapter_refuses() -> None:
    with pytest.raises(ValueError, match=r"agent_0 has the action space Box, but only Discrete"):
        make_env("jaxmarl:MPE_simple_spread_v3", action_type="Continuous")
    with pytest.raises(TypeError, match=r"keywords.*already made"):
        make_env(Painting(), max_steps=3)

    class Mixed(Painting):
        def get_obs(self, state: Any) -> Any:
            image = jnp.zeros(self.shape)
            return {agent: {"eye": image, "ear": jnp.zeros(2)} for agent in self.agents}

    with pytest.raises(ValueError, match="an image alone, or parts that can be flattened"):
        make_env(Mixed())


def test_one_step_of_a_scan_is_one_step_of_a_loop() -> None:
    env = graph("jaxmarl:MPE_simple_spread_v3")
    keys = jax.random.split(jax.random.key(3), 30)
    actions = jax.random.randint(jax.random.key(4), (30, env.spec.num_agents), 0, 5)
    start, _ = env.reset(jax.random.key(5))
    _, scanned = jax.jit(lambda: jax.lax.scan(lambda state, x: env.step(x[0], state, x[1]), start, (keys, actions)))()
    state, step = start, jax.jit(env.step)
    for t in range(30):
        state, ts = step(keys[t], state, actions[t])
        jax.tree.map(lambda one, many, t=t: np.testing.assert_allclose(one, many[t], atol=1e-5), ts, scanned)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")  # of storm itself
@pytest.mark.parametrize("name", ["storm", "HeuristicEnemySMAX", "coin_game"])
def test_raw_observations_are_read_however_the_environment_puts_them(name: str) -> None:
    """storm gives one dictionary of all agents' parts; SMAX an entry that is no agent's."""
    raw = jaxmarl.make(name)
    env, key = JaxMARLEnv(raw), jax.random.key(0)
    obs, _ = jax.jit(raw.reset)(key)
    _, here = jax.jit(env.reset)(key)
    np.testing.assert_allclose(env.encode(obs, first=True).obs[0], here.obs, atol=1e-6)
    assert env.decode(np.arange(len(raw.agents)), obs) == {agent: i for i, agent in enumerate(raw.agents)}


def test_raw_observations_that_are_none_of_the_environments_are_refused() -> None:
    """Padded or broadcast, they would be acted upon in silence."""
    env = graph("jaxmarl:coin_game")
    assert isinstance(env, JaxMARLEnv)
    right, one = np.zeros(env.spec.obs_shape), env._ids[0]
    for obs, infos, message in (
        (right[:-1], {}, r"observation of 0 in the shape \(36,\), got \(35,\)"),
        (np.where(np.arange(36) == 4, np.nan, right), {}, "observation of 0 is not finite: nan"),
        (right, {one: {"action_mask": True}}, r"action mask of 0 in the shape \(5,\), got \(\)"),
        (right, {one: {"action_mask": np.ones(1)}}, r"action mask of 0 in the shape \(5,\), got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            env.encode({one: obs}, infos)
    assert env.encode({one: right}, {one: {"action_mask": [0, 1, 0, 0, 1]}}).mask[0, 0].tolist() == [0, 1, 0, 0, 1]
    painting = graph(Painting())
    assert isinstance(painting, JaxMARLEnv)
    with pytest.raises(ValueError, match=r"observation of left in the shape \(32, 48, 3\), got \(48, 32, 3\)"):
        painting.encode({"left": np.zeros((48, 32, 3))})


@pytest.mark.filterwarnings("ignore:OvercookedV2 is now released:DeprecationWarning")
def test_names_without_their_version_and_layouts_by_name() -> None:
    for name in ("jaxmarl:MPE_simple_tag", "jaxmarl:simple_tag", "jaxmarl:MPE_simple_tag_v3"):
        assert _resolve(name) == ("jaxmarl", "MPE_simple_tag_v3")
    assert graph("jaxmarl:overcooked", layout="coord_ring").spec != graph("jaxmarl:overcooked").spec
