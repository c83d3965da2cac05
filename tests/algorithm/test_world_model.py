import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import IMAGES, SPEC, batch_of, tiny

from codream.latents import two_hot_loss, two_hot_mean, value_bins
from codream.world_model import WorldModel, world_model_loss

KEY = jax.random.key(0)
BATCH = batch_of(SPEC)
PARTS = ("rec", "reward", "continue", "dyn", "rep", "mask", "team")


def build(latent="change", spec=SPEC, **changes):
    return WorldModel(spec, tiny(spec, {"latent": latent, **changes}).world_model, jax.random.key(1))


def awake(model):
    """With random heads instead of zero ones, so that they depend on what they see."""
    heads = lambda m: (m.reward.out.weight, m.cont.out.weight)  # noqa: E731
    return eqx.tree_at(heads, model, replace_fn=lambda w: 0.5 * jax.random.normal(KEY, w.shape))


@pytest.fixture(scope="module")
def change():
    return awake(build("change"))


@pytest.fixture(scope="module")
def categorical():
    return awake(build("categorical", free_nats=0.0))


@pytest.fixture(scope="module")
def outcome():
    """Its outcome heads see the latent that a step leads to."""
    return awake(build("change", outcome_sees_next=True))


def keys_of(batch, key):
    return jax.random.split(key, len(batch.focal))


@eqx.filter_jit
def loss_of(model, batch, key):
    return world_model_loss(model, batch, keys_of(batch, key))


@eqx.filter_jit
def gradients_of_parts(model, batch, key):
    """part → gradient of that part alone, for all parts in one compilation."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return jax.jacrev(lambda p: world_model_loss(eqx.combine(p, static), batch, keys_of(batch, key))[1])(params)


@eqx.filter_jit
def trained(model, batch, steps):
    """Losses over `steps` updates on one batch."""
    optimiser = optax.adam(1e-2)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def body(carry, key):
        params, state = carry
        loss = lambda p: world_model_loss(eqx.combine(p, static), batch, keys_of(batch, key))  # noqa: E731
        (_, parts), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(grads, state)
        return (optax.apply_updates(params, updates), state), parts

    keys = jax.random.split(KEY, steps)
    (params, _), parts = jax.lax.scan(body, (params, optimiser.init(params)), keys)
    return eqx.combine(params, static), parts


@pytest.fixture(scope="module")
def gradients(categorical):
    return gradients_of_parts(categorical, BATCH, KEY)


def largest(tree):
    return max((float(abs(x).max()) for x in jax.tree.leaves(tree)), default=0.0)


# ------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("latent", ["change", "categorical"])
def test_every_part_of_the_loss_falls(latent):
    _, parts = trained(build(latent, free_nats=0.1), BATCH, 80)
    for name in PARTS:
        if latent == "change" and name in ("rec", "rep"):
            assert (parts[name] == 0).all()  # nothing is coded, so nothing is lost
            continue
        first, last = float(parts[name][:3].mean()), float(parts[name][-5:].mean())
        # The code must first spread before KL terms can fall.
        first = max(first, float(parts[name].max())) if name in ("dyn", "rep") else first
        assert last < 0.8 * first, (name, first, last)


def test_untrained_heads_cost_what_uniform_guesses_cost():
    """Team and mask outputs are zeroed; reward and continue start at zero by themselves."""
    outs = lambda m: (m.team.out.weight, m.mask.out.weight)  # noqa: E731
    model = eqx.tree_at(outs, build(), replace_fn=jnp.zeros_like)
    _, parts = loss_of(model, BATCH, KEY)
    np.testing.assert_allclose(parts["reward"], np.log(15), rtol=1e-4)
    np.testing.assert_allclose(parts["continue"], np.log(2), rtol=1e-5)
    # Agents have 3, 2 and 4 actions; each is focal in one sequence.
    np.testing.assert_allclose(parts["mask"], (3 + 2 + 4) / 3 * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(parts["team"], 2 / 3 * np.log(3 * 2 * 4), rtol=1e-5)


def test_the_total_is_the_weighted_sum_of_the_parts(change):
    weights = {"rec": 2.0, "reward": 3.0, "continue": 0.5, "dyn": 0.7, "rep": 0.1, "mask": 0.3, "team": 4.0}
    model = awake(build(**{f"{name}_weight": w for name, w in weights.items()}))
    total, parts = loss_of(model, BATCH, KEY)
    np.testing.assert_allclose(total, sum(w * parts[name] for name, w in weights.items()), rtol=1e-5)
    same, _ = loss_of(change, BATCH, KEY)
    assert total != same


def test_the_papers_weights_are_the_default():
    config = tiny(SPEC).world_model
    assert (config.rec_weight, config.reward_weight, config.continue_weight, config.team_weight) == (
        1,
        1,
        1,
        1,
    )
    assert (config.dyn_weight, config.mask_weight, config.rep_weight) == (0.5, 0.5, 0.1)


# ------------------------------------------------------------------------------------------ what counts


def second_episode(field, value, rows=slice(5, 8)):
    """The batch with one field of the second episode changed."""
    return eqx.tree_at(lambda b: getattr(b, field), BATCH, getattr(BATCH, field).at[:, rows].set(value))


@pytest.mark.parametrize("latent", ["change", "categorical"])
def test_where_nobody_acts_nothing_counts(latent, request):
    model = request.getfixturevalue(latent)
    idle = eqx.tree_at(lambda b: b.acting, BATCH, BATCH.acting.at[:, 5:].set(False))
    expected, parts = loss_of(model, idle, KEY)
    for field, value in [("obs", 3.0), ("reward", 50.0), ("terminal", True), ("action", 1), ("mask", True)]:
        changed = eqx.tree_at(lambda b: getattr(b, field), idle, second_episode(field, value).__dict__[field])  # noqa: B023
        got, _ = loss_of(model, changed, KEY)
        assert got == expected, field
    assert all(np.isfinite(x) for x in parts.values())


def test_a_last_observation_is_a_target_but_leads_nowhere(change):
    """Row 4 ends an episode: its observation is what step 3 led to; what follows it is another episode."""
    rows = lambda field, row, value: eqx.tree_at(  # noqa: E731
        lambda b: getattr(b, field), BATCH, getattr(BATCH, field).at[:, row].set(value)
    )
    before = loss_of(change, BATCH, KEY)[1]
    after = loss_of(change, rows("obs", 4, 3.0), KEY)[1]
    assert after["dyn"] != before["dyn"]
    # With the new episode idle, what stands right behind the boundary is no target of row 4.
    idle = eqx.tree_at(lambda b: b.acting, BATCH, BATCH.acting.at[:, 5:].set(False))
    beyond = eqx.tree_at(lambda b: b.obs, idle, idle.obs.at[:, 5].set(3.0))
    assert loss_of(change, idle, KEY)[1]["dyn"] == loss_of(change, beyond, KEY)[1]["dyn"]
    # Reward and end belong to the step, so those of row 4 (a reset) do not count.
    for field, value in [("reward", 50.0), ("terminal", True), ("action", 1), ("mask", True)]:
        assert loss_of(change, rows(field, 4, value), KEY)[0] == loss_of(change, BATCH, KEY)[0], field
        assert loss_of(change, rows(field, 3, value), KEY)[0] != loss_of(change, BATCH, KEY)[0], field


def test_the_windows_last_row_leads_nowhere(change):
    """With an action in row 7 its successor is not in the window, but its own reward counts."""
    _, before = loss_of(change, BATCH, KEY)
    flipped = BATCH.action.at[:, 7].set((BATCH.action[:, 7] + 1) % 2)
    _, after = loss_of(change, eqx.tree_at(lambda b: b.action, BATCH, flipped), KEY)
    assert after["dyn"] == before["dyn"]
    assert after["team"] != before["team"]


def test_others_that_do_not_act_are_not_predicted(change):
    gone = eqx.tree_at(lambda b: b.acting, BATCH, BATCH.acting.at[0, :, 2].set(False))
    _, before = loss_of(change, gone, KEY)
    _, after = loss_of(change, eqx.tree_at(lambda b: b.action, gone, gone.action.at[0, :, 2].set(1)), KEY)
    assert after["team"] == before["team"]
    zero = eqx.tree_at(lambda m: m.team.out.weight, change, replace_fn=jnp.zeros_like)
    # ln 2 + ln 3 + ln 4 are asked twice each, ln 4 of focal agent 0 no more.
    np.testing.assert_allclose(loss_of(zero, gone, KEY)[1]["team"], (2 * np.log(24) - np.log(4)) / 3, rtol=1e-5)


def test_a_time_limit_keeps_continuing_as_target_and_a_terminal_does_not():
    sure = eqx.tree_at(lambda m: m.cont.out.bias, build(), jnp.array([2.0]))
    goes_on, stops = np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0))
    _, truncated = loss_of(sure, BATCH, KEY)  # row 3 is followed by an end, and is not terminal
    np.testing.assert_allclose(truncated["continue"], goes_on, rtol=1e-5)
    ended = eqx.tree_at(lambda b: b.terminal, BATCH, BATCH.terminal.at[:, 3].set(True))
    _, terminal = loss_of(sure, ended, KEY)
    np.testing.assert_allclose(terminal["continue"], (6 * goes_on + stops) / 7, rtol=1e-5)


def test_padded_entries_move_no_weight(categorical):
    """Agent 1 has three of five entries; the decoder's other two get no gradient from its sequence."""
    alone = eqx.tree_at(lambda b: b.acting, BATCH, BATCH.acting & (BATCH.focal == 1)[:, None, None])
    grads = gradients_of_parts(categorical, alone, KEY)["rec"]
    entries = abs(grads.representation.decoder.out.weight).max(axis=1)
    assert (entries[:3] > 0).all()
    assert (entries[3:] == 0).all()


def test_the_previous_episode_changes_no_hidden_state_bit_for_bit(change):
    @eqx.filter_jit
    def hidden(model, batch):
        one = jax.tree.map(lambda x: x[0], batch)
        z, _ = jax.vmap(model.representation.posterior)(one.obs, jax.random.split(KEY, 8))
        h, _ = model.unroll(z, one.action[:, 0], one.focal, one.segment, one.acting[:, 0])
        p, _ = model.team.full(z, one.focal, one.segment, one.acting[:, 0])
        return h, p

    other = eqx.tree_at(
        lambda b: (b.obs, b.action),
        BATCH,
        (BATCH.obs.at[:, :5].multiply(-7.0), BATCH.action.at[:, :5].set(1)),
    )
    for here, there in zip(hidden(change, BATCH), hidden(change, other), strict=True):
        assert (here[5:] == there[5:]).all()
        assert not (here[:5] == there[:5]).all()


# ------------------------------------------------------------------------------------------ which row leads where


def only_row_2():
    """The first sequence's third step alone acts, and it is terminal."""
    alone = (jnp.zeros_like(BATCH.acting).at[0, 2].set(True), BATCH.terminal.at[0, 2].set(True))
    return eqx.tree_at(lambda b: (b.acting, b.terminal), BATCH, alone)


@eqx.filter_jit
def by_the_single_step(model):
    """What row 2 costs by itself; and the outcome that an imagined step from there has, and should have."""
    one = jax.tree.map(lambda x: x[0], BATCH)
    keys = jax.random.split(keys_of(BATCH, KEY)[0], 8)
    (z, _), (z_next, posterior) = (model.representation.posterior(one.obs[row], keys[row]) for row in (2, 3))
    sample, *imagined, hidden = model.imagine(z, one.action[2, 0], one.focal, model.empty(4), KEY)
    h, code = hidden.h, model.representation
    reward, cont = model.outcome(h, z_next)
    losses = code.transition_loss(code.prior(h, z), z, z_next, posterior, model.obs_valid(one.focal))
    losses |= {
        "reward": two_hot_loss(reward, one.reward[2], model.reward_bins),
        "continue": optax.sigmoid_binary_cross_entropy(cont, 0.0),
    }
    reward, cont = model.outcome(h, sample)
    return losses, imagined, [two_hot_mean(reward, model.reward_bins), jax.nn.sigmoid(cont)]


@pytest.mark.parametrize("latent", ["outcome", "categorical"])
def test_a_step_is_held_to_the_row_that_it_leads_to(latent, request):
    """Reward and end of row 2 follow from the h after it and, by option, from the latent of row 3, which is what the
    dynamics are to predict."""
    model = request.getfixturevalue(latent)
    _, parts = loss_of(model, only_row_2(), KEY)
    for name, loss in by_the_single_step(model)[0].items():
        np.testing.assert_allclose(parts[name], loss, rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_imagined_outcome_is_that_of_what_the_step_leads_to(outcome):
    _, imagined, expected = by_the_single_step(outcome)
    np.testing.assert_allclose(imagined, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------ stop-gradients


def test_the_teammate_loss_moves_only_the_teammate_predictor(gradients):
    moved = gradients["team"]
    assert largest(moved.team) > 0
    assert largest(eqx.tree_at(lambda m: m.team, moved, None)) == 0


@pytest.mark.parametrize("part", [p for p in PARTS if p != "team"])
def test_no_other_loss_moves_the_teammate_predictor(gradients, part):
    assert largest(gradients[part].team) == 0
    assert largest(gradients[part]) > 0


def test_each_loss_moves_its_own_parts(gradients):
    code = lambda part: gradients[part].representation  # noqa: E731
    # dyn teaches the prior, and shapes z through h; rep only pulls the posterior.
    assert largest(code("dyn").dynamics) > 0
    assert largest(gradients["dyn"].transformer) > 0
    assert largest(code("rep").dynamics) == 0
    assert largest(gradients["rep"].transformer) == 0
    assert largest(code("rep").encoder) > 0
    # Reconstruction, reward, continuing and masks shape the encoder through the sample.
    for part, moves_transformer in [("rec", False), ("mask", False), ("reward", True), ("continue", True)]:
        assert largest(code(part).encoder) > 0, part
        assert (largest(gradients[part].transformer) > 0) == moves_transformer, part
    assert largest(code("rec").decoder) > 0
    assert largest(gradients["reward"].cont) == 0


def test_dyn_teaches_through_the_prior_only(categorical):
    """With z cut off from h, the encoder gets no gradient from dyn: the posterior's side is stopped."""
    deaf = eqx.tree_at(lambda m: m.mixer.weight, categorical, replace_fn=lambda w: w.at[:, :16].set(0.0))
    grads = gradients_of_parts(deaf, BATCH, KEY)
    assert largest(grads["dyn"].representation.encoder) == 0
    assert largest(grads["rep"].representation.encoder) > 0


# ------------------------------------------------------------------------------------------ actions, switches


@pytest.mark.parametrize("scaled", [True, False])
def test_scaled_action_ids_never_overlap(scaled):
    model = build(scale_actions=scaled)
    assert model.mixer.in_features == 5 + (9 if scaled else 4)
    ids = {}
    for focal, count in enumerate(SPEC.num_actions):
        for action in range(count):
            e = model.mix(jnp.zeros(5), jnp.asarray(action), jnp.asarray(focal))
            (column,) = np.flatnonzero((abs(model.mixer.weight - e[:, None]) < 1e-7).all(axis=0))
            ids[focal, action] = int(column) - 5
    if scaled:
        assert sorted(ids.values()) == list(range(9))
    else:
        assert ids == {(focal, action): action for focal, action in ids}


@eqx.filter_jit
def predicted(team, focal):
    z = jax.random.normal(KEY, (6, 5))
    return team.full(z, focal, jnp.zeros(6, int), jnp.ones(6, bool))[0]


def test_teammates_get_no_probability_for_actions_that_they_lack(change):
    for focal, others in enumerate([(2, 4), (3, 4), (3, 2)]):
        probs = np.exp(predicted(change.team, jnp.asarray(focal)))
        np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-5)
        for k, count in enumerate(others):
            assert (probs[:, k, count:] == 0).all()
            assert (probs[:, k, :count] > 0).all()


def test_the_teammate_predictor_is_told_who_is_focal(change):
    spread = eqx.tree_at(lambda t: t.out.weight, change.team, replace_fn=lambda w: 10 * w)
    seen = [predicted(spread, jnp.asarray(i)) for i in (0, 1)]
    assert abs(seen[0][:, 1] - seen[1][:, 1]).max() > 1e-3  # both predict agent 2


def test_without_teammates_features_shrink_and_the_predictor_is_gone(change):
    alone = build(teammates=False)
    assert alone.team is None
    assert change.features_size - alone.features_size == 2 * 4
    assert alone.empty(4).team is None
    s, _ = alone.features(jnp.zeros(5), jnp.asarray(0), alone.empty(4))
    assert s.shape == (alone.features_size,) == (5 + 16,)
    _, parts = loss_of(alone, BATCH, KEY)
    assert "team" not in parts


def test_a_single_agent_has_no_teammates():
    spec = dataclasses.replace(SPEC, agents=("only",), obs_shapes=((3,),), num_actions=(2,), has_mask=False)
    assert build(spec=spec).team is None


def test_the_mask_head_exists_only_with_masks(change):
    assert change.mask is not None
    bare = dataclasses.replace(SPEC, has_mask=False)
    model = build(spec=bare)
    assert model.mask is None
    assert "mask" not in loss_of(model, batch_of(bare), KEY)[1]


def test_the_outcome_may_see_the_next_latent():
    model = build(outcome_sees_next=True)
    assert model.reward.hidden[0].in_features == 16 + model.representation.outcome_size
    assert build().reward.hidden[0].in_features == 16
    _, parts = loss_of(model, BATCH, KEY)
    np.testing.assert_allclose(parts["reward"], np.log(15), rtol=1e-4)
    # The window's last step has no successor to be seen, so its reward does not count.
    _, same = loss_of(
        eqx.tree_at(lambda m: m.reward.out.bias, model, jnp.arange(15.0)),
        second_episode("reward", 9.0, 7),
        KEY,
    )
    _, base = loss_of(eqx.tree_at(lambda m: m.reward.out.bias, model, jnp.arange(15.0)), BATCH, KEY)
    assert same["reward"] == base["reward"]


def test_an_imagined_step_has_the_mean_reward_and_the_chance_of_going_on():
    bins = value_bins(15)
    model = eqx.tree_at(
        lambda m: (m.reward.out.bias, m.cont.out.bias),
        build(),
        (jnp.full(15, -1e9).at[9].set(0.0).at[8].set(0.0), jnp.array([-1.0])),
    )
    z_next, reward, cont, hidden = eqx.filter_jit(WorldModel.imagine)(
        model, jnp.zeros(5), jnp.asarray(1), jnp.asarray(1), model.empty(4), KEY
    )
    np.testing.assert_allclose(reward, (bins[8] + bins[9]) / 2, rtol=1e-5)
    np.testing.assert_allclose(cont, 1 / (1 + np.e), rtol=1e-5)
    assert (z_next[3:] == 0).all()  # agent 1 has three entries
    assert hidden.dynamics.valid.sum() == 1


def test_images_train():
    model = build("categorical", IMAGES)
    assert model.representation.is_image
    _, parts = trained(model, batch_of(IMAGES), 40)
    assert np.isfinite(parts["rec"]).all()
    assert parts["rec"][-5:].mean() < 0.9 * parts["rec"][0]
