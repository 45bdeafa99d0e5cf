"""The same images and boxes in the layouts of labelling tools and large data sets give the same targets, bit for bit."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from steadydetr.data import open_data
from steadydetr.data.check import check_data
from steadydetr.data.layouts import NoSplit
from steadydetr.data.opening import layout_of
from tests.data_folders import coco_folder, picture, voc_folder

CLASSES = ("bolt", "kleine Schraube", "nut", "zebra")  # no box has the last


@dataclass(frozen=True)
class Item:
    """An image and its objects; x0, y0, x1, y1 in pixels."""

    name: str
    size: tuple[int, int]  # (w, h)
    objects: tuple[tuple[str, float, float, float, float], ...] = ()

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]


Items = dict[str, Sequence[Item]]
ITEMS: Items = {
    "train": (
        Item("one.png", (37, 53), (("nut", 1.25, 2.5, 30.75, 41), ("bolt", 0, 0, 37, 53))),
        Item("photo 2.png", (64, 48), (("kleine Schraube", 10.125, 3.5, 12.375, 40.0625),)),
        Item("sub folder/größe 3.png", (101, 7), (("nut", 3, 1, 99, 6), ("nut", 7.75, 0.5, 8.5, 6.25), ("bolt", 50, 2, 60, 5))),
        Item("sub folder/empty.png", (20, 30)),
    ),
    "val": (Item("val one.png", (33, 21), (("bolt", 2.25, 2.75, 20.5, 15.25), ("kleine Schraube", 1, 1, 5, 5), ("nut", 2, 3, 4, 5))),),
}


def pictures(root: Path, items: Sequence[Item]) -> None:
    for item in items:
        picture(root / item.name, item.size)


def coco(root: Path, items: Items) -> None:
    """The layout that the others are compared with."""
    for split, images in items.items():
        pictures(root / split, images)
        rows = [
            {"image_id": number, "category_id": CLASSES.index(label) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
            for number, image in enumerate(images, 1)
            for label, x0, y0, x1, y1 in image.objects
        ]
        content = {
            "images": [{"id": k, "file_name": i.name, "width": i.size[0], "height": i.size[1]} for k, i in enumerate(images, 1)],
            "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES, 1)],
            "annotations": [row | {"id": k, "area": row["bbox"][2] * row["bbox"][3]} for k, row in enumerate(rows, 1)],
        }
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def rectangle(image: Item, label: str, x0: float, y0: float, x1: float, y1: float, **value: Any) -> dict[str, Any]:
    """A box as Label Studio writes it: percent of the image, with all digits."""
    width, height = image.size
    shape = {
        "x": x0 / width * 100,
        "y": y0 / height * 100,
        "width": (x1 - x0) / width * 100,
        "height": (y1 - y0) / height * 100,
        "rotation": 0,
    }
    return {
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": shape | {"rectanglelabels": [label]} | value,
        "id": "Dx_aB91ISN",
        "from_name": "label",
        "to_name": "image",
        "type": "rectanglelabels",
        "origin": "manual",
    }


def task(number: int, image: Item, results: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A task of Label Studio's JSON export with one annotation."""
    annotation = {
        "id": number,
        "completed_by": 1,
        "result": results,
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": "2024-03-09T22:16:08.728353Z",
        "updated_at": "2024-03-09T22:16:08.728378Z",
        "lead_time": 4.3,
        "prediction": {},
        "result_count": 0,
    }
    data = {"image": f"/data/local-files/?d={quote(image.name)}"}
    rest = {"file_upload": None, "drafts": [], "predictions": [], "data": data, "meta": {}, "total_annotations": 1}
    return {"id": number, "annotations": [annotation]} | rest | fields


def label_studio(root: Path, items: Items) -> None:
    for split, images in items.items():
        pictures(root / "images", images)
        tasks = [task(k, image, [rectangle(image, *one) for one in image.objects]) for k, image in enumerate(images, 1)]
        (root / f"{split}.json").write_text(json.dumps(tasks), encoding="utf-8")


def label_studio_min(root: Path, items: Items) -> None:
    for split, images in items.items():
        pictures(root / "images", images)
        tasks = []
        for number, image in enumerate(images, 1):
            sizes = {"original_width": image.size[0], "original_height": image.size[1]}
            values = [rectangle(image, *one)["value"] | sizes for one in image.objects]
            fields = {"image": f"s3://bucket/photos/{image.name}", "id": number}
            labels = {"label": values} if values else {}
            tail = {"annotator": 1, "annotation_id": number, "created_at": "2024-03-09T22:16:08Z", "updated_at": "2024-03-09T22:16:08Z"}
            tasks.append(fields | labels | tail | {"lead_time": 3.1})
        (root / f"{split}.json").write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")


def labelme_file(image: Item, shapes: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The content of a file of labelme, the picture as text in it."""
    head = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image.name.rpartition("/")[2]}
    return (
        head | {"imageData": base64.b64encode(b"pixels" * 50).decode(), "imageHeight": image.size[1], "imageWidth": image.size[0]} | fields
    )


def shape(label: str, kind: str, *points: tuple[float, float], **fields: Any) -> dict[str, Any]:
    rest = {"group_id": None, "description": "", "shape_type": kind, "flags": {}, "mask": None}
    return {"label": label, "points": [list(point) for point in points]} | rest | fields


def labelme(root: Path, items: Items) -> None:
    for split, images in items.items():
        pictures(root / split, images)
        for image in images:
            shapes = [shape(label, "rectangle", (x0, y0), (x1, y1)) for label, x0, y0, x1, y1 in image.objects]
            (root / split / f"{image.stem}.json").write_text(json.dumps(labelme_file(image, shapes), indent=2))


def lvis(root: Path, items: Items) -> None:
    """Images in train2017 by their last names, which are different; LVIS knows no other folders."""
    coco(root / "coco", items)
    for split in items:
        content = json.loads((root / "coco" / "annotations" / f"instances_{split}.json").read_text())
        for image in content["images"]:
            name = image.pop("file_name").rpartition("/")[2]
            image |= {"coco_url": f"http://images.cocodataset.org/train2017/{name}"}
            image |= {"neg_category_ids": [4], "not_exhaustive_category_ids": []}
            picture(root / "train2017" / name, (image["width"], image["height"]))
        content["categories"] = [category | {"frequency": "c"} for category in content["categories"]]
        (root / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    (root / "coco" / "annotations").rename(root / "not recognised")


MIDS = {name: f"/m/0{number}kx" for number, name in enumerate(CLASSES)}
OPEN_IMAGES = [
    *("ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax"),
    *("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"),
]
FOLDER_OF = {"train": "train", "val": "validation"}


def open_images_row(image: Item, label: str, x0: float, y0: float, x1: float, y1: float, group: int = 0) -> list[Any]:
    width, height = image.size
    return [image.stem, "xclick", MIDS[label], 1, x0 / width, x1 / width, y0 / height, y1 / height, 0, 1, group, 0, 0]


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def open_images(root: Path, items: Items) -> None:
    for split, images in items.items():
        name = FOLDER_OF[split]
        pictures(root / name, images)
        rows = [open_images_row(image, *one) for image in images for one in image.objects]
        write_csv(root / f"{'oidv6-' * (name == 'train')}{name}-annotations-bbox.csv", [OPEN_IMAGES, *rows])
    write_csv(root / "class-descriptions-boxable.csv", [[mid, name] for name, mid in MIDS.items()])


def objects_of(image: Item) -> dict[str, Any]:
    """As the hub has objects: boxes x, y, w, h, and the numbers of their classes."""
    boxes = [[x0, y0, x1 - x0, y1 - y0] for _, x0, y0, x1, y1 in image.objects]
    return {"bbox": boxes, "categories": [CLASSES.index(label) for label, *_ in image.objects]}


CARD = """---
task_categories: [object-detection]
dataset_info:
  features:
  - name: image
    dtype: image
  - name: objects
    sequence:
    - name: bbox
      sequence: float32
      length: 4
    - name: categories
      dtype:
        class_label:
          names:
{}
---
# Bolts and nuts
""".format("\n".join(f"            '{number}': {name}" for number, name in enumerate(CLASSES)))


def image_folder(root: Path, items: Items) -> None:
    (root / "README.md").write_text(CARD, encoding="utf-8")
    for split, images in items.items():
        folder = root / FOLDER_OF[split]
        pictures(folder, images)
        lines = [json.dumps({"file_name": image.name, "objects": objects_of(image)}, ensure_ascii=False) for image in images]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def image_folder_csv(root: Path, items: Items) -> None:
    """Sizes and names of classes in the file; objects as a list of objects, as JSON in a cell."""
    for split, images in items.items():
        pictures(root / split, images)
        rows: list[list[Any]] = [["file_name", "width", "height", "objects"]]
        for image in images:
            objects = [{"bbox": [x0, y0, x1 - x0, y1 - y0], "category": label} for label, x0, y0, x1, y1 in image.objects]
            rows.append([image.name, *image.size, json.dumps(objects)])
        write_csv(root / split / "metadata.csv", rows)


WRITERS: dict[str, Callable[[Path, Items], None]] = {
    "LabelStudio": label_studio,
    "LabelStudio, JSON-MIN": label_studio_min,
    "Labelme": labelme,
    "Lvis": lvis,
    "OpenImages": open_images,
    "ImageFolder": image_folder,
    "ImageFolder, CSV": image_folder_csv,
}


def targets(root: Path, split: str) -> dict[str, tuple[Any, ...]]:
    """Of every image: size, labels, classes' names and boxes, by the last part of its name."""
    dataset = open_data(root, split)
    index, found = dataset.index, {}
    for position in range(len(index)):
        rows = index.rows(position)
        labels = index.labels[rows].tolist()
        assert dataset.load_image(position).shape[:2] == tuple(index.sizes[position])
        stem = index.file(position).rpartition("/")[2]
        boxes = [box.tobytes() for box in index.boxes_xyxy[rows]]
        found[stem] = (index.sizes[position].tolist(), labels, [index.classes[label] for label in labels], boxes)
    return found


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_layout_gives_the_same_targets(name: str, split: str, tmp_path: Path) -> None:
    coco(tmp_path / "coco", ITEMS)
    (tmp_path / "other").mkdir()
    WRITERS[name](tmp_path / "other", ITEMS)
    assert type(layout_of(str(tmp_path / "other"))).__name__ == name.partition(",")[0]
    expected = targets(tmp_path / "coco", split)
    assert targets(tmp_path / "other", split) == expected and len(expected) == len(ITEMS[split])


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_found_wrong_with_whole_data(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path, ITEMS)
    report = check_data(tmp_path)
    assert not report.findings and [split.name for split in report.splits] == ["train", "val"]
    with pytest.raises(NoSplit, match="has no split 'test'; it holds train, val"):
        open_data(tmp_path, "test")


@pytest.mark.parametrize("name", WRITERS)
def test_no_layout_takes_the_folder_of_another(name: str, tmp_path: Path) -> None:
    """Whatever the order in which they are asked."""
    from steadydetr.data.layouts import DataLayout
    from steadydetr.kinds import options

    def takers(root: Path) -> list[str]:
        return [kind.__name__ for kind in options(DataLayout).values() if kind().recognises(str(root))]

    WRITERS[name](tmp_path / "own" if (tmp_path / "own").mkdir() is None else tmp_path, ITEMS)
    assert takers(tmp_path / "own") == [name.partition(",")[0]]
    coco_folder(tmp_path / "coco")
    voc_folder(tmp_path / "voc")
    assert takers(tmp_path / "coco") == ["Coco"] and takers(tmp_path / "voc") == ["Voc"]
