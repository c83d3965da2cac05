import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGES, SPEC, tiny

from codream.latents import change_bins, kl, symlog, unimix
from codream.linear import OneHots
from codream.representation import Categorical, Change, representation

KEY = jax.random.key(0)
VALID = jnp.asarray(SPEC.obs_valid)[1]  # three real entries of five
OBS = jnp.array([1.0, -2.0, 0.5, 0.0, 0.0])


def build(latent, **changes):
    return representation(SPEC, tiny(SPEC, {"latent": latent, **changes}).world_model, KEY)


@pytest.fixture(scope="module")
def categorical():
    return build("categorical")


@pytest.fixture(scope="module")
def change():
    return build("change")


def test_the_configuration_names_the_representation(categorical, change):
    assert isinstance(categorical, Categorical)
    assert categorical.size == 16
    assert isinstance(change, Change)
    assert change.size == SPEC.obs_size == 5


def test_a_categorical_latent_is_flat_one_hots_drawn_from_the_posterior(categorical):
    z, log_probs = jax.vmap(categorical.posterior, in_axes=(None, 0))(OBS, jax.random.split(KEY, 2000))
    groups = z.reshape(-1, 4, 4)
    np.testing.assert_allclose(groups.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(groups.max(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(groups.mean(0), jnp.exp(log_probs[0]), atol=0.05)
    assert jnp.exp(log_probs).min() >= 0.01 / 4 * 0.999


def test_padded_entries_count_for_no_loss(categorical, change):
    padded = OBS.at[3:].set(99.0)
    z, _ = categorical.posterior(OBS, KEY)
    assert categorical.reconstruction_loss(z, OBS, VALID) == categorical.reconstruction_loss(z, padded, VALID)
    prior = jax.random.normal(KEY, (5, 11))
    z, here, there = symlog(OBS), symlog(OBS + 0.1), symlog(padded + 0.1).at[:3].set(symlog(OBS + 0.1)[:3])
    loss = lambda z_next: change.transition_loss(prior, z, z_next, jnp.zeros(0), VALID)["dyn"]  # noqa: E731
    assert loss(here) == loss(there)
    assert loss(here) != loss(here + 0.2)


def test_reconstruction_loss_is_the_squared_error_after_symlog(categorical):
    z, _ = categorical.posterior(OBS, KEY)
    error = (symlog(categorical.decode(z)) - symlog(OBS))[:3]
    np.testing.assert_allclose(categorical.reconstruction_loss(z, OBS, VALID), jnp.sum(error**2), rtol=1e-4)


def test_the_dynamics_gradient_stops_on_the_posterior_side_and_rep_on_the_priors(categorical):
    def losses(prior, posterior):
        posterior = jax.nn.log_softmax(posterior)
        return categorical.transition_loss(prior, jnp.zeros(16), jnp.zeros(16), posterior, VALID)

    k1, k2 = jax.random.split(KEY)
    sides = 3 * jax.random.normal(k1, (4, 4)), 3 * jax.random.normal(k2, (4, 4))
    to_prior, to_posterior = jax.jit(jax.jacrev(losses, argnums=(0, 1)))(*sides)["dyn"]
    assert abs(to_prior).max() > 0.01
    assert (to_posterior == 0).all()
    to_prior, to_posterior = jax.jit(jax.jacrev(losses, argnums=(0, 1)))(*sides)["rep"]
    assert (to_prior == 0).all()
    assert abs(to_posterior).max() > 0.01
    value = losses(*sides)
    mixed, posterior = unimix(sides[0], categorical.unimix), jax.nn.log_softmax(sides[1])
    np.testing.assert_allclose(value["dyn"], kl(posterior, mixed), rtol=1e-5)
    assert value["dyn"] == value["rep"]


def test_below_the_free_nats_there_is_no_gradient(categorical):
    near = jax.nn.log_softmax(jnp.zeros((4, 4)).at[0, 0].set(0.5))
    uniform = jax.nn.log_softmax(jnp.zeros((4, 4)))
    assert 0 < kl(near, uniform) < 1

    def total(prior, posterior):
        losses = categorical.transition_loss(prior, jnp.zeros(16), jnp.zeros(16), posterior, VALID)
        return losses["dyn"] + losses["rep"]

    value, grads = jax.value_and_grad(total, argnums=(0, 1))(uniform, near)
    assert value == 2.0
    assert all((g == 0).all() for g in grads)


def test_the_latent_of_a_vector_is_the_vector(change):
    z, posterior = change.posterior(OBS, KEY)
    np.testing.assert_allclose(change.decode(z), OBS, atol=1e-6)
    assert posterior.size == 0
    assert change.reconstruction_loss(z, OBS, VALID) == 0
    assert change.transition_loss(jnp.zeros((5, 11)), z, z, posterior, VALID)["rep"] == 0


def test_a_change_of_nothing_costs_ln_bins_under_a_uniform_prior(change):
    z = symlog(OBS)
    loss = change.transition_loss(jnp.zeros((5, 11)), z, z, jnp.zeros(0), VALID)["dyn"]
    np.testing.assert_allclose(loss, 3 * np.log(11), rtol=1e-5)


def test_a_change_is_that_from_a_latent_to_the_next(change):
    """A prior that is sure of one bin is right of what moves by it, and wrong of what moves back."""
    prior, moves = jnp.full((5, 11), -30.0).at[:, 8].set(0.0), change_bins(11, 3.0)[8]
    z = symlog(OBS)
    loss = lambda z_next: change.transition_loss(prior, z, z_next, jnp.zeros(0), VALID)["dyn"]  # noqa: E731
    np.testing.assert_allclose([loss(z + moves), loss(z - moves)], [0.0, 3 * 30.0], atol=0.01)


def test_heads_see_which_points_are_near_each_other(change):
    """For each width one basis function for each point (near 0) and each two points, beside h and z."""
    h, o = jnp.ones(16), jnp.array([0.0, 0.0, 0.1, 0.0, 7.0])
    x = change.outcome_input(h, symlog(o))
    assert x.shape == (16 + change.outcome_size,) == (16 + 5 + 3 * (4 + 6),)
    near = x[16 + 5 :].reshape(3, 10) / 3
    # Points (0, 0), (0, 0.1), (0.1, 0), (0, 7); then pairs 01 02 03 12 13 23.
    squared = [0.0, 0.01, 0.01, 49, 0.01, 0.01, 49, 0.02, 47.61, 49.01]
    np.testing.assert_allclose(near, [np.exp(-np.array(squared) / w**2) for w in (0.05, 0.1, 0.2)], atol=1e-4)


def test_long_vectors_have_fewer_points():
    """All neighbours up to 24 entries, then every other place, and beyond 48 entries no pairs."""
    for size, vectors in ((24, 23 * 24 // 2), (26, 13 * 14 // 2), (50, 25), (1, 0)):
        spec = dataclasses.replace(SPEC, obs_shapes=((size,),) * SPEC.num_agents)
        assert (
            representation(spec, tiny(spec, {"latent": "change"}).world_model, KEY).outcome_size == size + 3 * vectors
        )


def test_next_adds_a_change_to_real_entries_only(change):
    bins = change_bins(11, 3.0)
    z = symlog(OBS)
    prior = jnp.full((5, 11), -1e9).at[:, 8].set(0.0)
    for z_next in (change.next(prior, z, VALID, KEY), change.next_mean(prior, z, VALID)):
        np.testing.assert_allclose(z_next - z, [bins[8]] * 3 + [0, 0], rtol=1e-5)


@pytest.mark.parametrize("latent", ["categorical", "change"])
def test_the_mean_of_sampled_nexts_is_next_mean(latent):
    code = build(latent)
    z, _ = code.posterior(OBS, KEY)
    prior = code.prior(jax.random.normal(KEY, (16,)), z)
    keys = jax.random.split(KEY, 4000)
    sampled = jax.jit(jax.vmap(lambda key: code.next(prior, z, VALID, key)))(keys)
    np.testing.assert_allclose(sampled.mean(0), code.next_mean(prior, z, VALID), atol=0.08)


def test_latents_as_data_are_drawn_from_the_same_distributions():
    """Of a code that is sure of itself, were it not for a large share of the uniform one."""
    code = build("categorical", unimix=0.4)
    code = eqx.tree_at(lambda c: c.encoder_out.out.weight, code, replace_fn=lambda w: 20 * w)
    obs, prior, z = 30 * OBS, 20 * jax.random.normal(KEY, (4, 4)), OneHots(jnp.zeros(4, int), 4)

    @jax.jit
    def drawn(keys):
        draw = lambda key: (code.encode(obs, key).index, code.next(prior, z, VALID, key).index)  # noqa: E731
        probs = jnp.exp(code.posterior(obs, KEY)[1]), code.next_mean(prior, z, VALID).reshape(4, 4)
        return list(zip(jax.vmap(draw)(keys), probs, strict=True))

    for index, probs in drawn(jax.random.split(KEY, 2000)):
        np.testing.assert_allclose(np.eye(4)[np.asarray(index)].mean(axis=0), probs, atol=0.05)


def test_both_latent_gradients_reach_the_encoder():
    for gradient in ("straight_through", "gumbel"):
        code = build("categorical", latent_gradient=gradient)
        grads = eqx.filter_jit(eqx.filter_grad(lambda c: c.posterior(OBS, KEY)[0] @ jnp.arange(16.0)))(code)
        assert max(abs(g).max() for g in jax.tree.leaves(grads.encoder)) > 0


def test_images_are_coded_from_integers_and_decoded_to_their_range():
    code = representation(IMAGES, tiny(IMAGES).world_model, KEY)
    assert isinstance(code, Categorical)
    obs = jax.random.randint(KEY, IMAGES.obs_shape, 0, 256).astype(jnp.uint8)
    valid = jnp.asarray(IMAGES.obs_valid)[0]

    @eqx.filter_jit
    def there_and_back(code, obs):
        z, _ = code.posterior(obs, KEY)
        return code.decode(z), code.observed(obs), code.reconstruction_loss(z, obs, valid)

    decoded, seen, loss = there_and_back(code, obs)
    assert decoded.shape == IMAGES.obs_shape
    np.testing.assert_allclose([seen.min(), seen.max()], [-0.5, 0.5], atol=0.02)
    np.testing.assert_allclose(loss, jnp.sum((decoded / 255.0 - 0.5 - seen) ** 2), rtol=1e-4)
