"""The measured parts of a report as HTML: cross-play, error by horizon, who predicts whom, social outcomes."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from codream.report.charts import Line, chart

__all__ = ["cross_play", "foresight", "horizon", "social", "standing", "standing_markdown"]

_SCRIPTED = ("chase", "flee")


def cross_play(measured: Mapping[str, Any]) -> str:
    """The table against the references, one sentence per side on what it means, and under which conditions."""
    result, baselines = measured["cross_play"], measured.get("baselines", [])
    sides = list(result["members"])
    table = _matrix(result, baselines) if len(sides) == 2 else _list(result)
    said = "".join(f"<li>{line}</li>" for line in standing(measured))
    played = {name for row in result["rows"] for name in row["sides"].values()}
    scripts = [f"<code>{name}</code>" for name in _SCRIPTED if name in played]
    note = (
        "Fixed opponents never change, so these numbers can be compared between runs; a game between the two trained "
        "sides (<em>self</em> against <em>self</em>) cannot. <code>random</code> acts uniformly at random, "
        "<code>still</code> does nothing (where no action is known for that, it takes the first)"
        + (f", {' and '.join(scripts)} {'are' if len(scripts) > 1 else 'is'} scripted" if scripts else "")
        + ". Grey cells are references among themselves, for comparison."
        if len(sides) > 1
        else "All agents are of one side and play together, so there is no opponent: <em>trained</em> is how they "
        "play, the grey rows are all of them acting uniformly at random, or doing nothing (where no action is known "
        "for that: taking the first), for comparison."
    )
    return (
        f'{table}<ul class="said">{said}</ul><p class="note-text">{note}</p>'
        f'<p class="fine">{html.escape(result["conditions"])}</p>'
    )


def standing(measured: Mapping[str, Any]) -> list[str]:
    """For each side and opponent: what it gets, beside what random and scripted policies get in its place."""
    result = measured["cross_play"]
    members: Mapping[str, Sequence[str]] = result["members"]
    lines = []
    for side in members:
        others = [other for other in members if other != side]
        for row in result["rows"]:
            opponents = {row["sides"][other] for other in others}
            if not others or row["sides"][side] != "self" or len(opponents) != 1 or "self" in opponents:
                continue
            opponent = opponents.pop()
            mine = _mean(row["returns"], members[side])
            random, scripted = (_baseline(measured, side, others, opponent, who) for who in ("random", "scripted"))
            if random is None or opponent == "still":
                continue
            text = (
                f"<b>{html.escape(side)}</b> against {html.escape(opponent)} {html.escape(', '.join(others))}: "
                f"<b>{mine:.1f}</b> per episode; acting at random gets {random:.1f}"
            )
            if scripted is not None:
                text += f", the scripted policy {scripted:.1f}" + _share(mine, random, scripted)
            lines.append(text + ".")
    if len(members) == 1:
        side = next(iter(members))
        mine = _mean(result["rows"][0]["returns"], members[side])
        random = _baseline(measured, side, [], "", "random")
        if random is not None:
            lines.append(f"Together they get <b>{mine:.1f}</b> each per episode; acting at random gets {random:.1f}.")
    return lines


def standing_markdown(measured: Mapping[str, Any]) -> str:
    """The cross-play table as Markdown, for places without HTML."""
    result = measured["cross_play"]
    sides = list(result["members"])
    lines = [
        " | ".join(["", *sides, *(f"return of one {side}" for side in sides), ""]),
        "|---" * (2 * len(sides)) + "|",
    ]
    for row in result["rows"]:
        means = (f"{_mean(row['returns'], result['members'][side]):.1f}" for side in sides)
        lines.append(" | ".join(["", *(row["sides"][side] for side in sides), *means, ""]))
    return "\n".join(line.strip() for line in lines) + f"\n\n{result['conditions']}\n"


def _share(mine: float, random: float, scripted: float) -> str:
    if scripted - random < 1e-6:
        return ""
    share = (mine - random) / (scripted - random)
    if share > 1:
        return " – better than the script"
    return f" – {share:.0%} of the way from random to the script" if share > 0 else " – no better than random"


def _baseline(measured: Mapping[str, Any], side: str, others: list[str], opponent: str, who: str) -> float | None:
    for row in measured.get("baselines", []):
        fits = all(row["sides"][other] == opponent for other in others)
        name = row["sides"].get(side)
        if fits and (name == who or (who == "scripted" and name in _SCRIPTED)):
            return row["returns"][side]
    return None


def _mean(returns: Mapping[str, float], members: Sequence[str]) -> float:
    return sum(returns[agent] for agent in members) / len(members)


def _error(errors: Mapping[str, float | None], whose: str) -> str:
    """A standard error beside its mean; nothing where one episode has none."""
    error = errors.get(whose)
    return "" if error is None else f"<small> ± {error:.1f}</small>"


def _matrix(result: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]) -> str:
    first, second = result["members"]
    cells: dict[tuple[str, str], str] = {}
    for row in baselines:
        values = "<br>".join(f"{row['returns'][side]:.1f}{_error(row['stderr'], side)}" for side in (first, second))
        cells[(row["sides"][first], row["sides"][second])] = f'<td class="base">{values}</td>'
    for row in result["rows"]:
        values = "<br>".join(
            f'<span class="s{k}">{_mean(row["returns"], members):.1f}{_error(row["side_stderr"], side)}</span>'
            for k, (side, members) in enumerate(result["members"].items())
        )
        cells[(row["sides"][first], row["sides"][second])] = f"<td>{values}</td>"
    rows = list(dict.fromkeys(["self", *(key[0] for key in cells)]))
    columns = list(dict.fromkeys(["self", *(key[1] for key in cells)]))
    head = "".join(f'<th scope="col">{_who(name, second)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{_who(row, first)}</th>'
        + "".join(cells.get((row, c), "<td></td>") for c in columns)
        + "</tr>"
        for row in rows
    )
    return (
        f'<p class="note-text">Return of one agent per episode: above for <span '
        f'class="s0">{html.escape(first)}</span>, '
        f'below for <span class="s1">{html.escape(second)}</span>.</p><div class="wide"><table class="cross">'
        f"<thead><tr><th>{html.escape(first)} ↓ &nbsp; {html.escape(second)} →</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _who(name: str, side: str) -> str:
    return f"trained {html.escape(side)}" if name == "self" else html.escape(name)


def _list(result: Mapping[str, Any]) -> str:
    """A row for every line-up; where all are of one side also every agent's own return."""
    sides = list(result["members"])
    alone = list(result["members"][sides[0]]) if len(sides) == 1 else []
    head = "".join(f'<th scope="col">{html.escape(side)}</th>' for side in sides)
    head += "".join(f'<th scope="col">return of one {html.escape(side)}</th>' for side in sides)
    head += "".join(f'<th scope="col">of {html.escape(agent)}</th>' for agent in alone)
    body = ""
    for row in result["rows"]:
        base = "" if "self" in row["sides"].values() else ' class="base"'
        body += "<tr>" + "".join(f'<th scope="row">{_who(row["sides"][s], s)}</th>' for s in sides)
        body += "".join(
            f"<td{base}>{_mean(row['returns'], result['members'][s]):.2f}{_error(row['side_stderr'], s)}</td>"
            for s in sides
        )
        body += "".join(f"<td{base}>{row['returns'][a]:.2f}{_error(row['stderr'], a)}</td>" for a in alone) + "</tr>"
    return f'<div class="wide"><table class="cross"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_OUTCOMES = {
    "efficiency": "sum of all agents’ returns per episode: how much they earn together",
    "equality": "1 − Gini of the returns: 1 if all earn the same, towards 0 if one earns all",
    "sustainability": "mean step at which an agent earns something: late means that the resource lasted",
    "cooperation": "share of choices that are cooperative, as the game defines it (in coin_game: coins taken that are "
    "one’s own colour)",
}


def social(result: Mapping[str, Any]) -> str:
    """Social outcomes of self-play, where the evaluation has them, with what each means."""
    outcomes = {name: value for name, value in (result.get("social") or {}).items() if value}
    if not outcomes:
        return ""
    body = ""
    for name, value in outcomes.items():
        cell = (
            "<br>".join(f"{html.escape(who)}: {_shown(x)}" for who, x in value.items()) if name == "cooperation" else ""
        )
        body += (
            f'<tr><th scope="row">{html.escape(name)}</th><td>{cell or _shown(value)}</td>'
            f"<td>{_OUTCOMES.get(name, '')}</td></tr>"
        )
    return (
        "<p>What comes of it for everyone when the trained agents play together: mean ± standard error over the "
        f'episodes above.</p><div class="wide"><table class="facts"><tbody>{body}</tbody></table></div>'
    )


def _shown(value: Any) -> str:
    """A mean, with its standard error where there is one."""
    if not isinstance(value, (list, tuple)):
        return f"{value:.2f}"
    mean, error = value
    return f"{mean:.2f}" + ("" if error is None else f"<small> ± {error:.2f}</small>")


# ------------------------------------------------------------------------------------------ the world model


def horizon(model: Mapping[str, Any], told: str = "its own actions") -> str:
    """Error after 1, 2, … imagined steps against "nothing moves". `told`: which actions the model was told."""
    dreamed = [_number(x) for x in model["by_horizon"]]
    still = [_number(x) for x in model["still_by_horizon"]]
    if not any(math.isfinite(x) for x in dreamed):
        return '<p class="empty">No episode was long enough to imagine anything of it.</p>' + _facts(model)
    ahead = [float(k + 1) for k in range(len(dreamed))]
    svg = chart(
        [
            Line("imagined", ahead, dreamed, "var(--p0)"),
            Line("nothing moves", ahead, still, "var(--p6)", "7 3"),
        ],
        x_label="steps imagined ahead",
        y_label="squared error",
        zero=True,
        whole=True,
        label="error by horizon",
    )
    if still[-1]:
        ratio = dreamed[-1] / still[-1]
        verdict = f"{'better' if ratio < 1 else 'no better'} than assuming that nothing moves"
        found = (
            f"After {len(dreamed)} imagined steps the error is <b>{ratio:.2f}</b> of that of “nothing moves”: {verdict}"
        )
    else:
        found = "Nothing moved in these episodes, so that there is nothing to compare the error with"
    return (
        f'<div class="two"><figure class="panel">{svg}</figure><div>'
        f"<p>{found}. Measured on {model['episodes']} held-out episodes of {html.escape(model['play'])}, the "
        f"model being told {html.escape(told)}; the mean of several dreams is compared with what happened, in the "
        "units that the networks see, summed over an observation’s entries.</p>" + _facts(model) + "</div></div>"
    )


def _facts(model: Mapping[str, Any]) -> str:
    def ratio(a: Any, b: Any) -> str:
        return f"{a / b:.2f}" if a is not None and b else "–"

    facts = [
        (
            "one-step error / nothing moves",
            ratio(model["one_step"], model["still"]),
            "below 1 is better than standing still",
        ),
        ("the same, sampled", ratio(model["one_step_sampled"], model["still"]), "a dream samples, so it also wavers"),
        (
            "predicted / real reward, on steps with one",
            _fixed(model["reward_ratio"]),
            "1 is right; below 1 it expects too little",
        ),
        ("bias of reward elsewhere", _fixed(model["elsewhere"], "+.3f"), "per step; 0 is right"),
        ("reconstruction error", _fixed(_rounded(model["reconstruction"]), ".3g"), "0 where nothing is coded"),
    ]
    rows = "".join(f'<tr><th scope="row">{a}</th><td>{b}</td><td>{c}</td></tr>' for a, b, c in facts)
    return f'<div class="wide"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _fixed(value: Any, how: str = ".2f") -> str:
    return "–" if value is None else format(value, how)


def _rounded(value: Any) -> Any:
    return 0.0 if value is not None and abs(value) < 1e-9 else value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def foresight(seen: Mapping[str, Any]) -> str:
    """Who predicts whom: a matrix of accuracies, and the reliability diagram."""
    agents = seen["agents"]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in agents)
    base = "".join(f"<td>{_base(seen, j)}</td>" for j in range(len(agents)))
    body = ""
    for i, name in enumerate(agents):
        body += f'<tr><th scope="row">{html.escape(name)} predicts</th>'
        for j in range(len(agents)):
            body += _pair(seen, i, j)
        body += "</tr>"
    matrix = (
        '<div class="wide"><table class="who"><thead><tr><th>predictor ↓ &nbsp; predicted →</th>'
        f"{head}</tr></thead><tbody>{body}</tbody>"
        f'<tfoot><tr><th scope="row">base rate</th>{base}</tr></tfoot></table></div>'
    )
    many = " many" if len(agents) > 3 else ""  # then the matrix has a row of the page to itself
    confidence = [_number(x) for x in seen["confidence"]]
    rate = [_number(x) for x in seen["hit_rate"]]
    diagram = chart(
        [Line("all pairs", confidence, rate, "var(--p0)")],
        x_label="how sure it was (probability of its first guess)",
        y_label="how often it was right",
        identity=True,
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        label="calibration of predicted actions",
    )
    return (
        "<p>Each cell: how often the predictor’s first guess of the other’s next action was the one taken, "
        "over all steps "
        "of the held-out episodes. <b>Deeper colour: further above the base rate</b>, which is what one gets by always "
        "naming the other’s favourite action. “off by” is the calibration error: how far its stated "
        "confidence lies from "
        f'how often it is right, on average.</p><div class="two{many}">{matrix}<figure '
        f'class="panel"><figcaption><h3>Calibration</h3>'
        "<p>On the dashed diagonal “70 % sure” comes true seven times in ten; below it the agents are too sure of "
        f"themselves.</p></figcaption>{diagram}</figure></div>"
    )


def _base(seen: Mapping[str, Any], j: int) -> str:
    """Of one agent as all others predict it, who need not have been there at the same steps."""
    known = [row[j] for row in seen["base_rate"] if row[j] is not None] or [None]
    least, most = _percent(min(known)), _percent(max(known))
    return least if least == most else f"{least} to {most}"


def _pair(seen: Mapping[str, Any], i: int, j: int) -> str:
    hit, base = seen["accuracy"][i][j], seen["base_rate"][i][j]
    if hit is None:
        return '<td class="none">–</td>'
    skill = max((hit - base) / (1 - base), 0.0) if base is not None and base < 1 else 0.0
    off = seen["calibration_error"][i][j]
    return f'<td style="--skill:{skill * 55:.0f}%"><b>{hit:.0%}</b><br><small>off by {_percent(off)}</small></td>'


def _percent(value: Any) -> str:
    return "–" if value is None else f"{value:.0%}"
