"""MaskDINO: the model in evaluation and in training with denoising, and its criterion on given predictions.

The official code never masks padding, so its batches have none here: the images are as large as the batch, and so are the targets' masks.
The random points of costs and losses are those that were recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from steadydetr.boxes import inverse_sigmoid
from steadydetr.detectors.maskdino import MaskDINO
from steadydetr.learning import mask_terms
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.mask_terms import MaskTerms
from steadydetr.learning.matching import solve
from steadydetr.objectives.denoising import (
    denoising_groups,
    known_match,
    noise_centres_and_sides,
    noise_labels,
    noised_queries,
    repeat_stages,
)
from steadydetr.structures import (
    Assignment,
    Losses,
    MaskPredictions,
    Match,
    Queries,
    QueryGroup,
    Stages,
    Targets,
    dense_proposals,
)
from tests.parity.golden import cases, load
from tests.parity.models import Case, close, close_to_scale, config_of, encoder_outputs, load_case, numbered
from tests.parity.test_golden_detrex import check_gradient_norms, recorded_dn_draws

ATOL = 2e-5
FILE_NAMES = {"main": "", "denoising": "_dn", "proposals": "_interm"}
TERMS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou", "mask": "loss_mask", "dice": "loss_dice"}


def criterion_of(config: Mapping[str, Any]) -> Criterion:
    """Class 4, mask 5, dice 5, L1 5, GIoU 2, in costs and losses."""
    terms = MaskTerms(config["num_points"], config["oversample_ratio"], config["importance_sample_ratio"])
    return Criterion(cost_weights=Weights(4.0, 5.0, 2.0), loss_weights=Weights(4.0, 5.0, 2.0), giou_eps=1e-6, masks=terms)


def rebuild(config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Case:
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    maps = [tensors[f"in.feat.res{i}"] for i in (2, 3, 4, 5)]
    found = config_of(state, config["nheads"], maps, dtype, queries=config["num_queries"])  # its `pe_offset` is not what was run
    assert (found.coarse_anchors_first, found.learned_content) == (config["feature_order"] == "low2high", config["learn_tgt"])
    assert (found.fine_level, found.levels) == ("res2" in config["in_features"], config["total_levels"])
    ours = replace(found, box_init=config["box_init"], transformer=replace(found.transformer, norm_groups=config["gn_groups"]))
    images, height, width = len(maps[0]), *(side * config["strides_all"]["res2"] for side in maps[0].shape[-2:])
    return Case(config, tensors, state, load_case(state, ours, dtype), ours, torch.zeros(images, height, width, dtype=torch.bool))


def targets_of(tensors: Mapping[str, Tensor], size: tuple[int, int], dtype: torch.dtype) -> Targets:
    """With masks of the size of the batch, seeded by the number of the image."""
    parts, image = [], 0
    while f"in.target.{image}.labels" in tensors:
        labels, boxes, masks = (tensors[f"in.target.{image}.{name}"] for name in ("labels", "boxes", "masks"))
        masks = pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))
        parts.append(Targets(labels, boxes.to(dtype), (len(labels),), masks, (image,)))
        image += 1
    return Targets.cat(parts)


def recorded(config: Mapping[str, Any], tensors: Mapping[str, Tensor], images: int, stages: int, denoised: bool) -> dict[Any, Any]:
    """The draws of costs (name, stage, "cost"), [B, P, 2], and of losses, "many" and "others", of all masks of the batch [n, K, 2].

    The last stage comes first, the proposals last; denoising, which is not matched, follows each stage.
    """
    draws = iter(
        [
            value
            for value, label in zip(numbered(tensors, "in.draw."), config["draw_labels"], strict=True)
            if "dn:" not in label and "prepare_for_dn" not in label
        ]
    )
    found: dict[Any, Any] = {}
    calls = [("main", stage) for stage in (stages - 1, *range(stages - 1))] + [("proposals", 0)]
    for name, stage in calls:
        found[name, stage, "cost"] = torch.cat([next(draws) for _ in range(images)])
        for each in (name, "denoising") if denoised and name == "main" else (name,):
            found[each, stage, "many"], found[each, stage, "others"] = next(draws), next(draws)
    assert next(draws, None) is None
    return found


@contextmanager
def replayed(found: Mapping[Any, Any], matches: Mapping[str, Match], targets: Targets, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our draws are the recorded ones. Of an image those of all stages come together; the masks of a stage are in the order of queries."""

    def draw(shape: tuple[int, ...], device: torch.device, image: int, name: str, *rest: Any) -> Tensor:
        if rest == ("cost",):
            drawn = torch.stack([found[name, stage, "cost"][image] for stage in range(shape[0])])
        else:
            number, kind = rest
            assert number == 0
            drawn = torch.cat(list(of_pairs(found, matches[name], name, kind, image, len(targets.counts))))
        assert drawn.shape == shape
        return drawn

    with monkeypatch.context() as patch:
        patch.setattr(mask_terms, "random_points", draw)
        yield


def of_pairs(found: Mapping[Any, Any], match: Match, name: str, kind: str, image: int, images: int) -> Iterator[Tensor]:
    """The rows of an image's pairs, stage by stage, in our order."""
    for stage in range(max(s for n, s, k in found if (n, k) == (name, kind)) + 1):
        within = match.image // images == stage
        file_order = sorted(
            within.nonzero()[:, 0].tolist(), key=lambda p: (int(match.image[p]), 0 if name == "denoising" else int(match.query[p]))
        )
        ours = [p for p in within.nonzero()[:, 0].tolist() if int(match.image[p]) % images == image]
        yield found[name, stage, kind][[file_order.index(p) for p in ours]]


def stage_names(stages: int) -> list[str]:
    """What the files append to the name of a loss."""
    return [*(f"_{stage}" for stage in range(stages - 1)), ""]


def check_losses(losses: Losses, tensors: Mapping[str, Tensor], prefix: str, rtol: float = 2e-5) -> None:
    checked = set()
    for name, values, _ in losses:
        group, term = name.split("/")
        for value, stage in zip(values, stage_names(len(values)), strict=True):
            key = f"{prefix}{TERMS[term]}{FILE_NAMES[group]}{stage}"
            close(value, tensors[key].flatten()[0], atol=1e-6, rtol=rtol, name=key)
            checked.add(key)
    assert checked == {key for key in tensors if key.startswith(prefix)}


@pytest.mark.parametrize("path", cases("detrex/c6_maskdino_criterion_*"))
def test_criterion(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are given: the vector of a query is its mask, that of a pixel says which it is."""
    config, tensors = load(path)
    criterion, groups = criterion_of(config), config["dn_scalar"]
    given = {name: leaf(value) for name, value in tensors.items() if name.startswith(("in.pred_", "in.dn_", "in.interm_"))}
    stages = {
        "main": as_stages(*(given[f"in.pred_{part}"] for part in ("logits", "boxes", "masks"))),
        "denoising": as_stages(*(given[f"in.dn_{part}"] for part in ("logits", "boxes", "masks"))),
        "proposals": as_stages(*(given[f"in.interm_{part}"][None] for part in ("logits", "boxes", "masks"))),
    }
    count, images = stages["main"].logits.shape[:2]
    targets = targets_of(tensors, tuple(tensors["in.target.0.masks"].shape[-2:]), torch.float32)
    draws = recorded(config, tensors, images, count, denoised=True)
    with replayed(draws, {}, targets, monkeypatch):
        problems = [criterion.problem(stages[name], targets, name) for name in ("main", "proposals")]
    solved = {problem.name: solution for problem, solution in zip(problems, solve(problems), strict=True)}
    for number, stage in enumerate([*(f"aux{i}" for i in range(count - 1)), "final"]):
        check_matched(solved["main"].cost.chunk(count)[number], solved["main"].match, number, targets, tensors, stage)
    check_matched(solved["proposals"].cost, solved["proposals"].match, 0, targets, tensors, "interm")
    most = max(targets.counts)
    assert groups * most == config["dn_pad_size"]
    denoised = repeat_stages(known_match(targets, groups, most, copies=1), stages["denoising"], len(targets.labels))
    matches = {name: solution.match for name, solution in solved.items()} | {"denoising": denoised}
    losses, objects = Losses(), len(targets.labels)
    with replayed(draws, matches, targets, monkeypatch):
        for name, normaliser in (("main", objects), ("denoising", objects * groups), ("proposals", objects)):
            criterion.add_losses(losses, name, stages[name], Assignment.of(matches[name]), targets, float(normaliser))
        losses.total.backward()
    check_losses(losses, tensors, "out.loss.")
    close(losses.total, tensors["out.total"].flatten()[0], atol=0, rtol=1e-5)
    for name, value in given.items():
        close_to_scale(value.grad, tensors[name.replace("in.", "out.grad.")], 1e-4, name)


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def as_stages(logits: Tensor, boxes: Tensor, masks: Tensor) -> Stages:
    height, width = masks.shape[-2:]
    pixels = torch.eye(height * width).unflatten(1, (height, width)).expand(len(masks[0]), -1, -1, -1)
    return Stages(logits, boxes, masks=MaskPredictions(masks.flatten(3), pixels))


def check_matched(cost: Tensor, match: Match, stage: int, targets: Targets, tensors: Mapping[str, Tensor], name: str) -> None:
    """Their cost has the 1 of 1 - GIoU left out too."""
    images = len(targets.counts)
    for image, (found, first) in enumerate(zip(cost.split(targets.counts), starts(targets.counts), strict=True)):
        close(found.T, tensors[f"out.cost.{name}.{image}"], atol=ATOL, name=f"{name} {image}")
        ours = match.image == stage * images + image
        query, target = match.query[ours], match.target[ours] - stage * len(targets.labels) - first
        order = query.argsort()
        assert torch.equal(query[order], tensors[f"out.indices.{name}.{image}.src"])
        assert torch.equal(target[order], tensors[f"out.indices.{name}.{image}.tgt"])


def starts(counts: tuple[int, ...]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


MODELS = cases("detrex/c6_maskdino_model_*")


@pytest.mark.parametrize("path", MODELS)
def test_evaluation(path: Path) -> None:
    config, tensors = load(path)
    case = rebuild(config, tensors, torch.float32)
    detector = case.detector.eval()
    assert isinstance(detector, MaskDINO)
    batch = case.batch()
    out = {key.removeprefix("out.eval."): value for key, value in tensors.items() if key.startswith("out.eval.")}
    with torch.no_grad(), encoder_outputs(detector) as memories:
        memory = detector.encode(batch.images, batch.padding)
        queries = detector.queries(memory)["main"]
        stages = detector.decode(memory, [QueryGroup("main", queries)])["main"]
        proposals = detector.proposals(memory, queries)
    for number, found in enumerate(memories):
        if f"enc_layer.{number}" in out:
            close(in_file_order(found, memory.levels, config, encoder=True), out[f"enc_layer.{number}"], atol=ATOL)
    close(memory.pixels, out["mask_features"], atol=ATOL)
    sizes = memory.levels if config["feature_order"] == "low2high" else memory.levels[::-1]
    assert [list(size) for size in sizes] == out["multi_scale_shapes"].tolist()
    if "output_memory" in out:
        close(in_file_order(dense_proposals(memory).content, memory.levels, config, encoder=False), out["output_memory"], atol=ATOL)
    places = in_file_order(torch.arange(memory.tokens.shape[1])[None, :, None], memory.levels, config, encoder=False)[0, :, 0]
    assert torch.equal(places[out["topk"]], queries.token)
    close(queries.reference, out["init_box_unsigmoid"].sigmoid(), atol=ATOL)
    close(detector.decoder_norm(stages.content[1:]), out["dec.hs"], atol=ATOL)
    last = detector.decoder.box_heads[0](stages.content[-1]) + inverse_sigmoid(stages.reference[-1], detector.eps)
    close(torch.cat((stages.reference[1:], last.sigmoid()[None])), out["dec.refs"], atol=ATOL)
    for stage in range(len(stages.logits) - 1):
        close(stages.logits[stage], out[f"aux.{stage}.logits"], atol=ATOL)
        close(stages.boxes[stage], out[f"aux.{stage}.boxes"], atol=ATOL)
    close(stages.logits[-1], out["pred_logits"], atol=ATOL)
    close(stages.boxes[-1], out["pred_boxes"], atol=ATOL)
    close_to_scale(masks_of(stages[-1:])[0], out["pred_masks"], ATOL)
    close(proposals.logits[0], out["interm.pred_logits"], atol=ATOL)
    close(proposals.boxes[0], out["interm.pred_boxes"], atol=ATOL)
    close_to_scale(masks_of(proposals)[0, :, ::3], out["interm.pred_masks"], ATOL)


def masks_of(stages: Stages) -> Tensor:
    """[S, B, N, h, w] those of all queries."""
    images, queries = stages.logits.shape[1:3]
    every = torch.arange(queries).expand(len(stages.logits) * images, -1)
    return stages.masks.of(every).unflatten(0, (-1, images))


def in_file_order(tokens: Tensor, levels: Any, config: Mapping[str, Any], encoder: bool) -> Tensor:
    """Ours, fine to coarse, in the order of the official encoder or decoder, which is the reverse of the encoder's."""
    reverse = (config["feature_order"] == "low2high") != encoder
    parts = tokens.split([height * width for height, width in levels], 1)
    return torch.cat(parts[::-1], 1) if reverse else tokens


@pytest.mark.parametrize("path", MODELS)
def test_training(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = load(path)
    case = rebuild(config, tensors, torch.float32)
    out = {key.removeprefix("out.train."): value for key, value in tensors.items() if key.startswith("out.train.")}
    targets, criterion = targets_of(tensors, tuple(case.padding.shape[1:]), torch.float32), criterion_of(config)
    batch = replace(case.batch(), targets=targets)
    group, groups, most = denoising_of(case, targets)
    context = StepContext.of(batch, case.detector.train(), criterion, {})
    stages: dict[str, Stages] = dict(case.detector.decode(context.memory, [QueryGroup("main", context.queries["main"]), group]))
    assert context.proposals is not None
    stages["proposals"] = context.proposals
    check_predictions(stages, out)
    draws = recorded(config, tensors, len(targets.counts), len(stages["main"].logits), denoised=True)
    with replayed(draws, {}, targets, monkeypatch):
        problems = [criterion.problem(stages[name], targets, name) for name in ("main", "proposals")]
    solved = {problem.name: solution.match for problem, solution in zip(problems, solve(problems), strict=True)}
    matches = solved | {"denoising": repeat_stages(known_match(targets, groups, most, 1), stages["denoising"], len(targets.labels))}
    losses, objects = Losses(), len(targets.labels)
    with replayed(draws, matches, targets, monkeypatch):
        for name, normaliser in (("main", objects), ("denoising", objects * groups), ("proposals", objects)):
            criterion.add_losses(losses, name, stages[name], Assignment.of(matches[name]), targets, float(normaliser))
        losses.total.backward()
    check_losses(losses, tensors, "out.train.loss_raw.", rtol=1e-4)
    close(losses.total, out["loss_total"].flatten()[0], atol=0, rtol=1e-5)
    check_gradient_norms(case, "out.train.gradnorm.")


def denoising_of(case: Case, targets: Targets) -> tuple[QueryGroup, int, int]:
    """With the recorded noise; the groups' number and the objects of the fullest image."""
    most = max(targets.counts)
    groups = denoising_groups(case.config["dn_num"], most)
    prefix, noise = "in.draw.", {k: v for k, v in case.tensors.items() if k in {f"in.draw.{i}" for i in range(3)}}
    draws = recorded_dn_draws(noise, prefix, len(targets.labels), 0.2)
    labels, boxes = noise_labels(targets.labels, draws, 0.4), noise_centres_and_sides(targets.boxes, draws, 0.4)
    queries = noised_queries(case.detector.embed, targets, labels, boxes, most)
    assert (groups, queries.content.shape[1]) == tuple(int(case.tensors[f"out.train.dn_{name}"]) for name in ("scalar", "pad_size"))
    blocks = torch.arange(queries.content.shape[1]) // most
    return QueryGroup("denoising", Queries(queries.content, queries.reference), sees=("main",), blocks=blocks), groups, most


def check_predictions(stages: Mapping[str, Stages], out: Mapping[str, Tensor]) -> None:
    for name, prefix in (("main", ""), ("denoising", "dn_")):
        close(stages[name].logits, out[f"{prefix}logits"], atol=ATOL, name=name)
        close(stages[name].boxes, out[f"{prefix}boxes"], atol=ATOL, name=name)
    masks = masks_of(stages["main"])
    close_to_scale(torch.stack((masks[0], masks[-1]))[:, :, ::4], out["masks"], ATOL)
    close_to_scale(masks_of(stages["denoising"])[-1, :, ::2], out["dn_masks_last"], ATOL)
