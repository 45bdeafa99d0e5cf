"""The small parts around the solver, by hand."""

from __future__ import annotations

import torch

from steadydetr.learning.matching import cheapest_queries
from steadydetr.structures import Match, MatchedQueries, Targets


def test_objects_without_a_query_have_minus_one() -> None:
    targets = Targets(torch.zeros(4, dtype=torch.int64), torch.rand(4, 4), (4,))
    match = Match(torch.tensor([0, 0]), torch.tensor([4, 1]), torch.tensor([2, 0]))
    assert MatchedQueries.of(match, targets, 1).query.tolist() == [[1, -1, 4, -1]]
    nothing = torch.zeros(0, dtype=torch.int64)
    assert MatchedQueries.of(Match(nothing, nothing, nothing), targets, 2).query.tolist() == [[-1] * 4] * 2


def test_cheapest_queries_by_hand() -> None:
    """Image 0: two targets that share query 3; image 1: one target; image 2: none. As many places as asked for, in order of number."""
    cost = torch.tensor([[9.0, 1, 8, 0], [2, 9, 8, 1], [5, 6, 0, 1]])
    image = torch.tensor([0, 0, 1])
    queries, real = cheapest_queries(cost, image, 3, 2, 3)
    assert queries.shape == real.shape == (3, 3) and real.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert queries[0].tolist() == [0, 1, 3] and queries[1, :2].tolist() == [2, 3]
    queries, real = cheapest_queries(cost, image, 3, 2, 2)
    assert queries[0].tolist() == [0, 1] and real[:2].all() and not real[2].any()
    assert cheapest_queries(cost, image, 3, 9, 4)[1][:2].all()  # more than there are
    assert not cheapest_queries(cost[:0], image[:0], 2, 2, 3)[1].any()
