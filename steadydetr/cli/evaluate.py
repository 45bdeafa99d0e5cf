"""`steadydetr eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from steadydetr.cli.console import PlainConsole
from steadydetr.cli.parsing import Overwrite, parse
from steadydetr.cli.quick import check_use
from steadydetr.config import check_within
from steadydetr.files import printable, refuse_existing
from steadydetr.limits import Limits

DESCRIPTION = """COCO and VOC metrics of a checkpoint on a data set with the same classes, of LVIS data LVIS's; also of masks, where the
detector predicts them and the data has them.

  steadydetr eval runs/quickstart --data shapes
  steadydetr eval runs/mine/last --data path/to/coco --split val --output metrics.json
  steadydetr eval runs/mine --data path/to/coco --iou 0.3 0.625"""


@dataclass(frozen=True)
class EvalArguments:
    checkpoint: tyro.conf.Positional[Path]
    """A run (its best is taken), a checkpoint folder, or a converted one."""
    data: str
    """Folder of the data set, its data.yaml or JSON file, or shapes."""
    split: str = "val"
    """val, test or any split that the data has."""
    batch_size: int = 4
    """Images in one forward pass; the metrics do not depend on it."""
    workers: int = 4
    """Processes that load images."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1 or mps."""
    output: Path | None = None
    """JSON file for the metrics; the detections go beside it as COCO results."""
    overwrite: Overwrite = False
    """Replace --output if it is there."""
    nms: float | None = None
    """IoU of class-wise suppression; the checkpoint's own setting if not given."""
    iou: tuple[float, ...] = ()
    """Further IoUs, as in 0.3 0.625, at which AP is shown, over all classes and for each; AP50 and COCO's AP are always there."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()


def run(words: Sequence[str]) -> None:
    arguments = parse(EvalArguments, words, "eval", DESCRIPTION)
    check_within("", arguments, batch_size=(1, 10**6), workers=(0, 1000), nms=(0, 1))
    refuse_existing(arguments.output, arguments.overwrite)
    check_use(arguments.checkpoint, arguments.data, arguments.limits)
    from steadydetr.metrics.coco import iou_metrics
    from steadydetr.metrics.table import CLASS_METRICS, METRICS, percent
    from steadydetr.tools.evaluate import evaluate_checkpoint

    console = PlainConsole(soft_wrap=True)
    options = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
    evaluation = evaluate_checkpoint(**options, say=console.print)
    overall, each = zip(*map(iou_metrics, arguments.iou), strict=True) if arguments.iou else ((), ())
    measured = evaluation.values
    numbers = {metric.name: metric.label for metric in (*METRICS, *overall) if metric.name in measured}
    by_class = {metric.name: metric.label for metric in (*CLASS_METRICS, *each) if metric.name in measured}
    table = Table("metric", "%")
    for name, label in numbers.items():
        table.add_row(label, percent(getattr(evaluation, name), 2))
    console.print(table)
    classes = Table("class", *by_class.values())
    for name in evaluation.per_class:
        classes.add_row(printable(name), *(percent(getattr(evaluation, metric)[name], 2) for metric in by_class))
    console.print(classes)
    for warning in evaluation.warnings:
        console.print(f"Note on AP: {printable(warning)}")
