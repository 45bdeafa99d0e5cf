"""Stable-DINO's matcher and criterion; its models are in test_golden_detrex.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.learning.class_terms import ClassTarget, MatchedPairs, PositionModulatedCost
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import Problem, solve
from steadydetr.structures import Assignment, Losses, Match, Stages, Targets
from tests.parity.golden import cases, load
from tests.parity.models import close, close_to_scale
from tests.parity.released import ReleasedCriterion, class_target
from tests.parity.test_golden_detectors import add_denoising, check_losses
from tests.parity.test_golden_losses import TIGHT, targets_of

COST = {"rtol": 1e-5, "atol": 1e-5}  # sums of three terms up to about 10, in float32; as for the plain cost


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Targets]:
    """Targets of all `num_images` images: those without objects are there, empty."""
    config, tensors = load(path)
    return config, tensors, targets_of({key.removeprefix("in."): value for key, value in tensors.items()}, "target")


def matcher_options(config: dict[str, Any]) -> dict[str, Any]:
    """Costs of a matcher's metadata, with the constants of detrex."""
    weights = Weights(config["cost_class"], config["cost_bbox"], config["cost_giou"])
    return {"cost_weights": weights, "alpha": config["alpha"], "gamma": config["gamma"], "giou_eps": 1e-6}


def check_problem(problem: Problem, tensors: dict[str, Tensor], prefix: str, images: list[int], constant: float) -> None:
    """Costs and assignments of one stage.

    Args:
        images: what the file calls those of the problem.
        constant: the 1 of 1 - GIoU, weighted, which ours leaves out.
    """
    match, first = solve([problem])[0].match, torch.tensor([0, *problem.counts]).cumsum(0)
    for i, (image, block) in enumerate(zip(images, problem.cost.split(problem.counts), strict=True)):
        expected = tensors[f"{prefix}.cost_total.{image}"]
        torch.testing.assert_close(block.T + constant, expected, **COST)
        check_pairs(match, i, int(first[i]), tensors[f"{prefix}.src.{image}"], tensors[f"{prefix}.tgt.{image}"])


def check_pairs(match: Match, image: int, first: int, query: Tensor, target: Tensor) -> None:
    """Those of one folded image, whose objects begin at `first`."""
    rows = match.image == image
    ours = set(zip(match.query[rows].tolist(), (match.target[rows] - first).tolist(), strict=True))
    assert ours == set(zip(query.tolist(), target.tolist(), strict=True))


@pytest.mark.parametrize("path", cases("detrex/c1_stable_matcher_*"))
def test_modulated_costs_and_assignments(path: Path) -> None:
    """The released matcher for the whole batch and image by image; where no class repeats, ours is the same."""
    config, tensors, targets = read(path)
    stages = Stages(tensors["in.pred_logits"][None], tensors["in.pred_boxes"][None])
    options = matcher_options(config)
    for beta in [beta for beta in config["cec_betas"] if beta > 0]:
        criteria: list[Criterion] = [ReleasedCriterion(cec_beta=beta, **options)]
        if config["distinct_classes"]:
            criteria.append(Criterion(class_cost=PositionModulatedCost(beta, rescale=True, alpha=config["alpha"]), **options))
        for criterion in criteria:
            problem, images = criterion.problem(stages, targets, "main"), list(range(len(targets.counts)))
            check_problem(problem, tensors, f"out.beta{beta}.batch", images, config["cost_giou"])
            for image, part in enumerate(targets.split()):
                alone = Stages(stages.logits[:, image, None], stages.boxes[:, image, None])
                problem = criterion.problem(alone, part, "main")
                check_problem(problem, tensors, f"out.beta{beta}.single", [image], config["cost_giou"])


class Recording(ClassTarget):
    """A class target that keeps what it gave to every folded image."""

    def __init__(self, target: ClassTarget) -> None:
        self.target, self.given = target, list[Tensor]()

    def __call__(self, pairs: MatchedPairs) -> Tensor:
        value = self.target(pairs)
        self.given = [value[pairs.image == image] for image in range(pairs.images)]
        return value


@pytest.mark.parametrize("path", cases("detrex/c2_stable_criterion_*"))
def test_criterion(path: Path) -> None:
    """Every combination of target and loss: assignments, soft targets, losses of all parts, gradients of all predictions."""
    config, tensors, targets = read(path)
    for combo in config["combos"]:
        tag = f"{combo['use_ce_loss_type']}_a{combo['ta_alpha']}_b{combo['ta_beta']}_{combo['target_post_process']}"
        inputs = {key: tensors[key].clone().requires_grad_() for key in tensors if key.startswith(("in.pred_", "in.enc_", "in.dn_"))}
        recording = Recording(class_target(combo))
        criterion = replace(criterion_of(config), class_target=recording)  # type: ignore[arg-type]
        losses, prefix = Losses(), f"out.{tag}."
        main = Stages(inputs["in.pred_logits"], inputs["in.pred_boxes"])
        encoder = Stages(inputs["in.enc_logits"][None], inputs["in.enc_boxes"][None])
        last = len(main.logits) - 1
        for name, stages, names in (("main", main, [*(f"aux{i}" for i in range(last)), "final"]), ("proposals", encoder, ["enc"])):
            match = solve([criterion.problem(stages, targets, name)])[0].match
            check_indices(match, tensors, names, targets)
            criterion.add_losses(losses, name, stages, Assignment.of(match), targets, float(max(len(targets.labels), 1)))
            check_targets(recording, tensors, prefix, names)
        denoising, groups = Stages(inputs["in.dn_logits"], inputs["in.dn_boxes"]), config["dn_num"]
        meta = {"num_dn_group": groups, "pad_size": groups * config["single_padding"]}
        add_denoising(losses, targets, denoising, criterion, meta, weights_of(config, "_dn"))
        check_targets(recording, tensors, prefix, [*(f"dn_aux{i}" for i in range(last)), "dn_final"])
        check_losses(losses, tensors, prefix, "not recorded")
        torch.testing.assert_close(losses.total, tensors[f"{prefix}total"].reshape(()), **TIGHT)
        losses.total.backward()
        for key, value in inputs.items():
            assert value.grad is not None
            close_to_scale(value.grad, tensors[f"{prefix}grad.{key.removeprefix('in.')}"], 1e-5, f"{tag} {key}")


def criterion_of(config: dict[str, Any]) -> Criterion:
    assert config["loss"]["loss_class_type"] == "focal_loss" and not config["loss"]["two_stage_binary_cls"]
    assert weights_of(config, "") == weights_of(config, "_enc")
    matcher = config["matcher"]
    assert (matcher["alpha"], matcher["gamma"]) == (config["loss"]["alpha"], config["loss"]["gamma"])
    return ReleasedCriterion(cec_beta=matcher["cec_beta"], loss_weights=weights_of(config, ""), **matcher_options(matcher))


def weights_of(config: dict[str, Any], suffix: str) -> Weights:
    return Weights(*(config["weight_dict"][f"loss_{kind}{suffix}"] for kind in ("class", "bbox", "giou")))


def check_indices(match: Match, tensors: dict[str, Tensor], names: list[str], targets: Targets) -> None:
    first = [0, *torch.tensor(targets.counts * len(names)).cumsum(0).tolist()]
    for stage, name in enumerate(names):
        for image in range(len(targets.counts)):
            folded, key = stage * len(targets.counts) + image, f"out.indices.{name}.{image}"
            check_pairs(match, folded, first[folded], tensors[f"{key}.src"], tensors[f"{key}.tgt"])


def check_targets(recording: Recording, tensors: dict[str, Tensor], prefix: str, names: list[str]) -> None:
    """The files have a target for every query and class of an image, 0 where there is none; ours has those of the pairs."""
    expected = [tensors[f"{prefix}norm_t.{name}"] for name in names if f"{prefix}norm_t.{name}" in tensors]
    if expected:
        for ours, theirs in zip(recording.given, torch.cat(expected), strict=True):
            close(ours[ours > 0].sort().values, theirs[theirs > 0].sort().values, atol=1e-6, rtol=1e-5)
