"""Box formats and overlaps: by hand, against the slow twins, at the edges."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from steadydetr.boxes import area, inverse_sigmoid, iou_giou, to_cxcywh, to_xyxy
from tests.reference import boxes as slow


def random_boxes(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.5 + 0.1


def test_overlaps_by_hand() -> None:
    # a box of half the side inside another: IoU 0.25, the hull is the larger box, so GIoU 0.25
    outer, inner = torch.tensor([0.5, 0.5, 0.4, 0.4]), torch.tensor([0.5, 0.5, 0.2, 0.2])
    iou, giou = iou_giou(to_xyxy(outer), to_xyxy(inner))
    assert (float(iou), float(giou)) == (pytest.approx(0.25), pytest.approx(0.25))
    # two unit squares with a gap of one between them: IoU 0, hull 3, union 2, so GIoU -1/3
    iou, giou = iou_giou(torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1]))
    assert (float(iou), float(giou)) == (0.0, pytest.approx(-1 / 3))
    # the pair of boxes in OD-DETR's worked case: .4 x .3 in .4 x .4
    iou, giou = iou_giou(to_xyxy(torch.tensor([0.5, 0.5, 0.4, 0.3])), to_xyxy(outer))
    assert (float(iou), float(giou)) == (pytest.approx(0.75), pytest.approx(0.75))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_overlaps_equal_their_twin(eps: float) -> None:
    a, b = random_boxes(9, 1), random_boxes(7, 2)
    iou, giou = iou_giou(to_xyxy(a)[:, None], to_xyxy(b), eps)
    assert iou.shape == (9, 7)
    expected = torch.tensor([[slow.iou_and_giou(x, y, eps) for y in b.tolist()] for x in a.tolist()], dtype=torch.float64)
    torch.testing.assert_close(iou, expected[..., 0])
    torch.testing.assert_close(giou, expected[..., 1])
    paired = iou_giou(to_xyxy(a[:7]), to_xyxy(b), eps)
    torch.testing.assert_close(torch.stack(paired), torch.stack((iou, giou))[:, range(7), range(7)])


def test_overlaps_equal_torchvision() -> None:
    a, b = to_xyxy(random_boxes(9, 3)), to_xyxy(random_boxes(7, 4))
    iou, giou = iou_giou(a[:, None], b)
    torch.testing.assert_close(iou, box_iou(a, b))
    torch.testing.assert_close(giou, generalized_box_iou(a, b), rtol=0, atol=1e-6)  # torchvision adds an epsilon


def test_boxes_without_area() -> None:
    point, box = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.2, 0.2, 0.4, 0.4])
    iou, giou = iou_giou(point, box)
    assert float(iou) == 0 and torch.isfinite(giou)
    assert torch.isfinite(torch.stack(iou_giou(point, point, eps=1e-6))).all()


def test_gradient_of_overlaps() -> None:
    a, b = to_xyxy(random_boxes(4, 5)).requires_grad_(), to_xyxy(random_boxes(4, 6))
    assert torch.autograd.gradcheck(lambda boxes: iou_giou(boxes, b), a)


def test_formats_invert_each_other() -> None:
    boxes = random_boxes(7, 7)
    torch.testing.assert_close(to_cxcywh(to_xyxy(boxes)), boxes)
    torch.testing.assert_close(area(to_xyxy(boxes)), boxes[:, 2] * boxes[:, 3])
    assert to_xyxy(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_inverse_sigmoid(eps: float) -> None:
    inner = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(inner, eps).sigmoid(), inner)
    edges = torch.tensor([-1.0, 0.0, eps / 2, 1 - eps / 2, 1.0, 2.0], dtype=torch.float64)
    expected = torch.tensor([slow.inverse_sigmoid(x, eps) for x in edges.tolist()], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(edges, eps), expected)
