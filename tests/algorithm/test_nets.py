import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream.attention import _put
from codream.linear import Joined, OneHots, dense, joined, linear, lowered
from codream.nets import CNN, MLP, DeconvCNN, KVCache, Transformer, _double, _halve

TIME, SIZE = 10, 16
X = jax.random.normal(jax.random.key(0), (TIME, SIZE))
SEGMENT = jnp.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
VALID = jnp.ones(TIME, bool)
ONE = jnp.zeros(TIME, int)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def transformer():
    return Transformer(SIZE, 2, 2, jax.random.key(1))


@eqx.filter_jit
def full(net, x, segment, valid, room=0):
    return net.full(x, segment, valid, room)


@eqx.filter_jit
def steps(net, x, cleared, cache):
    """Token by token; the cache is cleared before those marked so."""

    def body(cache, inputs):
        token, clear = inputs
        y, cache = net.step(token, cache.cleared(clear))
        return cache, y

    return jax.lax.scan(body, cache, (x, cleared))[1]


def test_stepping_with_the_cache_equals_the_full_pass(transformer):
    expected, _ = full(transformer, X, ONE, VALID)
    got = steps(transformer, X, jnp.zeros(TIME, bool), transformer.empty_cache(TIME))
    np.testing.assert_allclose(got, expected, **CLOSE)


def test_clearing_the_cache_equals_a_new_segment(transformer):
    expected, _ = full(transformer, X, SEGMENT, VALID)
    cleared = jnp.concatenate([jnp.array([True]), SEGMENT[1:] != SEGMENT[:-1]])
    got = steps(transformer, X, cleared, transformer.empty_cache(TIME))
    np.testing.assert_allclose(got, expected, **CLOSE)


def test_positions_are_relative(transformer):
    expected = steps(transformer, X, ONE.astype(bool), transformer.empty_cache(TIME))
    far = eqx.tree_at(lambda c: c.position, transformer.empty_cache(TIME), jnp.asarray(37, jnp.int32))
    np.testing.assert_allclose(steps(transformer, X, ONE.astype(bool), far), expected, **CLOSE)
    # A window that starts later sees the same, if what came before was another episode.
    whole, _ = full(transformer, X, SEGMENT, VALID)
    padded = jnp.concatenate([X[4:], X[:4]])
    window, _ = full(transformer, padded, ONE, VALID)
    np.testing.assert_allclose(window[:6], whole[4:], **CLOSE)


def test_a_ring_shorter_than_the_sequence_is_a_sliding_window():
    # With one layer, what a token sees is exactly its window.
    net = Transformer(SIZE, 1, 2, jax.random.key(2))
    ring = 4
    got = steps(net, X, jnp.zeros(TIME, bool), net.empty_cache(ring))
    for t in range(ring - 1, TIME):
        window, _ = full(net, X[t - ring + 1 : t + 1], ONE[:ring], VALID[:ring])
        np.testing.assert_allclose(got[t], window[-1], **CLOSE)


@pytest.mark.parametrize("valid", [VALID, VALID.at[1].set(False).at[5].set(False)], ids=["all", "some invalid"])
def test_stepping_on_from_a_prefill_equals_the_full_pass(transformer, valid):
    expected, _ = full(transformer, X, SEGMENT, valid)
    start = 7
    _, cache = full(transformer, X[:start], SEGMENT[:start], valid[:start], TIME - start)
    assert cache.valid.shape == (TIME,)
    got = steps(transformer, X[start:], jnp.zeros(TIME - start, bool), cache)
    np.testing.assert_allclose(got, expected[start:], **CLOSE)


def test_the_previous_episode_changes_no_output_bit_for_bit(transformer):
    other = X.at[:4].set(1e3 * X[:4] + 7)
    here, cache = full(transformer, X, SEGMENT, VALID)
    there, other_cache = full(transformer, other, SEGMENT, VALID)
    assert (here[4:] == there[4:]).all()
    assert not (here[:4] == there[:4]).all()
    keep = SEGMENT == 1
    assert (cache.valid == keep).all()
    np.testing.assert_array_equal(cache.keys[1][:, keep], other_cache.keys[1][:, keep])


def test_later_and_invalid_tokens_change_no_output_bit_for_bit(transformer):
    here, _ = full(transformer, X, ONE, VALID.at[3].set(False))
    there, _ = full(transformer, X.at[3].add(5.0).at[8].add(5.0), ONE, VALID.at[3].set(False))
    same = np.asarray((here == there).all(axis=1))
    np.testing.assert_array_equal(same, [i not in (3, 8, 9) for i in range(TIME)])


def test_a_batch_of_caches_shares_one_position(transformer):
    axes = KVCache.axes()
    caches = jax.vmap(lambda _: transformer.empty_cache(TIME), out_axes=axes)(jnp.zeros(3))
    assert caches.position.shape == ()
    batched = jax.jit(jax.vmap(lambda x, c: transformer.step(x, c), in_axes=(0, axes), out_axes=(0, axes)))
    xs = jnp.stack([X, 2 * X, -X])
    for t in range(3):
        got, caches = batched(xs[:, t], caches)
    assert caches.position == 3
    for b in range(3):
        alone = steps(transformer, xs[b], jnp.zeros(TIME, bool), transformer.empty_cache(TIME))
        np.testing.assert_allclose(got[b], alone[2], **CLOSE)


def test_weights_start_with_variance_gain_over_fan_in():
    layer = linear(400, 300, jax.random.key(3), gain=0.5)
    np.testing.assert_allclose(jnp.std(layer.weight), np.sqrt(0.5 / 400), rtol=0.02)
    assert (layer.bias == 0).all()
    assert (MLP(3, 4, 8, 2, jax.random.key(4), out_gain=0.0)(jnp.ones(3)) == 0).all()


def test_mlp_without_hidden_layers_is_linear():
    net = MLP(3, 4, 8, 0, jax.random.key(5))
    np.testing.assert_allclose(net(2 * jnp.ones(3)), 2 * net(jnp.ones(3)), rtol=1e-6)


def kernel_of(matrix, channels):
    """The 4 × 4 kernel of a dense layer on patches: rows and columns are (block, place within the block)."""
    kernel = matrix.reshape(2, 2, 2, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    return kernel.reshape(4, 4, channels, -1)


DIMS = ("NHWC", "HWIO", "NHWC")


def test_halve_and_a_dense_layer_are_a_convolution():
    x = jax.random.normal(jax.random.key(6), (8, 12, 3))
    layer = linear(16 * 3, 5, jax.random.key(7))
    got = jax.vmap(jax.vmap(layer))(_halve(x))
    kernel = kernel_of(layer.weight.T, 3)
    expected = jax.lax.conv_general_dilated(x[None], kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=DIMS)
    assert got.shape == (4, 6, 5)
    np.testing.assert_allclose(got, expected[0], **CLOSE)


def test_double_is_a_transposed_convolution():
    x = jax.random.normal(jax.random.key(8), (3, 5, 4))
    layer = linear(4, 16 * 2, jax.random.key(9))
    got = _double(x, layer)
    kernel = kernel_of(layer.weight, 2).transpose(0, 1, 3, 2)  # [4, 4, in, out]
    expected = jax.lax.conv_transpose(x[None], kernel[::-1, ::-1], (2, 2), ((2, 2), (2, 2)), dimension_numbers=DIMS)
    assert got.shape == (6, 10, 2)
    np.testing.assert_allclose(got, expected[0], **CLOSE)


def test_image_networks_have_the_shapes_that_they_say():
    shape = (32, 16, 3)
    encoder = CNN(shape, 2, jax.random.key(10))
    flat = eqx.filter_eval_shape(encoder, jnp.zeros(shape))
    assert flat.shape == (encoder.out_size,) == (2 * 1 * 16,)
    decoder = DeconvCNN(7, shape, 2, jax.random.key(11))
    assert eqx.filter_eval_shape(decoder, jnp.zeros(7)).shape == shape


def test_an_image_that_cannot_be_halved_four_times_is_refused():
    with pytest.raises(ValueError, match=r"multiples of 16, got \(84, 84, 3\)"):
        CNN((84, 84, 3), 2, jax.random.key(12))


def test_a_width_that_rotary_positions_cannot_pair_is_refused():
    from codream.config import Config, ConfigError, WorldModelConfig

    with pytest.raises(ConfigError, match="multiple of 2"):
        Config(world_model=WorldModelConfig(hidden=18, heads=4))


# ------------------------------------------------------------------------------------------ one-hots as indices


def test_indices_mean_the_same_to_a_layer_as_their_one_hots_gradient_included():
    net = MLP(3 * 4 + 5, 6, 8, 1, jax.random.key(0))
    codes = OneHots(jax.random.randint(jax.random.key(1), (7, 3), 0, 4).astype(jnp.uint8), 4)
    rest = jax.random.normal(jax.random.key(2), (7, 5))
    x = joined(codes, rest)
    assert isinstance(x, Joined)
    np.testing.assert_array_equal(dense(x)[:, :12].sum(axis=1), 3)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(net, x):
        return jnp.sum(jnp.sin(net.rows(x)))

    for got, expected in zip(jax.tree.leaves(loss(net, x)), jax.tree.leaves(loss(net, dense(x))), strict=True):
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_frozen_layers_of_all_agents_give_the_same():
    """Their rows lie together then, where one-hot vectors pick some."""
    layers = eqx.filter_vmap(lambda key: linear(2 * 8 + 7, 6, key))(jax.random.split(jax.random.key(0), 3))
    codes = OneHots(jax.random.randint(jax.random.key(1), (3, 5, 2), 0, 8), 8)
    x = joined(codes, jax.random.normal(jax.random.key(2), (3, 5, 7)))
    frozen = lowered(layers, "float32", frozen=True)
    assert frozen.rows.shape == (3, 23, 6)
    each = eqx.filter_vmap(lambda layer, x: layer(x))
    np.testing.assert_array_equal(each(frozen, x), each(layers, x))


def test_a_prefill_is_the_end_of_the_full_pass(transformer):
    expected, cache = full(transformer, X, SEGMENT, VALID, 2)
    last, got = eqx.filter_jit(lambda net: net.prefill(X, SEGMENT, VALID, 2))(transformer)
    np.testing.assert_allclose(last, expected[-1], **CLOSE)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def test_on_an_accelerator_layers_of_any_size_give_the_same(monkeypatch):
    """Products are padded to whole tiles there, and one-hot vectors multiplied."""
    layer = linear(2 * 40 + 7, 70, jax.random.key(0))
    codes = OneHots(jax.random.randint(jax.random.key(1), (5, 2), 0, 40), 40)
    x = joined(codes, jax.random.normal(jax.random.key(2), (5, 7)))

    def value_and_grad(first):
        return eqx.filter_value_and_grad(lambda layer: jnp.sum(first(layer)(x) ** 2))(layer)

    here = value_and_grad(lambda layer: layer)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for first in (lambda layer: layer, lambda layer: lowered(layer, "float32")):
        there = value_and_grad(first)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), here, there)
    assert lowered(layer, "bfloat16").weight.shape == (128, 128)


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_puts_its_rows_where_each_would(shared):
    rows, row = jnp.zeros((3, 2, 5, 4)), jax.random.normal(jax.random.key(0), (3, 2, 4))
    slot = jnp.asarray(2) if shared else jnp.array([0, 4, 2])
    put = jax.vmap(_put(1), (0, 0, None if shared else 0))
    expected = np.zeros(rows.shape)
    for i, at in enumerate(np.broadcast_to(slot, 3)):
        expected[i, :, at] = row[i]
    np.testing.assert_array_equal(put(rows, row, slot), expected)
    text = str(jax.make_jaxpr(put)(rows, row, slot))
    assert ("scatter" in text) != shared
