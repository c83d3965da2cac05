import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream.actor_critic import (
    Actor,
    Critic,
    actor_loss,
    critic_loss,
    lambda_returns,
    masked_log_probs,
    return_range,
)
from codream.config import AgentConfig
from codream.latents import two_hot_loss, value_bins

KEY = jax.random.key(0)
REWARD, VALUE = jnp.array([1.0, 2.0, 3.0]), jnp.array([10.0, 20.0, 30.0])
ON = jnp.ones(3)


@pytest.mark.parametrize(
    ("gamma", "lam", "cont", "expected"),
    [
        # λ = 0: one step and the critic.
        (0.9, 0.0, ON, [1 + 9, 2 + 18, 3 + 27]),
        # λ = 1: all rewards and the last value.
        (0.9, 1.0, ON, [1 + 0.9 * (2 + 0.9 * 30), 2 + 0.9 * 30, 30]),
        # In between: G_2 = 3 + ½ · 30 = 18, G_1 = 2 + ½ (½ · 20 + ½ · 18), G_0 = 1 + ½ (½ · 10 + ½ · 11.5).
        (0.5, 0.5, ON, [1 + 0.5 * (5 + 5.75), 11.5, 18]),
        # An end after step 1: nothing from beyond it.
        (0.5, 0.5, jnp.array([1.0, 0.0, 1.0]), [1 + 0.5 * (5 + 1), 2, 18]),
        # A chance of going on discounts like γ.
        (1.0, 1.0, jnp.array([1.0, 0.5, 1.0]), [1 + 2 + 0.5 * 33, 2 + 0.5 * 33, 33]),
    ],
    ids=["lambda 0", "lambda 1", "between", "terminal", "chance"],
)
def test_lambda_returns_against_hand_computed_numbers(gamma, lam, cont, expected):
    np.testing.assert_allclose(lambda_returns(REWARD, cont, VALUE, gamma, lam), expected, rtol=1e-6)


def test_lambda_returns_of_a_constant_reward_are_the_true_value():
    value = jnp.full(3, 1 / (1 - 0.8))
    np.testing.assert_allclose(lambda_returns(ON, ON, value, 0.8, 0.95), value, rtol=1e-6)


def test_forbidden_actions_have_probability_zero():
    mask = jnp.array([[True, False, True], [False, True, False]])
    log_probs = masked_log_probs(jnp.array([[0.0, 50.0, 0.0], [3.0, -80.0, 3.0]]), mask)
    np.testing.assert_allclose(jnp.exp(log_probs), [[0.5, 0, 0.5], [0, 1, 0]], atol=1e-7)


def test_a_better_action_becomes_likelier_and_a_worse_one_less():
    def loss(x, advantage):
        return actor_loss(jax.nn.log_softmax(x), jnp.array(1), advantage, jnp.array(1.0), 0.0)[0]

    for advantage in (2.0, -2.0):
        step = -jax.grad(loss)(jnp.zeros(3), jnp.array(advantage))
        # −A ∂ln π / ∂x = −A (one-hot − π)
        np.testing.assert_allclose(step, advantage * (np.eye(3)[1] - 1 / 3), rtol=1e-5)


def test_actor_loss_against_hand_computed_numbers():
    log_probs = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]))
    weight = jnp.array([1.0, 0.5])
    loss, entropy = actor_loss(log_probs, jnp.array([1, 0]), jnp.array([2.0, -1.0]), weight, 0.1)
    entropies = np.array([1.5 * np.log(2), np.log(3)])
    terms = -np.array([2.0, -1.0]) * np.log([0.25, 1 / 3]) - 0.1 * entropies
    np.testing.assert_allclose(loss, (terms * [1.0, 0.5]).mean(), rtol=1e-5)
    np.testing.assert_allclose(entropy, entropies.mean(), rtol=1e-5)


def test_entropy_counts_forbidden_actions_as_nothing():
    mask = jnp.array([True, True, False])
    loss = lambda x: actor_loss(masked_log_probs(x, mask), jnp.array(0), jnp.array(0.0), jnp.array(1.0), 1.0)  # noqa: E731
    (value, entropy), grad = loss(jnp.zeros(3)), jax.grad(lambda x: loss(x)[0])(jnp.array([0.5, 0.0, 9.0]))
    np.testing.assert_allclose([-value, entropy], np.log(2), rtol=1e-6)
    assert np.isfinite(grad).all()
    assert grad[2] == 0
    assert grad[0] > 0  # towards the uniform


def test_no_gradient_passes_the_advantage():
    log_probs = jax.nn.log_softmax(jnp.zeros(3))
    grad = jax.grad(lambda a: actor_loss(log_probs, jnp.array(1), a, jnp.array(1.0), 0.1)[0])(jnp.array(2.0))
    assert grad == 0


def test_critic_loss_is_regression_to_the_returns_and_to_the_average():
    bins = value_bins(15)
    logits = jax.random.normal(KEY, (4, 15))
    returns, slow, weight = (
        jnp.array([0.0, 3.0, -2.0, 50.0]),
        jnp.arange(4.0),
        jnp.array([1.0, 1.0, 0.5, 0.0]),
    )
    expected = jnp.mean(weight * (two_hot_loss(logits, returns, bins) + 0.3 * two_hot_loss(logits, slow, bins)))
    args = (logits, returns, slow, weight, bins)
    np.testing.assert_allclose(critic_loss(*args, 0.3), expected, rtol=1e-6)
    to_targets = jax.grad(critic_loss, argnums=(1, 2))(*args, 0.3)
    assert all((g == 0).all() for g in to_targets)


def test_a_fitted_critic_says_the_value():
    critic = Critic(3, AgentConfig(units=8, layers=1, value_bins=63), KEY)
    assert critic.value(jnp.ones(3)) == 0.0  # at first
    loss = lambda x: critic_loss(x, jnp.array(7.3), jnp.array(7.3), jnp.array(1.0), critic.places, 1.0)  # noqa: E731
    fit = lambda x, _: (x - 2.0 * jax.grad(loss)(x), None)  # noqa: E731
    logits, _ = jax.lax.scan(fit, jnp.zeros(63), None, 300)
    np.testing.assert_allclose(jax.nn.softmax(logits) @ critic.places, 7.3, atol=0.5)


def test_an_actor_starts_near_uniform_within_its_mask():
    actor = Actor(6, 4, AgentConfig(units=8, layers=1), KEY)
    mask = jnp.array([True, True, False, True])
    np.testing.assert_allclose(jnp.exp(actor(jnp.ones(6), mask)), [1 / 3, 1 / 3, 0, 1 / 3], atol=0.02)


def test_the_return_range_is_between_the_5th_and_95th_percentile():
    np.testing.assert_allclose(return_range(jnp.arange(101.0).reshape(101, 1)), 90.0, rtol=1e-6)
    assert return_range(jnp.full((4, 3), 7.0)) == 0
