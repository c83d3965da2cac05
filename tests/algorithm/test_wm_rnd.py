"""WM-RND: advantages and losses against numbers, where gradients go, what is learned, and exact resume."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Toy, arrays, assert_same, copy_until
from probe_envs import Mixed
from tiny import IMAGES, tiny
from tiny_wm_rnd import Bandit, Different, Helping, Same, unresolved

from codream import markov_model, markov_quality, matwm, projection, train, wm_rnd
from codream.agents import load
from codream.algorithms import algorithm
from codream.config import Config, ConfigError
from codream.envs import EnvSpec
from codream.evaluation import evaluate
from codream.linear import tree_of
from codream.markov_model import (
    MarkovModel,
    Transition,
    code_measures,
    latent_rank,
    markov_loss,
    own_first,
    transitions,
)
from codream.ppo import Batch, Learner, gae, observed, ppo_loss
from codream.presets import PRESETS, preset
from codream.projection import (
    Projection,
    _actions,
    draw_starts,
    imagine,
    imagined_return,
    judged,
    project,
    projection_loss,
    straight_through_loss,
    symmetry_ratio,
)
from codream.retention import saved
from codream.rollout import Rollout
from codream.training import GraphDriver
from codream.world_model import Sequence

TWO = Bandit().spec
TAG = EnvSpec("tag", ("a_0", "a_1", "b_0"), ((4,), (4,), (3,)), (3, 3, 3))


def full_state(env, config, seed=0):
    """A state whose rollout is full, after one update before it."""

    @eqx.filter_jit
    def play():
        state = wm_rnd.init(jax.random.key(seed), env.spec, config)
        env_state, here = jax.vmap(env.reset)(jax.random.split(jax.random.key(1), config.num_envs))
        memory = wm_rnd.init_memory(state, config.num_envs, config)
        for step in range(config.ppo.rollout):
            act_key, env_key = jax.random.split(jax.random.key(step))
            action, memory = wm_rnd.act(state, memory, here, act_key, config)
            env_state, there = jax.vmap(env.step)(jax.random.split(env_key, config.num_envs), env_state, action)
            state = wm_rnd.observe(state, here, action, there)
            here = there
        return state

    return play()


def leaves(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def each_of(learners):
    """One agent's after the other."""
    for i in range(len(learners.actor.out.bias)):
        yield jax.tree.map(lambda x, i=i: x[i] if eqx.is_array(x) else x, learners)


def same(one, other):
    return all(bool(jnp.array_equal(a, b)) for a, b in zip(leaves(one), leaves(other), strict=True))


# ------------------------------------------------------------------------------------------ PPO


def test_advantages_against_numbers():
    """γ = ½, λ = ½. Values 1, 1, 4, 2; rewards 1, 2, then the third row."""
    reward, value = jnp.array([1.0, 2.0, 0.0]), jnp.array([1.0, 1.0, 4.0, 2.0])
    no, acting = jnp.zeros(3, bool), jnp.ones(3, bool)
    # Nothing ends: δ = (0.5, 3, −3); Â_2 = −3, Â_1 = 3 − ¾, Â_0 = ½ + ¼ · 2.25.
    np.testing.assert_allclose(gae(reward, value, no, acting, 0.5, 0.5), [1.0625, 2.25, -3.0])
    # A true terminal after step 1: what is seen then is worth nothing. δ_1 = 2 − 1.
    np.testing.assert_allclose(gae(reward, value, no.at[1].set(True), acting, 0.5, 0.5), [0.75, 1.0, -3.0])
    # A time limit after step 1: row 2 is the last observation, and its value 4 counts. δ_1 = 2 + 2 − 1.
    np.testing.assert_allclose(gae(reward, value, no, acting.at[2].set(False), 0.5, 0.5), [1.25, 3.0, 0.0])


def learner_and_batch(n=6):
    spec = EnvSpec("masks", ("a", "b"), ((3,),) * 2, (3, 3), has_mask=True)
    config = unresolved()
    learner = Learner(spec, config.ppo, jax.random.key(0))
    learner = eqx.tree_at(lambda m: m.actor.out.weight, learner, learner.actor.out.weight * 100)
    x = observed(spec, jax.random.normal(jax.random.key(1), (n, 3)))
    mask = jnp.ones((n, 3), bool).at[:, 2].set(False)
    action = jnp.arange(n) % 2
    log_probs = jax.vmap(learner.log_probs)(x, mask)
    batch = Batch(
        x=x,
        mask=mask,
        action=action,
        acting=jnp.ones(n, bool),
        log_prob=jnp.take_along_axis(log_probs, action[:, None], axis=-1)[:, 0],
        advantage=jax.random.normal(jax.random.key(2), (n,)),
        target=jnp.zeros(n),
    )
    return learner, batch, config.ppo


def test_the_ratio_is_1_before_anything_changed_and_clips_after():
    learner, batch, config = learner_and_batch()
    loss = eqx.filter_jit(ppo_loss)
    total, parts = loss(learner, batch, config)
    weighted = config.value_weight * parts["critic_loss"] - config.entropy * parts["entropy"]
    np.testing.assert_allclose(total, parts["actor_loss"] + weighted, rtol=1e-5)
    np.testing.assert_allclose(parts["actor_loss"], 0.0, atol=1e-6)  # normalised advantages sum to 0
    np.testing.assert_allclose(parts["kl"], 0.0, atol=1e-6)
    assert parts["clipped"] == 0
    assert jnp.exp(jax.vmap(learner.log_probs)(batch.x, batch.mask))[:, 2].max() == 0
    # As if each action had been half as probable: ratio 2, clipped to 1.2 where the advantage is positive.
    before = dataclasses.replace(batch, log_prob=batch.log_prob - jnp.log(2.0))
    _, parts = loss(learner, before, config)
    a = np.array(batch.advantage - batch.advantage.mean())
    a /= a.std() + 1e-8
    np.testing.assert_allclose(parts["actor_loss"], -np.mean(np.where(a > 0, 1.2 * a, 2 * a)), rtol=1e-4)
    assert parts["clipped"] == 1


def test_steps_without_an_action_do_not_count():
    learner, batch, config = learner_and_batch()
    batch = dataclasses.replace(batch, acting=batch.acting.at[2].set(False))
    # The stored action is forbidden there, and everything else nonsense.
    odd = dataclasses.replace(
        batch,
        action=batch.action.at[2].set(2),
        log_prob=batch.log_prob.at[2].set(-50.0),
        advantage=batch.advantage.at[2].set(1e6),
        target=batch.target.at[2].set(1e6),
    )
    gradient = eqx.filter_jit(eqx.filter_grad(lambda learner, batch: ppo_loss(learner, batch, config)[0]))
    for one, other in zip(leaves(gradient(learner, batch)), leaves(gradient(learner, odd)), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.fixture(scope="module")
def judgement():
    """A state, the batch that its rollout is made to, and what its curiosity pays, to which what is seen is the newer
    the larger it is. Policies are sure of themselves, and agents have different scales."""
    env = Mixed()
    config = unresolved({"coef": 0.0}, {"kind": "rnd", "coef": 2.0}).resolve(env.spec)
    state = full_state(env, config)
    state = eqx.tree_at(
        lambda s: (s.learners.actor.out.weight, s.returns.variance),
        state,
        (100 * state.learners.actor.out.weight, jnp.array([4.0, 9.0, 0.25])),
    )

    @eqx.filter_jit
    def both(state):
        after, intrinsic = wm_rnd._intrinsic(state, config)
        assert after.curiosity is not None
        return wm_rnd._judged(state, config)[1], intrinsic * after.curiosity.returns.scale, intrinsic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wm_rnd, "errors", lambda curiosity, obs, config: jnp.sum(obs, axis=-1))
        return state, config, *both(state)


def test_the_rollout_is_judged_by_the_policies_that_acted(judgement):
    """Log-probabilities are those of the masked policy, and rows in which nobody acts have no advantage."""
    state, _, batch, *_ = judgement
    assert not np.asarray(batch.acting).all()
    assert (np.asarray(batch.advantage)[~np.asarray(batch.acting)] == 0).all()
    chosen = np.take_along_axis(np.asarray(batch.mask), np.asarray(batch.action)[..., None], axis=-1)[..., 0]
    assert chosen[np.asarray(batch.acting)].all()
    np.testing.assert_allclose(batch.x, observed(state.spec, state.rollout.obs).reshape(batch.x.shape), rtol=1e-6)
    for i, learner in enumerate(each_of(state.learners)):
        log_probs = jax.vmap(learner.log_probs)(batch.x[:, i], batch.mask[:, i])
        own = np.take_along_axis(np.asarray(log_probs), np.asarray(batch.action)[:, i, None], axis=-1)[:, 0]
        np.testing.assert_allclose(batch.log_prob[:, i], own, rtol=1e-5)


def test_steps_are_judged_by_their_own_reward_and_by_what_the_critic_says_of_where_they_lead(judgement):
    """By hand for every copy and agent: rewards in units of the agent's returns, and what curiosity adds to them."""
    state, config, batch, _, intrinsic = judgement
    rollout, rows = state.rollout, state.rollout.rows
    x, gamma, lam = observed(state.spec, rollout.every_obs), config.ppo.gamma, config.ppo.lam
    for i, (learner, scale) in enumerate(zip(each_of(state.learners), (2.0, 3.0, 0.5), strict=True)):
        values = np.asarray(jax.vmap(jax.vmap(learner.value))(x[:, :, i]))
        reward = np.asarray(rollout.reward[..., i] / scale + 2.0 * intrinsic[..., i])
        goes_on, acting = 1.0 - np.asarray(rollout.terminal[..., i]), np.asarray(rollout.acting[..., i])
        advantage = np.zeros((rows + 1, config.num_envs))
        for t in reversed(range(rows)):
            delta = reward[t] + gamma * goes_on[t] * values[t + 1] - values[t]
            advantage[t] = np.where(acting[t], delta + gamma * lam * goes_on[t] * advantage[t + 1], 0.0)
        np.testing.assert_allclose(batch.advantage[:, i], advantage[:-1].ravel(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(batch.target[:, i], (advantage + values)[:-1].ravel(), rtol=1e-4, atol=1e-5)


def test_curiosity_pays_for_what_a_step_leads_to(judgement):
    state, _, _, errors, _ = judgement
    led_to = np.asarray(state.rollout.every_obs)[1:].sum(axis=-1)
    np.testing.assert_allclose(errors, np.where(state.rollout.acting, led_to, 0.0), rtol=1e-5)


# ------------------------------------------------------------------------------------------ self-projection


def test_symmetry_follows_its_schedule():
    def at(steps, schedule):
        config = unresolved({"symmetry": 1.0, "symmetry_end": 0.2, "schedule": schedule}, total_steps=100)
        return float(symmetry_ratio(jnp.asarray(steps), config))

    assert [at(s, "constant") for s in (0, 50, 100)] == [1.0, 1.0, 1.0]
    np.testing.assert_allclose([at(s, "linear") for s in (0, 25, 50, 100, 200)], [1.0, 0.8, 0.6, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose([at(s, "cosine") for s in (0, 50, 100)], [1.0, 0.6, 0.2], rtol=1e-6)
    np.testing.assert_allclose(at(25, "cosine"), 0.2 + 0.8 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)


def projected(spec, alpha, projection=None, seed=0, focal=0, **changes):
    """The imagined return of one trajectory, its loss's gradient for learner and model, and what it was made of."""
    config = unresolved({"imagination_steps": 3, **(projection or {})}, **changes).resolve(spec)
    model = MarkovModel(spec, config, jax.random.key(seed))
    weights = jax.random.normal(jax.random.key(9), model.reward.out.weight.shape)
    model = eqx.tree_at(lambda m: m.reward.out.weight, model, weights)  # a fresh model predicts no reward
    learner = Learner(spec, config.ppo, jax.random.key(1), projects=True)
    obs = jax.random.normal(jax.random.key(2), (spec.num_agents, *spec.obs_shape))
    mask = jnp.asarray(spec.action_valid)

    def objective(nets):
        learner, model = nets
        trajectory = project(
            learner, model, obs, mask, jnp.asarray(focal), jnp.asarray(alpha), jax.random.key(3), config
        )
        one, valid, scale = jax.tree.map(lambda x: x[None], trajectory), jnp.ones(1, bool), jnp.ones(())
        if config.projection.gradient == "reinforce":
            imagined, _ = judged(*jax.lax.stop_gradient((learner, one)), valid, scale, config)
            return projection_loss(learner, imagined, config)[0], trajectory
        return straight_through_loss(one, valid, scale, config)[0], trajectory

    (_, trajectory), grads = eqx.filter_jit(eqx.filter_value_and_grad(objective, has_aux=True))((learner, model))
    return float(imagined_return(trajectory, config.ppo.gamma)), grads, (learner, model, obs, config)


def test_alone_the_projection_is_a_plain_imagined_return():
    one = Bandit(1).spec
    selfish, _, (learner, model, obs, config) = projected(one, 0.0)
    symmetric, _, _ = projected(one, 1.0)
    assert selfish == symmetric
    # The same by hand.
    focal, total, weight = jnp.asarray(0), 0.0, 1.0
    start, key = jax.random.split(jax.random.key(3))
    z, _ = model.representation.posterior(obs[0], jax.random.split(start, 1)[0])
    x = observed(one, obs[0])
    for step_key in jax.random.split(key, 3):
        act_key, model_key = jax.random.split(step_key)
        noise = jax.random.gumbel(jax.random.split(act_key)[0], (1, 2))[0]
        chosen = jnp.argmax(learner.log_probs(x, jnp.ones(2, bool)) + noise)
        h = model.step(z, jax.nn.one_hot(chosen, 2)[None], focal)
        total += weight * float(model.reward(h)[0])
        weight *= config.ppo.gamma * float(jax.nn.sigmoid(model.cont(h)[0]))
        z = model.next(h, z, jax.random.split(model_key, 1)[0])
        x = model.representation.decoder(z)
    np.testing.assert_allclose(selfish, total, rtol=1e-4)


def test_imagined_observations_are_padded_with_zeros_as_real_ones_are():
    """Nothing trains the decoder where an agent's observation is shorter than others', and a policy sees 0 there."""
    spec, focal = Mixed().spec, jnp.asarray(1)
    config = unresolved({"imagination_steps": 3}).resolve(spec)
    model = MarkovModel(spec, config, jax.random.key(0))
    learner = Learner(spec, config.ppo, jax.random.key(1), projects=True)
    obs = jax.random.normal(jax.random.key(2), (3, 4)) * spec.obs_valid
    mask, alpha = jnp.asarray(spec.action_valid), jnp.ones(())
    imagine = eqx.filter_jit(lambda: project(learner, model, obs, mask, focal, alpha, jax.random.key(3), config))
    x = np.asarray(imagine().x)
    assert x.shape == (4, 4)
    assert (x[:, 2:] == 0).all()
    assert (x[:, :2] != 0).all()


@pytest.mark.parametrize("actions", ["joint", "predicted"])
def test_every_view_is_told_its_own_action_as_in_training(actions):
    """One-hot in the place of the agent whose view it is; of the others what `actions` says."""
    _, _, (learner, model, obs, config) = projected(TWO, 1.0, {"actions": actions}, imagined_partners="mirrored")
    z, _ = jax.vmap(model.representation.posterior)(obs, jax.random.split(jax.random.key(1)))
    views, mask = jnp.arange(2), jnp.asarray(TWO.action_valid)
    told = _actions(model, learner, z, observed(TWO, obs), mask, views, jnp.asarray(0), config, jax.random.key(2))
    for view in views:
        np.testing.assert_allclose(jnp.sort(told[view, view]), [0, 1], atol=1e-6)
        other = float(jnp.max(told[view, 1 - view]))
        assert other == pytest.approx(1) if actions == "joint" else other < 0.99


def test_symmetry_mixes_ones_own_reward_with_everyones():
    values = [projected(TWO, alpha)[0] for alpha in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(values[1], (values[0] + values[2]) / 2, rtol=1e-4)
    assert values[0] != values[2]


@pytest.mark.parametrize(
    ("actions", "partners", "view", "gradient"),
    [
        ("joint", "mirrored", "each", "reinforce"),
        ("joint", "mirrored", "focal", "straight_through"),
        ("joint", "predicted", "focal", "reinforce"),
        ("own", "implicit", "focal", "straight_through"),
        ("predicted", "predicted", "focal", "reinforce"),
        ("predicted", "mirrored", "each", "straight_through"),
        pytest.param("joint", "mirrored", "each", "straight_through", marks=pytest.mark.slow),
        pytest.param("joint", "mirrored", "focal", "reinforce", marks=pytest.mark.slow),
        pytest.param("joint", "predicted", "focal", "straight_through", marks=pytest.mark.slow),
        pytest.param("own", "implicit", "focal", "reinforce", marks=pytest.mark.slow),
        pytest.param("predicted", "predicted", "focal", "straight_through", marks=pytest.mark.slow),
        pytest.param("predicted", "mirrored", "each", "reinforce", marks=pytest.mark.slow),
    ],
)
def test_the_imagined_return_moves_the_actor_and_nothing_else(actions, partners, view, gradient):
    projection = {"actions": actions, "view": view, "gradient": gradient}
    _, (learner, model), _ = projected(TWO, 1.0, projection, imagined_partners=partners)
    moved = lambda net: any(bool(jnp.any(g != 0)) for g in leaves(net))  # noqa: E731
    assert moved(learner.actor)
    assert not moved(learner.critic)
    # REINFORCE has a critic of its own; only the other differentiates the model (whose weights the update holds).
    assert moved(learner.projected) == moved(learner.projected.out) == (gradient == "reinforce")
    assert moved(model) == (gradient == "straight_through")


def test_the_projections_log_probability_gives_the_exact_gradient():
    """E[R ∇ ln π] over both copies' samples against the gradient of Σ π(a) π(b) R(a, b), for one imagined step."""
    _, _, (learner, model, obs, config) = projected(TWO, 1.0, {"imagination_steps": 1})
    learner = eqx.tree_at(lambda m: m.actor.out.bias, learner, jnp.array([0.0, 0.7]))
    mask, focal, alpha = jnp.asarray(TWO.action_valid), jnp.asarray(0), jnp.ones(())

    def sampled(learner):
        one = lambda key: project(learner, model, obs, mask, focal, alpha, key, config)  # noqa: E731
        trajectories = jax.vmap(one)(jax.random.split(jax.random.key(0), 20_000))
        log_prob = jax.vmap(lambda one: one.log_prob(learner))(jax.lax.stop_gradient(trajectories))
        return jnp.mean(jax.lax.stop_gradient(trajectories.reward) * jnp.sum(log_prob, axis=-1))

    def exact(learner):
        probs = jax.vmap(lambda o, m: jnp.exp(learner.log_probs(observed(TWO, o), m)))(obs, mask)
        zs = jax.vmap(lambda k: model.representation.posterior(obs[0], k)[0])(
            jax.random.split(jax.random.key(5), 2_000)
        )

        def reward(a, b):
            joint = jax.nn.one_hot(jnp.array([a, b]), 2)
            return jnp.mean(jax.vmap(lambda z: jnp.mean(model.reward(model.step(z, joint, focal))))(zs))

        return sum(probs[0, a] * probs[1, b] * reward(a, b) for a in range(2) for b in range(2))

    one, other = (eqx.filter_jit(eqx.filter_grad(f))(learner).actor.out.bias for f in (sampled, exact))
    np.testing.assert_allclose(one, other, atol=0.1 * float(jnp.abs(other).max()))


def test_projected_advantages_and_critic_against_numbers():
    """One trajectory of two steps, γ = ½, λ = 1, rewards 1 and 2, a chance of ½ that it goes on after the first."""
    config = unresolved({"coef": 2.0}, ppo={"gamma": 0.5, "lam": 1.0, "value_weight": 0.5})
    learner = Learner(TWO, config.ppo, jax.random.key(0), projects=True)
    constant = jax.tree.map(jnp.zeros_like, eqx.filter(learner.projected, eqx.is_array))
    learner = eqx.tree_at(lambda m: m.projected, learner, eqx.combine(constant, learner.projected))
    learner = eqx.tree_at(lambda m: m.projected.out.bias, learner, jnp.array([4.0]))
    # The first copy takes action 0 and the second 1, both steps; one observation, so that logits are the bias.
    actor = jax.tree.map(jnp.zeros_like, eqx.filter(learner.actor, eqx.is_array))
    learner = eqx.tree_at(lambda m: m.actor, learner, eqx.combine(actor, learner.actor))
    seen, mask = jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 2), bool)
    one = Projection(
        jnp.array([1.0, 2.0]), jnp.array([0.5, 1.0]), jnp.zeros((3, 1)), seen, mask, jnp.array([[0, 1]] * 2)
    )
    batch = jax.tree.map(lambda x: x[None], one)
    imagined, measures = judged(learner, batch, jnp.ones(1, bool), jnp.asarray(3.0), config)
    np.testing.assert_allclose(imagined.log_prob, np.full((1, 2, 2), np.log(0.5)), rtol=1e-6)
    # Rewards are 3 and 6 in units of returns, every value is 4, the second step has weight ½.
    second = 6 + 0.5 * 4 - 4
    first = 3 + 0.25 * 4 - 4 + 0.25 * second
    np.testing.assert_allclose(imagined.advantage, [[first, second]], rtol=1e-6)
    a, w = np.array([first, second]), np.array([1.0, 0.5]) / 1.5
    normal = (a - (w * a).sum()) / np.sqrt((w * (a - (w * a).sum()) ** 2).sum())
    critic = 0.5 * (w * a**2).sum()
    np.testing.assert_allclose(measures["imagined_return"], 3 * (1 + 0.5 * 0.5 * 2), rtol=1e-6)

    # Since then action 0 has become 1.5 times as probable (clipped at 1.2), and action 1 half as probable (at 0.8).
    later = eqx.tree_at(lambda m: m.actor.out.bias, learner, jnp.log(jnp.array([0.75, 0.25])))
    loss, metrics = projection_loss(later, imagined, config)
    ratio, clipped = np.array([1.5, 0.5])[:, None], np.array([1.2, 0.8])[:, None]
    policy = -(w * np.minimum(ratio * normal, clipped * normal)).sum()
    np.testing.assert_allclose(metrics["projected_critic_loss"], critic, rtol=1e-5)
    np.testing.assert_allclose(metrics["projected_clipped"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.5 * critic + 2.0 * policy, rtol=1e-5)


def test_an_episodes_last_observation_is_reconstructed_too(monkeypatch):
    """Steps lead there and it is decoded, so the decoder learns it; what an agent that is gone is shown counts for
    nothing."""
    config = unresolved().resolve(TWO)
    obs = jnp.arange(8.0).reshape(4, 1, 2, 1)
    acting = jnp.asarray([[1, 1], [1, 0], [0, 0], [0, 0]], bool)[:, None]  # the second agent leaves first
    rollout = eqx.tree_at(lambda r: (r.obs, r.acting), Rollout.empty(TWO, 4, 1), (obs, acting))
    batch = transitions(rollout, jnp.arange(4), jnp.ones(()), TWO)
    np.testing.assert_array_equal(batch.seen.reshape(4, 2), [[1, 1], [1, 1], [1, 0], [0, 0]])
    monkeypatch.setattr(markov_model, "_parts", lambda model, t, key: {"rec": t.obs[0], "dyn": t.obs[0]})
    model = eqx.filter_jit(MarkovModel)(TWO, config, jax.random.key(0))
    parts = markov_loss(model, batch, jax.random.key(0), config)[1]
    np.testing.assert_allclose((parts["rec"], parts["dyn"]), ((0 + 1 + 2 + 3 + 4) / 5, (0 + 1 + 2) / 3))


def nets_of(spec, config):
    """A world model in which rewards differ, and a policy."""
    model = MarkovModel(spec, config, jax.random.key(0))
    weights = jax.random.normal(jax.random.key(9), model.reward.out.weight.shape)
    model = eqx.tree_at(lambda m: m.reward.out.weight, model, weights)
    return model, Learner(spec, config.ppo, jax.random.key(1), projects=True)


def test_in_the_place_of_another_my_own_view_is_what_counts():
    """I am the second of two, and masks leave each one action: one step by hand, from my own view."""
    config = unresolved({"imagination_steps": 1}).resolve(TWO)
    obs, mask, me = jax.random.normal(jax.random.key(2), (2, 1)), jnp.eye(2, dtype=bool), jnp.asarray(1)

    @eqx.filter_jit
    def both_ways(model, learner):
        got = project(learner, model, obs, mask, me, jnp.zeros(()), jax.random.key(3), config)
        start_key, key = jax.random.split(jax.random.key(3))
        _, model_key = jax.random.split(jax.random.split(key, 1)[0])
        z, _ = model.representation.posterior(obs[1], jax.random.split(start_key)[1])
        h = model.step(z, jnp.eye(2)[jnp.array([1, 0])], me)  # mine first
        there = model.decoded(model.next(h, z, jax.random.split(model_key)[1]), me)
        return got, model.reward(h)[:1], jnp.stack([observed(TWO, obs[1]), there])

    got, reward, x = both_ways(*nets_of(TWO, config))
    np.testing.assert_array_equal(got.action, [[0, 1]])
    np.testing.assert_allclose(got.reward, reward, rtol=1e-5)
    np.testing.assert_allclose(got.x, x, rtol=1e-5)


def test_what_partners_are_predicted_to_do_stands_in_their_places():
    spec, me = Mixed().spec, jnp.asarray(1)
    config = unresolved({"actions": "predicted"}).resolve(spec)
    mask, z = jnp.asarray(spec.action_valid)[1:2], jax.nn.one_hot(jnp.array([1, 2]), 4).reshape(1, 8)

    @eqx.filter_jit
    def told(model, learner):
        x = jnp.ones((1, *spec.obs_shape))
        actions = _actions(model, learner, z, x, mask, me[None], me, config, jax.random.key(4))
        return actions[0], jnp.exp(model.others(z[0], me))

    actions, predicted = map(np.asarray, told(*nets_of(spec, config)))
    np.testing.assert_allclose(actions[[0, 2]], predicted, rtol=1e-5)
    np.testing.assert_allclose(np.sort(actions[1]), [0, 0, 0, 1], atol=1e-6)


def test_imagined_rewards_are_in_units_of_the_agents_own_returns(played, monkeypatch):
    _, config, state = played
    scales = (jnp.asarray(4.0), jnp.array([16.0, 64.0]))  # squared
    state = eqx.tree_at(lambda s: (s.rewards.variance, s.returns.variance), state, scales)
    starts = draw_starts(state.rollout, state.spec, jax.random.key(0), config)
    nothing = tree_of(projection.Imagined, trajectory=None, log_prob=None, advantage=None, target=None, weight=None)
    for module in (projection, wm_rnd):
        monkeypatch.setattr(module, "trajectories", lambda *_: tree_of(Projection, reward=None))
    monkeypatch.setattr(projection, "judged", lambda mine, dreams, valid, scale, config: (nothing, {"scale": scale}))
    monkeypatch.setattr(wm_rnd, "straight_through_loss", lambda dreams, valid, scale, config: (0.0, {"scale": scale}))

    @eqx.filter_jit
    def scales_of(state, key):
        _, once = imagine(state.learners, wm_rnd.imagined_world(state, config), starts, key, config)
        _, through = wm_rnd.train_agents(state, key, wm_rnd._judged(state, config)[1], starts, config)
        return once["scale"], through["scale"] / config.ppo.minibatches

    for scale in scales_of(state, jax.random.key(1)):
        np.testing.assert_allclose(scale, [2 / 4, 2 / 8], rtol=1e-5)


def test_a_transition_is_what_each_agent_saw_before_and_after_its_step():
    """The second of two copies in the last of three steps, then the first in the first: every number says what it is
    of."""
    spec = EnvSpec("numbered", ("a", "b", "c"), ((2,),) * 3, (2,) * 3)
    code = np.arange(24.0, dtype=np.float32).reshape(4, 2, 3)
    obs, done = np.stack([code, -code], axis=-1), code[:3].astype(np.int32)
    x = jnp.asarray
    rollout = Rollout(x(obs[:3]), None, x(done % 2), x(code[:3]), x(done % 3 == 0), x(done % 5 > 0), x(obs[3]), x(3))
    got = eqx.filter_jit(transitions)(rollout, jnp.array([5, 0]), jnp.asarray(10.0), spec)
    for k, (step, copy, agent) in enumerate([(2, 1, 0), (2, 1, 1), (2, 1, 2), (0, 0, 0), (0, 0, 1), (0, 0, 2)]):
        one = jax.tree.map(lambda field, k=k: np.asarray(field)[k], got)
        assert one.focal == agent
        np.testing.assert_array_equal(one.obs, obs[step, copy, agent])
        np.testing.assert_array_equal(one.obs_next, obs[step + 1, copy, agent])
        assert one.terminal == (done % 3 == 0)[step, copy, agent]
        np.testing.assert_array_equal(one.action, (done % 2)[step, copy])
        np.testing.assert_array_equal(one.acting, (done % 5 > 0)[step, copy])
        np.testing.assert_allclose(one.reward, code[step, copy] / 10)


def test_rewards_are_predicted_in_the_order_in_which_an_agent_numbers_all():
    """Itself first: a model which says 1, 2, 3 is right of agents that earn that only for the first of them."""
    spec, three = Mixed().spec, jnp.array([1.0, 2.0, 3.0])
    config = unresolved().resolve(spec)
    model = eqx.tree_at(lambda m: m.reward.out.bias, MarkovModel(spec, config, jax.random.key(0)), three)
    obs, never, always = jnp.zeros((1, 4)), jnp.zeros((1, 4), bool), jnp.ones((1, 3), bool)

    @eqx.filter_jit
    def loss(model, me):
        one = Transition(obs, never, always.astype(int), always, three[None], never[:, 0], obs, always[:, 0], me[None])
        return markov_loss(model, one, jax.random.key(0), config)[1]["reward"]

    losses = [float(loss(model, jnp.asarray(me))) for me in range(3)]
    np.testing.assert_allclose(losses, [0, 1 + 1, 4 + 1 + 1], atol=1e-5)


def test_predictions_are_compared_with_what_steps_led_to(monkeypatch):
    """What errors are measured against, at each step and after each step of an open loop from the second on."""
    config, obs = unresolved().resolve(TWO), jnp.arange(6.0)[:, None]
    never, always = jnp.zeros(6, bool), jnp.ones((6, 2), bool)
    s = Sequence(obs, always, always.astype(int), obs[:, 0], never, always, never.at[0].set(True), jnp.asarray(1))
    monkeypatch.setattr(markov_quality, "squared", lambda one, other, valid: other[:, 0])
    names = ("reconstruction", "one_step", "one_step_sampled", "still")

    @eqx.filter_jit
    def compared(model):
        one = markov_quality.one_step(model, s, jnp.ones(()), jax.random.key(0))
        return [one[name] for name in names], markov_quality.open_loop(model, s, 3, 1, 2, jax.random.key(0))

    here, ahead = compared(nets_of(TWO, config)[0])
    rows = np.log1p(np.arange(6.0))
    np.testing.assert_allclose(here, [rows[:-1], rows[1:], rows[1:], rows[1:]], rtol=1e-5)
    np.testing.assert_allclose(ahead, [rows[2:5], rows[2:5]], rtol=1e-5)


def test_how_others_are_foreseen_counts_their_actions_and_not_the_steps():
    """Steps without anybody else say nothing of it: one of the two actions is what was expected of the one step."""
    config = unresolved({"actions": "predicted"}).resolve(TWO)
    model, obs, rows = MarkovModel(TWO, config, jax.random.key(0)), jnp.zeros((4, 1)), jnp.ones((4, 2), bool)
    alone_later, mine = rows.at[1:, 1].set(False), rows[:, 0]

    @jax.jit
    def accuracy(action):
        taken = jnp.full((4, 2), action)
        batch = Transition(obs, rows, taken, alone_later, jnp.zeros((4, 2)), ~mine, obs, mine, jnp.zeros(4, int))
        return markov_loss(model, batch, jax.random.key(0), config)[1]["team_accuracy"]

    assert float(accuracy(0) + accuracy(1)) == 1.0


def test_only_partners_that_are_mirrored_are_shown_in_their_place():
    config = unresolved().resolve(TWO)
    model, learner = nets_of(TWO, config)
    learners = jax.tree.map(lambda x: jnp.stack([x, x]) if eqx.is_array(x) else x, learner)
    obs, never, always = jnp.zeros((6, 1)), jnp.zeros(6, bool), jnp.ones((6, 2), bool)
    of = lambda me: Sequence(obs, always, always.astype(int), obs[:, 0], never, always, never, me)  # noqa: E731
    s = jax.vmap(of)(jnp.arange(2))
    one, keys = jnp.ones(()), jax.random.split(jax.random.key(0), 3)
    for mirrored in (True, False):
        along = lambda mirrored=mirrored: markov_quality.imagine_along(  # noqa: E731
            model, TWO, learners, s, 1, one, jnp.ones(2), keys, mirrored=mirrored
        )
        assert ("others" in eqx.filter_eval_shape(along)) == mirrored


def test_what_nobody_saw_says_nothing_of_the_code():
    model = MarkovModel(TWO, unresolved().resolve(TWO), jax.random.key(0))
    obs, seen = jax.random.normal(jax.random.key(1), (64, 1)).at[::2].set(0.5), jnp.arange(64) % 2 == 0
    measures = jax.jit(lambda seen: code_measures(model, obs, seen, jax.random.key(2)))
    assert float(measures(seen)["latent_std"]) < 1e-6 < float(measures(seen | True)["latent_std"])


def test_views_are_numbered_from_oneself():
    np.testing.assert_array_equal(own_first(3), [[0, 1, 2], [1, 0, 2], [2, 0, 1]])


def test_rank_tells_a_collapsed_code_from_a_varied_one():
    varied = jax.random.normal(jax.random.key(0), (256, 6))
    line = varied[:, :1] * jnp.ones(6)
    np.testing.assert_allclose(latent_rank(varied), 6.0, atol=0.2)
    np.testing.assert_allclose(latent_rank(line), 1.0, atol=0.1)
    np.testing.assert_allclose(latent_rank(jnp.ones((16, 6))), 1.0, atol=1e-5)


# ------------------------------------------------------------------------------------------ the update


@pytest.fixture(scope="module")
def played():
    env = Bandit()
    config = unresolved({"coef": 10.0}).resolve(env.spec)
    state = full_state(env, config)
    # Rewards already matter to the model, so that imagined returns have a gradient.
    weights = jax.random.normal(jax.random.key(9), state.world_model.reward.out.weight.shape)
    return env, config, eqx.tree_at(lambda s: s.world_model.reward.out.weight, state, weights)


_update = eqx.filter_jit(wm_rnd.update)


def test_projection_changes_policies_but_not_the_world_model(played):
    _, config, state = played
    strong, metrics = _update(state, jax.random.key(5), config)
    less = dataclasses.replace(config, projection=dataclasses.replace(config.projection, coef=1e-9))
    weak, _ = _update(state, jax.random.key(5), less)
    assert same(weak.world_model, strong.world_model)
    assert not same(weak.world_model, state.world_model)
    assert not same(weak.learners.actor, strong.learners.actor)
    assert {"world_model/latent_rank", "agent/agent_1/imagined_return", "symmetry_ratio"} <= metrics.keys()
    assert int(weak.rollout.filled) == 0
    assert int(weak.updates) == 1


def test_an_agents_update_does_not_depend_on_the_others_policies(played):
    _, config, state = played
    judged, batch, _ = eqx.filter_jit(wm_rnd._judged)(state, config)
    starts = draw_starts(judged.rollout, judged.spec, jax.random.key(3), config)

    @eqx.filter_jit
    def train_agents(state, key, batch, config):
        imagined, _ = imagine(state.learners, wm_rnd.imagined_world(state, config), starts, key, config)
        return wm_rnd.train_agents(state, key, batch, imagined, config)

    other_policy = jax.tree.map(lambda x: x.at[1].add(0.3), judged.learners)
    changed = eqx.tree_at(lambda s: s.learners, judged, other_policy)
    of = lambda state, i: jax.tree.map(lambda x: x[i], eqx.filter(state.learners, eqx.is_array))  # noqa: E731
    one, _ = train_agents(judged, jax.random.key(0), batch, config)
    other, _ = train_agents(changed, jax.random.key(0), batch, config)
    assert same(of(one, 0), of(other, 0))
    assert not same(of(one, 0), of(judged, 0))


def test_nothing_is_learned_before_the_rollout_is_full(played):
    _, config, state = played
    short = eqx.tree_at(lambda s: s.rollout.filled, state, state.rollout.filled - 1)
    after, metrics = _update(short, jax.random.key(0), config)
    assert same(after, short)
    assert all(int(count) == 0 for _, count in metrics.values())


def test_a_rollout_in_which_hardly_anyone_acts_is_dropped(played):
    """As while copies wait for each other at a checkpoint."""
    _, config, state = played
    idle = eqx.tree_at(lambda s: s.rollout.acting, state, state.rollout.acting.at[2:].set(False).at[:, 1].set(False))
    after, metrics = _update(idle, jax.random.key(0), config)
    assert same(after, eqx.tree_at(lambda s: s.rollout.filled, idle, jnp.zeros_like(idle.rollout.filled)))
    assert all(int(count) == 0 for _, count in metrics.values())


def test_without_projection_and_curiosity_it_is_independent_ppo():
    config = unresolved({"coef": 0.0}).resolve(TWO)
    state = eqx.filter_eval_shape(wm_rnd.init, jax.random.key(0), TWO, config)
    assert state.world_model is None
    assert state.curiosity is None
    _, metrics = eqx.filter_eval_shape(wm_rnd.update, state, jax.random.key(0), config)
    assert not any("world_model" in name or "imagined" in name or "curiosity" in name for name in metrics)
    for name in ("ippo", "ippo_common"):
        assert preset(name).projection.coef == 0
        assert preset(name).curiosity.kind == "none"
    differ = {
        f.name
        for f in dataclasses.fields(Config)
        if getattr(preset("ippo"), f.name) != getattr(preset("wm_rnd"), f.name)
    }
    assert differ == {"preset", "projection", "curiosity"}


# ------------------------------------------------------------------------------------------ learning


def learned(env, config, rows):
    """Probabilities of action 1 after `rows` steps of every copy."""
    driver = GraphDriver(env, config.resolve(env.spec), chunk=rows)
    state = driver.advance(driver.start(jax.random.key(0)))[0].state
    x = observed(env.spec, jnp.ones((env.spec.num_agents, 1)))
    probs = eqx.filter_vmap(lambda learner, x: jnp.exp(learner.log_probs(x, jnp.ones(2, bool))))(state.learners, x)
    return np.asarray(probs[:, 1])


LEARNS = {"ppo": {"lr": 1e-2, "epochs": 2, "minibatches": 1}, "num_envs": 8}


def test_independent_ppo_finds_the_better_arm():
    assert (learned(Bandit(), unresolved({"coef": 0.0}, **LEARNS), 320) > 0.9).all()


def test_independent_ppo_learns_to_do_the_same():
    probs = learned(Same(), unresolved({"coef": 0.0}, **LEARNS), 480)
    assert probs.min() > 0.85 or probs.max() < 0.15


def test_common_reward_makes_helping_pay():
    assert (learned(Helping(), unresolved({"coef": 0.0}, **LEARNS), 320) < 0.1).all()
    assert (learned(Helping(), unresolved({"coef": 0.0}, common_reward=True, **LEARNS), 320) > 0.9).all()


def projecting(gradient, coef):
    model = dataclasses.replace(unresolved().world_model, lr=1e-2, batch=8, length=8, units=16, hidden=16)
    projection = {"coef": coef, "starts": 32, "gradient": gradient}
    return unresolved(projection, world_model_every=4.0, world_model=model, **LEARNS)


@pytest.mark.parametrize(
    ("gradient", "coef"), [pytest.param("straight_through", 2.0, marks=pytest.mark.slow), ("reinforce", 3.0)]
)
def test_what_if_everyone_acted_as_i_do_makes_helping_pay(gradient, coef):
    """With selfish PPO reward and a symmetric imagined one, helping is learned where selfish PPO alone unlearns it."""
    assert (learned(Helping(), projecting(gradient, coef), 480) > 0.8).all()


@pytest.mark.slow
def test_where_roles_complete_each_other_it_harms():
    """PPO finds who does what. Among copies of me 2 p (1 − p) is paid, which is most at p = ½: a half of the steps."""
    paid = lambda p: p[0] * (1 - p[1]) + p[1] * (1 - p[0])  # noqa: E731
    alone = learned(Different(), unresolved({"coef": 0.0}, **LEARNS), 480)
    projected = learned(Different(), projecting("reinforce", 3.0), 480)
    assert paid(alone) > 0.8
    assert 0.4 < paid(projected) < 0.65
    assert (np.abs(projected - 0.5) < 0.3).all()


# ------------------------------------------------------------------------------------------ runs


@pytest.mark.slow
def test_a_graph_run_resumed_equals_the_uninterrupted_one(tmp_path):
    """With everything on: masks, agents that differ, predicted partners, hybrid curiosity."""
    env = Mixed()
    config = unresolved({"actions": "predicted"}, {"kind": "rnd", "sharing": "hybrid"})
    whole = train(config, env=env, name="whole", root=tmp_path, progress=False)
    killed = copy_until(whole, min(saved(whole.checkpoints)), tmp_path / "killed")
    train(resume=killed, env=env, progress=False)
    one = arrays(whole)
    assert_same(one, arrays(killed))
    assert one["state.updates"] > 2
    assert one["state.rollout.filled"].shape == ()
    agents = load(whole, env=env)
    assert evaluate(agents, episodes=2, against=["random"], progress=False, env=env).rows
    assert agents.config.imagined_partners == "predicted"


def test_a_host_run_trains_and_goes_on(tmp_path):
    config = unresolved({"coef": 0.0}, common_reward=True)
    run = train(config, env=Toy, name="host", root=tmp_path, progress=False)
    assert run.metrics()[-1]["agent/cat_0/entropy"] > 0
    # The common reward is cat's and mouse's sum, which is 0; what is logged is their own.
    assert {"episode/return/cat_0"} <= run.metrics()[-1].keys()
    assert arrays(run)["state.rollout.reward"].max() == 0
    train(dataclasses.replace(run.config, total_steps=96), resume=run, env=Toy, progress=False)
    assert arrays(run)["state.steps"] >= 96


# ------------------------------------------------------------------------------------------ the design space

PARTNERS = (("joint", "mirrored"), ("joint", "predicted"), ("own", "implicit"), ("predicted", "predicted"))
CURIOSITY = ("none", "shared", "individual", "hybrid")
SCHEDULES = ("constant", "linear", "cosine")
# Every pair of partners and curiosity; schedules in turn, so that they meet all of both.
WM_RND = [
    (*p, c, SCHEDULES[(i + j) % 3]) for (i, p), (j, c) in itertools.product(enumerate(PARTNERS), enumerate(CURIOSITY))
]


def curiosity_of(name):
    return {"kind": "none"} if name == "none" else {"kind": "rnd", "sharing": name}


@pytest.mark.parametrize(
    ("actions", "partners", "curiosity", "schedule"),
    [one if k % 3 == 0 else pytest.param(*one, marks=pytest.mark.slow) for k, one in enumerate(WM_RND)],
)
def test_every_meaningful_pair_builds_and_updates(actions, partners, curiosity, schedule):
    config = unresolved(
        {"actions": actions, "schedule": schedule, "symmetry_end": 0.5},
        curiosity_of(curiosity),
        imagined_partners=partners,
    ).resolve(TWO)
    check(config, TWO)


@pytest.mark.parametrize(
    ("spec", "latent", "partners", "curiosity"),
    [
        (TWO, "change", "implicit", "none"),
        (TWO, "change", "predicted", "shared"),
        (TWO, "change", "implicit", "individual"),
        (TWO, "categorical", "predicted", "hybrid"),
        (IMAGES, "auto", "predicted", "shared"),
    ],
)
def test_matwm_mixes_with_every_curiosity(spec, latent, partners, curiosity):
    config = tiny(spec, {"latent": latent}, imagined_partners=partners)
    config = dataclasses.replace(config, curiosity=unresolved(curiosity=curiosity_of(curiosity)).curiosity)
    assert config.world_model.teammates == (partners == "predicted")
    check(config, spec)


def check(config, spec):
    """Traced with real shapes: a state comes out of an update as it went in."""
    learner = algorithm(config)
    key = jax.random.key(0)
    state = eqx.filter_eval_shape(learner.init, key, spec, config)
    after, metrics = eqx.filter_eval_shape(learner.update, state, key, config)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(after) == shapes(state)
    assert (config.curiosity.kind == "rnd") == any("intrinsic" in name for name in metrics)


@pytest.mark.slow
@pytest.mark.parametrize(("actions", "partners", "curiosity", "schedule"), WM_RND)
def test_every_meaningful_pair_takes_a_real_update(actions, partners, curiosity, schedule):
    env = Bandit()
    config = unresolved(
        {"actions": actions, "schedule": schedule, "symmetry_end": 0.5},
        curiosity_of(curiosity),
        imagined_partners=partners,
    ).resolve(env.spec)
    state, metrics = _update(full_state(env, config), jax.random.key(0), config)
    assert int(state.updates) == 1
    assert all(np.isfinite(total) for total, _ in metrics.values())


class Clock(Bandit):
    """Shows the time, so that observations differ."""

    def look(self, state):
        return jnp.full((self.spec.num_agents, 1), state.step, jnp.float32)


@pytest.mark.slow
def test_matwm_with_curiosity_trains():
    env = Clock()
    config = tiny(env.spec, world_model_every=16.0, agents_every=16.0)
    config = dataclasses.replace(config, curiosity=unresolved(curiosity=curiosity_of("shared")).curiosity)
    driver = GraphDriver(env, config, chunk=48)
    runner = driver.start(jax.random.key(0))
    before = jax.tree.map(jnp.copy, eqx.filter(runner.state.curiosity, eqx.is_array))
    runner, metrics = driver.advance(runner)
    after = runner.state.curiosity
    assert same(after.shared.target, before.shared.target)
    assert not same(after.shared.predictor, before.shared.predictor)
    for name in ("world_model/curiosity", "agent/agent_0/intrinsic_reward"):
        total, count = metrics[name]
        assert count > 0
        assert total > 0
    assert isinstance(runner.state, matwm.State)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Config(imagined_partners="mirrored"), "each agent of matwm imagines its own alone"),
        (lambda: Config(projection=unresolved().projection), "matwm has no PPO"),
        (
            lambda: Config(
                imagined_partners="predicted",
                world_model=dataclasses.replace(Config().world_model, teammates=False),
            ),
            "needs the predictor that world_model.teammates=False removes",
        ),
        (lambda: dataclasses.replace(preset("small"), algo="wm_rnd"), "PPO learns from its own actions only"),
        (lambda: unresolved({"actions": "own"}, imagined_partners="mirrored"), "does not see what the others do"),
        (lambda: unresolved(imagined_partners="implicit"), "needs to be told what the others do"),
        (
            lambda: unresolved({"actions": "predicted"}, imagined_partners="implicit"),
            "needs probabilities of what the others do",
        ),
        (lambda: unresolved({"coef": 0.0, "schedule": "linear"}), "with projection.coef=0 nothing is imagined"),
        (
            lambda: dataclasses.replace(
                unresolved(), world_model=dataclasses.replace(unresolved().world_model, latent="change")
            ),
            "samples without a gradient",
        ),
        (lambda: unresolved(imagined_partners="mirrored").resolve(TAG), "those of tag differ"),
        (lambda: unresolved(ppo={"minibatches": 3}).resolve(TWO), "must divide the 16 steps of a rollout"),
    ],
)
def test_combinations_that_mean_nothing_are_refused_with_the_reason(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()


def test_partners_follow_from_the_action_input_and_the_agents():
    wanted = {"joint": "mirrored", "own": "implicit", "predicted": "predicted"}
    for actions, partners in wanted.items():
        assert unresolved({"actions": actions}).resolve(TWO).imagined_partners == partners
    assert unresolved().resolve(TAG).imagined_partners == "predicted"


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.algo == "wm_rnd"])
@pytest.mark.parametrize("spec", [TWO, TAG, EnvSpec("images", ("l", "r"), ((16, 16, 3),) * 2, (3, 3))])
def test_presets_build_on_vectors_images_and_unequal_agents(name, spec):
    check(preset(name).resolve(spec), spec)
