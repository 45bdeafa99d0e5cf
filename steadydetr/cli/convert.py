"""`steadydetr convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from steadydetr.checkpoints.layouts import known_layouts
from steadydetr.cli.parsing import parse
from steadydetr.cli.quick import check_places
from steadydetr.config import check_within

DESCRIPTION = f"""Convert a checkpoint of another project: {known_layouts()}.
Every key must find its place: one that is left over or missing is an error that lists them.

  steadydetr convert checkpoint0011_4scale.pth runs/dino-official
  steadydetr eval runs/dino-official --data path/to/coco"""


@dataclass(frozen=True)
class ConvertArguments:
    file: tyro.conf.Positional[Path]
    """.pth, .pt, .bin or .safetensors of the original project."""
    output: tyro.conf.Positional[Path]
    """Folder for the converted checkpoint."""
    classes: str = "auto"
    """coco (by the number of class rows: 80 in a row, or 91 original ids), a text file with one name a line, or auto: the names in the
    config.json of Hugging Face, else coco where the rows fit, else numbers."""
    heads: int | None = None
    """Attention heads. Neither this nor the options below can be read from a file, only from the config.json of Hugging Face; where there
    is none, the defaults are those of the official models, here 8."""
    queries: int | None = None
    """Queries of two-stage Deformable DETR and DAB-Deformable-DETR; 300."""
    temperature: float | None = None
    """Temperature of the sine position of feature maps, if not the project's usual one (detrex, DINO of 24 epochs: 20)."""
    position_offset: float | None = None
    """Its offset (detrex, DINO of 24 epochs: 0)."""
    output_stride: int | None = None
    """Of the backbone of Conditional DETR: 16 for DC5; 32."""


def run(words: Sequence[str]) -> None:
    arguments = parse(ConvertArguments, words, "convert", DESCRIPTION)
    check_within("", arguments, heads=(1, 1000), queries=(1, 10**6), output_stride=(8, 32))
    check_places([arguments.file], "file")
    from steadydetr.checkpoints.convert import convert_file, untraced_of

    given = {name: getattr(arguments, name) for name in ("heads", "queries", "temperature", "position_offset", "output_stride")}
    untraced = untraced_of(arguments.file, **{name: value for name, value in given.items() if value is not None})
    converted = convert_file(arguments.file, arguments.output, arguments.classes, untraced)
    detector = type(converted.config).__name__.removesuffix("Config")
    counts = f"{len(converted.state)} tensors, {converted.num_classes} classes"
    print(f"{arguments.file}: {detector} of the layout {converted.layout}, {counts} -> {arguments.output}")
