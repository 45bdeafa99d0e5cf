"""What tests of whole steps share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Losses, Totals
from tests.conftest import CLASSES, make_batch, part_of


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


def assert_parts_sum_to_the_whole(method: Method, masks: bool = False) -> None:
    """Two processes or micro-batches with the step's totals, one of which has an image without objects."""
    batch = wide(make_batch((2, 0, 3, 1), masks=masks))
    batch = replace(batch, padding=torch.zeros_like(batch.padding), step=3, seed=7)
    expected = method(batch)
    expected_gradients = gradients(method, expected.total)
    for rows in ([[0, 1], [2, 3]], [[1], [0, 2, 3]]):
        parts = [method(replace(part_of(batch, images), totals=Totals(6, 3, 4))) for images in rows]
        assert_close({n: sum(terms(part)[n] for part in parts) for n in terms(expected)}, terms(expected))
        assert_close(gradients(method, parts[0].total + parts[1].total), expected_gradients, rtol=1e-8, atol=1e-10)
