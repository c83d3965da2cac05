"""One run as one self-contained page.

Nothing is fetched, scripts only enhance; light and dark, on a screen, a phone and paper.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from codream.config import Config
from codream.presets import PRESETS
from codream.progress import clock
from codream.reading import flat
from codream.report.charts import palette
from codream.report.panels import Panel
from codream.report.sections import cross_play, foresight, horizon, social
from codream.report.storyboard import storyboard

__all__ = ["page", "run_page"]


def page(
    title: str, subtitle: str, sections: Sequence[tuple[str, str, str]], sides: Mapping[str, Sequence[int]]
) -> str:
    """A page of sections (id, heading, HTML) with the styles, the colours of the agents, and the script."""
    assets = resources.files("codream.report") / "assets"
    css, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    firsts = [members[0] for members in sides.values()]
    side1 = f"--side1:var(--a{firsts[1]})" if len(firsts) > 1 else ""
    colours = (
        f":root{{{palette(sides, 0)};{side1}}}@media (prefers-color-scheme:dark){{:root{{{palette(sides, 1)}}}}}"
        f"@media print{{:root{{{palette(sides, 0)}}}}}"
    )
    links = "".join(f'<a href="#{key}">{html.escape(name)}</a>' for key, name, _ in sections if name)
    body = "".join(
        f'<section id="{key}">' + (f"<h2>{html.escape(name)}</h2>" if name else "") + f"{inner}</section>"
        for key, name, inner in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{css}{colours}</style></head><body>"
        f'<header><h1>{html.escape(title)}</h1><p class="sub">{subtitle}</p><nav>{links}</nav></header>'
        f"<main>{body}</main><footer>Written by codream {importlib.metadata.version('codream')}. This file needs no "
        f"network.</footer><script>{script}</script></body></html>\n"
    )


def run_page(
    name: str,
    config: Config,
    about: Mapping[str, Any],
    metrics: Sequence[Mapping[str, float]],
    panels: Sequence[Panel],
    measured: Mapping[str, Any] | None,
    sides: Mapping[str, Sequence[int]],
    warnings: Sequence[str],
) -> str:
    """The report of one run. `measured`: what playing showed; None where nothing was played."""
    environment = about["environment"]
    agents: list[str] = environment["agents"]
    steps = int(metrics[-1]["steps"]) if metrics else 0
    seconds = float(metrics[-1].get("seconds", 0.0)) if metrics else 0.0
    subtitle = (
        f"{len(agents)} agents in <b>{html.escape(environment['name'])}</b>, preset "
        f"<b>{html.escape(config.preset)}</b>, "
        f"seed {config.seed}.{_roles(environment['name'], agents, config)}"
    )
    told = "".join(f'<p class="warn">{html.escape(line)}</p>' for line in warnings)
    sections = [
        ("glance", "", _glance(config, steps, seconds, measured) + told),
        ("training", "How training went", f'<div class="panels">{"".join(map(_figure, panels))}</div>'),
    ]
    if measured is None:
        missing = (
            '<p class="empty">Cross-play, episodes, dreams and predictions need playing, which was left out. '
            "<code>codream report RUN</code> adds them.</p>"
        )
        sections.append(("played", "How well they play and foresee", missing))
    else:
        sections += _played(measured, agents, steps, config)
    sections.append(("about", "Configuration and machine", _about(config, about, seconds)))
    return page(name, subtitle, sections, sides)


def _roles(game: str, agents: Sequence[str], config: Config) -> str:
    """The agents in their colours, and what they are about where their names do not say."""
    told = ""
    if game == "jaxmarl:coin_game" and not {"payoff_matrix", "shared_rewards"} & config.env_kwargs.keys():
        told = (
            " On a small board whose edges join, each agent has coins of its own colour. Any coin pays its taker 1, "
            "but a coin of the other's colour costs the other 2."
        )
    if "simple_tag" in game:
        told = " The adversaries are predators that hunt the prey; a touch pays every predator and costs the prey."
    dots = "".join(f'<li><i style="background:var(--a{i})"></i>{html.escape(a)}</li>' for i, a in enumerate(agents))
    return f'{told}</p><ul class="agents">{dots}</ul><p>'


def _glance(config: Config, steps: int, seconds: float, measured: Mapping[str, Any] | None) -> str:
    asked = (
        f"of {config.total_steps:,} environment steps"
        if steps <= config.total_steps
        else f"environment steps ({config.total_steps:,} asked for)"
    )
    cards = [
        (f"{steps:,}", asked),
        (f"{clock(seconds)} min", "of wall-clock training"),
    ]
    if measured:
        model = measured["model"]
        dream, still = (model["by_horizon"][-1], model["still_by_horizon"][-1]) if model else (None, None)
        if model and dream is not None and still:
            cards.append(
                (f"{dream / still:.2f} ×", f"error of a {len(model['by_horizon'])}-step dream, against “nothing moves”")
            )
        if model and model["accuracy"] is not None:
            cards.append(
                (f"{model['accuracy']:.0%}", f"of the others’ actions foreseen (base rate {model['base_rate']:.0%})")
            )
        result = measured["cross_play"]
        if result.get("social"):
            cards.append((f"{result['social']['efficiency'][0]:.1f}", "sum of all returns in an episode (efficiency)"))
            cards.append((f"{result['social']['equality'][0]:.2f}", "equality of returns: 1 if all get the same"))
        for side, members in result["members"].items():
            rows = [
                r for r in result["rows"] if r["sides"][side] == "self" and list(r["sides"].values()).count("self") == 1
            ]
            row = rows[-1] if rows else result["rows"][0]
            mean = sum(row["returns"][agent] for agent in members) / len(members)
            who = ", ".join(f"{opponent} {other}" for other, opponent in row["sides"].items() if other != side)
            cards.append((f"{mean:.1f}", f"return of one {side}" + (f" against {who}" if who else "")))
    return (
        '<div class="glance">'
        + "".join(f"<div><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>" for a, b in cards)
        + "</div>"
    )


def _figure(panel: Panel) -> str:
    return (
        f'<figure class="panel" id="panel-{panel.key}"><figcaption><h3>{html.escape(panel.title)}</h3>'
        f"<p>{html.escape(panel.sentence)}</p></figcaption>{panel.svg}</figure>"
    )


def _played(measured: Mapping[str, Any], agents: list[str], steps: int, config: Config) -> list[tuple[str, str, str]]:
    old = (
        f'<p class="warn">Measured at step {measured["steps"]:,}; the run has since reached {steps:,}.</p>'
        if measured["steps"] < steps
        else ""
    )
    together = len(measured["sides"]) == 1
    title = "How well they play together" if together else "Against opponents that never change"
    sections = [("cross-play", title, old + cross_play(measured))]
    outcomes = social(measured["cross_play"])
    if outcomes:
        sections.append(("social", "Social outcomes", outcomes))
    model, told = measured["model"], _told(config)
    if measured["scenes"]:
        title = "An episode" if model is None else "An episode, and the same start imagined"
        sections.append(("dream", title, _dream(measured, agents, told)))
    if model is not None:
        sections.append(("horizon", "How far ahead the dream holds", horizon(model, told)))
    if model and model.get("foresight"):
        sections.append(("foresight", "Who predicts whom", foresight(model["foresight"])))
    return sections


def _told(config: Config) -> str:
    """Which of the actions that were really taken a world model is told along an episode."""
    everyone = config.algo == "wm_rnd" and config.projection.actions == "joint"
    return "everyone’s actions" if everyone else "only its own actions"


def _dream(measured: Mapping[str, Any], agents: list[str], told: str) -> str:
    scenes = measured["scenes"]
    data = {"scenes": scenes, "agents": agents, "actions": measured["actions"], "counts": measured["num_actions"]}
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    sides = measured["sides"].values()
    firsts = [members[0] for members in sides] if len(sides) > 1 else next(iter(sides))[:2]
    still = "".join(storyboard(scenes[0], focal, agents) for focal in firsts)
    intro = (
        "A held-out episode as it was really played. This run has no world model, so nothing is imagined."
        if measured["model"] is None
        else "A held-out episode as it was really played. Each agent sees its first steps, then closes its eyes and "
        f"imagines the rest, told {told}. The closer the dream stays to what happened, the better it understands the "
        "world and the others in it."
    )
    if scenes[0]["kind"] == "grid":
        intro += (
            " Discs are agents, diamonds are coins in their owner’s colour; the board’s edges join. The paler a thing, "
            "the fewer of eight dreams have it there."
        )
    if scenes[0]["kind"] == "image":
        intro += " The pictures are what the networks see, which is coarser than what the environment draws."
    return (
        f'<p>{intro}</p>{_PLAYER}<div class="still">{still}</div>'
        f'<script type="application/json" id="scenes">{text}</script>'
    )


_PLAYER = """<div class="player" id="player"><div class="controls">
<button type="button" data-part="back" aria-label="one step back">◀︎ step</button>
<button type="button" data-part="play">▶ play</button>
<button type="button" data-part="next" aria-label="one step forward">step ▶︎</button>
<input type="range" min="0" value="0" data-part="slider" aria-label="step of the episode">
<span class="clock" data-part="clock" aria-live="polite"></span>
<label>who dreams <select data-part="focal"></select></label>
<label>episode <select data-part="episode"></select></label></div>
<div class="stage"><figure data-part="happened"><figcaption>What happened<span data-part="seen"></span></figcaption>
<svg class="arena" data-part="real" role="img" aria-label="the real episode"></svg></figure>
<figure data-part="dreamed"><figcaption><b data-part="dreamer"></b><span data-part="phase"></span></figcaption>
<svg class="arena" data-part="dream" role="img" aria-label="the imagined episode"></svg></figure></div>
<div data-part="entries"><b data-part="entries-title"></b><p class="fine" data-part="entries-told"></p>
<div class="curves" data-part="curves"></div></div>
<div class="minds"><div><h3 data-part="bars-title">What it expected each agent to do</h3>
<p class="fine">Bars: probability of each action; outlined: the one really taken.</p>
<table class="bars"><tbody data-part="others"></tbody></table></div>
<div><h3>What it expected for itself</h3>
<div class="wide"><table class="facts"><tbody data-part="facts"></tbody></table></div>
<div data-part="gaps"><h3>Gap between dream and reality</h3>
<p class="fine">Here: solid the dream, mean over eight, dashed if nothing moved. Means over many episodes: below.</p>
<svg class="chart" data-part="gap" viewBox="0 0 440 130" role="img" aria-label="gap by step"></svg>
</div></div></div></div>"""


def _about(config: Config, about: Mapping[str, Any], seconds: float) -> str:
    every, usual = flat(config), flat(PRESETS.get(config.preset, Config()))
    begun = f"in the preset {config.preset}" if config.preset in PRESETS else "by default"
    rows = "".join(
        f"<tr><th "
        f'scope="row">{html.escape(key)}</th><td{_mark(value, usual.get(key))}>{html.escape(str(value))}</td></tr>'
        for key, value in every.items()
    )
    versions = "".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>'
        for key, value in about["versions"].items()
    )
    environment = about["environment"]
    origin = environment.get("version") or environment.get("maker") or "given as an object"
    facts = [
        ("environment", f"{environment['name']} ({origin})"),
        ("device", about["device"]),
        ("wall-clock of training", f"{clock(seconds)} min"),
    ]
    machine = "".join(f'<tr><th scope="row">{a}</th><td>{html.escape(str(b))}</td></tr>' for a, b in facts)
    return (
        f'<div class="columns"><table><tbody>{machine}</tbody></table><table><tbody>{versions}</tbody></table></div>'
        f'<details><summary>All options</summary><p class="fine">Bold: other than {html.escape(begun)}, '
        f"or filled in for this environment.</p><div "
        f'class="columns"><table><tbody>{rows}</tbody></table></div></details>'
    )


def _mark(value: Any, usual: Any) -> str:
    return "" if value == usual else ' class="changed"'
