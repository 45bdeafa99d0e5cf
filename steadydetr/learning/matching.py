"""Assignment of targets to queries: costs only within an image, all problems of a step in one transfer to the host.

Legend: R problem rows (one per stage and object, stage by stage), N queries, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from steadydetr.boxes import area, iou_giou, to_xyxy
from steadydetr.structures import Match, MatchResult, Stages, Targets

FORBIDDEN = 1e9  # finite, because the solver rejects a block whose every entry is infinite
LARGE = 2**16  # entries of a block, from which threads pay: the solver then takes longer than a thread to start


@dataclass(frozen=True)
class PairwiseTerms:
    """Every target against the queries of its own image, nothing else."""

    logits: Tensor  # [R, N] of the target's class
    l1: Tensor  # [R, N]
    giou: Tensor  # [R, N]
    iou: Tensor  # [R, N]
    image: Tensor  # [R] folded: stage * B + image
    images: int  # S * B
    valid: Tensor | None  # [R, N] bool, None: all queries are


def pairwise_terms(stages: Stages, targets: Targets, giou_eps: float = 0.0) -> PairwiseTerms:
    """`targets` are those of one batch; every stage is matched with them."""
    logits, boxes = stages.flat
    folded = targets.repeat_batch(len(stages.logits))
    image = folded.image
    l1 = (_rows(boxes, image) - folded.boxes[:, None]).abs().sum(-1)
    iou, giou = iou_giou(_rows(to_xyxy(boxes), image), to_xyxy(folded.boxes)[:, None], giou_eps)
    valid = None if stages.flat_valid is None else stages.flat_valid[image]
    return PairwiseTerms(logits.transpose(1, 2)[image, folded.labels], l1, giou, iou, image, len(folded.counts), valid)


def _rows(boxes: Tensor, image: Tensor) -> Tensor:
    """[S*B, N, 4] -> [R, N, 4], in memory one coordinate after the other: inner loops run over N numbers, not over 4."""
    return boxes.movedim(-1, 0).contiguous()[:, image].movedim(0, -1)


@dataclass(frozen=True)
class Problem:
    """One-to-one assignment of every folded image's targets (rows) to its queries."""

    cost: Tensor  # [R, N]
    counts: tuple[int, ...]  # rows of each folded image, in order
    name: str = "main"  # for the error message
    after: str | None = None  # an earlier problem of the same images: the queries that it matches are forbidden here

    @staticmethod
    def of(cost: Tensor, terms: PairwiseTerms, counts: tuple[int, ...], name: str) -> Problem:
        """Queries that are not valid cost more than any that is, whatever their garbage predicts."""
        return Problem(cost if terms.valid is None else torch.where(terms.valid, cost, FORBIDDEN), counts, name)


def solve(problems: Sequence[Problem]) -> list[MatchResult]:
    """Solve all problems of a step with one fetch to the host and one transfer back.

    Raises FloatingPointError, naming the problem, where a cost is not finite.
    """
    if not problems:
        return []
    device = problems[0].cost.device
    fetched = torch.cat([problem.cost.detach().flatten() for problem in problems]).cpu().numpy()
    sizes = [problem.cost.numel() for problem in problems]
    blocks = [fetched[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]
    pairs: list[np.ndarray] = []
    for block, problem in zip(blocks, problems, strict=True):
        before = [found for found, earlier in zip(pairs, problems, strict=False) if earlier.name == problem.after]
        pairs.append(_solve(block.reshape(problem.cost.shape), problem, *before))
    sent = torch.from_numpy(np.concatenate(pairs, axis=1)).to(device, non_blocking=True)
    split = sent.split([p.shape[1] for p in pairs], dim=1)
    return [MatchResult(Match(*found), problem.cost.detach()) for found, problem in zip(split, problems, strict=True)]


def _solve(cost: np.ndarray, problem: Problem, before: np.ndarray | None = None) -> np.ndarray:
    """[3, P] int64: folded image, query, folded target of every pair. `before`: the pairs of the problem that this one is after."""
    if not np.isfinite(cost).all():
        raise FloatingPointError(
            f"the matching cost of {problem.name!r} is not finite: the predictions are, or a target is, NaN or infinite"
        )
    image = np.repeat(np.arange(len(problem.counts)), problem.counts)
    if before is not None:
        taken = np.zeros((len(problem.counts), cost.shape[1]), dtype=bool)
        taken[before[0], before[1]] = True
        cost = np.where(taken[image], FORBIDDEN, cost)
    blocks = [cost[start:stop] for start, stop in pairwise(accumulate(problem.counts, initial=0))]
    if max((block.size for block in blocks), default=0) < LARGE:
        chosen = [_assign(block) for block in blocks]
    else:
        with ThreadPoolExecutor() as pool:  # the solver lets go of the interpreter's lock
            chosen = list(pool.map(_assign, blocks))
    columns, target = np.concatenate([np.zeros(0, dtype=np.int64), *chosen]), np.arange(len(cost))
    matched = (columns >= 0) & (cost[target, columns] < FORBIDDEN / 2) if len(cost) else columns >= 0
    return np.stack((image, columns, target))[:, matched]


def _assign(cost: np.ndarray) -> np.ndarray:
    """The column of every row, -1: none. Rows that are forbidden as a whole take no part: where rows outnumber columns, nothing else
    keeps them from taking one."""
    columns = np.full(len(cost), -1, dtype=np.int64)
    possible = np.flatnonzero(cost.min(1) < FORBIDDEN / 2)
    if len(possible):
        rows, chosen = linear_sum_assignment(cost if len(possible) == len(cost) else cost[possible])
        columns[possible[rows]] = chosen
    return columns


def query_of_targets(match: Match, rows: int) -> Tensor:
    """[R] the query matched to every target, -1: none."""
    query = match.query.new_full((rows,), -1)
    query[match.target] = match.query
    return query


def cheapest_queries(cost: Tensor, image: Tensor, images: int, count: int, most: int) -> tuple[Tensor, Tensor]:
    """The union over an image's targets of the `count` cheapest queries of each, without repeats, in the order of their numbers.

    Args:
        cost: [R, N].
        image: [R].
        most: the largest such union that is kept room for, K.

    Returns:
        queries [images, K], and whether each is one or only fills up, [images, K] bool.
    """
    queries = cost.shape[1]
    chosen = torch.zeros(images, queries, dtype=torch.bool, device=cost.device)
    if len(cost):
        best = cost.topk(min(count, queries), largest=False).indices
        chosen[image[:, None].expand_as(best), best] = True
    order = chosen.byte().sort(descending=True, stable=True).indices[:, :most]
    return order, chosen.gather(1, order)


def largest_iou(stages: Stages, targets: Targets, eps: float = 0.0) -> Tensor:
    """[S * B] the largest IoU over every valid query and target of an image at a stage, 0 where there is no target."""
    folded = targets.repeat_batch(len(stages.logits))
    image = folded.image
    iou, _ = iou_giou(_rows(to_xyxy(stages.flat[1]), image), to_xyxy(folded.boxes)[:, None], eps)
    if stages.flat_valid is not None:
        iou = torch.where(stages.flat_valid[image], iou, 0)
    best = iou.new_zeros(len(folded.counts))
    return best.scatter_reduce(0, image, iou.amax(1), "amax") if iou.numel() else best


def paired_iou(predicted: Tensor, target: Tensor, eps: float = 0.0) -> Tensor:
    """IoU of cxcywh boxes row by row, [P, 4] -> [P], 0 where both boxes have no area."""
    predicted_xyxy, target_xyxy = to_xyxy(predicted), to_xyxy(target)
    iou, _ = iou_giou(predicted_xyxy, target_xyxy, eps)
    return torch.where(area(predicted_xyxy) + area(target_xyxy) > 0, iou, 0)
