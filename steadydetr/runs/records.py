"""Runs read from their folders, for reports and figures: finished or still going on, of this version or an older one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from steadydetr.files import listed
from steadydetr.runs.folder import ASIDE, CONFIG, REQUIRED_KEYS, Record, RunFolder
from steadydetr.runs.record_types import PlannedRecipe, check_types

WEIGHTS_LABELS = {"model": "trained", "ema": "average"}  # by the name in records, the word that people read


@dataclass(frozen=True)
class Records:
    """What one run has written. The recipe stays plain JSON, so that one of another version can be read too."""

    label: str
    folder: Path
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    by_kind: dict[str, list[Record]]  # in the order of the file
    summary: dict[str, Any] | None  # None: not finished
    parameters: int | None  # None: no checkpoint yet
    left_out: tuple[str, ...] = ()  # records whose values are of wrong types, and why

    def of(self, kind: str, weights: str) -> list[Record]:
        """The records of a kind that are of these weights, "model" or "ema"."""
        return [record for record in self.by_kind[kind] if record["weights"] == weights]

    def last(self, kind: str, weights: str) -> Record | None:
        """The last of these records; None if there is none."""
        return next(reversed(self.of(kind, weights)), None)

    def after_epoch(self, epoch: int) -> Records:
        """What the run was after so many epochs, as a run of another label.

        Raises:
            ValueError: it was not measured then.
        """
        if not any(record["epoch"] == epoch for kind in ("eval", "stability") for record in self.by_kind[kind]):
            measured = sorted({record["epoch"] for record in self.by_kind["eval"]})
            raise ValueError(f"{self.folder}@{epoch}: the run was not measured after epoch {epoch}; it was after {listed(measured, 20)}")
        name = without_seed(self.label)
        before = {  # records of training count epochs from 0
            kind: [record for record in records if record.get("epoch", 0) + (kind == "train") <= epoch]
            for kind, records in self.by_kind.items()
        }
        return replace(self, label=f"{name} after epoch {epoch}{self.label.removeprefix(name)}", by_kind=before)

    @property
    def planned_epochs(self) -> int:
        return int(self.recipe["training"]["epochs"])

    @property
    def epochs_done(self) -> int:
        """Completed epochs. Records of training count epochs from 0, so that one of epoch 3 comes after 3 completed ones."""
        return max([record["epoch"] for kind in ("train", "eval") for record in self.by_kind[kind]], default=0)

    @property
    def step(self) -> int:
        return max([record["step"] for kind in ("train", "eval") for record in self.by_kind[kind]], default=0)

    @property
    def planned_steps(self) -> int | None:
        """None before the first evaluation, which is the first record that tells how many steps an epoch has."""
        last = self.last("eval", "model")
        return None if last is None else last["step"] // max(last["epoch"], 1) * self.planned_epochs

    @property
    def images_seen(self) -> int:
        return self.step * int(self.recipe["training"]["batch_size"])

    @property
    def images_per_second(self) -> float | None:
        speeds = [record["images_per_second"] for record in self.by_kind["train"]]
        return median(speeds) if speeds else None

    @property
    def memory_gib(self) -> float | None:
        return max([record["memory_gib"] for record in self.by_kind["train"] if "memory_gib" in record], default=None)

    @property
    def best(self) -> Record | None:
        """The evaluation with the highest AP, of trained or averaged weights."""
        return max(self.by_kind["eval"], key=lambda record: record["ap"], default=None)


def read_runs(places: Sequence[Path]) -> list[Records]:
    """The runs at `places`, each a run or a folder with runs below it, in order; a run that is found twice is read once.

    Raises:
        FileNotFoundError: a place holds no run.
        ValueError: a file of a run is damaged; names it, and the line.
    """
    short_names: dict[Path, str] = {}
    for place in places:
        below = sorted(run_folders(place), key=_by_numbers)
        if not below:
            raise FileNotFoundError(
                f"{place} holds no run: there is no config.json with a recipe in it or below; `steadydetr train` makes one"
            )
        for folder in below:
            short_name = _short_name(folder.resolve()) if folder == place else folder.relative_to(place).as_posix()
            short_names.setdefault(folder.resolve(), short_name)
    return [read_run(folder, _label(folder, short_names)) for folder in short_names]


def read_runs_at_epochs(places: Sequence[Path]) -> tuple[list[Records], list[Records]]:
    """The runs at `places`, and those of places like runs/mine@3 as they were after that epoch. A path that is there is never cut.

    Raises:
        FileNotFoundError, ValueError: as `read_runs`, or a run was not measured after that epoch.
    """
    named = {place: re.fullmatch(r"(.+)@(\d+)", str(place)) for place in places if not place.exists()}
    early = [run.after_epoch(int(at[2])) for at in named.values() if at for run in read_runs([Path(at[1])])]
    return read_runs([place for place in places if not named.get(place)]), early


def _short_name(folder: Path) -> str:
    """The last part of the path; of a run that `steadydetr compare` made, the last two: LABEL/seedK."""
    return "/".join(folder.parts[-2:]) if re.fullmatch(r"seed\d+", folder.name) else folder.name


def _label(folder: Path, short_names: Mapping[Path, str]) -> str:
    """The short name. Where several runs have the same one: the path below the last folder that all of these lie in."""
    same = [other for other, short_name in short_names.items() if short_name == short_names[folder]]
    if len(same) == 1:
        return short_names[folder]
    return folder.relative_to(os.path.commonpath([other.parent for other in same])).as_posix()


def run_folders(place: Path) -> Iterator[Path]:
    """`place` if it is a run, or else the runs below it. Runs that version 0.1 renamed to RUN-unsaved1 are left out."""
    for name, below, files in os.walk(place):
        folder = Path(name)
        if CONFIG in files and RunFolder(folder).holds_run:
            below.clear()  # os.walk then goes no deeper
            yield folder
        below[:] = [child for child in below if not re.search(rf"{ASIDE}\d+$", child)]


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """A key for sorting that puts seed2 before seed10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path.as_posix())]


def read_run(folder: Path, label: str) -> Records:
    """One run, called `label`; a ValueError names a damaged file."""
    run = RunFolder(folder)
    config = run.read_config()
    check_types(config.plain_recipe, PlannedRecipe, f"{config.where}: recipe")
    by_kind: dict[str, list[Record]] = {kind: [] for kind in REQUIRED_KEYS}
    left_out: list[str] = []
    for record in run.read_records(left_out):
        by_kind.setdefault(record["kind"], []).append(record)
    summary, parameters = run.read_summary(), run.count_parameters()
    return Records(label, folder, config.plain_recipe, config.classes, by_kind, summary, parameters, tuple(left_out))


def without_seed(label: str) -> str:
    """LABEL/seedK -> LABEL; other labels stay as they are."""
    return re.sub(r"/seed\d+$", "", label)


def by_recipe(runs: Sequence[Records]) -> dict[str, list[Records]]:
    """Runs that are called LABEL/seedK together under LABEL; any other run by itself."""
    found: dict[str, list[Records]] = {}
    for run in runs:
        found.setdefault(without_seed(run.label), []).append(run)
    return {name if len(members) > 1 else members[0].label: members for name, members in found.items()}
