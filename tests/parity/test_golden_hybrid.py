"""H-Deformable-DETR: both groups of queries in one pass, hybrid matching, losses, gradients, evaluation; its repository and detrex."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.detectors import HDeformableDETRConfig
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import pairwise_terms, solve
from steadydetr.objectives import OneToMany, SetPrediction
from steadydetr.structures import Losses, Match, MatchResult, Stages, Targets, dense_proposals
from tests.parity.golden import cases, load
from tests.parity.models import Case, close, encoder_outputs, noise, numbered, rebuild
from tests.parity.test_golden_detectors import check_gradients, check_matching
from tests.parity.test_golden_detrex import ATOL, check_gradient_norms

ORIGINAL = cases("original/hdetr_*")
DETREX = cases("detrex/x_h_deformable_*")
Step = tuple[StepContext, dict[str, Stages], dict[str, MatchResult], Losses]


def step(case: Case, criterion: Criterion, hybrid: OneToMany) -> Step:
    """One training step, as `Method` does it."""
    context = StepContext.of(case.batch(), case.detector.train(), criterion, {})
    objectives = (SetPrediction(), hybrid)
    stages = case.detector.decode(context.memory, [group for each in objectives for group in each.query_groups(context)])
    problems = [problem for each in objectives for problem in each.problems(context, stages)]
    solved = {problem.name: solution for problem, solution in zip(problems, solve(problems), strict=True)}
    losses = Losses()
    for each in objectives:
        each.add_losses(losses, context, stages, solved)
    return context, stages, solved, losses


def joined(stages: dict[str, Stages], name: str) -> Tensor:
    """Both groups side by side, as the files have them."""
    return torch.cat([getattr(stages[group], name) for group in ("main", "one-to-many")], 2)


def named(losses: Losses, label: str) -> Iterator[tuple[str, Tensor, float]]:
    """Values by the names of the originals, with their weights."""
    kinds = {"class": f"loss_{label}", "l1": "loss_bbox", "giou": "loss_giou"}
    for name, values, weight in losses:
        group, kind = name.split("/")
        for stage, value in enumerate(values):
            middle = "_enc" if group == "proposals" else "" if stage == len(values) - 1 else f"_{stage}"
            yield f"{kinds[kind]}{middle}{'_one2many' if group == 'one-to-many' else ''}", value, weight


def original(config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Case, Criterion, OneToMany]:
    weights = config["weight_dict"]
    criterion = Criterion(loss_weights=Weights(*(float(weights[f"loss_{name}"]) for name in ("ce", "bbox", "giou"))))
    return rebuild(config, tensors, dtype), criterion, OneToMany(config["k_one2many"], config["lambda_one2many"])


@pytest.mark.parametrize("path", ORIGINAL)
def test_training_step(path: Path) -> None:
    config, tensors = load(path)
    case, criterion, hybrid = original(config, tensors, torch.float64)
    context, stages, solved, losses = step(case, criterion, hybrid)
    for group, suffix in (("main", ""), ("one-to-many", "_one2many")):
        close(stages[group].logits, tensors[f"out64.logits{suffix}"], atol=max(1e-6, noise(config) / 10))
        close(stages[group].boxes, tensors[f"out64.boxes{suffix}"], atol=1e-6)
    check_matching(context, stages, solved, criterion, tensors)
    check_repeated(solved["one-to-many"].match, stages["one-to-many"], context.targets, criterion, tensors)
    values = {name: value * (hybrid.weight if name.endswith("one2many") else 1.0) for name, value, _ in named(losses, "ce")}
    for name, value in values.items():
        close(value, tensors[f"loss.{name}"], atol=1e-6, rtol=1e-5, name=name)
    assert values.keys() == {key.removeprefix("loss.") for key in tensors if key.startswith("loss.loss_")}
    close(losses.total, tensors["loss.TOTAL"], atol=0, rtol=1e-5)
    if any(key.startswith("grad.") for key in tensors):
        losses.total.backward()
        check_gradients(case, "grad.")


def check_repeated(match: Match, stages: Stages, targets: Targets, criterion: Criterion, tensors: dict[str, Tensor]) -> None:
    """Which of its copies a query is given makes no difference."""
    images, objects = len(targets.counts), len(targets.labels)
    first = torch.tensor([0, *targets.counts]).cumsum(0)
    cost = criterion.cost(pairwise_terms(stages, targets, criterion.giou_eps)).split(targets.counts * len(stages.logits))
    for stage in range(len(stages.logits)):
        for image, count in enumerate(targets.counts):
            rows, key = match.image == stage * images + image, f"one2many.{stage}.{image}"
            ours = zip(match.query[rows].tolist(), (match.target[rows] - stage * objects - first[image]).tolist(), strict=True)
            theirs = zip(tensors[f"idx.{key}.pred"].tolist(), (tensors[f"idx.{key}.tgt"] % max(count, 1)).tolist(), strict=True)
            assert sorted(ours) == sorted(theirs)
            if count:
                close(cost[stage * images + image].T, tensors[f"out.cost.{key}"][:, :count], atol=1e-5)


@pytest.mark.parametrize("path", ORIGINAL)
def test_intermediate_values(path: Path) -> None:
    config, tensors = load(path)
    case, criterion, hybrid = original(config, tensors, torch.float64)
    assert case.detector.eps == config["inverse_sigmoid_eps"]
    with torch.no_grad(), encoder_outputs(case.detector):
        context, stages, _, _ = step(case, criterion, hybrid)
    atol = 2 * noise(config)
    close(context.memory.tokens, tensors["out.memory"], atol=atol)
    close(joined(stages, "content"), tensors["out.hs"], atol=atol)
    queries = [context.queries[name] for name in ("main", "one-to-many")]
    start, coordinates = torch.cat([each.reference for each in queries], 1), tensors["out.init_reference"].shape[-1]
    close(start[..., :coordinates], tensors["out.init_reference"], atol=atol)
    if case.detector.refine:
        close(joined(stages, "boxes"), tensors["out.inter_references"], atol=atol)
    if "out.topk_indices" in tensors:
        assert torch.equal(torch.cat([each.token for each in queries], 1), tensors["out.topk_indices"])
        close(context.proposals.logits[0], tensors["out.enc_logits"], atol=atol)
        close(context.proposals.boxes[0], tensors["out.enc_boxes"], atol=atol)


@pytest.mark.parametrize("path", ORIGINAL)
def test_evaluation_has_the_main_queries_alone(path: Path) -> None:
    config, tensors = load(path)
    case, _, _ = original(config, tensors, torch.float32)
    with torch.no_grad():
        stages = case.detector.eval()(torch.zeros(len(case.padding), 3, *case.padding.shape[1:]), case.padding)
    close(stages.logits, tensors["out.eval.logits"], atol=4 * noise(config))
    close(stages.boxes, tensors["out.eval.boxes"], atol=4 * noise(config))


@pytest.mark.parametrize("path", DETREX)
def test_training_step_of_detrex(path: Path) -> None:
    """Its inverse sigmoid has 1e-3 where the original has 1e-5, and its GIoU 1e-6 where the original has none (D-168)."""
    config, tensors = load(path)
    case, atol, prefix = rebuild(config, tensors, torch.float32), ATOL, "out.masked."
    case.detector.eps = 1e-3
    criterion = Criterion(loss_weights=Weights(2.0, 5.0, 2.0), giou_eps=1e-6)
    with encoder_outputs(case.detector) as memories:
        context, stages, _, losses = step(case, criterion, OneToMany(config["k"]))
    for ours, expected in zip(memories, numbered(tensors, f"{prefix}enc_layer."), strict=True):
        close(ours, expected, atol=atol)
    queries, dense = [context.queries[name] for name in ("main", "one-to-many")], dense_proposals(context.memory)
    assert torch.equal(torch.cat([each.token for each in queries], 1), tensors[f"{prefix}topk"])
    expected = {
        "logits": stages["main"].logits,
        "boxes": stages["main"].boxes,
        "one2many_logits": stages["one-to-many"].logits,
        "one2many_boxes": stages["one-to-many"].boxes,
        "dec.states": joined(stages, "content"),
        "dec.refs": joined(stages, "boxes"),
        "tr.init_reference": torch.cat([each.reference for each in queries], 1),
        "tr.enc_3": dense.logits,
        "tr.enc_4": dense.boxes_unsigmoid,
    }
    for name, value in expected.items():
        close(value, tensors[f"{prefix}{name}"], atol=atol, name=name)
    found = {name: value * weight for name, value, weight in named(losses, "class")}
    for name, value in found.items():
        close(value, tensors[f"{prefix}loss_weighted.{name}"], atol=1e-5, rtol=1e-5, name=name)
    known = {key.removeprefix(f"{prefix}loss_weighted.") for key in tensors if key.startswith(f"{prefix}loss_weighted.")}
    assert found.keys() == known
    close(losses.total, tensors[f"{prefix}loss_total"], atol=0, rtol=1e-5)
    losses.total.backward()
    check_gradient_norms(case, f"{prefix}gradnorm.", ("query_content.weight", "query_extra_content.weight"))


@pytest.mark.parametrize("path", DETREX)
def test_evaluation_of_detrex(path: Path) -> None:
    """Without padding masks, as in its other detectors."""
    config, tensors = load(path)
    case = rebuild(config, tensors, torch.float32)
    case.detector.eps = 1e-3
    with torch.no_grad():
        stages = case.detector.eval()(torch.zeros(len(case.padding), 3, *case.padding.shape[1:]), torch.zeros_like(case.padding))
    close(stages.logits, tensors["out.eval.logits"], atol=ATOL)
    close(stages.boxes, tensors["out.eval.boxes"], atol=ATOL)


@pytest.mark.parametrize("path", [*ORIGINAL, *DETREX])
def test_the_converter_sees_what_names_and_shapes_tell(path: Path) -> None:
    """Mixed selection; look forward twice leaves no trace and is assumed."""
    config, tensors = load(path)
    found, hyper = rebuild(config, tensors, torch.float32).detector_config, config.get("hparams", config)
    assert isinstance(found, HDeformableDETRConfig)
    total = hyper.get("num_queries_one2one", hyper.get("nq1")), hyper.get("num_queries_one2many", hyper.get("nqm"))
    assert (found.queries, found.one_to_many_queries) == total
    assert replace(found, look_forward_twice=False, mixed_selection=False).look_forward_twice is False
