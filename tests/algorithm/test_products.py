"""Products of bfloat16 with sums in float32, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream.flops import count_flops
from codream.linear import Linear, OneHots, joined, linear, lowered
from codream.products import rounded_product


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def exact(x, weight):
    """The same of factors rounded beforehand, all in float32."""
    return rounded(x) @ rounded(weight).T


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("of", ["x", "x and weight", "weight"])
def test_a_batch_is_each_by_itself(of):
    """Whichever of the factors a batch has, by however many axes."""
    x, weight = normal(0, 3, 2, 5, 8), normal(1, 3, 4, 8)
    axes = {"x": (0, None), "x and weight": (0, 0), "weight": (None, 0)}[of]
    x, weight = (x if axes[0] == 0 else x[0]), (weight if axes[1] == 0 else weight[0])
    one = lambda f: jax.vmap(lambda x, w: jax.vmap(lambda row: f(row, w), 1, 1)(x), axes)(x, weight)  # noqa: E731
    np.testing.assert_allclose(one(rounded_product), one(exact), rtol=1e-6, atol=1e-6)
    assert one(rounded_product).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_products_of_rounded_factors(dtype):
    """Of x and weight, seen through a batch and through several agents' weights; each in its own dtype."""
    x, weight, grad = normal(0, 5, 8), normal(1, 3, 4, 8).astype(dtype), normal(2, 3, 5, 4)

    def loss(weight, x, grad):
        return jnp.sum(jax.vmap(lambda row: rounded_product(row, weight))(x) * grad)

    d_weight, d_x = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None, 0)))(weight, x, grad)
    assert (d_weight.dtype, d_x.dtype) == (weight.dtype, x.dtype)
    expected = jnp.einsum("abo,bi->aoi", rounded(grad), rounded(x)).astype(dtype)
    np.testing.assert_allclose(d_weight.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(d_x, jnp.einsum("abo,aoi->abi", rounded(grad), rounded(weight)), rtol=1e-5, atol=1e-5)


def test_a_lowered_layer_multiplies_in_bfloat16_and_gives_float32():
    layer = linear(2 * 8 + 3, 6, jax.random.key(0))
    codes, rest = OneHots(jax.random.randint(jax.random.key(1), (5, 2), 0, 8), 8), normal(2, 5, 3)
    x = joined(codes, rest)

    def output(layer: Linear):
        return lowered(layer, "bfloat16")(x)

    y = output(layer)
    flat = jnp.concatenate([codes.flat(), rest], axis=-1)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact(flat, layer.weight), rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda layer: jnp.sum(output(layer) ** 2))(layer).weight
    expected = jax.grad(lambda w: jnp.sum((flat @ w.T) ** 2))(layer.weight)
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, expected, rtol=0.05, atol=0.05)


def test_operations_are_counted():
    assert count_flops(rounded_product, jnp.zeros((5, 7, 8)), jnp.zeros((4, 8))) == 2 * 5 * 7 * 8 * 4
