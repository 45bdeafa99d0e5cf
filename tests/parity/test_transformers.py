"""Live against the transformers package: random tiny models of theirs, converted, give the same predictions and losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.boxes import to_cxcywh
from steadydetr.checkpoints.convert import Converted, Untraced, convert_file, convert_state_dict
from steadydetr.checkpoints.folder import load_detector
from steadydetr.detectors import DeformableDETR, DeformableDETRConfig, DetectorConfig
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.objectives import SetPrediction
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Losses, Targets
from tests.parity.models import close_to_scale

transformers = pytest.importorskip("transformers")

VARIANTS = {"plain": {}, "refine": {"with_box_refine": True}, "two_stage": {"with_box_refine": True, "two_stage": True}}
SIZES = ((96, 128), (80, 112))  # one image fills the batch, one does not
CLASSES, QUERIES, HEADS = 5, 12, 4
UNTRACED = Untraced(heads=HEADS, queries=QUERIES)
# float64 on both sides, but our geometry (grids, valid ratios) is float32, theirs is not
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def peer(variant: str) -> Any:
    """Their detector with random parameters and random statistics of its batch norms, in float64."""
    torch.manual_seed(3)
    backbone = transformers.TimmBackboneConfig(backbone="resnet18", out_indices=[2, 3, 4], use_pretrained_backbone=False)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_n_points": 2, "decoder_n_points": 3}
    queries = {"num_queries": QUERIES, "two_stage_num_proposals": QUERIES}
    dropout = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0)
    options = sizes | heads | queries | dropout | VARIANTS[variant]
    config = transformers.DeformableDetrConfig(num_labels=CLASSES, backbone_config=backbone, auxiliary_loss=True, **options)
    model = transformers.DeformableDetrForObjectDetection(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) * 0.3)
    return model


def converted(model: Any) -> tuple[DeformableDETR, Converted]:
    found = convert_state_dict(model.state_dict(), untraced=UNTRACED)
    config = replace(found.config, transformer=replace(found.config.transformer, dropout=0.0))
    detector = config.build(found.num_classes)
    detector.load_state_dict(found.state)
    assert isinstance(detector, DeformableDETR)
    return detector.double().eval(), found


def loss_of(model: Any, detector: DeformableDETR, given: Batch) -> tuple[Losses, Tensor]:
    """Ours, and the total as theirs sums it up: without the encoder's proposals."""
    c = model.config
    weights = Weights(1.0, c.bbox_loss_coefficient, c.giou_loss_coefficient)
    criterion = Criterion(cost_weights=Weights(c.class_cost, c.bbox_cost, c.giou_cost), loss_weights=weights)
    losses = Method(detector, criterion, (SetPrediction(),))(given)
    parts = [values.sum() * weight for name, values, weight in losses if name.startswith("main/")]
    return losses, torch.stack(parts).sum()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, 96, 128, generator=generator, dtype=torch.float64)
    padding = torch.ones(2, 96, 128, dtype=torch.bool)
    for i, (height, width) in enumerate(SIZES):
        padding[i, :height, :width] = False
    low = torch.rand(5, 2, generator=generator, dtype=torch.float64) * 0.5
    boxes = to_cxcywh(torch.cat((low, low + 0.1 + torch.rand(5, 2, generator=generator, dtype=torch.float64) * 0.35), -1))
    targets = Targets(torch.tensor([0, 3, 3, 1, 4]), boxes, (4, 1))
    return Batch(images, padding, targets, (1, 2), SIZES)


def ask(model: Any, given: Batch, pixels: Tensor) -> Any:
    labels = [{"class_labels": part.labels, "boxes": part.boxes} for part in given.targets.split()]
    return model(pixel_values=pixels, pixel_mask=(~given.padding).long(), labels=labels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_predictions_losses_and_gradients(variant: str) -> None:
    model, given = peer(variant), batch()
    detector, found = converted(model)
    theirs = ask(model, given, detector.normalise(given.images, given.padding))
    stages = detector(given.images, given.padding)
    stage_outputs = [*theirs.auxiliary_outputs, {"logits": theirs.logits, "pred_boxes": theirs.pred_boxes}]
    torch.testing.assert_close(stages.logits, torch.stack([output["logits"] for output in stage_outputs]), **CLOSE)
    torch.testing.assert_close(stages.boxes, torch.stack([output["pred_boxes"] for output in stage_outputs]), **CLOSE)

    losses, total = loss_of(model, detector, given)
    for ours, name in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        earlier = range(model.config.decoder_layers - 1)
        expected = [theirs.loss_dict[f"{name}_{stage}"] for stage in earlier] + [theirs.loss_dict[name]]
        torch.testing.assert_close(losses[f"main/{ours}"], torch.stack(expected), **CLOSE)
    torch.testing.assert_close(total, theirs.loss, **CLOSE)

    theirs.loss.backward()
    total.backward()
    check_gradients(model, detector, found.config)


def check_gradients(model: Any, detector: DeformableDETR, config: DetectorConfig) -> None:
    # theirs by our names: every key holds its parameter's gradient (tied keys the same one), buffers themselves
    variables = model.state_dict(keep_vars=True)
    gradients = {key: value if value.grad is None else value.grad for key, value in variables.items()}
    expected = convert_state_dict(gradients, config).state
    ours = {name: parameter.grad for name, parameter in detector.named_parameters() if parameter.grad is not None}
    assert len(ours) > 100
    if model.class_embed[0].weight is model.class_embed[1].weight:  # shared by all stages in theirs
        ours = sum_over_stages(ours, "decoder.class_heads.")
    for name, gradient in ours.items():
        close_to_scale(gradient, expected[name], 1e-5, name)


def sum_over_stages(gradients: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = dict(gradients)
    for name in [name for name in gradients if name.startswith(prefix)]:
        rest = name.removeprefix(prefix).partition(".")[2]
        parts = [value for other, value in gradients.items() if other.startswith(prefix) and other.endswith(f".{rest}")]
        found[name] = torch.stack(parts).sum(0)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_that_they_save(variant: str, tmp_path: Path) -> None:
    """`save_pretrained` leaves tied duplicates out of the file; what we write of it predicts the same."""
    model = peer(variant).float()
    model.save_pretrained(tmp_path / "theirs")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {i}" for i in range(CLASSES)))
    found = convert_file(tmp_path / "theirs", tmp_path / "ours", str(names), UNTRACED)
    kind = {"plain": (False, False), "refine": (True, False), "two_stage": (True, True)}[variant]
    assert isinstance(found.config, DeformableDETRConfig) and (found.config.refine, found.config.two_stage) == kind
    loaded, given = load_detector(tmp_path / "ours"), batch()
    assert loaded.card.classes == tuple(f"thing {i}" for i in range(CLASSES)) and loaded.card.category_ids == (1, 2, 3, 4, 5)
    images = given.images.float()
    with torch.no_grad():
        ours = loaded.detector(images, given.padding)
        pixels = loaded.detector.normalise(images, given.padding)
        theirs = model(pixel_values=pixels, pixel_mask=(~given.padding).long())
    torch.testing.assert_close(ours.logits[-1], theirs.logits, rtol=1e-4, atol=1e-4)
