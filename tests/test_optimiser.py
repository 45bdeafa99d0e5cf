"""Which parameters get which learning rate and weight decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steadydetr.runs.training_config import TrainingConfig
from steadydetr.training.optimiser import make_optimiser, parameter_groups, set_rate
from tests.conftest import CLASSES, DETECTORS

CONFIG = TrainingConfig(lr=0.01, weight_decay=0.5, backbone_lr_factor=0.1, offset_lr_factor=0.25)


def by_name(model: nn.Module, config: TrainingConfig) -> dict[str, tuple[float, float]]:
    """Factor and weight decay of every parameter that the optimiser gets, each exactly once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    found = [(names[id(p)], (group["lr_factor"], group["weight_decay"])) for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert len(dict(found)) == len(found)
    return dict(found)  # type: ignore[arg-type]


def test_rates_of_deformable_detr() -> None:
    """The original's `lr_linear_proj_names`: sampling offsets and reference points, in the encoder, the decoder and of the queries."""
    factors = {name: factor for name, (factor, _) in by_name(DETECTORS["deformable"].build(CLASSES), CONFIG).items()}
    slow = {name for name, factor in factors.items() if factor == 0.25}
    places = ("encoder.layers.0.attention", "decoder.layers.0.cross_attention", "decoder.layers.1.cross_attention")
    owners = {"query_reference", *(f"{place}.sampling_offsets" for place in places)}
    assert slow == {f"{owner}.{part}" for owner in owners for part in ("weight", "bias")}
    assert {name for name, factor in factors.items() if factor == 0.1} == {name for name in factors if name.startswith("backbone.")}
    assert set(factors.values()) == {0.1, 0.25, 1.0}


def test_what_is_frozen_is_left_out() -> None:
    detector = DETECTORS["dino"].build(CLASSES)
    frozen = next(iter(dict(detector.named_parameters())))
    detector.get_parameter(frozen).requires_grad_(False)
    assert by_name(detector, CONFIG).keys() == dict(detector.named_parameters()).keys() - {frozen}


@pytest.mark.parametrize(
    ("norms", "vectors", "decayed"),
    [
        (True, True, {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}),
        (False, True, {"0.weight", "0.bias"}),
        (True, False, {"0.weight"}),
        (False, False, {"0.weight"}),
    ],
)
def test_weight_decay_of_norms_and_vectors(norms: bool, vectors: bool, decayed: set[str]) -> None:
    """A linear layer, a layer norm and a batch norm."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.BatchNorm1d(3))
    config = TrainingConfig(weight_decay=0.5, decay_norms=norms, decay_vectors=vectors)
    found = by_name(model, config)
    assert {name for name, (_, decay) in found.items() if decay == 0.5} == decayed
    assert all(decay in (0.0, 0.5) for _, decay in found.values())


def test_rates_follow_the_schedule() -> None:
    optimiser = make_optimiser(DETECTORS["deformable"].build(CLASSES), CONFIG)
    assert set_rate(optimiser, 0.5, CONFIG) == 0.005
    assert isinstance(optimiser, torch.optim.AdamW)
    assert {round(group["lr"], 10) for group in optimiser.param_groups} == {0.0005, 0.00125, 0.005}
