"""`train`: a configuration in, a run folder out; or a run that goes on as if it had never stopped. `train_seeds`:
several at once."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax

from codream import retention
from codream.algorithms import algorithm
from codream.building import build_beside, build_env
from codream.config import Config, ConfigError
from codream.envs import EnvSpec, GraphEnv, HostEnv
from codream.envs.own import apart, own_copies, place_of
from codream.guards import LeaveRequests
from codream.health import TrainingDiverged
from codream.hosts import SharedEnv, is_first, number, text_from_first
from codream.live import Live, WandbMode
from codream.loop import Loop
from codream.memory import cuda_gives
from codream.presets import idle, preset, refuse_unread
from codream.progress import Bar
from codream.recording import Record, Tally
from codream.report import report
from codream.report.peek import Peek
from codream.resuming import restored
from codream.runs import Run, RunError, default_name
from codream.scoring import Scorer
from codream.together import Alone, Runs, Together
from codream.training import GraphDriver, HostDriver, driver_for

__all__ = ["TrainingDiverged", "environment_of", "named", "train", "train_seeds"]


def train(
    config: Config | str | None = None,
    *,
    env: Any = None,
    name: str | None = None,
    resume: str | Path | Run | None = None,
    checkpoint: int | None = None,
    root: str | Path = "runs",
    progress: bool = True,
    wandb: WandbMode = "off",
    peek: bool = False,
) -> Run:
    """Train in a new folder `root/name`, or go on with the run `resume`. Returns the run.

    `config`: a configuration or a preset's name, `small` if not given; when resuming, the run's own, and only the
    options in `resuming.CHANGEABLE` may differ from it. `env`: an environment as an object (see `make_env`), or another
    name, instead of the one that `config.env` names. `name`: made from environment, preset and seed if not given.
    `checkpoint`: resume from the checkpoint at this step instead of the latest; later ones are set aside. `wandb`:
    `offline` or `online` also logs to Weights & Biases. `peek`: now and then, in at most 3 % of the time, play a little
    and show the cross-play so far and an episode beside its dream in TensorBoard; what is learned is the same. At the
    end the run's report is drawn, of what training logged; `codream.report(run)` adds what only playing can show.

    Training ends when `config.total_steps` environment steps (over all copies) are done and every copy of a
    host environment has finished its episode. A resumed run then equals, number by number on the CPU, one
    that never stopped.

    SIGINT, SIGTERM and SIGHUP let it save, if an exact resume is possible within `loop.GRACE` seconds, and raise
    `Stopped` (a KeyboardInterrupt); a second one ends the process at once.

    Raises ConfigError, RunError (folder exists or is in use; change not allowed; nothing left to do), CheckpointError,
    EnvironmentFailure with the environment's own error and the last checkpoint (also where it hangs, see
    `config.env_time_limit`), TrainingDiverged where something is not finite (see `config.on_nan`).
    """
    cuda_gives()
    Live.check(wandb)
    if checkpoint is not None and resume is None:
        raise ConfigError("--checkpoint needs --resume RUN: it says from which of the run's checkpoints to go on")
    _refuse_name(name, resume)
    resumed = None if resume is None else Run.open(resume, root)
    config = config or (preset("small") if resumed is None else resumed.config)
    config, env = named(config, env)
    if resumed is not None:
        resumed.refuse_without_its_environment(env)
    request = _Request(config, name, resumed, checkpoint)
    return _trained([request], env, root, progress, wandb, peek)[0]


def train_seeds(
    config: Config | str | None = None,
    *,
    seeds: int,
    env: Any = None,
    name: str | None = None,
    resume: str | Path | Run | None = None,
    root: str | Path = "runs",
    progress: bool = True,
    peek: bool = False,
) -> list[Run]:
    """`train` with the seeds `config.seed`, `config.seed` + 1, …, as one program on an in-graph environment.

    Every seed has a run of its own, `name`-seed0 and so on, which is what `train` would make of it but for the rounding
    of products that are computed together, and can be resumed and evaluated by itself. `seconds` in its metrics are
    those of all. `resume`: the run of the first seed; those of the others are found by their names, and those that are
    complete are left as they are. `peek`: at the first seed. A seed that diverges stops, the others go on.

    Raises what `train` does; ConfigError also for a host environment, several `devices` and less than one seed.
    """
    cuda_gives()
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    _refuse_name(name, resume)
    first = None if resume is None else Run.open(resume, root)
    config = config or (preset("small") if first is None else first.config)
    config, env = named(config, env)
    if first is not None:
        first.refuse_without_its_environment(env)
    if number() > 1:
        raise ConfigError("several seeds are trained together on one host, not on the hosts of a run")
    if config.devices != 1:
        raise ConfigError(f"several seeds are trained together on one device; got devices={config.devices}")
    requests = []
    for seed in range(config.seed, config.seed + seeds):
        own = None if name is None else f"{name}-seed{seed}"
        resumed = None if first is None else _sibling(first, config.seed, seed)
        requests.append(_Request(dataclasses.replace(config, seed=seed), own, resumed, None))
    begun = [r.resumed for r in requests if r.resumed is not None]
    done = [run for run in begun if retention.reached(run.checkpoints, config.total_steps)]
    requests = [r for r in requests if r.resumed not in done]
    if first is not None and not requests:
        raise RunError(
            f"all of these runs have reached their total of {config.total_steps} steps; to go on, give a larger one: "
            f"{first.typed('train --resume')} --seeds {seeds} --total-steps {2 * config.total_steps}"
        )
    runs = _trained(requests, env, root, progress, "off", peek)
    return sorted([*done, *runs], key=lambda run: run.config.seed)


def named(config: Config | str, env: Any) -> tuple[Config, Any]:
    """The configuration, which may be given as a preset's name, and the environment: one that is given as a name stands
    in the configuration like any other. Raises ConfigError for what is no configuration."""
    if isinstance(config, str):
        config = preset(config)
    if not isinstance(config, Config):
        raise ConfigError(
            f"expected a codream.Config or the name of a preset as config, got {type(config).__name__}; make one with "
            "codream.preset(name) and dataclasses.replace"
        )
    return (dataclasses.replace(config, env=env), None) if isinstance(env, str) else (config, env)


def _refuse_name(name: str | None, resume: Any) -> None:
    if name is not None and resume is not None:
        raise ConfigError("--name is for a new run; --resume goes on in the folder of the run")


def _sibling(first: Run, first_seed: int, seed: int) -> Run:
    """The run of another seed that was trained together with `first`, by its name."""
    ending = f"-seed{first_seed}"
    if not first.path.name.endswith(ending):
        raise RunError(
            f"runs of several seeds have names that end in their seed; {first.path} does not end in {ending}"
        )
    return Run.open(first.path.with_name(f"{first.path.name.removesuffix(ending)}-seed{seed}"))


@dataclasses.dataclass(frozen=True)
class _Request:
    """A run to be begun, or gone on with."""

    config: Config
    name: str | None
    resumed: Run | None
    checkpoint: int | None


def _trained(
    requests: list[_Request], env: Any, root: str | Path, progress: bool, wandb: WandbMode, peek: bool
) -> list[Run]:
    """Train what is asked for, all of one configuration but for the seed, and return the runs."""
    if requests[0].resumed is None:
        refuse_unread(requests[0].config)
    made, config = environment_of(requests[0].config, env)
    requests = [dataclasses.replace(r, config=dataclasses.replace(config, seed=r.config.seed)) for r in requests]
    copies = lambda n: build_beside(config, n, apart(env))  # noqa: E731
    try:
        only = own_copies(env) and apart(env) is env  # there are no others to play on
        if config.checkpoints_best is not None:
            _refuse_one_of_its_kind(env, only)
        if number() > 1:
            made = _shared(made, config)
        together = _together(driver_for(made, config), config, len(requests), env)
        scores = [
            Scorer(r.config, made.spec, copies) if config.checkpoints_best is not None else None for r in requests
        ]
        with contextlib.ExitStack() as stack:
            for scorer in filter(None, scores):
                stack.callback(scorer.close)
            runs = _held(requests, made.spec, root, stack, env)
            begun = [
                (None, 0) if r.resumed is None else restored(run, together.driver, r.config, r.checkpoint, env)
                for r, run in zip(requests, runs, strict=True)
            ]
            runners, rollbacks = zip(*begun, strict=True)
            steps = [0 if runner is None else int(runner.state.steps) for runner in runners]
            title = "train" if len(runs) == 1 else f"train {len(runs)} seeds"
            shown = progress and is_first()
            bar = stack.enter_context(Bar(title, config.total_steps, start=min(steps), show=shown))
            for told in _of_no_use(config, made.spec):
                bar.warn(told)
            leave = stack.enter_context(LeaveRequests(bar.warn))
            records: list[Tally] = []
            for k, (run, request) in enumerate(zip(runs, requests, strict=True)):
                if not is_first():
                    records.append(Tally(request.config, rollbacks[k]))
                    continue
                live = Live(run.path, request.config, begun=steps[k], wandb=wandb, tell=bar.warn)
                stack.callback(live.close)
                looks = Peek(str(run.path), request.config, live, copies) if peek and k == 0 and not only else None
                kept = {"peek": looks, "score": scores[k], "rollbacks": rollbacks[k], "shown": k == 0}
                records.append(Record(run, made.spec, request.config, bar, live, **kept))
            Loop(together, records, bar, leave).go(list(runners))
    finally:
        if isinstance(made, HostEnv):
            made.close()
    if is_first():
        for run in runs:
            _draw(run)
    return runs


def _of_no_use(config: Config, spec: EnvSpec) -> list[str]:
    """What a user should know of a run that is allowed but will not do what it seems to be asked for."""
    first, told = algorithm(config).first_update(spec, config), []
    if config.total_steps <= first:
        why = {
            "matwm": f"warmup is {config.warmup:,}, a first batch needs twice the steps of its sequences",
            "wm_rnd": f"a rollout is ppo.rollout × num_envs = {first:,} steps",
        }
        told.append(
            f"nothing, or hardly anything, will be learned: the first update comes after {first:,} steps "
            f"({why.get(config.algo, f'algo={config.algo}')}), and total_steps is {config.total_steps:,}"
        )
    return told + idle(config)


def _refuse_one_of_its_kind(env: Any, only: bool) -> None:
    """Raise ConfigError where nothing else can be played on this environment."""
    try:
        if only:
            raise TypeError("it is already made, so that there is no other; pass a class or function that makes it")
        apart(env)
    except TypeError as err:
        raise ConfigError(f"checkpoints_best plays on copies of the environment: {err}") from err


def _shared(env: HostEnv | GraphEnv, config: Config) -> HostEnv | GraphEnv:
    """The environment of a run on several hosts, if there can be such a run."""
    if config.algo != "matwm" or config.async_collect:
        asked = "async_collect" if config.async_collect else f"algo={config.algo}"
        raise ConfigError(f"{asked} is for a run on one host; this one has {number()} processes")
    if config.devices != jax.device_count():
        raise ConfigError(
            f"{number()} processes share this run, so it has to use all of their devices: --devices "
            f"{jax.device_count()}, got {config.devices}"
        )
    return SharedEnv(env) if isinstance(env, HostEnv) else env


def _together(driver: HostDriver | GraphDriver, config: Config, count: int, env: Any) -> Runs:
    if count == 1:
        return Alone(driver, config.devices)
    if isinstance(driver, GraphDriver):
        return Together(driver, count)
    asked = f"--env {config.env}" if env is None else f"--env-from {place_of(env) or 'MODULE:NAME'}"
    raise ConfigError(
        f"several seeds are trained together where the environment is part of the program (jaxmarl:…, socialjax:…); "
        f"{config.env} runs on the host: train its seeds side by side with codream sweep {asked} --seeds {count}"
    )


def _folders(requests: list[_Request], spec: EnvSpec, root: str | Path, env: Any) -> list[Run]:
    """The run that each asks for; none is made if one of them cannot be."""
    runs: list[Run] = []
    made: list[Run] = []
    together = _name_of_seeds(requests, Path(root)) if len(requests) > 1 else None
    try:
        for request in requests:
            run = request.resumed
            if run is None:
                name = request.name or (together and f"{together}-seed{request.config.seed}")
                about = {"env": env, "seeds": len(requests)}
                run = Run.create(request.config, spec, name=name, root=root, **about)
                made.append(run)
            runs.append(run)
    except RunError:
        for run in made:
            run.remove()
        raise
    return runs


def _name_of_seeds(requests: list[_Request], root: Path) -> str:
    """What runs of several seeds are called before their seed; one name for all, by which they find each other."""
    usual, number = default_name(requests[0].config), 1
    while True:
        name = usual if number == 1 else f"{usual}-{number}"
        if not any((root / f"{name}-seed{request.config.seed}").exists() for request in requests):
            return name
        number += 1


def _held(
    requests: list[_Request], spec: EnvSpec, root: str | Path, stack: contextlib.ExitStack, env: Any
) -> list[Run]:
    """`_folders`, kept from other processes until `stack` is left."""
    runs: list[Run] = []

    def hold() -> str:
        runs.extend(_folders(requests, spec, root, env))
        for run in runs:
            stack.enter_context(run.locked())
        return str(runs[0].path)

    first = text_from_first(hold)
    return runs or [Run(Path(first))]  # the folder is the first host's


def _draw(run: Run) -> None:
    """Drawing comes after everything is saved, and must not spoil it."""
    try:
        report(run, quick=True, progress=False)
    except Exception as err:
        warnings.warn(
            f"the report of {run.path} could not be drawn ({type(err).__name__}: {err}); the run itself is complete. "
            f"Try again with: {run.typed('report')}",
            RuntimeWarning,
            stacklevel=3,
        )


def environment_of(config: Config, env: Any) -> tuple[HostEnv | GraphEnv, Config]:
    """The environment, and the configuration resolved for it."""
    made = build_env(config, config.num_envs, env)
    try:
        if env is not None:
            config = dataclasses.replace(config, env=made.spec.name)
        if isinstance(made, HostEnv) and made.num_envs != config.num_envs:
            raise ConfigError(f"num_envs is {config.num_envs}, but the given environment has {made.num_envs} copies")
        return made, config.resolve(made.spec)
    except ConfigError:
        if isinstance(made, HostEnv):
            made.close()
        raise
