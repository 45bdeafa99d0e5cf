"""Matching of 7 stages, 16 images, 900 queries, 50 objects an image: ours against the way of the original repositories.

Theirs, stage by stage: every query of the batch against every target of the batch, the block of each image cut out, one transfer
a stage. Both sides must find the same assignment.
    python benchmarks/matching.py [--rounds 5] [--device cuda]
"""

from __future__ import annotations

import argparse

import torch
from scipy.optimize import linear_sum_assignment
from timing import paired, print_row
from torch import Tensor
from torchvision.ops import generalized_box_iou

from steadydetr.boxes import to_xyxy
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import solve
from steadydetr.structures import Stages, Targets

STAGES, IMAGES, QUERIES, OBJECTS, CLASSES = 7, 16, 900, 50, 80


def per_stage(stages: Stages, targets: Targets) -> list[Tensor]:
    """Folded query of every target, stage by stage."""
    chosen = []
    for logits, boxes in zip(stages.logits, stages.boxes, strict=True):
        p, flat = logits.flatten(0, 1).sigmoid(), boxes.flatten(0, 1)
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        label = positive[:, targets.labels] - negative[:, targets.labels]
        l1 = torch.cdist(flat, targets.boxes, p=1)
        giou = generalized_box_iou(to_xyxy(flat), to_xyxy(targets.boxes))
        cost = (2 * label + 5 * l1 - 2 * giou).view(IMAGES, QUERIES, -1).cpu()
        for image, block in enumerate(cost.split(targets.counts, -1)):
            queries, objects = linear_sum_assignment(block[image])
            found = torch.empty(len(objects), dtype=torch.int64)
            found[torch.as_tensor(objects)] = torch.as_tensor(queries)
            chosen.append(found)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape: int) -> Tensor:
        return torch.cat((torch.rand(*shape, 2, generator=generator), torch.rand(*shape, 2, generator=generator) * 0.3 + 0.02), -1)

    objects = IMAGES * OBJECTS
    labels = torch.randint(CLASSES, (objects,), generator=generator)
    targets = Targets(labels, boxes(objects), (OBJECTS,) * IMAGES).to(arguments.device)
    logits = torch.randn(STAGES, IMAGES, QUERIES, CLASSES, generator=generator)
    stages = Stages(logits.to(arguments.device), boxes(STAGES, IMAGES, QUERIES).to(arguments.device))
    criterion = Criterion()
    ours = solve([criterion.problem(stages, targets, "main")])[0].match.query.cpu()
    same = torch.equal(ours, torch.cat(per_stage(stages, targets)))
    print(f"torch {torch.__version__}, {arguments.device}, 2 threads, {arguments.rounds} paired rounds, medians; same assignment: {same}")
    row = paired(lambda: solve([criterion.problem(stages, targets, "main")]), lambda: per_stage(stages, targets), arguments.rounds)
    print_row("matching, 7 stages x 16 images x 900 x 50", *row)


if __name__ == "__main__":
    main()
