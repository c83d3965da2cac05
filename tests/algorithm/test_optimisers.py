"""Clipping and norms are those of optax, which sums every array by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codream.optimisers import SMALL, adam, clip, norm

TREE = {
    "large": jax.random.normal(jax.random.key(0), (SMALL // 128 + 1, 128)),
    "small": jax.random.normal(jax.random.key(1), (3, 5)),
    "one": jnp.asarray(-2.0),
    "count": jnp.asarray(7),
}
GRADS = {name: x for name, x in TREE.items() if name != "count"}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_norm(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    np.testing.assert_allclose(norm(TREE), optax.tree.norm(GRADS), rtol=1e-6)
    agents = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), GRADS)
    np.testing.assert_allclose(jax.vmap(norm)(agents), norm(GRADS) * np.array([1, 2]), rtol=1e-6)


@pytest.mark.parametrize("most", [1.0, 1e6])
def test_clipping(most):
    found, _ = clip(most).update(GRADS, optax.EmptyState())
    expected, _ = optax.clip_by_global_norm(most).update(GRADS, optax.EmptyState())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
    found, _ = clip(1.0).update({**GRADS, "one": jnp.asarray(bad)}, optax.EmptyState())
    assert np.isnan(found["one"])


def test_adam_keeps_the_state_of_optax():
    """So checkpoints of before can be read."""
    expected = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1, eps=1e-5)).init(GRADS)
    assert jax.tree.structure(adam(0.1, 1.0, eps=1e-5).init(GRADS)) == jax.tree.structure(expected)
