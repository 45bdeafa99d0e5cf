"""The same images and boxes in the layouts of labelling tools and large data sets give the same targets, bit for bit."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from steadydetr.cli import main
from steadydetr.data import open_data
from steadydetr.data.check import check_data
from steadydetr.data.layouts import NoSplit, layout_of
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
    unseen = {"classes without objects"}  # of the layouts that bring a list of classes, which has more than the items show
    assert {finding.kind for finding in report.findings} - unseen == {"box smaller than a pixel"}
    assert [split.name for split in report.splits] == ["train", "val"]
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


# What is turned into boxes, and what is left out


def remarks(root: Path, split: str = "train") -> dict[str, str]:
    """The findings of `check` that do not stop training, by kind."""
    found: dict[str, list[str]] = {}
    for finding in check_data(root, (split,)).findings:
        assert not finding.fatal, finding
        found.setdefault(finding.kind, []).append(f"{finding.entry}: {finding.message}".removeprefix(": "))
    return {kind: "; ".join(lines) for kind, lines in found.items()}


def of_shapes(made: str, first: str, *counted: str) -> str:
    """The remarks on shapes of several kinds: how many of each, what is made of them, and where the first is."""
    return "; ".join(
        f"{one.partition(' ')[0]} shapes of the kind {one.partition(' ')[2]} are {made}; the first: {first}" for one in counted
    )


BOXED, LEFT_OUT = "taken as the boxes around them", "left out, for they have no box"


def boxes(root: Path, split: str = "train") -> list[list[float]]:
    return open_data(root, split).index.boxes_xyxy.tolist()


PHOTO = Item("photo.png", (200, 100))


def label_studio_with(root: Path, *results: dict[str, Any], **fields: Any) -> Path:
    pictures(root, [PHOTO])
    (root / "export.json").write_text(json.dumps([task(1, PHOTO, list(results), **fields)]))
    return root


def labelled(kind: str, **value: Any) -> dict[str, Any]:
    result = rectangle(PHOTO, "nut", 0, 0, 1, 1)
    return result | {"type": f"{kind}labels", "value": {f"{kind}labels": ["nut"], **value}}


def test_turned_rectangles_of_label_studio_become_boxes(tmp_path: Path) -> None:
    """By hand, clockwise around the first corner: 60 x 20 pixels at (100, 50), a quarter, an eighth, and not at all."""
    turned = [rectangle(PHOTO, "nut", 100, 50, 160, 70, rotation=angle) for angle in (90, 45, 360)]
    label_studio_with(tmp_path, *turned)
    half = 2**-0.5
    expected = [[80, 50, 100, 110], [100 - 20 * half, 50, 100 + 60 * half, 50 + 80 * half], [100, 50, 160, 70]]
    assert boxes(tmp_path, "all") == [pytest.approx(box, abs=1e-4) for box in expected]
    assert remarks(tmp_path, "all")["shapes that become boxes"] == of_shapes(BOXED, "task 1", "2 rotated rectangle")


def test_other_shapes_of_label_studio(tmp_path: Path) -> None:
    label_studio_with(
        tmp_path,
        labelled("polygon", points=[[10, 20], [30, 10], [20, 50]], closed=True),
        labelled("ellipse", x=50, y=50, radiusX=10, radiusY=20, rotation=0),
        labelled("ellipse", x=50, y=50, radiusX=10, radiusY=10, rotation=90),
        labelled("brush", format="rle", rle=[0, 1, 2]),
        labelled("keypoint", x=5, y=5, width=0.3),
        {"type": "choices", "value": {"choices": ["sharp"]}},
        {"type": "relation", "from_id": "a", "to_id": "b", "direction": "right"},
    )
    assert boxes(tmp_path, "all") == [[20, 10, 60, 50], [80, 30, 120, 70], [90, 30, 110, 70]]
    assert remarks(tmp_path, "all") == {
        "shapes that become boxes": of_shapes(BOXED, "task 1", "1 polygon", "2 ellipse"),
        "shapes left out": of_shapes(LEFT_OUT, "task 1", "1 brush stroke", "1 key point"),
    }


def test_which_annotation_of_several_is_taken(tmp_path: Path) -> None:
    """Ground truth, else the latest; cancelled ones, drafts and predictions never."""

    def annotation(x: float, **fields: Any) -> dict[str, Any]:
        return task(1, PHOTO, [rectangle(PHOTO, "nut", x, 0, x + 10, 10)])["annotations"][0] | fields

    def with_annotations(*annotations: dict[str, Any]) -> list[list[float]]:
        prediction = {"result": [rectangle(PHOTO, "bolt", 90, 0, 95, 10)], "score": 0.9}
        label_studio_with(tmp_path, annotations=list(annotations), predictions=[prediction], drafts=[prediction])
        return boxes(tmp_path, "all")

    early, late = {"updated_at": "2024-01-01T00:00:00Z"}, {"updated_at": "2024-05-01T00:00:00Z"}
    assert with_annotations(annotation(1, **early), annotation(2, **late)) == [[2, 0, 12, 10]]
    assert with_annotations(annotation(2, **late), annotation(1, **early)) == [[2, 0, 12, 10]]
    assert "ground truth is taken, else the one updated last" in remarks(tmp_path, "all")["several annotations"]
    assert with_annotations(annotation(1, ground_truth=True, **early), annotation(2, **late)) == [[1, 0, 11, 10]]
    assert with_annotations(annotation(1, **early), annotation(2, was_cancelled=True, **late)) == [[1, 0, 11, 10]]
    assert open_data(tmp_path, "all").index.classes == ("nut",) and "several annotations" not in remarks(tmp_path, "all")
    with pytest.raises(ValueError, match=r"export\.json has no annotated image that can be used"):
        with_annotations(annotation(1, was_cancelled=True))


def test_tasks_that_nobody_has_annotated_are_left_out(tmp_path: Path) -> None:
    pictures(tmp_path, [PHOTO])
    tasks = [task(1, PHOTO, [rectangle(PHOTO, "nut", 1, 1, 9, 9)]), task(2, PHOTO, [], annotations=[]), task(3, PHOTO, [])]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    assert open_data(tmp_path, "all").index.counts.tolist() == [1, 0]  # the last was looked at, and has no object
    assert remarks(tmp_path, "all")["tasks left out"].startswith("1 tasks without annotation")


ADDRESSES = {
    "/data/upload/3/1a2b3c4d-photo.png": "1a2b3c4d-photo.png",
    "/data/upload/3/1a2b3c4d-my%20photo.png": "my photo.png",  # without the prefix, as the user's own file
    "/data/local-files/?d=some/where/photo.png": "where/photo.png",
    "/data/local-files/?d=a+b%20%C3%B6.png": "a+b ö.png",
    "s3://bucket/prefix/photo.png": "images/photo.png",
    "https://example.com/set/photo.png?signature=abc": "images/photo.png",
    "C:\\photos\\where\\photo.png": "where/photo.png",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_images_of_label_studio_are_found_by_their_addresses(address: str, tmp_path: Path) -> None:
    files = {"where/photo.png", "other/else.png", ADDRESSES[address]} if "where" in address else {"other/else.png", ADDRESSES[address]}
    for file in files:
        picture(tmp_path / file, PHOTO.size)
    content = [task(1, PHOTO, [rectangle(PHOTO, "nut", 1, 1, 9, 9)], data={"image": address})]
    (tmp_path / "export.json").write_text(json.dumps(content))
    assert open_data(tmp_path, "all").index.file(0) == ADDRESSES[address]


def test_two_images_that_an_address_could_mean(tmp_path: Path) -> None:
    for folder in "ab":
        picture(tmp_path / folder / "photo.png")
    content = [task(7, PHOTO, [rectangle(PHOTO, "nut", 1, 1, 9, 9)], data={"image": "s3://bucket/photo.png"})]
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"task 7: 'photo\.png' could be 'a/photo\.png', 'b/photo\.png': rename the files"):
        open_data(tmp_path, "all")


LABEL_STUDIO_FAULTS: dict[str, tuple[Any, str]] = {
    "text for a number": ([task(1, PHOTO, [labelled("rectangle", x="a")])], r"tasks\[0\].*Expected `float \| null`, got `str`"),
    "no image": ([task(1, PHOTO, [], data={"text": "no image"})], r"task 1: its data name no image file: ''"),
    "an image in the task": ([task(1, PHOTO, [], data={"image": "data:image/png;base64,AAAA"})], "task 1: its data name no image file"),
    "turned image": ([task(1, PHOTO, [labelled("brush") | {"image_rotation": 90}])], "task 1: it was annotated turned by 90 degrees"),
    "two sizes": (
        [task(1, PHOTO, [rectangle(PHOTO, "nut", 1, 1, 9, 9), labelled("brush") | {"original_width": 7}])],
        r"task 1: its shapes name different sizes of the image: \[\(100, 7\), \(100, 200\)\]",
    ),
    "half a pixel": ([task(1, PHOTO, [labelled("brush") | {"original_width": 7.5}])], "task 1: width 7.5 and height 100 are no size"),
}


@pytest.mark.parametrize("kind", LABEL_STUDIO_FAULTS)
def test_faults_of_label_studio_are_named(kind: str, tmp_path: Path) -> None:
    """`check` goes on with the other tasks."""
    tasks, message = LABEL_STUDIO_FAULTS[kind]
    pictures(tmp_path, [PHOTO])
    (tmp_path / "export.json").write_text(json.dumps([*tasks, task(2, PHOTO, [rectangle(PHOTO, "nut", 1, 1, 9, 9)])]))
    with pytest.raises(ValueError, match=rf"export\.json: .*{message}"):
        open_data(tmp_path, "all")
    report = check_data(tmp_path, ("train",))
    assert report.splits[0].images == 1 and any(finding.fatal for finding in report.findings)


def labelme_with(root: Path, *shapes: dict[str, Any], **fields: Any) -> Path:
    pictures(root, [PHOTO])
    (root / "photo.json").write_text(json.dumps(labelme_file(PHOTO, list(shapes), **fields)))
    return root


def test_shapes_of_labelme(tmp_path: Path) -> None:
    labelme_with(
        tmp_path,
        shape("nut", "rectangle", (30, 40), (10, 20), difficult=True),
        shape("nut", "polygon", (10, 20), (30, 10), (20, 50.5)),
        shape("nut", "circle", (50, 50), (53, 54)),
        shape("nut", "oriented_rectangle", (10, 0), (20, 10), (10, 20), (0, 10)),
        shape("nut", "mask", (5, 6), (7, 8), mask="iVBORw0KGgo="),
        shape("edge", "linestrip", (1, 1), (5, 5)),
        shape("corner", "point", (1, 1)),
    )
    dataset = open_data(tmp_path, "all")
    expected = [[10, 20, 30, 40], [10, 10, 30, 50.5], [45, 45, 55, 55], [0, 0, 20, 20], [5, 6, 8, 9]]
    assert dataset.index.boxes_xyxy.tolist() == expected and dataset.index.classes == ("nut",)
    assert dataset.index.difficult.tolist() == [True, False, False, False, False]
    found = remarks(tmp_path, "all")
    assert set(found) == {"shapes that become boxes", "shapes left out"}
    counted = re.findall(r"(\d shapes of the kind \w+) are taken as the boxes around them", found["shapes that become boxes"])
    assert counted == [f"1 shapes of the kind {kind}" for kind in ("polygon", "circle", "oriented_rectangle", "mask")]
    assert re.fullmatch(
        r"1 shapes of the kind linestrip are left out, .*shapes\[5\] \(edge\); 1 shapes of the kind point are left out, .*shapes\[6\] .*",
        found["shapes left out"],
    )


def test_images_of_labelme_lie_where_the_file_says_or_beside_it(tmp_path: Path) -> None:
    """In another folder, under another system's path, or beside the file whatever it says; those without a file are named."""
    nut = [shape("nut", "rectangle", (1, 1), (9, 9))]
    for name in ("images/a.png", "labels/b.png", "labels/c.jpeg", "images/without.png"):
        picture(tmp_path / name, PHOTO.size)
    (tmp_path / "labels" / "a.json").write_text(json.dumps(labelme_file(PHOTO, nut, imagePath="..\\images\\a.png")))
    (tmp_path / "labels" / "b.json").write_text(json.dumps(labelme_file(PHOTO, nut, imagePath="/home/me/b.png")))
    (tmp_path / "labels" / "c.json").write_text(json.dumps(labelme_file(PHOTO, nut, imagePath="renamed.png", imageHeight=None)))
    index = open_data(tmp_path, "all").index
    assert [index.file(i) for i in range(3)] == ["images/a.png", "labels/b.png", "labels/c.jpeg"] and index.sizes[2].tolist() == [100, 200]
    assert remarks(tmp_path, "all")["images left out"].startswith("1 images, the first is images/without.png: they have no annotation file")


LABELME_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"shapes": [shape("nut", "rectangle", (1, 1), ("a", 2))]}, r"Expected `float`, got `str`.*shapes\[0\]\.points"),  # type: ignore[arg-type]
    "no label": ({"shapes": [shape(" ", "rectangle", (1, 1), (2, 2))]}, r"shapes\[0\] \( \) has no label"),
    "one point": ({"shapes": [shape("nut", "rectangle", (1, 1))]}, r"shapes\[0\] \(nut\) is a rectangle of 1 points"),
    "two points": ({"shapes": [shape("nut", "polygon", (1, 1), (2, 2))]}, r"shapes\[0\] \(nut\) is a polygon of 2 points"),
    "half a pixel": ({"imageWidth": 0.5}, "width 0.5 and height 100 are no size"),
    "NUL": ({"imagePath": "a\0.png"}, "imagePath .* cannot be the name of a file"),
    "outside": ({"imagePath": "../../photo2.png", "imageWidth": None}, "lies outside the data folder .*outside allow"),
}


@pytest.mark.parametrize("kind", LABELME_FAULTS)
def test_faults_of_labelme_are_named(kind: str, tmp_path: Path) -> None:
    fields, message = LABELME_FAULTS[kind]
    labelme_with(tmp_path, shape("nut", "rectangle", (1, 1), (9, 9)))
    if kind == "outside":
        (tmp_path / "photo.png").rename(tmp_path / "x.png")
    (tmp_path / "other.json").write_text(json.dumps(labelme_file(PHOTO, []) | fields))
    if kind == "outside":
        (tmp_path / "photo.json").write_text(json.dumps(labelme_file(PHOTO, [], imagePath="x.png")))
    with pytest.raises(ValueError, match=rf"other\.json.*{message}"):
        open_data(tmp_path, "all")
    report = check_data(tmp_path, ("train",))
    assert report.splits[0].images == 1 and any(finding.fatal for finding in report.findings)


def test_groups_of_open_images_are_crowds_and_other_images_are_left_out(tmp_path: Path) -> None:
    """A part of the images is what most people have; the names of classes have a head from version 7 on."""
    pictures(tmp_path / "train", [PHOTO])
    other = Item("photo2.png", (10, 10))
    rows = [
        open_images_row(PHOTO, "nut", 1, 2, 3, 4, 1),
        open_images_row(other, "nut", 1, 2, 3, 4),
        open_images_row(PHOTO, "bolt", 5, 5, 9, 9),
    ]
    write_csv(tmp_path / "oidv6-train-annotations-bbox.csv", [OPEN_IMAGES, *rows])
    write_csv(tmp_path / "oidv7-class-descriptions-boxable.csv", [["LabelName", "DisplayName"], *([mid, n] for n, mid in MIDS.items())])
    index = open_data(tmp_path).index
    assert index.crowd.tolist() == [True, False] and index.boxes_xyxy.tolist() == [[1, 2, 3, 4], [5, 5, 9, 9]]
    assert "1 boxes, the first of image photo2: their images are not in the folder" in remarks(tmp_path)["boxes of other images"]


def test_sizes_of_open_images_as_cvat_lists_them(tmp_path: Path) -> None:
    """images.meta stands for the sizes in the files: where it is whole, no image is opened."""
    open_images(tmp_path, ITEMS)
    sizes = [f'"{item.stem}" {2 * item.size[1]} {2 * item.size[0]}\n' for items in ITEMS.values() for item in items]
    (tmp_path / "images.meta").write_text("# <image name> <height> <width>\n\n" + "".join(sizes), encoding="utf-8")
    index = open_data(tmp_path).index
    found = {index.file(position): size for position, size in enumerate(index.sizes.tolist())}
    assert found == {item.name: [2 * item.size[1], 2 * item.size[0]] for item in ITEMS["train"]}


def test_rows_of_open_images_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in parts of any size."""
    open_images(tmp_path, ITEMS)
    path = tmp_path / "oidv6-train-annotations-bbox.csv"
    expected = targets(tmp_path, "train")
    monkeypatch.setattr("steadydetr.data.layouts.open_images.CHUNK", 200)
    assert targets(tmp_path, "train") == expected
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *rows[::-1]]) + "\n")
    found = targets(tmp_path, "train")
    assert {name: sorted(zip(*values[1:], strict=True)) for name, values in found.items()} == {
        name: sorted(zip(*values[1:], strict=True)) for name, values in expected.items()
    }


OPEN_IMAGES_FAULTS: dict[str, tuple[str, str, str]] = {
    "no number": (
        "train-annotations-bbox.csv",
        "photo,x,/m/00kx,1,a,0.2,0.1,0.2,0,0,0,0,0\n",
        r"line 3: could not convert string 'a' to float64",
    ),
    "too short": ("train-annotations-bbox.csv", "photo,x,/m/00kx\n", r"line 3: .*column"),
    "unknown class": ("train-annotations-bbox.csv", "photo,x,/m/other,1,0.1,0.2,0.1,0.2,0,0,0,0,0\n", "line 3: '/m/other' is no label"),
    "no class": ("class-descriptions-boxable.csv", "/m/5,\n", "line 5: '/m/5,' is no label and name"),
    "class twice": ("class-descriptions-boxable.csv", "/m/5,nut\n", "line 5: '/m/5' or 'nut' has a line before it"),
}


@pytest.mark.parametrize("kind", OPEN_IMAGES_FAULTS)
def test_faults_of_open_images_are_named(kind: str, tmp_path: Path) -> None:
    name, line, message = OPEN_IMAGES_FAULTS[kind]
    pictures(tmp_path / "train", [PHOTO])
    write_csv(tmp_path / "train-annotations-bbox.csv", [OPEN_IMAGES, open_images_row(PHOTO, "nut", 1, 2, 3, 4)])
    write_csv(tmp_path / "class-descriptions-boxable.csv", [[mid, name] for name, mid in MIDS.items()])
    with open(tmp_path / name, "a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
        open_data(tmp_path)
    report = check_data(tmp_path, ("train",))
    assert report.splits[0].images == 1 and sum(report.splits[0].class_counts.values()) == 1
    assert any(finding.fatal for finding in report.findings)


def test_files_of_open_images_that_are_missing_are_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "train-annotations-bbox.csv", [OPEN_IMAGES, open_images_row(PHOTO, "nut", 1, 2, 3, 4)])
    with pytest.raises(ValueError, match=r"has no class-descriptions-boxable\.csv"):
        open_data(tmp_path)
    write_csv(tmp_path / "class-descriptions-boxable.csv", [[mid, name] for name, mid in MIDS.items()])
    with pytest.raises(ValueError, match=r"there is no image in .*put the images of train there, named by their ImageID"):
        open_data(tmp_path)
    write_csv(tmp_path / "train-annotations-bbox.csv", [["ImageID", "LabelName"], ["a", "b"]])
    pictures(tmp_path / "train", [PHOTO])
    with pytest.raises(ValueError, match=r"has no column XMin, XMax, YMin, YMax, IsGroupOf"):
        open_data(tmp_path)


def test_sizes_of_many_images_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a file changes."""
    from steadydetr.data import picture_sizes

    monkeypatch.setattr(picture_sizes, "KEPT_FROM", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_images(tmp_path / "data" if (tmp_path / "data").mkdir() is None else tmp_path, ITEMS)
    expected = open_data(tmp_path / "data").index.sizes
    read: list[Path] = []
    from steadydetr.data.folder import DataFolder

    size = DataFolder.picture_size
    monkeypatch.setattr(DataFolder, "picture_size", lambda self, path: read.append(path) or size(self, path))  # type: ignore[func-returns-value]
    assert (open_data(tmp_path / "data").index.sizes == expected).all() and not read
    picture(tmp_path / "data" / "train" / "one.png", (74, 106))
    assert open_data(tmp_path / "data").index.sizes[0].tolist() == [106, 74] and [path.name for path in read] == ["one.png"]
    for kept in (tmp_path / "cache").rglob("*.npz"):
        kept.write_bytes(b"damaged")
    assert open_data(tmp_path / "data").index.sizes[0].tolist() == [106, 74]


IMAGE_FOLDER_FAULTS = {
    '{"file_name": "photo.png"}': "line 2: Object missing required field `objects`",
    '{"file_name": "photo.png", "objects": {"bbox": [[1, 2, 3]], "category": [0]}}': "line 2: Expected `array` of length 4",
    '{"file_name": "photo.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": []}}': "line 2: 1 boxes, but 0 classes",
    '{"file_name": "photo.png", "objects": {"box": [], "category": []}}': "line 2: objects have none of bbox, bboxes, boxes",
    '{"file_name": "photo.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": [4]}}': r"line 2: 4 is no class of README\.md, which has 4",
    '{"file_name": "../../x.png", "objects": {"bbox": [], "category": []}}': "line 2: .*lies outside the data folder",
    "{": "line 2: Input data was truncated",
}


@pytest.mark.parametrize("line", IMAGE_FOLDER_FAULTS)
def test_faults_of_an_image_folder_are_named(line: str, tmp_path: Path) -> None:
    image_folder(tmp_path, {"train": [Item("photo.png", (8, 6), (("nut", 1, 1, 4, 4),))]})
    with open(tmp_path / "train" / "metadata.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"metadata\.jsonl: {IMAGE_FOLDER_FAULTS[line]}"):
        open_data(tmp_path)
    report = check_data(tmp_path, ("train",))
    assert report.splits[0].images == 1 and any(finding.fatal for finding in report.findings)


def test_images_of_an_image_folder_may_have_null_for_no_objects(tmp_path: Path) -> None:
    """As pandas writes it."""
    image_folder(tmp_path, {"train": [Item("photo.png", (8, 6), (("nut", 1, 1, 4, 4),))]})
    picture(tmp_path / "train" / "none.png")
    with open(tmp_path / "train" / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "none.png", "objects": null}\n')
    assert open_data(tmp_path).index.counts.tolist() == [1, 0]


@pytest.mark.parametrize(
    "head",
    ["a: &a [*a, *a]", "&a {class_label: *a}", "class_label: {names: [nut]}", "[" * 5000, "!!python/object/apply:os.getcwd []", "a: '"],
)
def test_a_card_that_is_anything_names_no_classes(head: str, tmp_path: Path) -> None:
    """Numbers are names then; no code in it runs, and nothing hangs."""
    image_folder(tmp_path, {"train": [Item("photo.png", (8, 6), (("nut", 1, 1, 4, 4),))]})
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Nuts")
    assert open_data(tmp_path).index.classes == (str(CLASSES.index("nut")),)


def test_training_says_what_was_turned_into_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short run through the command line, on polygons of labelme."""
    for split in ("train", "val"):
        for number in range(4):
            item = Item(f"{number}.png", (40, 40))
            pictures(tmp_path / "data" / split, [item])
            content = labelme_file(item, [shape("nut", "polygon", (4, 4), (30, 6), (20, 33))])
            (tmp_path / "data" / split / f"{number}.json").write_text(json.dumps(content))
    words = ["train", "quickstart", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--training.epochs", "1"]
    main([*words, "--training.batch-size", "4", "--training.eval-batch-size", "4", "--data.workers", "0", "--device", "cpu"])
    said = "".join(capsys.readouterr())
    assert "4 shapes of the kind polygon are taken as the boxes around them" in " ".join(said.split())
    assert (tmp_path / "run" / "summary.json").is_file()
