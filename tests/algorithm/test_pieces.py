"""Work in pieces gives what work at once gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SPEC, tiny

from codream import actor_critic
from codream.actor_critic import improve, init_agents
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


def test_agents_learn_in_pieces_what_they_learn_at_once(monkeypatch):
    agents, starts, horizon, settings = 3, 4, 3, tiny(SPEC).agents
    keys = jax.random.split(jax.random.key(0), 5)
    codes = OneHots(jax.random.randint(keys[0], (agents, starts, horizon + 1, 2), 0, 4), 4)
    dream = Dream(
        features=joined(codes, jax.random.normal(keys[1], (agents, starts, horizon + 1, 5))),
        latent=codes,
        mask=jnp.ones((agents, starts, horizon, 4), bool),
        action=jax.random.randint(keys[2], (agents, starts, horizon), 0, 4),
        reward=jax.random.normal(keys[3], (agents, starts, horizon)),
        cont=jax.random.uniform(keys[4], (agents, starts, horizon)),
    )
    fresh = init_agents(agents, 13, 4, settings, jax.random.key(1), True)
    found = []
    for rows in (1000, 1):
        monkeypatch.setattr(actor_critic, "ROWS", rows)
        found.append(jax.jit(lambda d: improve(fresh, d, jnp.asarray(1), settings)[1])(dream))
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-6, err_msg=name)
