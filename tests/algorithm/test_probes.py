"""Whole runs on games whose right answer is known on paper. Small nets; a few seconds each."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import ConstantReward, OtherActs, Recall
from tiny import tiny

from codream import matwm
from codream.together import Together
from codream.training import GraphDriver
from codream.world_model import WorldModel

COPIES = 8
WORLD = {
    "hidden": 32,
    "units": 32,
    "team_hidden": 32,
    "batch": 16,
    "length": 8,
    "lr": 3e-3,
    "reward_bins": 31,
    "change_bins": 21,
}
AGENTS = {
    "units": 32,
    "lr": 3e-3,
    "starts": 32,
    "horizon": 3,
    "context": 4,
    "gamma": 0.8,
    "entropy": 1e-2,
    "value_bins": 31,
    "critic_ema_weight": 0.1,
}


def configured(env, world_model=None, agents=None):
    return tiny(
        env.spec,
        WORLD | (world_model or {}),
        AGENTS | (agents or {}),
        {"capacity": 4000, "decay": 0.999},
        num_envs=COPIES,
        warmup=160,
        world_model_every=COPIES,
        agents_every=COPIES,
    )


def trained(env, config, rows, seed=0):
    """The state after `rows` steps of every copy, one update of each kind a row, and the last metrics."""
    driver = GraphDriver(env, config, chunk=50)
    runner, run = None, driver.run(driver.start(jax.random.key(seed)))
    for _ in range(rows // 50):
        runner, metrics = next(run)
    means = {name: float(total / jnp.maximum(count, 1)) for name, (total, count) in metrics.items()}
    return runner.state, means


@eqx.filter_jit
def _play(env, config, state, forget):
    copies, rows = 16, 200

    def body(carry, key):
        memory, env_state, here = carry
        act_key, env_key = jax.random.split(key)
        seen = eqx.tree_at(lambda h: h.first, here, here.first | forget)
        action, memory = matwm.act(state, memory, seen, act_key, config, collect=False, greedy=True)
        env_state, there = jax.vmap(env.step)(jax.random.split(env_key, copies), env_state, action)
        return (memory, env_state, there), (here.acting, there.reward)

    env_state, here = jax.vmap(env.reset)(jax.random.split(jax.random.key(6), copies))
    start = (matwm.init_memory(state, copies, config), env_state, here)
    return jax.lax.scan(body, start, jax.random.split(jax.random.key(7), rows))[1]


def played(env, config, state, forget=False):
    """Mean reward of every agent per step of greedy play; with `forget`, memory is cleared at every step."""
    acting, reward = (np.asarray(x) for x in _play(env, config, state, jnp.asarray(forget)))
    return np.where(acting, reward, 0).sum((0, 1)) / acting.sum((0, 1))


@eqx.filter_jit
def first_look(state, obs):
    """For every agent at an episode's first step: v, and p̂ of the others."""
    model = state.world_model

    def one(obs, focal, critic):
        z, _ = model.representation.posterior(obs, jax.random.key(0))
        s, _ = model.features(z, focal, model.empty(8))
        return critic.value(s), s[-model.team.size :].reshape(-1, model.spec.max_actions)

    return eqx.filter_vmap(one)(obs, jnp.arange(len(obs)), state.agents.critic)


@pytest.mark.parametrize("latent", [pytest.param("change", marks=pytest.mark.slow), "categorical"])
def test_values_of_a_constant_reward_tell_a_time_limit_from_a_terminal(latent):
    """A quarter of the steps ends the episode: for agent 0 truly, for the others by the clock.

    v = 1 / (1 − 0.8 · ¾) = 2.5 and v = 1 / (1 − 0.8) = 5.
    """
    env = ConstantReward(agents=3, terminal=(0,))
    state, means = trained(env, configured(env, {"latent": latent}), 500)
    values, _ = first_look(state, jnp.ones((3, 1)))
    np.testing.assert_allclose(values[0], 2.5, rtol=0.15)
    np.testing.assert_allclose(values[1:], 5.0, rtol=0.12)
    for i in range(3):
        np.testing.assert_allclose(means[f"agent/agent_{i}/imagined_reward"], 1.0, atol=0.05)
    imagine = eqx.filter_jit(WorldModel.imagine)
    model = state.world_model
    z, _ = model.representation.posterior(jnp.ones(1), jax.random.key(0))
    for i, goes_on in enumerate([0.75, 1.0, 1.0]):
        _, reward, cont, _ = imagine(model, z, jnp.asarray(0), jnp.asarray(i), model.empty(4), jax.random.key(1))
        np.testing.assert_allclose(reward, 1.0, atol=0.1)
        np.testing.assert_allclose(cont, goes_on, atol=0.1)


LINEAR = {"layers": 0, "gamma": 0.5, "horizon": 2, "entropy": 0.2}


def test_another_is_followed_by_predicting_it():
    """The leader shows whether two signs differ; a linear actor can follow only by p̂ (see the probe)."""
    env = OtherActs()
    config = configured(env, agents=LINEAR)
    state, means = trained(env, config, 1000)
    for cue, differ in enumerate([0, 1, 1, 0]):
        _, p = first_look(state, env.shown(jnp.asarray(cue)))
        assert p[0, 0, differ] > 0.85, "the leader's deterministic policy is found"
    assert means["world_model/team_accuracy"] > 0.9  # guessing has ½
    # The best is 1 / (1 − ½) = 2; without a clue it is 1, and 1.5 with a linear one.
    assert means["agent/follower/value"] > 1.6
    reward = played(env, config, state)
    assert reward[1] > 0.95
    assert reward[0] > 0.9


@pytest.mark.slow
def test_without_the_prediction_a_linear_actor_cannot_follow():
    env = OtherActs()
    config = configured(env, {"teammates": False}, LINEAR)
    state, _ = trained(env, config, 600)
    reward = played(env, config, state)
    assert reward[1] > 0.95
    assert reward[0] < 0.8  # a linear function of two signs is right in three of four cases at best


def test_recalling_a_hidden_cue_needs_memory():
    env = Recall()
    config = configured(env, agents={"gamma": 0.5})
    state, _ = trained(env, config, 700)
    # Every second step asks.
    assert (2 * played(env, config, state) > 0.9).all()
    assert abs(2 * played(env, config, state, forget=True) - 0.5).max() < 0.1


@pytest.mark.slow
def test_learning_curves_in_bfloat16_are_those_in_float32():
    """Six seeds each: at every mark the 95 % intervals of what the follower earns overlap, and both learn to follow."""
    env, seeds, marks = OtherActs(), 6, 5
    curves = []
    for precision in ("float32", "bfloat16"):
        config = dataclasses.replace(configured(env, agents=LINEAR), precision=precision)
        driver = GraphDriver(env, config, chunk=1000 // marks)
        together = Together(driver, seeds)
        runners = together.join([driver.start(jax.random.key(seed)) for seed in range(seeds)])
        curve = []
        for _ in range(marks):
            runners, metrics = together.advance(runners)
            returns = [jax.device_get(one["episode/return/follower"]) for one in metrics]
            curve.append([float(total / count) for total, count in returns])
        curves.append(np.asarray(curve))
    means, errors = (np.stack([f(curve) for curve in curves]) for f in (mean_of, error_of))
    apart = np.abs(means[0] - means[1])
    assert (apart <= 2.57 * errors.sum(axis=0)).all(), (means, errors)  # Student's t for six
    assert (means[:, -1] > 0.9 * env.length).all()


def mean_of(curve):
    return curve.mean(axis=1)


def error_of(curve):
    return curve.std(axis=1, ddof=1) / np.sqrt(curve.shape[1])
