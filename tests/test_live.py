"""What can be watched while a run goes on: events, the table in the terminal, Weights & Biases."""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import arrays, assert_same, tiny_config
from PIL import Image
from rich.console import Console
from tensorboardX.proto import event_pb2

import codream
from codream import ConfigError, Run, cli, preset
from codream.envs import EnvSpec
from codream.linear import tree_of
from codream.live import EVENTS, Live, live_table, publish
from codream.progress import Bar
from codream.recording import Record
from codream.report.peek import GUESS, Peek
from codream.training import Runner

SPEC = EnvSpec("tag", ("adversary_0", "adversary_1", "agent_0"), ((4,),) * 3, (5,) * 3)
MEANS = {
    "episode/return/adversary_0": 4.0,
    "episode/return/adversary_1": 6.0,
    "episode/return/agent_0": -9.0,
    "agent/agent_0/value": -3.0,
    "world_model/loss": 12.345,
    "world_model/team_accuracy": 0.5,
}


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("P", (10, 20)).save(out, "GIF")
    return out.getvalue()


GIF = picture()


def events(folder: Path) -> list:
    """All events of a run, in the format that TensorBoard reads: length, checksum, record, checksum."""
    found = []
    for file in sorted((folder / EVENTS).iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event()  # type: ignore[attr-defined]
            event.ParseFromString(data[at + 12 : at + 12 + size])
            found.append(event)
            at += 16 + size
    return found


def test_scalars_tables_and_pictures(tmp_path: Path) -> None:
    live = Live(tmp_path, preset("small"))
    live.scalars({"steps": 400, "world_model/loss": 3.5})
    live.close()
    publish(tmp_path, 400, "| a |", GIF)
    values = {value.tag: (event.step, value) for event in events(tmp_path) for value in event.summary.value}
    assert values["world_model/loss"][0] == 400
    assert values["world_model/loss"][1].simple_value == 3.5
    assert "cross-play/text_summary" in values
    picture = values["real beside imagined"][1].image
    assert (picture.width, picture.height) == (10, 20)


def test_what_a_resumed_run_writes_again_is_dropped(tmp_path: Path) -> None:
    for begun in (0, 400):
        live = Live(tmp_path, preset("small"), begun=begun)
        live.scalars({"steps": begun + 400, "x": 1.0})
        live.close()
    assert [event.step for event in events(tmp_path) if event.session_log.status] == [1, 401]


def test_the_table_in_the_terminal() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(live_table(MEANS, SPEC))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"adversary +5\.0 +–", shown)
    assert re.search(r"agent +-9\.0 +-3\.0", shown)
    assert "world model: loss 12.3, foresees 50% of the others' actions" in shown


def screen(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where bars are shown."""
    out = io.StringIO()
    monkeypatch.setattr(
        "codream.progress.Console", lambda **_: Console(file=out, force_terminal=terminal, width=200, height=30)
    )
    return out


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_said_stands_as_it_is(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and errors may hold what Rich reads as markup."""
    out = screen(terminal, monkeypatch)
    with Bar("train", 100) as bar:
        bar.note("failed at [/device:GPU:0]")
        bar.say("go on with 'runs/lr[high]'")
        bar.update(100, last=True)
    assert "runs/lr[high]" in out.getvalue()
    assert "[/device:GPU:0]" in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_stands_below_the_bar_on_a_terminal_only(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = screen(terminal, monkeypatch)
    with Bar("train", 100) as bar:
        bar.below(live_table(MEANS, SPEC))
        bar.update(100, last=True)
    assert ("imagined reward" in out.getvalue()) == terminal
    assert "train" in out.getvalue()


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is an extra")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    live = Live(tmp_path, preset("small"), wandb="offline")
    live.scalars({"steps": 400, "world_model/loss": 3.5})
    live.pictures(400, "| a |", GIF)
    live.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/videos/*.gif"))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_mode_that_does_not_exist_and_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="one of off, offline, online, got 'maybe'"):
        Live.check("maybe")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"codream\[wandb\]"):
        Live.check("offline")
    Live.check("off")


def test_metrics_of_a_run_say_how_many_episodes_ended(host_run, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    lines = [json.loads(line) for line in (host_run.path / "metrics.jsonl").read_text().splitlines()]
    # 400 steps of 25 a game; in some a side plays at random, which does not count.
    assert 4 < sum(line["episode/count"] for line in lines) < 16
    scalars = {value.tag for event in events(host_run.path) for value in event.summary.value}
    assert {"world_model/loss", "episode/return/agent_0", "agent/agent_0/value"} <= scalars
    assert cli.main(["devices"]) == 0
    assert "codream computes on the CPU" in capsys.readouterr().out


def test_looking_on_shows_pictures_and_changes_nothing(
    host_run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was looked at as it trained equals one that was not, bit by bit."""
    # By module: `codream.report` is also the name of a function.
    monkeypatch.setattr(sys.modules[Peek.__module__], "SHARE", 1e9)
    monkeypatch.setattr(sys.modules[Peek.__module__], "EPISODES", 2)
    config = tiny_config(total_steps=200, log_every=200)
    run = codream.train(config, name="looked-at", root=runs, progress=False, peek=True)
    shown = {value.tag: value for event in events(run.path) for value in event.summary.value}
    assert b"chase" in shown["cross-play/text_summary"].tensor.string_val[0]
    assert shown["real beside imagined"].image.encoded_image_string.startswith(b"GIF8")
    assert_same(arrays(run, 200), arrays(host_run, 200))


def test_looks_take_a_small_share_of_the_time_at_most() -> None:
    peek: Any = SimpleNamespace(spent=0.0, _cost=GUESS)
    assert not Peek.due(peek, 199.0)
    assert Peek.due(peek, 201.0)
    peek.spent = peek._cost = 15.0
    assert not Peek.due(peek, 999.0)
    assert Peek.due(peek, 1001.0)


def test_a_look_that_fails_does_not_stop_training() -> None:
    class Broken:
        def due(self, elapsed: float) -> bool:
            return elapsed >= 0

        def look(self, state: Any, steps: int) -> None:
            raise OSError("nothing to see")

    said: list[str] = []
    bar = SimpleNamespace(update=lambda _: None, say=said.append)
    record: Any = SimpleNamespace(peek=Broken(), bar=bar, _began=0.0, _line_began=0.0, steps=0, _note=lambda _: None)
    Record._look(record, lambda: tree_of(Runner, state=None))
    assert said == ["no more looks at this run while it trains: OSError: nothing to see"]
    assert record.peek is None
