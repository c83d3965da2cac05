"""The README keeps its word: its code runs (the first example: `test_examples`), its commands are understood, and its
numbers are those of the presets."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Toy, toy_config

import codream
from codream import Config, Run, cli, preset
from codream.presets import PRESETS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [part.strip() for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(line)[1:] for line in lines if line.startswith("codream ")]


def test_the_example_with_an_object(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = codream.train
    monkeypatch.setattr(codream, "train", lambda *a, **k: train(*a, **k, root=runs, name="readme", progress=False))
    names: dict[str, Any] = {"codream": codream, "config": toy_config(total_steps=40), "Meeting": Toy}
    exec(compile(blocks("python")[1], "README.md", "exec"), names)
    assert names["agents"].steps >= 40


@pytest.mark.parametrize("args", commands(), ids=shlex.join)
def test_commands(args: list[str], host_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command is parsed and carried out as far as its environment; what follows is tested elsewhere."""
    done: list[Any] = []

    def train(config: Config, **rest: Any) -> Run:
        if rest["resume"] is None:
            codream.make_env(rest["env"] or config.env, 2, **config.env_kwargs)
        done.append(config)
        return host_run

    monkeypatch.setattr(cli, "train", train)
    monkeypatch.setattr(cli, "train_seeds", lambda config, *, seeds, **rest: [train(config, **rest)] * min(seeds, 2))
    monkeypatch.setattr(cli, "run_sweep", lambda command, config, env: None)
    monkeypatch.setattr(cli, "evaluate", lambda *_, **rest: codream.evaluate(host_run, **short(rest)))
    monkeypatch.setattr(cli, "load", lambda run, **rest: run)
    monkeypatch.setattr(cli, "report", lambda *_, **rest: codream.report(host_run, quick=True))
    monkeypatch.setattr(cli, "compare", lambda runs, **rest: rest["out"])
    monkeypatch.setattr(cli, "watch", lambda run, **rest: rest["out"])
    monkeypatch.setattr(cli, "inspect", lambda *_, **rest: "")
    monkeypatch.setattr(Run, "open", staticmethod(lambda *_: host_run))
    monkeypatch.setitem(sys.modules, "my_envs", SimpleNamespace(Meeting=Toy))
    with monkeypatch.context() as patch:
        patch.chdir(runs_folder(host_run))
        assert cli.main(args) == 0
    assert len(done) == (args[0] == "train")


def short(options: dict[str, Any]) -> dict[str, Any]:
    against = options.get("against")
    known = against and [a for a in against if "/" not in a]
    return {**options, "episodes": 1, "seeds": 1, "against": known, "env": None, "progress": False}


def runs_folder(run: Run) -> Path:
    folder = run.path.parent / "readme-commands"
    folder.mkdir(exist_ok=True)
    return folder


def test_commands_cover_what_the_readme_promises() -> None:
    joined = [shlex.join(args) for args in commands()]
    assert "train" in joined
    for part in (
        "evaluate ",
        "--resume",
        "--json",
        "jaxmarl:",
        "butterfly:",
        "--replay.uniform",
        "report ",
        "sweep ",
        "--seeds 5",
        "compare ",
        "watch ",
        "inspect ",
        "envs",
        "devices",
        "no-teammates",
        "--algo wm_rnd",
        "--preset ippo",
        "--env-from ",
    ):
        assert any(part in line for line in joined), part


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = (line for block in blocks("bash") for line in block.splitlines() if "pytest" in line)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for part in command.split(" && "):
        assert part in script


def test_the_table_of_presets_is_true() -> None:
    columns = [preset(name) for name in ("paper", "summary", "small")]
    matwm = [name for name, config in PRESETS.items() if config.algo == "matwm"]
    assert matwm == ["paper", "summary", "small"]
    rows = {
        "hidden / layers / heads": lambda c: f"{c.world_model.hidden} / {c.world_model.layers} / {c.world_model.heads}",
        "latent of vectors": latent,
        "world-model batch × length": lambda c: f"{c.world_model.batch} × {c.world_model.length}",
        "imagined steps × starts per agent": starts,
        "learning rate: world model / agents": lambda c: f"{c.world_model.lr:g} / {c.agents.lr:g}",
        "replay: steps / decay": lambda c: f"{c.replay.capacity:,} / {c.replay.decay:g}",
        "steps per update: world model / agents": lambda c: f"{c.world_model_every:g} / {c.agents_every:g}",
        "environment copies": lambda c: str(c.num_envs),
        "total steps": lambda c: f"{c.total_steps:,}",
    }
    table = "".join(f"| {name} | {' | '.join(show(c) for c in columns)} |\n" for name, show in rows.items())
    assert table in TEXT, f"the README's table of presets should be\n\n{table}"


def latent(config: Config) -> str:
    model = config.world_model
    if model.latent == "auto":
        return "distribution of each entry's change"
    gradient = {"straight_through": "straight-through", "gumbel": "Gumbel-softmax"}[model.latent_gradient]
    return f"{model.groups} × {model.classes} categorical, {gradient}"


def starts(config: Config) -> str:
    if config.agents.horizon is None:
        return "16 × 512, 12 × 768 or 8 × 1,024"
    return f"{config.agents.horizon} × {config.agents.starts}"


def test_public_names_exist() -> None:
    for name in codream.__all__:
        assert getattr(codream, name) is not None
    assert dataclasses.is_dataclass(codream.Config)
    for name in re.findall(r"codream\.([a-z_]+)\(", TEXT):
        assert name in codream.__all__, name
