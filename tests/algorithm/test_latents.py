import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream.latents import (
    change_bins,
    kl,
    sample_index,
    sample_onehot,
    symexp,
    symlog,
    two_hot,
    two_hot_loss,
    two_hot_mean,
    unimix,
    value_bins,
)


def test_symexp_inverts_symlog():
    x = jnp.array([-1e4, -10.0, -0.3, 0.0, 1e-3, 1.0, 20.0, 1e4])
    np.testing.assert_allclose(symexp(symlog(x)), x, rtol=1e-5)
    np.testing.assert_allclose(symlog(jnp.array([0.0, np.e - 1, 1 - np.e])), [0.0, 1.0, -1.0], atol=1e-6)


def test_two_hot_against_hand_computed_numbers():
    bins = np.array([-2.0, 0.0, 1.0, 5.0], np.float32)
    x = jnp.array([-1.5, 0.0, 0.25, 1.0, 4.0, 9.0, -7.0])
    expected = [
        [0.75, 0.25, 0, 0],
        [0, 1, 0, 0],
        [0, 0.75, 0.25, 0],
        [0, 0, 1, 0],
        [0, 0, 0.25, 0.75],
        [0, 0, 0, 1],  # beyond the last bin: clipped
        [1, 0, 0, 0],
    ]
    np.testing.assert_allclose(two_hot(x, bins), expected, atol=1e-6)


@pytest.mark.parametrize("bins", [value_bins(63), change_bins(41, 3.0)], ids=["value", "change"])
def test_mean_of_two_hot_is_the_value(bins):
    x = jnp.linspace(-2.9, 2.9, 41)
    np.testing.assert_allclose(two_hot_mean(jnp.log(two_hot(x, bins) + 1e-30), bins), x, atol=2e-5)


def test_two_hot_loss_is_the_cross_entropy():
    bins = np.array([-1.0, 0.0, 1.0], np.float32)
    logits = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    expected = -(0.75 * np.log(0.5) + 0.25 * np.log(0.3))
    np.testing.assert_allclose(two_hot_loss(logits, jnp.array(0.25), bins), expected, rtol=1e-6)


@pytest.mark.parametrize("count", [15, 63, 255])
def test_value_bins_hold_an_exact_zero_and_are_symmetric(count):
    bins = value_bins(count)
    assert bins[count // 2] == 0.0
    np.testing.assert_array_equal(bins, -bins[::-1])
    np.testing.assert_allclose(np.diff(np.asarray(symlog(jnp.asarray(bins)))), 30 / (count - 1), rtol=1e-3)


def test_a_symmetric_distribution_has_mean_exactly_zero():
    for bins in (value_bins(255), value_bins(64), change_bins(41, 3.0)):
        assert two_hot_mean(jnp.zeros(len(bins)), bins) == 0.0


def test_change_bins_are_finest_around_zero():
    bins = change_bins(41, 3.0)
    gaps = np.diff(bins)
    assert bins[20] == 0.0
    np.testing.assert_allclose([bins[0], bins[-1]], [-3.0, 3.0], rtol=1e-5)
    assert (np.diff(gaps[20:]) > 0).all()


def test_samples_have_the_frequencies_of_their_probabilities():
    probs = np.array([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    n = 40_000
    log_probs = jnp.broadcast_to(jnp.where(probs > 0, jnp.log(jnp.maximum(probs, 1e-30)), -1e9), (n, 6))
    counts = np.bincount(np.asarray(sample_index(jax.random.key(0), log_probs)), minlength=6)
    assert counts[probs == 0].sum() == 0, "an impossible class was drawn"
    chi2 = ((counts - n * probs)[probs > 0] ** 2 / (n * probs[probs > 0])).sum()
    assert chi2 < 16.3  # the 99.9 % point with 3 degrees of freedom


def test_the_only_possible_class_is_always_drawn():
    for only in (0, 3, 6):
        log_probs = jnp.where(jnp.arange(7) == only, 0.0, -1e9)
        drawn = sample_index(jax.random.key(1), jnp.broadcast_to(log_probs, (1000, 7)))
        assert (np.asarray(drawn) == only).all()


def test_samples_of_a_batch_are_independent():
    drawn = np.asarray(sample_index(jax.random.key(2), jnp.zeros((20_000, 2, 2))))
    together = np.bincount(2 * drawn[:, 0] + drawn[:, 1], minlength=4)
    assert abs(together / 20_000 - 0.25).max() < 0.015


LOGITS = jnp.array([[1.0, -0.5, 0.3], [0.0, 2.0, -1.0]])
WEIGHTS = jnp.array([[1.0, 2.0, -1.0], [0.5, -3.0, 0.2]])


@pytest.mark.parametrize("gradient", ["straight_through", "gumbel"])
def test_a_sample_is_a_hard_one_hot(gradient):
    samples = jax.vmap(lambda key: sample_onehot(key, unimix(LOGITS, 0.01), gradient))(
        jax.random.split(jax.random.key(3), 4000)
    )
    np.testing.assert_allclose(np.sort(samples, axis=-1), np.broadcast_to([0.0, 0, 1], samples.shape), atol=1e-6)
    np.testing.assert_allclose(samples.mean(0), jnp.exp(unimix(LOGITS, 0.01)), atol=0.03)


def test_straight_through_has_the_gradient_of_the_probabilities():
    sampled = jax.grad(lambda x: jnp.sum(WEIGHTS * sample_onehot(jax.random.key(4), unimix(x, 0.01))))
    exact = jax.grad(lambda x: jnp.sum(WEIGHTS * jnp.exp(unimix(x, 0.01))))
    np.testing.assert_allclose(sampled(LOGITS), exact(LOGITS), rtol=1e-5)


def test_gumbel_has_the_gradient_of_its_own_softmax():
    key = jax.random.key(5)
    noise = jax.random.gumbel(key, LOGITS.shape)
    sampled = jax.grad(lambda x: jnp.sum(WEIGHTS * sample_onehot(key, jax.nn.log_softmax(x), "gumbel")))
    soft = jax.grad(lambda x: jnp.sum(WEIGHTS * jax.nn.softmax(x + noise)))
    np.testing.assert_allclose(sampled(LOGITS), soft(LOGITS), rtol=1e-4, atol=1e-6)
    hard = sample_onehot(key, jax.nn.log_softmax(LOGITS), "gumbel")
    np.testing.assert_array_equal(jnp.argmax(hard, -1), jnp.argmax(LOGITS + noise, -1))


def test_unimix_gives_every_class_its_share():
    probs = jnp.exp(unimix(jnp.array([100.0, 0.0, 0.0, 0.0]), 0.01))
    np.testing.assert_allclose(probs, [0.99 + 0.0025, 0.0025, 0.0025, 0.0025], rtol=1e-5)
    np.testing.assert_allclose(unimix(LOGITS, 0.0), jax.nn.log_softmax(LOGITS))


def test_kl_against_hand_computed_numbers():
    p, q = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]])), jnp.log(jnp.array([[0.25, 0.75], [0.9, 0.1]]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(kl(p, q), expected, rtol=1e-5)
    np.testing.assert_allclose(kl(p, p), 0.0, atol=1e-7)


@pytest.mark.parametrize("classes", [5, 41])
def test_an_accelerator_draws_the_same(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its running sums are other programs."""
    logits = jax.random.normal(jax.random.key(0), (512, classes))
    here = sample_index(jax.random.key(1), logits)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    there = sample_index(jax.random.key(1), logits)
    assert np.mean(np.asarray(here) == np.asarray(there)) > 0.995  # a class on the border may be the next
