"""How good are the gradients of self-projection? A table of direction, size and noise, on coin_game in mid-training.

    python benchmarks/projection_gradient.py [--marks 40000 80000 160000] [--lengths 4 15 32] [--batches 1024]
        [--seed 0] [--out FILE]

Preset wm_rnd is trained with α = 1; at each mark its world model, first policy and rollout are held and gradients of
the imagined return for the policy's weights are taken over `--batches` batches of as many starts as an update has.
The yardstick is the likelihood-ratio gradient of the same imagined return (all later rewards, less their mean over the
batch): unbiased for the model, whatever its errors, but noisy. It is taken on batches of its own, and its mean over the
one half of them is compared with that over the other (row `yardstick`), which tells how far the table can be trusted.
Columns:

- cosine: between the estimator's mean gradient and the yardstick's (`reinforce` also counts what its critic expects
  after the last imagined step, so it need not reach 1);
- signal / noise: norm of the mean gradient over the root mean square deviation of one batch's from it;
- size / PPO's: norm of `coef` 1 times the mean gradient, as it enters the loss, over that of PPO's own.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

import codream
from codream import Config, preset, wm_rnd
from codream.ppo import Learner, ppo_loss
from codream.projection import Projection, draw_starts, judged, project, projection_loss, straight_through_loss
from codream.runs import device
from codream.training import GraphDriver, Runner

GAME = {"num_inner_steps": 50, "num_outer_steps": 1, "payoff_matrix": [[1, 1, -2], [1, 1, -2]]}
FOCAL = 0
ALPHA = 1.0


def configured(env: Any, steps: int, **projection: Any) -> Config:
    base = preset("wm_rnd")
    settings = dataclasses.replace(base.projection, symmetry=ALPHA, schedule="constant", **projection)
    config = dataclasses.replace(base, env="jaxmarl:coin_game", env_kwargs=GAME, total_steps=steps, projection=settings)
    return config.resolve(env.spec)


def likelihood_ratio(learner: Learner, imagined: Projection, valid: Array, scale: Array, config: Config) -> Array:
    """−Σ_t ln π_t × the discounted rewards from t on, less their mean over the trajectories."""
    del valid  # nothing ends early in this game
    data = jax.lax.stop_gradient(imagined)
    alive = jax.vmap(lambda one: one.alive)(data)
    paid = scale * config.ppo.gamma ** jnp.arange(alive.shape[1]) * alive * data.reward
    ahead = jnp.cumsum(paid[:, ::-1], axis=1)[:, ::-1]
    log_prob = jnp.sum(jax.vmap(lambda one: one.log_prob(learner))(data), axis=-1)
    return -jnp.mean(jnp.sum(log_prob * (ahead - jnp.mean(ahead, axis=0)), axis=1))


def straight_through(learner: Learner, imagined: Projection, valid: Array, scale: Array, config: Config) -> Array:
    del learner
    return straight_through_loss(imagined, valid, scale, config)[0]


def reinforce(learner: Learner, imagined: Projection, valid: Array, scale: Array, config: Config) -> Array:
    data, _ = judged(*jax.lax.stop_gradient((learner, imagined)), valid, scale, config)
    return projection_loss(learner, data, config)[0]


class Gradients:
    """Gradients of one batch for the first policy's actor, as flat vectors; compiled once for a length."""

    def __init__(self, env: Any, steps: int, length: int):
        self.length = length
        config = configured(env, steps, imagination_steps=length, coef=1.0)
        self.of = {
            "yardstick": self._imagined(config, likelihood_ratio),
            "straight_through": self._imagined(config, straight_through),
            "reinforce": self._imagined(config, reinforce),
            "ppo": self._ppo(config),
        }

    def _imagined(self, config: Config, objective: Callable[..., Array]) -> Callable[..., Any]:
        share = config.projection.starts // 2

        def loss(learner: Learner, state: wm_rnd.State, key: Any) -> Array:
            draw, key = jax.random.split(key)
            model = state.world_model
            assert model is not None
            starts = jax.tree.map(lambda x: x[FOCAL, :share], draw_starts(state.rollout, state.spec, draw, config))
            mine = lambda obs, mask, key: project(  # noqa: E731
                learner, model, obs, mask, jnp.asarray(FOCAL), jnp.asarray(ALPHA), key, config
            )
            trajectories = jax.vmap(mine)(starts.obs, starts.mask, jax.random.split(key, share))
            scale = state.rewards.scale / state.returns.scale[FOCAL]
            return objective(learner, trajectories, starts.valid, scale, config)

        return self._over_batches(loss)

    def _ppo(self, config: Config) -> Callable[..., Any]:
        def loss(learner: Learner, state: wm_rnd.State, key: Any) -> Array:
            _, batch, _ = wm_rnd._judged(state, config)
            size = len(batch.acting) // config.ppo.minibatches
            at = jax.random.permutation(key, len(batch.acting))[:size]
            mine = jax.tree.map(lambda x: x[at, FOCAL], batch)
            return ppo_loss(learner, mine, config.ppo)[1]["actor_loss"]

        return self._over_batches(loss)

    def _over_batches(self, loss: Callable[..., Array]) -> Callable[..., Any]:
        @eqx.filter_jit
        def gradients(learner: Learner, state: wm_rnd.State, keys: Any) -> Float[Array, "batches weights"]:
            def one(key: Any) -> Array:
                grads = eqx.filter_grad(loss)(learner, state, key)
                return ravel_pytree(eqx.filter(grads.actor, eqx.is_array))[0]

            return jax.lax.map(one, keys)

        return gradients


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-30))


def full(driver: GraphDriver, runner: Runner) -> Runner:
    """The same runner with its rollout marked as full: it was, and its rows are still there."""
    rollout = runner.state.rollout
    return eqx.tree_at(lambda r: r.state.rollout.filled, runner, jnp.full_like(rollout.filled, rollout.rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marks", type=int, nargs="+", default=[40_000, 80_000, 160_000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 15, 32])
    parser.add_argument("--batches", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    env: Any = codream.make_env("jaxmarl:coin_game", **GAME)
    config = configured(env, max(args.marks))
    driver = GraphDriver(env, config, chunk=config.ppo.rollout)
    runner = driver.start(jax.random.key(args.seed))
    by_length = [Gradients(env, max(args.marks), length) for length in args.lengths]
    lines = [
        f"coin_game, seed {args.seed}, {args.batches} batches, {device()}",
        "",
        "| steps | policy's entropy | imagined steps | estimator | cosine | signal / noise | size / PPO's |",
        "|---|---|---|---|---|---|---|",
    ]
    own_key, others_key = jax.random.split(jax.random.key(args.seed + 1))
    for mark in sorted(args.marks):
        metrics: Any = {}
        while int(runner.state.steps) < mark:
            runner, metrics = driver.advance(runner)
        total, count = metrics[f"agent/{env.spec.agents[FOCAL]}/entropy"]
        state = full(driver, runner).state
        learner = jax.tree.map(lambda x: x[FOCAL] if eqx.is_array(x) else x, state.learners)
        for gradients in by_length:
            found = {}
            for name, gradient in gradients.of.items():
                key = own_key if name == "yardstick" else others_key
                found[name] = np.asarray(gradient(learner, state, jax.random.split(key, args.batches)))
            truth = found["yardstick"].mean(axis=0)
            ppo = np.linalg.norm(found["ppo"].mean(axis=0))
            for name in ("yardstick", "reinforce", "straight_through"):
                g = found[name]
                mean = g.mean(axis=0)
                noise = np.sqrt(((g - mean) ** 2).sum(axis=1).mean())
                pair = (g[::2].mean(axis=0), g[1::2].mean(axis=0)) if name == "yardstick" else (mean, truth)
                size = "" if name == "yardstick" else f"{np.linalg.norm(mean) / ppo:.2f}"
                about = f"| {int(state.steps):,} | {float(total / count):.2f} | {gradients.length} | {name} "
                lines.append(about + f"| {cosine(*pair):.2f} | {np.linalg.norm(mean) / noise:.2f} | {size} |")
                print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
