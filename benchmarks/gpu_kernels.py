"""How many kernels a GPU starts in a step of training, found without one: XLA compiles for any it is told of.

    pip install jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX nvidia-cuda-nvcc-cu12   # JAX: the version of jax here
    python benchmarks/gpu_kernels.py [--preset paper] [--precision bfloat16] [--parts acting learning …] [--out FILE]
        [--hlo FOLDER]

Where steps are as small as those of `paper`, starting kernels takes a GPU about as long as what they compute, so their
number is what can be saved. Prints for every part how many kernels it has, those of a loop once a turn, and what memory
it needs beside its inputs. `learning` is all that a step buys, what follows it are parts of that. `--hlo` keeps the
compiled programs as text. Nothing runs, so products are not those that a GPU finds fastest by trying: where XLA splits
one, the sum of its parts is counted too. (An imagined step of `paper` at 52baade had 89 kernels in the trace of an
H200; at 33cda54 85 are counted here.) Compiling takes some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import equinox as eqx
import jax
from jax.experimental import topologies

import codream
from codream import kernels, matwm
from codream.envs import TimeStep
from codream.training import choose, driver_for, learn

KIND = "NVIDIA H200"
TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 7 }}
device_description_str: "{KIND}"
"""
"""What NVIDIA says of the card."""

NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--env", default="simple_tag")
    parser.add_argument("--parts", nargs="+", help="of: acting, learning, world model, imagination, agents")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--hlo", type=Path, help="folder for the programs as text")
    args = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # Nothing can be tried.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    config = dataclasses.replace(codream.preset(args.preset), precision=args.precision)
    env: Any = codream.make_env(args.env, num_envs=config.num_envs)
    config = config.resolve(env.spec)
    runner = driver_for(env, config).template()
    device = topologies.get_topology_desc("", "cuda", target_config=TARGET, topology="1x1x1").devices[0]
    lines = [
        f"{args.preset}, {args.env}, {args.precision}, compiled for one {KIND} by jax {jax.__version__}, not run",
        "",
        "| part | kernels | of them in loops | memory beside its inputs, MB | compiling, s |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with as_on_a_gpu():
        for name, (function, given, donated) in parts(runner, env, config).items():
            if args.parts and name not in args.parts:
                continue
            began = time.perf_counter()
            program = compiled(function, given, donated, device)
            text = program.as_text()
            if args.hlo:
                args.hlo.mkdir(parents=True, exist_ok=True)
                (args.hlo / f"{name}.hlo").write_text(text, encoding="utf-8")
            loops = [f"{turns} × {kernels}" for turns, kernels in in_loops(text)]
            memory = program.memory_analysis().temp_size_in_bytes / 1e6
            took = time.perf_counter() - began
            lines.append(f"| {name} | {total(text):,} | {', '.join(loops) or '–'} | {memory:.0f} | {took:.0f} |")
            print(lines[-1], flush=True)
            if args.out:
                args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_on_a_gpu() -> ExitStack:
    """What is traced meanwhile is what a GPU would get."""
    # Asked for the GPU that kernels are made for.
    gpu_info = importlib.import_module("jax._src.pallas.triton.gpu_info")
    info = gpu_info.get_gpu_info_from_version(gpu_info.gpu_version_from_device_kind(KIND))
    stack = ExitStack()
    for module, name, answer in (
        (jax, "default_backend", "gpu"),
        (kernels, "_ampere", True),
        (gpu_info, "get_gpu_info", info),
    ):
        stack.enter_context(mock.patch.object(module, name, return_value=answer))
    return stack


def parts(runner: Any, env: Any, config: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]]:
    """Function, shapes of its arguments, and which of them it uses up."""
    shapes = lambda function, *given: eqx.filter_eval_shape(function, *given)  # noqa: E731
    key = shapes(lambda: jax.random.key(0))
    there = shapes(lambda: TimeStep.blank(env.spec, config.num_envs))
    state, stands = runner.state, (runner.state, runner.memory, runner.here, runner.key)
    acting = partial(choose, config=config)
    learns = (state, runner.episode_return, runner.here, shapes(acting, *stands), there)
    return {
        "acting": (acting, stands, ()),
        "learning": (partial(learn, config=config, due=(1, 1)), learns, (0, 1)),
        "world model": (lambda s, key: matwm.train_world_model(s, key, config), (state, key), (0,)),
        "imagination": (lambda s, key: matwm.imagine_for_agents(s, key, config), (state, key), ()),
        "agents": (lambda s, key: matwm.train_agents(s, key, config), (state, key), (0,)),
    }


def compiled(function: Callable[..., Any], given: tuple[Any, ...], donated: tuple[int, ...], device: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(device)
    arrays, rest = eqx.partition(given, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)

    def of_arrays(*arrays: Any) -> Any:
        return eqx.filter(function(*eqx.combine(arrays, rest)), eqx.is_array)

    return jax.jit(of_arrays, donate_argnums=donated).trace(*arrays).lower(lowering_platforms=("cuda",)).compile()


Instruction = tuple[str, str]  # operation, and the whole line


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Those of a compiled program by name, and which of them it begins with."""
    found: dict[str, list[Instruction]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            name = header[2]
            found[name], entry = [], name if header[1] else entry
        elif instruction := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*)$", line):
            operation = re.match(r"\s*([a-z][\w\-]*)\(", _without_shape(instruction[1]))
            found[name].append((operation[1] if operation else "", line))
    return found, entry


def _without_shape(text: str) -> str:
    """What follows the type, which may be a tuple."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and not depth:
            return text[i:]
    return text


def in_loops(text: str) -> list[tuple[int, int]]:
    """Turns and kernels a turn of every loop."""
    return [(turns, sum(_kernels(found, body))) for found, body, turns in _loops(*computations(text))]


def total(text: str) -> int:
    """Kernels of a program, those of loops once a turn."""
    return sum(_kernels(*computations(text)))


def _loops(found: dict[str, list[Instruction]], name: str) -> Iterator[tuple[Any, str, int]]:
    for operation, line in found[name]:
        if operation == "while":
            yield found, _named("body", line), _turns(line)
        elif operation == "call":
            yield from _loops(found, _named("to_apply", line))


def _kernels(found: dict[str, list[Instruction]], name: str) -> Iterator[int]:
    for operation, line in found[name]:
        if operation == "while":
            yield _turns(line) * sum(_kernels(found, _named("body", line)))
        elif operation == "call":
            yield from _kernels(found, _named("to_apply", line))
        elif operation == "conditional":
            branches = re.findall(r"%?([\w.\-]+)", re.search(r"branch_computations=\{([^}]*)\}", line)[1])  # pyright: ignore
            yield max(sum(_kernels(found, branch)) for branch in branches)
        elif operation not in NO_KERNEL and not operation.endswith("-done"):
            yield 1


def _turns(line: str) -> int:
    """1 where the number is known only when it runs."""
    turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    return int(turns[1]) if turns else 1


def _named(attribute: str, line: str) -> str:
    found = re.search(rf"{attribute}=%?([\w.\-]+)", line)
    assert found is not None, line
    return found[1]


if __name__ == "__main__":
    main()
