"""LVIS: images of COCO with 1,203 classes, of which only some were looked for in each image (https://arxiv.org/abs/1908.03195)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from steadydetr.data.columns import Lists
from steadydetr.data.dataset import FolderDataset
from steadydetr.data.index import Federated
from steadydetr.data.layouts.base import InspectedLayout, Report
from steadydetr.data.layouts.coco import read_coco
from steadydetr.data.layouts.coco_file import CocoCategory, CocoFile, CocoImage, MaskedAnnotation
from steadydetr.data.layouts.common import choose_split, splits_of
from steadydetr.data.reading import Id, expanded
from steadydetr.kinds import register


@register("lvis-layout")
@dataclass(frozen=True)
class Lvis(InspectedLayout):
    """lvis_v1_SPLIT.json or lvis_v0.5_SPLIT.json, beside COCO's train2017 and val2017."""

    gives_masks = True
    looked_for = "LVIS: lvis_v1_SPLIT.json, in the folder or in annotations/, beside train2017/ and val2017/ (or in images/)"

    def recognises(self, where: str) -> bool:
        return bool(_files(expanded(where)))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(_files(expanded(where)))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root = expanded(where)
        files = _files(root)
        path = files[choose_split(root, files, split)]
        kind = MaskedLvisFile if self.masks else LvisFile
        return read_coco(path, [root / "images", root], f"{root.name}-{path.stem}", self.folder(where), report, kind)


def _files(root: Path) -> dict[str, Path]:
    """The annotation files by split, the last part of their names: `val` for lvis_v1_val.json."""
    files = sorted([*root.glob("lvis*_*.json"), *root.glob("annotations/lvis*_*.json")])
    return {path.stem.rpartition("_")[2]: path for path in files if "image_info" not in path.stem}  # which has no annotations


class LvisImage(CocoImage):
    """An image of COCO, whose file is named by the end of its address: train2017/000000391895.jpg."""

    file_name: str = ""  # LVIS 0.5 has it, without a folder
    coco_url: str = ""
    neg_category_ids: list[Id] = []  # noqa: RUF012
    not_exhaustive_category_ids: list[Id] = []  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.coco_url:
            self.file_name = "/".join(urlsplit(self.coco_url).path.split("/")[-2:])


class LvisCategory(CocoCategory):
    frequency: Literal["r", "c", "f"] | None = None


class LvisFile(CocoFile):
    images: Sequence[LvisImage]
    categories: Sequence[LvisCategory]

    @staticmethod
    def federated(images: Sequence[LvisImage], categories: Sequence[LvisCategory]) -> Federated:
        label_of = {category.id: label for label, category in enumerate(categories)}

        def labels(ids: Sequence[int]) -> list[int]:
            return [label_of[id_] for id_ in ids if id_ in label_of]

        return Federated(
            absent=Lists.of([labels(image.neg_category_ids) for image in images]),
            incomplete=Lists.of([labels(image.not_exhaustive_category_ids) for image in images]),
            frequencies=tuple(category.frequency or "" for category in categories),
        )


class MaskedLvisFile(LvisFile):
    annotations: Sequence[MaskedAnnotation]
