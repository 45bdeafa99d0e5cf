"""Whole detectors against Conditional DETR: every intermediate value, losses, assignments, gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.detectors import ConditionalDETR, ConditionalDETRConfig
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import solve
from steadydetr.nn.positions import feature_position
from steadydetr.objectives.set_prediction import SetPrediction
from steadydetr.structures import DecodedStages, Losses, QueryGroup
from tests.parity.golden import cases, load
from tests.parity.models import Case, close, config_of, encoder_outputs, load_case, noise, numbered, padding
from tests.parity.test_golden_detectors import check_gradients, check_losses, check_matching, criterion_of

CASES = cases("original/cond_a*", "original/cond_dc5_*")


def rebuild(config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Case, ConditionalDETR]:
    """The detector of the case's names and shapes, with its weights and the feature map that it gives."""
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    hyper = config["hparams"]
    ours = config_of(state, hyper["nheads"], [tensors["in.feat.0"]], dtype)
    assert isinstance(ours, ConditionalDETRConfig) and ours.queries == hyper["num_queries"]
    official = {"width": "hidden_dim", "ffn": "dim_feedforward", "encoder_layers": "enc_layers", "decoder_layers": "dec_layers"}
    for name, key in official.items():
        assert getattr(ours.transformer, name) == hyper[key], name
    detector = load_case(state, ours, dtype)
    assert isinstance(detector, ConditionalDETR) and detector.eps == config["inverse_sigmoid_eps"]
    return Case(config, tensors, state, detector, ours, padding(config, tensors)), detector


def run(case: Case) -> tuple[StepContext, dict[str, DecodedStages]]:
    context = StepContext.of(case.batch(), case.detector, criterion_of(case.config), {})
    return context, case.detector.decode(context.memory, [QueryGroup("main", context.queries["main"])])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", CASES)
def test_predictions(path: Path, dtype: torch.dtype) -> None:
    """The original keeps position tables in float32 even in float64 (README: about 1e-6 remains); so do ours."""
    config, tensors = load(path)
    case, _ = rebuild(config, tensors, dtype)
    with torch.no_grad():
        _, stages = run(case)
    prefix, atol = ("out64.", 1e-6) if dtype == torch.float64 else ("out.", 4 * noise(config))
    close(stages["main"].logits, tensors[f"{prefix}logits"], atol=max(atol, noise(config) / 10))
    close(stages["main"].boxes, tensors[f"{prefix}boxes"], atol=atol)


@pytest.mark.parametrize("path", CASES)
def test_memory(path: Path) -> None:
    """The mask, the position table, the projected map and the memory after every encoder layer."""
    config, tensors = load(path)
    case, detector = rebuild(config, tensors, torch.float64)
    with torch.no_grad(), encoder_outputs(detector) as layers:
        memory = detector.encode(torch.zeros(len(case.padding), 3, *case.padding.shape[1:]), case.padding)
    mask, atol = tensors["out.mask"].bool(), 2 * noise(config)
    assert memory.levels == (tuple(mask.shape[-2:]),) and torch.equal(memory.padding, mask.flatten(1))
    c = detector.transformer
    table = feature_position(mask, c.width, c.temperature, c.position_offset).permute(0, 3, 1, 2)
    close(table, tensors["out.pos"], atol=2e-6)
    close(memory.inputs, tensors["out.src"].flatten(2).transpose(1, 2), atol=atol)
    for ours, expected in zip(layers, numbered(tensors, "out.enc_layer."), strict=True):
        close(ours, expected, atol=atol)
    close(memory.tokens, tensors["out.memory"], atol=atol)


@pytest.mark.parametrize("path", CASES)
def test_queries_and_stages(path: Path) -> None:
    """The references, the scaled sines that every layer gets, and its content before and after the norm."""
    config, tensors = load(path)
    case, detector = rebuild(config, tensors, torch.float64)
    sines: list[Tensor] = []
    for layer in detector.decoder.layers:
        layer.register_forward_pre_hook(lambda module, arguments: sines.append(arguments[2]))
    with torch.no_grad():
        context, stages = run(case)
    queries, atol = context.queries["main"], 2 * noise(config)
    assert not queries.sized and not queries.content.any() and not queries.reference[..., 2:].any()
    close(queries.reference[..., :2], tensors["out.reference"], atol=atol)
    close(stages["main"].reference, queries.reference.expand(len(sines), -1, -1, -1), atol=0)
    close(torch.stack(sines), tensors["out.query_sine_embed"], atol=max(2e-6, atol))
    close(stages["main"].content, tensors["out.dec_layer_raw"], atol=atol)
    close(detector.decoder.norm(stages["main"].content), tensors["out.hs"], atol=atol)


@pytest.mark.parametrize("path", CASES)
def test_losses_matching_and_gradients(path: Path) -> None:
    config, tensors = load(path)
    if "loss.TOTAL" not in tensors:
        pytest.skip("this case has no losses")
    case, detector = rebuild(config, tensors, torch.float64)
    context, stages = run(case)
    criterion, losses, objective = criterion_of(config), Losses(), SetPrediction()
    context = replace(context, criterion=criterion)
    problems = objective.problems(context, stages)
    solved = {problem.name: solution for problem, solution in zip(problems, solve(problems), strict=True)}
    check_matching(context, stages, solved, criterion, tensors)
    objective.add_losses(losses, context, stages, solved)
    check_losses(losses, tensors, "loss.", "wloss.")
    close(losses.total, tensors["loss.TOTAL"], atol=0, rtol=1e-5)
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())
    if any(key.startswith("grad.") for key in tensors):
        check_gradients(case, "grad.")
