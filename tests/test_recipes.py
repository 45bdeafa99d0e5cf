"""Every recipe is whole: it can be saved and read back, has the size that its paper says, and differs only where it should."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steadydetr.cli import compare
from steadydetr.config import differences, from_plain, to_plain
from steadydetr.learning.class_terms import QualityTarget
from steadydetr.learning.teachers import EMATeacher, TrainedTeacher
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.objectives import (
    FGD,
    FGFI,
    FKD,
    MGD,
    AssignmentDistillation,
    AuxiliaryGroups,
    Denoising,
    FeatureDistillation,
    JoinedMatches,
    LogitsDistillation,
    MatchingDistillation,
    Objective,
    PredictionDistillation,
    SetPrediction,
    TeacherInit,
)
from steadydetr.recipes import find, names
from steadydetr.recipes.base import Recipe
from tests.commands import shown_commands, understand

SCHEDULES = {12: 11, 24: 20, 36: 30, 50: 40}  # epochs -> where the rate drops, in the original repositories
FAMILIES = {
    "deformable-detr-r50": (12, 24, 50),
    "deformable-detr-refine-r50": (12, 24, 50),
    "deformable-detr-two-stage-r50": (12, 24, 50),
    "dab-deformable-detr-r50": (12, 24, 50),
    "dino-4scale-r50": (12, 24, 36),
    "dino-5scale-r50": (12,),
    "dino-4scale-swin-l": (12, 24, 36),
}
ONLINE = {  # OD-DETR recipe -> its baseline, and what the paper reports (Tables 1, 11)
    "od-deformable-detr-r50-12ep": ("deformable-detr-refine-r50-12ep", None),
    "od-deformable-detr-r50-24ep": ("deformable-detr-refine-r50-24ep", "47.7"),
    "od-dab-deformable-detr-r50-24ep": ("dab-deformable-detr-r50-24ep", "50.2"),
    "od-dino-4scale-r50-12ep": ("dino-4scale-r50-12ep", "50.4"),
    "od-dino-4scale-r50-24ep": ("dino-4scale-r50-24ep", "51.8"),
    "od-dino-5scale-r50-12ep": ("dino-5scale-r50-12ep", "52.0"),
    "od-dino-4scale-swin-l-12ep": ("dino-4scale-swin-l-12ep", "57.7"),
    "od-dino-4scale-swin-l-24ep": ("dino-4scale-swin-l-24ep", "58.8"),
}
OF_PAPERS = [f"{family}-{epochs}ep" for family, lengths in FAMILIES.items() for epochs in lengths]


def parameters(recipe: Recipe, num_classes: int) -> tuple[int, int]:
    """All and trainable ones, counted without allocating them."""
    with torch.device("meta"):
        detector = recipe.detector.without_pretrained().build(num_classes)
    count = [p.numel() for p in detector.parameters()]
    return sum(count), sum(p.numel() for p in detector.parameters() if p.requires_grad)


def test_all_that_were_promised_exist() -> None:
    assert set(OF_PAPERS) | set(ONLINE) | {"quickstart"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_a_recipe_carries_its_name_and_survives_json(name: str) -> None:
    recipe = find(name)
    assert recipe.name == name and recipe.notes
    assert from_plain(json.loads(json.dumps(to_plain(recipe)))) == recipe


@pytest.mark.parametrize("name", OF_PAPERS)
def test_schedules_are_those_of_the_papers(name: str) -> None:
    training = find(name).training
    assert training.epochs == int(name.rpartition("-")[2].removesuffix("ep"))
    assert training.drop_epochs == (SCHEDULES[training.epochs],) and training.schedule == "step"
    assert training.clip == 0.1 and training.weight_decay == 1e-4 and training.warmup_steps == 0


@pytest.mark.parametrize("name", OF_PAPERS)
def test_hyperparameters_are_those_of_the_originals(name: str) -> None:
    recipe = find(name)
    training, criterion = recipe.training, recipe.criterion
    deformable = name.startswith("deformable")
    assert (training.lr, training.batch_size, training.offset_lr_factor) == ((2e-4, 32, 0.1) if deformable else (1e-4, 16, 1.0))
    assert training.backbone_lr_factor == 0.1
    assert criterion.loss_weights.label == (2.0 if deformable else 1.0)
    assert (criterion.loss_weights.l1, criterion.loss_weights.giou) == (5.0, 2.0)
    assert (criterion.cost_weights.label, criterion.cost_weights.l1, criterion.cost_weights.giou) == (2.0, 5.0, 2.0)
    assert criterion.giou_eps == (0.0 if deformable else 1e-6)
    assert [o.name for o in recipe.objectives] == (["main", "denoising"] if name.startswith("dino") else ["main"])


@pytest.mark.parametrize("name", ONLINE)
def test_online_recipes_change_what_the_paper_changes(name: str) -> None:
    """OD-DETR Sec. 3, 4.1 and Appendix B: decay .9996, w_d .51; on Deformable DETR weight decay 2e-5 and one decoder for all stages."""
    baseline, reported = find(ONLINE[name][0]), ONLINE[name][1]
    teacher_match = MatchingDistillation(
        teacher="ema", counterparts="token", classes="union", boxes=True, class_weight=1.0, box_weight=0.51
    )
    denoising = tuple(o for o in baseline.objectives if o.name == "denoising")
    prediction = PredictionDistillation("ema", listen=True, position="teacher")
    changed = replace(
        baseline,
        criterion=replace(baseline.criterion, class_target=QualityTarget(), alpha=None),
        objectives=(
            SetPrediction(teacher_match),
            *denoising,
            prediction,
            AuxiliaryGroups("ema", "both", JoinedMatches(classes="union", boxes=True, class_weight=1.0, box_weight=0.51), "mean"),
        ),
        teachers=(EMATeacher(0.9996, stop_update=True),),
    )
    if name.startswith("od-deformable"):
        assert (baseline.training.lr, baseline.training.lr * baseline.training.backbone_lr_factor) == (2e-4, pytest.approx(2e-5))
        transformer = replace(baseline.detector.transformer, share_decoder=True)
        training = replace(baseline.training, weight_decay=2e-5)
        changed = replace(changed, detector=replace(baseline.detector, transformer=transformer), training=training)
    recipe = find(name)
    assert recipe == replace(changed, name=name, reported=recipe.reported, notes=recipe.notes)
    assert not baseline.detector.transformer.share_decoder
    assert recipe.reported.startswith(reported) if reported else not recipe.reported


@pytest.mark.parametrize("name", ["small-od-dino", "small-od-deformable-detr"])
def test_small_online_recipes_keep_the_horizons_share_of_the_run(name: str) -> None:
    recipe, paper = find(name), find("od-dino-4scale-r50-12ep")
    assert recipe.teachers == (EMATeacher(decay=None),)
    assert [o for o in recipe.objectives if o.name != "denoising"] == [o for o in paper.objectives if o.name != "denoising"]
    assert (recipe.criterion.class_target, recipe.criterion.alpha) == (paper.criterion.class_target, paper.criterion.alpha)


@pytest.mark.parametrize(
    ("name", "total", "trainable"),
    [  # DETRDistill, supplement Table 3: 39.84 M trainable; the original repositories: 40, 41, 41 M; DINO: 47 M; EasyCV: 217 M
        ("deformable-detr-r50-50ep", 40.1, 39.85),
        ("deformable-detr-refine-r50-50ep", 40.9, None),
        ("deformable-detr-two-stage-r50-50ep", 41.2, None),
        ("dab-deformable-detr-r50-50ep", 47.4, None),
        ("dino-4scale-r50-12ep", 46.9, None),
        ("dino-5scale-r50-12ep", 47.3, None),
        ("dino-4scale-swin-l-12ep", 217.2, 217.2),
        ("deformable-detr-refine-r50-24ep", 40.85, 40.6),  # OD-DETR Table 8
        ("od-deformable-detr-r50-24ep", 34.97, 34.7),
    ],
)
def test_detectors_have_the_sizes_of_the_papers(name: str, total: float, trainable: float | None) -> None:
    counted, learned = parameters(find(name), num_classes=91)
    assert counted / 1e6 == pytest.approx(total, abs=0.06)
    if trainable is not None:
        assert learned / 1e6 == pytest.approx(trainable, abs=0.05)


@pytest.mark.parametrize(
    ("name", "classes", "trainable"),
    [  # DETRDistill, supplement Table 3: 58.78 M and 39.84 M; the exact numbers are those of the released models
        ("deformable-detr-r101-50ep", 80, 58_783_318),
        ("detrdistill-deformable-detr-r101-r50-50ep", 80, 39_843_414),
        ("detrdistill-deformable-detr-r50-r50-50ep", 80, 39_843_414),
        ("detrdistill-deformable-detr-r101-r18-50ep", 80, 23_393_878),
        ("detrdistill-deformable-detr-r101-mobilenetv2-50ep", 80, 13_605_270),
        ("deformable-detr-r101-voc", 20, 58_767_898),
    ],
)
def test_distilled_detectors_have_the_sizes_of_the_paper(name: str, classes: int, trainable: int) -> None:
    assert parameters(find(name), classes)[1] == trainable


def test_distilled_recipes_differ_from_their_baselines_in_what_they_learn_alone() -> None:
    for name in (name for name in names() if name.startswith("detrdistill-deformable-detr") and name.endswith("50ep")):
        recipe, baseline = find(name), find("deformable-detr-r50-50ep")
        assert recipe.training == baseline.training and recipe.criterion == baseline.criterion and recipe.data == baseline.data
        assert recipe.teachers == (TrainedTeacher(),)
    assert [find(f"detrdistill-dino-4scale-r101-{end}-12ep").detector.queries for end in ("r18", "r50")] == [900, 300]
    voc = find("detrdistill-deformable-detr-r101-r18-voc").data
    assert (voc.train_split, voc.val_split) == ("trainval", "test")


def test_one_recipe_has_it_all() -> None:
    """DETRDistill, OD-DETR and stable matching, with two teachers."""
    steady, online = find("steady-dino-4scale-r50-12ep"), find("stable-od-dino-4scale-r50-12ep")
    assert [teacher.name for teacher in steady.teachers] == ["ema", "teacher"]
    assert steady.objectives[: len(online.objectives)] == online.objectives
    assert {"logits", "assignment"} <= {objective.name for objective in steady.objectives[len(online.objectives) :]}
    assert (steady.criterion, steady.detector, steady.training) == (online.criterion, online.detector, online.training)


def test_quickstart_is_small() -> None:
    counted, learned = parameters(find("quickstart"), num_classes=6)
    assert counted == learned < 2.5e6


def test_five_scales_start_at_stride_four() -> None:
    recipe = find("dino-5scale-r50-12ep")
    assert recipe.detector.transformer.levels == 5
    assert isinstance(recipe.detector.backbone, TimmBackboneConfig) and recipe.detector.backbone.out_indices == (1, 2, 3, 4)


def test_an_unknown_name_gives_the_nearest() -> None:
    assert find("dino_4scale_r50_12ep").name == "dino-4scale-r50-12ep"
    with pytest.raises(ValueError, match="did you mean 'dino-4scale-r50-12ep'"):
        find("dino-4scale-r50-12epochs")


def test_the_documentation_reports_what_the_recipes_report() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    for name in names():
        recipe = find(name)
        assert f"`{name}`" in page
        if re.search(r"-\d+ep$", name):
            assert f"| `{name}` | {recipe.reported or '-'} |" in page


PAGE = (Path(__file__).parents[1] / "docs/recipes.md").read_text()
ABBREVIATIONS = dict(re.findall(r"`(\w+)` (?:=|being) `([^`]+)`", PAGE))
DISTILL = PAGE.partition("## DETRDistill and its ablations")[2].partition("\n## ")[0]


def written_out(command: str) -> str:
    """With what its first word is short for."""
    first, space, rest = command.partition(" ")
    return written_out(ABBREVIATIONS[first]) + space + rest if first in ABBREVIATIONS else command


def documented_commands() -> list[str]:
    """The commands within the text and the tables of the recipes page."""
    found = {written_out(command) for command in re.findall(r"`([^`\n]+)`", PAGE)}
    return sorted(command for command in found if re.match(r"steadydetr (train|distill|cost) [^ ]+", command))


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_understood(command: str) -> None:
    """And what they ask for can be built: every objective has its teacher."""
    (recipe,) = understand(command)
    if command.startswith("steadydetr distill"):
        assert recipe.teachers[-1] == TrainedTeacher(re.findall(r"--teacher (\S+)", command)[0])
        return
    if command.startswith("steadydetr train"):
        with torch.device("meta"):
            replace(recipe, detector=recipe.detector.without_pretrained()).build(91)


LD, FD, AD = LogitsDistillation(), FeatureDistillation(), AssignmentDistillation()
ROWS: dict[tuple[str, str], tuple[Objective, ...]] = {  # table and row of DETRDistill -> what is learned from its teacher
    ("1", "(feature distillation alone)"): (FD,),
    ("1", "FitNet"): (FeatureDistillation(mask="ones"),),
    ("1", "FGD"): (FGD(),),
    ("1", "MGD"): (MGD(),),
    ("1", "FKD"): (FKD(),),
    ("1", "FGFI"): (FGFI(),),
    ("1", "DETRDistill"): (LD, FD, AD),
    ("2", "Eq. 6, plain mean of the masks"): (FeatureDistillation(mask="mean"),),
    ("2", "Eq. 8, weighted by quality"): (FD,),
    ("3", "student alone"): (),
    ("3", "DETRDistill"): (LD, FD, AD),
    **{("4", f"{stages}, student alone"): () for stages in ("6/6", "6/3", "3/6", "3/3")},
    **{("4", f"{stages}, DETRDistill"): (LD, FD, AD) for stages in ("6/6", "6/3", "3/6", "3/3")},
    ("5", "LD"): (LD,),
    ("5", "FD"): (FD,),
    ("5", "AD"): (AD,),
    ("5", "LD + FD"): (LD, FD),
    ("5", "all"): (LD, FD, AD),
    ("6", "(logits distillation alone in all rows)"): (LD,),
    ("6", "positive classes"): (LogitsDistillation(positive_box=False, negative_box=False),),
    ("6", "positive boxes"): (LogitsDistillation(positive_class=False, negative_box=False),),
    ("6", "negative boxes"): (LogitsDistillation(positive_class=False, positive_box=False),),
    ("6", "positive classes and boxes"): (LogitsDistillation(negative_box=False),),
    ("6", "positive and negative boxes"): (LogitsDistillation(positive_class=False),),
    ("6", "all"): (LD,),
    ("7", "last-stage distillation"): (LogitsDistillation(stages="last"),),
    ("7", "progressive distillation"): (LD,),
    ("S1", "DINO, r18"): (LD, FD, AD),
    ("S1", "DINO, r50 with 300 queries"): (LD, FD, AD),
    ("S2", "Pascal VOC, r18"): (LD, FD, AD),
    ("S2", "Pascal VOC, r50"): (LD, FD, AD),
    ("S3", "parameters and computation"): (LD, FD, AD),
    ("S4", "Teacher Init"): (TeacherInit(),),
    ("S4", "Teacher Group"): (AssignmentDistillation(matching="own"),),
    ("S4", "Teacher Assigned"): (AD,),
}


@pytest.mark.slow
def test_rows_of_detrdistill_learn_what_they_say() -> None:
    """And nothing of the detector changes but the stages of Table 4."""
    rows = {
        (table, label): command for table, label, command in re.findall(r"^\| (S?\d) \| (.*) \| .*`([^`]+)` \|$", DISTILL, re.MULTILINE)
    }
    assert rows.keys() == ROWS.keys()
    student = find("detrdistill-deformable-detr-r101-r50-50ep").detector
    for (table, label), command in rows.items():
        (recipe,) = understand(written_out(command))
        learned = tuple(o for o in recipe.objectives if not isinstance(o, (SetPrediction, Denoising)))
        assert learned == ROWS[table, label], (table, label)
        if "detrdistill-dino" in written_out(command) or "-r18-" in written_out(command):
            continue
        stages = [int(n) for n in label[:3].split("/")] if table == "4" else [6, 6]
        of_table = find("detrdistill-conditional-detr-r101-r50-12ep").detector if table == "4" else student
        transformer = replace(of_table.transformer, encoder_layers=stages[0], decoder_layers=stages[1])
        assert recipe.detector == replace(of_table, transformer=transformer), (table, label)
        assert (recipe.training.epochs, recipe.training.drop_epochs) == ((12, (11,)) if table == "4" else (50, (40,))), (table, label)


SECTIONS = {
    name: PAGE.partition(f"## {name} and its ablations")[2].partition("\n## ")[0] for name in ("Stable-DINO", "OD-DETR", "DETRDistill")
}
NAMED = {  # of each paper's tables what its rows may differ in
    "Stable-DINO": {
        "6": "criterion.class_target criterion.class_cost criterion.loss_weights.label detector.transformer.fusion",
        "7": "criterion.class_target",
        "8": "criterion.loss_weights.label",
        "9": "criterion.class_cost criterion.cost_weights.label",
    },
    "OD-DETR": {
        "2": "objectives teachers criterion.class_target criterion.alpha",
        "3": "objectives criterion.class_target criterion.alpha",
        "4": "objectives",
        "5": "objectives teachers",
        "6": "objectives",
        "8": "objectives teachers criterion.class_target criterion.alpha detector.transformer.share_decoder",
        "9": "detector.transformer.share_decoder",
    },
    "DETRDistill": {
        "1": "objectives",
        "2": "objectives",
        "3": "objectives teachers",
        "4": "objectives teachers detector.transformer.encoder_layers detector.transformer.decoder_layers",
        "5": "objectives",
        "6": "objectives",
        "7": "objectives",
        "S4": "objectives",
    },
}


@pytest.mark.parametrize(("paper", "table"), [(paper, table) for paper, tables in NAMED.items() for table in tables])
def test_rows_of_a_table_differ_in_the_named_part_alone(paper: str, table: str) -> None:
    """Not in data, schedule, seed, decay or denoising; and what is reported for one of them is said of no other."""
    commands = re.findall(rf"^\| {table} \| .* \| (?:.*= )?`([^`]+)` \|$", SECTIONS[paper], re.MULTILINE)
    made = [understand(written_out(command))[0] for command in commands]
    assert len(made) > 1 or (paper == "Stable-DINO" and table in "89")  # whose one row stands for all
    plain = [to_plain(recipe, decisive=True) for recipe in made]
    denoising = {tuple(o for o in recipe.objectives if isinstance(o, Denoising)) for recipe in made}
    for command, other in zip(commands, plain, strict=True):
        changed = [line.partition(":")[0].partition("[")[0] for line in differences(plain[0], other) if not line.startswith("name:")]
        wrong = [name for name in changed if not name.startswith(tuple(NAMED[paper][table].split()))]
        assert not wrong, f"{command} differs from {commands[0]} in {wrong}"
    assert len(denoising) == 1
    for recipe in made:
        published = find(recipe.name) if recipe.name in names() else None
        same = published is not None and to_plain(published, decisive=True)["objectives"] == to_plain(recipe, decisive=True)["objectives"]
        assert not recipe.reported or same, f"{recipe.name} in table {table} shows {recipe.reported}, which is of other objectives"


def compared() -> list[str]:
    """The `compare` commands of the pages and of the command's own help."""
    pages = [(Path(__file__).parents[1] / page).read_text() for page in ("README.md", "docs/cli.md", "docs/recipes.md")]
    texts = [*pages, compare.DESCRIPTION]
    return sorted({command for text in texts for command in shown_commands(text) if command.startswith("steadydetr compare ")})


@pytest.mark.parametrize("command", compared())
def test_compared_recipes_train_alike(command: str) -> None:
    """On the same data, in the same way, with the same noise; only the method differs."""
    first, *others = understand(command)
    noise = [[replace(o, weights=None) for o in recipe.objectives if isinstance(o, Denoising)] for recipe in (first, *others)]
    for recipe, drawn in zip(others, noise[1:], strict=True):
        assert recipe.training == first.training and recipe.data == first.data
        assert drawn == noise[0]


def test_the_readme_shows_what_is_reported() -> None:
    """Every recipe of its table: the first number of what it reports, unless it reports none."""
    shown = shown_in_readme(-1)
    for name in names():
        if name in shown and (reported := re.search(r"\d+\.\d+", find(name).reported)):
            assert float(reported[0]) in shown[name], name
    assert len(shown.keys() & set(names())) > 40


@pytest.mark.parametrize("name", ["deformable-detr-r50-50ep", "od-deformable-detr-r50-24ep", "desk-small"])
def test_the_readme_shows_how_large_detectors_are(name: str) -> None:
    with torch.device("meta"):
        detector = find(name).detector.without_pretrained().build(80)
    assert round(sum(parameter.numel() for parameter in detector.parameters()) / 1e6, 1) in shown_in_readme(2)[name]


def shown_in_readme(column: int) -> dict[str, set[float]]:
    """The numbers in a column of README's table, by recipe."""
    text = (Path(__file__).parents[1] / "README.md").read_text().partition("## Detectors and recipes")[2].partition("\n## ")[0]
    shown: dict[str, set[float]] = {}
    for cells in (line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "`" in line):
        for word in re.findall(r"`([\w{},-]+)`", cells[1]):
            for name in expanded(word):
                shown[name] = {float(number) for number in re.findall(r"\d+\.\d+", cells[column])}
    return shown


def expanded(word: str) -> list[str]:
    """a-{b,c} as a-b and a-c."""
    found = re.fullmatch(r"(.*?)\{([^}]*)\}(.*)", word)
    return [word] if found is None else [name for part in found[2].split(",") for name in expanded(found[1] + part + found[3])]


def other_choices() -> list[str]:
    """The flags of DETRDistill's "Other choices", those that begin with a dot written out."""
    (text,) = re.findall(r"^Other choices: (.*)$", DISTILL, re.MULTILINE)
    found: list[str] = []
    for fragment in re.findall(r"`((?:--|\.)[^`]+)`", text):
        found.append(re.sub(r"^\.", found[-1].split()[0].rpartition(".")[0] + "." if found else "", fragment))
    return found


@pytest.mark.parametrize("flags", other_choices())
def test_other_choices_of_detrdistill_change_an_objective(flags: str) -> None:
    value = " 3" if flags.endswith(".weight") else ""
    (recipe,), (plain,) = understand(f"{written_out('X')} {flags}{value}"), understand(written_out("X"))
    assert recipe.objectives != plain.objectives and replace(recipe, objectives=plain.objectives) == replace(plain, reported="")
