"""A report in a real browser: no errors, controls that work, nothing wider than a phone."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenes import COINS, episode_of, measured, run_folder, with_measures, without_dreams
from test_report import alone

import codream
from codream.envs import EnvSpec
from codream.report.animation import scene_of
from codream.report.film import frames_of

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

OWN = EnvSpec("own", ("a_0", "b_0"), ((3,), (60,)), (2, 3))
SEEN = EnvSpec("seen", ("agent_0", "agent_1"), ((16, 16, 1),) * 2, (2, 2))

# Drives the page from inside and writes what it found into the title, which --dump-dom prints.
PROBE = """<script>
window.addEventListener("error", (event) => { (window.failed = window.failed || []).push(event.message); });
window.addEventListener("load", () => {
  const $ = (name) => document.querySelector(`[data-part="${name}"]`);
  const player = document.getElementById("player"), seen = {};
  const step = () => +player.dataset.step;
  seen.begin = step();
  $("next").click(); seen.next = step();
  $("back").click(); $("back").click(); seen.back = step();
  $("slider").value = 0; $("slider").dispatchEvent(new Event("input")); seen.slid = step();
  seen.watching = $("phase").textContent;
  $("focal").value = 3; $("focal").dispatchEvent(new Event("change")); seen.dreamer = $("dreamer").textContent;
  $("slider").value = 9; $("slider").dispatchEvent(new Event("input"));
  seen.bodies = $("dream").querySelectorAll(".dreamt").length;
  seen.bars = $("others").querySelectorAll("tr").length;
  const chart = document.querySelector("svg[data-chart]"), box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 20 }));
  seen.tip = document.querySelector(".tip").textContent;
  chart.dispatchEvent(new PointerEvent("pointerleave"));
  seen.hidden = document.querySelector(".tip") === null;
  seen.overflow = document.documentElement.scrollWidth - window.innerWidth;
  seen.still = getComputedStyle(document.querySelector(".still")).display;
  const before = step();
  $("play").click();
  setTimeout(() => {
    seen.played = step() - before;
    $("play").click(); seen.paused = $("play").textContent;
    seen.errors = window.failed || [];
    document.title = "FOUND" + JSON.stringify(seen) + "END";
  }, 900);
});
</script>"""


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run")
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", *quiet, f"user-data-dir={profile}"]
    command = [CHROMIUM, *(f"--{flag}" for flag in flags), "--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return codream.report(with_measures(run_folder(tmp_path / "run"), measured()), quick=True)


@pytest.mark.parametrize("width", [390, 1200])
def test_controls_work_without_errors(page: Path, tmp_path: Path, width: int) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("<body>", f"<body>{PROBE}"))
    # A virtual clock: timers run at once, the answer does not depend on how busy the machine is.
    done = browse(
        probed, tmp_path / "profile", "--virtual-time-budget=4000", f"--window-size={width},900", "--dump-dom"
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.partition("<title>FOUND")[2].partition("END</title>")[0])
    assert seen["errors"] == []
    assert (seen["begin"], seen["next"], seen["back"], seen["slid"]) == (8, 9, 7, 0)
    assert "still watching" in seen["watching"]
    assert seen["dreamer"] == "What agent_0 imagined"
    assert seen["bodies"] == 4
    assert seen["bars"] == 4
    assert "environment steps" in seen["tip"]
    assert seen["hidden"]
    assert seen["still"] == "none"
    assert seen["played"] >= 1
    assert "play" in seen["paused"]
    assert seen["overflow"] <= 0


def test_a_plain_picture_without_scripts(page: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.html"
    text = page.read_text()
    before, _, rest = text.rpartition("<script>")
    bare.write_text(before + rest.partition("</script>")[2])
    shot = tmp_path / "bare.png"
    browse(bare, tmp_path / "profile", "--window-size=1200,900", f"--screenshot={shot}")
    assert shot.stat().st_size > 10_000
    assert text.count('<svg class="arena" viewBox="0 0 130 130"') >= 10


BOARD = """<script>
window.addEventListener("error", (event) => { (window.failed = window.failed || []).push(event.message); });
window.addEventListener("load", () => {
  const $ = (name) => document.querySelector(`[data-part="${name}"]`), seen = {};
  $("slider").value = 0; $("slider").dispatchEvent(new Event("input"));
  seen.real = [$("real").querySelectorAll("circle:not(.eye)").length, $("real").querySelectorAll(".coin").length];
  seen.dream = $("dreamed").hidden;
  seen.title = $("bars-title").textContent;
  seen.errors = window.failed || [];
  document.title = "FOUND" + JSON.stringify(seen) + "END";
});
</script>"""


def probed(folder: Path, spec: EnvSpec, found: dict[str, Any], probe: str) -> dict[str, Any]:
    """What a script finds in the report of a run with these measurements, on a phone."""
    run = run_folder(folder / "run")
    about = json.loads((run.path / "run.json").read_text())
    about["environment"] |= {"name": spec.name, "agents": list(spec.agents)}
    (run.path / "run.json").write_text(json.dumps(about))
    page = codream.report(with_measures(run, found), quick=True)
    page.write_text(page.read_text().replace("<body>", f"<body>{probe}"))
    done = browse(page, folder / "profile", "--window-size=390,900", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(done.stdout.partition("<title>FOUND")[2].partition("END</title>")[0])


@pytest.mark.parametrize("dreams", [True, False])
def test_boards_and_runs_without_dreams(tmp_path: Path, dreams: bool) -> None:
    found = alone(COINS)
    if not dreams:
        found["model"] = None
        found["scenes"] = [scene_of(without_dreams(episode_of(COINS)), COINS)]
    seen = probed(tmp_path, COINS, found, BOARD)
    cells = np.clip(found["scenes"][0]["views"][0]["real"][0], 0, 1) >= 0.03
    assert seen["real"] == [cells[:, :2].sum(), cells[:, 2:].sum()]
    assert seen["dream"] == (not dreams)
    assert seen["title"] == ("What it expected each agent to do" if dreams else "What it would do itself")
    assert seen["errors"] == []


FRAMES = """<script>
window.addEventListener("load", () => {
  const $ = (name) => document.querySelector(`[data-part="${name}"]`), seen = {};
  $("slider").value = 3; $("slider").dispatchEvent(new Event("input"));
  const box = (what) => $(what).querySelector("svg").getAttribute("viewBox").split(" ").map(Number);
  seen.windows = [box("real"), box("dream")];
  seen.told = $("seen").textContent;
  seen.episode = getComputedStyle($("episode").parentElement).display;
  document.title = "FOUND" + JSON.stringify(seen) + "END";
});
</script>"""


def test_frames_of_images(tmp_path: Path) -> None:
    """Each picture is a window within one frame of the strip."""
    seen = probed(tmp_path, SEEN, alone(SEEN), FRAMES)
    assert seen["windows"] == [pytest.approx([3 + 1 / 18, 1 / 18, 16 / 18, 16 / 18])] * 2
    assert seen["told"] == "As agent_0 sees it."
    assert seen["episode"] == "none"  # there is one to choose from


CURVES = """<script>
window.addEventListener("load", () => {
  const $ = (name) => document.querySelector(`[data-part="${name}"]`), seen = {};
  const told = () => [...$("curves").querySelectorAll("svg")].map((svg) => svg.textContent);
  $("slider").value = 3; $("slider").dispatchEvent(new Event("input")); seen.watching = told();
  $("slider").value = 9; $("slider").dispatchEvent(new Event("input")); seen.dreaming = told();
  $("focal").value = 1; $("focal").dispatchEvent(new Event("change")); seen.other = told();
  seen.left_out = $("entries-told").textContent;
  seen.hidden = [$("happened"), $("real"), $("dream")].map((node) => getComputedStyle(node).display);
  seen.overflow = document.documentElement.scrollWidth - window.innerWidth;
  document.title = "FOUND" + JSON.stringify(seen) + "END";
});
</script>"""


@pytest.mark.parametrize("dreams", [True, False])
def test_entries_of_vectors_over_the_episode(tmp_path: Path, dreams: bool) -> None:
    found = measured(OWN, baselines=[])
    if not dreams:
        found["model"] = None
        found["scenes"] = [scene_of(without_dreams(episode_of(OWN)), OWN)]
    seen = probed(tmp_path, OWN, found, CURVES)
    view = found["scenes"][0]["views"][0]
    real, dream = view["real"], view["dream"]
    assert seen["watching"] == [f"entry {k}{real[3][k]:.3g}" for k in range(3)]
    imagined = [f" · imagined {dream[9][k]:.3g}" if dreams else "" for k in range(3)]
    assert seen["dreaming"] == [f"entry {k}{real[9][k]:.3g}{imagined[k]}" for k in range(3)]
    assert len(seen["other"]) == 12
    assert "48 entries that change less are left out" in seen["left_out"]
    assert ("one dream" in seen["left_out"]) == dreams
    assert seen["hidden"] == ["none"] * 3
    assert seen["overflow"] <= 0


GONE = """<script>
window.addEventListener("load", () => {
  const $ = (name) => document.querySelector(`[data-part="${name}"]`), seen = {};
  for (const step of [2, 9]) {
    $("slider").value = step; $("slider").dispatchEvent(new Event("input"));
    const rows = [...$("others").querySelectorAll("tr")];
    seen[step] = rows.map((row) => [row.textContent, row.querySelectorAll(".bar").length]);
  }
  document.title = "FOUND" + JSON.stringify(seen) + "END";
});
</script>"""


def test_who_has_ended_neither_acts_nor_sees(tmp_path: Path) -> None:
    episode = episode_of(OWN)
    obs, acting = episode.obs.copy(), episode.acting.copy()
    obs[4:, 1], acting[3:, 1] = 0.0, False  # as an environment's answers are filled
    found = measured(OWN, baselines=[])
    found["scenes"] = [scene_of(dataclasses.replace(episode, obs=obs, acting=acting), OWN)]
    real = np.asarray(found["scenes"][0]["views"][1]["real"])
    assert (real[4:] == real[3]).all()
    assert real.std(axis=0).min() > 0
    assert obs[3, 1].any()
    seen = probed(tmp_path, OWN, found, GONE)
    assert ["did:" in text and bars == 1 for text, bars in seen["2"]] == [True, True]
    assert ["is not there" in text and bars == 0 for text, bars in seen["9"]] == [False, True]


def test_a_frame_shows_nothing_of_its_neighbours() -> None:
    episode = episode_of(SEEN)
    flashing = np.zeros_like(episode.obs)
    flashing[::2] = 255
    scene = scene_of(dataclasses.replace(episode, obs=flashing), SEEN)
    for t, frame in enumerate(frames_of(scene, 0, SEEN.sides)):
        shown = np.asarray(frame.crop((12, 42, 286, 316)))
        assert (shown == (0 if t % 2 else 255)).all()
