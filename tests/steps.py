"""What tests of whole steps share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from steadydetr.method import Method
from steadydetr.structures import Batch, Losses
from tests.conftest import CLASSES


def wide(batch: Batch, classes: int = CLASSES) -> Batch:
    """In float64, with so many classes."""
    targets = replace(batch.targets, boxes=batch.targets.boxes.double(), labels=batch.targets.labels % classes)
    return replace(batch, images=batch.images.double(), targets=targets)


def gradients(method: Method, total: Tensor) -> dict[str, Tensor]:
    """Of all that is trained, zeros where none came."""
    names, parameters = zip(*[(n, p) for n, p in method.named_parameters() if p.requires_grad], strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def terms(losses: Losses) -> dict[str, Tensor]:
    return {name: values for name, values, _ in losses}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-10, atol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
