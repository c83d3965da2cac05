"""The scripted opponents: the published table, both array libraries, every game's pair."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from codream.envs import EnvSpec, TimeStep, is_graph, make_env
from codream.envs.references import Random, Still, references_for

# Return of one adversary and of the good agent per 25-step episode, over 400 episodes.
TABLE = {
    ("random", "random"): (4.2, -15.6),
    ("random", "still"): (3.4, -8.4),
    ("random", "flee"): (0.6, -4.4),
    ("chase", "random"): (63.9, -83.0),
    ("chase", "still"): (68.7, -83.7),
    ("chase", "flee"): (19.0, -37.5),
}
TABLE_EPISODES = 400


def check(returns: np.ndarray, pair: tuple[str, str]) -> None:
    """Within three standard errors of the difference of the two means."""
    got = returns[:, [0, 3]]
    error = got.std(axis=0) * np.sqrt(1 / len(got) + 1 / TABLE_EPISODES)
    difference = np.abs(got.mean(axis=0) - TABLE[pair])
    # The table is rounded to 0.1.
    assert (difference < 3 * error + 0.05).all(), f"{pair}: {got.mean(axis=0)} for {TABLE[pair]} ± {error}"


def test_the_table_in_the_graph() -> None:
    """All six pairs in one compiled program, 500 episodes each."""
    env = make_env("jaxmarl:MPE_simple_tag_v3")
    assert is_graph(env)
    sides = references_for(env.spec)
    predators, prey = ("random", "chase"), ("random", "still", "flee")

    def play(key: jax.Array, predator: jax.Array, runner: jax.Array) -> jax.Array:
        start, key = jax.random.split(key)

        def body(carry: Any, key: jax.Array) -> Any:
            state, ts = carry
            k1, k2, k3 = jax.random.split(key, 3)
            hunt = jnp.stack([sides["adversary"][name].act(ts, k1)[:3] for name in predators])[predator]
            run = jnp.stack([sides["agent"][name].act(ts, k2)[3:] for name in prey])[runner]
            following = env.step(k3, state, jnp.concatenate([hunt, run]))
            return following, following[1].reward

        return jax.lax.scan(body, env.reset(start), jax.random.split(key, 25))[1].sum(0)

    pairs = [(p, q) for p in range(len(predators)) for q in range(len(prey))]
    index = np.repeat(np.asarray(pairs), 500, axis=0)
    keys = jax.random.split(jax.random.key(0), len(index))
    returns = np.asarray(jax.jit(jax.vmap(play))(keys, index[:, 0], index[:, 1]))
    for (p, q), rows in zip(pairs, returns.reshape(len(pairs), 500, 4), strict=True):
        check(rows, (predators[p], prey[q]))


@pytest.mark.parametrize("pair", [("random", "random"), ("chase", "flee")])
def test_the_table_in_mpe2(pair: tuple[str, str]) -> None:
    copies = 100
    env = make_env("simple_tag", num_envs=copies)
    predators = references_for(env.spec)["adversary"][pair[0]]
    prey = references_for(env.spec)["agent"][pair[1]]
    rng = np.random.default_rng(1)
    ts = env.reset(np.arange(copies))
    returns = np.zeros((copies, 4))
    for _ in range(25):
        actions = np.concatenate([predators.act(ts, rng)[:, :3], prey.act(ts, rng)[:, 3:]], axis=1)
        ts = env.step(actions, np.zeros(copies, int))
        returns += ts.reward
    assert ts.last.all()
    check(returns, pair)


def test_both_array_libraries_give_the_same_actions() -> None:
    env = make_env("simple_tag", num_envs=5)
    rng = np.random.default_rng(0)
    ts = env.reset(np.arange(5))
    policies = {name: policy for found in references_for(env.spec).values() for name, policy in found.items()}
    compiled = {name: jax.jit(policy.act) for name, policy in policies.items()}
    for _ in range(6):
        on_device = jax.tree.map(jnp.asarray, ts)
        for name, policy in policies.items():
            actions = policy.act(ts, rng)
            assert isinstance(actions, np.ndarray)
            assert actions.shape == (5, 4)
            in_graph = compiled[name](on_device, jax.random.key(0))
            assert in_graph.shape == (5, 4)
            if name != "random":
                np.testing.assert_array_equal(actions, in_graph, err_msg=name)
        ts = env.step(Random().act(ts, rng), np.zeros(5, int))


def test_hand_made_positions() -> None:
    env = make_env("simple_tag")
    chase, flee = references_for(env.spec)["adversary"]["chase"], references_for(env.spec)["agent"]["flee"]
    obs = np.zeros((1, 4, 16), np.float32)
    # Prey to the left, above, and to the left but so fast to the right that it will soon be there.
    obs[0, :3, 12:14] = [[-0.5, 0.2], [0.1, 0.4], [-0.2, 0.0]]
    obs[0, 2, 14:16] = [1.3, 0.0]
    obs[0, 3, 8:14] = [0.5, 0.1, 2.0, 2.0, -2.0, -2.0]  # one predator near on the right
    ts = timestep(obs, np.ones((1, 4, 5), bool))
    rng = np.random.default_rng(0)
    assert chase.act(ts, rng)[0].tolist() == [1, 4, 2, 0]
    assert flee.act(ts, rng)[0].tolist() == [0, 0, 0, 1]
    obs[0, 3, 2:4] = [-0.95, 0.0]  # the same, with a wall on the left
    assert flee.act(timestep(obs, ts.mask), rng)[0, 3] == 2


def test_chase_and_flee_with_other_numbers_of_agents() -> None:
    env = make_env("simple_tag", num_good=2, num_adversaries=2, num_obstacles=3)
    assert set(references_for(env.spec)["adversary"]) == {"random", "still", "chase"}
    chase = references_for(env.spec)["adversary"]["chase"]
    obs = np.zeros((4, env.spec.obs_size), np.float32)
    prey = 4 + 2 * 3 + 2 * 1
    obs[0, prey : prey + 4] = [0.9, 0.0, 0.0, -0.2]  # the second is nearer
    obs[1, prey : prey + 4] = [0.1, 0.0, 0.0, -0.2]
    actions = chase.act(timestep(obs, np.ones((4, 5), bool)), np.random.default_rng(0))
    assert actions.tolist() == [3, 2, 0, 0]
    hidden = make_env("simple_tag", num_agent_neighbors=1)
    assert set(references_for(hidden.spec)["adversary"]) == {"random", "still"}


def test_masks_are_respected_and_random_is_uniform() -> None:
    env = make_env(toys.MaskToy, num_envs=2)
    assert {side: set(names) for side, names in references_for(env.spec).items()} == {
        "red": {"random", "still"},
        "blue": {"random", "still"},
    }
    mask = np.asarray([[False, True, True], [True, False, False]])
    ts = timestep(np.zeros((2, 2), np.float32), mask)
    assert Still().act(ts, np.random.default_rng(0)).tolist() == [1, 0]
    assert Still(2).act(ts, np.random.default_rng(0)).tolist() == [2, 0]
    many = timestep(np.zeros((4000, 2, 2), np.float32), np.broadcast_to(mask, (4000, 2, 3)))
    actions = Random().act(many, np.random.default_rng(0))
    assert (actions[:, 1] == 0).all()
    assert set(actions[:, 0].tolist()) == {1, 2}
    assert abs((actions[:, 0] == 1).mean() - 0.5) < 0.04
    tag = make_env("simple_tag").spec
    only = np.zeros((1, 4, 5), bool)
    only[..., 3] = True
    for side, name in (("adversary", "chase"), ("agent", "flee")):
        forced = references_for(tag)[side][name].act(
            timestep(np.zeros((1, 4, 16), np.float32), only), np.random.default_rng(0)
        )
        assert forced.tolist() == [[3, 3, 3, 3]]


def test_still_does_nothing_where_that_is_not_the_first_action() -> None:
    """By what the games move: on coin_game's board nobody walks."""
    for name, actions, idle in (
        ("own", 5, 0),
        ("mpe2:simple_tag_v3", 5, 0),
        ("jaxmarl:coin_game", 5, 4),
        ("jaxmarl:smax_3m", 8, 4),
        ("jaxmarl:storm_2p", 5, 4),
        ("jaxmarl:storm_np", 8, 3),
        ("butterfly:pistonball_v6", 3, 1),
    ):
        spec = EnvSpec(name, ("a_0",), ((3,),), (actions,))
        assert references_for(spec)["a"]["still"] == Still(idle), name
    env = make_env("jaxmarl:coin_game")
    state, here = env.reset(jax.random.key(0))
    still = references_for(env.spec)["agent"]["still"].act(here, jax.random.key(1))
    after, _ = env.step(jax.random.key(2), state, still)
    np.testing.assert_array_equal(after.inner.red_pos, state.inner.red_pos)
    np.testing.assert_array_equal(after.inner.blue_pos, state.inner.blue_pos)


def timestep(obs: np.ndarray, mask: np.ndarray) -> TimeStep:
    """A step in the middle of an episode in which everybody acts."""
    shape = mask.shape[:-1]
    no, none = np.zeros(shape, bool), np.zeros(shape[:-1], bool)
    return TimeStep(
        obs=obs, mask=mask, reward=np.zeros(shape, np.float32), terminal=no, acting=~no, first=none, last=none
    )
