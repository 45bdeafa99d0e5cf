"""Groups in one decoder pass: the same as separate passes, blind to what is invalid, the same folded or stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steadydetr.detectors import DetectorConfig
from steadydetr.detectors.query_groups import join_groups
from steadydetr.structures import Assignment, Losses, Memory, Queries, QueryGroup, Stages
from tests.conftest import DETECTORS, make_batch, make_method


def extra_group(main: Queries, rows: int, name: str, seed: int, sees: tuple[str, ...] = ()) -> QueryGroup:
    """Queries of the kind that the detector's own are."""
    generator = torch.Generator().manual_seed(seed)
    images, _, width = main.content.shape
    content = torch.randn(images, rows, width, generator=generator, dtype=main.content.dtype)
    reference = torch.rand(images, rows, 4, generator=generator, dtype=main.content.dtype) * 0.5 + 0.2
    position = None if main.position is None else torch.randn(images, rows, width, generator=generator, dtype=main.content.dtype)
    return QueryGroup(name, Queries(content, reference, sized=main.sized, position=position), sees=sees)


def gradient(parameters: Sequence[Tensor], stages: Sequence[Stages]) -> list[Tensor]:
    total = sum((s.logits.square().sum() + s.boxes.square().sum() for s in stages), torch.zeros(()))
    return [g if g is not None else torch.zeros(()) for g in torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)]


def encoded(config: DetectorConfig) -> tuple[torch.nn.Module, Memory, Queries]:
    detector = make_method(config).double().student
    batch = make_batch((2, 3))
    memory = detector.encode(batch.images.double(), batch.padding)
    return detector, memory, detector.queries(memory)["main"]


def assert_same(a: Stages, b: Stages) -> None:
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=5e-7)
    torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", ["refine", "dab"])
@pytest.mark.parametrize("share", [False, True])
def test_boxes_start_equally_small_at_every_stage(name: str, share: bool) -> None:
    """A box head of all stages must not shrink the box at each of them."""
    torch.manual_seed(0)
    config = DETECTORS[name]
    transformer = replace(config.transformer, share_decoder=share, decoder_layers=4)
    detector, batch = replace(config, transformer=transformer).build(5).eval(), make_batch((2, 3))  # type: ignore[arg-type]
    sides = detector(batch.images, batch.padding).boxes[..., 2:]
    torch.testing.assert_close(sides, sides[:1].expand_as(sides), rtol=1e-4, atol=0)
    assert 0.1 < float(sides.detach().mean()) < 0.25
    if name == "refine":
        torch.testing.assert_close(sides, torch.full_like(sides, 0.119203), rtol=1e-5, atol=0)  # sigmoid(-2)


def test_one_pass_equals_separate_passes(detector_config: DetectorConfig) -> None:
    detector, memory, main = encoded(detector_config)
    groups = [QueryGroup("main", main), extra_group(main, 5, "a", 1), extra_group(main, 3, "b", 2)]
    together = detector.decode(memory, groups)
    alone = [detector.decode(memory, [group])[group.name] for group in groups]
    for group, stages in zip(groups, alone, strict=True):
        assert_same(together[group.name], stages)
    parameters = [p for p in detector.parameters() if p.requires_grad]
    for a, b in zip(gradient(parameters, list(together.values())), gradient(parameters, alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=5e-7)


def test_a_group_that_sees_another_does_not_change_it(detector_config: DetectorConfig) -> None:
    detector, memory, main = encoded(detector_config)
    seeing = extra_group(main, 5, "a", 1, sees=("main",))
    together = detector.decode(memory, [QueryGroup("main", main), seeing])
    assert_same(together["main"], detector.decode(memory, [QueryGroup("main", main)])["main"])
    blind = detector.decode(memory, [replace(seeing, sees=())])["a"]
    assert not torch.allclose(together["a"].logits, blind.logits, atol=1e-6)


def test_blocks_are_groups_of_their_own(detector_config: DetectorConfig) -> None:
    detector, memory, main = encoded(detector_config)
    whole = extra_group(main, 6, "a", 1)
    blocks = replace(whole, blocks=torch.tensor([0, 0, 1, 1, 1, 2]))
    together = detector.decode(memory, [blocks])["a"]
    for rows in (slice(0, 2), slice(2, 5), slice(5, 6)):
        q = whole.queries
        position = None if q.position is None else q.position[:, rows]
        part = QueryGroup("part", Queries(q.content[:, rows], q.reference[:, rows], sized=q.sized, position=position))
        alone = detector.decode(memory, [part])["part"]
        torch.testing.assert_close(together.logits[:, :, rows], alone.logits, rtol=0, atol=5e-7)


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_garbage_in_invalid_rows_changes_nothing(detector_config: DetectorConfig, garbage: float) -> None:
    method = make_method(detector_config).double()
    detector, batch = method.student, make_batch((2, 3))
    memory = detector.encode(batch.images.double(), batch.padding)
    main = detector.queries(memory)["main"]
    clean = extra_group(main, 6, "a", 1)
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 3 + [False] * 3])
    outcomes = []
    for filling in (0.3, garbage):
        q = clean.queries

        def spoil(tensor: Tensor | None, filling: float = filling) -> Tensor | None:
            return None if tensor is None else torch.where(valid[..., None], tensor, filling).requires_grad_()

        queries = Queries(spoil(q.content), spoil(q.reference), q.sized, valid, spoil(q.position))
        stages = detector.decode(memory, [QueryGroup("main", main), QueryGroup("a", queries)])
        losses = Losses()
        problem = method.criterion.problem(stages["a"], batch.targets, "a")
        from steadydetr.learning.matching import solve

        match = solve([problem])[0].match
        method.criterion.add_losses(losses, "a", stages["a"], Assignment.of(match), batch.targets, 1.0)
        assert valid[match.image % 2, match.query].all()
        parameters = [p for p in detector.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(losses.total, parameters, retain_graph=True, allow_unused=True)
        outcomes.append((stages, losses.total, [g for g in gradients if g is not None]))
    (before, loss, gradients), (after, spoiled, spoiled_gradients) = outcomes
    assert_same(before["main"], after["main"])
    shown = valid[None, :, :, None]
    torch.testing.assert_close(torch.where(shown, before["a"].logits, 0), torch.where(shown, after["a"].logits, 0))
    torch.testing.assert_close(loss, spoiled)
    for a, b in zip(gradients, spoiled_gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_folded_stages_equal_looped_stages(detector_config: DetectorConfig) -> None:
    method = make_method(detector_config).double()
    batch, criterion = make_batch((2, 0, 3)), method.criterion
    memory = method.student.encode(batch.images.double(), batch.padding)
    stages = method.student.decode(memory, [QueryGroup("main", method.student.queries(memory)["main"])])["main"]
    from steadydetr.learning.matching import solve

    folded = Losses()
    match = solve([criterion.problem(stages, batch.targets, "m")])[0].match
    criterion.add_losses(folded, "m", stages, Assignment.of(match), batch.targets, 5.0)
    for s in range(len(stages.logits)):
        single, one = Losses(), stages[s : s + 1]
        match = solve([criterion.problem(one, batch.targets, "m")])[0].match
        criterion.add_losses(single, "m", one, Assignment.of(match), batch.targets, 5.0)
        for name, values, _ in single:
            torch.testing.assert_close(folded[name][s], values[0])


def test_a_group_without_position_is_named() -> None:
    q = Queries(torch.zeros(1, 2, 4), torch.rand(1, 2, 4))
    with pytest.raises(ValueError, match=r"groups \['b'\] have no position"):
        join_groups([QueryGroup("a", replace(q, position=torch.zeros(1, 2, 4))), QueryGroup("b", q)])
    with pytest.raises(ValueError, match="sees"):
        join_groups([QueryGroup("a", q, sees=("main",))])
    with pytest.raises(ValueError, match="names of their own"):
        join_groups([QueryGroup("a", q), QueryGroup("a", q)])
