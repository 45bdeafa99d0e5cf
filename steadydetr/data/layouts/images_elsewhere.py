"""A data set of any layout whose images lie elsewhere: `path/to/data,images-in=shards/*.tar`, or `...,images-in=s3://bucket/train2017`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from steadydetr.data.dataset import FolderDataset
from steadydetr.data.layouts.base import InspectedLayout, Report
from steadydetr.data.layouts.recognition import layout_of
from steadydetr.data.stored import with_images
from steadydetr.files import printable
from steadydetr.kinds import register

IMAGES = ",images-in="


@register("images-elsewhere-layout")
@dataclass(frozen=True)
class ImagesElsewhere(InspectedLayout):
    """The layout of the annotations is recognised as usual. They must name the images and their sizes."""

    gives_masks = True  # if the layout of the annotations does
    looked_for = "images elsewhere: PLACE,images-in=FOLDER, PLACE,images-in=shards/*.tar, PLACE,images-in=s3://bucket/folder"

    def recognises(self, where: str) -> bool:
        return IMAGES in where and not os.path.exists(where)

    def splits(self, where: str) -> tuple[str, ...]:
        place = where.partition(IMAGES)[0]
        return layout_of(place, self.limits).splits(place)

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        place, _, images = where.partition(IMAGES)
        dataset = layout_of(place, self.limits, self.masks).inspect(place, split, report)
        if type(dataset) is not FolderDataset:
            raise ValueError(f"data {printable(place)} has no image files, so {printable(IMAGES[1:] + images)} means nothing there")
        return with_images(dataset, images)
