"""What a recipe costs: against formulas by hand, the papers' numbers of parameters, and the parts' sums."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import steadydetr.tools.cost
from steadydetr.cli import main
from steadydetr.detectors import Detector
from steadydetr.learning.teachers import EMATeacher, TrainedTeacher
from steadydetr.nn.deformable_attention import DeformableAttention
from steadydetr.objectives import FGD, AssignmentDistillation, FeatureDistillation, TeacherInit
from steadydetr.papers import Row, find_table
from steadydetr.recipes import find
from steadydetr.recipes.base import Recipe
from steadydetr.tools.cost import Cost, count_multiplications, count_parameters, make_batch, measure_cost, measure_size
from tests.conftest import CLASSES, DETECTORS

SIZE = (64, 64)


def distilled(*objectives: object) -> Recipe:
    start = find("small-refine-deformable-detr")
    return replace(start, detector=DETECTORS["refine"], objectives=(*start.objectives, *objectives), teachers=(TrainedTeacher(),))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cost() -> Cost:
    return measure_cost(distilled(FeatureDistillation(), FGD()), SIZE, "small-refine-deformable-detr", CLASSES)


def test_a_linear_layer_and_a_convolution_by_hand() -> None:
    assert count_multiplications(lambda: nn.Linear(3, 5)(torch.zeros(7, 3)))[0] == 7 * 3 * 5
    assert count_multiplications(lambda: nn.Conv2d(3, 5, 3, padding=1)(torch.zeros(1, 3, 4, 6)))[0] == 24 * 5 * 27


def test_deformable_attention_by_hand() -> None:
    """Four linear layers, and four corners of every point of every head, d / heads numbers each. Backward: products and sums once more."""
    width, heads, points, levels = 8, 2, 3, ((4, 4), (2, 2))
    module, tokens, queries = DeformableAttention(width, heads, len(levels), points), torch.randn(1, 20, width), torch.randn(1, 5, width)
    reference, padding = torch.rand(1, 5, len(levels), 4), torch.zeros(1, 20, dtype=torch.bool)
    forward, total = count_multiplications(lambda: module(queries, reference, True, module.project(tokens, padding), levels).sum())
    places = heads * len(levels) * points
    sampling = 5 * places * 4 * (width // heads)
    linear = 20 * width * width + 5 * width * (places * 2 + places) + 5 * width * width
    assert forward == linear + sampling
    weights = 20 * width * width + 5 * width * 3 * places + 5 * width * width  # of every layer; inputs get none but that of the output's
    assert count_multiplications(total.backward)[0] == weights + 5 * width * width + 2 * sampling


ROWS = find_table("detrdistill:S3")[1].rows  # parameters of teacher and student, millions; their multiplications, billions; distillation's


def detectors_of(row: Row) -> tuple[Detector, Detector]:
    """Teacher and student of a row "cost STUDENT --teacher TEACHER", without values."""
    _, student, _, teacher = row.words
    return build(teacher), build(student)


def build(name: str) -> Detector:
    return find(name).detector.without_pretrained().build(80).eval()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_parameters_are_the_papers(row: Row) -> None:
    """DETRDistill, supplement Table 3: those that are trained."""
    with torch.device("meta"):
        assert [round(count_parameters(detector)[1] / 1e6, 2) for detector in detectors_of(row)] == list(row.reported[:2])


def count_as_mmdet(detector: Detector, size: tuple[int, int]) -> int:
    """What `tools/analysis_tools/get_flops.py` of mmdet 2 counts: convolutions with their biases, linear layers without, two for every
    number that a norm gets, one for every number of ReLU and pooling; nothing of multi-head attention, not even its projections, no
    products of two inputs and no sampling.
    """
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        if isinstance(module, nn.Conv2d):
            counted += output.numel() // module.out_channels * module.weight.numel() + (output.numel() if module.bias is not None else 0)
        elif isinstance(module, nn.Linear):
            counted += inputs[0].numel() * module.out_features
        else:
            counted += inputs[0].numel() * (1 if isinstance(module, (nn.ReLU, nn.MaxPool2d)) else 2)

    for name, module in detector.named_modules():
        norm = isinstance(module, nn.LayerNorm) or "BatchNorm" in type(module).__name__ or "GroupNorm" in type(module).__name__
        known = norm or isinstance(module, (nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d))
        if known and not name.endswith(("self_attention.out_proj", "cross_attention.out_proj")):
            module.register_forward_hook(count)
    with torch.no_grad():
        detector(torch.empty(1, 3, *size), torch.empty(1, *size, dtype=torch.bool))
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.label != "Deformable DETR"], ids=lambda row: row.label)
def test_multiplications_are_the_papers(row: Row) -> None:
    """DETRDistill, supplement Table 3, for images of 800 x 1280 as mmdet counts (D-216)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        counted = [count_as_mmdet(detector, (800, 1280)) / 1e9 for detector in detectors_of(row)]
    assert counted == [pytest.approx(reported, rel=5e-4) for reported in row.reported[2:4]]


def test_inference_grows_with_the_image() -> None:
    detector = DETECTORS["dino"].build(CLASSES)
    small, large = (measure_size(detector, make_batch(size, CLASSES)).inference for size in (SIZE, (128, 128)))
    assert 3 < large / small < 4.2


def test_parts_add_up(cost: Cost) -> None:
    """The student's own forward pass is its inference; the whole is the sum of the parts; shares are of all forward passes."""
    assert cost.forward == cost.student.inference
    assert list(cost.parts) == ["features", "fgd"] and min(cost.parts.values()) > 0
    forward = cost.teaching + cost.forward
    assert cost.share("fgd") == pytest.approx(cost.parts["fgd"] / (forward + cost.parts["fgd"]))
    assert cost.whole_share == pytest.approx(sum(cost.parts.values()) / (forward + sum(cost.parts.values())))
    assert cost.step > cost.plain_step + cost.teaching + sum(cost.parts.values())  # their backward pass besides


def test_feature_distillation_by_hand(cost: Cost) -> None:
    """phi on every token; masks of 7 matched queries on every token, or, where that is less, one matrix of them; mean of nothing else."""
    tokens, mine, theirs = [64, 16, 4], 16, 96
    masks = sum(min(7 * n * theirs, 7 * theirs**2 + n * theirs**2) for n in tokens)
    assert cost.parts["features"] == sum(tokens) * mine * theirs + masks
    assert cost.adapters == mine * theirs + theirs + fgd_parameters(mine, theirs) * 3


def fgd_parameters(mine: int, theirs: int) -> int:
    half = theirs // 2
    block = theirs + 1 + (theirs * half + half) + 2 * half + (half * theirs + theirs)
    return mine * theirs + theirs + 2 * block


def test_the_second_encoder_pass_of_the_released_code(cost: Cost) -> None:
    """It is priced beside the assignment, where the student has an encoder: projections, feed-forward and sampling of all tokens."""
    assert cost.parts_as_released == {}
    taught = measure_cost(distilled(AssignmentDistillation()), SIZE, "small-refine-deformable-detr", CLASSES)
    student = DETECTORS["refine"].build(CLASSES)
    batch = make_batch(SIZE, CLASSES)
    memory = student.encode(batch.images, batch.padding)
    tokens, d = memory.tokens.shape[1:]
    config = DETECTORS["refine"].transformer  # type: ignore[attr-defined]
    places = config.heads * len(memory.levels) * config.encoder_points
    layer = 2 * d * d + 3 * places * d + 2 * d * config.ffn + places * 4 * (d // config.heads)
    assert taught.student.encoder == config.encoder_layers * tokens * layer
    assert taught.parts_as_released == {"assignment": taught.parts["assignment"] + taught.student.encoder}
    without = replace(find("small-adamixer"), detector=DETECTORS["adamixer"])
    assert measure_cost(without, SIZE, classes=CLASSES).student.encoder == 0


def test_a_recipe_without_teacher_has_no_parts() -> None:
    recipe = replace(find("small-dino"), detector=DETECTORS["dino"])
    cost = measure_cost(recipe, SIZE, classes=CLASSES)
    assert not cost.parts and not cost.teachers and cost.step == cost.plain_step > 2 * cost.forward
    assert cost.forward > cost.student.inference  # denoising


def test_the_average_of_the_weights_is_a_teacher_too() -> None:
    recipe = replace(find("small-od-dino"), detector=DETECTORS["dino"])
    cost = measure_cost(recipe, SIZE, classes=CLASSES)
    assert list(cost.parts) == ["prediction", "auxiliary"] and cost.teachers["ema"].inference == cost.student.inference


def test_a_teacher_that_no_objective_reads_costs_nothing() -> None:
    """Teacher Init copies its queries once; the average of the weights is there to be evaluated."""
    start = find("small-refine-deformable-detr")
    objectives = (*start.objectives, TeacherInit())
    recipe = replace(start, detector=DETECTORS["refine"], objectives=objectives, teachers=(EMATeacher(), TrainedTeacher()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steadydetr.tools.cost, "detector_of", lambda _: DETECTORS["refine"])
        cost = measure_cost(recipe, SIZE, "any", CLASSES)
    assert set(cost.teachers) == {"ema", "teacher"} and cost.teaching == cost.parts["assignment"] == 0
    assert cost.step == cost.plain_step


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cost.json"
    words = ["cost", "small-refine-deformable-detr", "--size", "64", "64", "--teachers.teacher", "trained-teacher"]
    words += ["--objectives.features", "feature-distillation", "--objectives.assignment", "assignment-distillation"]
    words += ["--objectives.assignment.matching", "own", "--teacher", "small-refine-deformable-detr", "--output", str(output)]
    main(words)
    said = capsys.readouterr().out
    assert "features, forward" in said and "teacher" in said and "assignment as released, with a second encoder pass" in said
    written = json.loads(output.read_text())
    whole = written["parts"]["features"] + written["parts"]["assignment"]
    assert written["whole_share"] == pytest.approx(whole / (written["teaching"] + written["forward"] + whole))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "name a recipe first"),
        ("small-dino --teacher small-dino", "small-dino learns from no trained teacher"),
        ("small-dino --teachers.teacher trained-teacher", "name its recipe or checkpoint by --teacher"),
        ("small-dino --teachers.teacher trained-teacher --teacher nowhere", "no file or folder nowhere"),
    ],
)
def test_errors_say_what_to_do(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cost", *(words.split() or ["--size", "64", "64"])])
    assert said in capsys.readouterr().err
