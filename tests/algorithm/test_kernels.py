"""The GPU's kernels, interpreted here, give what the plain functions give."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream import kernels
from codream.attention import attention, recall
from codream.latents import sample_index

CLOSE = {"float32": {"rtol": 1e-4, "atol": 2e-5}, "bfloat16": {"rtol": 2e-2, "atol": 2e-2}}


def batch(heads=4, time=5, size=8, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (3, heads, size), (3, heads, time, size), (3, heads, time, size)
    data = [3 * jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=False)]
    return *data, jax.random.bernoulli(keys[3], 0.6, (3, time)).at[:, -1].set(True)


@pytest.fixture
def gpu(monkeypatch):
    """As if there was one: kernels are used, and interpreted."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "_ampere", lambda device: True)
    for name in ("recall", "draw"):
        monkeypatch.setattr(kernels, name, partial(getattr(kernels, name), interpret=True))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("heads", "time", "size"), [(4, 5, 8), (1, 1, 16), (8, 19, 64)])
def test_the_kernel_is_attention(heads, time, size, dtype):
    given = batch(heads, time, size, dtype)
    found = jax.jit(jax.vmap(partial(kernels.recall, interpret=True)))(*given)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, jax.vmap(attention)(*given), **CLOSE[dtype])


def test_its_gradient_is_that_of_attention(gpu):
    *data, allowed = batch()
    loss = lambda f: jax.grad(lambda *data: jnp.sum(jnp.sin(jax.vmap(f)(*data, allowed))), (0, 1, 2))  # noqa: E731
    for one, other in zip(loss(recall)(*data), loss(attention)(*data), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_not_allowed_has_no_part():
    q, k, v, allowed = batch()
    hidden = ~allowed[:, None, :, None]
    for change in (1e3, -1e3):
        found = jax.vmap(partial(kernels.recall, interpret=True))(q, k + change * hidden, v + change * hidden, allowed)
        np.testing.assert_allclose(found, jax.vmap(attention)(q, k, v, allowed), **CLOSE["float32"])


@pytest.mark.parametrize(
    ("backend", "capability", "shape", "used"),
    [
        ("gpu", "9.0", {}, True),
        ("gpu", "12.0", {}, True),
        ("gpu", "7.5", {}, False),
        ("gpu", "gfx90a", {}, False),
        ("cpu", "", {}, False),
        ("gpu", "8.6", {"heads": 3}, False),
        ("gpu", "8.6", {"time": 65}, False),
    ],
)
def test_it_is_used_where_it_can_be(backend, capability, shape, used, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    traced = str(jax.make_jaxpr(jax.vmap(recall))(*batch(**shape)))
    assert ("pallas_call" in traced) == used


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_same_classes_are_drawn(share, request):
    logits = 3 * jax.random.normal(jax.random.key(0), (50, 16, 8))
    logits = logits.at[:, :8, 5:].set(-1e9)  # impossible ones
    drawn = jax.vmap(lambda key, logits: sample_index(key, logits, share))
    keys = jax.random.split(jax.random.key(1), 50)
    here = drawn(keys, logits)
    request.getfixturevalue("gpu")
    assert "pallas_call" in str(jax.make_jaxpr(drawn)(keys, logits))
    there = drawn(keys, logits)
    assert (here == there).mean() > 0.99  # but for what lies on a border
    assert share or (there[:, :8] < 5).all()
