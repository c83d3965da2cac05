import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_envs import Mixed

from codream.envs import EnvSpec, TimeStep
from codream.model_quality import sequences_of
from codream.replay import Replay, sample_recent, sample_starts, sequences

SPEC = EnvSpec("numbered", ("a", "b"), ((2,), (1,)), (9, 9))
ROWS, COPIES = 6, 3


def step_number(t, first=False, last=False, acting=True):
    """An answer that says in every field of what step, copy and agent it is."""
    copy, agent = jnp.meshgrid(jnp.arange(COPIES), jnp.arange(2), indexing="ij")
    code = 100.0 * t + 10 * copy + agent
    return TimeStep(
        obs=jnp.stack([code, -code], -1),
        mask=jnp.ones((COPIES, 2, 9), bool),
        reward=code - 100.0,  # that of the step which led here
        terminal=(jnp.asarray(code) % 2 == 1),
        acting=jnp.full((COPIES, 2), acting),
        first=jnp.full(COPIES, first),
        last=jnp.full(COPIES, last),
    )


@pytest.fixture(scope="module")
def filled():
    """Ten steps through a ring of six; an episode ends with the observation of step 6."""
    replay = Replay.empty(SPEC, ROWS, COPIES)
    add = eqx.filter_jit(Replay.add)
    for t in range(10):
        here = step_number(t, first=t in (0, 7), acting=t != 6)
        action = jnp.full((COPIES, 2), t % 9)
        replay = add(replay, here, action, step_number(t + 1, first=t + 1 == 7, last=t + 1 == 6))
    return replay


read = eqx.filter_jit(sequences)


def windows(replay, age, copy, focal, length):
    """`sequences` for windows that are given one by one."""
    return read(replay, jnp.asarray(age), jnp.asarray(copy), jnp.asarray(focal), length)


def test_the_ring_keeps_the_latest_steps(filled):
    assert (int(filled.next), int(filled.filled)) == (10 % ROWS, ROWS)
    got = windows(filled, [5] * 6, [0, 0, 1, 1, 2, 2], [0, 1] * 3, ROWS)
    steps = np.arange(4, 10)
    for i, (copy, agent) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]):
        np.testing.assert_array_equal(got.obs[i, :, 0], 100 * steps + 10 * copy + agent)
        np.testing.assert_array_equal(got.obs[i, :, 1], -got.obs[i, :, 0])


def test_every_field_of_a_row_is_of_the_same_step(filled):
    got = windows(filled, [5], [1], [1], ROWS)
    acted = np.array([True, True, False, True, True, True])  # steps 4 … 9, where 6 is a last observation
    np.testing.assert_array_equal(got.acting[0], np.stack([acted, acted], 1))
    # Reward and end are those of the step taken from here.
    np.testing.assert_array_equal(got.reward[0], np.where(acted, 100.0 * np.arange(4, 10) + 11, 0))
    np.testing.assert_array_equal(got.terminal[0], acted)
    np.testing.assert_array_equal(got.action[0, :, 0], np.where(acted, np.arange(4, 10) % 9, 0))
    # The oldest kept row starts an episode of its own, as its past is lost.
    np.testing.assert_array_equal(got.first[0], [True, False, False, True, False, False])
    np.testing.assert_array_equal(jax.vmap(lambda s: s.segment)(got)[0], [1, 1, 1, 2, 2, 2])
    assert got.focal[0] == 1


def test_a_recording_is_read_as_a_ring_of_its_steps_is():
    """Of the first episode, which ends with the observation of step 3; what comes after it does not count."""
    steps = [step_number(t, first=t in (0, 4), last=t == 3, acting=t != 3) for t in range(ROWS)]
    steps = [eqx.tree_at(lambda s: s.terminal, s, jnp.full((COPIES, 2), t == 3)) for t, s in enumerate(steps)]
    actions = [np.full((COPIES, 2), t) + np.arange(2) for t in range(ROWS - 1)]
    replay, add = Replay.empty(SPEC, ROWS, COPIES), eqx.filter_jit(Replay.add)
    for action, here, there in zip(actions, steps[:-1], steps[1:], strict=True):
        replay = add(replay, here, jnp.asarray(action), there)
    ring = windows(replay, [ROWS - 2] * 6, [0, 0, 1, 1, 2, 2], [0, 1] * 3, ROWS - 1)
    got = sequences_of([jax.tree.map(np.asarray, step) for step in steps], actions, 2)
    np.testing.assert_array_equal(got.focal, ring.focal)
    for field in ("obs", "first"):
        np.testing.assert_array_equal(getattr(got, field)[:, :-1], getattr(ring, field), err_msg=field)
    for field in ("action", "reward", "terminal", "acting"):
        np.testing.assert_array_equal(getattr(got, field)[:, :3], getattr(ring, field)[:, :3], err_msg=field)
    assert np.asarray(got.terminal)[:, :3].any()
    assert not np.asarray(got.acting)[:, 3:].any()


def test_row_of_counts_back_from_the_newest(filled):
    np.testing.assert_array_equal(filled.obs[filled.row_of(jnp.arange(3)), 0, 0, 0], [900, 800, 700])


@pytest.mark.parametrize("steps", [3, 10])
def test_rows_before_the_oldest_are_masked(steps):
    """Both in a ring that is not full yet and in one that has lost its oldest rows."""
    replay = Replay.empty(SPEC, ROWS, COPIES)
    for t in range(steps):
        replay = replay.add(step_number(t), jnp.zeros((COPIES, 2), int), step_number(t + 1))
    kept = min(steps, ROWS)
    got = windows(replay, [kept + 1], [0], [0], 4)  # two rows too many
    np.testing.assert_array_equal(got.acting[0, :, 0], [False, False, True, True])
    np.testing.assert_array_equal(got.first[0], [False, False, True, False])
    np.testing.assert_array_equal(got.obs[0, 2:, 0], [100 * (steps - kept), 100 * (steps - kept + 1)])


def test_masks_are_kept_where_the_environment_has_them():
    env = Mixed()
    state, here = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), COPIES))
    replay = Replay.empty(env.spec, ROWS, COPIES)
    keys = jax.random.split(jax.random.key(1), COPIES)
    _, there = jax.vmap(env.step)(keys, state, jnp.zeros((COPIES, 3), int))
    replay = replay.add(here, jnp.zeros((COPIES, 3), int), there)
    got = windows(replay, [0] * 3, [0, 1, 2], [2, 2, 2], 1)
    np.testing.assert_array_equal(got.mask[:, 0], here.mask[:, 2])
    assert Replay.empty(SPEC, ROWS, COPIES).mask is None


# ------------------------------------------------------------------------------------------ sampling


def ring(rows, copies, filled):
    replay = Replay.empty(EnvSpec("bare", ("a",), ((1,),), (2,)), rows, copies)
    return eqx.tree_at(lambda r: r.filled, replay, jnp.asarray(filled))


@eqx.filter_jit
def draw(replay, count, length, decay, keys):
    return jax.vmap(lambda key: sample_recent(replay, count, length, decay, key))(keys)


def chi2(counts, probs):
    expected = counts.sum() * probs
    assert counts[probs == 0].sum() == 0
    return (((counts - expected) ** 2)[probs > 0] / expected[probs > 0]).sum()


@pytest.mark.parametrize(("copies", "decay", "filled"), [(1, 0.9, 12), (3, 0.97, 12), (2, 1.0, 9)])
def test_windows_are_drawn_by_decay_to_the_power_of_their_age(copies, decay, filled):
    """The age is that of the window's newest step, in environment steps; each row is `copies` of them."""
    length, n = 4, 20_000
    keys = jax.random.split(jax.random.key(3), n)
    age, copy = draw(ring(12, copies, filled), 1, length, jnp.asarray(decay), keys)
    newest = np.asarray(age[:, 0]) - length + 1
    ends = filled - length + 1
    weights = decay ** (copies * np.arange(ends))
    probs = np.repeat(weights, copies) / (copies * weights.sum())
    counts = np.bincount(newest * copies + np.asarray(copy[:, 0]), minlength=ends * copies)
    places = ends * copies - 1
    assert chi2(counts, probs) < places + 4.5 * np.sqrt(2 * places) + 5


def test_a_second_window_is_drawn_among_those_that_overlap_no_first():
    """Against the closed form: P(first) · P(second | free of first), summed over the first."""
    length, rows, decay, n = 2, 6, 0.8, 20_000
    age, _ = draw(ring(rows, 1, rows), 2, length, jnp.asarray(decay), jax.random.split(jax.random.key(4), n))
    ends = rows - length + 1
    weight = decay ** np.arange(ends)
    probs = np.zeros((ends, ends))
    for first in range(ends):
        free = np.where(abs(np.arange(ends) - first) >= length, weight, 0)
        probs[first] = weight[first] / weight.sum() * free / free.sum()
    pairs = np.asarray(age) - length + 1
    counts = np.bincount(pairs[:, 0] * ends + pairs[:, 1], minlength=ends * ends)
    assert chi2(counts, probs.ravel()) < 12 + 4.5 * np.sqrt(24)


# A few shapes only, since each is compiled once; everything else is data.
SHAPES = [(30, 1, 3, 4), (30, 2, 5, 3), (41, 1, 5, 4), (20, 4, 6, 7), (9, 3, 3, 8), (200, 2, 8, 9)]


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    spare=st.integers(0, 200),
    decay=st.floats(0.5, 1.0),
    seed=st.integers(0, 2**31 - 1),
)
def test_windows_of_a_batch_never_overlap(shape, spare, decay, seed):
    """At any fill that surely has room: each window blocks at most 2 · length − 1 places of one copy."""
    rows, copies, count, length = shape
    in_one_copy = -(-count // copies)
    least = (in_one_copy - 1) * (2 * length - 1) + length
    assert least <= rows
    filled = min(rows, least + spare)
    age, copy = draw(
        ring(rows, copies, filled),
        count,
        length,
        jnp.asarray(decay),
        jax.random.split(jax.random.key(seed), 1),
    )
    taken = set()
    for start, where in zip(np.asarray(age[0]), np.asarray(copy[0]), strict=True):
        assert start < filled, "reaches beyond the oldest row"
        assert start - length + 1 >= 0, "reaches beyond the newest row"
        places = {(where, start - k) for k in range(length)}
        assert not places & taken
        taken |= places


def test_a_ring_without_an_inch_to_spare_is_packed():
    """One window fits exactly; two copies hold exactly one each."""
    keys = jax.random.split(jax.random.key(5), 20)
    age, copy = draw(ring(8, 2, 8), 2, 8, jnp.asarray(0.9), keys)
    assert (np.asarray(age) == 7).all()
    assert (np.sort(np.asarray(copy), axis=1) == [0, 1]).all()


def test_weights_that_underflow_still_draw_what_is_free():
    """0.5 to the power of thousands is 0 in float32; old windows are drawn when the recent are taken."""
    age, _ = draw(ring(3000, 1, 3000), 15, 100, jnp.asarray(0.5), jax.random.split(jax.random.key(6), 20))
    for ages in np.sort(np.asarray(age), axis=1):
        assert (np.diff(ages) >= 100).all()


def test_starts_are_uniform_over_the_steps_on_which_the_agent_acted():
    replay = Replay.empty(SPEC, 8, 2)
    acting = jax.random.bernoulli(jax.random.key(7), 0.6, replay.acting.shape)
    replay = eqx.tree_at(lambda r: (r.acting, r.next, r.filled), replay, (acting, jnp.asarray(3), jnp.asarray(7)))
    for agent in (0, 1):
        age, copy = eqx.filter_jit(sample_starts)(replay, jnp.asarray(agent), 20_000, jax.random.key(8))
        ages, copies = np.meshgrid(np.arange(8), np.arange(2), indexing="ij")
        acted = np.asarray(acting)[np.asarray(replay.row_of(jnp.asarray(ages))), copies, agent] & (ages < 7)
        counts = np.bincount(np.asarray(age) * 2 + np.asarray(copy), minlength=16)
        probs = acted.ravel() / acted.sum()
        assert chi2(counts, probs) < 12 + 4.5 * np.sqrt(24)


def test_the_uniform_switch_draws_windows_uniformly():
    """Decay 1: any window as likely as any other (the share of each agent is tested with the update)."""
    age, _ = draw(ring(12, 1, 12), 1, 4, jnp.asarray(1.0), jax.random.split(jax.random.key(9), 9000))
    counts = np.bincount(np.asarray(age[:, 0]) - 3, minlength=9)
    assert chi2(counts, np.full(9, 1 / 9)) < 8 + 4.5 * 4


def test_the_cost_of_a_sample_is_that_of_its_arrays():
    """No loop over the buffer: the program is the same for twenty times the rows, and loops only over draws."""

    def loops(rows):
        jaxpr = jax.make_jaxpr(lambda r, key: sample_recent(r, 4, 5, 0.9, key))(ring(rows, 2, rows), jax.random.key(0))
        scans = [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        return str(jaxpr).count(" = "), scans

    small, large = loops(10_000), loops(200_000)
    assert small == large
    assert small[1] == [4]
