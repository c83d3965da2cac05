"""The command line, in this process: what it does, what it prints, and its exit status."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import arrays, assert_same, copy_until, ppo_config, tiny_config
from PIL import Image

from codream import Config, EnvironmentFailure, Run, TrainingDiverged, cli, preset


def flags(config: Config) -> list[str]:
    """The options that make `config` from the preset it names."""
    given: list[str] = []

    def compare(base: Any, wanted: Any, path: str) -> None:
        for field in dataclasses.fields(base):
            before, after = getattr(base, field.name), getattr(wanted, field.name)
            if dataclasses.is_dataclass(after):
                compare(before, after, f"{path}{field.name}.")
            elif before != after:
                given.extend([f"--{path}{field.name}".replace("_", "-"), str(after)])

    compare(preset(config.preset), config, "")
    return given


def test_train_and_evaluate(
    host_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *flags(tiny_config()), "--name", "mine", "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "train: 400/400 steps" in out
    assert "adversary ↓  agent →" in out
    assert "The run lies in runs/mine" in out
    run = Run(tmp_path / "runs" / "mine")
    assert run.config == host_run.config
    assert_same(arrays(run), arrays(host_run))

    assert (
        cli.main(["evaluate", "mine", "--episodes", "3", "--against", "flee", "runs/mine", "--json", "out/x.json"]) == 0
    )
    assert "Written to out/x.json" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "x.json").read_text())
    assert [row["sides"]["agent"] for row in written["rows"]] == ["self", "flee", "runs/mine", "self"]

    assert cli.main(["train", "--resume", "runs/mine"]) == 2
    assert "reached its total of 400 steps" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "mine", "--total-steps", "500", "--episodes", "0"]) == 0
    assert run.config.total_steps == 500
    assert "↓" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--preset", "smal"], "unknown preset 'smal'; presets: small, "),
        (
            ["train", "--env", "simple_tga"],
            "no environment is called 'simple_tga'; the nearest: mpe2:simple_tag_v3",
        ),
        (["train", "--env", "butterfly:pistonbal"], "the nearest: butterfly:pistonball"),
        (["train", "--world-model.lr", "3"], "world_model.lr must be 0 to 1, got 3.0"),
        (["train", "--world-model.hidden", "30"], "must be a multiple of"),
        (["train", "--resume", "nothing"], "the run nothing does not exist; runs in runs/: none"),
        (["train", "--checkpoint", "5"], "--checkpoint needs --resume"),
        (
            ["train", "--preset", "ippo", "--algo", "matwm"],
            "preset ippo is one of algo=wm_rnd; for algo=matwm use paper",
        ),
        (["train", "--name", "../elsewhere"], "a run's name is that of a folder in runs/"),
        (["train", "--env-kwargs", "7"], "expects a JSON object"),
        (["train", "--env-kwargs", "{"], "expects a JSON object"),
        (["train", "--env-kwargs", '{"max_cycle": 5}'], "cannot be used"),
        (["train", "--env", "simple_tag", "--env-kwargs", '{"continuous_actions": true}'], "only Discrete"),
        (["train", "--ppo.lr", "1e-4"], "ppo.lr=0.0001 was asked for, but algo=matwm does not read it"),
        (
            ["train", "--preset", "ippo", "--agents.lr", "1e-4"],
            "agents.lr=0.0001 was asked for, but algo=wm_rnd does not read it",
        ),
        (["train", "--env-from", "helpers:Tov"], "helpers.py has no Tov; the nearest: Toy"),
        (["train", "--env-from", "helpers:np"], "expected an environment's name, a PettingZoo environment"),
        (["train", "--env", "helpers:Toy"], "One of your own: --env-from MODULE:NAME"),
        (["train", "--episodes", "-1"], "--episodes must be 0 (no table) or more, got -1"),
        (["inspect", "--run", "nothing", "--num-envs", "3"], "give no other options with it"),
        (["compare", "nothing", "--episodes", "0"], "with quick (--quick) no matches are played"),
        (
            ["train", "--env", "mpe2:simple_spread_v3", "--env-kwargs", '{"local_ratio": 2}'],
            "the environment mpe2:simple_spread_v3 with {'local_ratio': 2} cannot be used: AssertionError",
        ),
        (
            ["train", "--env", "jaxmarl:overcooked", "--env-kwargs", '{"layout": "ring"}'],
            "overcooked has the layouts cramped_room",
        ),
        (["evaluate", "nothing"], "the run nothing does not exist"),
        (["evaluate", "nothing", "--json", "."], "expected a file that can be written, got .: it is a folder"),
        (["compare", "nothing", "--out", "."], "expected a file that can be written, got .: it is a folder"),
    ],
)
def test_wrong_requests_get_one_clear_message(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--world-model.lrr", "3"], "--world-model.lr FLOAT"),
        (["trian"], "Available subcommands: train, sweep, evaluate"),
        (["train", "--preset"], "Missing value for argument '--preset'"),
        (["train", "--seed", "one"], "--seed"),
        (["evaluate"], "required"),
    ],
)
def test_unknown_options_name_the_nearest(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def test_an_environment_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["--env-from", "helpers:Toy"]
    train = ["train", "--preset", "ippo", *flags(ppo_config()), "--episodes", "2"]
    assert cli.main([*train, *own, "--env-kwargs", '{"length": 4}', "--name", "a"]) == 0
    assert "codream evaluate runs/a --env-from helpers:Toy" in capsys.readouterr().out
    run = Run(tmp_path / "runs" / "a")
    assert run.config.env == "toy"
    assert "toy (helpers:Toy)" in (run.path / "report.html").read_text(encoding="utf-8")
    assert cli.main(["evaluate", "a", "--episodes", "2", *own]) == 0
    assert 'toy with {"length": 4}, cpu' in " ".join(capsys.readouterr().out.split())
    longer = ["--env-kwargs", '{"length": 9}']
    assert cli.main(["evaluate", "a", "--episodes", "2", *own, *longer, "--json", "longer.json"]) == 0
    assert json.loads((tmp_path / "longer.json").read_text())["env_kwargs"] == {"length": 9}
    assert cli.main(["report", "a", "--quick", *own]) == 0
    pictures = []
    for keywords in ([], longer):
        assert cli.main(["watch", "a", "--episodes", "1", "--no-dream", *own, *keywords]) == 0
        with Image.open(run.path / "watch.gif") as film:
            pictures.append(film.n_frames)
    assert pictures[1] == pictures[0] + 9 - 4
    assert cli.main([*train, *own, "--env-kwargs", '{"length": 4}', "--seed", "1", "--name", "b"]) == 0
    assert cli.main(["compare", "a", "b", "--episodes", "2", *own]) == 0
    assert "no matches were played" not in (tmp_path / "compare.html").read_text(encoding="utf-8")
    capsys.readouterr()

    # A run's files never say what to import, so it has to be told each time; each time it says how.
    on = ["train", "--resume", "a", "--total-steps", "300", "--episodes", "0"]
    for command in (["evaluate", "a"], ["report", "a"], ["watch", "a"], on):
        assert cli.main(command) == 2
        assert "on the command line --env-from helpers:Toy, in Python env=…" in capsys.readouterr().err
    assert cli.main(["inspect", "--run", "a"]) == 0  # whose checkpoint says all that is asked for
    assert "cat_0" in capsys.readouterr().out
    assert cli.main([*on, *own]) == 0
    assert run.config.total_steps == 300
    # The same environment, found elsewhere: from now on there.
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "moved_toy.py").write_text("import functools\nimport helpers\nsame = functools.partial(helpers.Toy)\n")
    assert cli.main([*on, "--env-from", "moved_toy:same"]) == 2
    assert f"codream train --resume {run.path.relative_to(tmp_path)} --env-from moved_toy:same --total-steps " in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EnvironmentFailure("it broke"), 1),
        (TrainingDiverged("nan"), 1),
        (PermissionError(13, "Permission denied", "runs"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_while_running(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "train", fail)
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err == (f"codream: {error}\n" if str(error) else "")


def test_a_damaged_checkpoint(host_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_until(host_run, 400, tmp_path / "run")
    (run.checkpoints / "400" / "manifest.json").write_text("{}")
    assert cli.main(["evaluate", str(run.path)]) == 2
    assert f"codream train --resume {run.path} --checkpoint 200" in capsys.readouterr().err


def test_presets_and_runs_decide_the_defaults(host_run: Run) -> None:
    paper = cli._parse(["train", "--preset", "paper", "--world-model.layers", "3"])
    assert isinstance(paper, cli.Train)
    expected = preset("paper")
    assert paper.config == dataclasses.replace(
        expected, world_model=dataclasses.replace(expected.world_model, layers=3)
    )
    resumed = cli._parse(["train", "--total-steps", "999", "--resume", str(host_run.path)])
    assert isinstance(resumed, cli.Train)
    assert resumed.config == dataclasses.replace(host_run.config, total_steps=999)
    ablated = cli._parse(["train", "--world-model.no-teammates", "--replay.uniform"])
    assert isinstance(ablated, cli.Train)
    assert not ablated.config.world_model.teammates
    assert ablated.config.replay.uniform


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_is_quick_and_complete(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert time.monotonic() - began < 10
    assert stop.value.code == 0
    out = capsys.readouterr().out
    shown = {
        "train": ["--preset", "--world-model.lr", "--agents.horizon"],
        "evaluate": ["--json", "--greedy"],
    }
    for option in shown[command]:
        assert option in out


def test_version_and_the_package_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "codream", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "codream 0.1.0\n"
