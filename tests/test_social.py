"""Social outcomes: equality for any returns, what an episode counts, and who cooperates."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from codream.envs import make_env
from codream.envs.cooperation import _in_the_matrix, cooperation_counter
from codream.playing import GraphCopies, play
from codream.social import Outcomes, equality


@pytest.mark.parametrize(
    ("returns", "wanted"),
    [
        ([2.0, 2.0], 1.0),
        ([-2.0, -2.0], 1.0),
        ([0.0, 0.0], 1.0),
        ([0.0, 2.0], 0.5),  # 1 − Gini of two, of whom one has all
        ([-1.0, 1.0], 0.5),
        ([1.0, 2.0, 3.0], 1 - 8 / 36),
    ],
)
def test_equality(returns: list[float], wanted: float) -> None:
    np.testing.assert_allclose(equality(np.asarray(returns)), wanted)
    assert equality(np.asarray([returns, returns])).shape == (2,)


def test_an_episode_is_counted_from_its_reset_to_its_end() -> None:
    outcomes = Outcomes(("a", "b"), 2)
    outcomes.begin()
    running, fresh = np.zeros(2, bool), np.array([True, False])
    choices = np.array([[[1, 1], [0, 1]], [[0, 0], [0, 0]]], float)
    outcomes.step(np.array([[1.0, 0.0], [5.0, 5.0]]), running, choices)
    outcomes.step(np.array([[-2.0, 3.0], [0.0, 0.0]]), running, choices)
    outcomes.finish(0)
    outcomes.step(np.array([[9.0, 9.0], [0.0, 0.0]]), fresh, choices)  # a reset: nothing of it counts
    outcomes.step(np.array([[4.0, 1.0], [0.0, 0.0]]), running, np.zeros((2, 2, 2)))
    outcomes.finish(0)
    social = outcomes.social()
    assert social.efficiency[0] == (2 + 5) / 2
    np.testing.assert_allclose(
        social.equality[0], (equality(np.array([-1.0, 3.0])) + equality(np.array([4.0, 1.0]))) / 2
    )
    # Paid at step 0 and at step 1, then both at step 0.
    assert social.sustainability is not None
    assert social.sustainability[0] == (0.5 + 0) / 2
    assert social.cooperation is not None
    assert {name: share for name, (share, _) in social.cooperation.items()} == {"a": 1.0, "b": 0.0, "all": 0.5}
    assert "efficiency 3.50 ± 1.50" in social.sentence()
    plain = social.to_json()
    assert plain["efficiency"] == pytest.approx([3.5, 1.5])
    outcomes.begin()
    assert not outcomes._return.any()


def test_no_rewards_and_no_choices_have_no_time_and_no_rate() -> None:
    outcomes = Outcomes(("a",), 1)
    outcomes.step(np.zeros((1, 1)), np.zeros(1, bool), None)
    outcomes.finish(0)
    social = outcomes.social()
    assert social.sustainability is None
    assert social.cooperation is None
    assert social.to_json()["efficiency"] == [0.0, None]
    # Choices that the game defines and nobody made are none either.
    outcomes.step(np.zeros((1, 1)), np.zeros(1, bool), np.zeros((1, 1, 2)))
    outcomes.finish(0)
    assert outcomes.social().cooperation is None


def test_coins_are_counted_as_the_game_pays_them() -> None:
    """Reward is coins taken − 2 × the other's coins that are mine (JaxMARL pays nothing in an episode's last step)."""
    env = make_env("coin_game", num_inner_steps=10, num_outer_steps=1)
    copies = GraphCopies(env, 16)  # pyright: ignore[reportArgumentType]
    copies.reset(np.arange(16))
    rng = np.random.default_rng(0)
    taken = 0.0
    for step in range(11):
        here = copies.step(rng.integers(0, 5, (16, 2)), rng.integers(2**31, size=16))
        assert copies.choices is not None
        own, every = copies.choices[..., 0], copies.choices[..., 1]
        if step == 10:  # the reset
            assert not every.any()
        elif not here.last.any():
            np.testing.assert_array_equal(here.reward, every - 2 * np.flip(every - own, axis=1))
            taken += every.sum()
    assert taken > 20


def test_resources_are_counted_as_they_are_picked_up() -> None:
    def state(red: list[int], blue: list[int]) -> SimpleNamespace:
        return SimpleNamespace(red_inventory=jnp.asarray(red), blue_inventory=jnp.asarray(blue))

    np.testing.assert_array_equal(_in_the_matrix(state([1, 0], [0, 0]), state([1, 1], [1, 0])), [[0, 1], [1, 1]])
    np.testing.assert_array_equal(_in_the_matrix(state([3, 2], [1, 1]), state([0, 0], [0, 0])), [[0, 0], [0, 0]])
    assert cooperation_counter(make_env("jaxmarl:storm_2p")) is not None
    assert cooperation_counter(make_env("jaxmarl:MPE_simple_spread_v3")) is None


def test_play_hands_over_every_episode_once() -> None:
    class Random:
        def act(self, timestep: object, rng: np.random.Generator) -> np.ndarray:
            return rng.integers(0, 5, timestep.acting.shape)  # pyright: ignore

    env = make_env("coin_game", num_inner_steps=5, num_outer_steps=1)
    copies = GraphCopies(env, 4)  # pyright: ignore[reportArgumentType]
    outcomes = Outcomes(env.spec.agents, 4)
    returns = play(copies, {"agent": Random()}, 6, outcomes=outcomes)
    assert len(outcomes._rows) == 6
    np.testing.assert_allclose(sorted(row["return"].sum() for row in outcomes._rows), sorted(returns.sum(axis=1)))
    assert outcomes.social().cooperation is not None
