"""The folder of a run. Its config, records, summary and checkpoints are read and written here and nowhere else.

config.json                        the resolved recipe, the classes of the data, and a digest of the data of each split
metrics.jsonl                      a record, as one line, of every logged step, evaluation and measurement of stability
last/, best/                       checkpoints; a run can be resumed from either
ema/                               the averaged weights as a checkpoint of their own, where weights are averaged
splits.json                        which images are trained on and which are held out, of data that bring no split to validate on
start.json                         what was taken from the weights that the run started from, if from any
summary.json                       what the finished run came to
curves.png, predictions.png, sampling.png    drawn when the run is finished
.steadydetr, .lock                 whose folder it is, and whether a process is writing into it
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.finding import WEIGHTS, find_checkpoint
from steadydetr.checkpoints.folder import load_progress, restore_replaced, save_detector, save_progress
from steadydetr.config import FORMAT, check_format, differences, from_plain, to_plain
from steadydetr.data.config import DataConfig
from steadydetr.data.division import Division
from steadydetr.data.hold_out import HoldOut
from steadydetr.files import (
    claim_folder,
    folder_made_by,
    parse_json,
    printable,
    read_bytes,
    read_json_object,
    remove_unfinished,
    write_json,
    write_text,
)
from steadydetr.learning.criterion import Criterion
from steadydetr.metrics.table import REQUIRED_NAMES
from steadydetr.old_formats import upgrade
from steadydetr.runs.lock import FolderLock
from steadydetr.runs.occupied import AVERAGE, BEST, COMMAND, CONFIG, LAST, METRICS, SUMMARY, refuse_another_run
from steadydetr.runs.record_types import RECORDS, ConfigFile, SplitsFile, SummaryFile, check_types
from steadydetr.tensor_files import tensor_shapes

SPLITS, START = "splits.json", "start.json"
CURVES, PREDICTIONS, SAMPLING = "curves.png", "predictions.png", "sampling.png"
ASIDE = "-unsaved"  # version 0.1 renamed a run that stopped before its first checkpoint to RUN-unsaved1
REQUIRED_KEYS = {  # of a record, by its kind; records of other kinds are not checked
    "train": ("step", "epoch", "loss", "losses", "lr", "gradient_norm", "images_per_second"),
    "eval": ("step", "epoch", "weights", *REQUIRED_NAMES),
    "stability": ("step", "epoch", "weights", "unstable_score", "between_stages", "between_epochs", "consistency"),
}
NOT_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked")  # statistics of batch norm
Record = dict[str, Any]
EPOCHS = "recipe.training.epochs:"  # how the line of `changes` begins that tells of another number of epochs


@dataclass(frozen=True)
class RunConfig:
    """What config.json holds. The recipe stays plain JSON, so that one of another version can be read too."""

    plain_recipe: dict[str, Any]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    data: dict[str, str] = field(default_factory=dict)  # by split, `AnnotationIndex.identity`; empty in runs of version 0.1
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
        classes = {"classes": list(self.classes), "category_ids": list(self.category_ids)}
        return {"format": FORMAT, "recipe": self.plain_recipe, "data": self.data} | classes


@dataclass(frozen=True)
class RunFolder:
    """The only reader and writer of a run's files. A method that meets a damaged file raises a ValueError that names it."""

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
        classes, ids, data = content.get("classes", ()), content.get("category_ids", ()), content.get("data", {})
        return RunConfig(upgrade(content["recipe"]), tuple(classes), tuple(ids), data, str(path))

    def goes_on(self, resume: bool | Literal["auto"]) -> bool:
        """Whether the folder's run is to go on; False: a new one is to be started.

        Args:
            resume: False for a new run, True to go on with one, "auto" for whichever is possible.

        Raises:
            FileExistsError: a new run cannot be started because of what the folder holds.
            FileNotFoundError: there is no run to go on with.
        """
        if resume and self.is_started:
            return True
        if resume is True and folder_made_by(self.path) != COMMAND:
            there = "holds no run" if self.path.exists() else "does not exist"
            raise FileNotFoundError(f"{self.path} {there}, so there is nothing to resume: leave --resume out, or give --resume auto")
        self.refuse_another_run()
        return False

    def refuse_another_run(self) -> None:
        """Raise FileExistsError unless a new run can be started in the folder."""
        refuse_another_run(self.path)

    def claim(self, lock: FolderLock) -> None:
        """Mark the folder as that of a new run, and take its lock. The run is started by `write_config`."""
        self.refuse_another_run()
        claim_folder(self.path, COMMAND, again=True)
        lock.take()
        self.refuse_another_run()  # another process may have been faster
        remove_unfinished(self.path)

    def write_config(self, config: RunConfig) -> None:
        """Write config.json. From then on the folder holds a run."""
        write_json(self.path / CONFIG, config.as_plain())

    def reopen(self, lock: FolderLock) -> None:
        """Take the lock of a run that is to go on, and remove or rename back what was half written when it was killed."""
        if not self.holds_run:
            raise FileExistsError(f"{self.path} holds a checkpoint and no run, so it cannot go on: choose another --output")
        lock.take()
        remove_unfinished(self.path)
        for name in (LAST, BEST, AVERAGE):
            restore_replaced(self.path / name)

    def resume(self, config: RunConfig) -> Path | None:
        """The checkpoint to go on from: `last`, or `best` if there is no `last`; None if the run stopped before its first checkpoint.

        Another number of epochs is taken where the rates until now are those of the longer run.

        Raises:
            ValueError: the run was started with another recipe, other classes or other data; says what differs.
        """
        before, checkpoint = self.read_config(), self.latest_checkpoint
        changed = changes(before, config)
        of_length, why_not = [line for line in changed if line.startswith(EPOCHS)], ""
        if of_length and checkpoint is not None:
            why_not = why_not_longer(before, config, int(load_progress(checkpoint).get("epochs_done", 0)))
        if changed != of_length or why_not:
            kept, more = "a run that goes on keeps what it began with", f". {why_not}" if why_not else ""
            raise ValueError(f"{self.path} was started otherwise, and {kept}. Differences: {'; '.join(changed)}{more}")
        return checkpoint

    def read_records(self, left_out: list[str] | None = None) -> Iterator[Record]:
        """The records of metrics.jsonl in the order of the file; none where there is no such file yet.

        The last line may be half written, as a running or killed training leaves it: it is passed over.

        Args:
            left_out: a list that gets a message for every record with a value of a wrong type, which is then left out. None: such a
                record is an error.

        Raises:
            ValueError: a line holds no record, or the record lacks a key; names the line.
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
            missing = ["kind"] if not isinstance(kind, str) else [name for name in REQUIRED_KEYS.get(kind, ()) if name not in record]
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

    def trim_records(self, step: int, epochs_done: int) -> None:
        """Remove the records of steps after `step` and of evaluations after epoch `epochs_done`, which a resumed run logs again."""
        path = self.path / METRICS
        if os.path.lexists(path):
            known = [record for record in self.read_records() if record.get("step", 0) <= step]
            kept = [record for record in known if record["kind"] == "train" or record.get("epoch", 0) <= epochs_done]
            write_text(path, "".join(f"{json.dumps(record)}\n" for record in kept))

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
        """The run's latest checkpoint: `last`, or `best` if there is no `last`; a FileNotFoundError says what was looked for."""
        return find_checkpoint(self.path, prefer=(LAST, BEST))

    @property
    def latest_checkpoint(self) -> Path | None:
        """The same; None if there is none yet."""
        try:
            return self.find_checkpoint()
        except FileNotFoundError:
            return None

    def save_checkpoint(
        self,
        name: str,
        state: Mapping[str, Tensor],
        card: DetectorCard,
        training_state: Mapping[str, Any] | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the checkpoint `name` of the run, as `save_detector` does."""
        save_detector(self.path / name, state, card, training_state, progress)

    def save_progress(self, name: str, progress: Mapping[str, Any]) -> None:
        """Replace the progress in the run's checkpoint `name`, whose weights stay as they are."""
        save_progress(self.path / name, progress)

    def write_start(self, start: Mapping[str, Any]) -> None:
        """Write what the run took from the weights that it started from."""
        write_json(self.path / START, dict(start))

    def write_splits(self, divisions: Sequence[Division]) -> None:
        """Write how data without a split to validate on are divided."""
        write_json(self.path / SPLITS, {"format": FORMAT, "divisions": [asdict(division) for division in divisions]})

    def read_splits(self) -> list[Division]:
        """What `write_splits` wrote; none where nothing had to be divided."""
        path = self.path / SPLITS
        if not path.exists():
            return []
        content = read_json_object(path)
        check_format(content, str(path))
        check_types(content, SplitsFile, str(path))
        return [Division(d["place"], d["split"], tuple(d["train"]), tuple(d["val"])) for d in content["divisions"]]

    def best_progress(self) -> dict[str, Any] | None:
        """The progress that was saved with `best`, with its AP; None if there is no `best`."""
        try:
            return load_progress(find_checkpoint(self.path / BEST, prefer=()))
        except FileNotFoundError:
            return None

    def not_finite_path(self, step: int, process: int) -> Path:
        """Where a process keeps a batch whose loss is not finite."""
        return self.path / f"not-finite-step{step}-process{process}.pt"

    def count_parameters(self) -> int | None:
        """Number of the detector's parameters, frozen ones included, from the header of the weights; None if there is no checkpoint yet."""
        for name in (LAST, BEST):
            path = self.path / name / WEIGHTS
            try:
                shapes = tensor_shapes(path)
            except FileNotFoundError:
                continue
            return sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(NOT_PARAMETERS))
        return None


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """The differences between two configs in fields that decide what is learned, as 'field: before -> now'.

    `changeable` fields may differ. Data are compared by content, wherever they lie. A run of version 0.1 holds no digest of them, so that
    its data must lie where they were. Teachers are not compared here but by their weights, in `restore`.
    """
    knows_data = bool(before.data)
    return differences(_decisive(before, knows_data), _decisive(now, knows_data))


def why_not_longer(before: RunConfig, now: RunConfig, done: int) -> str:
    """Why a run cannot go on with another number of epochs; empty where it would have come to the same weights until now.

    Args:
        done: epochs that the run has done.
    """
    old, new = before.recipe(), now.recipe()
    past = [[drop for drop in recipe.training.drops if drop < done] for recipe in (old, new)]
    if old.training.schedule != "step" or past[0] != past[1]:
        reason = "its learning rate was laid out for its first number of epochs"
    elif any(teacher.decay_for(10**3) != teacher.decay_for(10**6) for teacher in old.teachers):
        reason = "its teacher is an average over a share of all its steps"
    elif old.training.ema_decay is None:
        reason = "its averaged weights are an average over a share of all its steps"
    elif new.training.epochs < done:
        reason = f"it has done {done} epochs"
    else:
        return ""
    return f"The number of epochs cannot change, because {reason}: start a new run from its weights, by --from instead of --resume"


def _decisive(config: RunConfig, knows_data: bool) -> dict[str, Any]:
    """The fields that decide what a run learns, as plain JSON values."""
    recipe = to_plain(config.recipe(), "recipe", decisive=True)
    data = config.data if knows_data else _places(config)
    return {"recipe": recipe, "classes": list(config.classes), "category_ids": list(config.category_ids), "data": data}


def _places(config: RunConfig) -> dict[str, list[str]]:
    """Where the data of a run lie."""
    data = config.plain_recipe["data"]
    return {
        name: [str(Path(place).expanduser().resolve()) if Path(place).exists() else place for place in data.get(name, "").split("+")]
        for name in ("source", "val_source")
    }


def run_criterion(checkpoint: Path, otherwise: Criterion | None = None) -> Criterion:
    """The criterion of the run that a checkpoint folder lies in; `otherwise`, or the default one, where it lies in none."""
    run = RunFolder(checkpoint.parent)
    return run.read_config().criterion() if run.holds_run else otherwise or Criterion()


def run_divisions(checkpoint: Path) -> tuple[HoldOut, list[Division], bool]:
    """How the run that a checkpoint folder lies in divides data, how it has divided its own, and whether it reads masks: what `open_data`
    takes. The defaults where it lies in none."""
    run = RunFolder(checkpoint.parent)
    if not run.holds_run:
        return HoldOut(), [], False
    data = from_plain(run.read_config().plain_recipe.get("data"), f"{run.path / CONFIG}: recipe.data")
    known = isinstance(data, DataConfig)
    return data if known else HoldOut(), run.read_splits(), known and data.masks
