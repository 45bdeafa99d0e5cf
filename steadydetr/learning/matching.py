"""Assignment of targets to queries: costs only within an image, all problems of a step in one transfer to the host."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from steadydetr.boxes import area, iou_giou, to_xyxy
from steadydetr.config import check_within
from steadydetr.equations.detection import L1Format
from steadydetr.finite import NotFiniteError, images_named
from steadydetr.kinds import register
from steadydetr.lazy import np, optimize, torch
from steadydetr.structures import Batch, Match, MatchResult, Stages, Targets

if TYPE_CHECKING:
    from torch import Tensor

FORBIDDEN = 1e9  # the cost of pairs that must not be; finite, because the solver refuses problems without any finite entry
LARGE = 2**16  # entries of one image's problem from which on threads are used; smaller ones are solved before a thread has started


@dataclass(frozen=True)
class PairwiseTerms:
    """What a cost is made of: every target against the queries of its own image, and no other image's."""

    logits: Tensor  # [R, N] of the target's class
    l1: Tensor  # [R, N]
    giou: Tensor  # [R, N]
    iou: Tensor  # [R, N]
    image: Tensor  # [R] folded: stage * B + image
    images: int  # F
    valid: Tensor | None  # [R, N] bool, None: all queries are


def pairwise_terms(stages: Stages, targets: Targets, giou_eps: float = 0.0, l1_format: L1Format = "cxcywh") -> PairwiseTerms:
    """The terms of every stage with `targets`, which are those of one batch."""
    logits, boxes = stages.flat
    folded = targets.repeat_batch(len(stages.logits))
    image = folded.image
    corners, targets_xyxy = _rows(to_xyxy(boxes), image), to_xyxy(folded.boxes)[:, None]
    l1 = (corners - targets_xyxy if l1_format == "xyxy" else _rows(boxes, image) - folded.boxes[:, None]).abs().sum(-1)
    iou, giou = iou_giou(corners, targets_xyxy, giou_eps)
    valid = None if stages.flat_valid is None else stages.flat_valid[image]
    return PairwiseTerms(logits.transpose(1, 2)[image, folded.labels], l1, giou, iou, image, len(folded.counts), valid)


def _rows(boxes: Tensor, image: Tensor) -> Tensor:
    """The boxes of each row's image, [F, N, 4] -> [R, N, 4]. In memory the coordinate comes first, so that inner loops run over N."""
    return boxes.movedim(-1, 0).contiguous()[:, image].movedim(0, -1)


@register("mixed-matching", "mixed")
@dataclass(frozen=True)
class MixedMatching:
    """Several queries learn a target at all stages but the last and of the encoder's proposals (Align-DETR). Defaults: its paper's.

    Their class targets and box losses weigh exp(-rank / tau), the best of a target having rank 0. It is a rule of what learns: queries
    of other groups, teachers, and what measures stability are matched one to one, by the same cost (D-177).
    """

    queries: int = 2  # of each target, k; fewer where they would be more than half of the queries  # D-176
    tau: float = 1.5  # the larger, the more the other queries learn

    def __post_init__(self) -> None:
        check_within("criterion.matching", self, queries=(1, 1000), tau=(1e-3, 1e6))

    def of_stages(self, stages: int, last: bool) -> tuple[int, ...]:
        """Queries of a target at each of so many stages, of which the decoder's last one may be the last."""
        return (self.queries,) * (stages - 1) + (1 if last else self.queries,)


@dataclass(frozen=True)
class Problem:
    """An assignment to be found in every folded image: of its targets, which are the rows, to its queries, one to one or one to several."""

    cost: Tensor  # [R, N]
    counts: tuple[int, ...]  # rows of each folded image, in order
    name: str = "main"  # for the error message
    after: str | None = None  # the name of an earlier problem of the same images, whose matched queries are forbidden in this one
    queries: tuple[int, ...] = ()  # that every target is to get, in each folded image; empty: one
    at_most_half: bool = False  # of an image's queries are matched: targets get fewer, but one each (D-176)

    @staticmethod
    def of(cost: Tensor, terms: PairwiseTerms, counts: tuple[int, ...], name: str) -> Problem:
        """The problem with these costs, in which queries that are not valid are forbidden, whatever they predict."""
        return Problem(cost if terms.valid is None else torch.where(terms.valid, cost, FORBIDDEN), counts, name)


def solve(problems: Sequence[Problem], batch: Batch | None = None) -> list[MatchResult]:
    """Solve all problems of a step with one fetch to the host and one transfer back.

    Args:
        batch: whose images the problems are of, for the error.

    Raises:
        NotFiniteError: a cost is not finite; names the problem and the images.
    """
    if not problems:
        return []
    device = problems[0].cost.device
    fetched = torch.cat([problem.cost.detach().flatten() for problem in problems]).cpu().numpy()
    sizes = [problem.cost.numel() for problem in problems]
    blocks = [fetched[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]
    pairs: list[np.ndarray] = []
    for block, problem in zip(blocks, problems, strict=True):
        _check_finite(block.reshape(problem.cost.shape), problem, batch)
        before = [found for found, earlier in zip(pairs, problems, strict=False) if earlier.name == problem.after]
        pairs.append(_solve(block.reshape(problem.cost.shape), problem, *before))
    sent = torch.from_numpy(np.concatenate(pairs, axis=1)).to(device, non_blocking=True)
    split = sent.split([p.shape[1] for p in pairs], dim=1)
    counts = [tuple(np.bincount(p[0], minlength=len(problem.counts)).tolist()) for p, problem in zip(pairs, problems, strict=True)]
    solved = zip(split, counts, problems, strict=True)
    return [MatchResult(Match(i, q, t, counts=count), problem.cost.detach()) for (i, q, t), count, problem in solved]


def _check_finite(cost: np.ndarray, problem: Problem, batch: Batch | None) -> None:
    """Raise NotFiniteError if a cost, [R, N], is NaN or infinite."""
    if np.isfinite(cost).all():
        return
    folded = np.repeat(np.arange(len(problem.counts)), problem.counts)[~np.isfinite(cost).all(1)]
    of = ""
    if batch is not None:
        of = f" for {images_named({batch.image_ids[image % len(batch.image_ids)] for image in folded})}"
    raise NotFiniteError(f"the matching cost of {problem.name!r} is not finite{of}", batch)


def _solve(cost: np.ndarray, problem: Problem, before: np.ndarray | None = None) -> np.ndarray:
    """Folded image, query and folded target of every pair, [3, P] int64. `before` are the pairs of the problem named by `after`."""
    image = np.repeat(np.arange(len(problem.counts)), problem.counts)
    if before is not None:
        taken = np.zeros((len(problem.counts), cost.shape[1]), dtype=bool)
        taken[before[0], before[1]] = True
        cost = np.where(taken[image], FORBIDDEN, cost)
    starts = list(accumulate(problem.counts, initial=0))
    blocks = [cost[start:stop] for start, stop in pairwise(starts)]
    queries: Sequence[int] = problem.queries or (1,) * len(blocks)
    if problem.at_most_half:
        queries = list(map(queries_of_a_row, blocks, queries))
    if all(block.size * number < LARGE for block, number in zip(blocks, queries, strict=True)):
        chosen = list(map(_pairs, blocks, queries))
    else:
        from steadydetr.data.loading_processes import cpu_share

        with ThreadPoolExecutor(cpu_share()) as pool:  # the solver releases the interpreter's lock
            chosen = list(pool.map(_pairs, blocks, queries))
    columns = np.concatenate([np.zeros(0, dtype=np.int64), *(found for _, found in chosen)])
    target = np.concatenate([np.zeros(0, dtype=np.int64), *(row + start for (row, _), start in zip(chosen, starts, strict=False))])
    return np.stack((image[target], columns, target))


def _pairs(cost: np.ndarray, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every pair, by rows and then by columns: that of as many equal rows for each as it is to get queries."""
    columns = np.sort(_assign(cost.repeat(queries, 0) if queries > 1 else cost).reshape(-1, queries)).ravel()
    rows = np.arange(len(cost)).repeat(queries)
    matched = (columns >= 0) & (cost[rows, columns] < FORBIDDEN / 2)
    return rows[matched], columns[matched]


def queries_of_a_row(cost: np.ndarray, most: int) -> int:
    """How many queries each target of an image gets: of all that may be matched at most half are, but every target gets one (D-176)."""
    if most == 1 or not len(cost):
        return 1
    queries = int((cost.min(0) < FORBIDDEN / 2).sum())
    return max(min(most, queries // (2 * len(cost))), 1)


def _assign(cost: np.ndarray) -> np.ndarray:
    """The column of every row, -1: none.

    Rows in which everything is forbidden are left out: where there are more rows than columns, they could otherwise take a column from
    a row that may have it.
    """
    columns = np.full(len(cost), -1, dtype=np.int64)
    possible = np.flatnonzero(cost.min(1) < FORBIDDEN / 2)
    if len(possible):
        rows, chosen = optimize.linear_sum_assignment(cost if len(possible) == len(cost) else cost[possible])
        columns[possible[rows]] = chosen
    return columns


def cheapest_queries(cost: Tensor, image: Tensor, images: int, count: int, most: int) -> tuple[Tensor, Tensor]:
    """The union over an image's targets of the `count` cheapest queries of each, without repeats, in the order of their numbers.

    Args:
        cost: [R, N].
        image: [R].
        most: slots for them in every image, K.

    Returns:
        queries [images, K], and which slots hold one, [images, K] bool; the others are filled up.
    """
    queries = cost.shape[1]
    chosen = torch.zeros(images, queries, dtype=torch.bool, device=cost.device)
    if len(cost):
        best = cost.topk(min(count, queries), largest=False).indices
        chosen[image[:, None].expand_as(best), best] = True
    order = chosen.byte().sort(descending=True, stable=True).indices[:, :most]
    return order, chosen.gather(1, order)


def largest_iou(stages: Stages, targets: Targets, eps: float) -> Tensor:
    """[F] the largest IoU over every valid query and target of an image at a stage, 0 where there is no target."""
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
