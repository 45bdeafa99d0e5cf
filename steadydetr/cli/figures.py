"""`steadydetr figures`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from steadydetr.cli.parsing import Overwrite, parse
from steadydetr.cli.quick import check_places
from steadydetr.config import check_within
from steadydetr.limits import Limits

DESCRIPTION = """The papers' figures, drawn of your runs, as files.

  steadydetr figures runs/baseline runs/od                           curves of all runs
  steadydetr figures runs/baseline runs/od --data path/to/data       also where their queries look
  steadydetr figures runs/teacher runs/student runs/distilled@1      the last run as it was after its first epoch

unstable-score           Stable-DINO Fig. 3: by decoder layer
instability              OD-DETR Fig. 1: between epochs, trained and averaged weights
consistency              OD-DETR Fig. 5: share of queries with the same object in both
ap-around-drop           OD-DETR Fig. 6: with and without Stop Update or prediction distillation, whatever the runs are
instability-by-stage     DETRDistill Fig. 7: IS^k, there of a distilled student after its first epoch
sampling-points          OD-DETR Fig. 7: of the same objects, a column a model
query-masks              DETRDistill Fig. 4: where a teacher's features answer to one query, of the best and the poorest
level-masks              DETRDistill Fig. 6: to all its queries by their quality, level by level
activation               DETRDistill Fig. 2: mean of |F|, before and after the teacher's encoder"""


@dataclass(frozen=True)
class FiguresArguments:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of runs, or folders with runs below them; RUN@3 for the curves of a run as it was after epoch 3."""
    output: Path = Path("figures")
    """New or empty folder of the files, or one of earlier figures; those of the same names are replaced."""
    overwrite: Overwrite = False
    """Write into any folder, and replace files of the same names."""
    format: Literal["png", "svg", "pdf"] = "png"
    data: str | None = None
    """Data set for sampling points, masks and activation: a folder, or shapes."""
    split: str = "val"
    objects: int = 3
    """Images of them: the first that have an object."""
    teacher: str = ""
    """Checkpoint whose masks and activation are drawn; the runs' trained teacher if not given."""
    device: str = "cpu"
    """What draws sampling points, masks and activation: cpu, cuda, cuda:1, mps, or auto for a GPU if there is one."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()


def run(words: Sequence[str]) -> None:
    arguments = parse(FiguresArguments, words, "figures", DESCRIPTION)
    check_within("", arguments, objects=(1, 1000))
    if not arguments.runs:
        raise ValueError("name at least one run, as in `steadydetr figures runs/baseline runs/od`")
    check_places(arguments.runs, "run or folder")
    from steadydetr.drawing.paper_figures import write_figures

    written, missing = write_figures(
        arguments.runs,
        arguments.output,
        arguments.format,
        arguments.data,
        arguments.split,
        arguments.objects,
        arguments.teacher,
        arguments.overwrite,
        arguments.limits,
        arguments.device,
    )
    for path in written:
        print(f"Wrote {path}")
    for name, why in missing.items():
        print(f"No {name}: {why}")
