"""Comparing runs: what is grouped, what is said, and that unlike games are kept apart."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scenes import TAG, lines, measured, run_folder, with_measures
from test_report import checked

import codream
from codream import Run, RunError, cli, statistics
from codream.report.comparison import _teams
from codream.report.entries import conditions, entry_of, methods, told_apart
from codream.report.measures import latest_measures, saved_measures
from codream.statistics import interval, iqm, summarised
from codream.sweeps.results import games_of, table


def test_seeds_of_one_configuration_are_one_curve(tmp_path: Path) -> None:
    for seed in range(3):
        with_measures(
            run_folder(tmp_path / f"tag-seed{seed}", seed=seed, metrics=lines(TAG.agents, 30 + seed)), measured()
        )
    out = tmp_path / "out" / "compare.html"
    runs = [tmp_path / f"tag-seed{seed}" for seed in range(3)]
    text = checked(codream.compare(runs, out=out, quick=True))
    assert "tag (3 seeds)" in text
    assert text.count('class="band"') == 4  # two sides, over steps and over wall-clock
    assert "adversary against flee" in text
    assert "[11.0, 11.0], 3 seeds" in text
    assert f"computed by {statistics.source()}" in text
    assert "Everyone against everyone" not in text
    assert "Sampled actions, 40 episodes of every pairing after 200 steps; mpe2:simple_tag_v3; cpu." in text


def test_measured_in_different_ways_it_is_said(tmp_path: Path) -> None:
    greedy = measured()
    greedy["cross_play"] |= {"greedy": True, "episodes": 1_000}
    found = [
        entry_of(with_measures(run_folder(tmp_path / f"tag-seed{seed}", seed=seed), how))
        for seed, how in enumerate((measured(), greedy))
    ]
    told = "Greedy and sampled actions (not to be compared), 40 to 1,000 episodes of every pairing after 200 steps; "
    assert (conditions({"tag": found}) or "").startswith(told)


def test_the_papers_own_protocol_is_one_flag_away(tmp_path: Path) -> None:
    """Median and standard deviation over seeds, in the page and in a sweep's table."""
    runs = []
    for seed, got in enumerate((10.0, 11.0, 15.0)):
        found = measured()
        found["cross_play"]["rows"][1]["returns"] = dict.fromkeys(TAG.agents, got)  # predators against fleeing prey
        runs.append(with_measures(run_folder(tmp_path / f"tag-seed{seed}", seed=seed), found))
    out = tmp_path / "compare.html"
    assert (
        cli.main(["compare", *(str(run.path) for run in runs), "--quick", "--summary", "median", "--out", str(out)])
        == 0
    )
    text = checked(out)
    assert "<b>11.0</b> <small>± 2.6, 3 seeds</small>" in text
    assert "Lines: median over seeds. Bands: one standard deviation" in text
    (game,) = games_of(runs)
    shown = io.StringIO()
    Console(file=shown, width=200).print(table(game, "median"))
    assert "11.0" in shown.getvalue()
    assert "± 2.6" in shown.getvalue()
    assert "Median over seeds, ± standard deviation" in shown.getvalue()
    assert summarised(np.array([[3.0]]), "median") == (3.0, 3.0, 3.0)


def test_two_runs_of_one_seed_are_no_two_seeds(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    groups = {name: [entry.name for entry in group] for name, group in methods([entry_of(r) for r in runs]).items()}
    assert groups == {"a": ["a", "c"], "b": ["b"]}


def test_different_games_are_told_apart(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "one"), run_folder(tmp_path / "other", name="jaxmarl:MPE_simple_tag_v3", metrics=[])]
    with (runs[0].path / "metrics.jsonl").open("a") as file:
        file.write('{"steps": 25000, "world_mo')  # it was killed
    text = checked(codream.compare(runs, out=tmp_path / "x.html", quick=True))
    assert "These runs are of 2 different games" in text
    assert "other: This run has logged no metrics yet (metrics.jsonl is empty)." in text
    assert "one: 1 line(s) of metrics.jsonl could not be read" in text
    assert "Learning curves on jaxmarl:MPE_simple_tag_v3" in text


def test_other_keywords_are_another_game_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "a" / "tag"), run_folder(tmp_path / "b" / "tag", env_kwargs={"max_cycles": 50})]
    text = checked(codream.compare(runs, out=tmp_path / "x.html", quick=True))
    assert "These runs are of 2 different games" in text
    assert "max_cycles&quot;: 50" in text
    assert [entry.name for entry in told_apart([entry_of(run) for run in runs])] == ["a/tag", "b/tag"]


def test_seeds_of_different_speed_are_one_curve_over_wall_clock(tmp_path: Path) -> None:
    """One seed compiled, the other found it compiled: their times do not even overlap."""
    slow = [line | {"seconds": line["seconds"] + 1_000} for line in lines(TAG.agents)]
    runs = [run_folder(tmp_path / "tag-seed0"), run_folder(tmp_path / "tag-seed1", seed=1, metrics=slow)]
    text = checked(codream.compare(runs, out=tmp_path / "x.html", quick=True))
    drawn = [json.loads(data.replace("&quot;", '"')) for data in re.findall(r'data-chart="([^"]*)"', text)]
    timed = [chart["lines"][0]["x"] for chart in drawn if "minutes" in chart["x_label"]]
    assert len(timed) == 2
    for x in timed:
        assert (x[0], x[-1]) == pytest.approx((503 / 60, 680 / 60), rel=1e-3)


def test_who_plays_whom() -> None:
    assert _teams({"hunter": (0, 1), "prey": (2,)}, ("hunter_0", "hunter_1", "prey_0")) == {
        "hunter": (0, 1),
        "prey": (2,),
    }
    assert _teams({"a": (0, 1)}, ("a_0", "a_1")) == {"a_0": (0,), "a_1": (1,)}
    assert _teams({"a": (0, 1, 2)}, ("a_0", "a_1", "a_2")) == {"a_0": (0,), "the others": (1, 2)}
    assert _teams({"a": (0,)}, ("a_0",)) == {}


def test_two_runs_are_needed(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "one")
    with pytest.raises(RunError, match="at least two different runs"):
        codream.compare([run, run])
    with pytest.raises(RunError, match="does not exist"):
        codream.compare([run, "nothing"])


def test_everyone_against_everyone(host_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "again").symlink_to(host_run.path)
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "run.json", "metrics.jsonl", "checkpoints"):
        (tmp_path / "copy" / name).symlink_to(host_run.path / name)
    runs = [str(host_run.path), str(tmp_path / "copy")]
    out = tmp_path / "compare.html"
    assert cli.main(["compare", *runs, "--episodes", "2", "--out", str(out)]) == 0
    assert f"Written to {out}" in capsys.readouterr().out
    text = checked(out)
    assert "Everyone against everyone" in text
    assert text.count('<td style="--skill:') == 8  # two sides, 2 × 2 matches


def test_the_interquartile_mean_leaves_out_the_ends() -> None:
    assert iqm(np.array([0.0, 1.0, 2.0, 100.0])) == pytest.approx(1.5)
    assert iqm(np.array([1.0, 2.0, 6.0])) == pytest.approx(3.0)
    low, high = interval(np.array([[1.0, 5.0], [1.0, 7.0], [1.0, 9.0]]))
    assert (low[0], high[0]) == (1.0, 1.0)
    assert 5.0 <= low[1] < 7.0 < high[1] <= 9.0
    with pytest.raises(ValueError, match="at least one run"):
        interval(np.zeros((0, 2)))


def test_the_interval_worked_out_on_paper(own_bootstrap: None) -> None:
    """Three runs have 27 equally likely draws: the lowest mean has probability 1/27, the next 3/27."""
    scores = np.array([0.0, 1.0, 2.0])
    assert interval(scores) == pytest.approx((0.0, 2.0))  # 1/27 > 2.5 %
    assert interval(scores, level=0.9) == pytest.approx((1 / 3, 5 / 3))  # 1/27 < 5 % < 4/27


@pytest.fixture
def own_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_rliable", lambda: None)


@pytest.mark.parametrize("runs", [3, 9])
def test_rliable_computes_where_it_is_installed(runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = statistics._rliable()
    if library is None:
        pytest.skip("rliable does not import here")
    assert statistics.source().startswith("rliable ")
    scores = np.random.default_rng(0).normal(size=(runs, 2))
    calls, estimate = [], library.get_interval_estimates
    monkeypatch.setattr(library, "get_interval_estimates", lambda *a, **kw: calls.append(a) or estimate(*a, **kw))
    theirs = interval(scores)
    assert len(calls) == 1
    np.testing.assert_array_equal(theirs, interval(scores))  # the same seed, the same interval
    monkeypatch.setattr(statistics, "_rliable", lambda: None)
    np.testing.assert_allclose(interval(scores), theirs, atol=0.1)
    aggregate = pytest.importorskip("rliable.metrics").aggregate_iqm
    np.testing.assert_allclose(iqm(scores), [aggregate(column) for column in scores.T])


def test_what_was_measured_of_an_earlier_checkpoint_is_no_result(tmp_path: Path) -> None:
    """Reports of a run that has gone on still show it, with its step."""
    found = measured()
    run, latest = with_measures(run_folder(tmp_path / "one"), found), found["steps"]
    assert latest_measures(run) == saved_measures(run)
    (run.checkpoints / str(latest)).mkdir(parents=True)
    assert latest_measures(run) == saved_measures(run)
    (run.checkpoints / str(latest + 1_000)).mkdir()
    assert latest_measures(run) is None
    run.rewind(run.config, latest)
    assert saved_measures(run) is not None
    run.rewind(run.config, latest - 1)
    assert saved_measures(run) is None


def test_a_game_with_three_sides_says_why_nobody_plays(tmp_path: Path) -> None:
    agents = ("cat_0", "dog_0", "mouse_0")
    runs = [run_folder(tmp_path / name, agents=agents) for name in ("one", "two")]
    text = codream.compare(runs, out=tmp_path / "c.html").read_text(encoding="utf-8")
    assert "this one has the sides cat, dog, mouse" in text
