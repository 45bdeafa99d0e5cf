"""The folder of a run. Its config, records, summary and checkpoints are read and written here and nowhere else.

config.json                        the resolved recipe and the classes of the data
metrics.jsonl                      a record, as one line, of every logged step, evaluation and measurement of stability
last/, best/                       checkpoints; a run can be resumed from either
ema/                               the averaged weights as a checkpoint of their own, where weights are averaged
summary.json                       what the finished run came to
curves.png, predictions.png, sampling.png    drawn when the run is finished
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from steadydetr.checkpoints.folder import WEIGHTS, DetectorCard, find_checkpoint, save_detector
from steadydetr.config import FORMAT, check_format, differences, from_plain, refuse_network, renewed
from steadydetr.files import parse_json, printable, read_bytes, read_json_object, write_json
from steadydetr.learning.criterion import Criterion
from steadydetr.metrics.table import REQUIRED_NAMES
from steadydetr.old_formats import upgrade
from steadydetr.runs.record_types import RECORDS, ConfigFile, SummaryFile, check_types
from steadydetr.tensor_files import tensor_shapes

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
LAST, BEST, AVERAGE = "last", "best", "ema"
CURVES, PREDICTIONS, SAMPLING = "curves.png", "predictions.png", "sampling.png"
ASIDE = "-unsaved"  # a folder RUN-unsaved1 was a run that stopped before its first checkpoint
NEEDED = {  # the keys that a record of each kind must have; records of other kinds are passed on unchecked
    "train": ("step", "epoch", "loss", "losses", "lr", "gradient_norm", "images_per_second"),
    "eval": ("step", "epoch", "weights", *REQUIRED_NAMES),
    "stability": ("step", "epoch", "weights", "unstable_score", "between_stages", "between_epochs", "consistency"),
}
NOT_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked")  # statistics of batch norm
Record = dict[str, Any]


@dataclass(frozen=True)
class RunConfig:
    """What config.json holds. The recipe stays plain JSON, so that one of another version can be read too."""

    plain_recipe: dict[str, Any]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    where: str = CONFIG  # the file, for error messages

    def recipe(self) -> Any:
        """The `Recipe`; a ValueError says what this version does not understand of it."""
        return from_plain(self.plain_recipe, f"{self.where}: recipe")

    def criterion(self) -> Criterion:
        """The recipe's criterion alone; the rest of the recipe need not be understood."""
        found = from_plain(self.plain_recipe.get("criterion"), f"{self.where}: recipe.criterion")
        if not isinstance(found, Criterion):
            raise ValueError(f"{self.where}: recipe.criterion is a {type(found).__name__}")
        return found

    def as_plain(self) -> dict[str, Any]:
        return {"format": FORMAT, "recipe": self.plain_recipe, "classes": list(self.classes), "category_ids": list(self.category_ids)}


@dataclass(frozen=True)
class RunFolder:
    """A run on disk. Nothing is read or written before a method is called; damaged files are ValueErrors that name the file."""

    path: Path

    @property
    def is_started(self) -> bool:
        """Whether there is a config.json: of a run, or of a checkpoint."""
        return (self.path / CONFIG).exists()

    @property
    def holds_run(self) -> bool:
        """Whether the config.json is that of a run: checkpoints have one too, without a recipe."""
        return self.is_started and "recipe" in read_json_object(self.path / CONFIG)

    def read_config(self) -> RunConfig:
        path = self.path / CONFIG
        content = read_json_object(path)
        if not isinstance(content.get("recipe"), dict):
            raise ValueError(f"{path} holds no recipe, so it is not that of a run")
        check_format(content, str(path))
        check_types(content, ConfigFile, str(path))
        return RunConfig(upgrade(content["recipe"]), tuple(content.get("classes", ())), tuple(content.get("category_ids", ())), str(path))

    def refuse_another_run(self) -> None:
        """Raise FileExistsError if the folder holds a run or a checkpoint."""
        if self.is_started:
            raise FileExistsError(f"{self.path} already holds a run: go on with it by --resume, or choose another --output")

    def start(self, config: RunConfig) -> None:
        """Start a new run in this folder."""
        self.refuse_another_run()
        write_json(self.path / CONFIG, config.as_plain())

    def resume(self, config: RunConfig) -> Path:
        """The checkpoint to go on from: `last`, or `best` where there is no other.

        Raises:
            FileNotFoundError: the run has no checkpoint.
            ValueError: the run was started with another recipe or other classes; says what differs.
        """
        checkpoint = self.find_checkpoint()
        before = self.read_config().as_plain()
        before["recipe"] = renewed(before["recipe"], f"{self.path / CONFIG}: recipe")
        if changed := differences(_what_is_trained(before), _what_is_trained(json.loads(json.dumps(config.as_plain())))):
            raise ValueError(f"{self.path} was started with another recipe; a resumed run keeps its own. Differences: {'; '.join(changed)}")
        return checkpoint

    def move_aside(self) -> None:
        """Rename the folder of a run that stopped before its first checkpoint, so that the run can start anew."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}{ASIDE}{number}")).exists():
            number += 1
        self.path.rename(aside)

    def read_records(self, left_out: list[str] | None = None) -> Iterator[Record]:
        """The records of metrics.jsonl in the order of the file; none where there is no such file yet.

        The last line may be half written, as a running or killed training leaves it: it is passed over.

        Args:
            left_out: gets what is wrong with records that have a text, or another wrong value, where a number belongs; None: an error.
        """
        path = self.path / METRICS
        lines = read_bytes(path).split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            where = f"{printable(path)}, line {number}"
            try:
                record = parse_json(line, where)
            except ValueError:
                if number == len(lines):
                    return
                raise ValueError(f"{where}: no JSON record; remove the line, or bring the file back from a copy") from None
            kind = record.get("kind") if isinstance(record, dict) else None
            missing = ["kind"] if not isinstance(kind, str) else [name for name in NEEDED.get(kind, ()) if name not in record]
            if missing:
                raise ValueError(f"{where}: the record has no {', '.join(missing)}; remove the line")
            if kind in RECORDS:
                try:
                    check_types(record, RECORDS[kind], where, "; remove the line")
                except ValueError as error:
                    if left_out is None:
                        raise
                    left_out.append(str(error))
                    continue
            yield record

    def append_record(self, record: Record) -> None:
        with open(self.path / METRICS, "a") as file:
            file.write(json.dumps(record) + "\n")

    def trim_records(self, step: int) -> None:
        """Take out what was logged after `step`, where the run is resumed: those steps are about to be repeated."""
        path = self.path / METRICS
        if path.exists():
            fresh = path.with_suffix(".new")
            fresh.write_text("".join(f"{json.dumps(record)}\n" for record in self.read_records() if record.get("step", 0) <= step))
            os.replace(fresh, path)

    def read_summary(self) -> dict[str, Any] | None:
        """What summary.json holds; None if the run is not finished."""
        path = self.path / SUMMARY
        if not path.exists():
            return None
        summary = read_json_object(path)
        check_types(summary, SummaryFile, str(path))
        return summary

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path / SUMMARY, dict(summary))

    def find_checkpoint(self) -> Path:
        """The run's latest checkpoint: `last`, or `best` where there is no other; a FileNotFoundError says what was looked for."""
        return find_checkpoint(self.path, prefer=(LAST, BEST))

    def save_checkpoint(self, name: str, state: Mapping[str, Tensor], card: DetectorCard, extra: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint `name` of the run, as `save_detector` does."""
        save_detector(self.path / name, state, card, extra)

    def not_finite_path(self, step: int, process: int) -> Path:
        """Where a process keeps a batch whose loss is not finite."""
        return self.path / f"not-finite-step{step}-process{process}.pt"

    def count_parameters(self) -> int | None:
        """Parameters of the detector, frozen ones included, from the header of a checkpoint's file; None: there is no checkpoint yet."""
        for name in (LAST, BEST):
            path = self.path / name / WEIGHTS
            try:
                shapes = tensor_shapes(path)
            except FileNotFoundError:
                continue
            return sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(NOT_PARAMETERS))
        return None


def _what_is_trained(plain: dict[str, Any]) -> dict[str, Any]:
    """A run's config without what a resumed run may change.

    Teachers may have been moved: `restore` recognises them by their weights. Sinks only look on.
    """
    teachers = [{name: value for name, value in teacher.items() if name != "checkpoint"} for teacher in plain["recipe"]["teachers"]]
    recipe = {name: value for name, value in plain["recipe"].items() if name != "sinks"}
    return plain | {"recipe": recipe | {"teachers": teachers}}


def read_recipe(path: Path) -> Any:
    """The recipe in a file: the config.json of a run, or a recipe alone, as `steadydetr compare` writes it."""
    content = read_json_object(path)
    check_format(content, str(path))
    plain = content.get("recipe", content)
    refuse_network(plain, str(path))
    return from_plain(plain, str(path))


def run_criterion(checkpoint: Path) -> Criterion:
    """The criterion of the run that a checkpoint folder lies in; the default one where it lies in none."""
    run = RunFolder(checkpoint.parent)
    return run.read_config().criterion() if run.holds_run else Criterion()
