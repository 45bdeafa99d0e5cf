"""The step as a whole: normalisers, empty batches, denoising, what it costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steadydetr.detectors import DetectorConfig
from steadydetr.learning.criterion import Criterion
from steadydetr.objectives import Denoising, SetPrediction
from steadydetr.objectives.denoising import draw_noise, noise_boxes
from steadydetr.objectives.method import Method
from tests.conftest import CLASSES, DETECTORS, make_batch, make_method, part_of
from tests.steps import assert_parts_sum_to_the_whole


@pytest.mark.parametrize("counts", [(2, 3), (0, 0), (0, 4), (15,)])
def test_every_parameter_gets_a_gradient(detector_config: DetectorConfig, counts: tuple[int, ...]) -> None:
    """Without objects too, and with more objects than queries: no rank hangs, no find_unused_parameters."""
    method = make_method(detector_config)
    losses = method(make_batch(counts))
    assert torch.isfinite(losses.total)
    losses.total.backward()
    without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert without == method.unused_parameters


def test_parts_sum_to_the_whole(detector_config: DetectorConfig) -> None:
    """Denoising included; batch norm's statistics are not shared in this test."""
    assert_parts_sum_to_the_whole(make_method(detector_config).double().eval())


def test_noise_does_not_depend_on_how_images_are_dealt() -> None:
    whole = replace(make_batch((2, 1, 3)), step=5, seed=1)
    alone = part_of(replace(make_batch((2, 1, 3, 0)), step=5, seed=1), [2, 3])
    a, b = draw_noise(whole, 2, CLASSES), draw_noise(alone, 2, CLASSES)
    assert torch.equal(a.part[:, 3:], b.part)
    assert not torch.equal(draw_noise(replace(whole, step=6), 2, CLASSES).part, a.part)


def test_noised_boxes_stay_in_the_image_and_negatives_are_farther() -> None:
    batch = make_batch((40,))
    boxes = batch.targets.boxes
    noised = noise_boxes(boxes, draw_noise(batch, 3, CLASSES), 0.4)
    distance = (noised - boxes).abs().sum(-1)
    assert (noised[..., :2] >= 0).all() and (noised[..., :2] <= 1).all()
    assert distance[1::2].mean() > 2 * distance[0::2].mean()


def test_padding_of_denoising_is_masked_or_counts_as_background() -> None:
    """D-05: the two differ where images have different numbers of objects, and only there."""
    detector = make_method(DETECTORS["dino"]).student
    for counts, differ in (((1, 4), True), ((3, 3), False)):
        masked, original = (
            Method(detector.eval(), Criterion(), (SetPrediction(), Denoising(number=4, mask_padding=mask)))(make_batch(counts))
            for mask in (True, False)
        )
        same = torch.allclose(masked["denoising/class"], original["denoising/class"], atol=1e-6)
        assert same != differ
        torch.testing.assert_close(masked["main/class"], original["main/class"])


def test_objectives_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="names of their own"):
        Method(DETECTORS["dino"].build(CLASSES), Criterion(), (SetPrediction(), SetPrediction()))


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_losses_stay_cheap() -> None:
    """Operations of a step's losses do not grow with stages or objects, and stay below the decoder's."""
    totals = []
    for layers, counts in ((2, (2, 3)), (6, (9, 12))):
        config = replace(DETECTORS["dino"], transformer=replace(DETECTORS["dino"].transformer, decoder_layers=layers))
        method = make_method(config)
        batch = make_batch(counts)
        with Operations() as whole:
            method(batch)
        with Operations() as forward:
            method.student(batch.images, batch.padding)
        totals.append(sum(whole.counts.values()) - sum(forward.counts.values()))
    assert totals[1] <= totals[0] * 1.6
    assert totals[1] < 1500


def test_bfloat16_step_is_close() -> None:
    method, batch = make_method(DETECTORS["dino"]), make_batch((2, 3))
    exact = method(batch).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = method(batch).total
    assert rounded.dtype == torch.float32
    assert float(rounded) == pytest.approx(float(exact), rel=0.1)


@pytest.mark.parametrize("name", ["dino", "two-stage", "adamixer"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    config, batch = DETECTORS[name], make_batch((2, 3))
    gradients = []
    for on in (False, True):
        place = {"checkpointing": on} if name == "adamixer" else {"transformer": replace(config.transformer, checkpointing=on)}
        method = make_method(replace(config, **place))
        method(batch).total.backward()
        gradients.append([p.grad for p in method.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
