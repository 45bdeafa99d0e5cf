"""Writes docs/grid.md: which method trains which detector, and why where it does not.

    python -m tests.write_grid_page

A cell is a run that begins as `steadydetr train` and `distill` begin one, of a tiny detector. Which cells are refused is said by `refusal`
alone; `tests/test_grid.py` takes a step in each cell, and holds the page to what this writes.
"""

from __future__ import annotations

import shlex
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import save_detector
from steadydetr.cli.training_arguments import override
from steadydetr.config import check_savable
from steadydetr.detectors import DetectorConfig, MaskDINOConfig
from steadydetr.learning.mask_terms import MaskTerms
from steadydetr.objectives import SetPrediction
from steadydetr.objectives.method import Method
from steadydetr.recipes import Recipe, find
from steadydetr.recipes.distill import distilled
from steadydetr.recipes.finetuning import TrainingMethod, with_method
from steadydetr.training.preparation import build_method, build_student
from steadydetr.training.processes import make_accelerator
from tests.conftest import CLASSES, DETECTORS
from tests.distill_steps import other

PAGE = Path(__file__).parents[1] / "docs" / "grid.md"
NAMES = tuple(f"class {number}" for number in range(CLASSES))
STEPS = 100  # of the run, for the decay of an average
COLUMNS = {  # what is called otherwise on the page than in the tests
    "deformable": "Deformable DETR",
    "refine": "Deformable DETR, refinement",
    "two-stage": "Deformable DETR, two-stage",
    "dab": "DAB-Deformable-DETR",
    "dab-two-stage": "DAB-Deformable-DETR, two-stage",
    "dino": "DINO",
    "dn-dab": "DN-DAB-Deformable-DETR",
    "h-deformable": "H-Deformable-DETR",
    "dino-shared-decoder": "DINO, one decoder layer",
    "conditional": "Conditional DETR",
    "adamixer": "AdaMixer",
    "maskdino": "MaskDINO",
}


@dataclass(frozen=True)
class Row:
    """A method as flags of a command."""

    name: str
    flags: str = ""
    method: TrainingMethod | None = None  # what --method names, of `train`
    distils: bool = False  # `distill RECIPE --teacher TEACHER` instead of `train RECIPE`
    alike: bool = False  # the teacher has as many queries and channels as the student

    @property
    def command(self) -> str:
        """As it is given, for a recipe of the detector."""
        method = f" --method {self.method}" if self.method else ""
        return ("distill RECIPE --teacher TEACHER" if self.distils else f"train RECIPE{method}") + f" {self.flags}".rstrip()


DENOISING = "--objectives.denoising denoising --objectives.denoising.number 4"
ONE_TO_MANY = "--objectives.one-to-many one-to-many --objectives.one-to-many.repeats 2"
NUMBER = " --objectives.one-to-many.queries 20"  # not of a detector that has such queries itself
GROUPS = "--objectives.groups group-matching --objectives.groups.groups 2"
DENSE = "--detector.transformer.fusion dense"
ALIGN = "--criterion.class-target align --criterion.matching mixed"
STABLE = "--criterion.class-target position --criterion.class-cost position-modulated"
COST = "--criterion.class-cost position-modulated"
TEACHER = "--teachers.teacher trained-teacher --teachers.teacher.checkpoint TEACHER"
OFFLINE = (
    f"{TEACHER} --objectives.logits logits-distillation --objectives.features feature-distillation"
    " --objectives.assignment assignment-distillation"
)
PEERS = {
    "FitNet": "feature-distillation --objectives.features.mask ones",
    "mean mask": "feature-distillation --objectives.features.mask mean",
    "FGD": "fgd",
    "MGD": "mgd",
    "FKD": "fkd",
    "FGFI": "fgfi",
}
ROWS = (
    Row("detection"),
    Row("denoising of DINO", DENOISING),
    Row("denoising of DN-DETR", "--objectives.denoising dn-denoising --objectives.denoising.groups 2"),
    Row("denoising of MaskDINO", "--objectives.denoising mask-denoising --objectives.denoising.number 6"),
    Row("one-to-many", ONE_TO_MANY),
    Row("groups", GROUPS),
    Row("Align-DETR", method="align"),
    Row("position-supervised loss", "--criterion.class-target position"),
    Row("position-modulated cost", COST),
    *(Row(f"{kind} memory fusion", f"--detector.transformer.fusion {kind}") for kind in ("simple", "u_like", "dense", "dense_simple")),
    Row("Stable-DINO", DENSE, method="stable"),
    Row("OD-DETR", method="od"),
    Row("matching distillation", "--teachers.ema ema-teacher --objectives.main.teacher-match matching-distillation"),
    Row("prediction distillation", "--teachers.ema ema-teacher --objectives.prediction prediction-distillation"),
    Row("naive prediction distillation", "--teachers.ema ema-teacher --objectives.prediction naive-prediction"),
    Row("auxiliary groups", "--teachers.ema ema-teacher --objectives.auxiliary auxiliary-groups"),
    Row("OD-DETR with Align-DETR", ALIGN, method="od"),
    Row("DETRDistill", distils=True),
    *(Row(f"DETRDistill, {name}", f"--objectives.features {flags}", distils=True) for name, flags in PEERS.items()),
    Row("DETRDistill as released", "--objectives.logits released-logits --objectives.features released-features", distils=True, alike=True),
    Row("DETRDistill, Teacher Group", "--objectives.assignment.matching own", distils=True),
    Row("DETRDistill, Teacher Init", "--objectives.assignment teacher-init", distils=True, alike=True),
    Row("DETRDistill, Teacher Init of another size", "--objectives.assignment teacher-init", distils=True),
    Row("DETRDistill with stable loss and cost", STABLE, distils=True),
    Row("the three together", f"{COST} {DENSE} {OFFLINE}", method="od"),
    Row("the three, without fusion", f"{COST} {OFFLINE}", method="od"),
    Row("all of this but fusion", f"{DENOISING} {ONE_TO_MANY} {GROUPS} {ALIGN} {COST} {OFFLINE}", method="od"),
)


def refusal(detector: str, row: Row) -> tuple[str, str] | None:
    """Why the cell must be refused, in a word, and a pattern of what is then read; None: it must run.

    There are no other refusals than these of methods.md, section 4 (D-215).
    """
    config = DETECTORS[detector]
    if "fusion" in row.flags.split("--detector.transformer.")[-1].split(" ")[:1] and not config.encoder_layers:
        return "no encoder", r"--detector\.transformer\.fusion: .* has no encoder, so there is no memory to fuse: leave it out"
    if "auxiliary" in row.flags and not config.takes_boxes:
        return "queries take no box", r"objective auxiliary: .* takes no box: --objectives\.auxiliary none"
    if "teacher-init" in row.flags:
        pattern = r"objective assignment: Teacher Init needs learned queries of equal number .*: --objectives\.assignment \S+$"
        if not config.build(CLASSES).learned_queries():
            return "no learned queries", pattern
        return None if row.alike else ("other queries", pattern)
    return None


def recipe_of(detector: str, row: Row) -> Recipe:
    """The recipe that the command of a cell makes."""
    config = DETECTORS[detector]
    apart = row.method is None and "--detector" not in row.flags and "one-to-many" not in row.flags
    recipe = replace(flagged("dino", row), detector=config, **teachers_of(detector, row)) if apart else flagged(detector, row)
    if not isinstance(config, MaskDINOConfig):
        return recipe
    masks = replace(recipe.criterion, masks=MaskTerms(points=16))
    return replace(recipe, criterion=masks, detector=recipe.detector.changed(box_init="mask2box"))


def teachers_of(detector: str, row: Row) -> dict[str, object]:
    """The teachers of the recipe, of which a trained one is of the detector's own kind."""
    return {"teachers": begun(detector, row).teachers} if row.distils else {}


def begun(detector: str, row: Row) -> Recipe:
    """The recipe before flags change it: plain, with neither its own denoising nor hybrid matching."""
    recipe = replace(find("small-dino"), detector=DETECTORS[detector], objectives=(SetPrediction(),))
    if row.method is not None:
        recipe = with_method(recipe, row.method)
    return distilled(recipe, teacher(detector, row.alike)) if row.distils else recipe


@cache
def flagged(detector: str, row: Row) -> Recipe:
    """The recipe as the flags change it."""
    own_number = hasattr(DETECTORS[detector], "one_to_many_queries")
    words = shlex.split(row.flags.replace(ONE_TO_MANY, ONE_TO_MANY if own_number else ONE_TO_MANY + NUMBER))
    words = [teacher(detector, row.alike) if word == "TEACHER" else word for word in words]
    recipe = begun(detector, row)
    return override(recipe, words, f"train {recipe.name}")[0] if words else recipe


@cache
def folder() -> Path:
    made = tempfile.TemporaryDirectory()
    KEPT.append(made)  # removed when the process ends
    return Path(made.name)


KEPT: list[tempfile.TemporaryDirectory[str]] = []


@cache
def teacher(detector: str, alike: bool) -> str:
    """The checkpoint of a detector of the same kind, which has other numbers of queries, stages and channels unless `alike`."""
    config: DetectorConfig = DETECTORS[detector] if alike else other(detector)
    torch.manual_seed(1)
    model = config.build(CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = folder() / f"{detector}-{alike}"
    save_detector(path, model.state_dict(), DetectorCard(config, NAMES, tuple(range(CLASSES))))
    return str(path)


def start(recipe: Recipe) -> Method:
    """The method of a run, as it begins; a ValueError with the reason where it cannot."""
    check_savable(recipe, "recipe")
    torch.manual_seed(0)
    student, _ = build_student(recipe, NAMES, None)
    return build_method(recipe, NAMES, STEPS, accelerator(), student)


@cache
def accelerator():  # type: ignore[no-untyped-def]
    return make_accelerator("cpu")


@cache
def reason(detector: str, row: Row) -> str:
    """What a user reads where the cell is refused."""
    try:
        start(recipe_of(detector, row))
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{row.name} on {detector} is not refused")


def page() -> str:
    """The page as it should be."""
    reasons = [reason(detector, row) for row in ROWS for detector in DETECTORS if refusal(detector, row)]
    numbers = {text: number for number, text in enumerate(Counter(reasons), 1)}
    lines = [
        "# Which method trains which detector",
        "",
        "Written by `python -m tests.write_grid_page`; `tests/test_grid.py` takes a training step in each cell, in which every trained"
        " parameter must get a finite gradient, or sees it refused before the first step, for the reason of that number.",
        "",
        *table(numbers),
        "",
        "What is then read:",
        "",
        *(f"{number}. `{text}`" for text, number in numbers.items()),
        "",
        "The commands, for a recipe of the detector without denoising, with a checkpoint of a detector of the same kind as TEACHER:",
        "",
        "| method | `steadydetr` |",
        "|---|---|",
        *(f"| {row.name} | `{row.command}` |" for row in ROWS),
        "",
        "`--method od` leaves out the auxiliary groups where a query takes no box (D-165). Detectors that have no layers for labels get"
        " some for denoising (D-211), detectors without further queries get some for one-to-many matching (D-212): both are trained beside"
        " the detector and are no part of it.",
    ]
    return "\n".join(lines) + "\n"


def table(numbers: dict[str, int]) -> Sequence[str]:
    """A row for each method, a column for each detector."""
    columns = list(DETECTORS)

    def cell(detector: str, row: Row) -> str:
        found = refusal(detector, row)
        return "yes" if found is None else f"{found[0]} ({numbers[reason(detector, row)]})"

    cells = [[row.name, *(cell(detector, row) for detector in columns)] for row in ROWS]
    return [
        f"| method | {' | '.join(COLUMNS.get(name, name) for name in columns)} |",
        f"|---{'|---' * len(columns)}|",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print("\n".join(page().splitlines()[4 : 6 + len(ROWS)]))
