"""The last stage as detections, and class-wise suppression."""

from __future__ import annotations

import math

import torch

from steadydetr.detectors import postprocess
from steadydetr.structures import Stages
from tests.conftest import CLASSES, make_stages


def test_the_best_of_queries_times_classes() -> None:
    stages = make_stages(3, 2, 6)
    for image, found in enumerate(postprocess(stages, [(100, 200), (50, 40)], top=8)):
        boxes, scores, labels = found.boxes_xyxy, found.scores, found.labels
        table = stages.logits[-1, image].sigmoid()
        best = sorted(((float(table[q, c]), q, c) for q in range(6) for c in range(CLASSES)), reverse=True)[:8]
        height, width = [(100, 200), (50, 40)][image]
        for (score, q, c), box, ours, label in zip(best, boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
            x, y, w, h = stages.boxes[-1, image, q].tolist()
            corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            assert abs(ours - score) < 1e-6 and label == c
            assert max(abs(a - b) for a, b in zip(box, corners, strict=True)) < 1e-4


def test_fewer_candidates_than_asked_for_and_boxes_beyond_the_image() -> None:
    stages = Stages(torch.zeros(1, 1, 2, 3), torch.tensor([[[[0.0, 0.5, 0.4, 0.2], [1.0, 1.0, 1.0, 1.0]]]]))
    found = postprocess(stages, [(10, 10)], top=300)[0]
    boxes, scores, labels = found.boxes_xyxy, found.scores, found.labels
    assert len(boxes) == len(scores) == len(labels) == 6
    assert boxes.min() == -2 and boxes.max() == 15  # not clipped


def test_suppression_is_class_wise() -> None:
    same = [0.5, 0.5, 0.4, 0.4]
    boxes = torch.tensor([[[same, same, [0.1, 0.1, 0.1, 0.1]]]])
    logits = torch.full((1, 1, 3, 2), -9.0)
    logits[0, 0, 0, 0], logits[0, 0, 1, 0], logits[0, 0, 1, 1], logits[0, 0, 2, 0] = 3.0, 2.0, 1.0, 0.0
    stages = Stages(logits, boxes)
    found = postprocess(stages, [(10, 10)], top=4)[0]
    scores, labels = found.scores, found.labels
    assert labels.tolist() == [0, 0, 1, 0]
    found = postprocess(stages, [(10, 10)], top=4, nms=0.7)[0]
    kept, labels = found.scores, found.labels
    assert labels.tolist() == [0, 1, 0]  # the second of class 0 is gone, class 1 on the same place is not
    assert torch.equal(kept, scores[[0, 2, 3]])


def test_an_infinite_score_is_not_certain() -> None:
    stages = Stages(torch.zeros(1, 1, 3, 2), torch.full((1, 1, 3, 4), 0.5))
    stages.logits[0, 0, 1, 0], stages.logits[0, 0, 2, 1] = math.inf, -math.inf
    scores = postprocess(stages, [(10, 10)])[0].scores
    assert scores[0].isnan() and scores[1:].isfinite().all() and scores[-1] == 0
