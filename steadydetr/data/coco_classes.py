"""COCO's classes and their ids, which have gaps; official detectors have a row for 80 classes, or for all 91 ids."""

from __future__ import annotations

import os
from pathlib import Path

from steadydetr.data.reading import decode_text, read_file
from steadydetr.limits import DEFAULT_LIMITS

# fmt: off
NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave",
    "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # ids up to 90 that no class has
# fmt: on
IDS = tuple(i for i in range(1, 91) if i not in UNUSED)


def class_list(classes: str, rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids for a detector with `rows` class rows.

    Args:
        classes: "coco" for COCO's 80 classes in a row or its 91 raw ids (row = id); a text file with a name a line;
            "auto": coco where the rows fit, else numbered names.

    Raises:
        ValueError: the list has another length than the detector.
    """
    if classes in ("coco", "auto") and rows == len(NAMES):
        return NAMES, IDS
    if classes in ("coco", "auto") and rows == 91:
        by_id = dict(zip(IDS, NAMES, strict=True))
        return tuple(by_id.get(i, f"unused {i}") for i in range(rows)), tuple(range(rows))
    if classes == "auto":
        return tuple(f"class {i}" for i in range(rows)), tuple(range(1, rows + 1))
    if classes == "coco":
        raise ValueError(f"--classes coco: the file has {rows} class rows, COCO needs 80 or 91")
    path = Path(classes)
    if not os.path.exists(path):
        raise ValueError(f"--classes {classes}: neither coco, auto nor a file")
    text = decode_text(read_file(path, DEFAULT_LIMITS.max_annotation_mb, "max_annotation_mb"), path)
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != rows:
        raise ValueError(f"--classes {classes}: {len(names)} names, but the file has {rows} class rows")
    return names, tuple(range(1, rows + 1))
