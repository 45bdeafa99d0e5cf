"""`steadydetr stability`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table

from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.cli.console import PlainConsole
from steadydetr.cli.parsing import Overwrite, parse
from steadydetr.cli.quick import check_recipe, check_use
from steadydetr.config import check_within
from steadydetr.files import refuse_existing, write_json
from steadydetr.limits import Limits

if TYPE_CHECKING:
    from steadydetr.metrics.stability import Stability

DESCRIPTION = """How steadily a detector matches: every held-out image is matched at every decoder stage, and the stages are compared.

  steadydetr stability runs/quickstart shapes                        a run: its last checkpoint, trained and averaged weights
  steadydetr stability runs/dino/best path/to/coco --images 5000
  steadydetr stability runs/a path/to/data --against runs/b          instability between two checkpoints, as between epochs"""


@dataclass(frozen=True)
class StabilityArguments:
    checkpoint: tyro.conf.Positional[Path]
    """A run (its last is taken), a checkpoint folder, or a converted one."""
    data: tyro.conf.Positional[str]
    """Folder of the data set, its data.yaml or JSON file, or shapes."""
    split: str = "val"
    """val, test or any split that the data has."""
    images: int | None = None
    """Only the first images that have objects; all of them if not given."""
    against: Path | None = None
    """An earlier checkpoint of the same detector: the instability between the two is that between epochs."""
    criterion: str = ""
    """Recipe whose matcher is used; the run's own if not given, for a converted checkpoint Deformable DETR's and DINO's."""
    batch_size: int = 4
    """Images in one forward pass."""
    workers: int = 4
    """Processes that load images."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1 or mps."""
    output: Path | None = None
    """JSON file for the measures."""
    overwrite: Overwrite = False
    """Replace --output if it is there."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()


def run(words: Sequence[str]) -> None:
    arguments = parse(StabilityArguments, words, "stability", DESCRIPTION)
    check_within("", arguments, batch_size=(1, 10**6), workers=(0, 1000), images=(1, 10**9))
    refuse_existing(arguments.output, arguments.overwrite)
    find_checkpoint(arguments.checkpoint.expanduser())
    if arguments.criterion:
        check_recipe(arguments.criterion)
    check_use(arguments.checkpoint, arguments.data, arguments.limits)
    from steadydetr.recipes import find
    from steadydetr.tools.evaluate import measure_checkpoint

    measured = measure_checkpoint(
        arguments.checkpoint,
        arguments.data,
        split=arguments.split,
        images=arguments.images,
        against=arguments.against,
        criterion=find(arguments.criterion).criterion if arguments.criterion else None,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=arguments.device,
        limits=arguments.limits,
    )
    rows = [named(m) for m in measured.values()]
    table = Table("measure", *("trained" if name == "model" else "average" for name in measured))
    for name in rows[0]:
        table.add_row(name, *(f"{row[name]:.3f}" if name in row else "-" for row in rows))
    console = PlainConsole()
    console.print(table)
    first = next(iter(measured.values()))
    console.print(f"{first.images} images with {first.objects} objects")
    if arguments.output is not None:
        write_json(arguments.output, {name: asdict(value) for name, value in measured.items()})


def named(m: Stability) -> dict[str, float]:
    """The measures, by the names that the table shows."""
    rows = {f"unstable score, layer {layer}, %": score for layer, score in m.unstable_score.items()}
    rows |= {f"IS, stages {k} and {k + 1}": value for k, value in enumerate(m.between_stages, 1)}
    if m.between_epochs is not None:
        rows["instability against the other"] = m.between_epochs
    return rows | {f"same target in both, stage {stage}, %": share for stage, share in enumerate(m.consistency or (), 1)}
