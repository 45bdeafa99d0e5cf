"""Limits on what is read of a data set, which may come from a stranger. They are options of every command that reads data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steadydetr.kinds import changeable


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Files and images beyond these are refused. Nothing that is read depends on the values."""

    outside: Literal["refuse", "allow"] = changeable("refuse")  # files outside the data folder, to which absolute names, .. or links lead
    max_pixels: int = changeable(178_956_970)  # of an image; more are taken for a decompression bomb, as in Pillow
    max_file_mb: int = changeable(256)  # MiB of an image file, and of the annotation file of an image
    max_annotation_mb: int = changeable(4096)  # MiB of a file about all images of a split: COCO's JSON, CVAT's XML, a list

    def __post_init__(self) -> None:
        if self.outside not in ("refuse", "allow"):
            raise ValueError(f"outside = {self.outside!r} must be refuse or allow")
        for name in ("max_pixels", "max_file_mb", "max_annotation_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")


DEFAULT_LIMITS = Limits()
