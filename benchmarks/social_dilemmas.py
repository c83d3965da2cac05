"""Social dilemmas: WM-RND and its parts against independent PPO; one table and one plot for each game.

    python benchmarks/social_dilemmas.py [--games coin_game storm_2p] [--variants ippo ippo_common …] [--seeds 5]
        [--steps 200000] [--episodes 200] [--results runs/social_dilemmas] [--out FILE] [--plots docs/images]
        [--table-only]

Every variant differs from preset wm_rnd in one thing, but for `original` and the two of PPO. All seeds of a variant are
trained together in one program, which is the same as training each by itself and is compiled once. A variant is
trained for `--steps` and then on until the time that wm_rnd took for them, so that the table has both: equal
environment steps and, separately, equal wall-clock, compiling not counted. On a CPU, which others may use too, that is
the seconds of this process; tie it to one core (`taskset -c 0 python …`) to have them mean what they say. What was
found is kept in `--results`, one file for each game and variant. Variants found there are not trained again, but for
those judged before wm_rnd had a time; what is not there is `unmeasured`. Intervals are 95% bootstrap intervals of the
mean over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import codream
from codream import Config, preset
from codream.algorithms import algorithm
from codream.envs.cooperation import cooperation_counter
from codream.progress import Bar
from codream.runs import device, environment_version
from codream.social import Outcomes
from codream.together import Together
from codream.training import GraphDriver

GAMES: dict[str, dict[str, Any]] = {
    "coin_game": {"num_inner_steps": 50, "num_outer_steps": 1, "payoff_matrix": [[1, 1, -2], [1, 1, -2]]},
    "storm_2p": {"num_inner_steps": 152, "num_outer_steps": 1},
}


def changed(part: str, **changes: Any) -> Callable[[], Config]:
    """Preset wm_rnd with changes in one part."""

    def make() -> Config:
        base = preset("wm_rnd")
        return dataclasses.replace(base, **{part: dataclasses.replace(getattr(base, part), **changes)})

    return make


VARIANTS: dict[str, Callable[[], Config]] = {
    "wm_rnd": lambda: preset("wm_rnd"),  # α annealed, RND shared, joint actions, REINFORCE
    "ippo": lambda: preset("ippo"),
    "ippo_common": lambda: preset("ippo_common"),
    "alpha_1": changed("projection", schedule="constant", symmetry=1.0),
    "alpha_0": changed("projection", schedule="constant", symmetry=0.0),
    "original": lambda: preset("original"),
    "straight_through": changed("projection", gradient="straight_through"),
    "rnd_off": changed("curiosity", kind="none"),
    "rnd_individual": changed("curiosity", sharing="individual"),
    "rnd_hybrid": changed("curiosity", sharing="hybrid"),
    "actions_own": changed("projection", actions="own"),
    "actions_predicted": changed("projection", actions="predicted"),
    "view_focal": changed("projection", view="focal"),
}


def clock() -> float:
    """Seconds: on a CPU those of this process alone, as a quiet machine's wall-clock would count them on one core."""
    return time.process_time() if jax.default_backend() == "cpu" else time.monotonic()


def judged(env: Any, config: Config, states: list[Any], episodes: int, length: int) -> list[dict[str, Any]]:
    """Social outcomes of each run in self-play, actions sampled: `episodes` episodes of `length` steps, in-graph."""
    learner, count = algorithm(config), cooperation_counter(env)

    @eqx.filter_jit
    def play(state: Any, key: Any) -> tuple[Any, Any, Any]:
        start_key, key = jax.random.split(key)
        inner, here = jax.vmap(env.reset)(jax.random.split(start_key, episodes))
        memory = learner.init_memory(state, episodes, config)

        def body(carry: Any, key: Any) -> Any:
            inner, here, memory = carry
            act_key, env_key = jax.random.split(key)
            actions, memory = learner.act(state, memory, here, act_key, config, collect=False)
            after, there = jax.vmap(env.step)(jax.random.split(env_key, episodes), inner, actions)
            choices = jnp.zeros(0) if count is None else jax.vmap(count)(inner, after)
            return (after, there, memory), (there.reward, there.last, choices)

        return jax.lax.scan(body, (inner, here, memory), jax.random.split(key, length))[1]

    found = []
    for run, state in enumerate(states):
        reward, last, choices = jax.device_get(play(state, jax.random.key(1000 + run)))
        assert last[-1].all()
        assert not last[:-1].any()
        outcomes = Outcomes(env.spec.agents, episodes)
        outcomes.begin()
        for t in range(length):
            outcomes.step(reward[t], np.zeros(episodes, bool), None if count is None else choices[t])
        for copy in range(episodes):
            outcomes.finish(copy)
        social = outcomes.social().to_json()
        returns = reward.sum(axis=0).mean(axis=0).tolist()
        found.append({"returns": returns, **social})
    return found


def train(game: str, variant: str, args: argparse.Namespace, seconds: float | None) -> dict[str, Any]:
    """Train all seeds of a variant for `args.steps`, and on until `seconds` have passed; judge them at both places."""
    env: Any = codream.make_env(f"jaxmarl:{game}", **GAMES[game])
    config = dataclasses.replace(
        VARIANTS[variant](), env=f"jaxmarl:{game}", env_kwargs=GAMES[game], total_steps=args.steps
    )
    resolved = config.resolve(env.spec)
    driver = GraphDriver(env, resolved, chunk=config.ppo.rollout)
    together = Together(driver, args.seeds)
    runners = together.join([driver.start(jax.random.key(seed)) for seed in range(args.seeds)])
    length = GAMES[game]["num_inner_steps"]

    def judge() -> list[dict[str, Any]]:
        states = [together.member(runners, run).state.for_acting() for run in range(args.seeds)]
        return judged(env, resolved, states, args.episodes, length)

    found: dict[str, Any] = {"config": json.loads(config.to_json()), "seeds": args.seeds, "episodes": args.episodes}
    spent, steps, curve, totals = 0.0, 0, [], None
    with Bar(f"{game} {variant}, each of {args.seeds} seeds", args.steps) as bar:
        while "steps" not in found or (seconds is not None and spent < seconds):
            began = clock()
            runners, metrics = together.advance(runners)
            jax.block_until_ready(metrics)
            before, steps = steps, min(together.steps(runners))
            if before:  # the first chunk also compiles
                spent += clock() - began
            bar.update(min(steps, args.steps), last="steps" not in found and steps >= args.steps)
            if "steps" in found and seconds is not None:
                bar.note(f"on to {steps:,} in {spent:.0f} of {seconds:.0f} s")
            totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)
            every = args.steps // 40
            if steps // every > before // every:
                sums = jax.device_get(totals)
                means = {k: [float(run[k][0]) / max(float(run[k][1]), 1.0) for run in sums] for k in sums[0]}
                curve.append({"steps": steps, "seconds": spent, **means})
                totals = None
            if before < args.steps <= steps:
                found["steps"] = {"steps": steps, "seconds": spent, "judged": judge()}
                print(f"{game} {variant}: {steps:,} steps of {args.seeds} seeds in {spent:.0f} s", flush=True)
    if seconds is not None or variant == "wm_rnd":  # which is given no seconds, and says how many there are
        found["seconds"] = found["steps"] if seconds is None else {"steps": steps, "seconds": spent, "judged": judge()}
    return {**found, "curve": curve}


# ------------------------------------------------------------------------------------------ tables and plots


def interval(values: list[Any]) -> tuple[float, float, float] | None:
    """Mean over seeds, with its 95% bootstrap interval."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    draws = np.random.default_rng(0).choice(known, (10_000, len(known))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.mean(known)), float(low), float(high)


def shown(values: list[Any]) -> str:
    found = interval(values)
    if found is None:
        return "–"
    mean, low, high = found
    return f"{mean:.2f}" if low == high else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


MEASURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "efficiency": lambda run: run["efficiency"][0],
    "return, first": lambda run: run["returns"][0],
    "return, second": lambda run: run["returns"][1],
    "equality": lambda run: run["equality"][0],
    "cooperation": lambda run: run["cooperation"]["all"][0] if run["cooperation"] else None,
}


def results(game: str, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Every variant with what is known of it."""
    for variant in args.variants:
        yield variant, known(game, variant, args)


def known(game: str, variant: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """What was found before, with the same seeds, episodes and steps; SystemExit where they were others."""
    path = Path(args.results) / f"{game}-{variant}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    before = {"seeds": found["seeds"], "episodes": found["episodes"], "steps": found["config"]["total_steps"]}
    now = {name: getattr(args, name) for name in before}
    if before != now:
        raise SystemExit(f"{path} is of {before}, asked for is {now}; give another --results")
    return found


def table(game: str, place: str, args: argparse.Namespace) -> str:
    """The markdown table of one game, at equal `steps` or at equal `seconds`."""
    lines = [f"| variant | {' | '.join(MEASURES)} | steps | seconds, all seeds |", "|---" * (len(MEASURES) + 3) + "|"]
    for variant, found in results(game, args):
        if found is None or place not in found:
            lines.append(f"| {variant} | unmeasured |" + " |" * (len(MEASURES) + 1))
            continue
        at = found[place]
        cells = [shown([measure(run) for run in at["judged"]]) for measure in MEASURES.values()]
        lines.append(f"| {variant} | {' | '.join(cells)} | {at['steps']:,} | {at['seconds']:.0f} |")
    return "\n".join(lines)


def plot(game: str, args: argparse.Namespace) -> Path | None:
    """Learning curves of efficiency over steps, and efficiency and cooperation at equal steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [(variant, found) for variant, found in results(game, args) if found]
    if not measured:
        return None
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5), width_ratios=[2, 1, 1])
    colours = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    for k, (variant, found) in enumerate(measured):
        curve = [
            (row["steps"] / 1000, np.sum([x for name, x in row.items() if name.startswith("episode/")], axis=0))
            for row in found["curve"]
            if row["steps"] <= 1.05 * args.steps
        ]
        curve = [(steps, total) for steps, total in curve if np.any(total)]  # where episodes have ended
        x, total = [steps for steps, _ in curve], [total for _, total in curve]
        spans = [interval(row.tolist()) or (np.nan,) * 3 for row in total]
        left.plot(x, [s[0] for s in spans], label=variant, color=colours[k % 20])
        left.fill_between(x, [s[1] for s in spans], [s[2] for s in spans], color=colours[k % 20], alpha=0.15, lw=0)
        for axis, name in ((middle, "efficiency"), (right, "cooperation")):
            at = interval([MEASURES[name](run) for run in found["steps"]["judged"]])
            if at is not None:
                axis.errorbar(at[0], -k, xerr=[[at[0] - at[1]], [at[2] - at[0]]], fmt="o", color=colours[k % 20])
    seeds = {found["seeds"] for _, found in measured}
    left.set(xlabel="environment steps, thousands", ylabel="sum of returns per training episode", title=game)
    left.legend(fontsize=8, loc="upper left")
    for axis, name in ((middle, "efficiency"), (right, "cooperation")):
        axis.set(xlabel=name, title=f"{name} after {args.steps:,} steps")
        axis.set_yticks(
            [-k for k in range(len(measured))], [variant for variant, _ in measured] if axis is middle else []
        )
        axis.grid(axis="x", alpha=0.3)
    figure.text(0.01, 0.01, f"{'/'.join(map(str, sorted(seeds)))} seeds; mean and 95% bootstrap interval", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path = Path(args.plots) / f"social_{game}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def report(game: str, args: argparse.Namespace) -> str:
    """Both tables of a game, with their conditions."""
    name = f"jaxmarl:{game}"
    about = (
        f"{name} ({environment_version(name)}) with {GAMES[game]}, {args.seeds} seeds, mean and 95% bootstrap "
        f"interval; {args.episodes} episodes a run, sampled actions, returns per agent and episode; {device()}."
    )
    return "\n\n".join(
        [
            f"### {game}",
            about,
            f"Equal environment steps ({args.steps:,}):",
            table(game, "steps", args),
            "Equal wall-clock (that of wm_rnd for those steps; all seeds of a variant trained together):",
            table(game, "seconds", args),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=list(GAMES), choices=list(GAMES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--results", default="runs/social_dilemmas")
    parser.add_argument("--plots", default="docs/images")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table-only", action="store_true", help="train nothing, draw what is known")
    args = parser.parse_args()
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    for game in args.games:
        for variant in [] if args.table_only else sorted(args.variants, key=lambda name: name != "wm_rnd"):
            measured, found = known(game, "wm_rnd", args), known(game, variant, args)
            seconds = None if measured is None or variant == "wm_rnd" else measured["steps"]["seconds"]
            if found is None or (seconds is not None and "seconds" not in found):
                path = folder / f"{game}-{variant}.json"
                path.write_text(json.dumps(train(game, variant, args, seconds)), encoding="utf-8")
            print(table(game, "steps", args), flush=True)
        plot(game, args)
    text = "\n\n".join(report(game, args) for game in args.games)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
