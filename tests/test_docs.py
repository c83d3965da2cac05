"""The documentation builds without a warning, and what it shows can be done."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ppo_config

import codream
from codream import Run, cli
from codream.config import Config

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    inline = [found for page in PAGES for found in re.findall(r"`(codream [^`]*)`", page.read_text(encoding="utf-8"))]
    return sorted({line for line in [*lines, *inline] if line.startswith("codream ") and "--help" not in line})


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str, host_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "open", staticmethod(lambda *_: host_run))
    args = shlex.split(command)[1:]
    assert isinstance(cli._parse(args), tuple(cli._DO))


def test_options_exist() -> None:
    """Every option that the text names, e.g. `--world-model.lr`, is one."""
    fields = [field.name for command in (cli.Train, cli.SweepCommand) for field in dataclasses.fields(command)] + [
        "quick",
        "set",
    ]  # `set` is the benchmarks'
    known = {name.replace("_", "-") for name in fields} | {f"no-{name}" for name in fields}

    def collect(config: Any, path: str) -> None:
        for field in dataclasses.fields(config):
            value, name = getattr(config, field.name), f"{path}{field.name}".replace("_", "-")
            known.add(name)
            if dataclasses.is_dataclass(value):
                collect(value, f"{name}.")

    collect(Config(), "")
    for page in PAGES:
        for option in re.findall(r"`--([a-z][a-z.\-]*)", page.read_text(encoding="utf-8")):
            assert option in known, f"{page.name}: --{option}"


def test_files_that_are_named_exist() -> None:
    package = DOCS.parent / "src" / "codream"
    for page in PAGES:
        for name in re.findall(r"`((?:[a-z_]+/)?[a-z_]+\.py)`", page.read_text(encoding="utf-8")):
            assert (package / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`(tests/[a-z_/]+\.py)`", page.read_text(encoding="utf-8")):
            assert (DOCS.parent / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_code_runs(page: Path, host_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, from the top; training is that of the tests, which is short."""
    monkeypatch.chdir(tmp_path)
    train = codream.train

    def short(config: Config, **options: Any) -> Run:
        if "env" not in options:
            shutil.copytree(host_run.path, tmp_path / "runs" / "simple_tag-small-seed0")
            return Run(tmp_path / "runs" / "simple_tag-small-seed0")
        return train(ppo_config(total_steps=48), **options, progress=False)  # which compiles fastest

    report, evaluate = codream.report, codream.evaluate
    monkeypatch.setattr(codream, "train", short)
    monkeypatch.setattr(codream, "report", lambda run: report(run, quick=True))
    monkeypatch.setattr(
        codream, "evaluate", lambda agents, episodes, **more: evaluate(agents, episodes=2, progress=False, **more)
    )
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    for library in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(library, reason="needs codream[docs]", exc_type=ImportError)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "api.html").read_text(encoding="utf-8")
    results = ("evaluation.Row", "social.Social", "inspection.Layer", "accelerators.Device", "agents.Player")
    for name in (*codream.__all__, *results, "Agents.state", "Agents.make_env", "Agents.name"):
        assert f'id="codream.{name}"' in text, name
