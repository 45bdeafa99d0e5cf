"""mmdet's Deformable DETR, as the student and the teacher of DETRDistill: predictions and detection losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadydetr.boxes import to_cxcywh
from steadydetr.detectors import DeformableDETRConfig
from steadydetr.detectors.deformable import DeformableDetector
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.objectives import SetPrediction
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Targets
from tests.parity.golden import files, load
from tests.parity.models import close, config_of, load_case, numbered

# claimed by test_golden_distillation.py
CASES = [pytest.param(path, id=path.stem) for path in files("mmdet/detrdistill_full_*")]


class GivenNeck(nn.Module):
    """The files begin after the neck, and hold no parameters of one."""

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return maps


def rebuild(config: dict[str, Any], tensors: dict[str, Tensor], who: str) -> DeformableDetector:
    prefix = f"state.{who}."
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    maps = numbered(tensors, f"in.{who}.feat.")
    width = config["embed_dims"]
    for i, given in enumerate(maps):  # a neck that the converter asks for, replaced below
        state[f"neck.convs.{i}.conv.weight"] = torch.zeros(width, given.shape[1], 1, 1)
        state |= {f"neck.convs.{i}.gn.{name}": torch.zeros(width) for name in ("weight", "bias")}
    ours = config_of(state, config["num_heads"], maps, torch.float32)
    assert isinstance(ours, DeformableDETRConfig) and ours.refine == config.get("with_box_refine", False)
    assert ours.transformer.decoder_points == config["num_points"]
    detector = load_case(state, ours, torch.float32)
    detector.neck = GivenNeck()  # type: ignore[assignment]
    return detector


def batch(config: dict[str, Any], tensors: dict[str, Tensor]) -> Batch:
    sizes = tuple((h, w) for h, w in tensors["in.img_shape"].long().tolist())
    padding = torch.ones(len(sizes), *config["batch"], dtype=torch.bool)
    scales = []
    for i, (h, w) in enumerate(sizes):
        padding[i, :h, :w] = False
        scales.append(torch.tensor([w, h, w, h], dtype=torch.float32))
    labels = [tensors[f"in.gt_labels.{i}"] for i in range(len(sizes))]
    boxes = [to_cxcywh(tensors[f"in.gt_boxes.{i}"] / scale) for i, scale in enumerate(scales)]
    targets = Targets(torch.cat(labels), torch.cat(boxes), tuple(map(len, labels)))
    return Batch(torch.zeros(len(sizes), 3, *config["batch"]), padding, targets, tuple(range(len(sizes))), sizes)


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("path", CASES)
def test_predictions(path: Path, who: str) -> None:
    config, tensors = load(path)
    detector, given = rebuild(config, tensors, who).eval(), batch(config, tensors)
    with torch.no_grad():
        stages = detector(given.images, given.padding)
    close(stages.logits, tensors[f"out.{who}.cls_logits"], atol=2e-5)
    close(stages.boxes, tensors[f"out.{who}.boxes_cxcywh"], atol=2e-6)
    close(stages.content, tensors[f"out.{who}.hs"], atol=1e-5)


@pytest.mark.parametrize("path", CASES)
def test_detection_losses(path: Path) -> None:
    """Of the student; weights 2, 5, 2, in mmdet's names."""
    config, tensors = load(path)
    weights = Weights(2.0, 5.0, 2.0)
    losses = Method(rebuild(config, tensors, "student"), Criterion(loss_weights=weights), (SetPrediction(),))(batch(config, tensors))
    names = {"class": "cls", "l1": "bbox", "giou": "iou"}
    for name, values, weight in losses:
        for stage, value in enumerate(values):
            prefix = "" if stage == len(values) - 1 else f"d{stage}."
            expected = tensors[f"out.loss.{prefix}loss_{names[name.partition('/')[2]]}"]
            close(value * weight, expected.reshape(()), atol=1e-5, rtol=1e-5, name=f"{name} of stage {stage}")
