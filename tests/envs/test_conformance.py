"""What every environment must keep to, whatever it is made of."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import toys

from codream.envs import EnvSpec, GraphEnv, HostEnv, TimeStep, is_graph, make_env

COPIES = 3


class Host:
    def __init__(self, env: HostEnv) -> None:
        self.env, self.spec = env, env.spec

    def reset(self, seed: int) -> TimeStep:
        self.seeds = np.arange(seed, seed + COPIES)
        return self.env.reset(self.seeds)

    def step(self, actions: np.ndarray) -> TimeStep:
        return self.env.step(actions, self.seeds + 1000)


class Graph:
    def __init__(self, env: GraphEnv) -> None:
        self.env, self.spec = env, env.spec
        self._reset = jax.jit(jax.vmap(env.reset))
        self._step = jax.jit(jax.vmap(env.step))

    def reset(self, seed: int) -> TimeStep:
        self.key = jax.random.key(seed)
        self.state, timestep = self._reset(jax.random.split(self.key, COPIES))
        return jax.tree.map(np.asarray, timestep)

    def step(self, actions: np.ndarray) -> TimeStep:
        self.key = jax.random.fold_in(self.key, 1)
        keys = jax.random.split(self.key, COPIES)
        self.state, timestep = self._step(keys, self.state, jax.numpy.asarray(actions, int))
        return jax.tree.map(np.asarray, timestep)


@dataclasses.dataclass(frozen=True)
class Kind:
    name: str
    make: Callable[[], Any]
    steps: int  # enough to see an episode end
    terminal: bool = False  # episodes come to a true end, and not only to a time limit
    seeded: bool = True  # two seeds give different first observations
    repeats: bool = True  # one seed gives one episode, whatever was played before
    filters: tuple[str, ...] = ()

    def driver(self) -> Host | Graph:
        env = self.make()
        return Graph(env) if is_graph(env) else Host(env)


def host(name: str, steps: int, seeded: bool = True, repeats: bool = True, **kwargs: Any) -> Kind:
    return Kind(name, lambda: make_env(name, num_envs=COPIES, **kwargs), steps, False, seeded, repeats)


def toy(kind: type[toys.Toy], terminal: bool = False, seeded: bool = True) -> Kind:
    return Kind(kind.__name__, lambda: make_env(kind, num_envs=COPIES), 13, terminal, seeded)


def graph(name: str, steps: int, *filters: str, terminal: bool = False, **kwargs: Any) -> Kind:
    return Kind(name, lambda: make_env(name, **kwargs), steps, terminal, filters=filters)


KINDS = [
    host("mpe2:simple_tag_v3", 30),
    host("mpe2:simple_spread_v3", 30),
    host("mpe2:simple_speaker_listener_v4", 30),
    host("mpe2:simple_world_comm_v3", 30),
    host("butterfly:cooperative_pong_v6", 9, seeded=False, max_cycles=6),  # the ball starts in the middle
    host("butterfly:knights_archers_zombies_v11", 14, seeded=False, repeats=False, max_cycles=10),
    toy(toys.Toy),
    toy(toys.IntegerToy, terminal=True, seeded=False),
    toy(toys.MaskToy),
    toy(toys.InfoMaskToy),
    toy(toys.EarlyToy, terminal=True),
    toy(toys.KeepsFinishedToy, terminal=True),
    toy(toys.UnequalToy),
    toy(toys.ImageToy, seeded=False),
    graph("jaxmarl:MPE_simple_tag_v3", 30),
    graph("jaxmarl:MPE_simple_speaker_listener_v4", 30),
    graph("jaxmarl:coin_game", 14, num_inner_steps=10, num_outer_steps=1),
    graph("jaxmarl:switch_riddle", 20, terminal=True),
    graph("jaxmarl:overcooked", 14, "ignore:OvercookedV2 is now released:DeprecationWarning", max_steps=10),
    graph("jaxmarl:storm_2p", 8, num_inner_steps=6),
    graph("jaxmarl:smax_3m", 60, terminal=True),
]


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, id=k.name, marks=[pytest.mark.filterwarnings(text) for text in k.filters]) for k in KINDS],
)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def play(driver: Host | Graph, seed: int, steps: int) -> tuple[list[TimeStep], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    timesteps, actions = [driver.reset(seed)], []
    for _ in range(steps):
        mask = timesteps[-1].mask
        actions.append(np.where(mask, rng.random(mask.shape), -1.0).argmax(-1))
        timesteps.append(driver.step(actions[-1]))
    return timesteps, actions


@pytest.fixture(scope="module")
def episode(kind: Kind) -> tuple[Kind, Host | Graph, list[TimeStep]]:
    driver = kind.driver()
    return kind, driver, play(driver, 5, kind.steps)[0]


def test_shapes_and_dtypes_are_those_of_the_spec(episode: Any) -> None:
    _, driver, timesteps = episode
    spec: EnvSpec = driver.spec
    agents = (COPIES, spec.num_agents)
    for ts in timesteps:
        assert ts.obs.shape == (*agents, *spec.obs_shape)
        assert ts.obs.dtype == spec.obs_dtype
        assert ts.mask.shape == (*agents, spec.max_actions)
        assert ts.mask.dtype == bool
        assert ts.reward.shape == agents
        assert ts.reward.dtype == np.float32
        for flags, shape in (
            (ts.terminal, agents),
            (ts.acting, agents),
            (ts.first, agents[:1]),
            (ts.last, agents[:1]),
        ):
            assert flags.shape == shape
            assert flags.dtype == bool
        assert np.isfinite(ts.obs).all()
        assert np.isfinite(ts.reward).all()


def test_an_episode_starts_ends_and_starts_again(episode: Any) -> None:
    _, _, timesteps = episode
    assert timesteps[0].first.all()
    for before, now in zip([None, *timesteps[:-1]], timesteps, strict=True):
        if before is not None:
            np.testing.assert_array_equal(now.first, before.last)
        assert not (now.first & now.last).any()
        assert not now.reward[now.first].any()
        assert not now.terminal[now.first].any()
        assert not now.acting[now.last].any()
        assert now.acting[~now.last].any(axis=1).all()
    assert sum(ts.last.sum() for ts in timesteps) >= COPIES, "the test has seen no episode end"
    assert any(ts.first.any() for ts in timesteps[1:]), "the test has seen no second episode"


def test_only_agents_that_acted_are_rewarded_and_ended(episode: Any) -> None:
    _, _, timesteps = episode
    for before, now in itertools.pairwise(timesteps):
        assert not now.reward[~before.acting].any()
        assert not now.terminal[~before.acting].any()
        assert not (now.terminal & now.acting).any()
        absent = ~before.acting & ~now.acting
        assert not now.obs[absent].any()


def test_time_limits_are_not_terminal(episode: Any) -> None:
    kind, _, timesteps = episode
    assert any(ts.terminal.any() for ts in timesteps) == kind.terminal


def test_masks_and_padding(episode: Any) -> None:
    _, driver, timesteps = episode
    spec: EnvSpec = driver.spec
    for ts in timesteps:
        assert not (ts.mask & ~spec.action_valid).any()
        assert ts.mask.any(axis=-1).all()
        assert not ts.obs.reshape(COPIES, spec.num_agents, -1)[:, ~spec.obs_valid].any()
        if not spec.has_mask:
            assert (ts.mask == spec.action_valid).all()
        assert (ts.mask == spec.action_valid)[~ts.acting].all()
    if spec.has_mask:
        assert any((ts.mask != spec.action_valid).any() for ts in timesteps)


def test_seeds_decide_everything(episode: Any) -> None:
    kind, driver, timesteps = episode
    again, _ = play(driver, 5, kind.steps)
    if kind.repeats:
        for one, other in zip(timesteps, again, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)
    if kind.seeded:
        assert (driver.reset(6).obs != timesteps[0].obs).any()


def test_answers_are_not_overwritten_by_later_ones(episode: Any) -> None:
    _, driver, _ = episode
    before = driver.reset(5)
    kept = jax.tree.map(np.copy, before)
    driver.step(np.zeros((COPIES, driver.spec.num_agents), int))
    jax.tree.map(np.testing.assert_array_equal, before, kept)


def test_which_protocol_an_environment_keeps_to() -> None:
    one, many = make_env("jaxmarl:coin_game"), make_env(toys.Toy, num_envs=2)
    assert is_graph(one)
    assert isinstance(one, GraphEnv)
    assert not is_graph(many)
    assert isinstance(many, HostEnv)
    assert make_env(one) is one
    assert make_env(many) is many
    with pytest.raises(ValueError, match=r"has 2 copies, but num_envs=3 .*; leave num_envs out"):
        make_env(many, num_envs=3)
