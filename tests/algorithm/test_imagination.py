import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import Mixed
from recorded import Game
from tiny import SPEC, batch_of, tiny

from codream import matwm
from codream.actor_critic import improve, masked_log_probs
from codream.imagination import dream, from_context
from codream.latents import change_bins, symlog
from codream.model_quality import _one_step, _open_loop
from codream.replay import sequences
from codream.world_model import Hidden, WorldModel

KEY = jax.random.key(0)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
HORIZON = 3


# ------------------------------------------------------------------------------------------ contexts


@eqx.filter_jit
def by_context(model, contexts):
    """Features at the last step of each context, and h."""
    axes = Hidden.axes(model)
    z, hidden = jax.vmap(from_context, in_axes=(None, 0, None, None), out_axes=(0, axes))(model, contexts, 1, KEY)
    s, _ = jax.vmap(model.features, in_axes=(0, 0, axes), out_axes=(0, axes))(z, contexts.focal, hidden)
    return s, hidden.h


@eqx.filter_jit
def by_acting(model, heres, memories):
    """Features at every recorded step, from the memory that `matwm.act` had before it."""

    def one(obs, first, focal, hidden):
        z, _ = model.representation.posterior(obs, KEY)
        hidden = hidden.cleared(first)
        return model.features(z, focal, hidden)[0], hidden.h

    axes = Hidden.axes(model)
    agents = jax.vmap(one, in_axes=(0, None, 0, axes))
    copies = jax.vmap(agents, in_axes=(0, 0, None, axes))
    return jax.vmap(copies, in_axes=(0, 0, None, 0))(heres.obs, heres.first, jnp.arange(3), memories.hidden)


@pytest.fixture(scope="module")
def both_ways(game):
    return two_ways(game)


def two_ways(game):
    """[rows, copies, agents, …] features and h: acting through the real steps, and from contexts of eight."""
    rows, copies, length = game.rows, game.copies, game.config.agents.context
    places = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(copies), jnp.arange(3), indexing="ij"))
    row, copy, agent = places.reshape(3, -1)
    contexts = sequences(game.state.replay, rows - 1 - row + length - 1, copy, agent, length)
    there = by_context(game.state.world_model, contexts)
    there = [x.reshape(rows, copies, 3, -1) for x in there]
    return by_acting(game.state.world_model, game.heres, game.memories), there


def test_the_recorded_play_has_every_case(game):
    acting, first = np.asarray(game.heres.acting), np.asarray(game.heres.first)
    assert first.sum() >= 4
    assert not acting[..., 2].all(axis=0).any()  # an agent that finishes early
    assert (first[:, 0] != first[:, 1]).any()  # copies out of step


def test_a_context_equals_acting_through_its_steps(game, both_ways):
    """h and p̂, also where the context crosses an episode's start or begins before the oldest row."""
    (s, h), (s_context, h_context) = both_ways
    acting = np.asarray(game.heres.acting)
    np.testing.assert_allclose(np.asarray(h_context)[acting], np.asarray(h)[acting], **CLOSE)
    np.testing.assert_allclose(np.asarray(s_context)[acting], np.asarray(s)[acting], **CLOSE)
    assert abs(np.asarray(h)[acting]).max() > 0.1


class Late(Mixed):
    """One of its agents arrives at the third step."""

    def playing(self, state):
        return super().playing(state) & ~((jnp.arange(3) == 1) & (state.step < 2))


def test_who_arrives_late_acts_as_it_imagines():
    """It remembers nothing of the steps before, at which its observation and action were made up."""
    game = Game(Late())
    (s, h), (s_context, h_context) = two_ways(game)
    acting, first = np.asarray(game.heres.acting), np.asarray(game.heres.first)
    arrived = acting[1:, :, 1] & ~acting[:-1, :, 1]
    assert arrived.sum() >= 4
    assert not acting[first][:, 1].any()
    assert (np.asarray(h)[1:, :, 1][arrived] == 0).all()
    np.testing.assert_allclose(np.asarray(h_context)[acting], np.asarray(h)[acting], **CLOSE)
    np.testing.assert_allclose(np.asarray(s_context)[acting], np.asarray(s)[acting], **CLOSE)


def test_h_is_zero_at_an_episodes_first_step(game, both_ways):
    first = np.asarray(game.heres.first)
    for _, h in both_ways:
        assert (np.asarray(h)[first] == 0).all()
        assert (abs(np.asarray(h)[~first & game.heres.acting.all(axis=-1)]).max(axis=-1) > 0).all()


def test_what_came_before_the_episode_changes_nothing(game):
    """Bit for bit, for a start whose context has the end of another episode in it."""
    first = np.asarray(game.heres.first)
    row, copy = next((r, c) for r, c in zip(*np.nonzero(first), strict=True) if r > 8)
    row += 1  # the second step of an episode
    context = sequences(game.state.replay, *(jnp.asarray([x]) for x in (game.rows - 1 - row + 7, copy, 0)), 8)
    other = eqx.tree_at(
        lambda c: (c.obs, c.action, c.acting),
        context,
        (context.obs.at[:, :6].add(9.0), context.action.at[:, :6].set(1), context.acting.at[:, :6].set(True)),
    )
    for here, there in zip(*(by_context(game.state.world_model, c) for c in (context, other)), strict=True):
        np.testing.assert_array_equal(here, there)


# ------------------------------------------------------------------------------------------ dreams


def favourite(s, mask):
    """A deterministic policy that depends on what it sees: an argmax of features, as probabilities."""
    logits = jnp.stack([s[..., i :: mask.shape[-1]][..., :3].sum(-1) for i in range(mask.shape[-1])], -1)
    log_probs = masked_log_probs(logits, mask)
    return jnp.where(jax.nn.one_hot(jnp.argmax(log_probs, -1), mask.shape[-1]) > 0, 0.0, -1e9)


def uniform(s, mask):
    return masked_log_probs(jnp.zeros(mask.shape), mask)


@eqx.filter_jit
def dreamt(model, policy, context, key, horizon=HORIZON):
    return dream(model, policy, context, horizon, jax.random.split(key, context.first.shape[:2]))


def certain(model):
    """Its next latent is sure: each entry always changes by one bin of its own."""
    change = model.representation
    bias = 1e4 * jax.nn.one_hot(2 + jnp.arange(change.size) % change.bins % 7, change.bins).reshape(-1)
    return eqx.tree_at(lambda m: m.representation.dynamics.out.bias, model, bias)


@pytest.fixture(scope="module")
def model(game):
    """With heads that say something, and a random mask head."""
    heads = lambda m: (m.reward.out.weight, m.cont.out.weight)  # noqa: E731
    return eqx.tree_at(heads, game.state.world_model, replace_fn=lambda w: 0.5 * jax.random.normal(KEY, w.shape))


@pytest.fixture(scope="module")
def contexts(game):
    """[agents, starts] contexts of the played game."""
    age = jnp.array([9, 12, 17, 20])
    copy = jnp.array([0, 1, 0, 1])
    rows = [sequences(game.state.replay, age + 7, copy, jnp.full(4, agent), 8) for agent in range(3)]
    return jax.tree.map(lambda *x: jnp.stack(x), *rows)


def test_all_agents_in_one_batch_equal_each_alone(model, contexts):
    sure = eqx.tree_at(lambda m: m.mask.out.bias, certain(model), jnp.full(4, 1e4))  # masks are sure as well
    together = dreamt(sure, favourite, contexts, KEY)
    assert together.features.shape[:3] == (3, 4, HORIZON + 1)
    assert len(np.unique(together.action)) > 1
    for agent in range(3):
        for start in range(2):
            one = jax.tree.map(lambda x, a=agent, s=start: x[a : a + 1, s : s + 1], contexts)
            alone = dreamt(sure, favourite, one, jax.random.key(99))
            for field in ("action", "mask"):
                np.testing.assert_array_equal(getattr(alone, field)[0, 0], getattr(together, field)[agent, start])
            for field in ("features", "latent", "reward", "cont"):
                np.testing.assert_allclose(getattr(alone, field)[0, 0], getattr(together, field)[agent, start], **CLOSE)


def test_a_dream_equals_a_python_loop_of_its_steps(model, contexts):
    """The same latents too, as the loop splits the same keys: those of the one trajectory, whichever are beside it."""
    sure = eqx.tree_at(lambda m: m.mask.out.bias, model, jnp.full(4, 1e4))
    got = dreamt(sure, favourite, contexts, KEY)
    keys = jax.random.split(KEY, contexts.first.shape[:2])
    start = eqx.filter_jit(from_context)
    features, imagine = eqx.filter_jit(WorldModel.features), eqx.filter_jit(WorldModel.imagine)
    exists = jnp.asarray(sure.spec.action_valid)
    for agent, begin in [(0, 0), (1, 3), (2, 1)]:
        context = jax.tree.map(lambda x, a=agent, b=begin: x[a, b], contexts)
        start_key, key = jax.random.split(keys[agent, begin])
        z, hidden = start(sure, context, HORIZON, start_key)
        mask = context.mask[-1]
        for t in range(HORIZON):
            s, hidden = features(sure, z, context.focal, hidden)
            action = jnp.argmax(favourite(s, mask))
            _, _, model_key = jax.random.split(jax.random.fold_in(key, t), 3)
            np.testing.assert_allclose(got.features[agent, begin, t], s, **CLOSE)
            np.testing.assert_array_equal(got.mask[agent, begin, t], mask)
            assert got.action[agent, begin, t] == action
            z, reward, cont, hidden = imagine(sure, z, action, context.focal, hidden, model_key)
            np.testing.assert_allclose(got.reward[agent, begin, t], reward, **CLOSE)
            np.testing.assert_allclose(got.cont[agent, begin, t], cont, **CLOSE)
            mask = exists[agent]
        s, _ = features(sure, z, context.focal, hidden)
        np.testing.assert_allclose(got.features[agent, begin, HORIZON], s, **CLOSE)


def squared(difference, focal):
    """Over what is no padding, for each row."""
    return np.sum(np.where(Mixed().spec.obs_valid[focal], difference, 0.0) ** 2, axis=-1)


def test_a_prediction_is_compared_with_what_the_step_led_to(model, contexts):
    """Of a model that is sure how everything moves: it is wrong by how that differs from what came."""
    names, sure = ("reconstruction", "one_step", "one_step_sampled", "still"), certain(model)
    errors = eqx.filter_jit(lambda one: [_one_step(sure, one, KEY)[name] for name in names])
    for focal in (0, 2):
        one = jax.tree.map(lambda x, i=focal: x[i, 0], contexts)
        z = np.asarray(symlog(one.obs))
        predicted = squared(z[:-1] + change_bins(11, 3.0)[2:6] - z[1:], focal)
        expected = [np.zeros(7), predicted, predicted, squared(z[:-1] - z[1:], focal)]
        np.testing.assert_allclose(errors(one), expected, rtol=1e-4, atol=1e-5)


def test_an_open_loop_takes_the_real_actions_from_where_its_context_ends(model, contexts, monkeypatch):
    """Of a model in which every entry moves by the number of the action."""
    monkeypatch.setattr(WorldModel, "imagine", lambda self, z, action, focal, hidden, key: (z + action, 0, 0, hidden))
    one = jax.tree.map(lambda x: x[2, 1], contexts)
    error, still = eqx.filter_jit(lambda one: _open_loop(model, one, 4, 2, 3, KEY))(one)
    z, action = np.asarray(symlog(one.obs)), np.asarray(one.action)[:, 2]
    assert len(set(action[2:6])) > 1
    moved = np.cumsum(action[2:6])[:, None]
    np.testing.assert_allclose(error, squared(z[2] + moved - z[3:7], 2), rtol=1e-4)
    np.testing.assert_allclose(still, squared(z[2] - z[3:7], 2), rtol=1e-4)


def test_the_actor_sees_latent_hidden_state_and_teammates(model, contexts):
    got = dreamt(model, uniform, contexts, KEY)
    size = model.representation.size
    seen = jax.vmap(jax.vmap(jax.vmap(model.representation.seen)))(got.latent)
    np.testing.assert_array_equal(got.features[..., :size], seen)
    p = np.asarray(got.features[..., size + model.config.hidden :]).reshape(3, 4, HORIZON + 1, 2, 4)
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-5)
    assert (p[0, :, :, 0, 2:] == 0).all()  # agent 0's first teammate has two actions


def test_imagined_actions_exist_and_are_allowed(model, contexts):
    got = dreamt(model, uniform, contexts, KEY)
    counts = np.asarray(model.spec.num_actions)[:, None, None]
    assert (np.asarray(got.action) < counts).all()
    assert np.take_along_axis(np.asarray(got.mask), np.asarray(got.action)[..., None], -1).all()
    # The first mask is the real one, later ones are predicted.
    np.testing.assert_array_equal(got.mask[:, :, 0], contexts.mask[:, :, -1])
    forbids = eqx.tree_at(lambda m: m.mask.out.bias, model, jnp.array([1e4, -1e4, 1e4, 1e4]))
    later = dreamt(forbids, uniform, contexts, KEY).mask[:, :, 1:]
    np.testing.assert_array_equal(later[0, 0, 0], [True, False, True, False])
    assert not later[..., 1].any()
    nothing = eqx.tree_at(lambda m: m.mask.out.bias, model, jnp.full(4, -1e4))
    later = dreamt(nothing, uniform, contexts, KEY).mask[:, :, 1:]
    # Should the model forbid all, all that exist are allowed.
    np.testing.assert_array_equal(later, np.broadcast_to(model.spec.action_valid[:, None, None], later.shape))


def test_without_masks_an_agent_has_its_own_actions():
    spec = dataclasses.replace(SPEC, has_mask=False)
    bare = WorldModel(spec, tiny(spec, {"teammates": False}).world_model, KEY)
    context = jax.tree.map(lambda x: x[:, None], batch_of(spec))
    got = dreamt(bare, uniform, context, KEY, 2)
    np.testing.assert_array_equal(got.mask[:, 0, 0], spec.action_valid)
    assert (np.asarray(got.action)[:, 0] < np.asarray(spec.num_actions)[:, None]).all()
    assert got.features.shape[-1] == 5 + 16


def test_a_world_model_update_changes_what_every_agent_imagines(game, contexts):
    """And there is one world model with one optimiser, whoever is focal."""
    train = eqx.filter_jit(matwm.train_world_model)
    after, _ = train(game.state, KEY, game.config)
    before, behind = (dreamt(s.world_model, uniform, contexts, KEY) for s in (game.state, after))
    for agent in range(3):
        assert (before.features[agent, :, 1:] != behind.features[agent, :, 1:]).any()
        assert (before.reward[agent] != behind.reward[agent]).any()
    moments = [x for x in jax.tree.leaves(after.optimiser) if x.ndim > 0]
    weights = jax.tree.leaves(eqx.filter(after.world_model, eqx.is_array))
    assert sorted(x.shape for x in moments) == sorted(2 * [w.shape for w in weights])  # Adam's two, of one model
    assert int(after.world_model_updates) == int(game.state.world_model_updates) + 1


def test_what_is_kept_in_bfloat16_is_what_learning_reads(game):
    """Kept in the precision of the products, features are half as large, and what is learned is the same to the bit."""
    config = dataclasses.replace(game.config, precision="bfloat16")
    imagined = eqx.filter_jit(matwm.imagine_for_agents)(game.state, KEY, config)
    floats = [x for x in jax.tree.leaves(imagined.features) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("bfloat16")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, imagined)
    learn = eqx.filter_jit(lambda d: improve(game.state.agents, d, jnp.asarray(1), config.agents, config.precision))
    for one, other in zip(jax.tree.leaves(learn(imagined)), jax.tree.leaves(learn(wide)), strict=True):
        np.testing.assert_array_equal(one, other)
