"""Detections of MaskDINO's own code from its predictions: scores times the quality of masks, and masks at the size of the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from steadydetr.detectors import postprocess
from steadydetr.structures import MaskPredictions, Stages
from tests.parity.golden import cases, load


@pytest.mark.parametrize("path", cases("detrex/c6_maskdino_model*"))
def test_detections_of_predictions(path: Path) -> None:
    _, tensors = load(path)
    logits, boxes, masks = (tensors[f"out.eval.pred_{name}"] for name in ("logits", "boxes", "masks"))
    every = torch.eye(logits.shape[1]).expand(1, len(logits), -1, -1)
    stages = Stages(logits[None], boxes[None], masks=MaskPredictions(every, masks))
    sizes = [(height, width) for height, width in tensors["in.image_sizes"].tolist()]
    padding = torch.ones(len(logits), *(4 * side for side in masks.shape[-2:]), dtype=torch.bool)
    for mask, (height, width) in zip(padding, sizes, strict=True):
        mask[:height, :width] = False
    top = len(tensors["out.eval.det.0.scores"])
    for i, found in enumerate(postprocess(stages, sizes, top, padding=padding)):
        scores, order = tensors[f"out.eval.det.{i}.scores"].sort(descending=True)
        torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-7)
        assert torch.equal(found.labels, tensors[f"out.eval.det.{i}.classes"][order])
        (height, width), (down, right) = sizes[i], padding.shape[1:]
        boxes_of_image = tensors[f"out.eval.det.{i}.boxes"][order] * torch.tensor((width / right, height / down)).repeat(2)
        torch.testing.assert_close(found.boxes_xyxy, boxes_of_image, rtol=1e-5, atol=1e-4)  # its boxes span the padded image
        assert found.masks is not None
        areas = tensors[f"out.eval.det.{i}.mask_area"][order].numpy()
        assert np.abs(found.masks.areas - areas).max() <= 1, (found.masks.areas, areas)
