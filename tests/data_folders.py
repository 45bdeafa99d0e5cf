"""Small data sets on disk, whole ones, of which tests break one thing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COCO: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 6} for i in (1, 2)],
    "categories": [{"id": 3, "name": "nut"}, {"id": 9, "name": "bolt"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 9, "bbox": [0.5, 0, 4, 2], "area": 8, "iscrowd": 1},
        {"id": 3, "image_id": 1, "category_id": 9, "bbox": [2, 2, 2, 2], "area": 4, "iscrowd": 0},
    ],
}
BOX = "<bndbox><xmin>2</xmin><ymin>1</ymin><xmax>5</xmax><ymax>4</ymax></bndbox>"
XML = (
    "<annotation><filename>a.png</filename><size><width>8</width><height>6</height></size>"
    f"<object><name>nut</name>{BOX}<difficult>1</difficult></object><object><name>bolt</name>{BOX}</object></annotation>"
)


def picture(path: Path, size: tuple[int, int] = (8, 6), **options: Any) -> Path:
    """A grey picture; how grey, its folder tells, so that splits do not have the same pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = 90 + sum(path.parent.name.encode()) % 30
    Image.fromarray(np.full((size[1], size[0], 3), grey, np.uint8)).save(path, **options)
    return path


def coco_folder(root: Path, content: Any = None, splits: tuple[str, ...] = ("train",)) -> Path:
    """Two images and three objects; `content`, bytes or what JSON can hold, in place of the annotations. Gives the annotation file."""
    content = COCO if content is None else content
    for split in splits:
        for number in (1, 2):
            picture(root / split / f"{number}.png")
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def coco_with(**changes: Any) -> dict[str, Any]:
    """The annotations with fields of the first image (image={...}), category or annotation changed."""
    content = copy.deepcopy(COCO)
    for name, fields in changes.items():
        if not isinstance(fields, dict):
            content[name] = fields
            continue
        entry = content[{"image": "images", "category": "categories", "annotation": "annotations"}[name]][0]
        entry |= fields
    return content


def voc_folder(root: Path, xml: str | bytes = XML, listed: str | bytes = "a\n", stem: str = "a", image: str = "a.png") -> Path:
    """One image with two objects. Gives the annotation file."""
    picture(root / "JPEGImages" / image)
    path = root / "Annotations" / f"{stem}.xml"
    split = root / "ImageSets" / "Main" / "train.txt"
    for file, content in ((path, xml), (split, listed)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
