"""Reports: one self-contained HTML file per run, and one that compares several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codream.agents import Agents, load
from codream.checkpoint import CheckpointError
from codream.config import ConfigError
from codream.evaluation import CrossPlay
from codream.live import publish
from codream.playing import EndlessEpisode
from codream.report.comparison import compare
from codream.report.dreams import Dreamed, Episode, dream
from codream.report.film import film
from codream.report.html import run_page
from codream.report.lines import metrics_of, sides_of
from codream.report.measures import measure_run, saved_measures
from codream.report.panels import training_panels
from codream.report.sections import standing_markdown
from codream.report.watching import watch
from codream.runs import Run, replace_text

__all__ = ["Dreamed", "Episode", "compare", "dream", "report", "watch"]


def report(
    run: str | Path | Run,
    *,
    quick: bool = False,
    episodes: int | None = None,
    cross_play: CrossPlay | None = None,
    env: Any = None,
    root: str | Path = "runs",
    progress: bool = True,
) -> Path:
    """Write `report.html` in the run's folder, also while the run goes on. Returns its path.

    It plays a few dozen episodes to measure the agents and the world model; the result is kept, so that `quick`, which
    plays nothing, still shows what an earlier report measured. `episodes`: of every pairing (default: at most 40, fewer
    where an environment is slow). `cross_play`: an evaluation of the same agents, if there is one already. `env`: the
    environment, where the run was trained on one given as an object.

    Whatever is missing (no metrics yet, a line cut off in writing, no checkpoint yet, episodes without end) is said in
    the report. Raises RunError for a folder that is no run, or whose environment is another now or was an object and
    is not given; ModuleNotFoundError and UnknownEnvironment where it can no longer be made; ConfigError for a
    `cross_play` of another run, or of another checkpoint than the latest, and for `Agents` instead of their run.
    """
    if isinstance(run, Agents):
        raise ConfigError(
            f"expected a run, whose folder a report is of and goes to, got Agents; they are of {run.name}: "
            f"codream.report({run.name!r})"
        )
    run = Run.open(run, root)
    config, about = run.config, run.about
    unplayed: list[str] = []
    measured = saved_measures(run)
    if not quick:
        try:
            agents = load(run, env=env)
            measured = measure_run(run, agents, cross_play=cross_play, episodes=episodes, progress=progress)
        except (CheckpointError, EndlessEpisode) as err:
            unplayed.append(f"Nothing could be played: {err}")
        else:
            scenes, sides = measured["scenes"], measured["sides"]
            gif = film(scenes[0], 0, sides) if scenes else None
            publish(run.path, measured["steps"], standing_markdown(measured), gif)
    metrics, warnings = metrics_of(run)  # after playing, which takes a while in which a run may go on
    names: list[str] = about["environment"]["agents"]
    sides = sides_of(names)
    actions = (measured or about["environment"]).get("num_actions")  # not in run.json of older runs
    panels = training_panels(metrics, names, sides, actions, config.algo)
    text = run_page(run.path.name, config, about, metrics, panels, measured, sides, warnings + unplayed)
    path = run.path / "report.html"
    replace_text(path, text)
    return path
