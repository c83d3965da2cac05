"""The host adapter: spaces, early finishers, masks, errors, names."""

from __future__ import annotations

import contextlib
import functools
import io
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toys
from gymnasium import spaces
from mpe2 import simple_tag_v3
from PIL import Image
from rich.console import Console

from codream.envs import EnvironmentFailure, HostEnv, TimeStep, UnknownEnvironment, available_envs, make_env
from codream.envs.pettingzoo import PettingZooEnv
from codream.envs.registry import envs_table


def start(env: HostEnv, seed: int = 0) -> TimeStep:
    return env.reset(np.full(env.num_envs, seed))


def advance(env: HostEnv, actions: Any = 0) -> TimeStep:
    shape = (env.num_envs, env.spec.num_agents)
    return env.step(np.broadcast_to(np.asarray(actions), shape), np.zeros(env.num_envs, int))


def host(env: Any, num_envs: int = 1, **kwargs: Any) -> HostEnv:
    made = make_env(env, num_envs, **kwargs)
    assert isinstance(made, HostEnv)
    return made


# ---------------------------------------------------------------------- observations and actions


def test_integer_observations_are_one_hot_and_actions_count_from_their_start() -> None:
    env = host(toys.IntegerToy)
    assert env.spec.obs_shapes == ((8,), (8,))
    assert env.spec.num_actions == (2, 4)
    np.testing.assert_array_equal(start(env).obs[0], np.eye(8)[[0, 0]])
    ts = advance(env, [[1, 3]])
    np.testing.assert_array_equal(ts.obs[0], np.eye(8)[[1, 1]])
    np.testing.assert_array_equal(ts.reward[0], [1 + 1 + 1, 3 - 1 + 1])


def test_actions_are_said_as_the_environment_counts_them() -> None:
    env = host(toys.IntegerToy)  # two actions from 1 on, four from -1 on
    raw = toys.IntegerToy()
    obs, _ = raw.reset()
    decoded = env.decode(np.asarray([1, 0]), obs)
    assert decoded == {"red_0": 2, "blue_0": -1}
    assert all(raw.action_space(agent).contains(action) for agent, action in decoded.items())
    assert env.decode(np.asarray([1, 0]), {"blue_0": obs["blue_0"]}) == {"blue_0": -1}


def test_vectors_of_any_kind_are_flattened_and_padded() -> None:
    env = host(toys.UnequalToy)
    assert env.spec.obs_shapes == ((8,), (5,), (5,))
    assert env.spec.num_actions == (2, 5, 3)
    start(env)
    ts = advance(env)
    np.testing.assert_allclose(ts.obs[0, 0], np.random.default_rng(0).random(), rtol=1e-6)
    np.testing.assert_array_equal(ts.obs[0, 1], [0, 1, 0, 1, 9, 0, 0, 0])
    np.testing.assert_array_equal(ts.obs[0, 2], [0, 1, 0, 1, 0, 0, 0, 0])


def test_images_are_resized_by_boxes_with_channels_last() -> None:
    env = host(toys.ImageToy)
    assert env.spec.obs_shape == (64, 64, 3)
    start(env)
    ts = advance(env)
    expected = np.zeros((64, 64, 3), np.uint8)
    expected[:, 0, 1] = 10
    np.testing.assert_array_equal(ts.obs[0, 0], expected)
    expected = np.zeros((64, 64, 3), np.uint8)
    expected[0, 1, 2] = 128
    np.testing.assert_array_equal(ts.obs[0, 1], expected)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels_are_resized_one_by_one(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (100, 70, channels), dtype=np.uint8)

    class Painting(toys.Toy):
        def observation_space(self, agent: str) -> spaces.Space:
            return spaces.Box(0, 255, image.shape, np.uint8)

        def observe(self, agent: str) -> Any:
            return image

    obs = start(host(Painting)).obs[0, 0]
    assert obs.shape == (64, 64, channels)
    for c in range(channels):
        plane = Image.fromarray(image[..., c]).resize((64, 64), Image.Resampling.BOX)
        np.testing.assert_array_equal(obs[..., c], np.asarray(plane))


def painting(space: spaces.Box, image: np.ndarray) -> type[toys.Toy]:
    class Painting(toys.Toy):
        def observation_space(self, agent: str) -> spaces.Space:
            return space

        def observe(self, agent: str) -> Any:
            return image

    return Painting


BYTES, UNIT = spaces.Box(0, 255, (64, 64), np.uint8), spaces.Box(0, 1, (64, 64), np.float64)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_the_space_says_what_pixels_mean(dtype: type) -> None:
    """Not the array's own type: bytes are often given as larger numbers."""
    whole = np.random.default_rng(0).integers(0, 256, (64, 64))
    obs = start(host(painting(BYTES, whole.astype(dtype)))).obs[0, 0, ..., 0]
    np.testing.assert_array_equal(obs, whole)
    obs = start(host(painting(UNIT, (whole > 99).astype(dtype)))).obs[0, 0, ..., 0]
    np.testing.assert_array_equal(obs, (whole > 99) * 255)


@pytest.mark.parametrize(
    ("space", "image", "message"),
    [
        (UNIT, np.full((64, 64), 200, np.uint8), "expected pixels within 0…1, as the space says, got 200…200"),
        (UNIT, np.full((64, 64), -0.5), "got -0.5…-0.5"),
        (UNIT, np.full((64, 64), np.nan), "NaN"),
        (BYTES, np.full((64, 64), 256), "expected whole numbers within 0…255, as the space says, got 256…256"),
        (BYTES, np.full((64, 64), 0.5), "fractions within 0.5…0.5"),
    ],
)
def test_images_outside_their_space_are_refused(space: spaces.Box, image: np.ndarray, message: str) -> None:
    with pytest.raises(EnvironmentFailure, match=f"toy_v0: copy 0, step 0 .*observation of red_0: .*{message}"):
        start(host(painting(space, image)))


def test_vectors_outside_their_space_are_told_once_and_taken() -> None:
    """Many environments declare bounds that they do not keep, and a vector is of use without them."""
    told = r"toy_v0: red_0: an observation lies outside its space: entry \[0\] is 3, the space has -2…2 there"
    env = host(with_space(spaces.Box(-2, 2, (2,))))
    start(env)
    for step in range(1, 5):
        with pytest.warns(RuntimeWarning, match=told) if step == 3 else contextlib.nullcontext():
            ts = advance(env)
        assert ts.obs[0, 0, 0] == step
    half = spaces.Box(np.float32([-np.inf, 0]), np.float32([np.inf, 1]))
    start(host(with_space(half)))


def with_space(space: spaces.Space, action_space: spaces.Space | None = None) -> type[toys.Toy]:
    class Spaced(toys.Toy):
        def observation_space(self, agent: str) -> spaces.Space:
            return space if agent == "red_0" else super().observation_space(agent)

        def action_space(self, agent: str) -> spaces.Space:
            return action_space if action_space and agent == "red_0" else super().action_space(agent)

    return Spaced


def test_parts_of_an_observation_are_taken_as_boxes_are() -> None:
    space = spaces.Dict(pos=spaces.Box(-1, 1, (2,)), goal=spaces.Discrete(3), more=spaces.Tuple([spaces.Box(0, 9, ())]))
    shown: Any = {"pos": np.array([0.1, -0.2]), "goal": 1, "more": (7,)}  # of other types than the spaces'

    class Parts(with_space(space)):
        def observe(self, agent: str) -> Any:
            return shown if agent == "red_0" else super().observe(agent)

    env = host(Parts)
    member = {"pos": np.float32(shown["pos"]), "goal": 1, "more": (np.float32(7),)}
    np.testing.assert_array_equal(start(env).obs[0, 0], spaces.flatten(space, member))
    shown["pos"] = np.array([3, 0])
    with pytest.warns(RuntimeWarning, match=r"red_0, part pos: .* entry \[0\] is 3, the space has -1…1 there"):
        assert start(env).obs[0, 0].tolist() == spaces.flatten(space, member | {"pos": np.float32([3, 0])}).tolist()
    for name, value, message in (
        ("goal", 5, r"observation of red_0: goal: expected a member of Discrete\(3\), got 5"),
        ("pos", [1], r"pos: expected shape \(2,\), got \(1,\)"),
        ("more", 7, "more: expected a tuple of 1, got 7"),
    ):
        kept, shown[name] = shown[name], value
        with pytest.raises(EnvironmentFailure, match=message):
            start(env)
        shown[name] = kept
    del shown["goal"]
    with pytest.raises(EnvironmentFailure, match=r"expected a dictionary with .*goal.*, got {'pos'"):
        start(env)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, [1, 2], "step must return obs by agent, {agent: …}, got list"),
        (1, 1.0, "step must return rewards by agent, {agent: …}, got float"),
        (2, False, "step must return terminations by agent, {agent: …}, got bool"),
        (4, None, "step must return infos by agent, {agent: …}, got NoneType"),
        (4, {"red_0": 3}, "expected a dictionary as info of red_0, got int"),
    ],
)
def test_answers_that_are_not_by_agent_are_named(place: int, value: Any, message: str) -> None:
    class Odd(toys.Toy):
        def step(self, actions: dict[str, Any]) -> Any:
            answer = list(super().step(actions))
            answer[place] = value
            return tuple(answer)

    env = host(Odd)
    start(env)
    with pytest.raises(EnvironmentFailure, match=f"toy_v0: copy 0, step 1 of its episode: {message}"):
        advance(env)


def test_an_agent_without_an_info_has_none() -> None:
    class Plain(toys.Toy):
        def info(self, agent: str) -> Any:
            return None

    env = host(Plain)
    start(env)
    assert advance(env).mask.all()


def test_agents_must_be_known_before_the_first_reset() -> None:
    class Nobody(toys.Toy):
        def __init__(self) -> None:
            super().__init__()
            self.possible_agents = []

    with pytest.raises(ValueError, match="toy_v0: possible_agents is empty; it must name all agents before"):
        make_env(Nobody)


def test_masks_in_infos_are_not_forgotten() -> None:
    env: Any = host(toys.InfoMaskToy)
    obs, infos = toys.InfoMaskToy().reset(seed=0)
    assert env.encode(obs, infos).mask[0].tolist() == [[True, True, False]] * 2
    with pytest.raises(ValueError, match=r"toy_v0 gives action masks in infos, .* agents.act\(obs, infos\)"):
        env.encode(obs)


def test_small_grids_are_vectors() -> None:
    assert host(with_space(spaces.Box(0, 255, (9, 9, 3), np.uint8))).spec.obs_shapes == ((243,), (2,))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            with_space(spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (2,))),
            "red_0 has the action space Box.*only Discrete",
        ),
        (with_space(spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 2])), "MultiDiscrete.*only Discrete"),
        (
            with_space(spaces.Box(0, 255, (20, 20, 3), np.uint8)),
            r"all vectors|all observations to be vectors.*red_0",
        ),
        (
            with_space(spaces.Dict(eye=spaces.Box(0, 255, (20, 20, 3), np.uint8), ear=spaces.Discrete(2))),
            "red_0.*mixes an image",
        ),
        (with_space(spaces.Sequence(spaces.Discrete(2))), "red_0.*no fixed length"),
    ],
)
def test_spaces_that_are_not_supported_are_refused_by_name(kind: type[toys.Toy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(kind)


# ---------------------------------------------------------------------- masks and finishing


def test_masks_from_dict_observations_and_from_infos() -> None:
    env = host(toys.MaskToy)
    assert env.spec.has_mask
    assert env.spec.obs_shapes == ((2,), (2,))
    ts = start(env)
    for step in range(5):
        expected = np.arange(3) == step % 3 if step != 3 else np.ones(3)  # an empty mask forbids nothing
        np.testing.assert_array_equal(ts.mask[0], [expected, expected])
        ts = advance(env)
    env = host(toys.InfoMaskToy)
    assert env.spec.has_mask
    np.testing.assert_array_equal(start(env).mask[0], [[True, True, False]] * 2)
    assert not host(toys.Toy).spec.has_mask


@pytest.mark.parametrize("kind", [toys.EarlyToy, toys.KeepsFinishedToy])
def test_agents_that_come_and_go(kind: type[toys.Toy]) -> None:
    env = host(kind)
    hare_0, hare_1, late, tortoise = range(4)
    ts = start(env)
    acting, terminal, last = [ts.acting[0]], [ts.terminal[0]], [ts.last[0]]
    obs, reward = [ts.obs[0]], [ts.reward[0]]
    for _ in range(7):
        ts = advance(env, 1)
        for kept, row in zip((acting, terminal, last, obs, reward), jax_free_rows(ts), strict=True):
            kept.append(row)
    assert [bool(a[hare_0]) for a in acting] == [True, True, False, False, False, False, False, True]
    assert [bool(a[hare_1]) for a in acting] == [True, True, True, False, False, False, False, True]
    assert [bool(a[tortoise]) for a in acting] == [True] * 6 + [False, True]
    assert last == [False] * 6 + [True, False]
    # Only hare_0 really came to an end; it did so once, with its last observation and reward.
    assert np.argwhere(np.stack(terminal)).tolist() == [[2, hare_0]]
    assert obs[2][hare_0][0] == 2
    assert reward[2][hare_0] == 2
    assert not np.stack(obs)[3:7, hare_0].any()
    assert not np.stack(reward)[3:7, hare_0].any()
    if kind is toys.EarlyToy:
        # hare_1's last observation was missing, so the one before stands in.
        assert obs[3][hare_1][0] == 2
        assert [bool(a[late]) for a in acting] == [False, False, True, True, True, True, False, False]
        assert not np.stack(obs)[:2, late].any()
        assert obs[2][late][0] == 2
        assert reward[2][late] == 0
        assert reward[3][late] == 2


def jax_free_rows(ts: TimeStep) -> tuple[Any, ...]:
    return ts.acting[0], ts.terminal[0], ts.last[0], ts.obs[0], ts.reward[0]


def test_a_time_limit_is_last_and_not_terminal_and_the_reset_uses_its_own_seed() -> None:
    for kind, ends in ((toys.Toy, False), (toys.IntegerToy, True)):
        env = host(kind)
        start(env)
        for _ in range(5):
            ts = advance(env)
        assert ts.last.all()
        assert ts.terminal.all() == ends
        assert not ts.acting.any()
    env = host(toys.Toy, num_envs=2)
    start(env)
    for _ in range(5):
        advance(env)
    ts = env.step(np.zeros((2, 2), int), np.asarray([11, 12]))
    luck = [np.random.default_rng(seed).random() for seed in (11, 12)]
    np.testing.assert_allclose(ts.obs[:, 0, 1], luck, rtol=1e-6)


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("step", "copy 1 raised at step 2 .*ZeroDivisionError: the engine stalled"),
        ("shape", r"copy \d, step 2 .*blue_0.*expected shape \(2,\), got \(7,\)"),
        ("nan", "copy 0, step 2 .*observation of blue_0 is not finite.*nan"),
        ("nan reward", "copy 0, step 2 .*reward of red_0 is not finite: nan"),
        ("text reward", "step 2 .*expected a number as reward of red_0, got 'much'"),
        ("no reward", "step 2 .*no reward for red_0, which acted"),
        ("no observation", "step 2 .*no observation of red_0"),
        ("mask", r"action mask of red_0: expected shape \(3,\), got \(4,\)"),
        ("stranger", "green_0.* not in possible_agents"),
        ("four", r"step 2 .*: step must return \(obs, rewards, terminations, truncations, infos\), got 4 values"),
    ],
)
def test_an_environment_that_fails_is_named_with_copy_and_step(fault: str, message: str) -> None:
    made = 0

    def maker() -> toys.Toy:
        nonlocal made
        made += 1
        healthy = fault == "step" and made == 1
        return toys.Toy() if healthy else toys.FaultyToy(fault)

    env = host(maker, num_envs=2)
    start(env)
    advance(env)
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        advance(env)
    if fault == "step":
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_reset_that_fails_is_named() -> None:
    env = host(lambda: toys.FaultyToy("reset"), num_envs=3)
    with pytest.raises(EnvironmentFailure, match=r"reset of copy 1 raised.*the level does not load"):
        env.reset(np.asarray([0, 7, 0]))
    with pytest.raises(EnvironmentFailure, match=r"toy_v0: reset must return \(obs, infos\), got dict"):
        make_env(lambda: toys.FaultyToy("no infos"))
    env = host(toys.FaultyToy)
    assert isinstance(env, PettingZooEnv)
    env._copies.envs[0].fault = "no infos"
    with pytest.raises(EnvironmentFailure, match=r"copy 0, step 0 .*: reset must return \(obs, infos\), got dict"):
        start(env)


def test_raw_observations_that_are_not_finite_are_refused() -> None:
    env = host(toys.Toy)
    assert isinstance(env, PettingZooEnv)
    with pytest.raises(EnvironmentFailure, match=r"observation of blue_0 is not finite: \[ 0. nan\]"):
        env.encode({"blue_0": np.asarray([0.0, np.nan])})


def test_bad_actions_and_seeds_are_refused() -> None:
    env = host(toys.IntegerToy, num_envs=2)
    with pytest.raises(ValueError, match="call reset before step"):
        advance(env)
    start(env)
    with pytest.raises(ValueError, match=r"red_0 of copy 0 has the actions 0…1, got 2"):
        advance(env, 2)
    with pytest.raises(ValueError, match=r"actions of shape \(2, 2\)"):
        env.step(np.zeros((2, 3), int), np.zeros(2, int))
    with pytest.raises(ValueError, match="one seed for each of the 2 copies"):
        env.reset(np.zeros(3, int))


# ---------------------------------------------------------------------- objects


def test_objects_that_make_environments() -> None:
    for given in (toys.Toy, lambda: toys.Toy(), toys.Toy()):
        env = host(given, num_envs=3)
        assert env.num_envs == 3
        assert start(env).obs.shape == (3, 2, 2)
    one = toys.Toy()
    start(host(one))
    assert one.agents == ["red_0", "blue_0"]  # a single instance is used as it is
    for given in (
        simple_tag_v3,
        simple_tag_v3.parallel_env,
        simple_tag_v3.parallel_env(),
        simple_tag_v3.env(),
    ):
        assert host(given).spec.obs_shapes == ((16,), (16,), (16,), (14,))
    assert host(simple_tag_v3.parallel_env, max_cycles=7, num_adversaries=2).spec.num_agents == 3


def test_objects_that_cannot_be_used() -> None:

    class Unique(toys.Toy):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("there is only one window")

    with pytest.raises(TypeError, match=r"cannot be deep-copied .*one window.*pass its class or a function"):
        make_env(Unique(), num_envs=2)
    shared = toys.Toy()
    with pytest.raises(TypeError, match=r"^test_pettingzoo:test_.*<lambda> returned the same environment twice"):
        make_env(lambda: shared, num_envs=2)
    with pytest.raises(TypeError, match=r"returned the module mpe2\.simple_tag_v3; you want its parallel_env"):
        make_env(lambda: simple_tag_v3)
    with pytest.raises(TypeError, match=r"^a partial of builtins:print returned None"):
        make_env(functools.partial(print, end=""))
    with pytest.raises(TypeError, match=r"keywords.*max_cycles.*instance"):
        make_env(toys.Toy(), max_cycles=3)
    with pytest.raises(TypeError, match=r"expected an environment's name.*got int"):
        make_env(3)
    with pytest.raises(TypeError, match=r"expected a PettingZoo ParallelEnv, got SimpleNamespace, which lacks"):
        make_env(lambda: SimpleNamespace(reset=None, step=None))
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        make_env(toys.Toy, num_envs=0)
    turns = simple_tag_v3.env()
    turns.unwrapped.metadata = {**turns.metadata, "is_parallelizable": False}
    with pytest.raises(ValueError, match="turn-based"):
        make_env(turns)


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["simple_tag", "simple_tag_v3", "mpe2:simple_tag", "mpe2:simple_tag_v3"])
def test_simple_tag_is_mpe2s(name: str) -> None:
    env = host(name, num_envs=2)
    assert env.spec.name == "mpe2:simple_tag_v3"
    assert env.num_envs == 2
    assert env.spec.sides == {"adversary": (0, 1, 2), "agent": (3,)}


def test_pong_is_butterflys_and_really_draws() -> None:
    env = host("cooperative_pong", max_cycles=3)
    assert env.spec.name.startswith("butterfly:cooperative_pong_v")
    assert env.spec.obs_shape == (64, 64, 3)
    before = start(env).obs
    assert before.any()
    assert (advance(env).obs != before).any()
    env.close()


def test_unknown_names_list_what_exists_nearest_first() -> None:
    with pytest.raises(
        UnknownEnvironment, match=r"'simple_tga'; the nearest: mpe2:simple_tag_v3.*of your own: --env-from.*smax_3m"
    ):
        make_env("simple_tga")
    with pytest.raises(UnknownEnvironment, match="families are mpe2, butterfly, jaxmarl, socialjax"):
        make_env("atari:pong")
    with pytest.raises(UnknownEnvironment, match="nearest: mpe2:simple_tag_v3"):
        make_env("mpe2:simple_tag_v99")
    with pytest.raises(ValueError, match="no environment is called ''"):
        make_env("")


def test_a_family_that_is_not_installed_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pettingzoo.butterfly.pistonball.pistonball", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "codream\[butterfly\]"'):
        make_env("pistonball")


def test_listing_names_imports_nothing_heavy() -> None:
    names = available_envs()
    assert {"mpe2:simple_tag_v3", "jaxmarl:MPE_simple_tag_v3", "jaxmarl:smax_3m", "jaxmarl:coin_game"} <= set(names)
    code = (
        "import sys; from codream.envs import available_envs; available_envs();"
        "print([m for m in ('pygame', 'jaxmarl', 'pettingzoo', 'mpe2', 'gymnasium') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_the_table_of_environments_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """`None` among the modules is how Python says that a package cannot be imported."""
    file = io.StringIO()
    monkeypatch.setitem(sys.modules, "pymunk", None)
    Console(width=200, file=file).print(envs_table())
    shown = file.getvalue()
    for name in ("simple_tag_v3", "cooperative_pong_v6", "smax_3m", "coin_game"):
        assert name in shown
    assert 'needs pymunk: pip install "codream[butterfly]"' in shown
    assert "needs socialjax: it is on no package index" in shown


class LateMaskToy(toys.Toy):
    """Has no mask when an episode begins, and later one."""

    def info(self, agent: str) -> dict[str, Any]:
        return {"action_mask": np.asarray([1, 1, 0])} if self.steps else {}


def test_a_mask_that_comes_late_is_refused() -> None:
    env = host(LateMaskToy)
    start(env)
    with pytest.raises(EnvironmentFailure, match="red_0 has an action mask, but no agent had one when"):
        advance(env)


def test_what_makes_an_environment_inside_jax_is_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match="inside JAX, of which one object serves all copies: pass that"):
        make_env(lambda: SimpleNamespace(step_env=None, get_obs=None))
