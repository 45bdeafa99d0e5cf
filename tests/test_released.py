"""What released versions wrote is read for good: loaded, evaluated, resumed, measured, compared and reported."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from steadydetr.checkpoints.folder import load_detector, load_training_state
from steadydetr.cli import run_command
from steadydetr.config import differences, from_plain, to_plain
from steadydetr.recipes import find
from steadydetr.tools.evaluate import evaluate_checkpoint, measure_checkpoint

RELEASED = Path(__file__).parent / "released"
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@dataclass(frozen=True)
class Archive:
    """What stands in VERSION.json about VERSION.tar.xz beside it."""

    version: str
    data: str  # that all runs were trained with
    runs: dict[str, str | None]  # name -> the run below `teachers` that taught it
    compare: str  # the words that made its comparison, without --output


def archives(folder: Path) -> list[Archive]:
    """Every archive of a folder, each with its own list; a FileNotFoundError where a list is missing."""
    paths = sorted(folder.glob("*.tar.xz"))
    versions = [path.name.removesuffix(".tar.xz") for path in paths]
    return [Archive(version, **json.loads((folder / f"{version}.json").read_text())) for version in versions]


def extract(folder: Path, archive: Archive, into: Path) -> None:
    with tarfile.open(folder / f"{archive.version}.tar.xz") as file:
        file.extractall(into, filter="data")


ARCHIVES = archives(RELEASED)


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for every version, with its runs, the teachers of some of them, a comparison, and all its recipes."""
    folder = tmp_path_factory.mktemp("released")
    for archive in ARCHIVES:
        extract(RELEASED, archive, folder / archive.version)
    return folder


ALL_RUNS = [(archive, name) for archive in ARCHIVES for name in archive.runs]
every_run = pytest.mark.parametrize(("archive", "name"), ALL_RUNS, ids=[f"{archive.version}-{name}" for archive, name in ALL_RUNS])
every_version = pytest.mark.parametrize("archive", ARCHIVES, ids=[archive.version for archive in ARCHIVES])


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if record["kind"] == kind]


@every_run
def test_loads_and_evaluates(released: Path, archive: Archive, name: str) -> None:
    """The best checkpoint measures what its run noted when it was saved."""
    run = released / archive.version / "runs" / name
    for checkpoint in ("last", "best", "ema"):
        if (run / checkpoint).exists():
            load_detector(run / checkpoint)
    best = max(record["ap"] for record in records(run, "eval"))
    assert evaluate_checkpoint(run, archive.data, workers=0).ap == pytest.approx(best, abs=0.05)


@every_run
def test_goes_on(released: Path, archive: Archive, name: str, tmp_path: Path) -> None:
    """The losses of the steps that were left equal those of a run that was never stopped."""
    run = tmp_path / name
    shutil.copytree(released / archive.version / "runs" / name, run)
    expected = json.loads((run / "expected.json").read_text())
    before = load_training_state(run / "last")["state"]["step"]
    words = [str(run / "config.json"), "--output", str(run), "--resume"]
    if teacher := archive.runs[name]:  # it lies elsewhere now
        words += ["--teachers.teacher.checkpoint", str(released / archive.version / "teachers" / teacher)]
    run_command("train", words)
    after = {record["step"]: record["losses"] for record in records(run, "train")}
    assert list(after) == [int(step) for step in expected["losses"]] and before < max(after)
    for step, losses in expected["losses"].items():
        assert after[int(step)] == pytest.approx(losses, rel=2e-3), f"step {step}"


@every_run
def test_measures_stability(released: Path, archive: Archive, name: str) -> None:
    assert measure_checkpoint(released / archive.version / "runs" / name, archive.data, images=4, workers=0)["model"].images == 4


@every_version
def test_reports_and_figures(released: Path, archive: Archive, tmp_path: Path) -> None:
    runs = released / archive.version / "runs"
    run_command("report", [str(runs), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in archive.runs)
    averaged = next(run for run in sorted(runs.iterdir()) if (run / "ema").exists())
    run_command("figures", [str(averaged), "--output", str(tmp_path / "figures"), "--data", archive.data])
    assert {path.stem for path in (tmp_path / "figures").iterdir()} >= {"unstable-score", "sampling-points"}


@every_version
def test_comparison_is_finished(released: Path, archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again trains nothing: the recipes are known for the same ones."""
    shutil.copytree(released / archive.version / "compare", tmp_path / "compare")
    run_command("compare", ["--output", str(tmp_path / "compare"), *shlex.split(archive.compare)])
    assert re.search(r"\b[1-9]\d* are done, 0 to train", capsys.readouterr().out)


OF_DETREX = {"detector.share_heads: True -> False", "detector.spare_label: True -> False"}  # D-71, D-72
POSITIONS = {"detector.transformer.temperature: 20.0 -> 10000.0", "detector.transformer.position_offset: 0.0 -> -0.5"}  # D-73
TRAINED_LIKE_DETREX = {  # D-23
    "criterion.giou_eps: 0.0 -> 1e-06",
    "data.filter_empty: False -> True",
    "training.batch_size: 32 -> 16",
    "training.lr: 0.0002 -> 0.0001",
    "training.offset_lr_factor: 0.1 -> 1.0",
    "training.decay_norms: True -> False",
}
CORRECTED = {  # recipes that departed from their paper in version 0.1 -> all that has been corrected
    "stable-dino-4scale-r50-12ep": OF_DETREX | POSITIONS,
    "stable-dino-4scale-r50-24ep": OF_DETREX,
    "stable-dino-5scale-r50-12ep": OF_DETREX | POSITIONS,
    "stable-dino-4scale-swin-l-12ep": OF_DETREX | POSITIONS,
    "stable-dino-4scale-swin-l-24ep": OF_DETREX,
    "stable-deformable-detr-r50-12ep": TRAINED_LIKE_DETREX,
}


@every_version
def test_recipes_are_the_same(released: Path, archive: Archive) -> None:
    """What a version called by these names is what they mean today, but for what docs/decisions.md says was corrected since."""
    for name, plain in json.loads((released / archive.version / "recipes.json").read_text()).items():
        before, now = from_plain(plain, name), find(name)
        settled = (to_plain(replace(recipe, detector=recipe.detector.settled())) for recipe in (before, now))  # D-153
        changed = differences(*settled)
        assert set(changed) == CORRECTED.get(name, set()), name


# The archives themselves


@every_version
def test_a_list_names_what_its_archive_holds(released: Path, archive: Archive) -> None:
    folder = released / archive.version
    assert {path.name for path in (folder / "runs").iterdir()} == set(archive.runs)
    assert {path.name for path in (folder / "teachers").iterdir()} == {*filter(None, archive.runs.values())}


def needed_archive(version: str) -> str | None:
    """The archive that a version of pyproject.toml must have: X.Y of a final X.Y or X.Y.Z, none before the release."""
    found = Version(version)
    return None if found.is_prerelease else f"{found.major}.{found.minor}"


def test_only_final_versions_need_an_archive() -> None:
    needed = {"0.2.0.dev0": None, "0.2.0rc1": None, "0.2": "0.2", "0.2.0": "0.2", "0.2.3": "0.2", "1.10.0": "1.10"}
    assert {version: needed_archive(version) for version in needed} == needed


def test_every_released_version_has_its_archive() -> None:
    """Those that the table of tests/released/README.md lists, and that of pyproject.toml where it is final."""
    versions = set(re.findall(r"^\| `(\d+\.\d+)` \|", (RELEASED / "README.md").read_text(), re.MULTILINE))
    versions |= {needed_archive(tomllib.loads(PROJECT.read_text())["project"]["version"])} - {None}
    assert versions and versions == {archive.version for archive in ARCHIVES}, "see tests/released/README.md: write it, and add a row"


def test_an_archive_brings_its_own_list(tmp_path: Path) -> None:
    """A further version has other runs than the first; one without its list is not passed over."""
    for version in ("0.1", "0.9"):
        (tmp_path / f"{version}.tar.xz").touch()
    (tmp_path / "0.1.json").write_text((RELEASED / "0.1.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"0\.9\.json"):
        archives(tmp_path)
    (tmp_path / "0.9.json").write_text(json.dumps({"data": "shapes", "runs": {"new": None, "taught": "new"}, "compare": "a b"}))
    first, further = archives(tmp_path)
    assert (first.version, list(first.runs)) == ("0.1", list(ARCHIVES[0].runs))
    assert further == Archive("0.9", "shapes", {"new": None, "taught": "new"}, "a b")
