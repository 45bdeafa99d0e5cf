"""Released DETRDistill's feature distillation, FGD, and MGD of mmrazor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from steadydetr.boxes import to_cxcywh
from steadydetr.criterion import Criterion
from steadydetr.equations.distill import query_masks, released_mask
from steadydetr.method import Method
from steadydetr.objectives import Detection, FeatureDistillation, feature_distillation
from steadydetr.objectives.feature_distillation import released_queries, released_terms
from steadydetr.objectives.feature_levels import Level
from steadydetr.structures import Stages, Targets
from steadydetr.teachers import Frozen
from tests.parity.golden import cases, load
from tests.parity.models import close, numbered
from tests.parity.test_golden_mmdet import CASES as FULL
from tests.parity.test_golden_mmdet import batch, rebuild


def targets_of(tensors: dict[str, Tensor], images: int) -> Targets:
    """Normalised by the true sizes, as all our boxes are."""
    boxes, labels = [], []
    for i, (h, w) in enumerate(tensors["in.img_shape"].tolist()):
        boxes.append(to_cxcywh(tensors[f"in.gt_boxes.{i}"] / torch.tensor((w, h, w, h))))
        labels.append(tensors.get(f"in.gt_labels.{i}", torch.zeros(len(boxes[-1]), dtype=torch.int64)))
    assert len(boxes) == images
    return Targets(torch.cat(labels), torch.cat(boxes), tuple(map(len, boxes)))


def level(student: Tensor, teacher: Tensor, start: int = 0) -> Level:
    """Maps [B, c, h, w] as a level without padding, which the released code does not know."""
    size = (teacher.shape[2], teacher.shape[3])
    flat = [m.flatten(2).transpose(1, 2) for m in (student, teacher)]
    padding = torch.zeros(len(teacher), size[0] * size[1], dtype=torch.bool)
    return Level(*flat, padding, size, torch.tensor(size[::-1]).expand(len(teacher), 2), start)


@pytest.mark.parametrize("path", cases("mmdet/detrdistill_quality_*"))
def test_released_queries_and_their_quality(path: Path) -> None:
    config, tensors = load(path)
    stages = Stages(tensors["in.cls_logits"], tensors["in.boxes_cxcywh"], tensors["in.hs"])
    queries, quality = released_queries(stages, targets_of(tensors, stages.logits.shape[1]), config["max_per_img"])
    for stage in range(len(stages.logits)):
        assert torch.equal(queries[stage], tensors[f"out.stage{stage}.weight_query"])
        close(quality[stage], tensors[f"out.stage{stage}.quality_score"], atol=1e-6)


@pytest.mark.parametrize("path", cases("mmdet/detrdistill_feature_*"))
def test_released_masks_and_loss(path: Path) -> None:
    _, tensors = load(path)
    queries, quality = tensors["in.teacher.queries"], tensors["in.quality_score"]
    maps = [numbered(tensors, f"in.{who}.feat.") for who in ("student", "teacher")]
    levels = [level(s.requires_grad_(), t) for s, t in zip(*maps, strict=True)]
    for stage in range(len(queries)):
        for i, part in enumerate(levels):
            mask = released_mask(part.teacher, queries[stage], quality[stage])
            close(mask, tensors[f"out.stage{stage}.level{i}.mask"].flatten(1), atol=1e-6)
    normalise = torch.nn.functional.normalize
    similarity = query_masks(normalise(levels[3].teacher, dim=-1), normalise(queries[0], dim=-1))
    close(similarity, tensors["out.stage0.level3.similarity"].flatten(2), atol=1e-6)

    values = released_terms(levels, queries, quality) / queries.shape[1]
    for stage, value in enumerate(values):
        close(value, tensors[f"out.loss.stage{stage}_relation_distill_loss"].reshape(()), atol=0, rtol=2e-6)
    close(values.sum(), tensors["out.loss.total"].reshape(()), atol=0, rtol=2e-6)
    for i, gradient in enumerate(torch.autograd.grad(values.sum(), maps[0])):
        close(gradient, tensors[f"out.grad_student.feat.{i}"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("path", FULL)
def test_released_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The objective in a whole step, teacher's predictions included: the part of each stage's term that is not contrastive."""
    config, tensors = load(path)
    monkeypatch.setattr(feature_distillation, "RELEASED_TOP", config["max_per_img"])
    teacher, student = rebuild(config, tensors, "teacher"), rebuild(config, tensors, "student")
    objectives = (Detection(), FeatureDistillation(as_released=True))
    losses = Method(student, Criterion(), objectives, {"teacher": Frozen(teacher)})(batch(config, tensors))
    for stage, value in enumerate(losses["features/error"]):
        close(value, tensors[f"out.stage{stage}.feature_part"].reshape(()), atol=0, rtol=2e-5)
    assert dict((name, weight) for name, _, weight in losses)["features/error"] == 1
