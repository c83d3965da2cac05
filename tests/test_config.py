"""Configuration: presets, ranges, names, JSON."""

import dataclasses
import math
from typing import Any

import pytest
from helpers import tiny_config

from codream import Config, ConfigError, EnvSpec, preset
from codream.config import _RANGES, PRESETS, AgentConfig, ReplayConfig, WorldModelConfig

TAG = EnvSpec("tag", ("a_0", "a_1", "a_2", "b_0"), ((16,), (16,), (16,), (14,)), (5, 5, 5, 5))
IMAGES = EnvSpec("pong", ("left", "right"), ((64, 64, 3),) * 2, (3, 3))


def test_paper_is_table_c6() -> None:
    config = preset("paper").resolve(TAG)
    model, agents = config.world_model, config.agents
    assert (model.hidden, model.layers, model.heads, model.units, model.encoder_layers) == (512, 2, 8, 512, 3)
    assert (model.latent, model.latent_gradient, model.groups, model.classes) == (
        "categorical",
        "straight_through",
        32,
        32,
    )
    assert (model.batch, model.length, model.lr, model.clip) == (16, 64, 3e-5, 1000)
    assert (model.dyn_weight, model.mask_weight, model.rep_weight, model.team_weight) == (0.5, 0.5, 0.1, 1.0)
    assert (agents.context, agents.lr, agents.clip, agents.gamma, agents.lam) == (8, 3e-4, 100, 0.99, 0.95)
    assert (config.replay.capacity, config.replay.decay) == (50_000, 0.9998)
    assert (config.warmup, config.total_steps, config.checkpoint_every) == (1_000, 50_000, 5_000)
    assert (config.world_model_every, config.agents_every) == (1, 1)


@pytest.mark.parametrize(
    ("count", "rule"), [(1, (16, 512)), (3, (16, 512)), (4, (12, 768)), (6, (12, 768)), (7, (8, 1024))]
)
def test_the_papers_rule_for_horizon_and_starts(count: int, rule: tuple[int, int]) -> None:
    spec = EnvSpec("n", tuple(f"a_{i}" for i in range(count)), ((2,),) * count, (2,) * count)
    config = preset("paper").resolve(spec)
    assert (config.agents.horizon, config.agents.starts) == rule
    assert config.world_model.batch % count == 0  # an equal share of every agent
    assert config.resolve(spec) == config


def test_summary_where_it_differs() -> None:
    config = preset("summary").resolve(TAG)
    model = config.world_model
    assert (model.layers, model.latent_gradient, model.lr, model.team_weight) == (4, "gumbel", 3e-4, 0.5)
    assert (config.agents.horizon, config.agents.starts) == (15, 768)
    assert (config.replay.capacity, config.replay.decay, config.total_steps) == (100_000, 0.995, 100_000)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert Config.from_json(config.to_json()) == config
    assert Config.from_json(config.resolve(TAG).to_json()) == config.resolve(TAG)


def test_the_latent_follows_the_observations() -> None:
    assert preset("small").resolve(IMAGES).world_model.latent == "categorical"
    change = tiny_config(world_model=dataclasses.replace(tiny_config().world_model, latent="change"))
    with pytest.raises(ConfigError, match="latent=change predicts vectors, but pong has images"):
        change.resolve(IMAGES)


def test_every_number_has_a_range() -> None:
    numbers = set()
    for path, part in (
        ("", Config()),
        ("world_model.", WorldModelConfig()),
        ("agents.", AgentConfig()),
        ("replay.", ReplayConfig()),
        ("partners.", Config().partners),
        ("ppo.", Config().ppo),
        ("projection.", Config().projection),
        ("curiosity.", Config().curiosity),
    ):
        for field in dataclasses.fields(part):
            if str(field.type).startswith(("int", "float")):
                numbers.add(path + field.name)
    assert numbers == set(_RANGES)


@pytest.mark.parametrize("path", _RANGES)
def test_a_value_out_of_range_says_the_range(path: str) -> None:
    part, _, name = path.rpartition(".")
    low, high = _RANGES[path]
    assert low is not None
    owner: Any = Config() if not part else getattr(Config(), part)
    whole = {field.name: str(field.type) for field in dataclasses.fields(owner)}[name].startswith("int")
    for value in [low - 1] + ([] if whole else [math.nan]) + ([] if high is None else [high + 1]):
        with pytest.raises(ConfigError, match=rf"{path} must be .*{low}.*, got {value}"):
            build(part, owner, name, value)


def test_a_list_is_in_range_number_by_number() -> None:
    with pytest.raises(ConfigError, match=r"world_model\.near must be 1e-06 or more, got 0"):
        build("world_model", WorldModelConfig(), "near", (0.1, 0.0))


def build(part: str, owner: Any, name: str, value: Any) -> Config:
    inner = dataclasses.replace(owner, **{name: value})
    return dataclasses.replace(Config(), **{part: inner}) if part else inner


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'smal'; presets: small, "):
        preset("smal")
    text = preset("small").to_json().replace('"hidden"', '"hiden"')
    with pytest.raises(ConfigError, match=r"unknown option world_model\.hiden; nearest: hidden"):
        Config.from_json(text)


def test_combinations_that_mean_nothing() -> None:
    model = Config().world_model
    with pytest.raises(ConfigError, match=r"hidden must be a multiple of 2 × world_model.heads"):
        dataclasses.replace(Config(), world_model=dataclasses.replace(model, hidden=30))
    with pytest.raises(ConfigError, match="at most 1"):
        dataclasses.replace(Config(), partners=dataclasses.replace(Config().partners, random_share=0.6, past_share=0.6))
    with pytest.raises(ConfigError, match="fewer than a sequence"):
        dataclasses.replace(Config(), num_envs=1024)
