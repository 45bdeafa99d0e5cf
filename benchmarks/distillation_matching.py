"""The negatives' assignment of logits distillation at the size of DINO: 6 stages x 2 images, 900 queries of the student and the teacher.

Solvers, threads and float types on the whole problem, then a bounded number of candidates (the teacher's best by score): time of all
12 problems, the shortest training step of which that is a tenth, and how many candidates keep the partner that they have in the whole
problem, with the mean box cost of their pairs in both. Two situations: a student whose boxes have nothing to do with the teacher's
(first steps), and one whose boxes are the teacher's, shuffled and moved by 0.02 (late).
    python benchmarks/distillation_matching.py [--rounds 3]        lapx takes part where it is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from timing import seconds
from torch import Tensor

from steadydetr.equations.distill import pairwise_boxes

PROBLEMS, QUERIES, OBJECTS = 12, 900, 7
Solver = Callable[[np.ndarray], object]


def boxes(generator: torch.Generator) -> Tensor:
    """[PROBLEMS, QUERIES, 4] half of them around some objects, as two-stage detectors choose them."""
    objects = torch.rand(PROBLEMS, OBJECTS, 4, generator=generator) * torch.tensor([0.8, 0.8, 0.3, 0.3])
    objects = objects + torch.tensor([0.1, 0.1, 0.05, 0.05])
    near = objects[:, torch.arange(QUERIES) % OBJECTS] + torch.randn(PROBLEMS, QUERIES, 4, generator=generator) * 0.05
    anywhere = torch.rand(PROBLEMS, QUERIES, 4, generator=generator) * torch.tensor([1, 1, 0.3, 0.3])
    return torch.where(torch.rand(PROBLEMS, QUERIES, 1, generator=generator) < 0.5, near, anywhere).clamp(0.01, 0.99)


def moved(teacher: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(QUERIES, generator=generator)
    return (teacher[:, order] + torch.randn(teacher.shape, generator=generator) * 0.02).clamp(0.01, 0.99)


def costs(student: Tensor, teacher: Tensor) -> np.ndarray:
    l1, giou = pairwise_boxes(student, teacher)
    return (5 * l1 - 2 * giou).numpy()


def one_by_one(solver: Solver, problems: Iterable[np.ndarray]) -> None:
    for problem in problems:
        solver(problem)


def in_threads(solver: Solver, problems: Iterable[np.ndarray]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(solver, problems))


def median(run: Callable[[], object], rounds: int) -> float:
    return statistics.median(seconds(run) for _ in range(rounds))


def report(what: str, time: float, note: str = "") -> None:
    print(f"  {what:<34} {1e3 * time:9.1f} ms   a tenth of a step of {10 * time:6.2f} s   {note}")


def solvers() -> dict[str, Solver]:
    found: dict[str, Solver] = {
        "scipy, float32": linear_sum_assignment,
        "scipy, float64": lambda cost: linear_sum_assignment(cost.astype(np.float64)),
    }
    if importlib.util.find_spec("lap") is not None:
        import lap

        found["lapx, lapjv, float64"] = lambda cost: lap.lapjv(cost.astype(np.float64), return_cost=False)
        found["lapx, lapjvs, float32"] = lambda cost: lap.lapjvs(cost, return_cost=False)
    return found


def kept(cost: np.ndarray, count: int) -> tuple[float, float, float]:
    """Share of the first `count` rows that keep their partner without the others; the mean cost of their pairs with and without these."""
    same, whole, bounded = [], [], []
    for problem in cost:
        _, columns = linear_sum_assignment(problem)
        _, alone = linear_sum_assignment(problem[:count])
        rows = np.arange(count)
        same.append((columns[:count] == alone).mean())
        whole.append(problem[rows, columns[:count]].mean())
        bounded.append(problem[rows, alone].mean())
    return float(np.mean(same)), float(np.mean(whole)), float(np.mean(bounded))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    generator = torch.Generator().manual_seed(0)
    teacher = boxes(generator)
    print(f"{PROBLEMS} problems of {QUERIES} x {QUERIES}, {rounds} rounds, medians")
    for situation, student in (("early: unrelated boxes", boxes(generator)), ("late: the teacher's, moved", moved(teacher, generator))):
        cost = costs(student, teacher)
        print(situation)
        report("costs", median(partial(costs, student, teacher), rounds))
        for name, solver in solvers().items():
            report(f"all, {name}", median(partial(one_by_one, solver, cost), rounds))
        report("all, scipy, float32, threads", median(partial(in_threads, linear_sum_assignment, cost), rounds))
        for count in (600, 300, 200, 100):
            same, whole, alone = kept(cost, count)
            note = f"same partner {same:.0%}, mean box cost {alone:.3f} (in the whole {whole:.3f})"
            bounded = cost[:, :count]
            report(f"{count} candidates", median(partial(one_by_one, linear_sum_assignment, bounded), rounds), note)
            report(f"{count} candidates, threads", median(partial(in_threads, linear_sum_assignment, bounded), rounds))


if __name__ == "__main__":
    main()
