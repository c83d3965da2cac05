"""Copies stepped by several processes: the same answers, the same errors, and nothing left behind."""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toys
from helpers import tiny_config

from codream import ConfigError, train
from codream.building import build_env
from codream.envs import EnvironmentFailure, HostEnv, make_env
from codream.envs.pettingzoo import PettingZooEnv
from codream.envs.workers import workers_for


def shared(env: Any, num_envs: int, env_workers: int, **kwargs: Any) -> PettingZooEnv:
    made = make_env(env, num_envs, env_workers=env_workers, **kwargs)
    assert isinstance(made, PettingZooEnv)
    return made


def steps(env: HostEnv, count: int) -> list[Any]:
    """Everything that the environment answers, from random actions."""
    rng = np.random.default_rng(0)
    answers = [env.reset(rng.integers(99, size=env.num_envs))]
    most = np.asarray(env.spec.num_actions)
    for _ in range(count):
        actions = rng.integers(most, size=(env.num_envs, len(most)))
        answers.append(env.step(actions, rng.integers(99, size=env.num_envs)))
    return answers


def abroad(away: str) -> Any:
    """A maker of toys that do something else in other processes than this one."""
    return functools.partial(toys.AbroadToy, os.getpid(), away)


def processes(env: PettingZooEnv) -> list[Any]:
    return [worker._process for worker in env._workers]


# ------------------------------------------------------------------------------------ the same answers


@pytest.mark.parametrize(
    "kind",
    [
        toys.IntegerToy,
        toys.MaskToy,
        toys.InfoMaskToy,
        toys.EarlyToy,
        toys.KeepsFinishedToy,
        toys.ImageToy,
        "simple_tag",
    ],
)
@pytest.mark.parametrize("workers", [2, 3])
def test_answers_do_not_depend_on_how_many_processes_step(kind: Any, workers: int) -> None:
    alone, together = shared(kind, 7, 1), shared(kind, 7, workers)
    assert alone.spec == together.spec
    for a, b in zip(steps(alone, 12), steps(together, 12), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert len(processes(together)) == workers - 1
    assert not processes(alone)
    together.close()


def test_no_more_processes_than_copies_and_an_instance_is_copied() -> None:
    env = shared(toys.Toy(), 2, 5)
    answers = steps(env, 6)
    assert len(processes(env)) == 1
    assert all(a.obs.shape == (2, 2, 2) for a in answers)
    env.close()


def test_training_is_the_same(runs: Path) -> None:
    found = []
    for n in (1, 2):
        config = tiny_config(env_workers=n, total_steps=200)
        run = train(config, name=f"workers{n}", root=runs, progress=False)
        measured = ("episode/", "world_model/", "agent/")
        found.append([{k: v for k, v in line.items() if k.startswith(measured)} for line in run.metrics()])
    assert found[0] == found[1]
    assert any(line.get("world_model/loss") for line in found[0])


# ------------------------------------------------------------------------------------ failures


def test_a_copy_that_fails_elsewhere_is_named_with_its_own_error() -> None:
    env = shared(toys.FaultyToy, 3, 3)
    env._copies.envs[0].fault = ""  # the one that is stepped here
    steps(env, 1)
    with pytest.raises(EnvironmentFailure, match=r"step of copy 1 raised at step 2 .*the engine stalled") as caught:
        env.step(np.zeros((3, 2), int), np.zeros(3, int))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    [note] = caught.value.__cause__.__notes__
    assert "In the process that steps copy 1" in note
    assert "toys.py" in note  # where it was raised
    with pytest.raises(ValueError, match="call reset before step"):
        env.step(np.zeros((3, 2), int), np.zeros(3, int))
    env.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shape", r"copy 1, step 2 .*blue_0.*expected shape \(2,\), got \(7,\)"),
        ("nan reward", "copy 1, step 2 .*reward of red_0 is not finite: nan"),
    ],
)
def test_wrong_answers_elsewhere_are_named(fault: str, message: str) -> None:
    env = shared(toys.FaultyToy, 2, 2, fault=fault)
    env._copies.envs[0].fault = ""
    steps(env, 1)
    with pytest.raises(EnvironmentFailure, match=message):
        env.step(np.zeros((2, 2), int), np.zeros(2, int))
    env.close()


def test_an_error_that_cannot_be_sent_is_told() -> None:
    env = shared(abroad("odd"), 2, 2)
    env.reset(np.zeros(2, int))
    with pytest.raises(EnvironmentFailure, match=r"copy 1 .*Odd: 1 is not 2") as caught:
        env.step(np.zeros((2, 2), int), np.zeros(2, int))
    assert "Odd: 1 is not 2" in str(caught.value.__cause__)
    env.close()


def test_a_process_that_is_gone_is_named_and_reset_begins_another() -> None:
    env = shared(toys.Toy, 5, 2)
    steps(env, 2)
    [process] = processes(env)
    process.kill()
    process.wait()
    with pytest.raises(EnvironmentFailure, match=r"toy_v0: the process that steps copies 2 to 4 has ended .*-9.*--env"):
        env.step(np.zeros((5, 2), int), np.zeros(5, int))
    assert len(steps(env, 3)) == 4
    env.close()


def test_copies_that_cannot_be_made_elsewhere() -> None:
    env = shared(abroad("not made"), 2, 2)
    with pytest.raises(EnvironmentFailure, match="copy 1 could not be made: OSError: no licence"):
        env.reset(np.zeros(2, int))
    env.close()
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"cannot be sent to another process .*lock.*env_workers=1"):
        shared(lambda: toys.Toy() if lock else None, 2, 2)
    with pytest.raises(ValueError, match="already made"):
        make_env(env, 2, env_workers=2)
    with pytest.raises(ValueError, match="env_workers: expected at least 1, got 0"):
        make_env(toys.Toy, 2, env_workers=0)
    with pytest.raises(ConfigError, match="env_workers is for environments on the host"):
        train(tiny_config(env="jaxmarl:coin_game", env_workers=2), progress=False)


def test_one_that_hangs_elsewhere_meets_the_time_limit(runs: Path) -> None:
    began = time.monotonic()
    with pytest.raises(EnvironmentFailure, match="did not answer within 2 seconds"):
        train(
            tiny_config(env_workers=2, env_time_limit=2.0), env=abroad("hangs"), name="hangs", root=runs, progress=False
        )
    assert time.monotonic() - began < 40


# ------------------------------------------------------------------------------------ the processes themselves


def test_processes_leave_with_close_or_with_their_environment_and_ignore_signals() -> None:
    env = shared(toys.Toy, 4, 2)
    steps(env, 1)
    [process] = processes(env)
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or a cluster tells every process
        os.kill(process.pid, number)
    env.step(np.zeros((4, 2), int), np.zeros(4, int))
    env.close()
    assert process.poll() == 0
    steps(env, 1)  # another one
    [process] = processes(env)
    del env
    gc.collect()
    assert process.poll() == 0


def test_what_an_environment_prints_is_in_nobodys_way_and_no_jax_is_imported(
    capfd: pytest.CaptureFixture[str],
) -> None:
    env = shared(abroad("talks"), 2, 2)
    last = steps(env, 3)[-1]
    np.testing.assert_array_equal(last.obs[:, 0], [[1, 1], [0, 0]])
    env.close()
    told = capfd.readouterr()
    assert "printed" in told.err
    assert "from C" in told.err
    assert told.out == ""


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np\n"
        "import toys\n"
        "from codream import make_env\n"
        "class Mine(toys.Toy):\n"
        "    pass\n"
        "env = make_env(Mine, 4, env_workers=2)\n"
        "print('once', env.reset(np.arange(4)).obs.shape)\n"
    )
    where = {**os.environ, "PYTHONPATH": str(Path(toys.__file__).parent)}
    ran = subprocess.run([sys.executable, str(script)], env=where, capture_output=True, text=True)
    assert ran.stdout == "once (4, 2, 2)\n", ran.stderr
    assert ran.stderr == ""


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [workers_for(copies) for copies in (1, 7, 8, 16, 100)] == [1, 1, 2, 4, 8]
    monkeypatch.setenv("PJRT_NPROC", "2")  # as a trial of a sweep has it
    assert workers_for(100) == 2


def test_only_environments_with_a_name_are_spread_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = PettingZooEnv.__init__
    monkeypatch.setattr("codream.building.workers_for", lambda copies: min(copies, 2))

    def noted(self: PettingZooEnv, *args: Any, workers: int = 1, **kwargs: Any) -> None:
        asked.append(workers)
        original(self, *args, workers=workers, **kwargs)

    monkeypatch.setattr(PettingZooEnv, "__init__", noted)
    build_env(tiny_config(), 4)
    build_env(tiny_config(), 4, toys.Toy)
    build_env(tiny_config(env_workers=3), 4, toys.Toy)
    assert asked == [2, 1, 3]
