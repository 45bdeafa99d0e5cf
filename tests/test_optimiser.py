"""Which parameters learn at which rate and which are decayed, over whole detectors."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.runs.training_config import TrainingConfig
from steadydetr.training.optimiser import clip_gradient, first_drop, gradient_norm, make_optimiser, parameter_groups, rate_factor, set_rate
from tests.conftest import CLASSES, DETECTORS

CONFIG = TrainingConfig(lr=0.01, weight_decay=0.3, backbone_lr_factor=0.1, offset_lr_factor=0.5)


def detector(name: str = "deformable", **options: object) -> nn.Module:
    return replace(DETECTORS[name], **options).build(CLASSES)  # type: ignore[type-var]


def groups(model: nn.Module, config: TrainingConfig) -> dict[str, tuple[float, float]]:
    """Name of every parameter that is in a group -> factor of the rate, weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in parameter_groups(model, config):
        for parameter in group["params"]:  # type: ignore[attr-defined]
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr_factor"], group["weight_decay"]  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("name", list(DETECTORS))
def test_backbone_and_offsets_learn_at_rates_of_their_own(name: str) -> None:
    """F-51: a tenth for the backbone, for sampling offsets and for the layer that makes references of learned queries; nothing else."""
    model = detector(name)
    found = groups(model, CONFIG)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    slow = {each for each, (factor, _) in found.items() if factor == 0.5}
    expected = {each for each in found if ".sampling_offsets." in each or each.startswith("query_reference.")}
    assert slow == expected
    assert any("encoder." in each for each in slow) == (name not in ("conditional", "adamixer"))  # which have no offsets there
    assert any("decoder." in each for each in slow) == (name != "conditional")
    assert ("query_reference.weight" in slow) == (name in ("deformable", "refine"))
    assert {each for each, (factor, _) in found.items() if factor == 0.1} == {each for each in found if each.startswith("backbone.")}
    assert {factor for factor, _ in found.values()} == {0.1, 0.5, 1.0} and {decay for _, decay in found.values()} == {0.3}


def test_all_of_a_detector_within_a_method_is_known_by_its_last_names() -> None:
    found = groups(nn.ModuleDict({"student": detector()}), CONFIG)
    assert found["student.query_reference.weight"][0] == 0.5 and found["student.backbone.stem.0.weight"][0] == 0.1


def test_norms_are_spared_from_decay_on_request() -> None:
    """F-53: biases and embeddings are decayed all the same; batch norm of the backbone, group norm of the neck and layer norms are not."""
    model = detector("two-stage")
    found = groups(model, replace(CONFIG, decay_norms=False))
    spared = {name for name, (_, decay) in found.items() if decay == 0.0}
    kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    of_norms = {
        f"{place}.{name}" for place, module in model.named_modules() if isinstance(module, kinds) for name, _ in module.named_parameters()
    }
    assert spared == of_norms & found.keys()
    assert {type(module) for module in model.modules() if isinstance(module, kinds)} == set(kinds)
    assert all(found[name][1] == 0.3 for name in found.keys() - spared) and any(name.endswith("bias") for name in found.keys() - spared)


def test_vectors_are_spared_from_decay_on_request() -> None:
    model = detector()
    found = groups(model, replace(CONFIG, decay_vectors=False))
    dims = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert all((decay == 0.0) == (dims[name] <= 1) for name, (_, decay) in found.items())
    assert {factor for factor, decay in found.values() if decay == 0.0} == {0.1, 0.5, 1.0}


def test_what_is_frozen_is_in_no_group() -> None:
    frozen = TimmBackboneConfig("test_resnet", weights="none", frozen_stages=1)
    model = detector(backbone=frozen)
    assert not all(parameter.requires_grad for parameter in model.parameters())
    assert groups(model, CONFIG).keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_rates_follow_the_schedule() -> None:
    optimiser = make_optimiser(detector(), CONFIG)
    assert isinstance(optimiser, torch.optim.AdamW) and {group["lr"] for group in optimiser.param_groups} == {0.01}
    assert {group["weight_decay"] for group in optimiser.param_groups} == {0.3}
    assert {(group["betas"], group["eps"]) for group in optimiser.param_groups} == {((0.9, 0.999), 1e-8)}
    assert set_rate(optimiser, 0.2, CONFIG) == pytest.approx(0.002)
    assert {round(group["lr"], 9): group["lr_factor"] for group in optimiser.param_groups} == {0.0002: 0.1, 0.001: 0.5, 0.002: 1.0}


@pytest.mark.parametrize(
    ("training", "factors", "first"),
    [  # at the first two steps, around the drops, and after the end, of 4 epochs of 5 steps
        ({"drop_epochs": (3, 2)}, {0: 1, 9: 1, 10: 0.1, 14: 0.1, 15: 0.01, 25: 0.01}, 10),
        ({"drop_epochs": (0.5,)}, {0: 1, 9: 1, 10: 0.1, 25: 0.1}, 10),
        ({"drop_epochs": (1,)}, {4: 1, 5: 0.1}, 5),
        ({"drop_epochs": (0.13,)}, {2: 1, 3: 0.1}, 3),
        ({"drop_epochs": (), "warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 9: 1}, None),
        ({"schedule": "cosine"}, {0: 1, 10: 0.5, 20: 0, 25: 0}, None),
        ({"schedule": "cosine", "warmup_steps": 20}, {9: 0.5 * 0.5782172}, None),
    ],
)
def test_factors_step_by_step(training: dict[str, object], factors: dict[int, float], first: int | None) -> None:
    config = TrainingConfig(**({"epochs": 4} | training))  # type: ignore[arg-type]
    assert {step: rate_factor(step, 5, config) for step in factors} == pytest.approx(factors, abs=1e-6)
    assert first_drop(5, config) == first


def test_the_groups_have_names_that_exist() -> None:
    """A renamed module would silently learn at the full rate."""
    names = [name for kind in DETECTORS for name, _ in detector(kind).named_parameters()]
    for part in ("sampling_offsets", "query_reference", "backbone"):
        assert any(re.search(rf"(^|\.){part}\.", name) for name in names)


def test_clipping_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    for most in (0.1, 1e3):
        ours, theirs = ([torch.randn(n, n, generator=generator.manual_seed(n)) for n in (1, 3, 8)] for _ in range(2))
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in theirs]
        for parameter, gradient in zip(parameters, theirs, strict=True):
            parameter.grad = gradient
        norm = gradient_norm(ours)
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(parameters, most))
        clip_gradient(ours, norm, most)
        assert all(map(torch.equal, ours, theirs))
