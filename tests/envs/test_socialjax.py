"""SocialJax's interface, on a stand-in and, where it can be had, on itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream import building
from codream.agents import load
from codream.cli import main
from codream.envs import make_env
from codream.envs.socialjax import SocialJaxEnv
from codream.presets import preset
from codream.runs import environment_version

REAL = importlib.util.find_spec("socialjax") is not None


@pytest.fixture
def stand_in(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "socialjax"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_in"))
    monkeypatch.setattr(building, "_GRAPHS", {})  # what was made by name
    yield
    for module in [name for name in sys.modules if name.partition(".")[0] == "socialjax"]:
        del sys.modules[module]


def test_arrays_become_agents(stand_in):
    env = make_env("socialjax:coin_game", num_inner_steps=3)
    assert isinstance(env, SocialJaxEnv)
    spec = env.spec
    assert (spec.name, spec.agents) == ("socialjax:coin_game", ("agent_0", "agent_1"))
    assert (spec.obs_shapes, spec.num_actions, spec.has_mask) == (((242,),) * 2, (7, 7), False)
    assert spec.sides == {"agent": (0, 1)}
    assert environment_version(spec.name) == "socialjax 0.0.stand-in"
    step = jax.jit(env.step)
    state, here = env.reset(jax.random.key(0))
    luck = float(here.obs[0, 1])
    np.testing.assert_allclose(here.obs[:, 1], [luck, luck + 1])
    lasts, steps = [], []
    for t in range(8):
        state, here = step(jax.random.key(t), state, jnp.array([2, 5]))
        lasts.append(bool(here.last))
        steps.append(float(here.obs[0, 0]))
        np.testing.assert_array_equal(here.reward, [0, 0] if here.first else [2, 5])
        assert here.reward.dtype == np.float32
        assert not here.terminal.any()
        assert here.acting.all() == (not here.last)
    # Three steps, a reset, three steps. Its own reset has replaced what was seen after the last one.
    assert lasts == [False, False, True, False] * 2
    assert steps == [1, 2, 0, 0] * 2


def test_raw_observations_are_encoded(stand_in):
    env = make_env("socialjax:coin_game")
    raw = np.zeros((2, 11, 11, 2))
    raw[1, ..., 1] = 7
    here = env.encode(raw, first=True)
    assert here.obs.shape == (1, 2, 242)
    np.testing.assert_array_equal(here.obs[0, 1, 1::2], 7)


def test_an_agent_alone_has_a_reward_of_its_own(stand_in):
    env = make_env("socialjax:one_agent")
    state, _ = env.reset(jax.random.key(0))
    _, here = env.step(jax.random.key(1), state, jnp.array([4]))
    np.testing.assert_array_equal(here.reward, [4])


def test_it_trains_by_name(stand_in, tmp_path):
    """One compiled chunk, in the smallest nets."""
    options = {"ppo.units": 4, "ppo.layers": 1, "ppo.rollout": 4, "ppo.minibatches": 1, "ppo.epochs": 1, "num-envs": 2}
    small = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    args = ["train", "--preset", "ippo", "--env", "socialjax:coin_game", "--total-steps", "32", "--episodes", "0"]
    assert main([*args, "--log-every", "32", "--root", str(tmp_path), "--name", "run", *small]) == 0
    assert (tmp_path / "run" / "report.html").exists()
    agents = load(tmp_path / "run")
    chosen = agents.act(np.zeros((2, 11, 11, 2)))
    assert set(chosen) == {0, 1}
    assert all(0 <= action < 7 for action in chosen.values())


@pytest.mark.skipif(REAL, reason="SocialJax is installed")
def test_without_it_one_is_told_how_to_get_it(capsys):
    assert main(["train", "--algo", "wm_rnd", "--env", "socialjax:coin_game"]) == 2
    told = capsys.readouterr().err
    assert "socialjax is not installed" in told
    assert "git clone https://github.com/cooperativex/SocialJax" in told


@pytest.mark.skipif(not REAL, reason="SocialJax is on no package index")
@pytest.mark.filterwarnings("default")
def test_the_real_coin_game():
    env = make_env("socialjax:coin_game", num_inner_steps=5, shared_rewards=False)
    assert preset("wm_rnd").resolve(env.spec).imagined_partners == "mirrored"
    step = jax.jit(env.step)
    state, here = env.reset(jax.random.key(0))
    assert here.obs.shape == (2, env.spec.obs_size)
    assert env.spec.obs_size % 121 == 0
    lasts = []
    for t in range(6):
        state, here = step(jax.random.key(t), state, jnp.array([t % env.spec.max_actions] * 2))
        lasts.append(bool(here.last))
    assert lasts == [False] * 4 + [True, False]
