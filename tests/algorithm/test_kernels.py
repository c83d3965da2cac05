"""The GPU's kernels, interpreted here, give what the plain functions give."""

import sys
from functools import partial
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_if_on_a_gpu

from codream import kernels
from codream.attention import place, recall, reread, turns
from codream.latents import sample_index
from codream.linear import OneHots, joined, linear, lowered
from codream.nets import MLP, products

CLOSE = {"float32": {"rtol": 1e-4, "atol": 2e-5}, "bfloat16": {"rtol": 2e-2, "atol": 2e-2}}
ROWS = 3
ONE_EACH = (0, None, None, 0, 0, 0)
POSITION = 7
CASES = [
    *((*sizes, dtype) for sizes in ((4, 5, 8), (1, 1, 16)) for dtype in CLOSE),
    (8, 19, 64, "float32"),
    pytest.param(8, 19, 64, "bfloat16", marks=pytest.mark.slow),
]


@pytest.fixture
def gpu(monkeypatch):
    as_if_on_a_gpu(monkeypatch)


def normal(seed, dtype, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def remembered(heads=4, time=5, size=8, dtype="float32"):
    """Arguments of `recall`, whose memory is nothing where it is not valid."""
    valid = jax.random.bernoulli(jax.random.key(3), 0.6, (ROWS, time))
    memory = [jnp.where(valid[:, None, :, None], normal(i, dtype, ROWS, heads, time, size), jnp.nan) for i in (0, 1)]
    token, at = normal(2, dtype, ROWS, 3, heads, size), place(jnp.asarray(POSITION), time, size // 2)
    return token, normal(4, "float32", 3, heads, size), at, *memory, valid


def context(heads=4, time=5, size=8, dtype="float32"):
    """Arguments of `reread`."""
    earlier = np.tril(np.ones((time, time), bool))
    allowed = jax.random.bernoulli(jax.random.key(0), 0.6, (ROWS, time, time)) & earlier | np.eye(time, dtype=bool)
    tokens, bias = normal(1, dtype, ROWS, time, 3, heads, size), normal(4, "float32", 3, heads, size)
    return tokens, bias, jnp.asarray(turns(time, size // 2)), allowed


def plain(function, given):
    """Without the kernel, of what is remembered where there is something."""
    token, bias, at, keys, values, valid = given
    clear = lambda x: jnp.where(valid[:, None, :, None], x, 0)  # noqa: E731
    return jax.vmap(function, ONE_EACH)(token, bias, at, clear(keys), clear(values), valid)


@pytest.mark.parametrize(("heads", "time", "size", "dtype"), CASES)
def test_recalling_is_attention_to_what_is_remembered(heads, time, size, dtype):
    given = remembered(heads, time, size, dtype)
    token, bias, at, keys, values, valid = given
    rates = 10_000.0 ** (-jnp.arange(size // 2) / (size // 2))
    kernel = jax.vmap(partial(kernels.recall, interpret=True), (0, None, None, None, 0, 0, 0))
    seen, *memory, remembers = jax.jit(kernel)(token, bias, at.position, rates, keys, values, valid)
    expected, *updated, expected_valid = plain(recall, given)
    assert seen.dtype == dtype
    np.testing.assert_allclose(seen, expected, **CLOSE[dtype])
    np.testing.assert_array_equal(remembers, expected_valid)
    np.testing.assert_array_equal(remembers, valid.at[:, POSITION % time].set(True))
    valid = remembers[:, None, :, None]
    for one, other in zip(memory, updated, strict=True):
        np.testing.assert_allclose(jnp.where(valid, one, 0), jnp.where(valid, other, 0), **CLOSE[dtype])


@pytest.mark.parametrize(("heads", "time", "size", "dtype"), CASES)
def test_rereading_is_attention_and_remembers(heads, time, size, dtype, request):
    tokens, bias, turns, allowed = context(heads, time, size, dtype)
    for since in {0, time - 1}:
        read = jax.vmap(lambda qkv, allowed: reread(qkv, bias, turns, allowed, 4, since, True))  # noqa: B023
        expected = read(tokens, allowed)
        with pytest.MonkeyPatch.context() as patch:
            as_if_on_a_gpu(patch)
            assert "pallas_call" in str(jax.make_jaxpr(read)(tokens, allowed))
            found = read(tokens, allowed)
        assert found[0].shape == (ROWS, time - since, heads, size)
        np.testing.assert_allclose(found[0], expected[0], **CLOSE[dtype])
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert one.shape == (ROWS, heads, time + 4, size)
            np.testing.assert_allclose(one[:, :, :time], other[:, :, :time], **CLOSE[dtype])


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
def test_they_are_used_where_they_can_be(backend, capability, shape, used, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    traced = str(jax.make_jaxpr(jax.vmap(recall, ONE_EACH))(*remembered(**shape)))
    assert ("pallas_call" in traced) == used


def test_without_triton_they_are_not_used(monkeypatch):
    """JAX before 0.7 has it by another name, and a later one may have it no more."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    kernels._settings.cache_clear()
    assert not kernels.suits(8, 64)
    kernels._settings.cache_clear()


@pytest.mark.parametrize("out", [5, 100])
def test_a_layer_of_one_hots_and_more(out, gpu):
    """They are written by a kernel, as whole tiles; the gradient reaches the weights, and what is no one-hot."""
    index = jax.random.randint(jax.random.key(0), (2, 3, 16), 0, 8).astype(jnp.uint8)
    layer, more = linear(16 * 8 + 13 + 6, out, jax.random.key(1)), normal(2, "float32", 2, 3, 13)
    # The second's classes are no power of two.
    ones, action = OneHots(index, 8), OneHots(jax.random.randint(jax.random.key(3), (2, 3, 2), 0, 3), 3)
    loss = lambda layer, more: jnp.sum(jnp.sin(layer(joined(ones, more, action))))  # noqa: E731
    assert "pallas_call" in str(jax.make_jaxpr(loss)(layer, more))
    whole = lambda more: jnp.concatenate([ones.flat(), more, action.flat()], axis=-1)  # noqa: E731
    flat = lambda layer, more: jnp.sum(jnp.sin(layer(whole(more))))  # noqa: E731
    one, other = (jax.value_and_grad(f, (0, 1))(layer, more) for f in (loss, flat))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_same_classes_are_drawn(share, request):
    logits = 3 * jax.random.normal(jax.random.key(0), (50, 16, 8))
    logits = logits.at[:, :8, 5:].set(-1e9)  # impossible ones
    keys, bias = jax.random.split(jax.random.key(1), 50), normal(2, "float32", 16, 8)
    drawn = jax.vmap(lambda key, logits: sample_index(key, logits, share))
    still_biased = jax.vmap(lambda key, logits: sample_index(key, logits, share, bias, jnp.uint8))
    here = drawn(keys, logits)
    np.testing.assert_array_equal(still_biased(keys, logits - bias), here)
    request.getfixturevalue("gpu")
    assert "pallas_call" in str(jax.make_jaxpr(drawn)(keys, logits))
    there, without = drawn(keys, logits), still_biased(keys, logits - bias)
    assert without.dtype == jnp.uint8
    assert (here == there).mean() > 0.99  # but for what lies on a border
    assert (here == without).mean() > 0.99
    assert share or (there[:, :8] < 5).all()


@pytest.mark.parametrize(("rows", "used"), [(192, True), (24, True), (20, False)])
def test_an_mlp_of_rows_and_its_gradient(rows, used, request):
    net = MLP(5, 3, 16, 2, jax.random.key(0))
    net = eqx.tree_at(lambda net: [norm.weight for norm in net.norms], net, [normal(i, "float32", 16) for i in (5, 6)])
    x, wanted = normal(1, "float32", 2, rows, 5), normal(2, "float32", 2, rows, 3)
    loss = lambda net, x: jnp.sum(wanted * jax.vmap(net.rows)(x))  # noqa: E731
    expected = jax.value_and_grad(loss, (0, 1))(net, x)
    request.getfixturevalue("gpu")
    assert ("normed_gradient" in str(jax.make_jaxpr(jax.grad(loss))(net, x))) == used
    found = jax.value_and_grad(loss, (0, 1))(net, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_nets_that_read_the_same(request):
    """Their first layers are one product and one kernel, where nothing is learned through them."""
    keys = jax.random.split(jax.random.key(0), 3)
    nets = [MLP(5, out, 16, layers, key) for out, layers, key in zip((8, 3, 1), (1, 2, 1), keys, strict=True)]
    nets = [
        eqx.tree_at(lambda net: (net.norms[0].weight, net.hidden[0].bias), net, (normal(i, "float32", 16),) * 2)
        for i, net in enumerate(nets)
    ]
    x = normal(9, "float32", ROWS, 5)
    read = lambda nets: [jax.vmap(net.biased)(y) for net, y in zip(nets, jax.vmap(lambda x: products(nets, x))(x))]  # noqa: B905, E731
    expected = [jax.vmap(net)(x) for net in nets]
    request.getfixturevalue("gpu")
    frozen = lowered(nets, "float32", frozen=True)
    assert "activated" not in str(jax.make_jaxpr(lambda: read(nets))())
    assert "activated" in str(jax.make_jaxpr(lambda: read(frozen))())
    for one, other in zip(read(frozen), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
