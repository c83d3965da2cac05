"""Evaluation: cross-play of trained agents against fixed references and against other runs.

Self-play return says little in a competitive game, so every side also plays against opponents that never
change. A *side* is the agents that share a name up to the last underscore.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.markup import escape
from rich.table import Table

from codream.agents import Agents, Player, load, loaded
from codream.config import ConfigError
from codream.envs import EnvSpec, TimeStep
from codream.envs.references import references_for
from codream.playing import play, stage
from codream.progress import Bar, clock
from codream.runs import Run, device, environment_version
from codream.social import Outcomes, Social

__all__ = ["CrossPlay", "Row", "evaluate"]

MOST_COPIES = 100  # of the environment, played together

Opponent = str | Path | Run | Agents  # a reference, a run, or what was loaded of one


@dataclasses.dataclass(frozen=True)
class Row:
    """Returns of one line-up. `sides`: who plays each side, `self` being the evaluated agents."""

    sides: dict[str, str]
    returns: dict[str, float]
    """Mean return of each agent per episode."""
    stderr: dict[str, float]
    """Standard error of that mean."""
    side_stderr: dict[str, float]
    """Standard error of the mean return of one agent of each side. (Agents share episodes, so it is not the mean of
    theirs.)"""


@dataclasses.dataclass(frozen=True)
class CrossPlay:
    """The result of `evaluate`, and all that a reader needs to repeat it."""

    environment: str
    version: str | None
    """Library and version behind the environment."""
    run: str
    steps: int
    """Environment steps that the agents were trained for."""
    episodes: int
    """Episodes of every row, over all seeds."""
    seeds: int
    greedy: bool
    device: str
    seconds: float
    """Wall-clock time of the evaluation."""
    members: dict[str, list[str]]
    """Agents of each side."""
    rows: list[Row]
    env_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keywords that the environment was made with."""
    social: Social | None = None
    """Social outcomes of self-play, where all agents are of one side."""

    def to_json(self) -> dict[str, Any]:
        """Plain values by the fields' names: the conditions, from `environment` to `members` (`seconds` of wall-clock
        time) and `env_kwargs`, and `"rows": [{"sides", "returns", "stderr", "side_stderr"}]`; with one side also
        `"social": {"efficiency", "equality", "sustainability", "cooperation"}`, each [mean, standard error]. Where one
        episode has no standard error it is None."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:  # one episode has no standard error, and JSON no NaN
            for name in ("stderr", "side_stderr"):
                row[name] = {a: None if math.isnan(x) else x for a, x in row[name].items()}
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        members = {side: list(agents) for side, agents in self.members.items()}
        social = {} if self.social is None else {"social": self.social.to_json()}
        return {name: x for name, x in told.items() if name != "social"} | {"members": members, "rows": rows} | social

    def mean(self, side: str, /, **players: str) -> tuple[float, float]:
        """Return of one agent of `side`, and its standard error, where `players` play: `mean("agent",
        adversary="chase", agent="self")`."""
        if side not in self.members:
            raise KeyError(f"there is no side {side}; the sides are {', '.join(self.members)}")
        for row in self.rows:
            if row.sides == players:
                return self._of_side(row, side)
        played = "; ".join(str(row.sides) for row in self.rows)
        raise KeyError(f"no row has the sides {players}; played were {played}")

    def _of_side(self, row: Row, side: str) -> tuple[float, float]:
        return float(np.mean([row.returns[agent] for agent in self.members[side]])), row.side_stderr[side]

    def table(self) -> Table:
        """Two sides: a matrix, one cell per pairing. Otherwise a row per line-up."""
        table = self._matrix() if len(self.members) == 2 else self._list()
        order = " and one ".join(self.members) + (" (below)" if len(self.members) == 2 else "")
        table.title = escape(f"{self.environment}: return per episode of one {order}")
        social = "" if self.social is None else f"{self.social.sentence()}\n"
        table.caption = escape(social + self.conditions())
        table.caption_justify = table.title_justify = "left"
        return table

    def conditions(self) -> str:
        """Under which conditions the numbers were taken, in one sentence."""
        version = f" ({self.version})" if self.version else ""
        keywords = f" with {json.dumps(self.env_kwargs)}" if self.env_kwargs else ""
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        return (
            f"self: {self.run} after {self.steps:,} steps, {'greedy' if self.greedy else 'sampled'} actions. "
            f"Mean ± standard error over {self.episodes} episodes, {seeds}. {self.environment}{version}{keywords}, "
            f"{self.device}, "
            f"{clock(self.seconds)} min."
        )

    def _matrix(self) -> Table:
        first, second = self.members
        cells = {(row.sides[first], row.sides[second]): row for row in self.rows}
        table = Table(escape(f"{first} ↓  {second} →"))
        columns = list(dict.fromkeys(row.sides[second] for row in self.rows))
        for column in columns:
            table.add_column(escape(column), justify="right")
        for name in dict.fromkeys(row.sides[first] for row in self.rows):
            shown = []
            for column in columns:
                row = cells.get((name, column))
                shown.append("" if row is None else "\n".join(self._shown(row, side) for side in self.members))
            table.add_row(f"{escape(name)}\n", *shown, end_section=True)
        return table

    def _list(self) -> Table:
        table = Table(min_width=76)  # so that the caption has room
        for side in self.members:
            table.add_column(escape(side))
        for side in self.members:
            table.add_column(escape(f"return of {side}"), justify="right")
        for row in self.rows:
            table.add_row(*map(escape, row.sides.values()), *(self._shown(row, side) for side in self.members))
        return table

    def _shown(self, row: Row, side: str) -> str:
        mean, error = self._of_side(row, side)
        return f"{mean:.1f} ± {error:.1f}"


def evaluate(
    agents: Agents | str | Path | Run,
    *,
    episodes: int = 400,
    seeds: int = 1,
    greedy: bool = False,
    against: Opponent | Sequence[Opponent] | Mapping[str, Any] | None = None,
    checkpoint: int | str | None = None,
    env: Any = None,
    env_kwargs: Mapping[str, Any] | None = None,
    root: str | Path = "runs",
    progress: bool = True,
) -> CrossPlay:
    """Play every side of `agents` (or of a run) against references, other runs, policies of your own, and itself.

    `episodes` are played for each of `seeds` seeds in every pairing. `greedy`: the most probable action
    instead of a sampled one (the references and other runs too). `against`: names of references (`random`,
    `still`, `chase`, `flee`, where a side has them), runs and loaded `Agents`, one or several; all references if not
    given. With names, {name: opponent}, also policies of your own: objects with `act(timestep, rng)`, which answers a
    TimeStep of all copies with actions [copies, agents], whole numbers (the columns of other sides do not count), and
    with a NumPy Generator for what it draws; where `timestep.first`, an episode begins. With three
    or more sides, all others are replaced at once; with one side all agents are, for comparison. `checkpoint`: of the
    run, by its step or `best`. `env`: the environment as an object, where the run was trained on one; an object that
    steps copies of its own is played with these, and left open. `env_kwargs`: keywords that it is made with, besides
    those of training or instead of them (see `load`). `root`: where runs that are given by name are.

    Raises ConfigError for an opponent that is none of these, of another environment, or that answers otherwise;
    EndlessEpisode where an episode is longer than 20,000 steps.
    """
    for what, value in (("episodes", episodes), ("seeds", seeds)):
        if value < 1:
            raise ConfigError(f"{what} must be 1 or more, got {value}")
    agents = loaded(agents, checkpoint=checkpoint, env=env, env_kwargs=env_kwargs, root=root)
    began = time.monotonic()
    spec = agents.spec
    opponents = _opponents(spec, against, greedy, env, root)
    line_ups = _line_ups(spec, agents.player(greedy=greedy), opponents)
    rows = []
    with (
        contextlib.closing(stage(agents, min(episodes, MOST_COPIES))) as host,
        Bar("evaluate", len(line_ups) * seeds * episodes, unit="episodes", show=progress) as bar,
    ):
        outcomes = Outcomes(spec.agents, host.num_envs) if len(spec.sides) == 1 else None
        for sides, players in line_ups:
            bar.note(", ".join(f"{side} {name}" for side, name in sides.items()))
            returns = []
            for seed in range(seeds):
                done = len(rows) * seeds * episodes + seed * episodes
                tell = lambda n, done=done: bar.update(done + n)  # noqa: E731
                returns.append(play(host, players, episodes, seed, tell, None if rows else outcomes))
            rows.append(_row(spec, sides, np.concatenate(returns)))
        bar.update(len(rows) * seeds * episodes, last=True)
    return CrossPlay(
        environment=spec.name,
        version=environment_version(spec.name),
        run=agents.name,
        steps=agents.steps,
        episodes=episodes * seeds,
        seeds=seeds,
        greedy=greedy,
        device=device(),
        seconds=time.monotonic() - began,
        members={side: [spec.agents[i] for i in members] for side, members in spec.sides.items()},
        rows=rows,
        env_kwargs=agents.config.env_kwargs,
        social=None if outcomes is None else outcomes.social(),
    )


def _row(spec: EnvSpec, sides: dict[str, str], returns: Float[np.ndarray, "episodes agents"]) -> Row:
    def error(x: Float[np.ndarray, " episodes"]) -> float:
        return float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan

    return Row(
        sides=sides,
        returns=dict(zip(spec.agents, returns.mean(axis=0).tolist(), strict=True)),
        stderr={agent: error(returns[:, i]) for i, agent in enumerate(spec.agents)},
        side_stderr={side: error(returns[:, list(i)].mean(axis=1)) for side, i in spec.sides.items()},
    )


# ------------------------------------------------------------------------------------------ who plays


_LineUp = tuple[dict[str, str], dict[str, Any]]  # names and policies by side


def _line_ups(spec: EnvSpec, me: Any, opponents: dict[str, dict[str, Any]]) -> list[_LineUp]:
    """Self-play, then every side against every opponent that all other sides have; with one side, which has nobody to
    play against, what they get in its place."""
    sides = list(spec.sides)
    found: list[_LineUp] = [(dict.fromkeys(sides, "self"), dict.fromkeys(sides, me))]
    for side in sides:
        others = [other for other in sides if other != side] or sides
        for name, policies in opponents.items():
            if all(other in policies for other in others):
                found.append(
                    (
                        {s: name if s in others else "self" for s in sides},
                        {s: policies[s] if s in others else me for s in sides},
                    )
                )
    return found


def _opponents(
    spec: EnvSpec,
    against: Any,
    greedy: bool,
    env: Any,
    root: str | Path,
) -> dict[str, dict[str, Any]]:
    """Policies by side, by the opponent's name."""
    references: dict[str, dict[str, Any]] = {}
    for side, policies in references_for(spec).items():
        for name, policy in policies.items():
            references.setdefault(name, {})[side] = policy
    if against is None:
        return references
    if isinstance(against, Mapping):
        return {name: _named(name, given, spec, references, greedy, env, root) for name, given in against.items()}
    chosen: dict[str, dict[str, Any]] = {}
    loaded: dict[str, Any] = {}
    for given in [against] if isinstance(against, str | Path) or not isinstance(against, Iterable) else against:
        name = given.name if isinstance(given, Agents) else str(given.path if isinstance(given, Run) else given)
        if not isinstance(given, str | Path | Run | Agents):
            raise ConfigError(
                "against: expected references by name, runs, Agents, or policies with names, {name: policy}; got "
                f"{_said(given)}" + (f': give {{"mine": {type(given).__name__}(…)}}' if hasattr(given, "act") else "")
            )
        if loaded.setdefault(name, given) is not given and isinstance(given, Agents):
            raise ConfigError(f"against: two opponents are called {name}; give them names, {{name: agents}}")
        chosen[name] = _policies(given, spec, references, greedy, env, root)
    return chosen


def _named(name: Any, given: Any, spec: EnvSpec, *how: Any) -> dict[str, Any]:
    """Policies by side of an opponent that was given with a name."""
    if not isinstance(name, str) or name == "self":
        raise ConfigError(f"against: expected a name for each opponent, other than self, got {name!r}")
    if isinstance(given, str | Path | Run | Agents):
        return _policies(given, spec, *how)
    if isinstance(given, Player):
        _refuse_other(name, given.agents, spec)
        return dict.fromkeys(spec.sides, given)
    if isinstance(given, type) or not callable(getattr(given, "act", None)):
        raise ConfigError(
            f"against: expected {name} to be a policy, an object with act(timestep, rng) -> actions [copies, agents], "
            f"or a reference, run or Agents; got {_said(given)}"
        )
    return dict.fromkeys(spec.sides, _Checked(given, name))


def _policies(
    given: Opponent, spec: EnvSpec, references: dict[str, dict[str, Any]], greedy: bool, env: Any, root: str | Path
) -> dict[str, Any]:
    """Policies by side of a reference, a run, or loaded agents."""
    if isinstance(given, Agents):
        name, other = given.name, given
    else:
        name = str(given.path if isinstance(given, Run) else given)
        if name in references:
            return references[name]
        try:
            other = load(given, env=env, root=root)
        except ValueError as err:
            raise ConfigError(
                f"{name} is neither a reference ({', '.join(references)}) nor a run that can be loaded: {err}"
            ) from err
    _refuse_other(name, other, spec)
    return dict.fromkeys(spec.sides, other.player(greedy=greedy))


def _refuse_other(name: str, other: Agents, spec: EnvSpec) -> None:
    """Raise ConfigError for agents of another environment."""
    if other.spec != spec:
        raise ConfigError(
            f"{name} was trained on {other.spec.name} with the agents {', '.join(other.spec.agents)}, "
            f"which does not fit {spec.name} with {', '.join(spec.agents)}"
        )


def _said(given: Any) -> str:
    return f"the class {given.__name__}; make one of it" if isinstance(given, type) else type(given).__name__


class _Checked:
    """A policy of the user's, held to what `act` is to answer."""

    def __init__(self, policy: Any, name: str):
        self._policy, self._name = policy, name

    def act(self, timestep: TimeStep, rng: np.random.Generator) -> Int[np.ndarray, "copies agents"]:
        """Actions of all agents. Raises ConfigError where they are none."""
        got, wanted = np.asarray(self._policy.act(timestep, rng)), np.shape(timestep.acting)
        if got.shape != wanted or not np.issubdtype(got.dtype, np.integer):
            raise ConfigError(
                f"the policy {self._name} answered with {got.dtype} of shape {got.shape}; expected whole numbers of "
                f"shape {wanted} (copies, agents): an action for every agent of every copy"
            )
        return got
