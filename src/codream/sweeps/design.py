"""What a sweep trains: every combination of grids, ablations and samples of a search, with every seed."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from codream.config import Config, ConfigError
from codream.presets import PRESETS, preset, reads
from codream.reading import build, flat
from codream.report.entries import FREE
from codream.runs import default_name

__all__ = ["Trial", "assignments", "trials_of"]

LONGEST = 100  # characters of a combination's name, which becomes a folder's


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    """Of its folder: the combination and the seed."""
    values: dict[str, Any]
    """What the combination sets."""
    config: Config


def trials_of(
    config: Config,
    *,
    seeds: int = 1,
    grid: Mapping[str, Sequence[Any]] | None = None,
    ablate: Mapping[str, Sequence[Any]] | None = None,
    search: Mapping[str, str] | None = None,
    samples: int = 10,
    keep: Collection[str] = (),
) -> list[Trial]:
    """All trials; the seeds of a combination follow each other, from `config.seed` on.

    `grid`: all combinations of the fields' values. `ablate`: `config` as it is, and with each value alone. `search`:
    ranges (`uniform:LOW:HIGH`, `log:LOW:HIGH`, `int:LOW:HIGH`, `choice:A,B,…`) from which `samples` are drawn; the same
    `config.seed` draws the same, and more samples begin with the same ones. Fields are named `world_model.lr`; `preset`
    starts from another preset, keeping the environment, what `config` changes of its own preset, and the fields in
    `keep`, as far as the learner reads them. What comes to the same configuration is trained once.

    Raises ConfigError for a field that does not exist, naming the nearest, or is given twice, and for a value of the
    wrong type or out of range.
    """
    grid, ablate, search = grid or {}, ablate or {}, search or {}
    for name, number in (("seeds", seeds), ("samples", samples)):
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}")
    _check_fields(config, [*grid, *ablate, *search])
    for name, values in [*grid.items(), *ablate.items()]:
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"{name} expects a list of values, got {values!r}")
    chosen = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    removed = [{}, *({name: value} for name, values in ablate.items() for value in values)]
    drawn = _draw(search, samples, config.seed)
    found: dict[str, tuple[dict[str, Any], Config]] = {}
    for parts in itertools.product(chosen, removed, drawn):
        values = {name: value for part in parts for name, value in part.items()}
        made = _with(config, values, keep)
        found.setdefault(made.to_json(), (values, made))
    plain = [_name(config, values) for values, _ in found.values()]
    return [
        Trial(f"{_short(name, values, plain.count(name) > 1)}-seed{seed}", values, dataclasses.replace(made, seed=seed))
        for name, (values, made) in zip(plain, found.values(), strict=True)
        for seed in range(config.seed, config.seed + seeds)
    ]


def assignments(option: str, texts: Sequence[str]) -> dict[str, str]:
    """`FIELD=…` as on the command line, by field. Raises ConfigError for another form, and for a field given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not (name and equals and values):
            raise ConfigError(f"{option} expects FIELD=…, e.g. {_EXAMPLES[option]}, got {text!r}")
        if name in found:
            raise ConfigError(f"{option} was given {name} twice; list its values: {name}={found[name]},{values}")
        found[name] = values
    return found


_EXAMPLES = {
    "--grid": "agents.lr=1e-3,3e-4",
    "--ablate": "world_model.teammates=false",
    "--search": "agents.entropy=log:1e-4:1e-2",
}


def listed(text: str) -> list[Any]:
    """Values separated by commas outside of brackets: true, false, none, numbers, JSON lists and objects, or text."""
    pieces, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += char
    return [_plain(piece.strip()) for piece in pieces]


_WORDS = {"true": True, "false": False, "none": None}


def _plain(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for read in (int, float, json.loads):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _check_fields(config: Config, names: Sequence[str]) -> None:
    known = flat(config)
    for name in names:
        if name in FREE:
            how = "--seeds says how many, from --seed on" if name == "seed" else "set it for all trials"
            raise ConfigError(f"{name} is nothing to sweep over, since it makes no other method of a run: {how}")
        if name not in known:
            inner = [field for field in known if field.rpartition(".")[2] == name.rpartition(".")[2]]
            near = list(dict.fromkeys(inner + difflib.get_close_matches(name, known, n=3)))
            raise ConfigError(
                f"unknown option {name}; "
                + (f"nearest: {', '.join(near)}" if near else "`codream train --help` lists all")
            )
        if names.count(name) > 1:
            raise ConfigError(f"{name} is given to more than one of grid, ablate and search; one must decide it")


def _with(config: Config, values: Mapping[str, Any], keep: Collection[str]) -> Config:
    """`config` with some fields changed, checked as if it had been read from a file."""
    try:
        if "preset" in values:
            own, other = flat(PRESETS.get(config.preset, Config())), preset(_text("preset", values["preset"]))
            stays = {"env", "env_kwargs", *keep} - {"algo", "preset"}  # which a preset says by itself
            changed = {name: value for name, value in flat(config).items() if name in stays or value != own[name]}
            kept = {name: value for name, value in changed.items() if reads(other.algo, name)}
            config, values = other, kept | dict(values)
        plain = dataclasses.asdict(config)
        for name, value in values.items():
            part, _, field = name.rpartition(".")
            (plain[part] if part else plain)[field] = value
        return build(Config, plain)
    except ValueError as err:
        raise ConfigError(f"{_name(config, values)}: {err}") from err


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"expected {name} to be a string, got {value!r}")
    return value


# ------------------------------------------------------------------------------------------ drawing


def _draw(search: Mapping[str, str], samples: int, seed: int) -> list[dict[str, Any]]:
    if not search:
        return [{}]
    ranges = {name: _range(name, text) for name, text in search.items()}
    rng = np.random.default_rng(seed)
    return [{name: _one(kind, ends, rng) for name, (kind, ends) in ranges.items()} for _ in range(samples)]


def _range(name: str, text: str) -> tuple[str, list[Any]]:
    """The kind of a range and its ends, or what to choose from."""
    kind, _, rest = text.partition(":")
    if kind == "choice" and rest:
        return kind, listed(rest)
    wanted = f"{name} expects uniform:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH or choice:A,B,…, got {text!r}"
    try:
        ends = [int(end) if kind == "int" else float(end) for end in rest.split(":")]
    except ValueError as err:
        raise ConfigError(f"{wanted} ({err})") from err
    if kind not in ("uniform", "log", "int") or len(ends) != 2:
        raise ConfigError(wanted)
    if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
        raise ConfigError(f"{name}: the range {text} must go from a number to a larger one")
    if kind == "log" and ends[0] <= 0:
        raise ConfigError(f"{name}: a logarithmic range begins above 0, got {text}")
    return kind, ends


def _one(kind: str, ends: list[Any], rng: np.random.Generator) -> Any:
    if kind == "choice":
        return ends[int(rng.integers(len(ends)))]
    low, high = ends
    if kind == "int":
        return int(rng.integers(low, high + 1))
    drawn = math.exp(rng.uniform(math.log(low), math.log(high))) if kind == "log" else rng.uniform(low, high)
    return float(np.clip(float(f"{drawn:.3g}"), low, high))  # so that the folder's name says all of it


# ------------------------------------------------------------------------------------------ names


def _name(config: Config, values: Mapping[str, Any]) -> str:
    """What a combination sets, e.g. `teammates=false,agents.lr=0.001`; if nothing, environment and preset."""
    if not values:
        return default_name(config)
    every = [name.rpartition(".")[2] for name in flat(config)]
    pairs = []
    for name, value in values.items():
        last = name.rpartition(".")[2]
        pairs.append(f"{last if every.count(last) == 1 else name}={_shown(value)}")
    return re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", ",".join(pairs))


def _short(name: str, values: Mapping[str, Any], shared: bool) -> str:
    """The name as a folder's: a checksum tells apart what is too long, or the same, once written so."""
    if len(name) <= LONGEST and not shared:
        return name
    return f"{name[:LONGEST]}-{zlib.crc32(json.dumps(values, default=str).encode()):08x}"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub(r'[\[\]{}" ]', "", json.dumps(value)).replace("null", "none")
