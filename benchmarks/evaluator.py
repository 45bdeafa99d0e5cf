"""Our COCO evaluation against pycocotools on the same generated results: 1,000 images, 7,000 objects, 100,000 detections.

python benchmarks/evaluator.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timing import paired, print_row

from steadydetr.data import AnnotationIndex
from steadydetr.metrics.coco import COCO_METRICS, run_coco
from steadydetr.metrics.evaluation import evaluate
from steadydetr.metrics.results import Results

IMAGES, OBJECTS, DETECTIONS, CLASSES = 1_000, 7_000, 100_000, 80


def example() -> tuple[AnnotationIndex, Results]:
    rng = np.random.default_rng(0)
    owners = np.sort(rng.integers(IMAGES, size=OBJECTS))
    corners = rng.random((OBJECTS, 2)) * 400
    boxes = np.concatenate((corners, corners + rng.random((OBJECTS, 2)) * 200 + 4), 1).astype(np.float32)
    index = AnnotationIndex.build(
        image_ids=np.arange(1, IMAGES + 1),
        files=[f"{i}.jpg" for i in range(IMAGES)],
        sizes=np.full((IMAGES, 2), 640),
        counts=np.bincount(owners, minlength=IMAGES),
        boxes_xyxy=boxes,
        labels=rng.integers(CLASSES, size=OBJECTS),
        classes=tuple(f"class {i}" for i in range(CLASSES)),
        category_ids=tuple(range(1, CLASSES + 1)),
    )
    rows = rng.integers(OBJECTS, size=DETECTIONS)
    moved = boxes[rows] + rng.normal(0, 12, (DETECTIONS, 4)).astype(np.float32)
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    labels = np.where(rng.random(DETECTIONS) < 0.3, rng.integers(CLASSES, size=DETECTIONS), index.labels[rows])
    return index, Results(owners[rows] + 1, moved, rng.random(DETECTIONS).astype(np.float32), labels.astype(np.int64))


def pycocotools(index: AnnotationIndex, results: Results) -> COCOeval:
    boxes = index.boxes_xyxy.astype(float)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": int(i), "height": 640, "width": 640} for i in index.image_ids],
        "categories": [{"id": i, "name": str(i)} for i in index.category_ids],
        "annotations": [
            {
                "id": k + 1,
                "image_id": int(index.image_ids[image]),
                "category_id": int(index.labels[k]) + 1,
                "bbox": [*boxes[k, :2], *(boxes[k, 2:] - boxes[k, :2])],
                "area": float(index.areas[k]),
                "iscrowd": 0,
            }
            for k, image in enumerate(index.image_of_row)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results.coco_rows(index.category_ids)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    index, results = example()
    ours, peer = evaluate(results, index), pycocotools(index, results)
    same = all(
        ours.values[metric.name] == (value * 100 if value >= 0 else -1) for metric, value in zip(COCO_METRICS, peer.stats, strict=True)
    )
    print(f"{IMAGES} images, {OBJECTS} objects, {DETECTIONS} detections; the twelve numbers are equal: {same}; {rounds} paired rounds")
    print_row("COCO's twelve numbers", *paired(lambda: run_coco(results, index), lambda: pycocotools(index, results), rounds))
    print_row(
        "everything (with VOC's and per class)", *paired(lambda: evaluate(results, index), lambda: pycocotools(index, results), rounds)
    )


if __name__ == "__main__":
    main()
