"""Every recipe, in small, takes the same training step on a GPU as on the CPU. Skipped where there is none."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from steadydetr.detectors import deformable
from steadydetr.devices import choose_device
from steadydetr.learning import mask_terms
from steadydetr.nn.anchors import token_anchors
from steadydetr.objectives.method import Method
from steadydetr.recipes import find, names
from tests.conftest import make_batch
from tests.steps import assert_close, gradients, terms, wide
from tests.test_gradients import make_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def perturbed(name: str) -> Method:
    """The method of a recipe, with weights away from their special start values."""
    method = make_method(find(name))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return method


@pytest.mark.parametrize("name", names())
def test_a_step_is_that_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, but for positions, which stay in float32. Padding would make equal tokens, of which each device may choose others.

    Points of masks are those of the CPU (D-189).
    """
    points = mask_terms.random_points
    monkeypatch.setattr(mask_terms, "random_points", lambda shape, device, *seed: points(shape, torch.device("cpu"), *seed).to(device))
    monkeypatch.setattr(
        deformable, "token_anchors", lambda memory, *rest: token_anchors(replace(memory, valid_ratios=memory.valid_ratios.double()), *rest)
    )
    here = perturbed(name).double()
    there = deepcopy(here).cuda()
    for counts in ((2, 0, 3), (0, 0)):
        batch = wide(make_batch(counts, masks=here.criterion.masks is not None))
        batch = replace(batch, padding=torch.zeros_like(batch.padding))
        expected, found = here(batch), there(batch.to("cuda"))
        assert_close({n: value.cpu() for n, value in terms(found).items()}, terms(expected), rtol=1e-8, atol=1e-9)
        on_the_gpu = {n: value.cpu() for n, value in gradients(there, found.total).items()}
        assert_close(on_the_gpu, gradients(here, expected.total), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", names())
def test_bfloat16(name: str) -> None:
    method = perturbed(name).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        losses = method(make_batch((2, 0, 3), masks=method.criterion.masks is not None).to("cuda"))
    assert losses.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(method, losses.total).values())


def test_auto_takes_it() -> None:
    assert choose_device("auto").type == "cuda"
