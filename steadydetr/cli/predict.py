"""`steadydetr predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.cli.parsing import Overwrite, parse
from steadydetr.cli.quick import check_places
from steadydetr.config import check_within
from steadydetr.files import counted
from steadydetr.limits import Limits

DESCRIPTION = """Detect objects in images: pictures, and COCO results for an evaluation server.

  steadydetr predict runs/mine photo.jpg more-photos/ --output found
  steadydetr predict runs/mine clip.mp4 https://example.org/photo.jpg
  steadydetr predict runs/mine image_info_test-dev2017.json --image-folder test2017 --no-draw"""


@dataclass(frozen=True)
class PredictArguments:
    checkpoint: tyro.conf.Positional[Path]
    """A run (its best is taken), a checkpoint folder, or a converted one."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Images, videos (every frame), folders of these, addresses (https://...), or a COCO image list (JSON, as of test-dev)."""
    output: Path = Path("predictions")
    """New or empty folder for results.json (COCO results) and the pictures."""
    overwrite: Overwrite = False
    """Write into a folder that holds files already, and replace those of the same names; never an image that is read."""
    image_folder: Path | None = None
    """Where the images of a COCO image list are; beside it if not given."""
    threshold: float = 0.3
    """Least score that is drawn and put on maps of masks; results.json holds all."""
    draw: bool = True
    """Whether to draw pictures."""
    masks: bool = True
    """Whether to write masks/NAME.png, of a detector that predicts masks: 16 bits a pixel, 0 or the number of its detection, from 1 on."""
    batch_size: int = 4
    """Images in one forward pass."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1 or mps."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()


def run(words: Sequence[str]) -> None:
    arguments = parse(PredictArguments, words, "predict", DESCRIPTION)
    if not arguments.images:
        raise ValueError("name at least one image, folder or COCO image list after the checkpoint")
    check_within("", arguments, batch_size=(1, 10**6))
    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold {arguments.threshold:g} must lie in 0 to 1: it is a score")
    find_checkpoint(arguments.checkpoint.expanduser())
    check_places(arguments.images, "image or folder")
    from steadydetr.tools.image_files import predict_files
    from steadydetr.tools.predictor import load

    report = predict_files(
        load(arguments.checkpoint, arguments.device),
        arguments.images,
        arguments.output,
        image_folder=arguments.image_folder,
        threshold=arguments.threshold,
        draw=arguments.draw,
        masks=arguments.masks,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
        limits=arguments.limits,
    )
    print(f"{counted(report.images, 'image')}, {counted(report.detections, 'detection')} in {arguments.output / 'results.json'}")
    if arguments.draw and report.images:
        lower = "; a lower --threshold shows more" * (not report.drawn)
        print(f"Pictures in {arguments.output} show the {report.drawn} with a score of at least {arguments.threshold:g}{lower}")
    for failure in report.failures:
        print(f"left out: {failure}")
    if report.failures:
        raise SystemExit(1)
