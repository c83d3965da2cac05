import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import Mixed
from tiny import batch_of, tiny

from codream import matwm
from codream.config import CuriosityConfig
from codream.curiosity import init_curiosity
from codream.envs import TimeStep
from codream.imagination import Dream
from codream.latents import symlog
from codream.linear import tree_of
from codream.players import draw_players, snapshot
from codream.training import GraphDriver

KEY = jax.random.key(0)
SPEC = Mixed().spec
COPIES = 600


# ------------------------------------------------------------------------------------------ acting


@pytest.fixture(scope="module")
def config():
    """Warm-up of 100 steps; each side plays a third of its episodes at random, a third as a past self."""
    partners = {"random_share": 1 / 3, "past_share": 1 / 3, "past_every": 50, "past_kept": 2}
    return tiny(SPEC, {"latent": "change"}, partners=partners, warmup=100, num_envs=2)


@pytest.fixture(scope="module")
def state(config):
    """Current actors always take their action 0 if they may, past ones (two were taken) their action 1."""
    state = eqx.filter_jit(matwm.init)(KEY, SPEC, config)
    sure = lambda bias, action: (0 * bias).at[..., action].set(1e3)  # noqa: E731
    return eqx.tree_at(
        lambda s: (s.agents.actor.net.out.bias, s.past.actors.net.out.bias, s.past.count, s.steps),
        state,
        (
            sure(state.agents.actor.net.out.bias, 0),
            sure(state.past.actors.net.out.bias, 1),
            jnp.asarray(2),
            jnp.asarray(100),
        ),
    )


@pytest.fixture(scope="module")
def here():
    """First steps of many copies, in half of which action 0 is forbidden to all."""
    mask = np.broadcast_to(SPEC.action_valid, (COPIES, 3, 4)).copy()
    mask[::2, :, 0] = False
    none = jnp.zeros((COPIES, 3))
    return TimeStep(
        obs=jax.random.normal(KEY, (COPIES, 3, 4)),
        mask=jnp.asarray(mask),
        reward=none,
        terminal=none.astype(bool),
        acting=none == 0,
        first=jnp.ones(COPIES, bool),
        last=jnp.zeros(COPIES, bool),
    )


@pytest.fixture(scope="module")
def acted(config, state, here):
    """Actions and who played, by (steps so far)."""
    act = eqx.filter_jit(lambda s: matwm.act(s, matwm.init_memory(s, COPIES, config), here, KEY, config))

    def at(steps):
        action, memory = act(eqx.tree_at(lambda s: s.steps, state, jnp.asarray(steps)))
        return np.asarray(action), np.asarray(memory.player)

    return at


def frequencies(actions):
    return np.bincount(actions, minlength=4) / len(actions)


def test_warm_up_acts_uniformly_over_what_is_allowed(acted):
    action, _ = acted(99)
    for agent, count in enumerate(SPEC.num_actions):
        free, masked = action[1::2, agent], action[::2, agent]
        np.testing.assert_allclose(frequencies(free)[:count], 1 / count, atol=0.1)
        np.testing.assert_allclose(frequencies(masked)[1:count], 1 / (count - 1), atol=0.1)
        assert (masked > 0).all()
        assert (action[:, agent] < count).all()


def test_after_warm_up_current_past_and_random_policies_play_their_shares(acted):
    action, player = acted(100)
    assert (player[:, 0] == player[:, 1]).all(), "a side is played by one kind of player"
    hunters, prey = player[:, 0], player[:, 2]
    for side in (hunters, prey):
        np.testing.assert_allclose((side == 1).mean(), 1 / 3, atol=0.08)
        np.testing.assert_allclose((side >= 2).mean(), 1 / 3, atol=0.08)
        assert set(side) == {0, 1, 2, 3}
    np.testing.assert_allclose(((hunters > 0) & (prey > 0)).mean(), 4 / 9, atol=0.08, err_msg="drawn by themselves")
    free = np.arange(COPIES) % 2 == 1
    for agent in range(3):
        mine = action[:, agent]
        assert (mine[free & (player[:, agent] == 0)] == 0).all()
        assert (mine[free & (player[:, agent] >= 2)] == 1).all()
        random = mine[free & (player[:, agent] == 1)]
        assert len(set(random)) == SPEC.num_actions[agent]
        assert (mine[~free] > 0).all()  # forbidden


def test_players_change_only_where_an_episode_starts(config, state):
    before = jnp.tile(jnp.array([0, 0, 1]), (COPIES, 1))
    first = jnp.arange(COPIES) < COPIES // 2
    after = draw_players(state.past, before, first, SPEC.sides, config.partners, KEY)
    np.testing.assert_array_equal(after[COPIES // 2 :], before[COPIES // 2 :])
    assert (after[: COPIES // 2] != before[: COPIES // 2]).any()
    off = tiny(SPEC, {"latent": "change"})
    np.testing.assert_array_equal(draw_players(state.past, before, first, SPEC.sides, off.partners, KEY), before)


def test_before_the_first_snapshot_nobody_plays_a_past_self(config, state):
    young = eqx.tree_at(lambda s: s.past.count, state, jnp.asarray(0))
    first = jnp.ones(COPIES, bool)
    player = draw_players(young.past, jnp.zeros((COPIES, 3), int), first, SPEC.sides, config.partners, KEY)
    assert set(np.unique(player)) == {0, 1}


def test_evaluation_plays_current_policies_only_and_greedily_if_asked(config, state, here):
    # In warm-up, and with a policy that prefers action 1 by little.
    prefers = eqx.tree_at(
        lambda s: (s.agents.actor.net.out.bias, s.agents.actor.net.out.weight, s.steps),
        state,
        (jnp.zeros((3, 4)).at[:, 1].set(0.3), 0 * state.agents.actor.net.out.weight, jnp.asarray(0)),
    )
    act = lambda **options: eqx.filter_jit(  # noqa: E731
        lambda s: matwm.act(s, matwm.init_memory(s, COPIES, config), here, KEY, config, collect=False, **options)
    )(prefers)
    greedy, memory = act(greedy=True)
    assert (np.asarray(greedy) == 1).all()
    assert (np.asarray(memory.player) == 0).all()
    sampled, _ = act()
    expected = np.exp([0, 0.3, 0]) / np.exp([0, 0.3, 0]).sum()
    np.testing.assert_allclose(frequencies(sampled[1::2, 0])[:3], expected, atol=0.1)


def taken(state, config):
    trained = state.agents_updates > 0
    return snapshot(state.past, state.agents.actor, state.due_from, state.steps, trained, config.partners)


def test_snapshots_take_turns(config, state):
    marked = lambda value: eqx.tree_at(  # noqa: E731
        lambda s: s.agents.actor.net.out.bias, state, jnp.full((3, 4), value)
    )
    kept = lambda past: np.asarray(past.actors.net.out.bias[:, 0, 0]).tolist()  # noqa: E731
    trained = eqx.tree_at(lambda s: (s.agents_updates, s.due_from), marked(5.0), (jnp.asarray(1), state.steps))
    past = taken(trained, config)  # 100 steps at one snapshot per 50: two were taken
    assert int(past.count) == 2
    later = eqx.tree_at(lambda s: s.steps, trained, jnp.asarray(150))
    past = taken(later, config)
    assert int(past.count) == 3
    assert kept(past) == [5.0, kept(state.past)[1]]
    untrained = eqx.tree_at(lambda s: s.agents_updates, later, jnp.asarray(0))
    assert int(taken(untrained, config).count) == 2
    # However late training begins: one for each interval that ends from then on.
    late = eqx.tree_at(lambda s: (s.due_from, s.steps), trained, (jnp.asarray(990), jnp.asarray(1010)))
    assert int(taken(late, config).count) == 3
    after = eqx.tree_at(lambda s: (s.due_from, s.steps), trained, (jnp.asarray(1010), jnp.asarray(1020)))
    assert int(taken(after, config).count) == 2
    updated, _ = matwm.update(late, jax.random.key(0), config, (0, 0))
    assert int(updated.past.count) == 3
    assert int(updated.due_from) == 1010


# ------------------------------------------------------------------------------------------ updates due


def counted(game, every, copies, warmup, rows, filled=None):
    """Updates due after each of `rows` steps of all copies."""
    config = dataclasses.replace(game.config, warmup=warmup, world_model_every=every, agents_every=2 * every)
    on_device = jax.jit(lambda *numbers: matwm.updates_due(*numbers, game.fresh.spec, config))
    counts = []
    for row in range(1, rows + 1):
        numbers = (copies * row, copies * (row - 1), filled or 100)
        due = matwm.updates_due(*numbers, game.fresh.spec, config)
        assert due == tuple(map(int, on_device(*numbers)))
        counts.append(due[0])
    return counts


@pytest.mark.parametrize(
    ("every", "copies", "expected"),
    [
        (1.0, 1, [1] * 8),
        (0.5, 1, [2] * 8),
        (4.0, 1, [0, 0, 0, 1, 0, 0, 0, 1]),
        (2.5, 1, [0, 0, 1, 0, 1, 0, 0, 1]),
        (1.0, 4, [4] * 8),
        (8.0, 4, [0, 1] * 4),
        (16.0, 16, [1] * 8),
        (6.0, 4, [0, 1, 1, 0, 1, 1, 0, 1]),
        (0.3, 3, [10] * 8),
        (1.5, 1, [0, 1, 1, 0, 1, 1, 0, 1]),
    ],
)
def test_updates_come_at_their_interval(game, every, copies, expected):
    assert counted(game, every, copies, 0, 8) == expected


@pytest.mark.parametrize("every", [0.001, 6.0, 16.0])
def test_updates_are_still_counted_after_a_billion_steps(game, every):
    """There a float32 sees only every 64th step."""
    config = dataclasses.replace(game.config, world_model_every=every)
    due = jax.jit(lambda steps: matwm.updates_due(steps, steps - 16, jnp.asarray(100), game.fresh.spec, config)[0])
    expected = [int(n // every - (n - 16) // every) for n in range(10**9, 10**9 + 48, 16)]
    assert [int(due(n)) for n in range(10**9, 10**9 + 48, 16)] == expected


def test_warm_up_leaves_no_backlog(game):
    assert counted(game, 1.0, 2, 10, 8) == [0, 0, 0, 0, 2, 2, 2, 2]
    assert counted(game, 0.25, 1, 3, 5) == [0, 0, 4, 4, 4]


def test_no_update_before_replay_holds_enough_for_disjoint_windows(game):
    """Two windows of eight steps for each agent, in two copies: sixteen rows surely have room."""
    assert counted(game, 1.0, 1, 0, 1, filled=15) == [0]
    assert counted(game, 1.0, 1, 0, 1, filled=16) == [1]


def test_a_reset_is_no_step(game):
    resets = int(np.asarray(game.heres.last).sum())
    assert resets > 2
    assert int(game.state.steps) == game.rows * game.copies - resets


# ------------------------------------------------------------------------------------------ one update


train_agents = eqx.filter_jit(matwm.train_agents)


def same(a, b):
    return all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def after(game):
    return train_agents(game.state, KEY, game.config)


def test_the_policys_loss_moves_no_world_model_weight(game, after):
    state, metrics = after
    assert same(state.world_model, game.state.world_model)
    assert same(state.optimiser, game.state.optimiser)
    assert same(state.replay, game.state.replay)
    assert not same(state.agents.actor, game.state.agents.actor)
    assert int(state.agents_updates) == 1
    assert all(np.isfinite(x).all() for x in metrics.values())


def test_the_world_models_loss_moves_no_policy(game):
    state, metrics = eqx.filter_jit(matwm.train_world_model)(game.state, KEY, game.config)
    assert same(state.agents, game.state.agents)
    assert not same(state.world_model, game.state.world_model)
    assert {"loss", "rec", "reward", "continue", "dyn", "rep", "mask", "team", "grad_norm"} <= set(metrics)


def test_imagination_starts_from_steps_at_which_its_agent_acts(game, monkeypatch):
    """The last row of a context is the step from which it is imagined."""
    agents = dataclasses.replace(game.config.agents, starts=32)
    config = dataclasses.replace(game.config, agents=agents)
    rest = dict.fromkeys(("features", "mask", "action", "reward", "cont"))
    monkeypatch.setattr(matwm, "dream", lambda model, policy, context, *_: tree_of(Dream, latent=context, **rest))
    context = eqx.filter_jit(lambda state: matwm.imagine_for_agents(state, KEY, config).latent)(game.state)
    assert context.first.shape == (3, 32, 8)
    acting = np.asarray(context.acting)
    for agent in range(3):
        assert acting[agent, :, -1, agent].all()
        assert not acting[agent, :, -2, agent].all()


def test_curiosity_pays_in_imagination_for_what_a_step_leads_to(game, monkeypatch):
    """To it what is seen is the newer the larger it is: 0 at first, then 1, 2, 3. What agents learn from has this on
    top of the game's reward."""
    config = dataclasses.replace(game.config, curiosity=CuriosityConfig(kind="rnd", coef=2.0))
    rewards, latent = jnp.full((3, 4, 3), 10.0), jnp.broadcast_to(symlog(jnp.arange(4.0))[:, None], (3, 4, 4, 4))
    imagined = Dream(latent, latent, jnp.ones((3, 4, 3, 4), bool), jnp.zeros((3, 4, 3), int), rewards, rewards)
    monkeypatch.setattr(matwm, "errors", lambda curiosity, obs, config: obs[..., 0])
    monkeypatch.setattr(matwm, "imagine_for_agents", lambda *_: imagined)
    monkeypatch.setattr(matwm, "improve", lambda agents, given, *_: (agents, {"learned": given.reward}))

    @eqx.filter_jit
    def trained(state):
        curiosity = init_curiosity(SPEC, config.curiosity, KEY)
        state = eqx.tree_at(lambda s: s.curiosity, state, curiosity, is_leaf=lambda x: x is None)
        after, metrics = matwm.train_agents(state, KEY, config)
        assert after.curiosity is not None
        return metrics, after.curiosity.returns.scale

    metrics, scale = trained(game.state)
    bonus = np.arange(1.0, 4) / np.asarray(scale)[:, None]
    np.testing.assert_allclose(metrics["learned"], np.broadcast_to(10 + 2 * bonus[:, None], (3, 4, 3)), rtol=1e-5)
    np.testing.assert_allclose(metrics["intrinsic_reward"], bonus.mean(axis=1), rtol=1e-5)


def test_one_exploding_agent_leaves_the_others_alone(game, after):
    """Clipping is for each agent by itself: with one norm over all, agents 1 and 2 would stand still."""
    wild = eqx.tree_at(
        lambda s: s.agents.critic.net.hidden[0].weight,
        game.state,
        game.state.agents.critic.net.hidden[0].weight.at[0].multiply(1e4),
    )
    wild = eqx.tree_at(
        lambda s: s.agents.critic.net.out.weight,
        wild,
        wild.agents.critic.net.out.weight.at[0].set(1e6 * jax.random.normal(KEY, (15, 16))),
    )
    (calm_state, calm), (wild_state, loud) = after, train_agents(wild, KEY, game.config)
    assert loud["grad_norm"][0] > 1e3 * calm["grad_norm"][0]
    np.testing.assert_array_equal(loud["grad_norm"][1:], calm["grad_norm"][1:])
    for a, b in zip(jax.tree.leaves(calm_state.agents), jax.tree.leaves(wild_state.agents), strict=True):
        np.testing.assert_array_equal(a[1:], b[1:])


def test_the_slow_critic_follows_and_the_scale_is_averaged(game):
    # A model that has learned nothing expects a reward of exactly 0 everywhere.
    weight = game.state.world_model.reward.out.weight
    paid = eqx.tree_at(
        lambda s: s.world_model.reward.out.weight, game.state, 0.1 * jax.random.normal(KEY, weight.shape)
    )
    state, metrics = train_agents(paid, KEY, game.config)
    old, new = game.state.agents, state.agents
    mix = game.config.agents.critic_ema * old.slow_critic.net.out.weight
    mix += (1 - game.config.agents.critic_ema) * new.critic.net.out.weight
    np.testing.assert_allclose(new.slow_critic.net.out.weight, mix, rtol=1e-5, atol=1e-9)
    # Without bias: after one update it is the range of that update's returns.
    first = 1 - game.config.agents.return_ema
    assert (np.asarray(metrics["return_scale"]) > 0).all()
    np.testing.assert_allclose(new.return_scale, first * metrics["return_scale"], rtol=1e-4)


def test_outcome_heads_may_have_a_learning_rate_of_their_own(game):
    weights = eqx.filter(game.fresh.world_model, eqx.is_array)

    @eqx.filter_jit
    def step(outcome_lr):
        settings = dataclasses.replace(game.config.world_model, lr=1e-3, outcome_lr=outcome_lr)
        optimiser = matwm.world_model_optimiser(settings)
        ones = jax.tree.map(jnp.ones_like, weights)
        moved = optimiser.update(ones, optimiser.init(weights))[0]
        return [abs(part.out.weight).max() for part in (moved.reward, moved.cont, moved.mask, moved.team)]

    # Adam's first step is as long as its learning rate.
    np.testing.assert_allclose(step(2e-2), [2e-2, 2e-2, 1e-3, 1e-3], rtol=1e-3)
    np.testing.assert_allclose(step(None), [1e-3] * 4, rtol=1e-3)


@pytest.mark.slow
def test_without_teammates_and_scaled_actions_it_acts_and_trains():
    """Whole steps of the graph driver, updates included; each switch alone is tested with the world model."""
    env = Mixed()
    switches = {"teammates": False, "scale_actions": False}
    driver = GraphDriver(env, tiny(env.spec, switches, {"horizon": 2}, warmup=30), chunk=24)
    runner, metrics = next(driver.run(driver.start(KEY)))
    assert int(runner.state.world_model_updates) > 0
    assert int(runner.state.agents_updates) > 0
    assert all(np.isfinite(total) for total, _ in metrics.values())
    assert "world_model/team" not in metrics


def test_every_agent_gives_an_equal_share_of_a_batch(game, monkeypatch):
    """Drawn with the configured decay, or with none if replay is to be uniform."""
    asked = []
    real = matwm.sample_recent
    monkeypatch.setattr(matwm, "sample_recent", lambda replay, *args: (asked.append(args[:3]), real(replay, *args))[1])
    uniform = dataclasses.replace(game.config, replay=dataclasses.replace(game.config.replay, uniform=True))
    for config in (game.config, uniform):
        eqx.filter_eval_shape(matwm.train_world_model, game.state, KEY, config)
    # Six sequences over three agents.
    assert asked == [(2, 8, 0.99), (2, 8, 1.0)]


def test_curiosity_learns_every_observation_that_an_agent_saw(game, monkeypatch):
    """An episode's last observation too: the bonus is paid for it, and without learning it would stay new for ever."""
    taught = []
    monkeypatch.setattr(matwm, "see", lambda curiosity, obs, valid: taught.append(valid) or curiosity)
    trained = lambda curiosity, obs, valid, config: taught.append(valid) or (curiosity, jnp.zeros(()))  # noqa: E731
    monkeypatch.setattr(matwm, "train_curiosity", trained)
    state = eqx.tree_at(lambda s: s.curiosity, game.state, "of no matter", is_leaf=lambda x: x is None)
    batch = batch_of(game.env.spec, length=8, boundary=5)  # row 4 is a last observation
    batch = eqx.tree_at(lambda b: b.acting, batch, batch.acting.at[0, 6:].set(False))  # the first agent leaves early
    matwm._seen(state, batch, game.config)
    seen = np.ones((8, game.env.spec.num_agents), bool)
    seen[7, 0] = False
    for valid in taught:
        np.testing.assert_array_equal(valid.reshape(seen.shape), seen)
    assert len(taught) == 2


def test_an_episode_tells_of_the_policies_where_all_play_as_they_are(config, state):
    memory = matwm.init_memory(state, 3, config)
    memory = eqx.tree_at(lambda m: m.player, memory, jnp.asarray([[0, 0, 0], [0, 0, 1], [2, 2, 0]]))
    np.testing.assert_array_equal(matwm.as_they_are(memory), [True, False, False])
