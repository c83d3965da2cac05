"""Configuration: presets, ranges, names, JSON."""

import dataclasses
import math
from inspect import unwrap
from typing import Any

import pytest
from helpers import replaced

from codream import Config, ConfigError, EnvSpec, preset
from codream.config import AgentConfig, ReplayConfig, WorldModelConfig
from codream.presets import PRESETS, idle
from codream.ranges import RANGES
from codream.trainer import named

TAG = EnvSpec("tag", ("a_0", "a_1", "a_2", "b_0"), ((16,), (16,), (16,), (14,)), (5, 5, 5, 5))
IMAGES = EnvSpec("pong", ("left", "right"), ((64, 64, 3),) * 2, (3, 3))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert Config.from_json(config.to_json()) == config
    resolved = config.resolve(TAG)
    assert Config.from_json(resolved.to_json()) == resolved
    assert resolved.resolve(TAG) == resolved


def test_keywords_put_into_a_preset_are_in_no_other() -> None:
    one = preset("small")
    one.env_kwargs["max_cycles"] = 7
    assert preset("small").env_kwargs == {}
    assert preset("small") == PRESETS["small"]


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
            if str(field.type).startswith(("int", "float", "tuple[float")):
                numbers.add(path + field.name)
    assert numbers == set(RANGES)


@pytest.mark.parametrize("path", RANGES)
def test_a_value_out_of_range_says_the_range(path: str) -> None:
    part, _, name = path.rpartition(".")
    low, high = RANGES[path]
    assert low is not None
    span = f"{low} to {high}" if high is not None else f"{low} or more"
    owner: Any = Config() if not part else getattr(Config(), part)
    kind = {field.name: str(field.type) for field in dataclasses.fields(owner)}[name]
    for value in [low - 1] + ([] if kind.startswith("int") else [math.nan]) + ([] if high is None else [high + 1]):
        with pytest.raises(ConfigError, match=f"{path} must be {span}, got {value}"):
            build(part, owner, name, (value,) if kind.startswith("tuple") else value)


def test_a_list_is_in_range_number_by_number() -> None:
    with pytest.raises(ConfigError, match=r"world_model\.near must be 1e-06 or more, got 0"):
        build("world_model", WorldModelConfig(), "near", (0.1, 0.0))
    given = object.__new__(WorldModelConfig)  # of which no types are checked, as outside of tests
    vars(given).update(dataclasses.asdict(WorldModelConfig()), near=[0.05, 0.1])
    given.__post_init__()
    assert given == WorldModelConfig(near=(0.05, 0.1))


def test_a_preset_may_be_given_by_its_name() -> None:
    assert named("small", "coin_game") == (dataclasses.replace(preset("small"), env="coin_game"), None)
    with pytest.raises(ConfigError, match="unknown preset 'smal'"):
        named("smal", None)
    unchecked = unwrap(named)  # as outside of tests
    with pytest.raises(ConfigError, match=r"expected a codream\.Config or the name of a preset as config, got dict"):
        unchecked({"total_steps": 7}, None)


def test_agents_have_names_of_their_own_and_something_to_do() -> None:
    with pytest.raises(ValueError, match="agents of different names, got a_0 more than once"):
        EnvSpec("two", ("a_0", "a_0"), ((2,),) * 2, (2, 2))
    with pytest.raises(ValueError, match=r"at least one action for each agent, got \{'a_0': 2, 'b_0': 0\}"):
        EnvSpec("two", ("a_0", "b_0"), ((2,),) * 2, (2, 0))


def build(part: str, owner: Any, name: str, value: Any) -> Config:
    inner = dataclasses.replace(owner, **{name: value})
    return dataclasses.replace(Config(), **{part: inner}) if part else inner


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'smal'; presets: small, "):
        preset("smal")
    text = preset("small").to_json().replace('"hidden"', '"hiden"')
    with pytest.raises(ConfigError, match=r"unknown option world_model\.hiden; nearest: hidden"):
        Config.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 6e2}, r"expected total_steps to be an integer, got 600\.0"),
        ({"total_steps": "2000"}, "expected total_steps to be an integer, got '2000'"),
        ({"num_envs": True}, "expected num_envs to be an integer, got True"),
        ({"algo": "dreamer"}, "expected algo to be one of matwm, wm_rnd, got 'dreamer'"),
        ({"world_model": {"hidden": 64}}, "expected world_model to be a WorldModelConfig, got {'hidden': 64}"),
    ],
)
def test_a_value_of_another_type_says_the_type(changes: dict[str, Any], message: str) -> None:
    config = Config()
    for name, value in changes.items():
        object.__setattr__(config, name, value)  # past the annotations, which are held to in tests
    with pytest.raises(ConfigError, match=message):
        config.__post_init__()


def test_combinations_that_mean_nothing() -> None:
    model = Config().world_model
    with pytest.raises(ConfigError, match=r"hidden must be a multiple of 2 × world_model.heads"):
        dataclasses.replace(Config(), world_model=dataclasses.replace(model, hidden=30))
    with pytest.raises(ConfigError, match="at most 1"):
        dataclasses.replace(Config(), partners=dataclasses.replace(Config().partners, random_share=0.6, past_share=0.6))
    with pytest.raises(ConfigError, match="fewer than a sequence"):
        dataclasses.replace(Config(), num_envs=1024)


def test_keywords_of_an_environment_are_what_json_holds() -> None:
    config = Config(env_kwargs={"size": (3, 3)})
    assert config.env_kwargs == {"size": [3, 3]}
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match=r"env_kwargs can hold what JSON can.*env=lambda: Game"):
        Config(env_kwargs={"rule": len})
    with pytest.raises(ConfigError, match=r"got \{1: 2\}"):
        Config(env_kwargs={"map": {1: 2}})
    with pytest.raises(ConfigError, match="got nan"):
        Config(env_kwargs={"gravity": float("nan")})


def test_a_batch_that_devices_cannot_share_says_what_would_do() -> None:
    three = EnvSpec("three", ("a_0", "a_1", "a_2"), ((2,),) * 3, (2,) * 3)
    with pytest.raises(ConfigError, match=r"got 15 \(a multiple of the 3 agents\) and 2; the nearest: 12|18"):
        dataclasses.replace(preset("paper"), devices=2).resolve(three)


def test_a_replay_that_has_no_room_for_a_batch_is_refused() -> None:
    one = EnvSpec("one", ("a_0",), ((2,),), (2,))
    config = dataclasses.replace(preset("paper"), replay=ReplayConfig(capacity=1_000))
    with pytest.raises(ConfigError, match=r"replay\.capacity 1000 is too small: .* use at least 1969"):
        config.resolve(one)
    dataclasses.replace(config, replay=ReplayConfig(capacity=1_969)).resolve(one)
    dataclasses.replace(preset("paper"), num_envs=512).resolve(one)


def test_options_that_wait_for_another_are_told() -> None:
    small, ippo = preset("small"), preset("ippo")
    curious = dataclasses.replace(small, curiosity=dataclasses.replace(small.curiosity, coef=0.5))
    assert idle(curious) == ["curiosity.coef=0.5 does nothing while curiosity.kind is none"]
    on = dataclasses.replace(curious, curiosity=dataclasses.replace(curious.curiosity, kind="rnd"))
    assert idle(on) == []
    model = dataclasses.replace(ippo, world_model=dataclasses.replace(ippo.world_model, lr=1e-4))
    assert idle(model) == ["world_model.lr=0.0001 does nothing while projection.coef is 0.0"]
    two = EnvSpec("two", ("a_0", "a_1"), ((2,),) * 2, (2,) * 2)
    changed = {
        "small": {
            "world_model.latent is change": {
                "world_model.classes": 8,
                "world_model.encoder_layers": 1,
                "world_model.free_nats": 0.5,
                "world_model.groups": 8,
                "world_model.image_depth": 4,
                "world_model.latent_gradient": "gumbel",
                "world_model.rec_weight": 2.0,
                "world_model.rep_weight": 0.2,
                "world_model.unimix": 0.1,
            }
        },
        "paper": {
            "world_model.latent is categorical": {
                "world_model.change_bins": 15,
                "world_model.change_range": 1.0,
                "world_model.near": (0.3,),
            }
        },
        "wm_rnd": {
            "curiosity.sharing is shared": {"curiosity.hybrid_weight": 0.1},
            "projection.gradient is reinforce": {"projection.temperature": 2.0},
        },
    }
    for name, reasons in changed.items():
        for reason, options in reasons.items():
            config = replaced(preset(name), options).resolve(two)
            told = {f"{option}={value} does nothing while {reason}" for option, value in options.items()}
            assert set(idle(config)) == told
    alone = {"world_model.teammates": False, "world_model.team_layers": 3, "world_model.team_weight": 0.3}
    assert [told.partition("=")[0] for told in idle(replaced(small, alone).resolve(two))] == list(alone)[1:]
    fixed = replaced(preset("wm_rnd"), {"projection.schedule": "constant", "projection.symmetry_end": 0.1})
    assert idle(fixed) == ["projection.symmetry_end=0.1 does nothing while projection.schedule is constant"]
    assert [idle(one.resolve(two)) for one in PRESETS.values()] == [[]] * len(PRESETS)
