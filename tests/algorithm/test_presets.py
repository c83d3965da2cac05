import dataclasses

import equinox as eqx
import jax
import pytest

from codream import matwm
from codream.config import Config, ConfigError
from codream.envs import EnvSpec
from codream.presets import PRESETS, preset

TAG = EnvSpec(
    "simple_tag",
    ("adversary_0", "adversary_1", "adversary_2", "agent_0"),
    ((16,), (16,), (16,), (14,)),
    (5, 5, 5, 5),
)


def team(n, image=False):
    shape = (64, 64, 3) if image else (6,)
    return EnvSpec("team", tuple(f"agent_{i}" for i in range(n)), (shape,) * n, (3,) * n)


def value_at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


# The table of presets, row by row; `None` is a rule that needs the environment.
TABLE = {
    "world_model.hidden": (512, 512),
    "world_model.layers": (2, 4),
    "world_model.heads": (8, 8),
    "world_model.latent": ("categorical", "categorical"),
    "world_model.groups": (32, 32),
    "world_model.classes": (32, 32),
    "world_model.latent_gradient": ("straight_through", "gumbel"),
    "world_model.batch": (16, 16),
    "world_model.length": (64, 64),
    "agents.horizon": (None, 15),
    "agents.starts": (None, 768),
    "agents.context": (8, 8),
    "world_model.lr": (3e-5, 3e-4),
    "agents.lr": (3e-4, 3e-4),
    "world_model.clip": (1000, 1000),
    "agents.clip": (100, 100),
    "replay.capacity": (50_000, 100_000),
    "replay.decay": (0.9998, 0.995),
    "world_model.team_weight": (1.0, 0.5),
    "agents.gamma": (0.99, 0.99),
    "agents.lam": (0.95, 0.95),
    "warmup": (1_000, 1_000),
    "total_steps": (50_000, 100_000),
    "world_model.encoder_layers": (3, 3),
    "world_model.units": (512, 512),
    "world_model_every": (1, 1),
    "agents_every": (1, 1),
    "checkpoint_every": (5_000, 5_000),
    # The loss and its switches are the paper's.
    "world_model.rec_weight": (1, 1),
    "world_model.reward_weight": (1, 1),
    "world_model.continue_weight": (1, 1),
    "world_model.dyn_weight": (0.5, 0.5),
    "world_model.mask_weight": (0.5, 0.5),
    "world_model.rep_weight": (0.1, 0.1),
    "world_model.free_nats": (1, 1),
    "world_model.unimix": (0.01, 0.01),
    "world_model.outcome_sees_next": (False, False),
    "world_model.teammates": (True, True),
    "world_model.scale_actions": (True, True),
    "replay.uniform": (False, False),
    "partners.random_share": (0, 0),
    "partners.past_share": (0, 0),
}


@pytest.mark.parametrize("path", TABLE)
def test_presets_hold_the_papers_numbers(path):
    paper, summary = TABLE[path]
    assert value_at(preset("paper"), path) == paper
    assert value_at(preset("summary"), path) == summary


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.algo == "matwm"])
def test_every_preset_builds_and_updates(name):
    """Traced with its real sizes, without allocating them."""
    config = preset(name).resolve(TAG)
    assert config.preset == name
    key = jax.random.key(0)
    state = eqx.filter_eval_shape(matwm.init, key, TAG, config)
    memory = eqx.filter_eval_shape(matwm.init_memory, state, 2, config)
    assert memory.hidden.h.shape == (2, 4, config.world_model.hidden)
    assert state.replay.obs.shape == (config.replay_rows, config.num_envs, 4, 16)
    after, metrics = eqx.filter_eval_shape(matwm.update, state, key, config)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert {"world_model/loss", "agent/agent_0/actor_loss"} <= set(metrics)


def test_papers_world_model_is_of_the_papers_size():
    config = preset("paper").resolve(TAG)
    model = eqx.filter_eval_shape(matwm.init, jax.random.key(0), TAG, config).world_model
    assert model.representation.size == 1024
    assert model.features_size == 1024 + 512 + 3 * 5
    assert model.mixer.in_features == 1024 + 20
    assert len(model.transformer.blocks) == 2


@pytest.mark.parametrize(
    ("agents", "horizon", "starts"),
    [(1, 16, 512), (3, 16, 512), (4, 12, 768), (6, 12, 768), (7, 8, 1024), (12, 8, 1024)],
)
def test_paper_imagines_as_far_as_its_rule_says(agents, horizon, starts):
    config = preset("paper").resolve(team(agents))
    assert (config.agents.horizon, config.agents.starts) == (horizon, starts)


def test_what_is_set_is_not_overruled():
    config = preset("summary").resolve(team(8))
    assert (config.agents.horizon, config.agents.starts) == (15, 768)


@pytest.mark.parametrize(("agents", "batch"), [(1, 16), (3, 15), (4, 16), (5, 15), (6, 18), (40, 40)])
def test_a_batch_is_shared_out_equally(agents, batch):
    assert preset("paper").resolve(team(agents)).world_model.batch == batch


def test_the_latent_follows_the_observations():
    assert preset("small").resolve(team(2)).world_model.latent == "change"
    assert preset("small").resolve(team(2, image=True)).world_model.latent == "categorical"
    vectors_only = dataclasses.replace(Config(), world_model=dataclasses.replace(Config().world_model, latent="change"))
    with pytest.raises(ConfigError, match=r"predicts vectors, but team has images of shape \(64, 64, 3\)"):
        vectors_only.resolve(team(2, image=True))
