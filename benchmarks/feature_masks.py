"""What the masks of target-aware feature distillation count: how much in all, and how much more on objects than beside them.

Eq. 6 against Eq. 8 of DETRDistill, per stride, mean over validation images. lambda_2 multiplies the first number; FitNet's is 1.
    python benchmarks/feature_masks.py [--teacher CHECKPOINT] [--data shapes:size=64,most=4,images=300] [--images 100]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from steadydetr.boxes import to_xyxy
from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.checkpoints.folder import load_detector
from steadydetr.data import DataConfig, open_data
from steadydetr.drawing.example_images import first_objects
from steadydetr.learning.criterion import Criterion
from steadydetr.metrics.feature_masks import view_of_teacher
from steadydetr.objectives import FeatureDistillation
from steadydetr.recipes import find
from steadydetr.runs.folder import run_criterion
from steadydetr.structures import Batch

MASKS = {"Eq. 8, by quality": FeatureDistillation(), "Eq. 6, plain mean": FeatureDistillation(mask="mean")}


def on_objects(batch: Batch, height: int, width: int) -> Tensor:
    """[h * w] bool: the cell's middle lies in a box."""
    y, x = ((torch.arange(count) + 0.5) / count for count in (height, width))
    left, top, right, bottom = to_xyxy(batch.targets.boxes).T[..., None, None]
    return ((x > left) & (x < right) & (y[:, None] > top) & (y[:, None] < bottom)).any(0).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a run or checkpoint; an untrained small teacher if not given")
    parser.add_argument("--data", default="shapes:size=64,most=4,images=300")
    parser.add_argument("--images", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.teacher:
        loaded = load_detector(arguments.teacher)
        detector, criterion = loaded.detector, run_criterion(find_checkpoint(arguments.teacher))
        config = DataConfig(resize=loaded.card.resize, workers=0)
    else:
        recipe = find("small-teacher-deformable-detr")
        detector, criterion, config = recipe.detector.build(6).eval(), Criterion(), recipe.data
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _, batch, _ in first_objects(open_data(arguments.data, "val"), config, arguments.images):
        seen = view_of_teacher(detector, criterion, batch)
        quality = seen.quality[None] / len(seen.quality)
        parts = seen.memory.tokens.split([h * w for h, w in seen.memory.levels], 1)
        for stride, tokens, size in zip(detector.strides, parts, seen.memory.levels, strict=True):
            inside = on_objects(batch, *size)
            for name, objective in MASKS.items():
                mask = objective._mask(tokens, seen.queries[None], quality)[0]
                ratio = float(mask[inside].mean() / mask[~inside].mean())  # not a number where all cells are of one kind
                found.setdefault((name, stride), []).append((float(mask.mean()), ratio))
    for (name, stride), values in sorted(found.items()):
        mean, ratios = torch.tensor(values).T
        print(f"{name}, stride {stride}: mean {mean.mean():.2f}, on objects {ratios.nanmedian():.2f} of what is beside them (median)")


if __name__ == "__main__":
    main()
