"""One run in two processes, each with simulated devices of its own: they agree, and it is the run of one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_same, timeless

from codream import ConfigError, Run, checkpoint, cli, hosts, retention

AGREE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from codream import hosts
from codream.mesh import placed

process = int(sys.argv[2])
hosts.join(f"localhost:{sys.argv[1]}", 2, process)
assert (hosts.number(), hosts.is_first()) == (2, process == 0)
assert hosts.most(process, 7 - process, 3) == (1, 7, 3)

# What is no array is each process's own; arrays come bit by bit, keys as keys.
tree = {"x": np.asarray([-0.0, np.nan, process], np.float32), "flag": np.asarray(process == 0), "own": process,
        "key": jax.random.key(process), "none": np.zeros((0, 2), np.int32)}
got = hosts.from_first(lambda: tree, jax.eval_shape(lambda: {**tree, "own": 0}) | {"own": process})
assert got["x"].tobytes() == np.asarray([-0.0, np.nan, 0], np.float32).tobytes()
assert bool(got["flag"]) and got["own"] == process and got["none"].shape == (0, 2)
assert jnp.array_equal(jax.random.key_data(got["key"]), jax.random.key_data(jax.random.key(0)))
assert hosts.text_from_first(lambda: f"runs/Löwe-{process}") == "runs/Löwe-0"
assert hosts.perhaps_from_first(lambda: None, np.zeros(2)) is None
assert hosts.perhaps_from_first(lambda: np.ones(2), np.zeros(2)).tolist() == [1, 1]

everywhere = placed(got, 4)
assert len(everywhere["x"].sharding.device_set) == 4
assert hosts.on_this(everywhere)["x"].is_fully_addressable
again = placed({"x": hosts.on_this(everywhere)["x"] + 1, "key": got["key"]}, 4)  # as episodes that were cut here
assert hosts.on_this(again)["x"][2] == 1 and len(again["key"].sharding.device_set) == 4

def fail():
    raise ZeroDivisionError("only here")

try:
    hosts.from_first(fail, np.zeros(1))
except (ZeroDivisionError, hosts.FirstHostFailed) as err:
    assert isinstance(err, ZeroDivisionError) == (process == 0)
else:
    raise AssertionError
hosts.leave()
assert float(jnp.sum(jnp.ones(3))) == 3.0
print("agreed")
"""

TRAIN = """
import sys
sys.path.insert(0, sys.argv[3])
import jax
from helpers import tiny_config
from codream import hosts, latents, train

# A new head foresees 0 as opposite bins cancel: at ±3 million, the last digit of a probability makes 0.02 of reward.
latents.value_bins.__defaults__ = (3.0,)  # to ±19, and 1e-7
port, process, _, root, env, sums, resume = sys.argv[1:]
if int(process) >= 0:
    hosts.join(f"localhost:{port}", 2, int(process))
if sums == "ordered":
    # From the first device to the last. Between processes JAX's own sum has another order in each part of an array.
    def ordered(x, axis):
        first, *others = jax.lax.all_gather(x, axis)
        for other in others:
            first = first + other
        return first

    jax.lax.psum = lambda tree, axis: jax.tree.map(lambda x: ordered(x, axis), tree)
config = tiny_config(env=env, total_steps=600, checkpoint_every=100, checkpoints_kept=10, devices=4)
try:
    train(config, root=root, peek=True, progress=False, **({"resume": f"{root}/run"} if resume else {"name": "run"}))
except KeyboardInterrupt as err:
    sys.exit(err.status)
hosts.leave()
"""


def port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def start(program: str, devices: int, *args: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    return subprocess.Popen([sys.executable, "-c", program, *args], env=env, stderr=subprocess.PIPE, text=True)


def both(program: str, *args: str) -> list[subprocess.Popen]:
    at = port()
    return [start(program, 2, at, str(process), *args) for process in range(2)]


def statuses(processes: list[subprocess.Popen]) -> list[int]:
    said = [process.communicate(timeout=900)[1] for process in processes]
    print(*said, sep="\n")  # shown where the test fails
    return [process.returncode for process in processes]


def test_two_processes_agree() -> None:
    assert statuses(both(AGREE)) == [0, 0]


def arrays(root: Path, steps: int | None = None) -> dict[str, np.ndarray]:
    return checkpoint.find(root / "run", steps).arrays()


@pytest.mark.slow
@pytest.mark.parametrize("env", ["mpe2:simple_tag_v3", "jaxmarl:simple_tag"])
def test_one_run_on_two_hosts(env: str, tmp_path: Path) -> None:
    """It is the run of one process with as many devices, bit by bit where both sum in one order, else up to rounding;
    one that is killed ends the other; a signal to either lets both save and leave; and what goes on ends as if nothing
    had been."""
    here = str(Path(__file__).parent)
    alone, ordered, whole, stopped = (tmp_path / name for name in ("alone", "ordered", "whole", "stopped"))
    assert statuses([start(TRAIN, 4, "", "-1", here, str(alone), env, "ordered", "")]) == [0]
    assert statuses(both(TRAIN, here, str(ordered), env, "ordered", "")) == [0, 0]
    assert_same(arrays(ordered), arrays(alone))
    assert timeless(Run(ordered / "run")) == timeless(Run(alone / "run"))

    assert statuses(both(TRAIN, here, str(whole), env, "", "")) == [0, 0]
    once = min(retention.saved(alone / "run" / "checkpoints"))
    expected = arrays(alone, once)
    assert expected["state.world_model_updates"] == expected["state.agents_updates"] == 1
    assert_close(arrays(whole, once), expected)
    lines = list(zip(timeless(Run(whole / "run")), timeless(Run(alone / "run")), strict=True))
    assert all(found["steps"] == line["steps"] for found, line in lines)
    for found, line in lines:
        if line["steps"] <= once:
            assert found == pytest.approx(line, rel=1e-4, abs=1e-7)

    processes = both(TRAIN, here, str(stopped), env, "", "")
    wait_for(stopped, 100, processes)
    processes[1].kill()
    assert statuses(processes)[0] != 0  # after JAX has missed its heartbeat, which takes a minute or two
    processes = both(TRAIN, here, str(stopped), env, "", "resume")
    wait_for(stopped, 300, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert statuses(processes) == [128 + signal.SIGTERM] * 2
    assert statuses(both(TRAIN, here, str(stopped), env, "", "resume")) == [0, 0]
    assert_same(arrays(stopped), arrays(whole))


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal after one update but for rounding: the gradients, of which Adam keeps a tenth, and what came of them.

    Not so later: policies learn of what rounding makes, until another action is drawn and the data differ.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = 0 if value.dtype.kind != "f" else 1e-6 if ".mu" in name else 1e-5
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


def wait_for(root: Path, steps: int, processes: list[subprocess.Popen]) -> None:
    """Until a checkpoint of so many steps or more is there."""
    while max(retention.saved(root / "run" / "checkpoints"), default=0) < steps:
        assert [process.poll() for process in processes] == [None, None], statuses(processes)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--processes", "2"], "--processes and --process need --coordinator"),
        (["--coordinator", "localhost:1"], "needs --processes (how many) and --process (which this is)"),
        (
            ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
            "--process must be from 0 to 1, got 2",
        ),
        (["--coordinator", "auto", "--processes", "2"], "leave them out"),
    ],
)
def test_half_a_launch_line_is_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *options]) == 2
    assert said in capsys.readouterr().err


def test_by_oneself_everything_is_ones_own() -> None:
    assert hosts.number() == 1
    assert hosts.is_first()
    assert hosts.most(3, 1) == (3, 1)
    assert hosts.from_first(lambda: "made", "like") == "made"
    jax.numpy.zeros(1)  # computes
    with pytest.raises(ConfigError, match="cannot join the processes of --coordinator localhost:1"):
        hosts.join("localhost:1", 2, 0)
