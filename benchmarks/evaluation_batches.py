"""Evaluation in batches of one size, which pads nothing, against padded batches in the order of the data and against single images.

python benchmarks/evaluation_batches.py [--data ../shared/data/coco128] [--split val] [--rounds 2] [--batch 4] [--shortest 320]

Deformable DETR with two stages on a ResNet-18 of random weights; images are loaded before.
"""

from __future__ import annotations

import argparse

import torch
from timing import paired, print_row

from steadydetr.data import DataConfig, EvalLoader, open_data
from steadydetr.data.loading import Samples
from steadydetr.data.transforms import ShortestSide
from steadydetr.detectors import DeformableDETRConfig
from steadydetr.metrics.evaluation import prediction_function
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.structures import Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/coco128")
    parser.add_argument("--split", default="val")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--shortest", type=int, default=320)
    options = parser.parse_args()
    data = open_data(options.data, options.split)
    config = DataConfig(resize=ShortestSide(options.shortest, options.shortest * 5 // 3), workers=0)
    torch.manual_seed(0)
    backbone = TimmBackboneConfig("resnet18", weights="none")
    detector = DeformableDETRConfig(backbone, refine=True, two_stage=True).build(len(data.index.classes)).eval()
    predict = prediction_function(detector, "cpu")

    samples, order = Samples(data, config.resize), range(len(data.index))
    padded = [samples.batch([(p, 0) for p in order[i : i + options.batch]]) for i in order[:: options.batch]]
    same, single = (list(EvalLoader(data, config, size)) for size in (options.batch, 1))

    def run(batches: list[Batch]) -> None:
        for batch in batches:
            predict(batch)

    share = sum(batch.padding.sum().item() for batch in padded) / sum(batch.padding.numel() for batch in padded)
    print(f"{len(data.index)} images in {len(same)} batches of one size, in {len(padded)} padded ones ({share:.0%} padding), or one by one")
    print_row("evaluation, against padded batches", *paired(lambda: run(same), lambda: run(padded), options.rounds, warmup=0))
    print_row("evaluation, against single images", *paired(lambda: run(same), lambda: run(single), options.rounds, warmup=0))


if __name__ == "__main__":
    main()
