"""Align-DETR's criterion against the released code.

Cases in which an image has so many targets that the released matcher lowers k for the images after it (D-175) are compared with what it
gives to one image at a time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steadydetr.equations.align import prime_weights
from steadydetr.learning.class_terms import AlignTarget
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import MixedMatching, Problem, pairwise_terms, solve
from steadydetr.objectives.denoising import known_match, repeat_stages
from steadydetr.structures import Assignment, Losses, Match, Stages, Targets
from tests.parity.golden import cases, load
from tests.parity.test_golden_losses import targets_of

TIGHT = {"rtol": 1e-5, "atol": 1e-6}
MATCHES = {"indices", "single"}


def named(stages: int) -> list[str]:
    return [*(f"aux{i}" for i in range(stages - 1)), "final"]


def prepared(path: Path) -> tuple[dict, dict[str, Tensor], Targets, Criterion]:
    config, tensors = load(path)
    criterion = Criterion(
        class_target=AlignTarget(config["alpha"]),
        loss_weights=Weights(1.0, 5.0, 2.0),
        alpha=None,
        gamma=config["gamma"],
        giou_eps=1e-6,
        matching=MixedMatching(config["match_num"][0], config["tau"]),
    )
    assert config["match_num"] == [*criterion.matching.of_stages(1, last=False), *criterion.matching.of_stages(config["num_stages"], True)]
    return config, tensors, targets_of({k.removeprefix("in."): v for k, v in tensors.items()}, "target"), criterion


def predictions(tensors: dict[str, Tensor]) -> dict[str, Stages]:
    return {
        "main": Stages(tensors["in.pred_logits"], tensors["in.pred_boxes"]),
        "proposals": Stages(tensors["in.enc_logits"][None], tensors["in.enc_boxes"][None]),
    }


def problem_of(criterion: Criterion, name: str, stages: Stages, targets: Targets) -> Problem:
    return criterion.mixed_problem(stages, targets, name, last=name == "main")


def pairs_of(match: Match, stage: int, image: int, targets: Targets) -> list[tuple[int, int]]:
    """Target and query, in order."""
    images, objects = len(targets.counts), len(targets.labels)
    rows = match.image == stage * images + image
    first = stage * objects + sum(targets.counts[:image])
    return list(zip((match.target[rows] - first).tolist(), match.query[rows].tolist(), strict=True))


@pytest.mark.parametrize("path", cases("detrex/c7_align_criterion_*"))
def test_mixed_matching(path: Path) -> None:
    config, tensors, targets, criterion = prepared(path)
    for name, stages in predictions(tensors).items():
        match = solve([problem_of(criterion, name, stages, targets)])[0].match
        cost = criterion.cost(pairwise_terms(stages, targets, 1e-6)).split(targets.counts * len(stages.logits))
        for stage, label in enumerate(named(config["num_stages"]) if name == "main" else ["enc"]):
            for image, count in enumerate(targets.counts):
                key = f"out.single.{label}.{image}"
                expected = list(zip(tensors[f"{key}.tgt"].tolist(), tensors[f"{key}.src"].tolist(), strict=True))
                assert pairs_of(match, stage, image, targets) == expected
                if count and f"out.cost.{label}.{image}" in tensors:
                    found = cost[stage * len(targets.counts) + image].T
                    torch.testing.assert_close(found, tensors[f"out.cost.{label}.{image}"][:, :count], rtol=1e-5, atol=1e-5)


def agrees_with_itself(tensors: dict[str, Tensor]) -> bool:
    """Whether the released matcher gives a batch what it gives to its images one by one."""
    keys = [key for key in tensors if key.startswith("out.single.")]
    return all(torch.equal(tensors[key], tensors[key.replace("single", "indices")]) for key in keys)


def matched(criterion: Criterion, tensors: dict[str, Tensor], name: str, stages: Stages, targets: Targets) -> Match:
    """Our match, or where the released one is that of the leak, the released one: what follows is of the loss."""
    if agrees_with_itself(tensors):
        return solve([problem_of(criterion, name, stages, targets)])[0].match
    labels, images = (named(len(stages.logits)) if name == "main" else ["enc"]), len(targets.counts)
    parts = []
    for stage, label in enumerate(labels):
        for image in range(images):
            query, target = (tensors[f"out.indices.{label}.{image}.{part}"] for part in ("src", "tgt"))
            first = stage * len(targets.labels) + sum(targets.counts[:image])
            parts.append(Match(torch.full_like(query, stage * images + image), query, target + first))
    return Match.cat(parts)


@pytest.mark.parametrize("path", cases("detrex/c7_align_criterion_*"))
def test_losses_and_gradients(path: Path) -> None:
    """Every term of every stage, of the proposals and of denoising; the total; the gradient of every prediction."""
    config, tensors, targets, criterion = prepared(path)
    tensors = {
        key: value.requires_grad_() if key.endswith(("_logits", "_boxes")) and key[:3] == "in." else value for key, value in tensors.items()
    }
    losses, objects = Losses(), float(max(len(targets.labels), 1))
    for name, stages in predictions(tensors).items():
        match = criterion.shared(matched(criterion, tensors, name, stages, targets), stages, targets)
        criterion.add_losses(losses, name, stages, Assignment.of(match), targets, objects)
    denoised, groups = Stages(tensors["in.dn_logits"], tensors["in.dn_boxes"]), config["dn_num"]
    known = repeat_stages(known_match(targets, groups, config["single_padding"] // 2), denoised, len(targets.labels))
    criterion.add_losses(losses, "denoising", denoised, Assignment.of(known), targets, objects * groups)
    for group, ending in (("main", ""), ("proposals", "_enc"), ("denoising", "_dn")):
        for kind, official in (("class", "class"), ("l1", "bbox"), ("giou", "giou")):
            values = losses[f"{group}/{kind}"]
            for stage, value in enumerate(values):
                single = group == "proposals" or stage == len(values) - 1
                key = f"out.loss.loss_{official}{ending}" + ("" if single else f"_{stage}")
                torch.testing.assert_close(value, tensors[key].reshape(()), **TIGHT)
    torch.testing.assert_close(losses.total, tensors["out.total"].reshape(()), rtol=1e-5, atol=1e-4)
    losses.total.backward()
    for key in ("pred", "enc", "dn"):
        for part in ("logits", "boxes"):
            torch.testing.assert_close(tensors[f"in.{key}_{part}"].grad, tensors[f"out.grad.{key}_{part}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", cases("detrex/c7_align_criterion_*"))
def test_targets_and_shares(path: Path) -> None:
    """What each pair learns, in the order of the released code, and the table of weights by rank."""
    config, tensors, targets, criterion = prepared(path)
    table = tensors["out.weight_table"]
    for row, most in zip(table, config["match_num"], strict=True):
        expected = [math.exp(-rank / config["tau"]) if rank < most else 0.0 for rank in range(len(row))]
        torch.testing.assert_close(row, torch.tensor(expected), **TIGHT)
    for name, stages in predictions(tensors).items():
        match = criterion.shared(matched(criterion, tensors, name, stages, targets), stages, targets)
        folded = targets.repeat_batch(len(stages.logits))
        values = criterion.class_target(criterion._pairs(stages, (match,), targets, folded)) * match.share
        for stage, label in enumerate(named(config["num_stages"]) if name == "main" else ["enc"]):
            rows = match.image // len(targets.counts) == stage
            torch.testing.assert_close(match.share[rows], tensors[f"out.iabce.{label}.rank_weight"], **TIGHT)
            torch.testing.assert_close(values[rows], tensors[f"out.iabce.{label}.t_weighted"], **TIGHT)


@pytest.mark.parametrize("path", cases("detrex/c7_align_criterion_*"))
def test_what_measures_matching_sees_one_query_a_target(path: Path) -> None:
    _, tensors, targets, criterion = prepared(path)
    for name, stages in predictions(tensors).items():
        plain, mixed = (each.problem(stages, targets, name) for each in (replace(criterion, matching=None), criterion))
        assert torch.equal(plain.cost, mixed.cost) and not mixed.queries
    assert prime_weights(torch.ones(0), torch.zeros(0, dtype=torch.int64), 1.5).shape == (0,)
