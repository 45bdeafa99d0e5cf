"""Whole detectors against Deformable DETR and DINO: every intermediate value, selection, losses, assignments, gradients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.boxes import inverse_sigmoid
from steadydetr.detectors import DINO
from steadydetr.detectors.deformable import valid_ratio
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import solve
from steadydetr.learning.predictions import proposal_targets
from steadydetr.nn.anchors import token_anchors
from steadydetr.nn.encoder import token_centres
from steadydetr.objectives.denoising import known_match, repeat_stages
from steadydetr.objectives.set_prediction import SetPrediction
from steadydetr.structures import Assignment, Losses, MatchResult, Memory, Queries, QueryGroup, Stages, Targets, dense_proposals, take_rows
from tests.parity.golden import cases, load
from tests.parity.models import Case, close, close_to_scale, encoder_outputs, noise, numbered, positions, rebuild
from tests.parity.test_golden_losses import check_assignment, check_costs

EVAL = cases("original/ddetr_plain_*", "original/ddetr_refine_*", "original/ddetr_two_stage_*", "original/dino_[45]scale_*")
TRAIN = cases("original/ddetr_train_*", "original/dino_train_*")


def run(case: Case) -> tuple[StepContext, dict[str, Stages]]:
    """One decoder pass: the main queries and, where the case brings them, its denoising queries."""
    context = StepContext.of(case.batch(), case.detector, Criterion(), {})
    groups = [QueryGroup("main", context.queries["main"])]
    if "in.dn_query_label" in case.tensors:
        groups.append(given_denoising(case))
    return context, case.detector.decode(context.memory, groups)


def given_denoising(case: Case) -> QueryGroup:
    label, box = (case.tensors[f"in.dn_query_{name}"].to(next(case.detector.parameters()).dtype) for name in ("label", "bbox"))
    rows = label.shape[1]
    blocks = torch.arange(rows) // (rows // case.config["dn_meta"]["num_dn_group"])
    return QueryGroup("denoising", Queries(label, box.sigmoid()), sees=("main",), blocks=blocks)


@pytest.mark.parametrize("path", EVAL)
def test_predictions_in_float64(path: Path) -> None:
    """The originals keep positions, grids and valid ratios in float32 even in float64 (README: about 1e-6 remains); so do ours."""
    config, tensors = load(path)
    case = rebuild(config, tensors, torch.float64)
    with torch.no_grad():
        _, stages = run(case)
    assert case.detector.eps == config["inverse_sigmoid_eps"]
    for name, stage in stages.items():
        prefix = "out64.dn_" if name == "denoising" else "out64."
        close(stage.logits, tensors[f"{prefix}logits"], atol=max(1e-6, noise(config) / 10))
        close(stage.boxes, tensors[f"{prefix}boxes"], atol=1e-6)


@pytest.mark.parametrize("path", EVAL)
def test_predictions_in_float32(path: Path) -> None:
    config, tensors = load(path)
    case = rebuild(config, tensors, torch.float32)
    with torch.no_grad():
        _, stages = run(case)
    for name, stage in stages.items():
        prefix = "out.dn_" if name == "denoising" else "out."
        close(stage.logits, tensors[f"{prefix}logits"], atol=4 * noise(config))
        close(stage.boxes, tensors[f"{prefix}boxes"], atol=4 * noise(config))


@pytest.mark.parametrize("path", EVAL)
def test_memory(path: Path) -> None:
    """Masks, ratios, positions, projected maps and the memory after every encoder layer."""
    config, tensors = load(path)
    case = rebuild(config, tensors, torch.float64)
    with torch.no_grad(), encoder_outputs(case.detector) as layers:
        memory = case.detector.encode(torch.zeros(len(case.padding), 3, *case.padding.shape[1:]), case.padding)
    atol = 2 * noise(config)
    masks = [mask.bool() for mask in numbered(tensors, "out.mask.")]
    assert memory.levels == tuple(tuple(mask.shape[-2:]) for mask in masks)
    assert torch.equal(memory.padding, torch.cat([mask.flatten(1) for mask in masks], 1))
    assert torch.equal(memory.valid_ratios, tensors["out.valid_ratios"])
    for ours, expected in zip(positions(case, masks), numbered(tensors, "out.pos."), strict=False):
        close(ours, expected, atol=2e-6)
    maps = memory.inputs.split([h * w for h, w in memory.levels], 1)
    for ours, expected in zip(maps, numbered(tensors, "out.src."), strict=False):
        close(ours, expected.flatten(2).transpose(1, 2), atol=atol)
    for ours, expected in zip(layers, numbered(tensors, "out.enc_layer."), strict=False):
        close(ours, expected, atol=atol)
    close(memory.tokens, tensors["out.memory"], atol=atol)


@pytest.mark.parametrize("path", EVAL)
def test_queries_and_stages(path: Path) -> None:
    """What the encoder proposes and which tokens are selected; references and hidden states of every stage."""
    config, tensors = load(path)
    case = rebuild(config, tensors, torch.float64)
    with torch.no_grad():
        context, stages = run(case)
        ours = our_proposals(context) | our_stages(case, stages)
    found = {name: value for name, value in ours.items() if f"out.{name}" in tensors}
    assert "hs" in found
    for name, value in found.items():
        close(value, tensors[f"out.{name}"], atol=2 * noise(config), name=name)
    if "out.topk_indices" in tensors:
        assert torch.equal(context.queries["main"].token, tensors["out.topk_indices"])


def our_proposals(context: StepContext) -> dict[str, Tensor]:
    """By the names of the files."""
    queries = context.queries["main"]
    found = {"init_reference": queries.reference if queries.sized else queries.reference[..., :2]}
    proposals = context.proposals
    if proposals is None or queries.token is None:
        return found
    dense = dense_proposals(context.memory)
    if isinstance(context.student, DINO):
        found |= {"enc_logits_all": dense.logits, "interm_logits": proposals.logits[0], "interm_boxes": proposals.boxes[0]}
        return found | {"enc_output_proposals": torch.logit(dense.anchors), "interm_init_boxes": take_rows(dense.anchors, queries.token)}
    return found | {"enc_logits": proposals.logits[0], "enc_boxes": proposals.boxes[0], "enc_coord_unact": dense.boxes_unsigmoid}


def our_stages(case: Case, stages: Mapping[str, Stages]) -> dict[str, Tensor]:
    """By the names of the files, which put denoising first."""
    parts = [stages[name] for name in ("denoising", "main") if name in stages]
    content = torch.cat([part.content for part in parts], 2)
    reference = torch.cat([part.reference for part in parts], 2)
    decoder = case.detector.decoder
    if decoder.norm is None:
        refined = stages["main"].boxes if case.detector.refine else reference[..., :2]
        return {"hs": content, "inter_references": refined}
    # the last stage refines as well, though nothing uses it
    last = (decoder.box_heads[-1](content[-1]) + inverse_sigmoid(reference[-1], case.detector.eps)).sigmoid()
    return {"hs": decoder.norm(content), "dec_layer_raw": content, "references": torch.cat((reference, last[None]))}


@pytest.mark.parametrize("path", TRAIN)
def test_training_step(path: Path) -> None:
    config, tensors = load(path)
    case = rebuild(config, tensors, torch.float64)
    case.detector.train()
    context, stages = run(case)
    close(stages["main"].logits, tensors["out.logits"], atol=1e-4, rtol=1e-5)
    criterion, losses, objective = criterion_of(config), Losses(), SetPrediction()
    context = replace(context, criterion=criterion)
    problems = objective.problems(context, stages)
    solved = {problem.name: solution for problem, solution in zip(problems, solve(problems), strict=True)}
    check_matching(context, stages, solved, criterion, tensors)
    objective.add_losses(losses, context, stages, solved)
    if "denoising" in stages:
        add_denoising(losses, context.targets, stages["denoising"], criterion, config["dn_meta"])
    check_losses(losses, tensors, "loss.", "wloss.")
    close(losses.total, tensors["loss.TOTAL"], atol=0, rtol=1e-5)
    losses.total.backward()
    check_gradients(case, "grad.")


def criterion_of(config: dict[str, Any]) -> Criterion:
    """Costs and weights of the file's metadata."""
    matcher, weights = config.get("matcher", {}), config["weight_dict"]
    cost = Weights(*(float(matcher.get(f"cost_{name}", default)) for name, default in (("class", 2), ("bbox", 5), ("giou", 2))))
    loss = Weights(*(float(weights[f"loss_{name}"]) for name in ("ce", "bbox", "giou")))
    eps = 1e-6 if config["model"] == "DINO" else 0.0  # F-34
    return Criterion(cost_weights=cost, loss_weights=loss, alpha=config.get("focal_alpha", 0.25), giou_eps=eps)


def add_denoising(
    losses: Losses, targets: Targets, stages: Stages, criterion: Criterion, meta: Mapping[str, int], weights: Weights | None = None
) -> None:
    groups, copies = meta["num_dn_group"], meta.get("copies", 2)
    match = known_match(targets, groups, meta["pad_size"] // (copies * groups), copies)
    match = repeat_stages(match, stages, len(targets.labels))
    normaliser = float(max(len(targets.labels), 1) * groups)
    criterion.add_losses(losses, "denoising", stages, Assignment.of(match), targets, normaliser, weights)


def check_matching(
    context: StepContext, stages: Mapping[str, Stages], solved: Mapping[str, MatchResult], criterion: Criterion, tensors: dict[str, Tensor]
) -> None:
    check_assignment(solved["main"].match, tensors, "", context.targets, len(stages["main"].logits))
    check_costs(criterion, stages["main"], context.targets, tensors, "")
    if context.proposals is not None:
        name = "interm" if "idx.interm.0.pred" in tensors else "enc"
        targets = proposal_targets(context.student, context.targets)
        check_assignment(solved["proposals"].match, tensors, name, targets, 1)
        check_costs(criterion, context.proposals, targets, tensors, name)


def check_losses(losses: Losses, tensors: dict[str, Tensor], raw: str, weighted: str) -> None:
    """Every class, L1 and GIoU loss of the original has its value in ours, stage by stage, before and after its weight."""
    names = {"loss_ce": "class", "loss_class": "class", "loss_bbox": "l1", "loss_giou": "giou"}
    groups = {"": "main", "_dn": "denoising", "_interm": "proposals", "_enc": "proposals"}
    weights = {name: weight for name, _, weight in losses}
    checked = 0
    for key in [key for key in tensors if key.startswith(raw)]:
        match = re.fullmatch(r"(loss_ce|loss_class|loss_bbox|loss_giou)(_dn|_interm|_enc)?(?:_(\d+))?", key.removeprefix(raw))
        if match is None:
            continue  # errors that are only logged
        name = f"{groups[match[2] or '']}/{names[match[1]]}"
        if name not in weights:
            assert float(tensors[key]) == 0  # denoising that did not take part
            continue
        value = losses[name][-1 if match[3] is None else int(match[3])]
        close(value, tensors[key].reshape(()), atol=1e-6, rtol=1e-5, name=key)
        after = tensors.get(key.replace(raw, weighted))
        if after is not None:
            close(value * weights[name], after.reshape(()), atol=1e-5, rtol=1e-5, name=key)
        checked += 1
    assert checked == sum(len(values) for _, values, _ in losses)


def check_gradients(case: Case, prefix: str) -> None:
    """All parameters, tied ones once."""
    expected = case.official(prefix)
    for name, parameter in case.detector.named_parameters():
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close_to_scale(ours, expected[name], 1e-4, name)


@pytest.mark.parametrize("path", cases("original/dino_proposals*"))
def test_proposals(path: Path) -> None:
    """Anchors of the tokens, the tokens that count, ratios and the encoder's reference points."""
    _, tensors = load(path)
    masks = [mask.bool() for mask in numbered(tensors, "in.mask.")]
    levels = tuple((h, w) for h, w in tensors["in.spatial_shapes"].tolist())
    ratios = torch.stack([valid_ratio(mask) for mask in masks], 1)
    close(ratios, tensors["out.valid_ratios"], atol=0)
    close(token_centres(levels, ratios)[..., :2], tensors["out.encoder_reference_points"], atol=1e-6)
    padding = tensors["in.padding_mask"].bool()
    anchors, usable = token_anchors(Memory(tensors["in.memory"], padding, levels, ratios, tensors["in.memory"]))
    close(tensors["in.memory"].masked_fill(~usable[..., None], 0), tensors["out.output_memory"], atol=0)
    close(torch.logit(anchors).masked_fill(~usable[..., None], torch.inf), tensors["out.output_proposals"], atol=2e-6)
