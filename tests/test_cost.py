"""Operations derived from the configuration, against those of the traced program and the compiler's own analysis."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import pytest

from codream import Config, matwm, preset
from codream.config import AgentConfig, ReplayConfig, WorldModelConfig
from codream.cost import Cost, per_step, update_cost
from codream.envs import EnvSpec
from codream.flops import both_counts, count_flops, matrix_rate, memory_rate

TAG = EnvSpec("tag", ("adversary_0", "adversary_1", "agent_0"), ((16,), (16,), (14,)), (5, 5, 5))
MASKED = dataclasses.replace(TAG, has_mask=True)
OTHER: dict[str, Any] = {
    "hidden": 64,
    "layers": 3,
    "heads": 4,
    "units": 48,
    "team_hidden": 32,
    "batch": 6,
    "length": 10,
}


def counted(spec: EnvSpec, config: Config) -> dict[str, float]:
    """Operations of the traced programs; nothing is computed."""
    state, key = eqx.filter_eval_shape(matwm.init, jax.random.key(0), spec, config), jax.random.key(0)
    model, compiler = both_counts(lambda s: matwm.train_world_model(s, key, config), state)
    return {
        "model": model,
        "imagine": count_flops(lambda s: matwm.imagine_for_agents(s, key, config), state),
        "agents": count_flops(lambda s: matwm.train_agents(s, key, config), state),
        "compiler": compiler,
    }


CONFIGS = {
    "paper": (TAG, preset("paper")),
    "other sizes, masks, no teammates": (
        MASKED,
        Config(
            world_model=WorldModelConfig(latent="categorical", teammates=False, head_layers=2, **OTHER),
            agents=AgentConfig(units=24, layers=3, context=5, horizon=7, starts=20),
        ),
    ),
    "fewest layers": (
        MASKED,
        Config(
            world_model=WorldModelConfig(latent="categorical", head_layers=0, encoder_layers=1, **OTHER),
            agents=AgentConfig(units=24, layers=0, context=5, horizon=7, starts=20),
        ),
    ),
    "outcome sees next": (
        TAG,
        Config(world_model=WorldModelConfig(latent="categorical", outcome_sees_next=True, encoder_layers=2, **OTHER)),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_derived_count_is_the_traced_one(name: str) -> None:
    spec, config = CONFIGS[name]
    # The compiler also counts what drawing from the replay looks at.
    config = dataclasses.replace(config, replay=ReplayConfig(capacity=640)).resolve(spec)
    cost, traced = update_cost(spec, config), counted(spec, config)
    assert cost["world model"].flops == pytest.approx(traced["model"], rel=1e-12)
    assert cost["context"].flops + cost["imagination"].flops == traced["imagine"]
    assert cost["actors and critics"].flops == traced["agents"] - traced["imagine"]
    # What is element-wise is little where layers are wide.
    assert 1 <= traced["compiler"] / traced["model"] < (1.02 if name == "paper" else 1.5)


def test_products_with_zeros_are_counted_where_they_are_made() -> None:
    config = preset("paper").resolve(TAG)
    here, there = (update_cost(TAG, config, rows_summed=rows) for rows in (True, False))
    assert here["world model"] == there["world model"]
    # Mixer and actor for every imagined step, critic, its average and actor for every learned one.
    steps = 3 * 512 * 16
    assert there["imagination"].flops - here["imagination"].flops > steps * 2 * 1024 * (512 + 512)
    assert there["actors and critics"].flops - here["actors and critics"].flops > steps * 2 * 1024 * 3 * 512


def test_a_floor_is_the_slower_of_computing_and_moving() -> None:
    assert Cost(6, 4).floor(2, 2) == 3
    assert Cost(6, 8).floor(2, 2) == 4
    assert Cost(6, 8) + Cost(1, 2) == Cost(7, 10)
    part = {name: Cost(8, 4) for name in ("world model", "context", "imagination", "actors and critics")}
    config = dataclasses.replace(preset("paper"), world_model_every=2.0, agents_every=0.5)
    assert per_step(part, config) == Cost(4 + 48, 2 + 24)


def test_only_what_is_derived_is_answered() -> None:
    with pytest.raises(ValueError, match="latent=categorical, got change"):
        update_cost(TAG, preset("small").resolve(TAG))


def test_rates_are_measured() -> None:
    assert 1e8 < matrix_rate(256, 2) < 1e16
    assert 1e8 < memory_rate(4, 2) < 1e14
