"""AP of masks: equal to pycocotools to the last digit, and there only where both detector and data have masks."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from steadydetr.data import AnnotationIndex, open_data
from steadydetr.data.columns import find_ids
from steadydetr.data.masks import EncodedMasks
from steadydetr.metrics.coco import COCO_METRICS
from steadydetr.metrics.evaluation import evaluate
from steadydetr.metrics.results import Results, write_results
from tests.data_folders import coco_folder
from tests.test_lvis import detections, lvis_file, lvis_folder
from tests.test_masks import RUNS, SQUARE, content_with


def moved(index: AnnotationIndex, copies: int = 3, seed: int = 0) -> Results:
    """The masks of all annotations, of crowd regions too, moved, with holes or more, relabelled now and then, with random scores."""
    rng = np.random.default_rng(seed)
    parts = []
    for position in range(len(index)):
        rows, masks = index.rows(position), index.decode_masks(position)
        found = [np.roll(mask, tuple(rng.integers(-6, 7, 2)), (0, 1)) for mask in masks for _ in range(copies)]
        for mask in found:
            top, left = rng.integers(0, mask.shape)
            mask[top : top + rng.integers(60), left : left + rng.integers(60)] = rng.random() < 0.2
        labels = np.repeat(index.labels[rows], copies).astype(np.int64)
        labels = np.where(rng.random(len(labels)) < 0.2, rng.integers(0, len(index.classes), len(labels)), labels)
        boxes = np.repeat(index.boxes_xyxy[rows], copies, 0)
        if found:
            scores = rng.random(len(found)).astype(np.float32).round(2)  # many are equal
            masks_of = EncodedMasks.of(np.stack(found))
            parts.append(Results(np.repeat(index.image_ids[position], len(found)), boxes, scores, labels, masks_of))
    return Results.cat(parts)


def peer(annotations: Path, results: Path) -> COCOeval:
    """pycocotools on both files. Without boxes, as detectron2 does it, so that the areas are those of masks."""
    rows = [{name: value for name, value in row.items() if name != "bbox"} for row in json.loads(results.read_text())]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluator = COCOeval(truth, truth.loadRes(rows), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def assert_same(index: AnnotationIndex, results: Results, annotations: Path, folder: Path) -> Any:
    write_results(folder / "results.json", results, index.category_ids)
    other, ours = peer(annotations, folder / "results.json"), evaluate(results, index)
    for metric, value in zip(COCO_METRICS, other.stats, strict=True):
        assert getattr(ours, f"segm_{metric.name}") == (value * 100 if value >= 0 else -1), metric.name
    precision = other.eval["precision"]
    for k, name in enumerate(index.classes):
        values = precision[:, :, k, 0, -1]
        if (values > -1).any():
            assert ours.segm_per_class[name] == pytest.approx(float(values[values > -1].mean() * 100))
        assert (name in ours.segm_per_class) == bool((values > -1).any())
    return ours


@pytest.mark.parametrize("images", [14, pytest.param(128, marks=pytest.mark.slow)])
def test_same_numbers_as_pycocotools_to_the_last_digit(shared: Path, images: int, tmp_path: Path) -> None:
    """939 annotations of COCO, polygons and ten crowd regions, whose images come first. AP of boxes is what it is without masks."""
    index, path = open_data(shared / "data/coco128", "val", masks=True).index, tmp_path / "annotations.json"
    crowded = np.unique(index.image_of_row[index.crowd])
    index = index.keep_images(np.concatenate((crowded, np.setdiff1d(np.arange(len(index)), crowded)))[:images])
    content, kept = json.loads((shared / "data/coco128/annotations/instances_val2017.json").read_text()), set(index.image_ids.tolist())
    content["images"] = [image for image in content["images"] if image["id"] in kept]
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    path.write_text(json.dumps(content))
    results = moved(index)
    ours = assert_same(index, results, path, tmp_path)
    assert 10 < ours.segm_ap < 60 and ours.segm_ap_small < ours.segm_ap_large and index.crowd.sum() == 10
    plain = evaluate(replace(results, masks=None), replace(index, masks=None))
    assert all(ours.values[name] == value for name, value in plain.values.items())
    assert not any(name.startswith("segm") for name in plain.values) and len(ours.values) == len(plain.values) + 14


def test_runs_and_annotations_without_a_mask(tmp_path: Path) -> None:
    """Run lengths, and objects that no mask can find, which is said; to pycocotools they are run lengths without a pixel."""
    content = content_with(SQUARE, RUNS, None, [])
    coco_folder(tmp_path, content, ("val",))
    index = open_data(tmp_path, "val", masks=True).index
    results = moved(index, copies=2)
    for annotation in content["annotations"]:
        annotation["segmentation"] = annotation["segmentation"] or {"size": [6, 8], "counts": [48]}
    (tmp_path / "peer.json").write_text(json.dumps(content))
    ours = assert_same(index, results, tmp_path / "peer.json", tmp_path)
    assert "2 of 4 annotations have no mask: no detected mask can find them" in ours.warnings
    nothing = replace(index, masks=replace(index.masks, state=np.ones(4, np.uint8)))  # type: ignore[type-var]
    without = evaluate(results, nothing)
    assert "segm_ap" not in without.values and "no annotation has a mask, so that masks are not measured" in without.warnings


def test_perfect_masks(shared: Path) -> None:
    index = open_data(shared / "data/coco128", "val", masks=True).index.keep_images(np.arange(30))
    kept = index.keep_rows(~index.crowd)
    masks = EncodedMasks.cat([EncodedMasks.of(kept.decode_masks(position)) for position in range(len(kept))])
    count = len(kept.labels)
    boxes, scores = np.zeros((count, 4), np.float32), np.ones(count, np.float32)
    perfect = Results(kept.image_ids[kept.image_of_row], boxes, scores, kept.labels.astype(np.int64), masks)
    found = evaluate(perfect, index)
    assert found.segm_ap == pytest.approx(100) and found.segm_ar_small == pytest.approx(100) and found.ap < 1
    elsewhere = replace(perfect, image_ids=perfect.image_ids + 10**9)
    assert evaluate(elsewhere, index).segm_ap == 0
    assert evaluate(perfect.take(np.zeros(count, bool)), index).ap == 0


def test_lvis_has_its_own_rules_for_masks_too(tmp_path: Path) -> None:
    """Of masks that fill their boxes all numbers are those of boxes, which are LVIS's (tests/test_lvis.py)."""
    file = lvis_file(1)
    for row in file["annotations"]:
        x, y, width, height = (round(side) for side in row["bbox"])
        row["bbox"] = x, y, width, height = x, y, width, min(height, 200 - y)  # within the image, as masks are
        row["area"] = width * height
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    index = open_data(lvis_folder(tmp_path, file), "val", masks=True).index
    found = detections(index, 1)
    boxes = found.boxes_xyxy.round()
    sizes = index.sizes[find_ids(index.image_ids, found.image_ids)]
    boxes = np.minimum(boxes.clip(0), sizes[:, [1, 0, 1, 0]])
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    masks = [filled(box, size) for box, size in zip(boxes.astype(int).tolist(), sizes.tolist(), strict=True)]
    results = replace(found, boxes_xyxy=boxes, masks=EncodedMasks.cat(masks)).take(kept)
    ours = evaluate(results, index)
    names = [name for name in ours.values if f"segm_{name}" in ours.values]
    assert len(names) == 18 and ours.ap > 10 and ours.segm_ap_rare >= 0
    assert all(ours.values[f"segm_{name}"] == ours.values[name] for name in names)


def filled(box: list[int], size: list[int]) -> EncodedMasks:
    mask = np.zeros((1, *size), bool)
    mask[0, box[1] : box[3], box[0] : box[2]] = True
    return EncodedMasks.of(mask)
