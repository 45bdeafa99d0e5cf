"""A detector that shares nothing with ours but the protocol of detectors/base.py works with every objective.

It has no backbone of ours, no deformable attention and one feature level, as a detector of another package may have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadydetr.boxes import inverse_sigmoid
from steadydetr.data import DataConfig
from steadydetr.detectors.base import Detector
from steadydetr.detectors.configs.base import DetectorConfig
from steadydetr.detectors.query_groups import join_groups
from steadydetr.kinds import options
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Average, Frozen
from steadydetr.learning.predictions import match_batch
from steadydetr.metrics.stability import compare_matches, match_dataset
from steadydetr.nn.attention import SelfAttention
from steadydetr.objectives import Denoising, MatchingDistillation, Objective, OneToMany, SetPrediction, TeacherInit
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, DecodedStages, Memory, Queries, QueryGroup, Stages
from tests.conftest import CLASSES, DETECTORS, make_batch
from tests.test_floors import MODULES, imports

STRIDE = 16
OBJECTIVES = [kind for kind in options(Objective).values() if kind.__module__.startswith("steadydetr.")]


@dataclass(frozen=True)
class PlainConfig(DetectorConfig):
    width: int = 16
    queries: int = 12

    def build(self, num_classes: int) -> PlainDetector:
        return PlainDetector(self, num_classes)


class PlainDetector(Detector):
    """Pixels by one convolution to tokens; queries attend to each other and to all tokens, twice."""

    strides = (STRIDE,)
    stages = 2
    embeds_labels = True
    extra_groups: Mapping[str, tuple[str, ...]] = MappingProxyType({"one-to-many": ()})
    makes_queries = True

    def __init__(self, config: PlainConfig, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.width = num_classes, config.width
        self.patches = nn.Conv2d(3, config.width, STRIDE, STRIDE)
        self.encoder = nn.Linear(config.width, config.width)
        self.content = nn.Embedding(config.queries, config.width)
        self.anchor = nn.Embedding(config.queries, 4)
        self.place = nn.Linear(4, config.width)
        self.label = nn.Embedding(num_classes, config.width)
        self.attention = SelfAttention(config.width, 2)
        self.classes, self.boxes = nn.Linear(config.width, num_classes), nn.Linear(config.width, 4)

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        maps = self.patches(self.normalise(images, padding))
        height, width = maps.shape[2:]
        inputs = maps.flatten(2).transpose(1, 2)
        empty = F.interpolate(padding[:, None].float(), size=(height, width))[:, 0].bool()
        ratios = torch.stack(((~empty[:, 0]).sum(1) / width, (~empty[:, :, 0]).sum(1) / height), -1)[:, None]
        return Memory(self.encoder(inputs), empty.flatten(1), ((height, width),), ratios, inputs)

    def queries(self, memory: Memory) -> dict[str, Queries]:
        content, anchor = (e.weight.expand(len(memory.tokens), -1, -1) for e in (self.content, self.anchor))
        main = Queries(content, anchor.sigmoid())
        return {"main": main, "one-to-many": Queries(content.flip(1), main.reference)} if self.training else {"main": main}

    def new_queries(self, count: int | None = None) -> nn.Module:
        return nn.ModuleList((nn.Embedding(*self.content.weight.shape), nn.Embedding(*self.anchor.weight.shape)))

    def further_queries(self, memory: Memory, parts: nn.Module, count: int | None = None) -> tuple[Queries, Stages | None]:
        content, anchor = (each.weight.expand(len(memory.tokens), -1, -1) for each in parts.children())  # type: ignore[operator]
        return Queries(content, anchor.sigmoid()), None

    def embed(self, labels: Tensor, boxes: Tensor) -> Queries:
        return Queries(self.label(labels), boxes)

    def learned_queries(self) -> Mapping[str, nn.Parameter]:
        return {"content": self.content.weight, "anchor": self.anchor.weight}

    def decode(self, memory: Memory, groups: Sequence[QueryGroup]) -> dict[str, DecodedStages]:
        joined = join_groups(groups)
        content, reference = joined.content, joined.reference
        logits, boxes, contents, references = [], [], [], []
        for _ in range(self.stages):
            content = content + self.attention(content, self.place(reference), joined.plan)
            content = content + F.scaled_dot_product_attention(content, memory.tokens, memory.tokens, ~memory.padding[:, None])
            references.append(reference)
            reference = (self.boxes(content) + inverse_sigmoid(reference)).sigmoid()
            contents.append(content)
            logits.append(self.classes(content))
            boxes.append(reference)
        stacked = [torch.stack(tensors) for tensors in (logits, boxes, contents, references)]
        return joined.split(DecodedStages(stacked[0], stacked[1], content=stacked[2], reference=stacked[3]))

    def keep_classes(self, classes: Sequence[int]) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] in ("learning", "objectives")])
def test_training_methods_know_no_concrete_detector(module: str) -> None:
    assert {name for name in imports(module) if name.startswith("detectors")} <= {"detectors.base"}


def test_the_page_for_authors_names_all_that_a_detector_may_declare() -> None:
    page = (Path(__file__).parents[1] / "docs/extending.md").read_text()
    declared = {name for name in vars(Detector) if name in Detector.__annotations__ and name != "frozen_parts"}
    assert declared == {name for name in declared if f"`{name}`" in page} and len(declared) > 9


def models() -> tuple[PlainDetector, dict[str, Frozen[Detector]]]:
    torch.manual_seed(0)
    student, teacher = (PlainConfig().build(CLASSES) for _ in range(2))
    return student, {"ema": Average(student, 0.9), "teacher": Frozen(teacher)}


@pytest.mark.parametrize("kind", OBJECTIVES, ids=lambda kind: kind.__name__)
def test_every_objective(kind: type[Objective]) -> None:
    student, teachers = models()
    main = SetPrediction(MatchingDistillation())
    objectives: tuple[Objective, ...] = (main,) if kind is SetPrediction else (main, kind())
    method = Method(student, Criterion(), objectives, teachers)
    losses = method(make_batch((2, 0, 3)))
    losses.total.backward()
    terms = {name.partition("/")[0] for name, _, _ in losses}
    assert terms == {objective.name for objective in objectives if not isinstance(objective, TeacherInit)}
    assert losses.total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


class Loaded(list[Batch]):
    """Stands for a loader of six images."""

    positions = range(6)


def test_matches_and_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its learned queries are known by their numbers; it has no proposals and no sampling points, and says so."""
    student, _ = models()
    batch = make_batch((2, 0, 3))
    found = match_batch(student, Criterion(), batch)
    assert student.training and found.proposal_queries is None and found.matched_queries.valid.all()
    monkeypatch.setattr("steadydetr.metrics.stability.EvalLoader", lambda *_, **__: Loaded([batch, batch]))
    stability = compare_matches(match_dataset(student, Criterion(), None, DataConfig(), 2))  # type: ignore[arg-type]
    assert list(stability.unstable_score) == ["2"] and (stability.images, stability.objects) == (6, 10)
    with pytest.raises(ValueError, match="PlainDetector has no deformable attention"):
        student.record_sampling_points()
    with pytest.raises(ValueError, match="PlainDetector has no layer that makes references"):
        student.refer(torch.zeros(1))


def test_sampling_points_are_recorded_stage_by_stage() -> None:
    """Those that the attention sampled in this pass; afterwards nothing is recorded."""
    detector, batch = DETECTORS["dino"].build(CLASSES).eval(), make_batch((2, 3))
    with torch.no_grad(), detector.record_sampling_points() as found:
        first = detector(batch.images, batch.padding)
    assert len(found) == detector.stages
    for locations, weights in found:
        assert locations.shape == (*first.logits.shape[1:3], *locations.shape[2:5], 2) and weights.shape == locations.shape[:-1]
        torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:3]))
    with torch.no_grad():
        again = detector(batch.images, batch.padding)
    assert len(found) == detector.stages and torch.equal(again.logits, first.logits)


def test_what_it_does_not_declare_is_refused() -> None:
    class Unlabelled(PlainDetector):
        embeds_labels, makes_queries, extra_groups = False, False, MappingProxyType({})
        embed = Detector.embed
        new_queries, further_queries = Detector.new_queries, Detector.further_queries

    student = Unlabelled(PlainConfig(), CLASSES)
    assert Method(student, Criterion(), (SetPrediction(), Denoising(4)))(make_batch((2, 1)))["denoising/l1"].all()  # by layers for it alone
    with pytest.raises(ValueError, match="Unlabelled has no layer for labels of its own"):
        student.embed(torch.zeros(1, 1), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="objective one-to-many: Unlabelled makes no further queries"):
        Method(student, Criterion(), (SetPrediction(), OneToMany()))
    with pytest.raises(ValueError, match="Unlabelled makes no further queries"):
        student.new_queries()
    with pytest.raises(ValueError, match="Unlabelled makes no further queries"):
        student.further_queries(None, nn.Identity())  # type: ignore[arg-type]
    assert PlainConfig().without_pretrained() == PlainConfig()
