"""What released versions wrote is read for good: loaded, evaluated, resumed, measured, compared and reported."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from steadydetr.checkpoints.folder import load_detector, load_training_state
from steadydetr.cli import run_command
from steadydetr.config import differences, renewed, to_plain
from steadydetr.recipes import find
from steadydetr.tools.evaluate import evaluate_checkpoint, measure_checkpoint
from tests.released.write import RUNS, TINY

RELEASED = Path(__file__).parent / "released"
VERSIONS = sorted(path.name.removesuffix(".tar.xz") for path in RELEASED.glob("*.tar.xz"))
DATA = TINY[TINY.index("--data") + 1]


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for every version, with its runs, the teachers of some of them, a comparison, and all its recipes."""
    folder = tmp_path_factory.mktemp("released")
    for version in VERSIONS:
        with tarfile.open(RELEASED / f"{version}.tar.xz") as archive:
            archive.extractall(folder / version, filter="data")
    return folder


every_run = pytest.mark.parametrize(("version", "name"), [(version, name) for version in VERSIONS for name in RUNS])
every_version = pytest.mark.parametrize("version", VERSIONS)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if record["kind"] == kind]


@every_run
def test_loads_and_evaluates(released: Path, version: str, name: str) -> None:
    """The best checkpoint measures what its run noted when it was saved."""
    run = released / version / "runs" / name
    for checkpoint in ("last", "best", "ema"):
        if (run / checkpoint).exists():
            load_detector(run / checkpoint)
    best = max(record["ap"] for record in records(run, "eval"))
    assert evaluate_checkpoint(run, DATA, workers=0).ap == pytest.approx(best, abs=0.05)


@every_run
def test_goes_on(released: Path, version: str, name: str, tmp_path: Path) -> None:
    """The losses of the steps that were left equal those of a run that was never stopped."""
    run = tmp_path / name
    shutil.copytree(released / version / "runs" / name, run)
    expected = json.loads((run / "expected.json").read_text())
    before = load_training_state(run / "last")["state"]["step"]
    words = [str(run / "config.json"), "--output", str(run), "--resume"]
    teacher = [other for other in RUNS if f"--teacher {{{other}}}" in RUNS[name]]
    run_command("train", words + [w for t in teacher for w in ("--teachers.teacher.checkpoint", str(released / version / "teachers" / t))])
    after = {record["step"]: record["losses"] for record in records(run, "train")}
    assert list(after) == [int(step) for step in expected["losses"]] and before < max(after)
    for step, losses in expected["losses"].items():
        assert after[int(step)] == pytest.approx(losses, rel=2e-3), f"step {step}"


@every_run
def test_measures_stability(released: Path, version: str, name: str) -> None:
    assert measure_checkpoint(released / version / "runs" / name, DATA, images=4, workers=0)["model"].images == 4


@every_version
def test_reports_and_figures(released: Path, version: str, tmp_path: Path) -> None:
    runs = released / version / "runs"
    run_command("report", [str(runs), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in RUNS)
    run_command("figures", [str(runs / "dino-od"), "--output", str(tmp_path / "figures"), "--data", DATA])
    assert {path.stem for path in (tmp_path / "figures").iterdir()} >= {"unstable-score", "sampling-points"}


@every_version
def test_comparison_is_finished(released: Path, version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again trains nothing: the recipes are known for the same ones."""
    shutil.copytree(released / version / "compare", tmp_path / "compare")
    flags = [word if word != "3" else "1" for word in TINY]
    cost = "cost=small-dino --criterion.class-cost position-modulated"
    run_command("compare", ["small-dino", cost, "--seeds", "2", "--output", str(tmp_path / "compare"), "--", *flags])
    assert "4 are done, 0 to train" in capsys.readouterr().out


@every_version
def test_recipes_are_the_same(released: Path, version: str) -> None:
    """What a version called by these names is what they mean today."""
    for name, plain in json.loads((released / version / "recipes.json").read_text()).items():
        assert differences(renewed(plain, name), json.loads(json.dumps(to_plain(find(name))))) == []
