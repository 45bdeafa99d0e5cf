"""LVIS: its files, the federated index, and its metrics against a slow reading of its rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steadydetr.data import AnnotationIndex, first_images, open_data
from steadydetr.data.check import check_data
from steadydetr.data.index import join_indices
from steadydetr.metrics.evaluation import evaluate
from steadydetr.metrics.results import Results, coco_results
from tests.data_folders import picture
from tests.reference import lvis

ADDRESS = "http://images.cocodataset.org/{}2017/{:012d}.jpg"


def lvis_file(seed: int = 0, images: int = 12, classes: int = 6) -> dict[str, Any]:
    """Random boxes of three sizes, as LVIS v1 writes them. Ids have gaps; of each image some classes were looked for."""
    rng = np.random.default_rng(seed)
    categories = [
        {"id": 3 * k + 2, "name": f"thing_{k}", "synset": f"thing.n.{k:02d}", "frequency": "rcf"[k % 3], "image_count": 1}
        for k in range(classes)
    ]
    ids = [c["id"] for c in categories]
    file: dict[str, Any] = {"images": [], "categories": categories, "annotations": []}
    for number in range(1, images + 1):
        present = rng.choice(ids, 3, replace=False).tolist()
        others = [i for i in ids if i not in present]
        file["images"].append(
            {
                "id": 17 * number,
                "coco_url": ADDRESS.format("train" if number % 2 else "val", number),
                "width": 300,
                "height": 200,
                "neg_category_ids": rng.choice(others, 1).tolist(),
                "not_exhaustive_category_ids": present[:1],
            }
        )
        for category in present * 2:
            side = float(rng.choice([20, 60, 140])) + float(rng.integers(9))
            x, y = rng.integers(0, 150, 2).astype(float).tolist()
            box = [x, y, side, side / 2]
            row = {
                "id": len(file["annotations"]) + 1,
                "image_id": 17 * number,
                "category_id": category,
                "bbox": box,
                "area": side * side / 2,
            }
            file["annotations"].append(row | {"segmentation": []})
    return file


def lvis_folder(root: Path, file: dict[str, Any], split: str = "val", pictures: bool = False) -> Path:
    root.mkdir(exist_ok=True)
    (root / f"lvis_v1_{split}.json").write_text(json.dumps(file))
    for image in file["images"] if pictures else ():
        picture(root / "/".join(image["coco_url"].split("/")[-2:]), (image["width"], image["height"]))
    return root


def detections(index: AnnotationIndex, seed: int, copies: int = 3) -> Results:
    """Objects moved and now and then of another class, and boxes anywhere of any class."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(len(index.labels)), copies)
    boxes = index.boxes_xyxy[rows] + rng.normal(0, 6, (len(rows), 4)).astype(np.float32)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels = np.where(rng.random(len(rows)) < 0.3, rng.integers(0, len(index.classes), len(rows)), index.labels[rows])
    scores = rng.permutation(len(rows)).astype(np.float32) / len(rows)
    return Results(index.image_ids[index.image_of_row[rows]], boxes, scores, labels.astype(np.int64))


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_the_slow_reading_of_its_rules(seed: int, tmp_path: Path) -> None:
    file = lvis_file(seed)
    index = open_data(lvis_folder(tmp_path, file), "val").index
    results = detections(index, seed)
    found = evaluate(results, index)
    expected = lvis.evaluate(file, list(coco_results(results, index.category_ids)))
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value * 100 if value >= 0 else -1), name
    assert 5 < found.ap < 95
    plain = evaluate(results, replace(index, federated=None))
    assert plain.ap < found.ap and "ap_rare" not in plain.values  # detections of classes that nobody looked for count as false there
    assert found.voc_ap50 == found.ar100 == -1 and found.ar300 > 0


def test_no_more_than_300_detections_of_an_image_count(tmp_path: Path) -> None:
    file = lvis_file(5, images=2)
    index = open_data(lvis_folder(tmp_path, file), "val").index
    results = detections(index, 5, copies=80)
    assert len(results.scores) > 2 * 300
    expected = lvis.evaluate(file, list(coco_results(results, index.category_ids)))
    assert evaluate(results, index).ap == pytest.approx(expected["ap"] * 100)


def test_ap_at_any_iou_of_federated_data(tmp_path: Path) -> None:
    file = lvis_file(1)
    index = open_data(lvis_folder(tmp_path, file), "val").index
    results = detections(index, 1)
    found = evaluate(results, index, ious=(0.3,))
    expected = lvis.evaluate(file, list(coco_results(results, index.category_ids)), [0.3])
    assert found.ap30 == pytest.approx(expected["ap"] * 100)
    assert set(found.per_class_ap30) == set(index.classes) and found.ap30 > found.ap50


def test_what_the_index_keeps_of_images_and_joined_data(tmp_path: Path) -> None:
    file = lvis_file()
    dataset = open_data(lvis_folder(tmp_path, file), "val")
    index = dataset.index
    assert index.federated is not None and index.federated.frequencies == tuple("rcfrcf")
    label_of = {c["id"]: label for label, c in enumerate(file["categories"])}
    for position, image in enumerate(file["images"]):
        for lists, name in ((index.federated.absent, "neg_category_ids"), (index.federated.incomplete, "not_exhaustive_category_ids")):
            assert lists.of_image(position).tolist() == [label_of[i] for i in image[name]]
    few = first_images(dataset, 3).index.federated
    picked = index.keep_images(np.array([4, 1])).federated
    joined = join_indices([index, index.keep_images(np.array([4, 1]))]).federated
    assert few and picked and joined
    assert len(few.absent.offsets) == 4 and picked.absent.of_image(0).tolist() == index.federated.absent.of_image(4).tolist()
    assert joined.incomplete.of_image(len(index) + 1).tolist() == index.federated.incomplete.of_image(1).tolist()
    assert join_indices([index, replace(index, federated=None)]).federated is None


def test_images_are_found_by_their_address(tmp_path: Path) -> None:
    """LVIS takes images of COCO's train2017 for its validation too, and names no files."""
    root = lvis_folder(tmp_path, lvis_file(), pictures=True)
    lvis_folder(tmp_path, lvis_file(1), "train", pictures=True)
    dataset = open_data(root, "val")
    assert [dataset.index.file(i) for i in (0, 1)] == ["train2017/000000000001.jpg", "val2017/000000000002.jpg"]
    assert dataset.load_image(1).shape == (200, 300, 3)
    found = check_data(root)
    assert {s.name for s in found.splits} == {"train", "val"} and {f.kind for f in found.findings if f.fatal} == {"same images"}
    (tmp_path / "images").mkdir()
    for folder in ("train2017", "val2017"):
        (tmp_path / folder).rename(tmp_path / "images" / folder)
    assert open_data(root, "val").load_image(0).shape == (200, 300, 3)


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("images", {"coco_url": ""}, r"file_name '' cannot be the name of a file"),
        ("images", {"neg_category_ids": ["a"]}, r"images\[0\].*neg_category_ids"),
        ("categories", {"frequency": "x"}, r"categories\[0\].*Invalid enum value 'x'"),
        ("annotations", {"image_id": 5}, "its image_id 5 is no image"),
    ],
)
def test_faults_are_named(place: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = lvis_file()
    file[place][0] |= changes
    lvis_folder(tmp_path, file)
    with pytest.raises(ValueError, match=rf"lvis_v1_val\.json.*{message}"):
        open_data(tmp_path, "val")
