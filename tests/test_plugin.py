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

from steadydetr.config import FORMAT
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


@pytest.mark.slow
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


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "entropy_dino"])
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


@pytest.mark.slow
def test_comparing(installed: Path, data: Path, tmp_path: Path) -> None:
    words = ["compare", "small-dino", "mylab:entropy-dino", "--seeds", "1", "--data", str(data), "--output", str(tmp_path / "compare")]
    (done,) = run_all([[*words, "--", *FLAGS, "--training.epochs", "1"]], installed)
    assert done.code == 0, done.err
    assert (tmp_path / "compare" / "mylab-entropy-dino" / "seed0" / "summary.json").exists()


def check_names_the_plugin(done: Done, words: list[str]) -> None:
    assert done.code == 2 and "--plugin mylab" in done.err, f"{words}: {done.err}{done.out}"
    out = [line for line in done.out.splitlines() if not line.startswith("Loading ")]
    assert len(done.err.strip().splitlines()) == 1 and not out, f"{words}: {done.err}{done.out}"


@pytest.mark.slow
def test_saved_files_without_the_package(data: Path, runs: Path, tmp_path: Path) -> None:
    """A run, a checkpoint, a recipe in a file and a comparison, in every command: one line names what to add."""
    run, where, config = str(runs / "plain"), str(data), str(runs / "plain" / "config.json")
    alone = tmp_path / "compare" / "ours" / "recipe.json"
    alone.parent.mkdir(parents=True)
    alone.write_text(json.dumps({"format": FORMAT} | json.loads(Path(config).read_text())["recipe"]))
    commands = [
        ["train", config, "--output", str(tmp_path / "new")],
        ["train", str(runs / "entropy_dino" / "config.json"), "--output", str(tmp_path / "new")],
        ["train", str(alone), "--output", str(tmp_path / "new")],
        ["train", config, "--output", run, "--resume"],
        ["train", "small-dino", "--data", "shapes", "--output", run, "--resume"],
        ["distill", "small-dino", "--teacher", run, "--data", "shapes", "--output", str(tmp_path / "new")],
        ["eval", run, "--data", where],
        ["eval", f"{run}/last", "--data", where],
        ["predict", run, str(data / "val0.png"), "--output", str(tmp_path / "new")],
        ["stability", run, where],
        ["figures", run, "--data", "shapes", "--output", str(tmp_path / "figures")],
        ["cost", config],
        ["cost", "small-dino", "--teachers.teacher", "trained-teacher", "--objectives.features", "feature-distillation", "--teacher", run],
        ["compare", "small-dino", config, "--output", str(tmp_path / "new")],
        ["compare", "ours=small-dino", "small-stable-dino", "--output", str(tmp_path / "compare")],
    ]
    # reports read a recipe as plain values, and a detector of ours is one whatever it was trained with
    working = [
        ["report", str(runs), "--output", str(tmp_path / "report.html")],
        ["predict", str(runs / "entropy_dino"), str(data / "val0.png"), "--output", str(tmp_path / "found")],
    ]
    for words, done in zip([*commands, *working], run_all([*commands, *working]), strict=True):
        if words in working:
            assert done.code == 0, f"{words}: {done.err}"
        else:
            check_names_the_plugin(done, words)
    assert not (tmp_path / "new").exists() and "mylab:entropy" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_words_without_the_package() -> None:
    train, stable = ["train", "small-dino", "--data", "shapes"], ["train", "small-stable-dino"]
    commands = [
        ["train", "mylab:plain"],
        ["cost", "mylab:plain"],
        ["distill", "mylab:entropy_dinoo", "--teacher", "x"],
        ["recipes", "mylab:plain"],
        ["compare", "small-dino", "mylab:entropy_dino"],
        [*train, "--objectives.x", "mylab:entropy"],
        [*train, "--objectives.entropy", "mylab:entropy", "--objectives.entropy.weight", "0.2"],
        [*train, "--objectives.entropy=mylab:entropy"],
        [*train, "--sinks.losses", "mylab:losses-csv"],
        [*train, "--detector", "mylab:plain-detr"],
        [*train, "--criterion.class-cost", "mylab:sharp-cost"],
        [*train, "--data.transform", "mylab:mosaic", "--data.transform.size", "64"],
        [*stable, "--criterion.class-target.warp", "mylab:cubic"],
        ["cost", "small-dino", "--objectives.entropy", "mylab:entropy"],
        ["compare", "small-dino", "quickstart", "--", "--objectives.entropy", "mylab:entropy"],
    ]
    for words, done in zip(commands, run_all(commands), strict=True):
        check_names_the_plugin(done, words)


@pytest.mark.slow
def test_mistyped_packages_and_parts(installed: Path) -> None:
    """Where the package is in use, its names and that of the package itself are near ones."""
    commands = [
        (["train", "mypulg:entropy_dino"], "(in use: mylab). Name it, --plugin mypulg"),
        (["train", "mylba:entropy_dino"], "did you mean 'mylab:entropy-dino'"),
        (["train", "other:entropy"], "(in use: mylab)"),
        (["train", "mylab:entropy_dinoo"], "did you mean 'mylab:entropy-dino'"),
        (["train", "entropy_dino"], "did you mean 'mylab:entropy-dino'"),
        (["train", "small-dino", "--objectives.x", "mylab:entropy"], "--objectives.entropy mylab:entropy"),
        (["train", "small-dino", "--objectives.x", "mylba:entropy"], "did you mean 'mylab:entropy'"),
        (["train", "small-dino", "--objectives.entropy", "mylab:entropi"], "did you mean 'mylab:entropy'"),
        (["train", "small-dino", "--objectives.entropy.weight", "1"], "--objectives.entropy mylab:entropy"),
        (["train", "small-dino", "--detector", "mylab:plain"], "did you mean 'mylab:plain-detr'"),
        (["train", "small-stable-dino", "--criterion.class-target.warp", "mylab:entropy"], "no function that fits"),
    ]
    for (words, said), done in zip(commands, run_all([words for words, _ in commands], installed), strict=True):
        assert done.code == 2 and said in done.err and len(done.err.strip().splitlines()) == 1, f"{words}: {done.err}"


@pytest.mark.parametrize("plugin", ["mylab", pytest.param(str(PLUGIN / "mylab"), marks=pytest.mark.slow)])
def test_named_instead_of_installed(data: Path, runs: Path, plugin: str) -> None:
    """From the folder that it lies in, or by its path."""
    words = ["eval", str(runs / "plain"), "--data", str(data), "--workers", "0"]
    (done,) = run_all([["--plugin", plugin, *words]], folder=PLUGIN)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_a_broken_plugin_does_not_break_the_rest(installed: Path, runs: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "site"
    shutil.copytree(installed, broken)
    (broken / "mylab" / "__init__.py").write_text("raise RuntimeError('half installed')")
    listed, tried = run_all([["recipes"], ["eval", str(runs / "plain"), "--data", str(data)]], broken)
    assert listed.code == 0 and "small-dino" in listed.out and "half installed" in listed.err
    assert tried.code == 2 and "which could not be imported: half installed" in tried.err
