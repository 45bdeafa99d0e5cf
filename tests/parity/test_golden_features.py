"""Released DETRDistill's feature distillation, FGD, and MGD of mmrazor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from steadydetr.boxes import to_cxcywh
from steadydetr.equations.distill import background, foreground, query_masks, released_mask
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Frozen
from steadydetr.objectives import FGD, MGD, ReleasedFeatures, SetPrediction, mgd, released_features
from steadydetr.objectives.feature_levels import Level
from steadydetr.objectives.fgd import boxes_in_cells
from steadydetr.objectives.method import Method
from steadydetr.objectives.released_features import released_queries, released_terms
from steadydetr.structures import DecodedStages, Targets
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
    stages = DecodedStages(
        tensors["in.cls_logits"], tensors["in.boxes_cxcywh"], content=tensors["in.hs"], reference=tensors["in.boxes_cxcywh"]
    )
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
    monkeypatch.setattr(released_features, "MOST_PAIRS", config["max_per_img"])
    teacher, student = rebuild(config, tensors, "teacher"), rebuild(config, tensors, "student")
    objectives = (SetPrediction(), ReleasedFeatures())
    losses = Method(student, Criterion(), objectives, {"teacher": Frozen(teacher)})(batch(config, tensors))
    for stage, value in enumerate(losses["features/error"]):
        close(value, tensors[f"out.stage{stage}.feature_part"].reshape(()), atol=0, rtol=2e-5)
    assert dict((name, weight) for name, _, weight in losses)["features/error"] == 1


@pytest.mark.parametrize("path", cases("mmdet/fgd_*"))
def test_fgd(path: Path) -> None:
    """Terms before their weights, attention and masks, the total and its gradients, to both context blocks too."""
    config, tensors = load(path)
    objective = FGD(focal=not config["no_attention"])
    weights = [config[f"{name}_fgd"] for name in ("alpha", "beta", "gamma", "lambda")] + [config["temp"]]
    assert [objective.foreground, objective.background, objective.attention, objective.context, objective.temperature] == weights
    module = objective.module(config["student_channels"], config["teacher_channels"], 8)
    module.load_state_dict(fgd_state(tensors, "state."))
    student = tensors["in.preds_S"].requires_grad_()
    given = level(student, tensors["in.preds_T"])
    images = len(student)
    targets = targets_of(tensors, images)

    covered = foreground(boxes_in_cells(targets, given), targets.image, images, given.size)
    close(covered, tensors["out.Mask_fg"].flatten(1), atol=0, rtol=1e-6)
    close(background(covered, given.padding), tensors["out.Mask_bg"].flatten(1), atol=0, rtol=1e-6)
    aligned = module["align"](given.student)  # type: ignore[index, operator]
    for features, who in ((aligned, "s"), (given.teacher, "t")):
        places, kinds = objective._attention(features, given.padding)
        close(places, tensors[f"out.S_attention_{who}"].flatten(1), atol=0, rtol=2e-5)
        close(kinds, tensors[f"out.C_attention_{who}"], atol=0, rtol=2e-5)

    terms = objective.terms(module, given, SimpleNamespace(targets=targets))  # type: ignore[arg-type]
    names = {"foreground": "fg", "background": "bg", "attention": "mask", "context": "rela"}
    for name, (value, _) in terms.items():
        close(value / images, tensors[f"out.{names[name]}_loss"], atol=0, rtol=1e-5, name=name)
    total = sum(value * weight for value, weight in terms.values()) / images
    close(total, tensors["out.total"], atol=0, rtol=1e-5)  # type: ignore[arg-type]
    total.sum().backward()  # type: ignore[union-attr]
    close(student.grad, tensors["out.grad_preds_S"], atol=2e-7, rtol=1e-4)  # type: ignore[arg-type]
    norms = fgd_state(tensors, "out.gradnorm.")
    for name, parameter in module.named_parameters():
        close(parameter.grad.norm().reshape(1), norms[name].reshape(1), atol=1e-7, rtol=1e-4, name=name)  # type: ignore[union-attr]


def fgd_state(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Official names -> ours; 1 x 1 convolutions are linear layers here."""
    ours = {"conv_mask_s": "student.where", "conv_mask_t": "teacher.where", "align": "align"}
    ours |= {"channel_add_conv_s": "student.what", "channel_add_conv_t": "teacher.what"}
    found = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            head, _, rest = key.removeprefix(prefix).partition(".")
            found[f"{ours[head]}.{rest}"] = value.flatten(1) if value.ndim == 4 else value.flatten()
    return found


@pytest.mark.parametrize("path", cases("mmdet/mgd_*"))
def test_mgd(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = load(path)
    objective = MGD()
    assert (objective.weight, objective.masked) == (config["alpha_mgd"], config["lambda_mgd"])
    module = objective.module(config["student_channels"], config["teacher_channels"], 8)
    ours = {"state.generation.0": "first", "state.generation.2": "second", "state.align": "align"}
    state = {f"{ours[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": v for key, v in tensors.items() if key.startswith("state.")}
    module.load_state_dict({key: value.flatten(1) if key == "align.weight" else value for key, value in state.items()})
    student = tensors["in.preds_S"].requires_grad_()
    given = level(student, tensors["in.preds_T"])
    drawn = tensors["in.rand"].flatten(1)
    kept = (drawn <= 1 - objective.masked).float()
    assert torch.equal(kept, tensors["out.kept_mask"].flatten(1))
    close(given.as_map(module(given, kept)), tensors["out.generated"], atol=2e-6)
    monkeypatch.setattr(mgd, "random_by_token", lambda *_: drawn)
    value, weight = objective.terms(module, given, SimpleNamespace(batch=None))["generated"]  # type: ignore[arg-type]
    close(value / len(student), tensors["out.sum_sq_over_N"], atol=0, rtol=1e-5)
    loss = value / len(student) * weight
    close(loss, tensors["out.loss"], atol=0, rtol=1e-5)
    close(torch.autograd.grad(loss.sum(), student)[0], tensors["out.grad_preds_S"], atol=1e-9, rtol=1e-4)
