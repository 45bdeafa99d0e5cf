"""A package of somebody else's, as docs/extending.md shows it: installed, and every command run on its parts."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from steadydetr.data.shapes import ShapesConfig, ShapesDataset

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "tests" / "plugin"
RUN_ALL = """
import contextlib, io, json, sys
from steadydetr.cli import main
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(json.loads(line))
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
FLAG_WORDS = "--data.workers 0 --training.batch-size 4 --training.epochs 2 --training.log-every 1 --training.stability-images 4"
FLAGS = FLAG_WORDS.split()


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def run_all(commands: list[list[str]], *paths: Path, folder: Path | None = None) -> list[Done]:
    """The commands one after the other in a fresh process, with `paths` to import from."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    lines = "".join(f"{json.dumps(command)}\n" for command in commands)
    done = subprocess.run([sys.executable, "-c", RUN_ALL], input=lines, env=environment, cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [Done(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the package was installed into by pip or uv, with its entry point."""
    target, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "mylab"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    installers = ([sys.executable, "-m", "pip"], ["uv", "pip"], [sys.executable, "-m", "uv", "pip"])
    said = []
    for installer in installers:
        words = [*installer, "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if not done.returncode:
            return target
        said.append(done.stderr)
    pytest.fail("\n".join(said))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes in the package's own layout of data."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        dataset = ShapesDataset(ShapesConfig(size=128, images=8), split)
        with open(folder / f"boxes_{split}.csv", "w", newline="") as file:
            for position in range(len(dataset.index)):
                name = f"{split}{position}.png"
                Image.fromarray(dataset.load_image(position)).save(folder / name)
                rows = dataset.index.rows(position)
                for box, label in zip(dataset.index.boxes_xyxy[rows], dataset.index.labels[rows], strict=True):
                    csv.writer(file).writerow([name, dataset.index.classes[label], *np.asarray(box).tolist()])
    return folder


@pytest.fixture(scope="module")
def runs(installed: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of its recipes, trained by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    commands = [
        ["train", f"mylab:{name}", "--data", str(data), "--output", str(folder / name), *FLAGS] for name in ("plain", "entropy_dino")
    ]
    for done in run_all(commands, installed):
        assert done.code == 0, done.err
    return folder


def test_documentation_shows_the_package() -> None:
    shown = dict(re.findall(r"`([\w/]+\.(?:py|toml))`\n\n```\w+\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL))
    files = [path for path in PLUGIN.rglob("*") if path.suffix in (".py", ".toml")]
    assert shown == {path.relative_to(PLUGIN).as_posix(): path.read_text() for path in files}


def test_recipes_are_listed(installed: Path) -> None:
    listed, shown, unknown = run_all([["recipes"], ["recipes", "mylab:plain"], ["recipes", "mylab:plane"]], installed)
    assert "mylab:entropy-dino" in listed.out and "mylab:plain" in listed.out
    assert json.loads(shown.out)["detector"]["backbone"]["kind"] == "mylab:patch-backbone"
    assert unknown.code == 2 and "did you mean 'mylab:plain'" in unknown.err


def test_saved_by_kinds(runs: Path) -> None:
    recipe = json.loads((runs / "plain" / "config.json").read_text())["recipe"]
    assert recipe["detector"]["kind"] == "mylab:plain-detr"
    assert recipe["criterion"]["class_cost"] == {"kind": "mylab:sharp-cost", "power": 2.0}
    assert [objective["kind"] for objective in recipe["objectives"]] == ["set-prediction", "mylab:entropy"]
    assert recipe["data"]["transform"]["kind"] == "mylab:mosaic" and recipe["sinks"][0]["kind"] == "mylab:losses-csv"
    steps = [line.split(",")[0] for line in (runs / "plain" / "losses.csv").read_text().splitlines()]
    assert steps == ["1", "2", "3", "4"]


def test_parts_are_flags(installed: Path, data: Path) -> None:
    words = ["train", "small-dino", "--data", str(data), "--objectives.entropy", "mylab:entropy", "--objectives.entropy.weight", "0.2"]
    helped, wrong = run_all([[*words, "--help"], ["train", "small-dino", "--criterion.class-cost", "mylab:sharp"]], installed)
    assert "--objectives.entropy.weight" in helped.out and "0.2" in helped.out
    assert wrong.code == 2 and "did you mean 'mylab:sharp-cost'" in wrong.err


@pytest.mark.parametrize("name", ["plain", "entropy_dino"])
def test_every_command(installed: Path, data: Path, runs: Path, name: str, tmp_path: Path) -> None:
    run, where = str(runs / name), str(data)
    student = [
        "--objectives.assignment",
        "none",
        "--objectives.features",
        "none",
        "--training.epochs",
        "1",
        "--output",
        str(tmp_path / "student"),
    ]
    commands = [
        ["check", where],
        ["eval", run, "--data", where, "--workers", "0"],
        ["stability", run, where, "--images", "4", "--workers", "0"],
        ["predict", run, str(data / "val0.png"), "--output", str(tmp_path / "found")],
        ["report", run, "--output", str(tmp_path / "report.html")],
        ["figures", run, "--output", str(tmp_path / "figures")],
        ["cost", f"mylab:{name}", "--size", "64", "64"],
        ["train", f"{run}/config.json", "--output", run, "--resume"],
        ["train", f"{run}/config.json", "--output", str(tmp_path / "again"), "--training.epochs", "1"],
        ["distill", "small-refine-deformable-detr", "--teacher", run, "--data", where, *FLAGS, *student],
    ]
    for words, done in zip(commands, run_all(commands, installed, folder=tmp_path), strict=True):
        assert done.code == 0, f"{words[0]}: {done.err}"
    assert "mylab:entropy" in (tmp_path / "report.html").read_text()


def test_comparing(installed: Path, data: Path, tmp_path: Path) -> None:
    words = ["compare", "small-dino", "mylab:entropy-dino", "--seeds", "1", "--data", str(data), "--output", str(tmp_path / "compare")]
    (done,) = run_all([[*words, "--", *FLAGS, "--training.epochs", "1"]], installed)
    assert done.code == 0, done.err
    assert (tmp_path / "compare" / "mylab-entropy-dino" / "seed0" / "summary.json").exists()


def test_without_the_package_one_line_says_what_to_name(data: Path, runs: Path) -> None:
    commands = [
        ["eval", str(runs / "plain"), "--data", str(data)],
        ["train", str(runs / "plain" / "config.json"), "--resume", "--output", str(runs / "plain")],
        ["train", "mylab:plain"],
    ]
    for done in run_all(commands):
        assert done.code == 2 and "--plugin mylab" in done.err and len(done.err.strip().splitlines()) == 1, done.err


@pytest.mark.parametrize("plugin", ["mylab", str(PLUGIN / "mylab")])
def test_named_instead_of_installed(data: Path, runs: Path, plugin: str) -> None:
    """From the folder that it lies in, or by its path."""
    words = ["eval", str(runs / "plain"), "--data", str(data), "--workers", "0"]
    (done,) = run_all([["--plugin", plugin, *words]], folder=PLUGIN)
    assert done.code == 0, done.err


def test_a_broken_plugin_does_not_break_the_rest(installed: Path, runs: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "site"
    shutil.copytree(installed, broken)
    (broken / "mylab" / "__init__.py").write_text("raise RuntimeError('half installed')")
    listed, tried = run_all([["recipes"], ["eval", str(runs / "plain"), "--data", str(data)]], broken)
    assert listed.code == 0 and "small-dino" in listed.out and "half installed" in listed.err
    assert tried.code == 2 and "which could not be imported: half installed" in tried.err
