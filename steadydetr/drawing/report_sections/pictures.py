"""The pictures that the runs have drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from steadydetr.drawing.report_sections.base import EmbeddedPicture, Lack, RunName, name_of
from steadydetr.files import check_regular
from steadydetr.runs.folder import PREDICTIONS, SAMPLING
from steadydetr.runs.records import Records

MOST_PIXELS = 50_000_000  # of a picture that a run has drawn; a small file can claim any number
PREDICTIONS_TEXT = (
    "Ground truth above, detections below, for the first held-out images that have objects. The pictures say of which weights: those in"
    " `best`; pictures of version 0.1 do not, and are of the trained weights at the end."
)
SAMPLING_TEXT = (
    "Where the query of an image's largest object looks in the last decoder stage, in the trained and the averaged weights: sampling"
    " points, the brighter the more they count; reference point (star), predicted box (white) and true box (green)."
)


@dataclass(frozen=True)
class RunPicture:
    name: RunName | None  # None where there is only one run
    picture: EmbeddedPicture | None
    absent: Lack  # why there is none


@dataclass(frozen=True)
class PictureSection:
    title: str
    text: str
    pictures: list[RunPicture]
    layout: str = "pictures"


def predictions(runs: Sequence[Records]) -> PictureSection:
    return picture_section("Predictions", PREDICTIONS_TEXT, runs, PREDICTIONS, "Ground truth and detections")


def sampling_points(runs: Sequence[Records]) -> PictureSection:
    return picture_section("Where queries look", SAMPLING_TEXT, runs, SAMPLING, "Sampling points")


def picture_section(title: str, text: str, runs: Sequence[Records], file_name: str, described: str) -> PictureSection:
    pictures = []
    for run in runs:
        found = run_picture(run, file_name, described)
        name = name_of(run, runs) if len(runs) > 1 else None
        if isinstance(found, EmbeddedPicture):
            pictures.append(RunPicture(name, found, Lack((), "")))
        else:
            pictures.append(RunPicture(name, None, Lack.of([run], found)))
    return PictureSection(title, text, pictures)


def run_picture(run: Records, file_name: str, described: str) -> EmbeddedPicture | str:
    """A picture in a run's folder as JPEG, which takes a fifth of the space, or why there is none."""
    path = run.folder / file_name
    if not path.exists():
        return f"no {file_name}; a run draws it when it is finished"
    try:
        check_regular(path)
        with Image.open(path, formats=["PNG"]) as image, io.BytesIO() as file:
            if image.width * image.height > MOST_PIXELS:
                return f"its {file_name} is too large"
            image.convert("RGB").save(file, "JPEG", quality=88)
            return EmbeddedPicture.of("jpeg", file.getvalue(), f"{described} of {run.label}")
    except Exception:  # Pillow has errors of many kinds for damaged files
        return f"its {file_name} cannot be read"
