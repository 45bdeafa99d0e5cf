"""DAB-Deformable-DETR, DINO and Stable-DINO of detrex: training mode with and without denoising, evaluation, denoising queries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from steadydetr.boxes import inverse_sigmoid
from steadydetr.detectors import postprocess
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import solve
from steadydetr.objectives.denoising import (
    Draws,
    MaskDenoising,
    denoising_groups,
    noise_boxes,
    noise_centres_and_sides,
    noise_labels,
    noised_queries,
)
from steadydetr.objectives.set_prediction import SetPrediction
from steadydetr.structures import Losses, Queries, QueryGroup, Stages, Targets, dense_proposals
from tests.parity.golden import cases, load
from tests.parity.models import Case, close, close_to_scale, encoder_outputs, noise, numbered, positions, rebuild
from tests.parity.released import DENOISING_WEIGHTS, stable_criterion
from tests.parity.test_golden_detectors import add_denoising, check_losses
from tests.parity.test_golden_losses import Embedding, check_mask, targets_of

MODELS = cases("detrex/c3_stable_*", "detrex/c4_d*_deformable_*", "detrex/c5_detrex_dino_*")
# the files hold float32 only; tokens and stages amplify its noise to at most about this (README: reruns differ by nothing)
ATOL = 2e-5


def modes(config: dict[str, Any]) -> list[str]:
    return [mode for mode in config["modes"] if mode != "eval"]


def training_pass(case: Case, mode: str) -> tuple[StepContext, dict[str, Stages]]:
    context = StepContext.of(case.batch(), case.detector.train(), Criterion(), {})
    groups = [QueryGroup("main", context.queries["main"])]
    if mode == "dn" and "denoising_groups" in case.config:
        groups.append(replayed_dn_denoising(case, context.targets))
    elif mode == "dn":
        groups.append(replayed_denoising(case, context.targets, negative_offset(case.config.get("neg_step_type", "add:1.0"))))
    return context, case.detector.decode(context.memory, groups)


def negative_offset(kind: str) -> float:
    """Stable-DINO's `neg_step_type`; DINO has no choice and adds 1."""
    return 0.0 if kind == "none" else float(kind.removeprefix("add:"))


def replayed_denoising(case: Case, targets: Targets, offset: float) -> QueryGroup:
    """The case's recorded random draws through our own denoising; detrex trains with label noise 0.5 and box noise 1."""
    most = max(targets.counts)
    draws = recorded_draws(case.tensors, "in.draw.", len(targets.labels), 0.5)
    labels, boxes = noise_labels(targets.labels, draws, 0.5), noise_boxes(targets.boxes, draws, 1.0, offset)
    queries = noised_queries(case.detector.embed, targets, labels, boxes, most)
    close(queries.content, case.tensors["out.dn.query_label"], atol=1e-6)
    close(queries.reference, case.tensors["out.dn.query_bbox_unsigmoid"].sigmoid(), atol=1e-6)
    blocks = torch.arange(queries.content.shape[1]) // (2 * most)
    return QueryGroup("denoising", Queries(queries.content, queries.reference), sees=("main",), blocks=blocks)


def replayed_dn_denoising(case: Case, targets: Targets) -> QueryGroup:
    """The same of DN-DETR, which detrex trains with label noise 0.2 and box noise 0.4."""
    most = max(targets.counts)
    draws = recorded_dn_draws(case.tensors, "in.draw.", len(targets.labels), 0.2)
    labels, boxes = noise_labels(targets.labels, draws, 0.4), noise_centres_and_sides(targets.boxes, draws, 0.4)
    queries = noised_queries(case.detector.embed, targets, labels, boxes, most)
    close(queries.content, case.tensors["out.dn.query_label"], atol=1e-6)
    close(queries.reference, case.tensors["out.dn.query_box_unsigmoid"].sigmoid(), atol=1e-6)
    blocks = torch.arange(queries.content.shape[1]) // most
    return QueryGroup("denoising", Queries(queries.content, queries.reference), sees=("main",), blocks=blocks)


def recorded_dn_draws(tensors: dict[str, Tensor], prefix: str, objects: int, label_noise: float) -> Draws:
    """In call order: probability of keeping a label, new labels of those not kept, parts with their signs."""
    probability, new, part = numbered(tensors, prefix)
    copies = probability.numel() // objects
    new_label = torch.zeros(copies * objects, dtype=torch.int64)
    new_label[probability.flatten() < label_noise] = new.flatten()
    signed = part.reshape(copies, objects, 4) * 2 - 1
    return Draws(probability.view(copies, objects), new_label.view(copies, objects), signed.sign(), signed.abs())


def recorded_draws(tensors: dict[str, Tensor], prefix: str, objects: int, label_noise: float) -> Draws:
    """In call order: probability of keeping a label, new labels of those not kept, signs, parts."""
    probability, new, sign, part = numbered(tensors, prefix)
    copies = probability.numel() // objects
    new_label = torch.zeros(copies * objects, dtype=torch.int64)
    new_label[probability.flatten() < label_noise / 2] = new.flatten()
    shape = (copies, objects, 4)
    signs = sign.reshape(shape).float() * 2 - 1
    return Draws(probability.view(copies, objects), new_label.view(copies, objects), signs, part.reshape(shape))


@pytest.mark.parametrize("path", MODELS)
def test_training_mode(path: Path) -> None:
    config, tensors = load(path)
    for mode in modes(config):
        case = rebuild(config, tensors, torch.float32)
        context, stages = training_pass(case, mode)
        prefix = f"out.{mode}."
        close(stages["main"].logits, tensors[f"{prefix}logits"], atol=ATOL)
        close(stages["main"].boxes, tensors[f"{prefix}boxes"], atol=ATOL)
        stable = "stable" in path.name
        criterion, objective, losses = stable_criterion(config) if stable else Criterion(giou_eps=1e-6), SetPrediction(), Losses()
        context = replace(context, criterion=criterion)
        problems = objective.problems(context, stages)
        solved = {problem.name: solution for problem, solution in zip(problems, solve(problems), strict=True)}
        objective.add_losses(losses, context, stages, solved)
        if mode == "dn":
            close(stages["denoising"].logits, tensors["out.dn.dn_logits"], atol=ATOL)
            close(stages["denoising"].boxes, tensors["out.dn.dn_boxes"], atol=ATOL)
            rows, weights = stages["denoising"].logits.shape[2], DENOISING_WEIGHTS if stable else None
            copies, groups = (1, config["denoising_groups"]) if "denoising_groups" in config else (2, int(tensors["out.dn.dn_num"]))
            assert copies == 1 or groups == denoising_groups(config["dn_number"], max(context.targets.counts))
            meta = {"num_dn_group": groups, "pad_size": rows, "copies": copies}
            add_denoising(losses, context.targets, stages["denoising"], criterion, meta, weights)
        check_losses(losses, tensors, f"{prefix}loss_raw.", f"{prefix}loss_weighted.")
        close(losses.total, tensors[f"{prefix}loss_total"], atol=0, rtol=1e-5)
        losses.total.backward()
        check_gradient_norms(case, f"{prefix}gradnorm.")


def check_gradient_norms(case: Case, prefix: str, joint: tuple[str, ...] = ()) -> None:
    """-1 in the file: no gradient. `joint`: names of ours that are one parameter there."""
    expected, own = case.official(prefix), dict(case.detector.named_parameters())
    for name, parameter in own.items():
        norm = expected[name].flatten()[0]
        ours = torch.zeros(()) if parameter.grad is None else parameter.grad.norm()
        if name in joint:
            ours = torch.stack([own[each].grad.norm() for each in joint]).norm()
        close_to_scale(ours, norm.clamp(min=0), 1e-4, name)


@pytest.mark.parametrize("path", MODELS)
def test_intermediate_values(path: Path) -> None:
    config, tensors = load(path)
    case = rebuild(config, tensors, torch.float64)
    for mode in modes(config):
        prefix = f"out.{mode}."
        with torch.no_grad(), encoder_outputs(case.detector) as memories:
            context, stages = training_pass(case, mode)
        masks = [mask.bool() for mask in numbered(tensors, f"{prefix}mask.")]
        if masks:
            assert torch.equal(context.memory.padding, torch.cat([mask.flatten(1) for mask in masks], 1))
        for ours, expected in zip(positions(case, masks), numbered(tensors, f"{prefix}pos."), strict=True):
            close(ours, expected, atol=2e-6)
        maps = context.memory.inputs.split([h * w for h, w in context.memory.levels], 1)
        for ours, expected in zip(maps, numbered(tensors, f"{prefix}neck."), strict=False):
            close(ours, expected.flatten(2).transpose(1, 2), atol=ATOL)
        for ours, expected in zip(memories, numbered(tensors, f"{prefix}enc_layer."), strict=False):
            close(ours, expected, atol=ATOL)
        if f"{prefix}topk" in tensors:
            assert torch.equal(context.queries["main"].token, tensors[f"{prefix}topk"])
        check = named_values(case, context, stages) | encoder_values(config, memories)
        assert context.memory.tokens is memories[-1]
        found = {name: value for name, value in check.items() if f"{prefix}{name}" in tensors}
        assert {"enc_memory", "dec.states", "dec.refs", "tr.init_reference"} <= found.keys()
        for name, value in found.items():
            close(value, tensors[f"{prefix}{name}"].expand_as(value), atol=ATOL, name=f"{mode} {name}")


def named_values(case: Case, context: StepContext, stages: dict[str, Stages]) -> dict[str, Tensor]:
    """Ours by the names of the files; denoising rows first."""
    parts = [stages[name] for name in ("denoising", "main") if name in stages]
    content, reference = torch.cat([part.content for part in parts], 2), torch.cat([part.reference for part in parts], 2)
    decoder = case.detector.decoder
    last = (decoder.box_heads[-1](content[-1]) + inverse_sigmoid(reference[-1], case.detector.eps)).sigmoid()
    found = {
        "dec.states": content if decoder.norm is None else decoder.norm(content),
        "dec.refs": torch.cat((reference[1:], last[None])),
        "tr.init_reference": reference[0],
    }
    proposals = context.proposals
    if proposals is None:
        return found
    dense = dense_proposals(context.memory)
    everywhere = {"tr.enc_logits_all": dense.logits, "tr.enc_boxes_all": dense.boxes_unsigmoid.sigmoid()}
    return found | everywhere | {"output_memory": dense.content, "enc.logits": proposals.logits[0], "enc.boxes": proposals.boxes[0]}


def encoder_values(config: dict[str, Any], memories: list[Tensor]) -> dict[str, Tensor]:
    """By the names of the files: Stable-DINO's dense fusion is part of the encoder, its simple one comes after it."""
    if config.get("memory_fusion", "none") == "none":
        return {"enc_memory": memories[-1]}
    return {"enc_memory": memories[-2], "memory_fused": memories[-1]}


@pytest.mark.parametrize("path", MODELS)
def test_evaluation(path: Path) -> None:
    """detrex evaluates without padding masks, and clips boxes to the image."""
    config, tensors = load(path)
    if "eval" not in config["modes"]:
        pytest.skip(f"{path.name} holds no evaluation")
    case = rebuild(config, tensors, torch.float32)
    with torch.no_grad():
        stages = case.detector.eval()(torch.zeros(len(case.padding), 3, *case.padding.shape[1:]), torch.zeros_like(case.padding))
    close(stages.logits, tensors["out.eval.logits"], atol=ATOL)
    close(stages.boxes, tensors["out.eval.boxes"], atol=ATOL)
    sizes = [tuple(size) for size in tensors["in.image_sizes"].tolist()]
    top = len(tensors["out.eval.det.0.scores"])
    for mode in sorted({key.removesuffix(".det.0.scores") for key in tensors if key.endswith(".det.0.scores")}):
        nms = float(mode.removeprefix("out.eval_nms")) if "_nms" in mode else None
        for i, found in enumerate(postprocess(stages, sizes, top, nms)):
            boxes, scores, labels = found.boxes_xyxy, found.scores, found.labels
            close(scores, tensors[f"{mode}.det.{i}.scores"], atol=2 * noise(config))
            assert torch.equal(labels, tensors[f"{mode}.det.{i}.classes"])
            height, width = sizes[i]
            clipped = torch.stack((boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)), -1).flatten(1)
            close(clipped, tensors[f"{mode}.det.{i}.boxes"], atol=ATOL * max(height, width))


@pytest.mark.parametrize("path", cases("detrex/c5_dn_queries*"))
def test_denoising_queries(path: Path) -> None:
    """DINO's sub-cases, Stable-DINO's that are DINO's but for how far negatives move, DN-DETR's and MaskDINO's."""
    config, tensors = load(path)
    specs = {name: spec for name, spec in config["spec"].items() if is_built(spec)}
    assert {spec["kind"] for spec in specs.values()} == {"dino", "stable", "dndetr", "maskdino"}
    for name, spec in specs.items():
        targets = targets_of({key.removeprefix(f"in.{name}."): value for key, value in tensors.items()}, "target")
        most, table = max(targets.counts), tensors[f"state.{name}.label_enc.weight"]
        if f"out.{name}.disabled" in tensors:
            assert (
                spec["kind"] == "maskdino" and spec["dn_number"] < most and MaskDenoising(number=spec["dn_number"]).group_count(most) == 1
            )  # D-191
            continue
        if spec["kind"] == "maskdino":
            copies, groups = 1, MaskDenoising(number=spec["dn_number"]).group_count(most)
            draws = recorded_dn_draws(tensors, f"in.{name}.draw.", len(targets.labels), spec["label"] / 2)
            labels, boxes = noise_labels(targets.labels, draws, spec["label"]), noise_centres_and_sides(targets.boxes, draws, spec["box"])
        elif spec["kind"] == "dndetr":
            copies, groups = 1, spec["dn_number"]
            draws = recorded_dn_draws(tensors, f"in.{name}.draw.", len(targets.labels), spec["label"])
            labels, boxes = (
                noise_labels(targets.labels, draws, 2 * spec["label"]),
                noise_centres_and_sides(targets.boxes, draws, spec["box"]),
            )
            table = pad(table, (0, 1), value=1.0)
        else:
            copies, groups = 2, denoising_groups(spec["dn_number"], most)
            draws = recorded_draws(tensors, f"in.{name}.draw.", len(targets.labels), spec["label"])
            labels = noise_labels(targets.labels, draws, spec["label"])
            boxes = noise_boxes(targets.boxes, draws, spec["box"], negative_offset(spec.get("neg", "add:1.0")))
        assert (groups, copies * most) == (int(tensors[f"out.{name}.dn_num"]), int(tensors[f"out.{name}.single_padding"]))
        queries = noised_queries(Embedding(table).embed, targets, labels, boxes, most)  # type: ignore[arg-type]
        close(queries.content, tensors[f"out.{name}.query_label"], atol=1e-6)
        close(queries.reference, tensors[f"out.{name}.query_box_unsigmoid"].sigmoid(), atol=1e-6)
        check_mask(queries, tensors[f"out.{name}.attn_mask"].bool(), copies * most, spec["nq"])


def is_built(spec: dict[str, Any]) -> bool:
    """Of Stable-DINO's options two copies of every object, negatives moved by none or a constant more, and sight of the main queries."""
    official = spec["kind"] == "stable" and spec["gdn_k"] == 2 and not spec["block"] and spec["neg"].startswith(("none", "add:"))
    return spec["kind"] in ("dino", "dndetr", "maskdino") or official


@pytest.mark.parametrize("path", cases("detrex/c5_dn_queries*"))
def test_only_options_that_no_config_uses_are_left_out(path: Path) -> None:
    config, _ = load(path)
    others = [spec for spec in config["spec"].values() if not is_built(spec)]
    assert all(spec["kind"] == "stable" and (spec["gdn_k"] > 2 or spec["block"] or spec["neg"] == "multipy") for spec in others)
