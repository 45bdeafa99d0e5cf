"""Deformable sampling against its slow twins and by hand, its gradients, number types, and the module around it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steadydetr.nn.deformable_attention import DeformableAttention, sample_values
from tests.reference import deformable_attention as reference

LEVELS = ((5, 4), (2, 3), (1, 1))
TOKENS = sum(h * w for h, w in LEVELS)


def inputs(
    dtype: torch.dtype = torch.float64, images: int = 2, queries: int = 3, heads: int = 2, points: int = 2, dim: int = 3
) -> list[Tensor]:
    """Values, locations (some outside of the map) and weights."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, queries, heads, len(LEVELS), points)
    value = torch.randn(images, TOKENS, heads, dim, generator=generator, dtype=torch.float64)
    locations = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in (value, locations, weights)]


def one_map(values: list[list[float]], x: float, y: float, weight: float = 1.0) -> float:
    image = torch.tensor(values, dtype=torch.float32)
    value = image.flatten()[None, :, None, None]
    location = torch.tensor([x, y])[None, None, None, None, None]
    return sample_values(value, (tuple(image.shape),), location, torch.full((1, 1, 1, 1, 1), weight)).item()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.25, 0.25, 1.0),  # the centre of the upper left of 2 x 2 pixels
        (0.5, 0.5, 2.5),  # the middle of all four
        (0.5, 0.25, 1.5),  # half way to the right
        (0.0, 0.25, 0.5),  # on the left border, half a pixel from the centre: half of it is outside
        (0.0, 0.0, 0.25),  # in the corner a quarter is inside
        (1.0, 1.0, 1.0),  # a quarter of 4
        (-0.25, 0.25, 0.0),  # one pixel from the centre: nothing
        (1.25, 0.75, 0.0),
        (40.0, -1e30, 0.0),
        (math.inf, 0.5, 0.0),
    ],
)
def test_by_hand(x: float, y: float, expected: float) -> None:
    assert one_map([[1, 2], [3, 4]], x, y) == pytest.approx(expected)
    assert one_map([[1, 2], [3, 4]], x, y, weight=-2.0) == pytest.approx(-2 * expected)


def test_nan_stays_visible() -> None:
    assert math.isnan(one_map([[1, 2], [3, 4]], math.nan, 0.5))


def test_against_the_loops() -> None:
    value, locations, weights = (tensor.detach() for tensor in inputs())
    expected = reference.sample_values(value, LEVELS, locations, weights)
    torch.testing.assert_close(sample_values(value, LEVELS, locations, weights), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(reference.sample_values_by_grid(value, LEVELS, locations, weights), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_against_grid_sample(dtype: torch.dtype, tolerance: float) -> None:
    """Of the same numbers in float64; bfloat16 is rounded only at the end, 2^-8 of the largest."""
    ours = inputs(dtype, queries=20)
    counterpart = [tensor.detach().double().requires_grad_() for tensor in ours]
    output = sample_values(ours[0], LEVELS, *ours[1:])
    expected = reference.sample_values_by_grid(counterpart[0], LEVELS, *counterpart[1:])
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    output.backward(upstream)
    expected.backward(upstream.double())
    assert output.dtype == dtype
    for actual, wanted in [(output, expected), *((a.grad, b.grad) for a, b in zip(ours, counterpart, strict=True))]:
        assert actual is not None and wanted is not None and actual.dtype == dtype
        assert (actual.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda v, l, w: sample_values(v, LEVELS, l, w), inputs())


def test_second_derivatives_are_refused() -> None:
    value, locations, weights = inputs()
    (gradient,) = torch.autograd.grad(sample_values(value, LEVELS, locations, weights).sum(), locations, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_no_queries_and_far_points() -> None:
    value, locations, weights = inputs()
    none = sample_values(value, LEVELS, locations[:, :0], weights[:, :0])
    assert none.shape == (2, 0, 6)
    far = (locations.detach() + 3).requires_grad_()
    output = sample_values(value, LEVELS, far, weights)
    output.sum().backward()
    assert not output.any() and not far.grad.any() and not value.grad.any()  # type: ignore[union-attr]


def test_gradients_repeat_to_the_bit() -> None:
    def gradient() -> Tensor:
        value, locations, weights = inputs(torch.float32, queries=50)
        sample_values(value, LEVELS, locations, weights).square().sum().backward()
        return value.grad  # type: ignore[return-value]

    assert torch.equal(gradient(), gradient())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gpu_equals_cpu(dtype: torch.dtype, tolerance: float) -> None:
    here = inputs(dtype, queries=20)
    there = [tensor.detach().cuda().requires_grad_() for tensor in here]
    for tensors in (here, there):
        sample_values(tensors[0], LEVELS, *tensors[1:]).square().sum().backward()
    for a, b in zip(here, there, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad.double() - b.grad.cpu().double()).abs().max() <= tolerance * a.grad.double().abs().max()


# the module


def module(points: int = 2) -> DeformableAttention:
    torch.manual_seed(0)
    attention = DeformableAttention(12, 2, len(LEVELS), points).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return attention


def module_inputs(queries: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, reference, tokens, padding."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, queries, 12, generator=generator, dtype=torch.float64)
    reference_boxes = torch.rand(2, queries, len(LEVELS), 4, generator=generator, dtype=torch.float64) * 0.6 + 0.2
    tokens = torch.randn(2, TOKENS, 12, generator=generator, dtype=torch.float64)
    return query, reference_boxes, tokens, torch.rand(2, TOKENS, generator=generator) < 0.3


def test_starts_as_published() -> None:
    """Four heads look right, down, left, up (y grows downward); the second point is twice as far; all weights are equal."""
    attention = DeformableAttention(16, 4, levels=3, points=2)
    query, boxes = torch.randn(1, 2, 16), torch.rand(1, 2, 3, 4)
    locations, weights = attention.sampling_points(query, boxes, False, LEVELS)
    assert torch.equal(weights, torch.full_like(weights, 1 / 6))
    cells = (locations - boxes[:, :, None, :, None, :2]) * torch.tensor([(w, h) for h, w in LEVELS])[:, None]
    steps = torch.tensor([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])[:, None, None] * torch.tensor([1.0, 2.0])[:, None]
    torch.testing.assert_close(cells, steps.expand(1, 2, 4, 3, 2, 2), rtol=0, atol=1e-5)


def test_offsets_in_half_boxes() -> None:
    """A box of 0.4 x 0.2 and 2 points: the offset 1 moves by 0.4 / 2 / 2 = 0.1 and 0.2 / 2 / 2 = 0.05."""
    attention = DeformableAttention(4, 1, levels=1, points=2)
    with torch.no_grad():
        attention.sampling_offsets.bias.fill_(1.0)
    box = torch.tensor([0.5, 0.5, 0.4, 0.2])[None, None, None]
    locations, _ = attention.sampling_points(torch.zeros(1, 1, 4), box, True, ((2, 2),))
    torch.testing.assert_close(locations[0, 0, 0, 0], torch.tensor([[0.6, 0.55], [0.6, 0.55]]))


def test_mixed_references_equal_separate_ones() -> None:
    attention, (query, boxes, tokens, padding) = module(), module_inputs()
    value = attention.project(tokens, padding)
    sized = torch.tensor([True, False, False, True, False])
    mixed = attention(query, boxes, sized, value, LEVELS)
    for kind in (True, False):
        rows = sized == kind
        torch.testing.assert_close(mixed[:, rows], attention(query[:, rows], boxes[:, rows], kind, value, LEVELS), rtol=0, atol=1e-12)


def test_padding_counts_for_nothing() -> None:
    attention, (_, _, tokens, padding) = module(), module_inputs()
    garbage = torch.where(padding[..., None], 1e3, tokens)
    value = attention.project(tokens, padding)
    assert not value[padding].any() and value[~padding].all()
    torch.testing.assert_close(attention.project(garbage, padding), value)


@pytest.mark.parametrize("sized", [True, False])
def test_autocast_and_checkpointing(sized: bool) -> None:
    attention, (query, boxes, tokens, padding) = module().float(), module_inputs()
    arguments = [query.float().requires_grad_(), boxes.float(), tokens.float().requires_grad_()]

    def run(query: Tensor, boxes: Tensor, tokens: Tensor) -> Tensor:
        return attention(query, boxes, sized, attention.project(tokens, padding), LEVELS)

    def gradients(output: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(output.float().square().sum(), [arguments[0], arguments[2], *attention.parameters()]))

    expected = gradients(run(*arguments))
    recomputed = gradients(checkpoint(run, *arguments, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(expected, recomputed, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        output = run(*arguments)
    assert output.dtype == torch.bfloat16
    for a, b in zip(expected, gradients(output), strict=True):
        assert (a - b).abs().max() <= 0.05 * a.abs().max()
