"""What agents imagined, as arrays."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Toy

import codream
from codream import ConfigError, Run
from codream.envs import HostEnv, make_env
from codream.markov_quality import was_there
from codream.model_quality import record
from codream.report.dreams import played_only


def test_dreams_are_beside_what_happened(host_run: Run) -> None:
    agents = codream.load(host_run)
    spec, samples = agents.spec, 3
    episodes = codream.dream(agents, episodes=2, samples=samples, seed=4)
    assert [episode.label for episode in episodes] == ["episode 1", "episode 2"]
    for episode in episodes:
        steps = len(episode.action)
        assert episode.obs.shape == (steps + 1, spec.num_agents, *spec.obs_shape)
        assert episode.reward.shape == episode.action.shape == (steps, spec.num_agents)
        assert episode.acting.shape == (steps, spec.num_agents)
        assert episode.acting.all()  # a time limit ends everyone's
        assert [dream.focal for dream in episode.dreams] == list(range(spec.num_agents))
        for dream in episode.dreams:
            assert dream.obs is not None
            assert dream.gap is not None
            assert dream.obs.shape == (samples, steps + 1, *spec.obs_shape)
            assert dream.policy.shape == (steps, spec.max_actions)
            np.testing.assert_allclose(dream.policy.sum(axis=-1), 1.0, atol=1e-5)
            # With open eyes all dreams are one, and then they part.
            seen = dream.obs[:, : episode.start + 1]
            np.testing.assert_array_equal(seen, np.broadcast_to(seen[:1], seen.shape))
            assert (dream.gap[: episode.start + 1] == 0).all()
            assert dream.gap[-1] > 0
    again = codream.dream(host_run.path, episodes=2, samples=samples, seed=4)
    np.testing.assert_array_equal(again[1].obs, episodes[1].obs)


def test_nothing_is_compared_where_the_agent_is_not() -> None:
    """It comes late, acts twice, sees what that led to, and is gone."""
    acts = np.asarray([0, 0, 1, 1, 0, 0], bool)
    np.testing.assert_array_equal(was_there(jnp.asarray(acts)), [0, 0, 1, 1, 1, 0])


class Early(Toy):
    """The mouse is caught at once."""

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        answer = super().step({"mouse_0": 0, **actions})
        answer[2]["mouse_0"] = True
        self.agents = [agent for agent in self.agents if agent == "cat_0"]
        return answer


def test_an_episode_says_who_was_there() -> None:
    env = make_env(Early, 1)
    assert isinstance(env, HostEnv)
    still = SimpleNamespace(act=lambda here, rng: np.zeros(here.acting.shape, int))
    played = record(env, still, 1, seed=0)
    [episode] = played_only(env.spec, played, [("", 0)], 50)
    assert episode.acting.tolist() == [[True, True]] + [[True, False]] * 5


def test_less_than_one_is_refused(host_run: Run) -> None:
    with pytest.raises(ConfigError, match="samples must be 1 or more, got 0"):
        codream.dream(host_run, samples=0)
