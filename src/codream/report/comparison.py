"""Several runs in one page: learning curves with intervals over seeds, and everyone against everyone."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from codream.agents import Agents, Player, load
from codream.checkpoint import CheckpointError
from codream.config import ConfigError
from codream.envs import EnvironmentFailure, TimeStep
from codream.playing import EndlessEpisode, as_host, play
from codream.progress import Bar
from codream.report.charts import DASHES, Line, chart
from codream.report.entries import SHARES, Entry, conditions, entry_of, measured, methods, runs_in, told_apart, units
from codream.report.html import page
from codream.report.lines import sides_of
from codream.report.panels import moving_average
from codream.runs import Run, RunError, file_to_write, replace_text
from codream.statistics import SAID, Summary, source, summarised

__all__ = ["compare"]

EPISODES = 20  # of each match
POINTS = 40  # of a curve
MOST_PLAYED = 8  # runs in the heat map: its matches grow with their square


def compare(
    runs: str | Path | Run | Sequence[str | Path | Run],
    *,
    out: str | Path = "compare.html",
    quick: bool = False,
    episodes: int = EPISODES,
    summary: Summary = "iqm",
    env: Any = None,
    root: str | Path = "runs",
    progress: bool = True,
) -> Path:
    """Write one page about several runs to `out`: returns over steps and over wall-clock, interquartile means with 95 %
    bootstrap intervals over seeds (`summary="median"`: medians with standard deviations), and cross-play of everyone
    against everyone as a heat map. Returns its path.

    Runs whose configurations differ in nothing but the seed (and the steps in total) are one curve. Runs of different
    environments are compared each among their own. `quick`: no matches are played. `episodes`: of each match.
    `env`: the environment, of runs that were trained on one given as an object.

    A folder of runs, such as a sweep's, stands for all runs in it.

    Raises RunError for fewer than two runs, or a folder that is neither a run nor holds any; ConfigError for matches
    of no episodes.
    """
    path = file_to_write(out)
    runs = [runs] if isinstance(runs, str | Path | Run) else runs
    if not quick and episodes < 1:
        raise ConfigError(f"episodes must be 1 or more, got {episodes}; with quick (--quick) no matches are played")
    entries = told_apart([entry_of(run) for given in runs for run in runs_in(given, root)])
    if len({entry.run.path.resolve() for entry in entries}) < 2:
        raise RunError(f"compare needs at least two different runs, got {', '.join(map(str, runs)) or 'none'}")
    told = [f"{entry.name}: {line}" for entry in entries for line in entry.warnings]
    games = dict.fromkeys((entry.environment, entry.agents) for entry in entries)
    if len(games) > 1:
        listed = "; ".join(
            f"{game}: {', '.join(e.name for e in entries if (e.environment, e.agents) == (game, names))}"
            for game, names in games
        )
        told.append(f"These runs are of {len(games)} different games, so each is compared among its own ({listed}).")
    sections = [("runs", "", _runs(entries) + "".join(f'<p class="warn">{html.escape(line)}</p>' for line in told))]
    for number, (game, names) in enumerate(games):
        group = [e for e in entries if (e.environment, e.agents) == (game, names)]
        of = f" on {game}" if len(games) > 1 else ""
        for key, heading, text in _game(game, group, env, summary, quick=quick, episodes=episodes, progress=progress):
            sections.append((f"{key}-{number}", heading + of, text))
    title = f"{len(entries)} runs compared"
    about = "What differs is the method; the band is what differs between seeds."
    replace_text(path, page(title, about, sections, {}))
    return path


def _runs(entries: Sequence[Entry]) -> str:
    rows = ""
    for e in entries:
        last = e.metrics[-1] if e.metrics else {}
        minutes = f"{last['seconds'] / 60:.1f}" if "seconds" in last else "–"
        rows += (
            f'<tr><th scope="row">{html.escape(e.name)}</th><td>{html.escape(e.environment)}</td>'
            f"<td>{int(last.get('steps', 0)):,}</td><td>{minutes}</td><td>{html.escape(e.device)}</td></tr>"
        )
    return (
        "<div "
        'class="wide"><table><thead><tr><th>run</th><th>environment</th><th>steps</th><th>minutes</th><th>device</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


# ------------------------------------------------------------------------------------------ curves


def _game(
    game: str, entries: Sequence[Entry], env: Any, summary: Summary, *, quick: bool, episodes: int, progress: bool
) -> list[tuple[str, str, str]]:
    groups = methods(entries)
    sides = sides_of(entries[0].agents)
    panels = ""
    for side, members in sides.items():
        names = [f"episode/return/{entries[0].agents[i]}" for i in members]
        for timed, unit in ((False, "environment steps"), (True, "minutes of wall-clock")):
            lines = [_curve(label, group, names, timed, summary, k) for k, (label, group) in enumerate(groups.items())]
            svg = chart([x for x in lines if x is not None], x_label=unit, y_label="return per episode", legend=True)
            panels += (
                f'<figure class="panel"><figcaption><h3>{html.escape(side)}: return over {unit}</h3><p>Return '
                f"of one agent in training episodes (moving average).</p></figcaption>{svg}</figure>"
            )
    bands = {
        "iqm": "Lines: interquartile mean over seeds (the middle half; of fewer than four, the mean). Bands: 95 % "
        f"bootstrap intervals over seeds, computed by {source()}.",
        "median": "Lines: median over seeds. Bands: one standard deviation over seeds below and above.",
    }[summary]
    how = f'<p class="note-text">{bands} Wall-clock is that of training, compiling included, mean over seeds.</p>'
    together = len(sides) == 1
    met = "How well they play together" if together else "Against fixed references"
    sections = [
        ("curves", "Learning curves", f'{how}<div class="panels pairs">{panels}</div>'),
        ("scores", met, _scores(groups, sides, summary)),
    ]
    if not quick:
        heading = "Everyone with everyone" if together else "Everyone against everyone"
        if len(_teams(sides, entries[0].agents)) < 2:
            text = (
                f'<p class="empty">Matches are played in games with two sides, or with one of several agents; this one '
                f"has the sides {html.escape(', '.join(sides))}.</p>"
            )
        elif len(entries) > 1:
            text = _heat(entries, env, episodes, progress)
        else:
            text = f'<p class="empty">There is only one run on {html.escape(game)}, so there is nobody to play.</p>'
        sections.append(("heat", heading, text))
    return sections


def _curve(
    label: str, group: Sequence[Entry], names: Sequence[str], timed: bool, summary: Summary, k: int
) -> Line | None:
    """The middle of all seeds at common steps, as far as all of them have come. `timed`: drawn over the minutes
    that it took to come so far, mean over seeds (their times by themselves need not even overlap)."""
    columns = []
    for entry in group:
        rows = [
            (row["steps"], row.get("seconds", 0.0) / 60, np.mean([row[n] for n in names]))
            for row in entry.metrics
            if all(n in row for n in names)
        ]
        if rows:
            steps, minutes, y = np.asarray(rows, float).T
            columns.append((steps, minutes, np.asarray(moving_average(y.tolist()))))
    if not columns:
        return None
    low, high = max(x[0] for x, _, _ in columns), min(x[-1] for x, _, _ in columns)
    grid = np.linspace(low, max(high, low), POINTS)
    scores: Float[np.ndarray, "seeds points"] = np.stack([np.interp(grid, x, y) for x, _, y in columns])
    if timed:
        grid = np.mean([np.interp(grid, x, minutes) for x, minutes, _ in columns], axis=0)
    middle, bottom, top = summarised(scores, summary, repeats=500)
    title = f"{label} ({len(columns)} seed{'s' if len(columns) > 1 else ''})"
    ends: Mapping[str, Any] = {}
    if len(columns) > 1:
        ends = {"low": bottom.tolist(), "high": top.tolist()}
    return Line(title, grid.tolist(), middle.tolist(), f"var(--p{k % 7})", DASHES[(k // 7) % 4], **ends)


def _teams(sides: Mapping[str, Sequence[int]], agents: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Who can be taken from different runs in one match: the two sides; in a game with one side, its first agent and
    the others. Empty where there is nobody to play with."""
    if len(sides) == 2:
        return {name: tuple(members) for name, members in sides.items()}
    everyone = [i for members in sides.values() for i in members]
    if len(sides) > 2 or len(everyone) < 2:
        return {}
    others = everyone[1:]
    return {agents[everyone[0]]: (everyone[0],), agents[others[0]] if len(others) == 1 else "the others": tuple(others)}


def _scores(groups: Mapping[str, Sequence[Entry]], sides: Mapping[str, Sequence[int]], summary: Summary) -> str:
    """What was measured, summarised over seeds."""
    found = measured(groups, sides)
    if not found:
        return (
            '<p class="empty">None of these runs has been measured against the references as it is now. <code>codream '
            "report RUN</code> does so; then compare again.</p>"
        )
    head = "".join(f'<th scope="col">{html.escape(label)}</th>' for label in groups)
    body = ""
    for line, values in found.items():
        body += f'<tr><th scope="row">{html.escape(line)}</th>'
        digits = 2 if line in SHARES else 1
        body += "".join(f"<td>{_summary(values.get(label), digits, summary)}</td>" for label in groups) + "</tr>"
    return (
        f'<p class="note-text">As each run’s own report measured it: {units(found)}. '
        f"{SAID[summary].capitalize()}, number of seeds. {html.escape(conditions(groups) or '')}</p><div "
        f'class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _summary(values: Sequence[float] | None, digits: int, summary: Summary) -> str:
    if not values:
        return "not measured"
    middle, low, high = (float(x[0]) for x in summarised(np.asarray(values)[:, None], summary))
    if len(values) == 1:
        return f"<b>{middle:.{digits}f}</b> <small>1 seed</small>"
    ends = f"± {high - middle:.{digits}f}" if summary == "median" else f"[{low:.{digits}f}, {high:.{digits}f}]"
    return f"<b>{middle:.{digits}f}</b> <small>{ends}, {len(values)} seeds</small>"


# ------------------------------------------------------------------------------------------ matches


def _heat(entries: Sequence[Entry], env: Any, episodes: int, progress: bool) -> str:
    """Every run's first side with or against every run's second side (with one side: first agent and others)."""
    teams: dict[str, Agents] = {}
    told = ""
    for entry in entries[:MOST_PLAYED]:
        try:
            team = load(entry.run, env=env if entry.run.by_object else None)
        except (CheckpointError, ValueError, ModuleNotFoundError, EnvironmentFailure) as err:
            told += f'<p class="warn">{html.escape(entry.name)} could not be loaded: {html.escape(str(err))}</p>'
            continue
        if teams and team.spec != next(iter(teams.values())).spec:
            told += (
                f'<p class="warn">{html.escape(entry.name)} has other observations or actions; it plays no matches.</p>'
            )
            continue
        teams[entry.name] = team
    if len(entries) > MOST_PLAYED:
        told += f'<p class="warn">Only the first {MOST_PLAYED} runs play matches.</p>'
    if len(teams) < 2:
        return told + '<p class="empty">Fewer than two runs could be loaded, so no matches were played.</p>'
    one = next(iter(teams.values()))
    groups = _teams(one.spec.sides, one.spec.agents)
    ours, theirs = groups.values()
    returns = np.zeros((len(teams), len(teams), 2))
    with (
        contextlib.closing(as_host(one.make_env(episodes), episodes)) as played,
        Bar("matches", len(teams) ** 2, unit="matches", show=progress) as bar,
    ):
        for i, a in enumerate(teams.values()):
            for j, b in enumerate(teams.values()):
                mixed = _Mixed(a.player(), b.player(), theirs)
                try:
                    got = play(played, dict.fromkeys(one.spec.sides, mixed), episodes).mean(axis=0)
                except EndlessEpisode as err:
                    return f'{told}<p class="warn">No matches were played: {html.escape(str(err))}</p>'
                returns[i, j] = [got[list(members)].mean() for members in (ours, theirs)]
                bar.update(i * len(teams) + j + 1, last=(i, j) == (len(teams) - 1,) * 2)
    foes = len(one.spec.sides) == 2
    first, second = (f"the {name} side" if foes else name for name in groups)
    first = first[0].upper() + first[1:] if foes else first
    verb = "plays against" if foes else "plays with"
    maps = "".join(
        _map(returns[..., k], list(teams), tuple(groups), f"one {name}" if foes else name)
        for k, name in enumerate(groups)
    )
    return (
        f"{told}<p>{html.escape(first)} of each row’s run {verb} {html.escape(second)} of each column’s run, "
        f"{episodes} episodes a match. A run that does well whoever it meets is dark along its whole row in the first "
        f"table, and along its whole column in the second; the diagonal is plain self-play.</p>{maps}"
    )


class _Mixed:
    """A team whose agents come from two runs."""

    def __init__(self, one: Player, other: Player, theirs: Sequence[int]):
        self._one, self._other, self._theirs = one, other, list(theirs)

    def act(self, timestep: TimeStep, rng: np.random.Generator) -> Int[np.ndarray, "copies agents"]:
        """Actions of all agents."""
        actions = self._one.act(timestep, rng).copy()
        actions[:, self._theirs] = self._other.act(timestep, rng)[:, self._theirs]
        return actions


def _map(values: Float[np.ndarray, "runs runs"], names: Sequence[str], sides: Sequence[str], whose: str) -> str:
    low, high = values.min(), values.max()
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = ""
    for name, row in zip(names, values, strict=True):
        cells = "".join(f'<td style="--skill:{(v - low) / ((high - low) or 1) * 60:.0f}%">{v:.1f}</td>' for v in row)
        body += f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'
    return (
        f'<h3>Return of {html.escape(whose)} (darker: better for it)</h3><div class="wide"><table '
        f'class="who heat"><thead>'
        f"<tr><th>{html.escape(sides[0])} of ↓ &nbsp; "
        f"{html.escape(sides[1])} of →</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
