"""AdaMixer: its equations against slow twins and by hand, the bias in the attention plan, what it takes and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steadydetr.cli import main
from steadydetr.detectors import AdaMixer
from steadydetr.detectors.configs.deformable import with_transformer
from steadydetr.equations import adamixer as ours
from steadydetr.equations.detection import box_terms
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import pairwise_terms
from steadydetr.nn.attention import Rows, SelfAttention
from steadydetr.nn.backbone import FrozenBatchNorm
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.nn.positions import xyzr_position
from steadydetr.recipes import find
from steadydetr.recipes.stable import stable
from steadydetr.structures import MeasuredMemory, Memory, Queries, QueryGroup, Stages, Targets
from steadydetr.training.optimiser import parameter_groups
from tests.conftest import CLASSES, DETECTORS, make_batch, make_method
from tests.reference import adamixer as slow

IMAGE = torch.tensor([[640.0, 480.0], [333.0, 800.0]], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boxes(count: int, seed: int = 0) -> Tensor:
    """[2, count, 4] normalised."""
    return torch.cat((random(2, count, 2, seed=seed), random(2, count, 2, seed=seed + 1) * 0.5 + 0.05), -1)


def test_boxes_by_hand() -> None:
    """A box of 64 x 16 pixels: sqrt of its area is 32, its height a quarter of its width."""
    xyzr = ours.to_xyzr(torch.tensor([[[0.5, 0.25, 0.64, 0.16]]]), torch.tensor([[100.0, 100.0]]))
    torch.testing.assert_close(xyzr, torch.tensor([[[50.0, 25.0, 5.0, -2.0]]]))
    moved = ours.refine(xyzr, torch.tensor([[[0.5, -0.25, 1.0, 2.0]]]))  # by half of 32 and a quarter of 32; twice as large, a square
    torch.testing.assert_close(ours.from_xyzr(moved, torch.tensor([[100.0, 100.0]])), torch.tensor([[[0.66, 0.17, 0.64, 0.64]]]))


def test_boxes_equal_their_twins() -> None:
    given, delta = boxes(5), random(2, 5, 4, seed=3) - 0.5
    xyzr = ours.to_xyzr(given, IMAGE)
    back, moved = ours.from_xyzr(xyzr, IMAGE), ours.refine(xyzr, delta)
    for i, image in enumerate(IMAGE.tolist()):
        for k in range(5):
            expected = slow.xyzr(given[i, k].tolist(), image)
            assert xyzr[i, k].tolist() == pytest.approx(expected)
            assert back[i, k].tolist() == pytest.approx(slow.box(expected, image))
            assert moved[i, k].tolist() == pytest.approx(slow.refined(expected, delta[i, k].tolist()))
    torch.testing.assert_close(back, given)


def test_a_box_without_area_is_finite() -> None:
    assert ours.to_xyzr(torch.zeros(1, 1, 4), torch.tensor([[100.0, 50.0]])).isfinite().all()


def test_overlap_by_hand() -> None:
    """A quarter of the large box is covered by the small one, which lies in it as a whole; another lies elsewhere."""
    corners = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 6.0, 6.0]]])
    iof = ours.intersection_over_foreground(corners, corners)
    assert iof[0].tolist() == [[1.0, 0.25, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    bias = ours.overlap_bias(iof, torch.tensor([2.0]))
    assert float(bias[0, 0, 0, 1]) == pytest.approx(-2.772588, abs=1e-5) and float(bias[0, 0, 0, 2]) == pytest.approx(-32.236, abs=1e-3)


def test_overlap_and_positions_equal_their_twins() -> None:
    xyzr = ours.to_xyzr(boxes(4), IMAGE)
    corners = torch.cat((xyzr[..., :2] - ours.sides_of(xyzr) / 2, xyzr[..., :2] + ours.sides_of(xyzr) / 2), -1)
    tau = torch.tensor([0.5, 3.0], dtype=torch.float64)
    bias = ours.overlap_bias(ours.intersection_over_foreground(corners, corners[:, :3]), tau)
    position = xyzr_position(xyzr, 16)
    for i in range(2):
        for k in range(4):
            assert position[i, k].tolist() == pytest.approx(slow.position(xyzr[i, k].tolist(), 16), abs=1e-6)
            for other in range(3):
                for head in range(2):
                    expected = slow.bias(corners[i, k].tolist(), corners[i, other].tolist(), float(tau[head]))
                    assert float(bias[i, head, k, other]) == pytest.approx(expected)


def test_places_and_levels_equal_their_twins() -> None:
    xyzr, offsets, strides = ours.to_xyzr(boxes(3), IMAGE), random(2, 3, 2, 5, 3, seed=7) - 0.5, (4, 8, 16)
    places = ours.sample_places(xyzr, offsets)
    weights = ours.level_weights(places[..., 2], strides)
    for at in [(0, 0, 0, 0), (1, 2, 1, 4), (1, 0, 1, 2)]:
        expected = slow.place(xyzr[at[:2]].tolist(), offsets[at].tolist())
        assert places[at].tolist() == pytest.approx(expected)
        assert weights[at].tolist() == pytest.approx(slow.levels(expected[2], strides))
    assert ours.level_weights(torch.tensor(3.0), (4, 8, 16)).tolist() == pytest.approx([0.274069, 0.451863, 0.274069], abs=1e-6)


def test_mixing_equals_its_twin() -> None:
    sampled, channels, points = random(2, 4, 3, seed=1), random(2, 3, 3, seed=2) - 0.5, random(2, 5, 4, seed=3) - 0.5
    mixed = ours.adaptive_mixing(sampled, channels, points)
    for i in range(2):
        expected = torch.tensor(slow.mixed(sampled[i].tolist(), channels[i].tolist(), points[i].tolist()), dtype=torch.float64)
        torch.testing.assert_close(mixed[i], expected)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_a_bias_equals_its_loops(masked: bool) -> None:
    """Group by group, head by head; what is not visible stays so whatever its bias."""
    torch.manual_seed(0)
    attention, content = SelfAttention(8, 2).double(), random(1, 5, 8)
    bias = random(1, 2, 5, 5, seed=4) * 3
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    visible[..., 1] = torch.tensor([False, True, False])
    plan = [Rows(slice(0, 2), (slice(0, 2),), None), Rows(slice(2, 5), (slice(2, 5),), visible if masked else None)]
    ours = attention(content, None, plan, lambda queries, keys: bias[:, :, queries, keys[0]])
    query, key, value = (content @ attention.in_proj_weight.T + attention.in_proj_bias)[0].chunk(3, -1)
    rows = []
    for i in range(5):
        group = range(2) if i < 2 else range(2, 5)
        group = [j for j in group if i < 2 or not masked or bool(visible[0, 0, i - 2, j - 2])]  # type: ignore[assignment]
        heads = []
        for head, at in enumerate((slice(0, 4), slice(4, 8))):
            score = torch.stack([(query[i, at] * key[j, at]).sum() / 2 + bias[0, head, i, j] for j in group]).softmax(0)
            heads.append(sum(weight * value[j, at] for weight, j in zip(score, group, strict=True)))
        rows.append(torch.cat(heads))  # type: ignore[arg-type]
    torch.testing.assert_close(ours[0], attention.out_proj(torch.stack(rows)))


def test_l1_of_corners_by_hand() -> None:
    """A box that is 0.2 wider moves both its corners by 0.1; one that is shifted by 0.1 as well."""
    target = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    for predicted, plain, corners in [((0.5, 0.5, 0.4, 0.2), 0.2, 0.2), ((0.6, 0.5, 0.2, 0.2), 0.1, 0.2), ((0.6, 0.5, 0.4, 0.2), 0.3, 0.2)]:
        box = torch.tensor([predicted])
        assert float(box_terms(box, target)[0]) == pytest.approx(plain)
        assert float(box_terms(box, target, 0.0, "xyxy")[0]) == pytest.approx(corners)
        stages = Stages(torch.zeros(1, 1, 1, 2), box[None, None])
        terms = pairwise_terms(stages, Targets(torch.tensor([1]), target, (1,)), 0.0, "xyxy")
        assert float(terms.l1) == pytest.approx(corners)


def test_the_matcher_of_other_detectors_is_called_as_before() -> None:
    """Runs that go on know a teacher by it."""
    assert Criterion().matcher == (Criterion().class_cost, Criterion().cost_weights, 0.0)
    assert Criterion(l1_format="xyxy").matcher != Criterion().matcher


def test_places_outside_and_padding() -> None:
    """The decoder knows the sizes of images in pixels without their padding; references are of the image, not of the batch."""
    detector, batch = make_method(DETECTORS["adamixer"]).student, make_batch((2, 3))
    memory = detector.encode(batch.images, batch.padding)
    assert isinstance(memory, MeasuredMemory) and memory.sizes.tolist() == [[64.0, 64.0], [48.0, 64.0]]
    stages = detector.decode(memory, [QueryGroup("main", detector.queries(memory)["main"])])["main"]
    torch.testing.assert_close(stages.reference[0], torch.tensor([0.5, 0.5, 1.0, 1.0]).expand_as(stages.reference[0]))
    assert torch.equal(stages.reference[1], stages.boxes[0]) and not stages.reference[1].requires_grad and stages.boxes[0].requires_grad


def test_references_without_a_size_start_as_the_image() -> None:
    detector, batch = make_method(DETECTORS["adamixer"]).student, make_batch((2,))
    memory = detector.encode(batch.images, batch.padding)
    content, centre = torch.randn(1, 3, 16), torch.tensor([0.3, 0.4]).expand(1, 3, 2)
    groups = [
        QueryGroup("points", Queries(content, torch.cat((centre, torch.zeros(1, 3, 2)), -1), sized=False)),
        QueryGroup("boxes", Queries(content, torch.cat((centre, torch.full((1, 3, 2), 0.2)), -1))),
    ]
    for given in (groups, groups[:1]):
        stages = detector.decode(memory, given)
        assert torch.equal(stages["points"].reference[0, ..., 2:].round(decimals=5), torch.ones(1, 3, 2))
    torch.testing.assert_close(detector.decode(memory, groups)["boxes"].reference[0, ..., 2:], torch.full((1, 3, 2), 0.2))


def test_another_detectors_memory_is_refused() -> None:
    detector = DETECTORS["adamixer"].build(CLASSES)
    memory = Memory(torch.zeros(1, 1, 16), torch.zeros(1, 1), ((1, 1),), torch.ones(1, 1, 2), torch.zeros(1, 1, 16))
    with pytest.raises(TypeError, match="sizes of its images in pixels"):
        detector.decode(memory, [QueryGroup("main", Queries(torch.zeros(1, 1, 16), torch.ones(1, 1, 4)))])


def test_precisions() -> None:
    """bfloat16 under autocast: boxes stay float32 and near those of float32."""
    torch.manual_seed(0)
    detector, batch = make_method(DETECTORS["adamixer"]).student.eval(), make_batch((2, 3))
    with torch.no_grad():
        exact = detector(batch.images, batch.padding)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = detector(batch.images, batch.padding)
    assert rounded.boxes.dtype == torch.float32 and float((exact.boxes - rounded.boxes).abs().max()) < 0.05
    assert detector.double()(batch.images.double(), batch.padding).boxes.dtype == torch.float64


def test_classes_that_are_kept() -> None:
    detector, batch = make_method(DETECTORS["adamixer"]).student.eval(), make_batch((1,))
    before = detector(batch.images, batch.padding)
    detector.keep_classes([3, 0])
    after = detector(batch.images, batch.padding)
    torch.testing.assert_close(after.logits, before.logits[..., [3, 0]])
    assert torch.equal(after.boxes, before.boxes) and detector.num_classes == 2
    assert isinstance(detector, AdaMixer) and len(list(detector.compiled_parts())) == detector.stages


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"groups": 3}, "detector.width = 16 is no multiple of detector.groups = 3"),
        ({"width": 12, "norm_groups": 4}, "detector.width = 12 is no multiple of 8"),
        ({"in_points": 0}, r"detector.in_points = 0 must lie in 1 \.\."),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(DETECTORS["adamixer"], **changes)  # type: ignore[type-var]


def test_fusion_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "AdaMixer has no encoder, so there is no memory to fuse"
    with pytest.raises(ValueError, match=f"fusion: {reason}"):
        with_transformer(DETECTORS["adamixer"], fusion="dense")
    with pytest.raises(ValueError, match=reason):
        stable(find("small-adamixer"), "one", "")
    with pytest.raises(SystemExit):
        main(["train", "small-adamixer", "--detector.transformer.fusion", "dense"])
    assert f"--detector.transformer.fusion: {reason}" in capsys.readouterr().err
    kept = stable(find("small-adamixer"), "one", "", fusion="none")
    assert kept.detector == find("small-adamixer").detector and kept.notes.endswith("with stable matching")


def test_scale_and_shift_of_fixed_norms_can_be_trained() -> None:
    """The same map; its affine part is trained where its stage is, and spared from decay with the other norms."""
    torch.manual_seed(0)
    fixed = TimmBackboneConfig("resnet18", (2, 3), "none").build()
    trained = TimmBackboneConfig("resnet18", (2, 3), "none", train_affine=True).build()
    trained.load_state_dict(fixed.state_dict())
    pixels = torch.rand(1, 3, 32, 32)
    assert all(map(torch.equal, fixed(pixels), trained(pixels)))
    norms = {name for name, module in trained.named_modules() if isinstance(module, FrozenBatchNorm)}
    learned = {name for name, p in trained.named_parameters() if p.requires_grad and name.rpartition(".")[0] in norms}
    assert "body.layer2.0.bn1.weight" in learned and not any("layer1" in name or name.startswith("body.bn1") for name in learned)
    assert not {name for name, _ in fixed.named_parameters()} & learned
    groups = parameter_groups(trained, replace(find("small-dino").training, decay_vectors=True, decay_norms=False))
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}  # type: ignore[attr-defined]
    assert {name for name, p in trained.named_parameters() if id(p) in spared} == learned
