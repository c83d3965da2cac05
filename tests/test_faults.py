"""What can happen to a run: it goes on, and ends as it would have. benchmarks/chaos.py does more of it."""

import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import Toy, arrays, assert_same, copy_until, ppo_config

from codream import (
    CheckpointError,
    ConfigError,
    EnvironmentFailure,
    Run,
    RunError,
    checkpoint,
    cli,
    evaluate,
    guards,
    load,
    make_env,
    retention,
    train,
)
from codream.building import build_beside
from codream.envs import HostEnv
from codream.envs.own import apart
from codream.guards import LeaveRequests, TimeLimit
from codream.saving import MetricsFile
from codream.training import HostDriver


@pytest.fixture(scope="module")
def whole(runs: Path) -> Run:
    """A run of 144 steps that nothing happened to, with checkpoints at 48, 96 and 144."""
    return train(ppo_config(), env=Toy, name="faults-whole", root=runs, progress=False)


def at_advance(number: int, monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> None:
    """Let `do()` happen before the driver's advance of that number."""
    advance, count = HostDriver.advance, [0]

    def changed(self: HostDriver, runner: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            do()
        return advance(self, runner)

    monkeypatch.setattr(HostDriver, "advance", changed)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_leaves(
    name: str, whole: Run, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    run = copy_until(whole, 48, runs / f"faults-{name}")
    with monkeypatch.context() as patch:
        at_advance(10, patch, lambda: signal.raise_signal(number))
        with pytest.raises(KeyboardInterrupt) as stop:
            train(resume=run, env=Toy, progress=False)
    assert isinstance(stop.value, guards.Stopped)
    assert stop.value.status == 128 + number
    assert signal.getsignal(number) is before
    # The tenth step is in the middle of an episode: it was saved at the end of that.
    assert max(retention.saved(run.checkpoints)) == 72
    err = capsys.readouterr().err
    assert f"{name} after step 72. The last checkpoint is {run.checkpoints / '72'}; go on with" in err
    train(resume=run, env=Toy, progress=False)
    assert_same(arrays(run), arrays(whole))


def test_the_exit_status_says_which_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise guards.Stopped(signal.SIGTERM)

    monkeypatch.setattr(cli, "train", stopped)
    assert cli.main(["train"]) == 143


def in_a_process(code: str) -> subprocess.Popen:
    lines = "import hashlib, os, signal, sys, threading, time\nfrom codream import guards\n" + code
    return subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


FOREVER = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # in C, so that no Python code runs in this thread


def test_a_second_signal_leaves_at_once() -> None:
    code = f"with guards.LeaveRequests(print):\n    print('ready', flush=True)\n    {FOREVER}"
    process = in_a_process(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # until it is in C
    process.send_signal(signal.SIGTERM)
    time.sleep(guards.DEBOUNCE + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with LeaveRequests(print) as leave:
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert leave.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_environment_that_hangs(whole: Run, runs: Path) -> None:
    run = copy_until(whole, 48, runs / "faults-hangs")
    with pytest.raises(EnvironmentFailure) as err:
        train(ppo_config(env_time_limit=0.5), env=lambda: Toy(hangs_at=4), resume=run, progress=False)
    text = str(err.value)
    assert "step of toy did not answer within 0.5 seconds (--env-time-limit)" in text
    assert "checkpoints/48" in text
    train(ppo_config(), resume=run, env=Toy, progress=False)
    assert_same(arrays(run), arrays(whole))


def test_an_environment_that_hangs_beside_training_meets_the_limit_too() -> None:
    env = build_beside(ppo_config(env_time_limit=0.3), 1, lambda: Toy(hangs_at=2))
    assert isinstance(env, HostEnv)
    env.reset(np.zeros(1, int))
    env.step(np.zeros((1, 2), int), np.zeros(1, int))
    with pytest.raises(EnvironmentFailure, match=r"step of toy did not answer within 0\.3 seconds"):
        env.step(np.zeros((1, 2), int), np.zeros(1, int))
    env.close()
    many = build_beside(ppo_config(env_time_limit=0.3), 4, lambda: Toy(hangs_at=2))
    assert many._limit._seconds == 0.6  # type: ignore[union-attr]  # of 2 copies in training


def test_a_call_that_never_comes_back_from_c_ends_the_process() -> None:
    code = f"guards.GRACE = 0.3\nwith guards.TimeLimit(0.3, RuntimeError)('the game'):\n    {FOREVER}"
    process = in_a_process(code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "codream: the game hangs and cannot be interrupted; leaving\n"


def test_a_time_limit_leaves_others_alone() -> None:
    limit = TimeLimit(0.05, RuntimeError)
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    try:
        with limit("quick"):
            signal.raise_signal(signal.SIGALRM)  # somebody else's
        time.sleep(0.2)  # its own is not sent any more
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
    slow: list[str] = []

    def other() -> None:
        with limit("elsewhere"):
            time.sleep(0.2)
        slow.append("done")

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert slow == ["done"]
    with pytest.raises(RuntimeError, match=r"slow did not answer within 0\.05 seconds"), limit("slow"):
        time.sleep(5)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk that is nearly full, no file can grow beyond `size`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_metrics_wait_for_room(tmp_path: Path) -> None:
    told: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", told.append)
    file.add({"steps": 1})
    with largest_file(20):
        file.add({"steps": 2})
        file.add({"steps": 3})
        assert not file.flush()
        assert (tmp_path / "metrics.jsonl").read_text() == '{"steps": 1}\n'
    assert len(told) == 1
    assert "File too large" in told[0]
    file.add({"steps": 4})
    assert [line["steps"] for line in Run(tmp_path).metrics()] == [1, 2, 3, 4]
    with largest_file(20):
        file.add({"steps": 5})
        file.add({"steps": 6})
    file.rewind(5)  # the run went back
    file.add({"steps": 7})
    assert [line["steps"] for line in Run(tmp_path).metrics()] == [1, 2, 3, 4, 5, 7]


# TensorStore tells of further failed writes after Orbax has closed its event loop.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_stops_nothing(
    whole: Run, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here a small largest file stands for it; benchmarks/chaos.py fills a real one."""
    write, calls = checkpoint.write, [0]

    def no_room(*args: Any, **kwargs: Any) -> Path:
        calls[0] += 1
        if calls[0] == 1:
            with largest_file(2_000):
                return write(*args, **kwargs)
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", no_room)
        run = train(ppo_config(), env=Toy, name="faults-full", root=runs, progress=False)
    err = capsys.readouterr().err
    assert "the checkpoint of step 48 could not be written (" in err
    assert list(retention.saved(run.checkpoints)) == [96, 144]
    assert not list(run.checkpoints.glob(".*"))
    assert_same(arrays(run), arrays(whole))
    # Full until the end: that is an error, and what comes after it goes on.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(CheckpointError, match=r"training is done, but the last checkpoint, of step 192.*Make room"):
            train(ppo_config(total_steps=192), env=Toy, resume=run, progress=False)
    assert max(retention.saved(run.checkpoints)) == 144
    train(ppo_config(total_steps=192), env=Toy, resume=run, progress=False)
    assert max(retention.saved(run.checkpoints)) == 192


def test_a_removed_folder_is_made_anew(
    whole: Run, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(whole, 48, runs / "faults-removed")
    with monkeypatch.context() as patch:
        at_advance(20, patch, lambda: shutil.rmtree(run.path))
        train(resume=run, env=Toy, progress=False)
    assert "was removed; made anew" in capsys.readouterr().err
    assert (run.config, run.about) == (whole.config, whole.about)
    assert_same(arrays(run), arrays(whole))


def test_two_processes_on_one_folder(whole: Run, runs: Path) -> None:
    run = copy_until(whole, 48, runs / "faults-locked")
    mine = rf"is in use by process {os.getpid()} on .*two processes cannot train in one folder"
    with run.locked(), pytest.raises(RunError, match=mine):
        train(resume=run, env=Toy, progress=False)
    # What a killed process leaves is no lock.
    (run.path / ".lock").write_text("process 1 on elsewhere")
    with run.locked():
        pass


def test_a_folder_that_was_not_finished_is_used(runs: Path) -> None:
    """A process was killed between making the folder and writing config.json: no manual repair."""
    left = runs / "faults-unfinished"
    left.mkdir()
    (left / ".lock").touch()
    (left / "run.json").write_text("{")
    spec = HostDriver(toy(), ppo_config()).spec
    run = Run.create(ppo_config(), spec, name=left.name, root=runs, env=Toy)
    assert run.about["environment"]["by_object"]
    (left / "config.json").unlink()
    (left / "notes.txt").touch()  # somebody's own file
    with pytest.raises(RunError, match="never overwritten"):
        Run.create(ppo_config(), spec, name=left.name, root=runs, env=Toy)


def toy() -> Any:
    from codream import make_env

    return make_env(Toy, num_envs=2)


def test_a_damaged_checkpoint_is_passed_over(whole: Run, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_until(whole, 96, runs / "faults-damaged")
    rng = random.Random(0)
    file = rng.choice([file for file in (run.checkpoints / "96").rglob("*") if file.is_file()])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    train(resume=run, env=Toy, progress=False)
    err = capsys.readouterr().err
    assert f"checkpoint {run.checkpoints / '96'} is damaged: " in err
    assert "Going on from the checkpoint before it" in err
    assert_same(arrays(run), arrays(whole))


def test_the_clock_may_jump(whole: Run, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rng = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: clock() + rng.choice([-1e7, 0.0, 1e7]))
    run = train(ppo_config(), env=Toy, name="faults-clock", root=runs, progress=False)
    seconds = [line["seconds"] for line in run.metrics()]
    assert seconds == sorted(seconds)
    assert 0 <= seconds[-1] < 3_600
    assert_same(arrays(run), arrays(whole))


def test_checkpoints_are_written_meanwhile(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, goes_on = checkpoint.write, threading.Event()

    def waits(*args: Any, **kwargs: Any) -> Path:
        assert goes_on.wait(60), "training waited for the checkpoint"
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", waits)
    at_advance(34, monkeypatch, goes_on.set)  # the first checkpoint is due after 28
    run = train(ppo_config(), env=Toy, name="faults-meanwhile", root=runs, progress=False)
    lines = run.metrics()
    assert [line["steps"] for line in lines if "checkpoint/stall_seconds" in line] == [72, 120]
    assert all(np.isfinite(x) for line in lines for x in line.values())


def test_a_checkpoint_whose_score_cannot_be_played_is_written_without(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("the cat is out")

    monkeypatch.setattr("codream.scoring.play", broken)
    run = train(ppo_config(total_steps=48, checkpoints_best="cat:self"), env=Toy, name="faults-unscored", root=runs)
    assert list(retention.saved(run.checkpoints)) == [48]
    assert "the checkpoint of step 48 has no score" in capsys.readouterr().out


def test_scores_are_not_played_on_the_environment_that_is_trained_on(runs: Path) -> None:
    made: Any = make_env(Toy, 2)
    ours = SimpleNamespace(
        spec=made.spec, num_envs=2, reset=made.reset, step=made.step, close=made.close
    )  # our interface, and nothing that says how to make another
    with pytest.raises(ConfigError, match="already made, so that there is no other"):
        train(ppo_config(checkpoints_best="cat:self"), env=ours, name="faults-made", root=runs, progress=False)


def test_what_is_not_deleted_is_written_all_the_same(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def held(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(retention, "delete", held)
    run = train(ppo_config(total_steps=96, checkpoints_kept=1), env=Toy, name="faults-undeleted", root=runs)
    assert list(retention.saved(run.checkpoints)) == [48, 96]
    assert "no longer kept could not be deleted" in capsys.readouterr().out


def test_a_folder_that_has_no_locks_can_be_trained_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("codream.runs.fcntl.flock", none)
    with (
        pytest.warns(RuntimeWarning, match="cannot be locked .*see to it that no other process"),
        Run(tmp_path).locked(),
    ):
        pass


def test_playing_beside_training_leaves_the_given_environment_alone(runs: Path) -> None:
    """Of an environment that is an object, everyone else plays on copies."""
    mine = Toy()
    beside = apart(mine)
    assert {type(one) for one in (beside(), beside())} == {Toy}
    assert beside() is not beside() is not mine
    run = train(ppo_config(total_steps=48, num_envs=1), env=mine, name="faults-mine", root=runs, progress=False)
    mine.reset(seed=3)
    agents = load(run, env=mine)
    evaluate(agents, episodes=2, progress=False)
    assert (mine.taken, mine.agents) == (0, Toy.possible_agents)
    with_copies = make_env(mine, 1)
    again = build_beside(ppo_config(), 2, apart(with_copies))
    mine.reset(seed=3)
    again.reset(np.zeros(2, int))
    again.close()  # type: ignore[union-attr]
    assert (mine.taken, mine.agents) == (0, Toy.possible_agents)
    with pytest.raises(TypeError, match=r"keywords .* need a maker, but Toy is an instance"):
        make_env(apart(with_copies), 1, render_mode="rgb_array")
    assert make_env(apart(make_env(Toy, 1)), 1, length=3).spec == again.spec


def test_checkpoints_are_kept_by_policy(runs: Path) -> None:
    config = ppo_config(
        total_steps=240, checkpoints_kept=1, checkpoints_nth=2, checkpoints_best="cat:self", checkpoints_best_episodes=4
    )
    run = train(config, env=Toy, name="faults-policy", root=runs, progress=False)
    kept = retention.saved(run.checkpoints)
    scores = {line["steps"]: line["checkpoint/score"] for line in run.metrics() if "checkpoint/score" in line}
    best = checkpoint.find(run.path, "best")
    assert set(kept) == {96, 192, 240, best.steps}
    assert best.manifest.score["cat:self"] >= max(scores.values())
    run.rewind(dataclasses.replace(config, checkpoints_best="cat:random"), 240)  # of which there is no score yet
    assert checkpoint.find(run.path, "best").steps == best.steps
    with pytest.raises(
        ConfigError, match=r"SIDE:OPPONENT, with a side of toy \(cat, mouse\) and one of self, .*random"
    ):
        train(ppo_config(checkpoints_best="dog:flee"), env=Toy, name="faults-dog", root=runs, progress=False)
    assert not (runs / "faults-dog").exists()
