"""Conditional DETR as a detector among others: what it refuses, precision, DC5, memory fusion, three methods in one step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn

from steadydetr.detectors import ConditionalDETR, ConditionalDETRConfig, DINOConfig
from steadydetr.learning.class_terms import PositionModulatedCost, PositionTarget, QualityTarget
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Average, Frozen
from steadydetr.nn.configs import SmallBackboneConfig, TimmBackboneConfig
from steadydetr.objectives import (
    AssignmentDistillation,
    AuxiliaryGroups,
    FeatureDistillation,
    LogitsDistillation,
    MatchingDistillation,
    Objective,
    PredictionDistillation,
    SetPrediction,
)
from steadydetr.objectives.method import Method
from steadydetr.recipes import find
from steadydetr.structures import Queries, QueryGroup
from steadydetr.tools.cost import count_multiplications
from tests.conftest import BACKBONE, CLASSES, DETECTORS, TINY_PLAIN, make_batch, make_method
from tests.steps import assert_close, gradients, wide

CONFIG = DETECTORS["conditional"]
ONLINE: tuple[Objective, ...] = (SetPrediction(MatchingDistillation()), PredictionDistillation())
OFFLINE: tuple[Objective, ...] = (LogitsDistillation(), FeatureDistillation(), AssignmentDistillation())


def build(seed: int = 0, config: ConditionalDETRConfig = CONFIG) -> ConditionalDETR:  # type: ignore[assignment]
    torch.manual_seed(seed)
    return config.build(CLASSES)


def method_of(objectives: tuple[Objective, ...], criterion: Criterion | None = None, fusion: str = "none") -> Method:
    """With its own average, and a teacher of other width, queries and layers."""
    student = build(0, replace(CONFIG, transformer=replace(TINY_PLAIN, fusion=fusion)))  # type: ignore[type-var, arg-type]
    larger = replace(CONFIG, transformer=replace(TINY_PLAIN, width=24, heads=3, decoder_layers=3, encoder_layers=2), queries=9)  # type: ignore[type-var]
    teachers = {"ema": Average(student, 0.9), "teacher": Frozen(build(1, larger))}  # type: ignore[arg-type]
    return Method(student, criterion or Criterion(), objectives, teachers)  # type: ignore[arg-type]


@pytest.mark.parametrize("fusion", ["none", "simple", "u_like", "dense"])
def test_three_methods_in_one_step(fusion: str) -> None:
    """Every parameter learns, without objects too."""
    steady = Criterion(class_target=QualityTarget(), class_cost=PositionModulatedCost(), alpha=None)
    for counts, criterion in (((2, 0, 3), steady), ((0, 0), Criterion(class_target=PositionTarget(), class_cost=PositionModulatedCost()))):
        method = method_of((*ONLINE, *OFFLINE), criterion, fusion)
        method(make_batch(counts)).total.backward()
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_what_its_queries_cannot_do_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"queries start from the teacher's boxes, but a query of the student \(ConditionalDETR\) is about a"
    ):
        method_of((*ONLINE, AuxiliaryGroups()))
    detector, batch = build(), make_batch((1,))
    memory = detector.encode(batch.images, batch.padding)
    main = detector.queries(memory)["main"]
    for wrong in (replace(main, sized=True), replace(main, position=None)):
        with pytest.raises(ValueError, match="must bring its queries' position vectors, and references without a size"):
            detector.decode(memory, [QueryGroup("main", wrong)])


def test_online_recipes_leave_out_what_is_refused() -> None:
    from steadydetr.recipes.online import online

    names = [objective.name for objective in online(find("small-conditional-detr"), "x").objectives]
    assert names == ["main", "prediction"]


def test_a_point_stays_where_it_is_and_has_no_size() -> None:
    """All stages start from the same points; with the box head's last layer at its start, boxes are half the image around them."""
    detector, batch = build().eval(), make_batch((2, 1))
    stages = detector(batch.images, batch.padding)
    reference = detector.refer(detector.query_position.weight)
    assert torch.equal(stages.reference, reference.expand_as(stages.reference)) and not reference[..., 2:].any()
    torch.testing.assert_close(stages.boxes[..., :2], reference[..., :2].expand_as(stages.boxes[..., :2]))
    torch.testing.assert_close(stages.boxes[..., 2:], torch.full_like(stages.boxes[..., 2:], 0.5))


def test_bfloat16_and_checkpointing_change_little_and_nothing() -> None:
    method, batch = make_method(CONFIG), make_batch((2, 3))
    plain = method(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = method(batch)
        reference = method.student.refer(method.student.query_position.weight)
    assert float(rounded.total.detach()) == pytest.approx(float(plain.total.detach()), rel=0.05)
    assert reference.dtype == torch.float32 and torch.equal(reference, method.student.refer(method.student.query_position.weight))
    again = make_method(replace(CONFIG, transformer=replace(TINY_PLAIN, checkpointing=True)))  # type: ignore[type-var]
    again.load_state_dict(method.state_dict())
    double = wide(batch)
    for each in (method, again):
        each.double().train()
    assert_close(gradients(again, again(double).total), gradients(method, method(double).total))


def test_padding_changes_nothing() -> None:
    """Neither its pixels nor, in evaluation, what the predictions are of the image without it."""
    detector, batch = make_method(CONFIG).student.eval(), make_batch((1,))
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    padding[..., 64:] = True
    found = []
    for value in (0.0, 1.0):
        images = torch.full((1, 3, 64, 96), value)
        images[..., :64] = batch.images
        found.append(detector(images, padding))
    assert torch.equal(found[0].logits, found[1].logits) and torch.equal(found[0].boxes, found[1].boxes)


def test_dc5_is_that_of_torchvision() -> None:
    """The last stage has stride 1; its first block is not dilated, the others are by 2."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True]).eval()
    ours = TimmBackboneConfig("resnet50.tv_in1k", (4,), "none", output_stride=16).build().eval()
    ours.body.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}, strict=False)
    layers = nn.Sequential(*list(theirs.children())[:-2])
    pixels = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels)[0], layers(pixels), rtol=1e-4, atol=1e-4)
    assert ours.strides == [16]


def test_output_strides() -> None:
    small = SmallBackboneConfig(4, (4, 8, 8, 8), output_stride=16)
    detector = build(0, replace(CONFIG, backbone=small))  # type: ignore[type-var, arg-type]
    assert detector.strides == (16,) and detector.backbone.strides == [8, 16, 16]
    memory = detector.encode(torch.rand(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    assert memory.levels == ((4, 6),)
    assert {k: v.shape for k, v in detector.state_dict().items()} == {k: v.shape for k, v in build().state_dict().items()}
    with pytest.raises(ValueError, match="output_stride = 4 must be 8, 16 or 32"):
        SmallBackboneConfig(output_stride=4)
    with pytest.raises(ValueError, match=r"levels of one stride would be mixed up"):
        replace(DETECTORS["dino"], backbone=small).build(CLASSES)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"timm cannot build swin_tiny.* and backbone.output_stride = 16"):
        TimmBackboneConfig("swin_tiny_patch4_window7_224", (3,), "none", 0, output_stride=16).build()


def test_multiplications_by_hand() -> None:
    """Of the encoder and the decoder: projections, products of every pair of query and token, feed-forward, heads."""
    detector, tokens, queries, d, ffn = build(), 2 * 3, 12, 16, 16
    memory = detector.encode(torch.rand(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    position = torch.zeros(1, tokens, d)
    encoder, _ = count_multiplications(lambda: detector.encoder(memory.inputs, position, memory.padding))
    assert encoder == 4 * tokens * d * d + 2 * tokens * tokens * d + 2 * tokens * d * ffn
    groups = [QueryGroup("main", detector.queries(memory)["main"])]
    decoder, _ = count_multiplications(lambda: detector.decode(memory, groups))
    layer = 6 * queries * d * d + 2 * queries**2 * d  # self-attention
    layer += 3 * queries * d * d + 3 * tokens * d * d + 3 * queries * tokens * d  # cross-attention; the weights are of 2d numbers
    layer += 2 * queries * d * ffn
    first, scale = queries * d * d, 2 * queries * d * d  # the position of queries in the first layer; the scale of the sine after it
    heads = 2 * queries * (2 * d * d + 4 * d + CLASSES * d)
    assert decoder == 2 * layer + first + scale + heads


def test_weights_go_over_to_other_layers_and_strides() -> None:
    """Names of its tensors do not depend on the stride of the backbone, nor on the number of layers."""
    small = build(0, replace(CONFIG, transformer=replace(TINY_PLAIN, decoder_layers=1)))  # type: ignore[type-var, arg-type]
    assert set(small.state_dict()) < set(build().state_dict())
    assert [name for name in build().learned_queries()] == [
        "query_position.weight",
        *(f"query_reference.layers.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")),
    ]
    assert len(list(build().compiled_parts())) == 3


def test_sines_are_of_y_then_x() -> None:
    """A query that is moved along x alone has another second half of its sine."""
    detector, batch = build().eval(), make_batch((1,))
    memory = detector.encode(batch.images, batch.padding)
    main = detector.queries(memory)["main"]
    seen: list[Tensor] = []
    detector.decoder.layers[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    for x in (0.2, 0.7):
        reference = torch.zeros_like(main.reference)
        reference[..., 0], reference[..., 1] = x, 0.4
        detector.decode(memory, [QueryGroup("main", Queries(main.content, reference, False, position=main.position))])
    half = detector.width // 2
    assert torch.equal(seen[0][..., :half], seen[1][..., :half]) and not torch.equal(seen[0][..., half:], seen[1][..., half:])


def test_no_other_detector_takes_it_for_its_own() -> None:
    """And it takes no boxes, as it says in both places."""
    assert not CONFIG.takes_boxes and not build().takes_boxes
    dino = DETECTORS["dino"]
    assert isinstance(dino, DINOConfig) and dino.takes_boxes and dino.build(CLASSES).takes_boxes
    assert isinstance(CONFIG, ConditionalDETRConfig) and CONFIG.backbone == BACKBONE
