"""Whatever comes in, it works or is refused with the reason: configurations, environments, command lines, files.

Fast: everything is traced, nothing compiled (an update is a valid program of the right shapes). `-m slow` also takes
updates. benchmarks/fuzz_readers.py goes on with the files for as long as one likes.
"""

import dataclasses
import json
import math
from operator import attrgetter
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from helpers import ppo_config, replaced, tiny_config, wm_rnd_config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from codream import Config, ConfigError, EnvironmentFailure, EnvSpec, RunError, UnknownEnvironment, cli, make_env
from codream.checkpoint import CheckpointError
from codream.envs import TimeStep
from codream.ranges import LARGEST, RANGES
from codream.training import GraphDriver

# Shrinking would trace for minutes.
LENIENT: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate),
}


class Game:
    """An in-graph game of any shape that pays at random."""

    def __init__(self, sizes: tuple[int, ...], actions: tuple[int, ...], has_mask: bool = False, scale: float = 1.0):
        names = tuple(f"agent_{i}" for i in range(len(sizes)))
        self.spec = EnvSpec("game", names, tuple((size,) for size in sizes), actions, has_mask)
        self.scale = scale

    def reset(self, key: Any) -> tuple[Any, TimeStep]:
        return self._answer(key, jnp.asarray(0), True)

    def step(self, key: Any, state: Any, actions: Any) -> tuple[Any, TimeStep]:
        del actions
        return jax.lax.cond(
            state == 5, lambda: self.reset(key), lambda: self._answer(key, jnp.asarray(state + 1), False)
        )

    def _answer(self, key: Any, taken: Any, first: bool) -> tuple[Any, TimeStep]:
        spec, one = self.spec, jnp.ones(self.spec.num_agents, bool)
        obs = self.scale * jax.random.normal(key, (spec.num_agents, spec.obs_size)) * spec.obs_valid
        reward = jax.random.normal(key, (spec.num_agents,))
        mask = jnp.asarray(spec.action_valid)
        return taken, TimeStep(obs, mask, reward, ~one, one & (taken < 5), jnp.asarray(first), taken == 5)


SMALL = Game((2, 3), (2, 3))


def traced(config: Config, game: Game = SMALL) -> None:
    """Build a state and trace a step with all updates; ConfigError if the configuration is refused."""
    driver = GraphDriver(game, config.resolve(game.spec), chunk=1)
    runner = driver.template()
    after, metrics = eqx.filter_eval_shape(driver.step, runner)
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]  # noqa: E731
    assert shapes(after) == shapes(runner)
    assert metrics.numbers.shape == (len(metrics), 2)


def updated(config: Config, game: Game = SMALL) -> None:
    """Take updates, and find the numbers finite."""
    driver = GraphDriver(game, config.resolve(game.spec), chunk=8)
    runner = driver.start(jax.random.key(0))
    for _ in range(4):
        runner, metrics = driver.advance(runner)
    jax.clear_caches()  # a process may not hold the programs of all examples
    bad = [name for name, (total, _) in metrics.items() if not np.isfinite(total)]
    assert not bad, bad


BASES = {
    "matwm": tiny_config(num_envs=2, warmup=0, world_model_every=4.0, agents_every=4.0),
    "wm_rnd": wm_rnd_config(),
    "ippo": ppo_config(),
}
# No border of a range, but too much to hold or to trace in a test.
MODEST = {
    "layers": 3,
    "num_envs": 8,
    "minibatches": 4,
    "epochs": 2,
    "horizon": 8,
    "context": 8,
    "groups": 8,
    "past_kept": 3,
}
MODEST |= {"imagination_steps": 5, "classes": 8, "change_bins": 17, "reward_bins": 17, "value_bins": 17, "length": 9}


def borders(path: str) -> list[Any]:
    """Values of an option at the borders of its range, and just outside."""
    low, high = RANGES[path]
    now = attrgetter(path)(Config())
    whole = isinstance(now, int) or path in ("agents.horizon", "agents.starts")
    top = MODEST.get(path.rpartition(".")[2].replace("encoder_", "").replace("head_", "").replace("team_", ""), high)
    values = [low, top, (high or LARGEST) + 1] if whole else [float(low or 0), high, math.nan, math.inf]
    values = [value for value in values if value is not None]
    return [(value,) for value in values] if isinstance(now, tuple) else values


OPTIONS = st.dictionaries(st.sampled_from(sorted(RANGES)), st.integers(0, 3), max_size=4)
SWITCHES = {
    "world_model.teammates": st.booleans(),
    "world_model.scale_actions": st.booleans(),
    "world_model.outcome_sees_next": st.booleans(),
    "world_model.latent": st.sampled_from(["auto", "categorical", "change"]),
    "world_model.latent_gradient": st.sampled_from(["straight_through", "gumbel"]),
    "replay.uniform": st.booleans(),
    "common_reward": st.booleans(),
    "imagined_partners": st.sampled_from(["auto", "implicit", "predicted", "mirrored"]),
    "curiosity.kind": st.sampled_from(["none", "rnd"]),
    "curiosity.sharing": st.sampled_from(["shared", "individual", "hybrid"]),
    "projection.gradient": st.sampled_from(["straight_through", "reinforce"]),
    "projection.actions": st.sampled_from(["joint", "own", "predicted"]),
    "projection.view": st.sampled_from(["each", "focal"]),
    "projection.schedule": st.sampled_from(["constant", "linear", "cosine"]),
}


@st.composite
def configurations(draw: Any) -> tuple[str, dict[str, Any]]:
    """The name of a base, and changes to it."""
    changes = {path: (borders(path) * 4)[which] for path, which in draw(OPTIONS).items()}
    for path in draw(st.lists(st.sampled_from(sorted(SWITCHES)), max_size=3, unique=True)):
        changes[path] = draw(SWITCHES[path])
    return draw(st.sampled_from(sorted(BASES))), changes


def refused(err: BaseException, *words: str) -> None:
    """The refusal says something, and all of these words."""
    text = str(err)
    assert any(char.isalpha() for char in text)
    assert all(word in text for word in words), text


def try_configuration(base: str, changes: dict[str, Any], attempt: Any) -> None:
    try:
        attempt(replaced(BASES[base], changes))
    except ConfigError as err:
        refused(err)


@settings(max_examples=8, **LENIENT)
@given(configurations())
def test_configurations_are_traced_or_refused(given: tuple[str, dict[str, Any]]) -> None:
    try_configuration(*given, traced)


@pytest.mark.slow
@pytest.mark.parametrize("path", RANGES)
def test_every_option_at_its_borders_is_traced_or_refused(path: str) -> None:
    algo = "wm_rnd" if path.partition(".")[0] in ("ppo", "projection", "curiosity") else "matwm"
    for value in borders(path):
        try_configuration(algo, {path: value}, traced)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@settings(max_examples=40, **LENIENT)
@given(configurations())
def test_configurations_take_updates_or_are_refused(given: tuple[str, dict[str, Any]]) -> None:
    base, changes = given
    # Weights of 1e9 and learning rates of 1 are within their ranges, and what they do to numbers is for `on_nan`.
    finite = {path: value for path, value in changes.items() if not (isinstance(value, float) and value >= 1)}
    try_configuration(base, finite, updated)


# ------------------------------------------------------------------------------------------ environments


DTYPES = ("float64", "float32", "float16", "int64", "int8", "uint8", "bool")


class Any_:
    """A host environment whose agents see what `spec` says: (dtype, size, magnitude) of each."""

    metadata: ClassVar[dict[str, Any]] = {"name": "any"}
    unwrapped = property(lambda self: self)

    def __init__(self, seen: list[tuple[str, int, float]], actions: list[int]):
        self.seen, self.actions = seen, actions
        self.possible_agents = [f"agent_{i}" for i in range(len(seen))]
        self.agents: list[str] = []

    def observation_space(self, agent: str) -> spaces.Space:
        dtype, size, _ = self.seen[self.possible_agents.index(agent)]
        low, high = (-np.inf, np.inf) if dtype.startswith("float") else (0, 1)
        return spaces.Box(low, high, (size,), np.dtype(dtype).type)

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete(self.actions[self.possible_agents.index(agent)])

    def _look(self) -> dict[str, Any]:
        with np.errstate(over="ignore"):
            return {
                agent: np.full(size, magnitude if dtype.startswith("float") else 1).astype(dtype)
                for agent, (dtype, size, magnitude) in zip(self.possible_agents, self.seen, strict=True)
            }

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        del seed, options
        self.agents = list(self.possible_agents)
        return self._look(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        no = dict.fromkeys(self.agents, False)
        return self._look(), dict.fromkeys(self.agents, 1e30), no, no, {}

    def close(self) -> None:
        pass


SIGHT = st.tuples(
    st.sampled_from(DTYPES), st.integers(1, 40), st.sampled_from([0.0, 1.0, -1e-30, 1e-300, 1e4, 1e30, -3e38, 1e300])
)


@settings(max_examples=60, **LENIENT)
@given(st.lists(st.tuples(SIGHT, st.integers(1, 9)), min_size=1, max_size=20), st.integers(1, 3))
def test_environments_of_any_shape(agents: list[tuple[tuple[str, int, float], int]], copies: int) -> None:
    seen, actions = [sight for sight, _ in agents], [number for _, number in agents]
    host = make_env(lambda: Any_(seen, actions), num_envs=copies)
    assert host.spec.num_actions == tuple(actions)
    with np.errstate(over="ignore"):
        held = [np.float64(x).astype(dtype).astype(np.float32) for dtype, _, x in seen if dtype.startswith("float")]
    too_large, finite = not np.isfinite(held).all(), True
    try:
        with np.errstate(over="ignore"):
            host.reset(np.zeros(copies, int))
            there = host.step(np.zeros((copies, len(agents)), int), np.zeros(copies, int))
    except EnvironmentFailure as err:
        refused(err, "is not finite")
        finite = False
    assert finite == (not too_large)
    if not finite:
        return
    assert there.obs.shape == (copies, len(agents), host.spec.obs_size)
    assert there.obs.dtype == np.float32
    assert np.isfinite(there.obs).all()
    assert there.mask.shape == (copies, len(agents), max(actions))
    for i, number in enumerate(actions):
        assert there.mask[:, i].sum() == copies * number


def game(agents: list[tuple[int, int]], has_mask: bool, scale: float) -> Game:
    return Game(tuple(size for size, _ in agents), tuple(number for _, number in agents), has_mask, scale)


GAMES = st.tuples(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=20),
    st.booleans(),
    st.sampled_from([1e-30, 1.0, 1e30]),
)


def try_game(drawn: tuple[Any, ...], base: str, attempt: Any) -> None:
    played, config = game(*drawn), BASES[base]
    if base == "matwm":  # room for a sequence of each agent
        config = replaced(config, {"world_model.batch": max(4, played.spec.num_agents)})
    try_configuration(base, {}, lambda _: attempt(config, played))


@settings(max_examples=3, **LENIENT)
@given(GAMES, st.sampled_from(sorted(BASES)))
def test_games_of_any_shape_are_traced(drawn: tuple[Any, ...], base: str) -> None:
    try_game(drawn, base, traced)


@pytest.mark.slow
@pytest.mark.timeout(5400)  # each is a compilation, and games of many agents compile for a minute or more
@settings(max_examples=12, **LENIENT)
@given(GAMES, st.sampled_from(sorted(BASES)))
def test_games_of_any_shape_are_learned_from(drawn: tuple[Any, ...], base: str) -> None:
    try_game(drawn, base, updated)


# ------------------------------------------------------------------------------------------ command lines and files


TOKENS = """train evaluate report compare watch inspect devices --preset small paper wm_rnd ippo --seed -1 --env
simple_tag --world-model.lr 1e-3 nan --resume runs/x --no-peek --on-nan rollback --replay.uniform --help --algo
--checkpoints-best --env-kwargs {} --total-steps"""
WORDS = st.one_of(st.sampled_from(TOKENS.split()), st.text(max_size=8))


@settings(max_examples=15, **LENIENT)
@given(st.lists(WORDS, max_size=6))
def test_command_lines_are_understood_or_refused(words: list[str]) -> None:
    try:
        cli._parse(words)
    except SystemExit as stop:
        status = stop.code
    except (ConfigError, RunError, UnknownEnvironment, CheckpointError) as err:
        refused(err)
        status = 2
    else:
        status = 0
    assert status in (0, 2)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
PATHS = [(field.name,) for field in dataclasses.fields(Config)] + [
    (field.name, inner.name)
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(getattr(Config(), field.name))
    for inner in dataclasses.fields(getattr(Config(), field.name))
]


@settings(max_examples=150, **LENIENT)
@given(st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=3))
def test_configuration_files_are_read_or_refused(changes: dict[tuple[str, ...], Any]) -> None:
    values = json.loads(Config().to_json())
    for path, value in sorted(changes.items(), key=lambda item: -len(item[0])):
        owner = values if len(path) == 1 else values[path[0]]
        owner[path[-1]] = value
    try:
        config = Config.from_json(json.dumps(values))
    except ConfigError as err:
        refused(err)
        return
    assert Config.from_json(config.to_json()) == config


@settings(max_examples=100, **LENIENT)
@given(st.text(max_size=30))
def test_text_that_is_no_configuration(text: str) -> None:
    try:
        Config.from_json(text)
    except ConfigError:
        return
    assert json.loads(text) == {}
