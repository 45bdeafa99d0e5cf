"""What runs have written, read back: finished or still going on, of this version or an older one."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from steadydetr.config import from_plain
from steadydetr.learning.criterion import Criterion
from steadydetr.metrics.table import REQUIRED_NAMES

WEIGHTS = {"model": "trained", "ema": "average"}  # what records call them, and what people read
NEEDED = {  # of a record, by its kind; other kinds are for other readers
    "train": ("step", "epoch", "loss", "losses", "lr", "gradient_norm", "images_per_second"),
    "eval": ("step", "epoch", "weights", *REQUIRED_NAMES),
    "stability": ("step", "epoch", "weights", "unstable_score", "between_stages", "between_epochs", "consistency"),
}
NOT_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm


@dataclass(frozen=True)
class Records:
    """A run as its files tell it. The recipe stays plain, so that one of another version can be read too."""

    label: str
    folder: Path
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    by_kind: dict[str, list[dict[str, Any]]]  # in the order of the file
    summary: dict[str, Any] | None  # None: not finished
    parameters: int | None  # None: no checkpoint yet

    def of(self, kind: str, weights: str) -> list[dict[str, Any]]:
        return [record for record in self.by_kind[kind] if record["weights"] == weights]

    def last(self, kind: str, weights: str) -> dict[str, Any] | None:
        return next(reversed(self.of(kind, weights)), None)

    @property
    def planned_epochs(self) -> int:
        return int(self.recipe["training"]["epochs"])

    @property
    def epochs_done(self) -> int:
        """A step that is logged in epoch e, counted from 0, has e whole epochs behind it."""
        return max([record["epoch"] for kind in ("train", "eval") for record in self.by_kind[kind]], default=0)

    @property
    def step(self) -> int:
        return max([record["step"] for kind in ("train", "eval") for record in self.by_kind[kind]], default=0)

    @property
    def planned_steps(self) -> int | None:
        """Known from the first evaluation on: those of a run come at the ends of epochs."""
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
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the highest AP, of whichever weights."""
        return max(self.by_kind["eval"], key=lambda record: record["ap"], default=None)


def read_all(places: Sequence[Path]) -> list[Records]:
    """The runs at `places`, each a run or a folder with runs below it, in order; a run that is met twice is taken once.

    Raises:
        FileNotFoundError: a place holds no run.
        ValueError: a file of a run is damaged; names it, and the line.
    """
    shorts: dict[Path, str] = {}
    for place in places:
        below = sorted(run_folders(place), key=_natural)
        if not below:
            raise FileNotFoundError(
                f"{place} holds no run: there is no config.json with a recipe in it or below; `steadydetr train` makes one"
            )
        for folder in below:
            short = _name(folder.resolve()) if folder == place else folder.relative_to(place).as_posix()
            shorts.setdefault(folder.resolve(), short)
    return [read(folder, _label(folder, shorts)) for folder in shorts]


def _name(folder: Path) -> str:
    """The folder's own name; LABEL/seedK of a run that `compare` made."""
    return "/".join(folder.parts[-2:]) if re.fullmatch(r"seed\d+", folder.name) else folder.name


def _label(folder: Path, shorts: Mapping[Path, str]) -> str:
    """The short name, or where several runs have that one, the path from where they part."""
    same = [other for other, short in shorts.items() if short == shorts[folder]]
    if len(same) == 1:
        return shorts[folder]
    return folder.relative_to(os.path.commonpath([other.parent for other in same])).as_posix()


def run_folders(place: Path) -> Iterator[Path]:
    """`place` if it is a run, or the runs below it, less those that `compare` moved aside. Checkpoints have a config.json too."""
    for name, below, files in os.walk(place):
        folder = Path(name)
        if "config.json" in files and "recipe" in read_json(folder / "config.json"):
            below.clear()
            yield folder
        below[:] = [child for child in below if not re.search(r"-unsaved\d+$", child)]


def _natural(path: Path) -> list[tuple[int, str]]:
    """seed2 before seed10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path.as_posix())]


def read(folder: Path, label: str) -> Records:
    config = read_json(folder / "config.json")
    recipe, classes = config["recipe"], config.get("classes", [])
    if not isinstance(recipe, dict) or not {"epochs", "batch_size", "seed"} <= recipe.get("training", {}).keys():
        raise ValueError(f"{folder / 'config.json'}: its recipe has no training with epochs, batch_size and seed")
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in NEEDED}
    for record in read_metrics(folder / "metrics.jsonl"):
        by_kind.setdefault(record["kind"], []).append(record)
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else None
    return Records(label, folder, recipe, tuple(classes), by_kind, summary, count_parameters(folder))


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, no JSON can be read from it: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__} instead of an object")
    return content


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl; nothing where there is none yet. The last line may be half written, as a running training leaves it."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: no JSON record; remove the line, or bring the file back from a copy") from None
        kind = record.get("kind") if isinstance(record, dict) else None
        missing = ["kind"] if not isinstance(kind, str) else [name for name in NEEDED.get(kind, ()) if name not in record]
        if missing:
            raise ValueError(f"{path}, line {number}: the record has no {', '.join(missing)}; remove the line")
        yield record


def count_parameters(folder: Path) -> int | None:
    """From the head of a checkpoint's file, frozen parameters included; None where there is no checkpoint."""
    for name in ("last", "best"):
        path = folder / name / "model.safetensors"
        try:
            with open(path, "rb") as file:
                head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except FileNotFoundError:
            continue
        except (ValueError, OverflowError, MemoryError):
            raise ValueError(f"{path} is damaged: it does not begin as a safetensors file does") from None
        return sum(math.prod(t["shape"]) for key, t in head.items() if key != "__metadata__" and not key.endswith(NOT_PARAMETERS))
    return None


def group_of(label: str) -> str:
    """LABEL/seedK without its seed."""
    return re.sub(r"/seed\d+$", "", label)


def groups(runs: Sequence[Records]) -> dict[str, list[Records]]:
    """Runs that differ in their seed only by name, LABEL/seedK, together under LABEL; any other run by itself."""
    found: dict[str, list[Records]] = {}
    for run in runs:
        found.setdefault(group_of(run.label), []).append(run)
    return {name if len(members) > 1 else members[0].label: members for name, members in found.items()}


def run_criterion(folder: Path) -> Criterion:
    """The criterion of the run that a checkpoint folder lies in, the default one where it lies in none."""
    path = folder.parent / "config.json"
    if path.exists() and "recipe" in (plain := json.loads(path.read_text())):
        return from_plain(plain["recipe"]["criterion"], str(path))
    return Criterion()
