"""A report holds what was promised, is one file, and makes the best of whatever state a run is in."""

import json
import os
import re
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scenes import TAG, episode_of, lines, measured, run_folder, with_measures

import codream
from codream import ConfigError, CrossPlay, Run, RunError, cli, load, trainer
from codream.envs import EnvSpec
from codream.envs.actions import action_names
from codream.model_quality import _functions
from codream.report.animation import scene_of
from codream.report.charts import _numbers, agent_styles, palette
from codream.report.dreams import _dreamer
from codream.report.panels import training_panels
from codream.report.sections import horizon
from codream.runs import replace_text

TITLES = (
    "Episode returns",
    "World model: total loss",
    "Teammate loss",
    "World model: loss by part",
    "Actor loss",
    "Critic loss",
    "Mean imagined reward",
    "Mean value",
    "Cumulative reward",
)


class Checker(HTMLParser):
    """Every element that is opened is closed, in order; remembers what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "action", "srcset") and value and not value.startswith(("data:", "#")):
                self.fetched.append(value)
        if tag not in ("meta", "link", "br", "input", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(path: Path) -> str:
    """The text of a report that is well formed and fetches nothing."""
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.fetched == []
    assert "http" not in re.sub(r'"http://www\.w3\.org/2000/svg"', "", text)
    return text


def test_a_run_that_was_measured(tmp_path: Path) -> None:
    run = with_measures(run_folder(tmp_path / "tag"), measured())
    text = checked(codream.report(run, quick=True))
    for title in TITLES:
        assert f"<h3>{title}</h3>" in text
    assert "Nothing was logged" not in text
    for said in (
        "against flee agent: <b>11.0</b> per episode; acting at random gets 0.6, the scripted policy 19.0",
        "57% of the way from random to the script",
        "adversary_0 predicts",
        "Calibration",
        "world_model.hidden",
        "cpu (x86_64, 2 cores)",
        "3:00 min",
        "adversary (3 agents, the same values)",
        "as <b>adversary_0</b> imagined it",
    ):
        assert said in text, said
    assert 'id="scenes"' in text


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run")
    before = codream.report(run, quick=True).read_bytes()

    def full(file: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("codream.runs.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        codream.report(run, quick=True)
    assert (run.path / "report.html").read_bytes() == before


def test_what_is_a_link_or_no_file_is_written_through(tmp_path: Path) -> None:
    """As /dev/stdout is, which must not become a file."""
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    replace_text(link, "a result")
    assert (link.is_symlink(), file.read_text()) == (True, "a result")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace_text(pipe, "another")
    assert (os.read(reader, 99), pipe.is_fifo()) == (b"another", True)
    os.close(reader)


def test_two_may_write_one_file_at_the_same_time(tmp_path: Path) -> None:
    texts = ["one " * 9_999, "other " * 9_999]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda text: [replace_text(tmp_path / "page", text) for _ in range(40)], texts))
    assert (tmp_path / "page").read_text() in texts
    assert [file.name for file in tmp_path.iterdir()] == ["page"]


def test_where_nothing_moved_there_is_nothing_to_compare_with() -> None:
    model = {"by_horizon": [0.1, 0.2], "still_by_horizon": [0.0, 0.0], "episodes": 2, "play": "trained play"}
    shown = horizon(defaultdict(lambda: None, model))
    assert "Nothing moved in these episodes" in shown
    assert "nan" not in shown


def test_the_panels_in_the_specs_order() -> None:
    panels = training_panels(lines(TAG.agents), TAG.agents, TAG.sides, TAG.num_actions)
    assert tuple(panel.title for panel in panels) == TITLES
    assert all(panel.svg.startswith("<svg") for panel in panels)
    drawn = re.search(r'data-chart="([^"]*)"', panels[-1].svg)
    assert drawn is not None
    summed = json.loads(drawn[1].replace("&quot;", '"'))["lines"][0]["y"]
    expected = sum(16 * line["episode/return/adversary_0"] for line in lines(TAG.agents))
    assert summed[-1] == pytest.approx(expected, rel=1e-4)
    assert "guessing" in panels[2].svg
    assert "dashed line" not in training_panels(lines(TAG.agents), TAG.agents, TAG.sides)[2].sentence


def test_a_learner_that_reports_do_not_know_is_told_what_is_missing(host_run: Run) -> None:
    with pytest.raises(ConfigError, match=r"algo=mine is not in codream\.report\.panels\..*, which has matwm"):
        training_panels(lines(TAG.agents), TAG.agents, TAG.sides, algo="mine")
    agents = load(host_run)
    agents.state = SimpleNamespace(spec=agents.spec)
    for known, place in ((_dreamer, "dreams._dreamer"), (_functions, "model_quality._functions")):
        with pytest.raises(ConfigError, match=f"{place}, which knows"):
            known(agents)


def test_a_loss_over_many_magnitudes_is_drawn_on_a_logarithmic_axis() -> None:
    wide = [line | {"world_model/loss": 20_000 * 0.8**k} for k, line in enumerate(lines(TAG.agents))]
    for metrics, log in ((wide, True), (lines(TAG.agents), False)):
        panel = training_panels(metrics, TAG.agents, TAG.sides)[1]
        assert ("logarithmic axis" in panel.sentence) == log
        assert ("loss (log scale)" in panel.svg) == log


@pytest.mark.parametrize("written", ["nothing", "empty", "half"])
def test_whatever_state_the_metrics_are_in(written: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    file = run.path / "metrics.jsonl"
    if written == "nothing":
        file.unlink()
    else:
        file.write_text("" if written == "empty" else file.read_text() + '{"steps": 25000, "world_model/lo')
    text = checked(codream.report(run, progress=False))  # there is no checkpoint to play with either
    assert "has no checkpoint yet" in text
    assert {
        "nothing": "there is no metrics.jsonl",
        "empty": "metrics.jsonl is empty",
        "half": "1 line(s) of metrics.jsonl could not be read",
    }[written] in text
    assert ("Nothing was logged for this yet" in text) == (written != "half")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        codream.report(tmp_path)
    with pytest.raises(RunError, match="is not a run"):
        codream.report(tmp_path.name, root=tmp_path.parent)


def test_only_a_last_line_may_be_cut_off_where_training_goes_on(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    file = run.path / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"steps": 25000, "world_model/lo')
    assert len(run.metrics()) == len(lines(TAG.agents))
    file.write_text('{"steps": 2' + "\n" + whole)
    with pytest.raises(RunError, match=r"line 1 of .*metrics\.jsonl cannot be read .*remove it to go on"):
        run.metrics()


@pytest.mark.parametrize(
    ("ticks", "wanted"),
    [
        ([1e-4, 1.25e-4, 1.5e-4, 2e-4], ["1e-4", "1.25e-4", "1.5e-4", "2e-4"]),
        ([0.0, 5e-4, 1e-3], ["0", "5e-4", "0.001"]),
        ([5_000_000, 5_000_002, 5_000_004], ["5M", "5.000002M", "5.000004M"]),
        ([0, 10_000, 20_000], ["0", "10k", "20k"]),
        ([1000, 1000.5], ["1,000", "1,000.5"]),
        ([1e-3, 1.0, 1e3], ["0.001", "1", "1,000"]),
        ([-2.5, 0, 2.5], ["-2.5", "0", "2.5"]),
        ([7.0], ["7"]),
    ],
)
def test_ticks_have_the_digits_that_tell_them_apart(ticks: list[float], wanted: list[str]) -> None:
    assert _numbers(ticks) == wanted


def test_many_agents_and_sides_are_drawn_differently() -> None:
    drawn = {(style[0], style[1]) for style in _drawn({"one": range(16)}).values()}
    assert len(drawn) == 16
    assert len(set(_drawn({f"side{k}": [k] for k in range(16)}).values())) == 16


def _drawn(sides: dict[str, Any]) -> dict[int, tuple[str, str]]:
    """Of each agent its colour and its dashes."""
    colours = dict(rule.split(":") for rule in palette(sides, 0).split(";"))
    return {i: (colours[colour[4:-1]], dashes) for i, (colour, dashes) in agent_styles(sides).items()}


def test_names_are_escaped(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a<b>&c", name="x<script>alert(1)</script>")
    text = checked(codream.report(run, quick=True))
    assert "<script>alert" not in text


def test_social_outcomes_are_shown_where_there_are_any(tmp_path: Path) -> None:
    found = measured()
    assert "Social outcomes" not in checked(
        codream.report(with_measures(run_folder(tmp_path / "without"), found), quick=True)
    )
    cooperation = {"agent_0": [0.6, None], "all": [0.5, 0.02]}
    outcomes = {"efficiency": [12.5, 1.0], "equality": [0.9, 0.01], "sustainability": None, "cooperation": cooperation}
    found["cross_play"]["social"] = outcomes
    text = checked(codream.report(with_measures(run_folder(tmp_path / "with"), found), quick=True))
    assert "Social outcomes" in text
    assert "12.50<small> ± 1.00</small>" in text
    assert "0.90<small> ± 0.01</small>" in text
    assert "agent_0: 0.60<br>all: 0.50<small> ± 0.02</small>" in text
    assert "sustainability" not in text


@pytest.mark.parametrize(
    "spec",
    [
        EnvSpec("own", ("a_0", "b_0"), ((3,), (60,)), (2, 3)),
        EnvSpec("images", ("a_0", "b_0"), ((16, 16, 3),) * 2, (3, 3)),
        EnvSpec("mpe2:simple_spread_v3", ("agent_0", "agent_1"), ((14,),) * 2, (5, 5)),
        EnvSpec("jaxmarl:MPE_simple_v3", ("agent_0",), ((4,),), (5,)),
    ],
    ids=lambda spec: spec.name,
)
def test_dreams_of_vectors_images_and_planes(spec: EnvSpec, tmp_path: Path) -> None:
    found: dict[str, Any] = measured(spec, baselines=[]) if len(spec.sides) == 2 else alone(spec)
    run = run_folder(tmp_path / "run")
    about = json.loads((run.path / "run.json").read_text())
    about["environment"] |= {"name": spec.name, "agents": list(spec.agents)}
    (run.path / "run.json").write_text(json.dumps(about))
    text = checked(codream.report(with_measures(run, found), quick=True))
    kind = {"own": "curves", "images": "image"}.get(spec.name, "plane")
    assert f'"kind":"{kind}"' in text
    assert ("data:image/png" in text) == (kind == "image")


def alone(spec: EnvSpec) -> dict[str, Any]:
    """Measurements of a game with one side."""
    found: dict[str, Any] = measured()
    returns = dict.fromkeys(spec.agents, 3.0)
    row = {"sides": {"agent": "self"}, "returns": returns, "stderr": dict.fromkeys(spec.agents, None)}
    row["side_stderr"] = {"agent": None}
    random = row | {"sides": {"agent": "random"}, "returns": dict.fromkeys(spec.agents, 1.0)}
    found |= {"sides": {"agent": list(range(spec.num_agents))}, "agents": list(spec.agents)}
    found |= {"actions": action_names(spec), "num_actions": list(spec.num_actions)}
    found["scenes"] = [scene_of(episode_of(spec), spec)]
    found["cross_play"] |= {"members": {"agent": list(spec.agents)}, "rows": [row, random]}
    found["baselines"] = [{"sides": {"agent": "random"}, "returns": {"agent": 1.0}, "stderr": {"agent": 0.1}}]
    found["model"]["foresight"] = None
    return found


def test_training_ends_well_even_if_nothing_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the pen is broken")

    monkeypatch.setattr(trainer, "report", fail)
    run = run_folder(tmp_path / "run")
    with pytest.warns(RuntimeWarning, match=r"could not be drawn \(OSError: the pen is broken\)"):
        trainer._draw(run)
    monkeypatch.setattr(cli, "report", fail)
    cli._report_after(run, CrossPlay("tag", None, "run", 1, 1, 1, False, "cpu", 1.0, {}, []), None)
    assert f"Try again: codream report {run.path}" in capsys.readouterr().err


def test_a_whole_report_of_a_trained_run(host_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Cumulative reward" in checked(host_run.path / "report.html")  # written at the end of training
    assert list((host_run.path / "tensorboard").glob("events.out.tfevents.*"))
    shutil.copytree(host_run.path, tmp_path / "mine")
    assert cli.main(["report", "mine", "--root", str(tmp_path), "--episodes", "3"]) == 0
    assert f"Written to {tmp_path / 'mine' / 'report.html'}" in capsys.readouterr().out
    text = checked(tmp_path / "mine" / "report.html")
    for part in ("cross-play", "dream", "horizon", "foresight", "about"):
        assert f'<section id="{part}">' in text
    found = json.loads((tmp_path / "mine" / "measured.json").read_text())
    assert found["scenes"][0]["kind"] == "plane"
    assert len(found["scenes"][0]["views"]) == 4
    again = checked(codream.report(tmp_path / "mine", quick=True))
    assert again == text
