"""How well the next observation of `simple_tag` can be predicted at all, beside how well a run's world model does.

    python benchmarks/prediction_floor.py RUN [--episodes 100] [--redraws 32] [--out FILE]

A model that knew the game and everybody's policy would still not know which actions the others will draw. So the
trained agents play in JaxMARL's twin of the game, and at every step the others' actions are drawn again, many times,
from the same state: the variance of an agent's next observation is the least error that a mean prediction can have.
The model's error is measured on the same steps. Errors are squared, after symlog, summed over the entries named.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import codream
from codream import matwm
from codream.latents import symlog
from codream.model_quality import sequences_of

# Entries of a predator's observation; the prey's ends before its own velocity would come.
ENTRIES = {
    "own velocity": slice(0, 2),
    "own position": slice(2, 4),
    "landmarks": slice(4, 8),
    "others' positions": slice(8, 14),
    "the prey's velocity": slice(14, 16),
}


def errors(agents: codream.Agents, random: bool, episodes: int, redraws: int, seed: int) -> np.ndarray:
    """[model, floor, nothing moves] × [episodes, agents, time, entries]."""
    env: Any = codream.make_env("jaxmarl:MPE_simple_tag_v3")
    state, config, spec = agents.state, agents.config, agents.spec
    everyone = jnp.arange(spec.num_agents)

    def act(memory: matwm.Memory, here: codream.TimeStep, key: jax.Array) -> tuple:
        if random:
            return jax.random.randint(key, here.reward.shape, 0, spec.max_actions), memory
        return matwm.act(state, memory, here, key, config, collect=False)

    @eqx.filter_jit
    def step(env_state, here, memory, key):
        act_key, env_key, redraw_key = jax.random.split(key, 3)
        env_keys = jax.random.split(env_key, episodes)
        action, after = act(memory, here, act_key)
        redrawn = jax.vmap(lambda k: act(memory, here, k)[0])(jax.random.split(redraw_key, redraws))

        def variance(i: jax.Array) -> jax.Array:
            mixed = jnp.where(everyone == i, action, redrawn)
            answers = jax.vmap(lambda a: jax.vmap(env.step)(env_keys, env_state, a)[1].obs[:, i])(mixed)
            return jnp.var(symlog(answers), axis=0, ddof=1)

        floor = jax.vmap(variance, out_axes=1)(everyone)
        env_state, there = jax.vmap(env.step)(env_keys, env_state, action)
        return env_state, there, after, action, floor

    reset_key, *keys = jax.random.split(jax.random.key(seed), 26)
    env_state, here = jax.jit(jax.vmap(env.reset))(jax.random.split(reset_key, episodes))
    memory = matwm.init_memory(state, episodes, config)
    steps, actions, floors = [here], [], []
    for key in keys:
        env_state, here, memory, action, floor = step(env_state, here, memory, key)
        steps.append(here)
        actions.append(action)
        floors.append(floor)

    def predicted(s) -> tuple:
        model: Any = state.world_model
        code, valid = model.representation, model.obs_valid(s.focal)
        h, _ = model.unroll(symlog(s.obs), s.action[:, s.focal], s.focal, s.segment, s.acting[:, s.focal])
        now, there = symlog(s.obs[:-1]), symlog(s.obs[1:])
        prior = jax.vmap(code.prior)(h[:-1], now)
        mean = jax.vmap(code.next_mean, in_axes=(0, 0, None))(prior, now, valid)
        return jnp.where(valid, mean - there, 0.0) ** 2, jnp.where(valid, now - there, 0.0) ** 2

    s = sequences_of(jax.device_get(steps), jax.device_get(actions), spec.num_agents)
    model, still = jax.device_get(eqx.filter_jit(jax.vmap(predicted))(s))
    shape = (episodes, spec.num_agents, *model.shape[1:])
    floor = np.where(spec.obs_valid[:, None], np.stack(floors, axis=2), 0.0)
    return np.stack([model.reshape(shape), floor, still.reshape(shape)])


def lines(play: str, spec: codream.EnvSpec, found: np.ndarray) -> list[str]:
    total = found.sum(axis=(1, 2, 3, 4))
    out = [f"| {play} | all | all | {total[0] / total[2]:.3f} | {total[1] / total[2]:.3f} | |"]
    for side, members in spec.sides.items():
        for name, entries in ENTRIES.items():
            mean = found[:, :, list(members)][..., entries].sum(axis=-1).mean(axis=(1, 2, 3))
            if mean[2] > 0:
                ratios = f"{mean[0] / mean[2]:.3f} | {mean[1] / mean[2]:.3f}"
                out.append(f"| | {side} | {name} | {ratios} | {mean[2]:.4f} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run on simple_tag whose latent is `change`")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--redraws", type=int, default=32)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    agents = codream.load(args.run)
    if "simple_tag" not in agents.spec.name or agents.config.world_model.latent != "change":
        parser.error(f"expected a run on simple_tag with world_model.latent=change, got one on {agents.spec.name}")
    out = [
        f"{args.run}: {agents.steps:,} steps, {args.episodes} episodes of the twin, {args.redraws} redraws",
        "",
        "| play | side | entries | model / still | floor / still | still |",
        "|---" * 6 + "|",
    ]
    for play in ("trained", "random"):
        out += lines(play, agents.spec, errors(agents, play == "random", args.episodes, args.redraws, args.seed))
    print("\n".join(out))
    if args.out:
        args.out.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
