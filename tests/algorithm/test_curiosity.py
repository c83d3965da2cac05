"""Random network distillation: what is new, to whom, and how its reward is scaled."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codream.config import CuriosityConfig
from codream.curiosity import bonus, errors, init_curiosity, see, train_curiosity
from codream.envs import EnvSpec
from codream.moments import Moments

SPEC = EnvSpec("two", ("a", "b"), ((4,), (4,)), (2, 2))
# Places, one-hot: A goes to the first two, B to the third; nobody to the fourth.
PLACES = jnp.eye(4)
SEEN = jnp.stack([PLACES[jnp.array([0, 1])], PLACES[jnp.array([2, 2])]], axis=1)  # [n, agents, 4]
ALL = jnp.ones((2, 2), bool)


_errors = eqx.filter_jit(errors)
_init = eqx.filter_jit(init_curiosity)


def config_of(sharing, **changes):
    return CuriosityConfig(kind="rnd", sharing=sharing, units=16, layers=1, features=8, lr=3e-3, **changes)


def trained(sharing, valid=ALL, updates=400):
    config = config_of(sharing)
    curiosity = _init(SPEC, config, jax.random.key(0))
    curiosity = see(curiosity, jnp.broadcast_to(PLACES[:, None], (4, 2, 4)), jnp.ones((4, 2), bool))
    params, static = eqx.partition(curiosity, eqx.is_array)

    @jax.jit
    def run(params):
        def body(params, _):
            after, _ = train_curiosity(eqx.combine(params, static), SEEN, valid, config)
            return eqx.filter(after, eqx.is_array), None

        return jax.lax.scan(body, params, None, updates)[0]

    return curiosity, eqx.combine(run(params), static), config


def at_every_place(curiosity, config):
    """Errors [place, agent]."""
    return np.asarray(_errors(curiosity, jnp.broadcast_to(PLACES[:, None], (4, 2, 4)), config))


def test_what_any_has_seen_is_known_to_all_where_it_is_shared():
    before, after, config = trained("shared")
    fresh, known = at_every_place(before, config), at_every_place(after, config)
    np.testing.assert_array_equal(known[:, 0], known[:, 1])
    assert (known[:3] < 0.05 * fresh[:3]).all()
    assert (known[3] > 0.3 * fresh[3]).all()
    assert (known[3] > 5 * known[:3].max()).all()


def test_alone_each_knows_only_where_it_has_been():
    before, after, config = trained("individual")
    fresh, known = at_every_place(before, config), at_every_place(after, config)
    assert (known[:2, 0] < 0.05 * fresh[:2, 0]).all()
    assert known[2, 1] < 0.05 * fresh[2, 1]
    # B has a bonus where only A has been, and the other way round.
    assert (known[:2, 1] > 0.2 * fresh[:2, 1]).all()
    assert known[2, 0] > 0.2 * fresh[2, 0]


@pytest.mark.parametrize("sharing", ["shared", "individual", "hybrid"])
def test_the_target_never_moves(sharing):
    before, after, _ = trained(sharing, updates=20)
    for name in ("shared", "individual"):
        one, other = getattr(before, name), getattr(after, name)
        assert (one is None) == (other is None)
        if one is not None:
            arrays = [jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (one, other)]
            moved = [not np.array_equal(a, b) for a, b in zip(*arrays, strict=True)]
            targets = len(jax.tree.leaves(eqx.filter(one.target, eqx.is_array)))
            assert not any(moved[:targets])
            assert any(moved[targets:])


def test_hybrid_is_the_weighted_sum_of_both():
    config = config_of("hybrid", hybrid_weight=0.25)
    both = _init(SPEC, config, jax.random.key(0))
    shared = _init(SPEC, config_of("shared"), jax.random.key(0))
    own = _init(SPEC, config_of("individual"), jax.random.key(0))
    wanted = 0.25 * at_every_place(shared, config_of("shared")) + 0.75 * at_every_place(own, config_of("individual"))
    np.testing.assert_allclose(at_every_place(both, config), wanted, rtol=1e-5)


def test_invalid_observations_teach_nothing():
    _, after, config = trained("individual", valid=ALL.at[:, 1].set(False), updates=20)
    before, _, _ = trained("individual", updates=0)
    np.testing.assert_array_equal(at_every_place(after, config)[:, 1], at_every_place(before, config)[:, 1])
    assert not np.array_equal(at_every_place(after, config)[:, 0], at_every_place(before, config)[:, 0])


def test_padding_counts_for_nobody():
    """B's entries vary by 1 around 100; what A has not is no observation of theirs."""
    spec = EnvSpec("two", ("a", "b"), ((1,), (3,)), (2, 2))
    curiosity = _init(spec, config_of("shared"), jax.random.key(0))
    real = jnp.asarray(spec.obs_valid)
    obs = jnp.where(real, 100 + jax.random.normal(jax.random.key(1), (64, 2, 3)), 0.0)
    after = see(curiosity, obs, jnp.ones((64, 2), bool))
    np.testing.assert_allclose(after.obs.mean, 100, atol=0.5)
    np.testing.assert_allclose(after.obs.scale, 1, atol=0.3)
    other = jnp.where(real, obs, 7.0)
    np.testing.assert_array_equal(_errors(after, obs, config_of("shared")), _errors(after, other, config_of("shared")))


def test_the_bonus_is_in_units_of_its_own_returns():
    curiosity = _init(SPEC, config_of("shared"), jax.random.key(0))
    error = jax.random.uniform(jax.random.key(1), (16, 8, 2)) * jnp.array([1.0, 100.0])
    where = jnp.ones(error.shape, bool).at[3].set(False)
    reward, after = bonus(curiosity, error, where, 0.5)
    assert (np.asarray(reward)[3] == 0).all()
    sums = np.zeros(error.shape)
    for t in range(16):
        sums[t] = 0.5 * (sums[t - 1] if t else 0) + np.where(where[t], error[t], 0)
    scale = np.stack([sums[..., i][np.asarray(where)[..., i]].std() for i in range(2)])
    np.testing.assert_allclose(after.returns.scale, scale, rtol=1e-4)
    np.testing.assert_allclose(reward, np.where(where, error, 0) / scale, rtol=1e-4)


def test_off_means_nothing_is_made():
    assert init_curiosity(SPEC, CuriosityConfig(), jax.random.key(0)) is None


def test_images_have_an_encoder():
    images = EnvSpec("images", ("a", "b"), ((16, 16, 1),) * 2, (2, 2))
    config = config_of("hybrid")
    obs = jax.random.randint(jax.random.key(1), (3, 2, 16, 16, 1), 0, 256).astype(jnp.uint8)

    @eqx.filter_jit
    def found_in(obs):
        curiosity = init_curiosity(images, config, jax.random.key(0))
        return errors(see(curiosity, obs, jnp.ones((3, 2), bool)), obs, config)

    found = found_in(obs)
    assert found.shape == (3, 2)
    assert (np.asarray(found) > 0).all()


def test_running_moments_are_those_of_all_rows():
    x = np.random.default_rng(0).normal(3.0, 2.0, (40, 3)).astype(np.float32)
    where = np.random.default_rng(1).random((40, 3)) < 0.7
    moments = Moments.empty((3,))
    assert (np.asarray(moments.scale) == 1).all()
    for part in range(4):
        rows = slice(10 * part, 10 * part + 10)
        moments = moments.seen(jnp.asarray(x[rows]), jnp.asarray(where[rows]))
    for i in range(3):
        kept = x[where[:, i], i]
        np.testing.assert_allclose(moments.mean[i], kept.mean(), rtol=1e-5)
        np.testing.assert_allclose(moments.scale[i], kept.std(), rtol=1e-5)
    assert moments.count.sum() == where.sum()


def test_rounding_is_no_variation():
    """Of a large constant the squared deviations need not sum to 0."""
    moments = Moments.empty((3,)).seen(jnp.full((1024, 3), jnp.asarray([5.3, 20.3, 1000.1])), jnp.ones((1024, 3), bool))
    np.testing.assert_array_equal(moments.scale, 1.0)
