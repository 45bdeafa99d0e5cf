"""AdaMixer: its parts, one stage with all intermediates, the whole decoder, losses and gradients, and its start weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadydetr.boxes import to_cxcywh, to_xyxy
from steadydetr.checkpoints.convert import convert_state_dict
from steadydetr.detectors import AdaMixer, AdaMixerConfig
from steadydetr.detectors.adamixer import MixingLayer
from steadydetr.detectors.base import postprocess
from steadydetr.detectors.query_groups import attention_plan
from steadydetr.equations.adamixer import from_xyzr, intersection_over_foreground, level_weights, overlap_bias, sample_places
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import solve
from steadydetr.nn.adaptive_mixing import AdaptiveMixing, PlaceSampling
from steadydetr.nn.layers import Neck
from steadydetr.nn.positions import xyzr_position
from steadydetr.objectives import SetPrediction
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Queries, QueryGroup, Stages, Targets
from tests.parity.golden import cases, files, load
from tests.parity.models import GivenBackbone, close, close_to_scale, numbered

CRITERION = Criterion(loss_weights=Weights(2.0, 5.0, 2.0), l1_format="xyxy")
CASES = {
    name: cases(f"mmdet/adamixer_{name}_*") for name in ("decoder", "loss", "mixing", "neck", "sampling3d", "selfattn", "stage", "train")
}
NAMES = {"class": "cls", "l1": "bbox", "giou": "iou"}


class GivenNeck(nn.Module):
    """The files begin after the neck, and hold no parameters of one."""

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return maps


def configured(config: dict[str, Any], maps: list[Tensor]) -> AdaMixerConfig:
    """What the metadata says."""
    return AdaMixerConfig(
        backbone=GivenBackbone(maps),  # type: ignore[arg-type]
        width=config["content_dim"],
        queries=config["num_query"],
        decoder_layers=config["num_stages"],
        heads=config["num_heads"],
        ffn=config["feedforward_channels"],
        groups=config["n_groups"],
        in_points=config["in_points"],
        out_points=config["out_points"],
        levels=max(len(maps), 1),
    )


def state_of(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}


def rebuild(config: dict[str, Any], tensors: dict[str, Tensor]) -> AdaMixer:
    """The converter's, which reads all sizes from names and shapes; a neck that it asks for is replaced."""
    maps, width = numbered(tensors, "in.feat."), config["content_dim"]
    state = state_of(tensors) | {f"neck.gn_out.{name}": torch.ones(width) for name in ("weight", "bias")}
    for i, given in enumerate(maps):
        state[f"neck.lateral_convs.{i}.conv.weight"] = torch.zeros(width, given.shape[1], 1, 1)
        state[f"neck.lateral_convs.{i}.conv.bias"] = torch.zeros(width)
    wanted = configured(config, maps)
    converted = convert_state_dict(state, wanted, without_backbone=True)
    with pytest.raises(ValueError, match=r"does not fit AdaMixerConfig: missing: backbone"):
        convert_state_dict(state)  # which infers
    detector = wanted.build(config["num_classes"])
    detector.load_state_dict(converted.state)
    detector.neck = GivenNeck()  # type: ignore[assignment]
    detector.strides = tuple(config["featmap_strides"])
    return detector.eval()


def layer_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> MixingLayer:
    """The one stage of a file, whose names have no number; what the file lacks keeps its start weights."""
    from steadydetr.checkpoints.key_maps import rename

    layer = MixingLayer(configured(config, []))
    renamed = rename(state_of(tensors, "roi_head.bbox_head.0."), "adamixer")
    own = {key.removeprefix("decoder.layers.0."): value for key, value in renamed.items() if key.startswith("decoder.layers.0.")}
    assert not layer.load_state_dict(own, strict=False).unexpected_keys
    return layer.eval()


def batch_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Batch:
    sizes = [(h, w) for h, w in tensors["in.img_shape"].long().tolist()]
    padding = torch.ones(len(sizes), *config["pad_shape"], dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        padding[i, :h, :w] = False
    return Batch(torch.zeros(len(sizes), 3, *config["pad_shape"]), padding, targets_of(tensors), tuple(range(len(sizes))), tuple(sizes))


def targets_of(tensors: dict[str, Tensor], chosen: slice = slice(None)) -> Targets:
    shapes = tensors["in.img_shape"].tolist()
    numbers = range(len(shapes))[chosen] if "in.gt_boxes.0" in tensors else []
    labels = [tensors[f"in.gt_labels.{i}"] for i in numbers]
    boxes = [to_cxcywh(tensors[f"in.gt_boxes.{i}"] / whwh(tensors)[i]) for i in numbers]
    return (
        Targets(torch.cat(labels), torch.cat(boxes), tuple(map(len, labels))) if labels else Targets(torch.zeros(0), torch.zeros(0, 4), ())
    )


def whwh(tensors: dict[str, Tensor]) -> Tensor:
    """[B, 4]."""
    return tensors["in.img_shape"].float().flip(-1).repeat(1, 2)


@pytest.mark.parametrize("path", CASES["sampling3d"])
def test_sampling(path: Path) -> None:
    config, tensors = load(path)
    maps, strides = numbered(tensors, "in.feat."), config["featmap_strides"]
    sampling = PlaceSampling(config["content_dim"], config["n_groups"], config["in_points"])
    offsets = tensors["in.offset"].unflatten(-1, (config["n_groups"], config["in_points"], 3))
    places = sample_places(tensors["in.xyzr"], offsets)
    close(places.flatten(2, 3), tensors["out.sample_points_xyz"][:, :, 0], atol=2e-4, rtol=1e-6)
    close(level_weights(places[..., 2], strides).flatten(2, 3), tensors["out.level_weights"][:, :, 0], atol=1e-6)

    class Given(nn.Module):
        def forward(self, content: Tensor) -> Tensor:
            return given

    sampling.sampling_offsets = Given()  # type: ignore[assignment]
    given = tensors["in.offset"].clone().requires_grad_()
    tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
    levels = tuple((m.shape[-2], m.shape[-1]) for m in maps)
    sampled = sampling(given, tensors["in.xyzr"], tokens, levels, strides)
    close(sampled, tensors["out.sampled"], atol=1e-5)
    (sampled * torch.linspace(-1, 1, sampled.numel()).view_as(sampled)).sum().backward()
    expected = tensors["out.grad_sample_points_xyz"][:, :, 0].view_as(offsets).clone()
    scale = torch.autograd.functional.jvp(lambda o: sample_places(tensors["in.xyzr"], o), offsets, torch.ones_like(offsets))[1]
    assert given.grad is not None
    close_to_scale(given.grad.view_as(offsets), expected * scale, 1e-4)


@pytest.mark.parametrize("path", CASES["mixing"])
def test_mixing(path: Path) -> None:
    config, tensors = load(path)
    mixing = AdaptiveMixing(config["content_dim"], config["n_groups"], config["in_points"], config["out_points"])
    state = state_of(tensors)
    mixing.load_state_dict(
        {k.replace("parameter_generator.0", "generator").replace("out_proj", "output"): value for k, value in state.items()}
    )
    close(mixing.generator(tensors["in.query"]), tensors["out.params"], atol=1e-5)
    output = mixing(tensors["in.x"], tensors["in.query"])
    close(output, tensors["out.out_proj_out"], atol=1e-5)
    close(tensors["in.query"] + output, tensors["out.out"], atol=1e-5)


@pytest.mark.parametrize("path", CASES["neck"])
def test_neck(path: Path) -> None:
    config, tensors = load(path)
    neck = Neck(config["in_channels"], config["out_channels"], len(config["in_channels"]), shared_norm=True)
    renamed = {
        k.replace("lateral_convs", "convs").replace(".conv.", ".").replace("gn_out", "norm"): v for k, v in state_of(tensors).items()
    }
    neck.load_state_dict(renamed)
    for i, ours in enumerate(neck([tensors[f"in.c{i + 2}"] for i in range(len(neck.convs))])):
        close(ours, tensors[f"out.feat.{i}"], atol=1e-5)


@pytest.mark.parametrize("path", [*CASES["selfattn"], *CASES["stage"]])
def test_self_attention(path: Path) -> None:
    """Bias and position; the position is in the residual too."""
    config, tensors = load(path)
    layer, xyzr, content = layer_of(config, tensors), tensors["in.xyzr"], tensors["in.content"]
    corners = to_xyxy(from_xyzr(xyzr, torch.ones(len(xyzr), 2)))
    expected_boxes = tensors["out.boxes_xyxy"] if "out.iof" in tensors else tensors["out.input_boxes_xyxy"]
    close(corners, expected_boxes, atol=1e-4, rtol=1e-6)
    iof = intersection_over_foreground(corners, corners)
    if "out.iof" in tensors:
        close(iof, tensors["out.iof"], atol=1e-5)
    bias = overlap_bias(iof, layer.overlap_scale).flatten(0, 1)
    close(bias, tensors["out.attn_bias"], atol=1e-4, rtol=1e-5)
    close(xyzr_position(xyzr, content.shape[-1]), tensors["out.pe"], atol=2e-6)
    plan = attention_plan([QueryGroup("main", Queries(content, xyzr))])
    attended = layer.attend(content, xyzr, plan)
    close(attended, tensors["out.attn_out_with_residual"], atol=1e-5)
    close(layer.self_norm(attended), tensors["out.after_attention_norm"], atol=1e-5)


@pytest.mark.parametrize("path", CASES["stage"])
def test_stage(path: Path) -> None:
    config, tensors = load(path)
    layer, maps, strides = layer_of(config, tensors), numbered(tensors, "in.feat."), config["featmap_strides"]
    tokens, levels = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1), tuple((m.shape[-2], m.shape[-1]) for m in maps)
    attended, xyzr = tensors["out.after_attention_norm"], tensors["in.xyzr"]
    close(layer.sampling.sampling_offsets(attended), tensors["out.sampling_offset"], atol=1e-5)
    sampled = layer.sampling(attended, xyzr, tokens, levels, strides)
    close(sampled, tensors["out.sampled_feature"], atol=1e-5)
    mixed = attended + layer.mixing(sampled, attended)
    close(mixed, tensors["out.mixing_out_with_residual"], atol=2e-5)
    close(layer.mixing_norm(mixed), tensors["out.after_mixing_norm"], atol=1e-5)
    plan = attention_plan([QueryGroup("main", Queries(attended, xyzr))])
    close(layer(tensors["in.content"], xyzr, tokens, levels, strides, plan), tensors["out.content"], atol=1e-5)


@pytest.mark.parametrize("path", CASES["decoder"])
def test_decoder(path: Path) -> None:
    """In float64, so that what differs is the rounding of the original, which every stage adds to."""
    config, tensors = load(path)
    detector, batch = rebuild(config, tensors).double(), batch_of(config, tensors)
    detector.backbone.maps = [given.double() for given in detector.backbone.maps]
    with torch.no_grad():
        memory = detector.encode(batch.images, batch.padding)
        queries = detector.queries(memory)["main"]
        stages = detector.decode(memory, [QueryGroup("main", queries)])["main"]
    sizes = tensors["out.imgs_whwh"][:, 0]
    assert torch.equal(memory.sizes.float(), sizes[:, :2])
    close(queries.content, tensors["out.init_content"], atol=1e-6)
    close(queries.reference * sizes[:, None], to_cxcywh(corners_of(tensors["out.init_xyzr"])), atol=1e-4, rtol=1e-6)
    for k in range(config["num_stages"]):
        close(stages.logits[k], tensors[f"out.stage{k}.cls_score"], atol=1e-5 * (k + 1), name=f"logits {k}")
        close(stages.content[k], tensors[f"out.stage{k}.content"], atol=1e-5 * (k + 1), name=f"content {k}")
        close(to_xyxy(stages.boxes[k]) * sizes[:, None], tensors[f"out.stage{k}.boxes_xyxy"], atol=5e-4, rtol=1e-5, name=f"boxes {k}")
        if k:
            assert torch.equal(stages.reference[k], stages.boxes[k - 1])
    for i, found in enumerate(postprocess(stages, batch.original_sizes, config["max_per_img"])):
        boxes, scores, labels = found.boxes_xyxy, found.scores, found.labels
        ours = torch.cat((labels[:, None], scores[:, None], boxes), 1)
        theirs = torch.cat((tensors[f"out.det{i}.labels"][:, None], tensors[f"out.det{i}.boxes_scores"][:, [4, 0, 1, 2, 3]]), 1)
        ours, theirs = (rows[rows[:, 1].argsort(descending=True)] for rows in (ours, theirs))
        close(ours, theirs, atol=5e-4, rtol=1e-5)


def corners_of(xyzr: Tensor) -> Tensor:
    return to_xyxy(from_xyzr(xyzr, torch.ones(len(xyzr), 2)))


@pytest.mark.parametrize("path", CASES["loss"])
def test_losses(path: Path) -> None:
    """Costs, assignments, losses and gradients of given predictions; a batch without objects is finite here."""
    config, tensors = load(path)
    stages = range(config["num_stages"])
    logits = torch.stack([tensors[f"in.stage{k}.cls_score"] for k in stages]).requires_grad_()
    corners = torch.stack([tensors[f"in.stage{k}.boxes_xyxy"] for k in stages]).requires_grad_()
    predicted, targets = Stages(logits, to_cxcywh(corners / whwh(tensors)[:, None])), targets_of(tensors)
    problem = CRITERION.problem(predicted, targets, "main")
    expected = [
        sum(tensors[f"out.stage{k}.img{i}.{part}_cost"] for part in ("cls", "reg", "iou")).T  # type: ignore[union-attr]
        for k in stages
        for i, count in enumerate(targets.counts)
        if count
    ]
    close(problem.cost, torch.cat(expected), atol=2e-5)
    (solved,) = solve([problem])
    found = torch.zeros_like(torch.stack([tensors[f"out.stage{k}.assigned_gt_inds"] for k in stages]).flatten(0, 1))
    starts = torch.tensor(targets.counts).cumsum(0) - torch.tensor(targets.counts)
    match = solved.match
    found[match.image, match.query] = match.target % sum(targets.counts) - starts[match.image % len(targets.counts)] + 1
    assert torch.equal(found, torch.stack([tensors[f"out.stage{k}.assigned_gt_inds"] for k in stages]).flatten(0, 1))
    losses = losses_of(predicted, targets)
    check_losses(losses, tensors)
    losses.total.backward()
    for k in stages:
        assert logits.grad is not None and corners.grad is not None
        close_to_scale(logits.grad[k], tensors[f"out.stage{k}.grad_cls_score"], 1e-5)
        close_to_scale(corners.grad[k], tensors[f"out.stage{k}.grad_boxes_xyxy"], 1e-4)
    assert tensors["out.empty.loss.total"].isinf()
    empty = Stages(predicted.logits[:, :1].detach(), predicted.boxes[:, :1].detach())
    assert losses_of(empty, targets_of(tensors, slice(0, 1))).total.isfinite()


def losses_of(stages: Stages, targets: Targets) -> Any:
    from steadydetr.structures import Assignment, Losses

    (solved,) = solve([CRITERION.problem(stages, targets, "main")])
    losses = Losses()
    CRITERION.add_losses(losses, "main", stages, Assignment.of(solved.match), targets, max(sum(targets.counts), 1))
    return losses


def check_losses(losses: Any, tensors: dict[str, Tensor]) -> None:
    for name, values, weight in losses:
        for k, value in enumerate(values):
            expected = tensors[f"out.loss.stage{k}_loss_{NAMES[name.partition('/')[2]]}"].reshape(())
            close(value * weight, expected, atol=1e-5, rtol=1e-5, name=f"{name} {k}")
    close(losses.total, tensors["out.loss.total"].reshape(()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", CASES["train"])
def test_training_step(path: Path) -> None:
    """Losses and gradients: boxes are detached between the stages, content is not."""
    config, tensors = load(path)
    detector, batch = rebuild(config, tensors).train(), batch_of(config, tensors)
    for given in detector.backbone.maps:
        given.requires_grad_()
    losses = Method(detector, CRITERION, (SetPrediction(),))(batch)
    check_losses(losses, tensors)
    losses.total.backward()
    ours = {name: parameter.grad for name, parameter in detector.named_parameters()}
    official = {key: torch.zeros(()) for key in state_of(tensors)}
    from steadydetr.checkpoints.key_maps import rename

    names = {key: next(iter(rename({key: value}, "adamixer"))) for key, value in official.items()}
    checked = 0
    for key, ours_key in names.items():
        if key == "rpn_head.init_proposal_bboxes.weight":
            assert float(tensors[f"out.gradnorm.{key}"]) == -1
            continue
        grad = ours[re.sub(r"^(class|box)_heads", r"decoder.\1_heads", ours_key)]
        assert grad is not None, key
        close(grad.norm(), tensors[f"out.gradnorm.{key}"].reshape(()), atol=1e-4, rtol=2e-4, name=key)
        if f"out.grad.{key}" in tensors:
            close_to_scale(grad, tensors[f"out.grad.{key}"], 2e-4, key)
        checked += 1
    assert checked == len(ours)
    for i, given in enumerate(detector.backbone.maps):
        close(given.grad.norm(), tensors[f"out.gradnorm_feat.{i}"].reshape(()), atol=1e-4, rtol=2e-4)
    close_to_scale(detector.backbone.maps[3].grad, tensors["out.grad_feat.3"], 2e-4)


@pytest.mark.parametrize("path", files("mmdet/keys/init_stats_adamixer_r50.json"))
def test_start_weights(path: Path) -> None:
    """Mean, deviation and range of every parameter right after the official initialisation, as far as samples tell; of one stage."""
    stated_of = json.loads(path.read_text())
    expected = {key: value for key, value in stated_of.items() if not re.match(r"backbone\.|roi_head\.bbox_head\.[1-9]", key)}
    torch.manual_seed(0)
    backbone = GivenBackbone([torch.zeros(1, 2**i * 256, 1, 1) for i in range(4)])
    detector = replace(AdaMixerConfig(), backbone=backbone, decoder_layers=1).build(80)  # type: ignore[arg-type]
    shapes = {key: torch.empty(value["shape"], device="meta") for key, value in expected.items()}
    from steadydetr.checkpoints.key_maps import rename

    state, seen = detector.state_dict(), 0
    for key in shapes:
        (name,) = rename({key: shapes[key]}, "adamixer")
        value, stated = state[re.sub(r"^(class|box)_heads", r"decoder.\1_heads", name)], expected[key]
        assert list(value.shape) == stated["shape"], key
        noise = 6 * stated["std"] / value.numel() ** 0.5 + 1e-6
        assert abs(float(value.mean()) - stated["mean"]) < noise, key
        assert abs(float(value.std()) - stated["std"]) < noise, key
        if key != "rpn_head.init_content_features.weight":  # all others are uniform or constant, so that many samples reach the ends
            slack = 20 * stated["std"] / value.numel() + 1e-6
            assert abs(float(value.min()) - stated["min"]) < slack and abs(float(value.max()) - stated["max"]) < slack, key
        seen += 1
    assert seen == len(expected)
