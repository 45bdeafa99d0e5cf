"""The metrics against pycocotools, VOC's by hand, and the explanations of a low AP."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from steadydetr.data import AnnotationIndex, open_data
from steadydetr.metrics.coco import COCO_METRICS
from steadydetr.metrics.evaluation import evaluate
from steadydetr.metrics.low_ap import explain_low_ap
from steadydetr.metrics.results import Results
from steadydetr.metrics.table import CLASS_METRICS, METRICS, REQUIRED_NAMES, SUMMARY_NAMES
from steadydetr.metrics.voc import voc_ap50


def jittered(index: AnnotationIndex, copies: int = 8, seed: int = 0) -> Results:
    """The annotations themselves, moved, relabelled now and then, with random scores."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(len(index.labels)), copies)
    boxes = index.boxes_xyxy[rows] + rng.normal(0, 8, (len(rows), 4)).astype(np.float32)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    wrong = rng.random(len(rows)) < 0.2
    labels = np.where(wrong, rng.integers(0, len(index.classes), len(rows)), index.labels[rows])
    return Results(index.image_ids[index.image_of_row[rows]], boxes, rng.random(len(rows)).astype(np.float32), labels.astype(np.int64))


@pytest.mark.parametrize("seed", [0, 1])
def test_same_numbers_as_pycocotools_to_the_last_digit(shared: Path, seed: int) -> None:
    index = open_data(shared / "data/coco128", "val").index
    results = jittered(index, seed=seed)
    ours = evaluate(results, index)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(shared / "data/coco128/annotations/instances_val2017.json"))
        peer = COCOeval(truth, truth.loadRes(results.coco_rows(index.category_ids)), "bbox")
        peer.evaluate()
        peer.accumulate()
        peer.summarize()
    for metric, value in zip(COCO_METRICS, peer.stats, strict=True):
        assert getattr(ours, metric.name) == value * 100
    assert 10 < ours.ap < 60
    precision = peer.eval["precision"]
    for k, name in enumerate(index.classes):
        values = precision[:, :, k, 0, -1]
        if (values > -1).any():
            assert ours.per_class[name] == pytest.approx(float(values[values > -1].mean() * 100))


def test_ap_at_any_iou_is_pycocotools(shared: Path) -> None:
    """Over all classes and for each, with IoUs between COCO's and below them; the others stay as they are."""
    index = open_data(shared / "data/coco128", "val").index
    results = jittered(index)
    found = evaluate(results, index, ious=(0.625, 0.3, 0.5))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(shared / "data/coco128/annotations/instances_val2017.json"))
        peer = COCOeval(truth, truth.loadRes(results.coco_rows(index.category_ids)), "bbox")
        peer.params.iouThrs = np.array([0.3, 0.5, 0.625])
        peer.evaluate()
        peer.accumulate()
    precision = peer.eval["precision"][:, :, :, 0, -1]
    for row, name in enumerate(("ap30", "ap50", "ap62.5")):
        values = precision[row]
        assert found.values[name] == pytest.approx(float(values[values > -1].mean()) * 100)
        by_class = found.values[f"per_class_{name}"]
        assert isinstance(by_class, dict)
        expected = [values[:, k].mean() * 100 for k in range(len(index.classes)) if values[0, k] > -1]
        assert list(by_class) == list(found.per_class) and list(by_class.values()) == pytest.approx(expected)
    plain = evaluate(results, index)
    assert all(found.values[name] == value for name, value in plain.values.items())
    assert list(found.as_dict())[-6:] == ["images", "per_class", "per_class_ap50", "per_class_ap30", "per_class_ap62.5", "warnings"]
    assert evaluate(Results.of([], []), one_class([], []), ious=(0.3,)).values["ap30"] == -1


def one_class(boxes: list[list[float]], difficult: list[bool]) -> AnnotationIndex:
    return AnnotationIndex.build(
        image_ids=[1],
        files=["a"],
        sizes=[(100, 100)],
        counts=[len(boxes)],
        boxes_xyxy=boxes,
        labels=[0] * len(boxes),
        difficult=difficult,
        classes=("thing",),
        category_ids=(1,),
    )


def test_voc_metrics_by_hand() -> None:
    """Two objects and a difficult one. Ranked: hit, miss, hit of the difficult (does not count), second hit of the first, hit."""
    index = one_class([[0, 0, 10, 10], [50, 50, 60, 60], [80, 0, 90, 10]], [False, False, True])
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30], [80, 0, 90, 10], [0, 0, 10, 9], [50, 50, 60, 60]], np.float32)
    results = Results(np.ones(5, np.int64), boxes, np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32), np.zeros(5, np.int64))
    all_point, eleven = voc_ap50(results, index)
    # precision 1 at recall 0.5, and 2/4 at recall 1
    assert all_point == pytest.approx(100 * (0.5 * 1 + 0.5 * 0.5))
    assert eleven == pytest.approx(100 * (6 * 1 + 5 * 0.5) / 11)


def test_a_low_ap_is_explained() -> None:
    index = one_class([[10, 10, 60, 60]], [False])
    nothing = Results.of([], [])
    assert evaluate(nothing, index).warnings == ("there is not one detection",)
    good = Results(np.ones(1, np.int64), np.array([[0.1, 0.1, 0.6, 0.6]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64))
    assert "normalised" in evaluate(good, index).warnings[0]
    other_image = replace(good, image_ids=np.array([7]), boxes_xyxy=index.boxes_xyxy)
    assert "image ids belong to another" in explain_low_ap(other_image, index)[0]
    assert evaluate(replace(good, boxes_xyxy=index.boxes_xyxy), index).ap == pytest.approx(100)


def test_low_scores_explain_a_low_ap() -> None:
    """Boxes in the wrong place: nothing is said of their scores unless all of them are below 0.05."""
    index = one_class([[10, 10, 60, 60]], [False])

    def notes(*scores: float) -> tuple[str, ...]:
        count = len(scores)
        boxes = np.tile(np.array([70, 70, 90, 90], np.float32), (count, 1))
        results = Results(np.ones(count, np.int64), boxes, np.array(scores, np.float32), np.zeros(count, np.int64))
        return evaluate(results, index).warnings

    assert notes(0.049, 0.01) == ("no score reaches 0.05: the detector has hardly been trained yet",)
    assert notes(0.01, 0.051) == ()


def test_what_is_written_keeps_its_names_and_order() -> None:
    """Files of every version have them, so that runs of several versions can be compared."""
    coco = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]
    index = one_class([[10, 10, 60, 60]], [False])
    found = evaluate(Results(np.ones(1, np.int64), index.boxes_xyxy, np.ones(1, np.float32), np.zeros(1, np.int64)), index)
    written = found.as_dict()
    assert list(written) == [*coco, "voc_ap50", "voc07_ap50", "images", "per_class", "per_class_ap50", "warnings"]
    assert all(getattr(found, name) == value for name, value in written.items())
    assert found.ap_large == -1 and found.per_class == {"thing": pytest.approx(100)} and found.images == 1
    with pytest.raises(AttributeError, match="no metric 'ap60'; there are ap, ap50"):
        _ = found.ap60


def test_every_metric_has_one_name_and_one_label() -> None:
    for metrics in (METRICS, CLASS_METRICS):
        assert len({metric.label for metric in metrics}) == len({metric.name for metric in metrics}) == len(metrics)
    of_boxes = ("ap", "ap50", "ap75", "voc_ap50", "voc07_ap50", "per_class")
    assert list(SUMMARY_NAMES) == [*of_boxes[:-1], "segm_ap", "segm_ap50", "segm_ap75", "per_class", "segm_per_class"]
    assert {*of_boxes, "ap_small", "ap_medium", "ap_large", "ar100"} == set(REQUIRED_NAMES)
