"""Live against the transformers package: random tiny models of theirs, converted, give the same predictions and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.boxes import to_cxcywh
from steadydetr.convert import Untraced, convert_state_dict, load_foreign
from steadydetr.criterion import Criterion, Weights
from steadydetr.detectors import DeformableDETR, DeformableDETRConfig
from steadydetr.method import Method
from steadydetr.objectives import Detection
from steadydetr.structures import Batch, Targets

transformers = pytest.importorskip("transformers")

VARIANTS = {"plain": {}, "refine": {"with_box_refine": True}, "two_stage": {"with_box_refine": True, "two_stage": True}}
SIZES = ((96, 128), (80, 112))  # one image fills the batch, one does not
CLASSES, QUERIES = 5, 12
UNTRACED = Untraced(heads=4, queries=QUERIES)
# float64 on both sides, but our geometry (grids, valid ratios) is float32, theirs is not
EXACT = {"rtol": 1e-6, "atol": 1e-6}


def peer(variant: str) -> Any:
    """Their detector with random parameters and random statistics of its batch norms, in float64."""
    torch.manual_seed(3)
    backbone = transformers.TimmBackboneConfig(backbone="resnet18", out_indices=[2, 3, 4], use_pretrained_backbone=False)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_n_points": 2, "decoder_n_points": 3}
    dropout = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0)
    options = sizes | heads | dropout | VARIANTS[variant] | {"two_stage_num_proposals": QUERIES}
    config = transformers.DeformableDetrConfig(
        num_queries=QUERIES, num_labels=CLASSES, backbone_config=backbone, auxiliary_loss=True, **options
    )
    model = transformers.DeformableDetrForObjectDetection(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) * 0.3)
    return model


def converted(model: Any) -> DeformableDETR:
    found = convert_state_dict(model.state_dict(), untraced=UNTRACED)
    detector = found.config.build(found.num_classes)
    missing, unexpected = detector.load_state_dict(found.state, strict=False)
    assert not unexpected and not [key for key in missing if not key.endswith("num_batches_tracked")]
    assert isinstance(detector, DeformableDETR)
    detector.config_of_file = found.config  # type: ignore[assignment]
    return detector.double().eval()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, 96, 128, generator=generator, dtype=torch.float64)
    padding = torch.ones(2, 96, 128, dtype=torch.bool)
    for i, (height, width) in enumerate(SIZES):
        padding[i, :height, :width] = False
    low = torch.rand(5, 2, generator=generator, dtype=torch.float64) * 0.5
    boxes = to_cxcywh(torch.cat((low, low + 0.1 + torch.rand(5, 2, generator=generator, dtype=torch.float64) * 0.35), -1))
    targets = Targets(torch.tensor([0, 3, 3, 1, 4]), boxes, (4, 1))
    return Batch(images, padding, targets, (1, 2), SIZES, SIZES)


def ask(model: Any, given: Batch, pixels: Tensor) -> Any:
    labels = [{"class_labels": part.labels, "boxes": part.boxes} for part in given.targets.split()]
    return model(pixel_values=pixels, pixel_mask=(~given.padding).long(), labels=labels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_predictions_and_losses(variant: str) -> None:
    model, given = peer(variant), batch()
    detector = converted(model)
    theirs = ask(model, given, detector.normalise(given.images, given.padding))
    stages = detector(given.images, given.padding)
    stage_outputs = [*theirs.auxiliary_outputs, {"logits": theirs.logits, "pred_boxes": theirs.pred_boxes}]
    torch.testing.assert_close(stages.logits, torch.stack([output["logits"] for output in stage_outputs]), **EXACT)
    torch.testing.assert_close(stages.boxes, torch.stack([output["pred_boxes"] for output in stage_outputs]), **EXACT)

    c = model.config
    weights = Weights(1.0, c.bbox_loss_coefficient, c.giou_loss_coefficient)
    criterion = Criterion(cost_weights=Weights(c.class_cost, c.bbox_cost, c.giou_cost), loss_weights=weights)
    losses = Method(detector, criterion, (Detection(),))(given)
    for ours, name in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        expected = [theirs.loss_dict[f"{name}_{stage}"] for stage in range(c.decoder_layers - 1)] + [theirs.loss_dict[name]]
        torch.testing.assert_close(losses[f"main/{ours}"], torch.stack(expected), **EXACT)
    # their total leaves the encoder's proposals out
    total = sum(values.sum() * weight for name, values, weight in losses if name.startswith("main/"))
    torch.testing.assert_close(total, theirs.loss, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_gradients(variant: str) -> None:
    """Of the summed detection loss, for every parameter that theirs trains: the backward pass and the converter's names agree."""
    model, given = peer(variant), batch()
    detector = converted(model)
    ask(model, given, detector.normalise(given.images, given.padding)).loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    state = {key: gradients.get(key, value) for key, value in model.state_dict().items()}
    expected = convert_state_dict(tied(model, state), detector.config_of_file).state  # type: ignore[arg-type]

    c = model.config
    weights = Weights(1.0, c.bbox_loss_coefficient, c.giou_loss_coefficient)
    criterion = Criterion(cost_weights=Weights(c.class_cost, c.bbox_cost, c.giou_cost), loss_weights=weights)
    losses = Method(detector, criterion, (Detection(),))(given)
    sum(values.sum() * weight for name, values, weight in losses if name.startswith("main/")).backward()  # type: ignore[union-attr]
    gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in detector.named_parameters() if p.requires_grad}
    if variant == "refine":  # theirs has one class head for all stages, which gets the sum
        for kind in ("weight", "bias"):
            heads = [name for name in gradient if name.startswith("decoder.class_heads.") and name.endswith(kind)]
            gradient |= dict.fromkeys(heads, torch.stack([gradient[name] for name in heads]).sum(0))
    for name, ours in gradient.items():
        torch.testing.assert_close(ours, expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def tied(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict names a shared tensor several times, `named_parameters` once."""
    first: dict[int, str] = {}
    parameters = model.state_dict(keep_vars=True)
    for key, value in model.named_parameters():
        first.setdefault(id(value), key)
    return {key: state[first.get(id(parameters[key]), key)] for key in state}


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_that_they_save(variant: str, tmp_path) -> None:
    """`save_pretrained` leaves tied duplicates out of the file."""
    model = peer(variant)
    model.save_pretrained(tmp_path)
    found = convert_state_dict(load_foreign(tmp_path / "model.safetensors"), untraced=UNTRACED)
    kind = {"plain": (False, False), "refine": (True, False), "two_stage": (True, True)}[variant]
    assert isinstance(found.config, DeformableDETRConfig) and (found.config.refine, found.config.two_stage) == kind
    whole = convert_state_dict(model.state_dict(), untraced=UNTRACED)
    assert found.state.keys() == whole.state.keys()
    assert all(torch.equal(found.state[key], whole.state[key]) for key in found.state)
