"""Work in pieces gives what work at once gives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SPEC, tiny

from codream import actor_critic
from codream.actor_critic import actor_loss, critic_loss, improve, init_agents
from codream.imagination import Dream
from codream.linear import OneHots, joined
from codream.pieces import mapped, pieces, summed


@pytest.mark.parametrize(("total", "most", "count"), [(768, 170, 6), (64, 170, 1), (7, 3, 7), (8, 3, 4), (5, 1, 5)])
def test_pieces_are_equal_and_no_larger_than_asked(total, most, count):
    assert pieces(total, most) == count


def test_pieces_are_put_together_where_they_were_cut():
    x = jnp.arange(24.0).reshape(2, 6, 2)
    np.testing.assert_array_equal(mapped(lambda x: 2 * x, 3, x, axis=1), 2 * x)
    mean, rows = summed(lambda x: (jnp.mean(x), x + 1), 3, x[0])
    np.testing.assert_allclose(mean, jnp.mean(x[0]))
    np.testing.assert_array_equal(rows, x[0] + 1)


AGENTS, STARTS, HORIZON = 3, 4, 3
SETTINGS = tiny(SPEC).agents


@pytest.fixture(scope="module")
def imagined():
    keys = jax.random.split(jax.random.key(0), 5)
    codes = OneHots(jax.random.randint(keys[0], (AGENTS, STARTS, HORIZON + 1, 2), 0, 4), 4)
    return Dream(
        features=joined(codes, jax.random.normal(keys[1], (AGENTS, STARTS, HORIZON + 1, 5))),
        latent=codes,
        mask=jnp.ones((AGENTS, STARTS, HORIZON, 4), bool),
        action=jax.random.randint(keys[2], (AGENTS, STARTS, HORIZON), 0, 4),
        reward=jax.random.normal(keys[3], (AGENTS, STARTS, HORIZON)),
        cont=jax.random.uniform(keys[4], (AGENTS, STARTS, HORIZON)),
    )


@pytest.fixture(scope="module")
def agents():
    """Whose critics and averaged critics say different things, of a few units at most."""
    fresh = init_agents(AGENTS, 13, 4, SETTINGS, jax.random.key(1), True)
    outs = lambda a: (a.critic.net.out, a.slow_critic.net.out, a.actor.net.out)  # noqa: E731
    few = jnp.full(15, -30.0).at[6:9].set(0.0)  # bins −7.5, 0 and 7.5
    says = lambda out, seed, bias: eqx.tree_at(  # noqa: E731
        lambda o: (o.weight, o.bias), out, (0.3 * jax.random.normal(jax.random.key(seed), out.weight.shape), bias)
    )
    critic, slow, actor = outs(fresh)
    few = jnp.broadcast_to(few, critic.bias.shape)
    return eqx.tree_at(outs, fresh, (says(critic, 2, few), says(slow, 3, few), says(actor, 4, actor.bias)))


@eqx.filter_jit
def learned(agents, imagined):
    return improve(agents, imagined, jnp.asarray(1), SETTINGS)[1]


def test_agents_learn_in_pieces_what_they_learn_at_once(agents, imagined, monkeypatch):
    at_once = learned(agents, imagined)
    monkeypatch.setattr(actor_critic, "ROWS", 1)
    in_pieces = eqx.filter_jit(lambda a, d: improve(a, d, jnp.asarray(1), SETTINGS)[1])(agents, imagined)
    for name in at_once:
        np.testing.assert_allclose(at_once[name], in_pieces[name], rtol=1e-4, atol=1e-6, err_msg=name)


@eqx.filter_jit
@eqx.filter_vmap
def said(agents, imagined):
    """Of each agent: what its critics say of every state, and its actor of those in which it acts."""
    acted = jax.tree.map(lambda x: x[:, :-1], imagined.features)
    critic, slow = agents.critic, agents.slow_critic
    return critic(acted), critic.value(imagined.features), slow.value(acted), agents.actor(acted, imagined.mask)


@pytest.mark.parametrize("unit", [1.0, 0.01])
def test_agents_learn_from_the_returns_and_advantages_of_their_own_steps(agents, imagined, unit):
    """By hand from what the critics say. In hundredths, advantages are not divided by the range of returns, which is
    below 1."""
    outs = lambda a: (a.critic.net.out.weight, a.slow_critic.net.out.weight)  # noqa: E731
    agents = eqx.tree_at(outs, agents, replace_fn=lambda w: unit * w)
    imagined = eqx.tree_at(lambda d: d.reward, imagined, unit * imagined.reward)
    got, places, gamma, lam = learned(agents, imagined), agents.critic.places, SETTINGS.gamma, SETTINGS.lam
    for i, (logits, values, slow, log_probs) in enumerate(zip(*said(agents, imagined), strict=True)):
        reward, cont, values = (np.asarray(x) for x in (imagined.reward[i], imagined.cont[i], values))
        returns, goes_on, ahead = np.zeros_like(reward), np.ones_like(reward), values[:, HORIZON]
        for t in reversed(range(HORIZON)):
            ahead = reward[:, t] + gamma * cont[:, t] * ((1 - lam) * values[:, t + 1] + lam * ahead)
            returns[:, t], goes_on[:, t] = ahead, cont[:, :t].prod(axis=1)
        spread = np.percentile(returns, 95) - np.percentile(returns, 5)
        assert (spread > 1) == (unit == 1)
        advantage = (returns - values[:, :HORIZON]) / np.float32(max(1.0, spread))
        target, advantage, weight = jnp.asarray(returns), jnp.asarray(advantage), jnp.asarray(goes_on)
        policy, entropy = actor_loss(log_probs, imagined.action[i], advantage, weight, SETTINGS.entropy)
        regression = critic_loss(logits, target, slow, weight, places, SETTINGS.critic_ema_weight)
        expected = {
            "actor_loss": policy,
            "critic_loss": regression,
            "entropy": entropy,
            "imagined_reward": reward.mean(),
            "value": values.mean(),
            "return_scale": spread,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(got[name][i], value, rtol=1e-3, atol=1e-5, err_msg=name)
