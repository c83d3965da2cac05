"""Sweeps: what they train, what they refuse, and that a trial which is killed ends as if it had not been."""

import dataclasses
import html
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import Toy, arrays, assert_same, ppo_config

import codream
from codream import Config, ConfigError, Run, RunError, cli, preset
from codream.envs.own import maker, place_of
from codream.sweeps import work
from codream.sweeps.command import SweepCommand
from codream.sweeps.design import assignments, listed, trials_of
from codream.sweeps.work import Task, _measured, carry_out

pytest.importorskip("ray", reason="needs codream[sweep]")


class Mortal(Toy):
    """Kills its process at a step of its second episode, once: while the file named in CODREAM_TEST_KILL exists."""

    episodes = 0

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        self.episodes += 1
        return super().reset(seed, options)

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        kill = Path(os.environ.get("CODREAM_TEST_KILL", "unset"))
        if self.episodes > 11 and kill.exists():
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(actions)


def test_every_combination_with_every_seed() -> None:
    trials = trials_of(
        preset("small"), seeds=2, grid={"world_model.teammates": [True, False], "agents.lr": [1e-3, 3e-4]}
    )
    assert [trial.name for trial in trials[:3]] == [
        "teammates=true,agents.lr=0.001-seed0",
        "teammates=true,agents.lr=0.001-seed1",
        "teammates=true,agents.lr=0.0003-seed0",
    ]
    assert len(trials) == 8
    last = trials[-1].config
    assert (last.world_model.teammates, last.agents.lr, last.seed) == (False, 3e-4, 1)
    assert [trial.name for trial in trials_of(preset("small"))] == ["simple_tag-small-seed0"]


def test_a_trial_knows_where_its_environment_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short_toy.py").write_text(
        "import functools, helpers\nshort = functools.partial(helpers.Toy, length=2)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = maker("short_toy:short")
    task = Task(tmp_path / "trial", ppo_config(), found, place_of(found), 0, None)
    sent = pickle.loads(pickle.dumps(task))  # as to another process
    assert place_of(sent.env) is None
    known = []
    monkeypatch.setenv("PJRT_NPROC", "1")
    monkeypatch.setattr(work, "train", lambda config, env, **how: known.append(place_of(env)))
    carry_out(sent, 1, None)
    assert known == ["short_toy:short"]


def test_an_environment_of_ones_own_is_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="env is varied, but an environment was given as an object"):
        codream.sweep(ppo_config(), env=Toy, grid={"env": ["simple_tag", "coin_game"]}, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_ablations_change_one_thing_each() -> None:
    ablate = {"world_model.teammates": [False], "replay.uniform": [True], "world_model.scale_actions": [True]}
    names = [trial.name for trial in trials_of(preset("small"), ablate=ablate)]
    # The last one is what `small` has anyway, so it is not trained twice.
    assert names == ["simple_tag-small-seed0", "teammates=false-seed0", "uniform=true-seed0"]


def test_presets_can_be_swept_and_keep_what_was_changed() -> None:
    base = dataclasses.replace(preset("ippo"), total_steps=1_000)
    one, other = trials_of(base, grid={"preset": ["ippo", "ippo_common"]})
    assert other.config == dataclasses.replace(preset("ippo_common"), total_steps=1_000)
    assert (one.name, other.name) == ("preset=ippo-seed0", "preset=ippo_common-seed0")


def test_presets_that_are_swept_play_the_same_game_for_as_long_as_was_asked() -> None:
    """Also where what was asked for is what the first preset has anyway."""
    one, other = trials_of(preset("small"), grid={"preset": ["small", "ippo"]}, keep=["total_steps"])
    assert (one.config.env, one.config.total_steps) == ("simple_tag", 50_000)
    assert (other.config.env, other.config.total_steps) == ("simple_tag", 50_000)
    assert len(trials_of(codream.Config(), grid={"preset": ["small", "ippo"]})) == 2
    (typed,) = trials_of(preset("small"), grid={"preset": ["ippo"]}, keep=["algo"])  # what the preset itself says
    assert typed.config.algo == "wm_rnd"
    # What only one of the learners reads is that one's.
    base = dataclasses.replace(preset("small"), agents=dataclasses.replace(preset("small").agents, lr=5e-4))
    one, other = trials_of(base, grid={"preset": ["small", "ippo"]})
    assert (one.config.agents.lr, other.config.agents) == (5e-4, preset("ippo").agents)
    command = cli._parse(
        ["sweep", "--total-steps", "50000", "--world-model.no-teammates", "--grid", "preset=small,ippo"]
    )
    assert isinstance(command, SweepCommand)
    assert command.typed == ("total_steps", "world_model.teammates")


def test_searches_draw_within_their_ranges_and_more_samples_begin_with_the_same() -> None:
    search = {
        "agents.entropy": "log:1e-4:1e-2",
        "agents.gamma": "uniform:0.9:0.99",
        "agents.horizon": "int:3:5",
        "imagined_partners": "choice:implicit,predicted",
    }
    ten, twenty = (trials_of(preset("small"), search=search, samples=n) for n in (10, 20))
    assert ten == twenty[:10]
    assert len({trial.name for trial in twenty}) == 20
    for trial in twenty:
        assert 1e-4 <= trial.config.agents.entropy <= 1e-2
        assert 0.9 <= trial.config.agents.gamma <= 0.99
        assert trial.config.agents.horizon in (3, 4, 5)
        assert trial.config.imagined_partners in ("implicit", "predicted")
    assert {trial.config.agents.horizon for trial in twenty} == {3, 4, 5}
    assert trials_of(preset("small"), search={"agents.horizon": "int:3:4"}, samples=50)[2:] == []


def test_values_as_they_are_typed() -> None:
    assert listed("1e-3,2,true,none,simple_tag") == [1e-3, 2, True, None, "simple_tag"]
    assert listed('[0.1,0.2],[],{"a": [1, 2]}') == [[0.1, 0.2], [], {"a": [1, 2]}]
    assert assignments("--grid", ["world-model.lr=1,2", "seed=3"]) == {"world_model.lr": "1,2", "seed": "3"}
    (one,) = trials_of(preset("small"), grid={"world_model.near": listed("[0.1,0.2]")})
    assert one.config.world_model.near == (0.1, 0.2)
    assert one.name == "near=0.1,0.2-seed0"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--grid", "agents.lr"], "--grid expects FIELD=…, e.g. agents.lr=1e-3,3e-4, got 'agents.lr'"),
        (["--grid", "agents.lr=1", "--grid", "agents.lr=2"], "list its values: agents.lr=1,2"),
        (["--grid", "lr=1e-3"], "unknown option lr; nearest: world_model.lr, agents.lr, curiosity.lr, ppo.lr"),
        (["--grid", "agents.entrpy=1"], "unknown option agents.entrpy; nearest: agents.entropy"),
        (["--grid", "seed=1,2"], "--seeds says how many"),
        (["--grid", "total_steps=1,2"], "makes no other method"),
        (["--grid", "agents.lr=1e-3,5"], "agents.lr=5: agents.lr must be 0 to 1, got 5"),
        (["--grid", "agents.units=1.5"], "expected agents.units to be an integer, got 1.5"),
        (["--ablate", "world_model.teammates=maybe"], "to be true or false, got 'maybe'"),
        (["--grid", "agents.lr=1e-3", "--ablate", "agents.lr=1e-4"], "agents.lr is given to more than one"),
        (["--search", "agents.lr=1e-3"], "expects uniform:LOW:HIGH, log:LOW:HIGH"),
        (["--search", "agents.lr=log:0:1"], "a logarithmic range begins above 0"),
        (["--search", "agents.lr=uniform:1:1"], "from a number to a larger one"),
        (["--search", "agents.horizon=int:1:x"], "expects uniform"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--parallel", "0"], "parallel must be at least 1"),
        (["--cpus", "0"], "cpus must be above 0"),
        (["--gpus", "1.5"], "gpus must be a part of one or a whole number"),
        (["--env", "simple_tga"], "the nearest: mpe2:simple_tag_v3"),
        (["--grid", "env=simple_tag,simple_tga"], "the nearest: mpe2:simple_tag_v3"),
        (["--grid", "preset=small,smal"], "unknown preset 'smal'"),
        (["--grid", "ppo.lr=3e-3,1e-2"], "ppo.lr=0.003-seed0: ppo.lr=0.003 was asked for, but algo=matwm does not"),
        (
            ["--preset", "ippo", "--ablate", "world_model.scale_actions=false"],
            "scale_actions=false-seed0: world_model.scale_actions=False was asked for, but algo=wm_rnd does not",
        ),
        (["--grid", "checkpoints_best=cat:flee"], "is nothing to sweep over"),
        (["--checkpoints-best", "cat:flee"], "simple_tag-small-seed0: checkpoints_best is SIDE:OPPONENT"),
        (
            ["--grid", "world_model.teammates=true,false", "--imagined-partners", "predicted"],
            "teammates=false: imagined_partners=predicted needs the predictor",
        ),
    ],
)
def test_wrong_designs_are_refused_before_anything_starts(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(codream.sweeps.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["sweep"]) == 2
    assert capsys.readouterr().err == 'codream: Ray is not installed; type: pip install "codream[sweep]"\n'


def test_a_cluster_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", "--preset", "ippo", "--address", "localhost:1"]) == 2
    assert "Ray cannot be reached at 'localhost:1'" in capsys.readouterr().err


def config(**changes: Any) -> Config:
    return ppo_config(total_steps=144, **changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[codream.Sweep, dict[str, Any], Path]:
    """Two combinations with one seed each on this machine, one of them killed once; and the options, and its folder."""
    root = tmp_path_factory.mktemp("sweep")
    kill = root / "kill"
    kill.touch()
    options = {"env": Mortal, "name": "s", "seeds": 1, "grid": {"ppo.lr": [1e-3, 3e-3]}, "root": root, "episodes": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("CODREAM_TEST_KILL", str(kill))
        patch.setenv("RAY_worker_niceness", "0")  # beside other tests it would wait for them
        result = codream.sweep(config(), **options, parallel=2, progress=False)
    assert not kill.exists()
    return result, options, root


def test_a_killed_trial_ends_as_if_it_had_not_been(swept: tuple[codream.Sweep, dict[str, Any], Path]) -> None:
    result, _, root = swept
    assert result.failed == {}
    assert [run.path.name for run in result.runs] == ["ppo.lr=0.001-seed0", "ppo.lr=0.003-seed0"]
    told = json.loads((result.path / "sweep.json").read_text())
    assert sorted(trial["failures"] for trial in told["trials"]) == [0, 1]
    assert [trial["values"] for trial in told["trials"]] == [{"ppo.lr": 1e-3}, {"ppo.lr": 3e-3}]
    (killed,) = (run for run, trial in zip(result.runs, told["trials"], strict=True) if trial["failures"])
    alone = codream.train(killed.config, env=Mortal, name="alone", root=root, progress=False)
    assert_same(arrays(killed), arrays(alone))


def test_results_go_into_the_comparison(swept: tuple[codream.Sweep, dict[str, Any], Path]) -> None:
    result, _, _ = swept
    assert result.page is not None
    text = result.page.read_text(encoding="utf-8")
    assert "cat against random" in text
    assert "ppo.lr=0.003-seed0" in text
    (game,) = json.loads((result.path / "sweep.json").read_text())["games"]
    assert game["conditions"].startswith("Sampled actions, 2 episodes of every pairing after ")
    assert game["conditions"] in html.unescape(text)
    assert game["conditions"] in str(result.tables[0].caption)
    assert len(game["scores"]["cat against random"]["ppo.lr=0.001-seed0"]["runs"]) == 1
    assert result.tables[0].row_count == 2
    assert [_measured(result.runs[0], episodes) for episodes in (2, 3)] == [True, False]
    again = codream.compare([result.path], out=result.path / "again.html", quick=True)  # a folder of runs
    assert again.read_text(encoding="utf-8") == text


def test_again_it_trains_nothing_and_other_options_are_refused(
    swept: tuple[codream.Sweep, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, options, _ = swept
    before = {path: path.stat().st_mtime_ns for path in result.path.glob("*/checkpoints/*")}
    monkeypatch.setitem(sys.modules, "codream.sweeps.cluster", None)  # Ray is not even started
    again = codream.sweep(config(), **options, progress=False)
    assert again.runs == result.runs
    assert {path: path.stat().st_mtime_ns for path in result.path.glob("*/checkpoints/*")} == before
    with pytest.raises(RunError, match=r"ppo.gamma was .*choose another --name"):
        codream.sweep(config(ppo=dataclasses.replace(config().ppo, gamma=0.5)), **options)
    with pytest.raises(RunError, match="trained for 144 steps and has come further than the 48"):
        codream.sweep(dataclasses.replace(config(), total_steps=48), **options, progress=False)
    with Run(result.path).locked(), pytest.raises(RunError, match="in use"):
        codream.sweep(config(), **options, progress=False)


def test_nothing_is_left_behind(swept: tuple[codream.Sweep, dict[str, Any], Path]) -> None:
    import ray

    assert not ray.is_initialized()
    listing = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    mine = [line for line in listing.splitlines() if line.split()[0] == str(os.getpid())]
    assert not [line for line in mine if "raylet" in line or "gcs_server" in line]
