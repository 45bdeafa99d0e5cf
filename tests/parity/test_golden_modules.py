"""Deformable attention, sine positions and proposals against the original code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from steadydetr.nn.deformable_attention import DeformableAttention, sample_values
from steadydetr.nn.positions import box_position, feature_position
from tests.parity.golden import cases, load


@pytest.mark.parametrize("path", cases("original/msda_core_*"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling(path: Path, dtype: torch.dtype) -> None:
    config, tensors = load(path)
    value, locations, weights, upstream = (tensors[f"in.{name}"].to(dtype) for name in ("value", "locations", "weights", "grad_output"))
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    levels = tuple(tuple(size) for size in tensors["in.spatial_shapes"].tolist())
    output = sample_values(value, levels, locations, weights)
    output.backward(upstream)
    kind = "f64" if dtype == torch.float64 else "f32"
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(output, tensors[f"out.{kind}.output"], **tolerance)
    for name, tensor in zip(("value", "locations", "weights"), inputs, strict=True):
        expected, actual = tensors[f"grad.{kind}.{name}"], tensor.grad
        if config["edge"] and name == "locations":
            expected, actual = expected[:, :, 1:], actual[:, :, 1:]  # head 0 sits on kinks, where the side is a choice
        torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("path", cases("original/msda_module*"))
def test_module(path: Path) -> None:
    config, tensors = load(path)
    hyper = config.get("hparams") or config
    sizes = tensors["in.spatial_shapes"].tolist() if "in.spatial_shapes" in tensors else hyper["spatial_shapes"]
    levels = tuple((h, w) for h, w in sizes)
    heads = next(hyper[key] for key in ("n_heads", "nheads", "heads") if key in hyper)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    points = state["attention_weights.bias"].numel() // (heads * len(levels))
    module = DeformableAttention(state["value_proj.bias"].numel(), heads, len(levels), points)
    for name in ("sampling_offsets", "attention_weights"):
        for kind in ("weight", "bias"):
            if f"init.{name}.{kind}" in tensors:
                torch.testing.assert_close(getattr(getattr(module, name), kind), tensors[f"init.{name}.{kind}"])
    module.load_state_dict(state)
    padding = tensors["in.padding_mask"].bool()
    for name, sized in (("ref2", False), ("ref4", True)):
        module.zero_grad()
        query, tokens, reference = (tensors[f"in.{k}"].clone().requires_grad_() for k in ("query", "input_flatten", name))
        padded = reference if sized else torch.cat((reference, torch.zeros_like(reference)), -1)
        output = module(query, padded, sized, module.project(tokens, padding), levels)
        torch.testing.assert_close(output, tensors[f"out.{name}"], rtol=1e-5, atol=1e-5)
        output.backward(tensors["in.grad_output"])
        found = {f"param.{key}": parameter.grad for key, parameter in module.named_parameters()}
        found |= {"query": query.grad, "input_flatten": tokens.grad, "reference": reference.grad}
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, tensors[f"grad.{name}.{key}"], rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
        mixed = module(query, padded, torch.full((query.shape[1],), sized), module.project(tokens, padding), levels)
        torch.testing.assert_close(mixed, output)


@pytest.mark.parametrize("path", cases("original/ddetr_position*", "original/dino_position*", "original/cond_position*"))
def test_positions(path: Path) -> None:
    config, tensors = load(path)
    outputs = [name for name in tensors if name.startswith("out.m")]
    assert outputs
    for name in outputs:  # out.<mask>[.<kind>].d<width>[.not_normalized]
        padding, expected = tensors[f"in.{name.split('.')[1]}"].bool(), tensors[name].permute(0, 2, 3, 1)
        if name.endswith("not_normalized"):  # bare counts of cells, which no detector of ours uses: the sines alone
            counts = torch.stack(((~padding).cumsum(1), (~padding).cumsum(2)), -1) / (2 * torch.pi)
            actual = box_position(counts, expected.shape[-1] // 2, config["temperature"])
        else:
            along_y, along_x = temperatures(config, name)
            y, x = (feature_position(padding, expected.shape[-1], t, config["offset"]) for t in (along_y, along_x))
            actual = torch.cat((y.chunk(2, -1)[0], x.chunk(2, -1)[1]), -1)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def temperatures(config: dict[str, Any], name: str) -> tuple[float, float]:
    """Of the y and of the x half: DINO's cases have them in their name, `hw20_50` or `sine10000`."""
    if match := re.search(r"\.hw(\d+)_(\d+)\.", name):
        return float(match[1]), float(match[2])
    one = float(match[1]) if (match := re.search(r"\.sine(\d+)\.", name)) else float(config["temperature"])
    return one, one


@pytest.mark.parametrize("path", cases("original/dino_position*", "original/cond_position*"))
def test_query_positions(path: Path) -> None:
    """y, x and then w, h of boxes in 0..1."""
    _, tensors = load(path)
    outputs = [name for name in tensors if name.startswith("out.pos")]
    assert outputs
    for name in outputs:  # out.pos<coordinates>.<features of each>
        boxes = tensors[f"in.{name.split('.')[1]}"]
        ordered = torch.cat((boxes[..., :2].flip(-1), boxes[..., 2:]), -1)
        actual = box_position(ordered, int(name.rpartition(".")[2]))
        torch.testing.assert_close(actual, tensors[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("path", cases("original/ddetr_position*"))
def test_proposal_positions(path: Path) -> None:
    """Deformable DETR: x, y, w, h after a sigmoid."""
    _, tensors = load(path)
    boxes = tensors["in.proposals_unact"].sigmoid()
    outputs = [name for name in tensors if name.startswith("out.proposal_pos_embed.")]
    assert outputs
    for name in outputs:
        torch.testing.assert_close(box_position(boxes, int(name.rpartition(".")[2])), tensors[name], rtol=1e-4, atol=2e-5)
