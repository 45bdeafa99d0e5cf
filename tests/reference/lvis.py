"""LVIS's AP of boxes, slowly and by its rules: federated classes, 300 detections of an image, 10 IoUs, 101 recalls."""

from __future__ import annotations

from typing import Any

import numpy as np

IOUS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}


def iou(a: list[float], b: list[float]) -> float:
    """Of two boxes x, y, w, h."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def evaluate(file: dict[str, Any], detections: list[dict[str, Any]], ious: Any = IOUS) -> dict[str, float]:
    """LVIS's metrics between 0 and 1, -1 where there is no such object.

    Args:
        file: an annotation file of LVIS.
        detections: entries of a file of results: image_id, category_id, bbox, score.
    """
    kept = []
    for image in file["images"]:
        own = [d for d in detections if d["image_id"] == image["id"]]
        kept += sorted(own, key=lambda d: -d["score"])[:300]
    ap = {(area, c["id"]): _class(file, kept, c["id"], limits, ious) for area, limits in AREAS.items() for c in file["categories"]}

    def mean(area: str, rows: slice = slice(None), frequency: str = "rcf") -> float:
        found = [ap[area, c["id"]] for c in file["categories"] if c["frequency"] in frequency]
        values = [precision[rows] for precision in found if precision is not None and precision[rows].size]
        return float(np.mean(values)) if values else -1.0

    return {
        **{f"ap{area}": mean(area) for area in AREAS},
        "ap50": mean("", slice(0, 1)),
        "ap75": mean("", slice(5, 6)),
        "ap_rare": mean("", frequency="r"),
        "ap_common": mean("", frequency="c"),
        "ap_frequent": mean("", frequency="f"),
    }


def _class(file: dict[str, Any], detections: list[dict[str, Any]], category: int, area: tuple[float, float], ious: Any) -> Any:
    """Precision [IoU, recall] of one class; None where no object of that size has it."""
    found, objects = [[] for _ in ious], 0
    for image in file["images"]:
        truth = [a for a in file["annotations"] if (a["image_id"], a["category_id"]) == (image["id"], category)]
        if not truth and category not in image["neg_category_ids"]:
            continue  # nobody looked for the class here
        truth.sort(key=lambda a: not area[0] <= a["area"] <= area[1])
        beyond = [not area[0] <= a["area"] <= area[1] for a in truth]
        objects += beyond.count(False)
        own = sorted((d for d in detections if (d["image_id"], d["category_id"]) == (image["id"], category)), key=lambda d: -d["score"])
        for rows, threshold in zip(found, ious, strict=True):
            taken = set[int]()
            for detection in own:
                size = detection["bbox"][2] * detection["bbox"][3]
                best, at = min(threshold, 1 - 1e-10), -1
                for row, one in enumerate(truth):
                    if (
                        row in taken
                        or (at >= 0 and not beyond[at] and beyond[row])
                        or (overlap := iou(detection["bbox"], one["bbox"])) < best
                    ):
                        continue
                    best, at = overlap, row
                taken.add(at)
                incomplete = category in image["not_exhaustive_category_ids"]
                ignored = beyond[at] if at >= 0 else not area[0] <= size <= area[1] or incomplete
                if not ignored:
                    rows.append((detection["score"], at >= 0))
    return np.stack([_precision(rows, objects) for rows in found]) if objects else None


def _precision(rows: list[tuple[float, bool]], objects: int) -> Any:
    """[recall] the highest precision at that recall or beyond."""
    true = np.cumsum([hit for _, hit in sorted(rows, key=lambda row: -row[0])])
    recall, precision = true / objects, true / np.arange(1, len(true) + 1)
    return np.array([precision[recall >= level].max(initial=0) for level in RECALLS])
