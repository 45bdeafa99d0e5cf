"""Training step and inference of Deformable DETR R50 two-stage with refinement against the `transformers` package.

CPU, 2 threads, one image of 512 x 512, float32, equal sizes and losses (auxiliary and encoder losses on both sides).
    python benchmarks/step.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from timing import paired, print_row

from steadydetr.detectors import DeformableDETRConfig, TransformerConfig
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.objectives import SetPrediction
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Targets

CLASSES, SIZE = 80, 512


def our_side(batch: Batch) -> Method:
    backbone = TimmBackboneConfig("resnet50.tv_in1k", weights="none", frozen_stages=1)
    config = DeformableDETRConfig(backbone, TransformerConfig(dropout=0.0), queries=300, refine=True, two_stage=True)
    return Method(config.build(CLASSES), Criterion(loss_weights=Weights(2.0, 5.0, 2.0)), (SetPrediction(),))


def peer_side() -> torch.nn.Module:
    backbone = transformers.TimmBackboneConfig(backbone="resnet50", out_indices=[2, 3, 4], use_pretrained_backbone=False)
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        with_box_refine=True,
        two_stage=True,
        num_labels=CLASSES,
        auxiliary_loss=True,
        dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
    )
    model = transformers.DeformableDetrForObjectDetection(config)
    for name, parameter in model.named_parameters():  # the same frozen part as ours
        if (
            "backbone" in name
            and any(part in name for part in (".conv1.", ".bn1.", ".layer1."))
            and ".layer" not in name.replace(".layer1.", "")
        ):
            parameter.requires_grad_(False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    torch.manual_seed(0)
    targets = Targets(torch.randint(CLASSES, (7,)), torch.rand(7, 4) * 0.3 + 0.3, (7,))
    images, padding = torch.rand(1, 3, SIZE, SIZE), torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    batch = Batch(images, padding, targets, (0,), ((SIZE, SIZE),))
    ours, peer = our_side(batch), peer_side()
    labels = [{"class_labels": targets.labels, "boxes": targets.boxes}]

    def our_step() -> None:
        ours.zero_grad(set_to_none=True)
        ours(batch).total.backward()

    def peer_step() -> None:
        peer.zero_grad(set_to_none=True)
        peer(images, (~padding).long(), labels=labels).loss.backward()

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, 2 threads, float32, {rounds} paired rounds, medians")
    print_row("training step (forward, loss, backward)", *paired(our_step, peer_step, rounds))
    ours.eval(), peer.eval()
    with torch.no_grad():
        print_row("inference", *paired(lambda: ours.student(images, padding), lambda: peer(images, (~padding).long()), rounds))


if __name__ == "__main__":
    main()
