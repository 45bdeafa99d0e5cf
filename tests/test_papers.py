"""The tables of the papers: every row's command makes what the row says, and runs are shown beside the rows that they are of."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steadydetr.cli import main
from steadydetr.cli.console import PlainConsole
from steadydetr.cli.paper import command, grid_of, recipe_of
from steadydetr.config import FORMAT, differences, to_plain
from steadydetr.learning.teachers import TrainedTeacher
from steadydetr.metrics.table import REQUIRED_NAMES
from steadydetr.objectives import (
    FGD,
    FGFI,
    FKD,
    MGD,
    AssignmentDistillation,
    Denoising,
    FeatureDistillation,
    LogitsDistillation,
    Objective,
    SetPrediction,
    TeacherInit,
)
from steadydetr.papers import SMALL, Row, Table, at_small_scale, find_table, paper_names, read_paper
from steadydetr.recipes import find, names
from steadydetr.recipes.base import Recipe
from steadydetr.tools import papers
from tests.commands import understand
from tests.write_recipes_page import PAGE, page

TABLES = [table for name in paper_names() for table in read_paper(name).tables]
COMMANDS = sorted({row.words for table in TABLES for row in table.rows if row.words})
TEXTS = Path(__file__).parents[2] / "shared" / "papers"


def test_the_page_is_made_of_the_tables() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.write_recipes_page"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_rows_are_whole(table: Table) -> None:
    """A value for each column, and a label of its own."""
    assert len({row.label for row in table.rows}) == len(table.rows)
    assert all(len(row.reported) in (0, len(table.columns)) for row in table.rows)


@pytest.mark.parametrize("name", paper_names())
def test_reported_numbers_stand_in_the_paper(name: str) -> None:
    """In its text as it was extracted, in which columns and rows may be torn apart."""
    if not TEXTS.exists():
        pytest.skip(f"{TEXTS} is not there")
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob(f"{name}*.txt")))
    numbers = set(re.findall(r"\d+(?:\.\d+)?", text))
    digits = re.sub(r"\D", "", text)  # 24.49 is torn into "24." and "49", and 40.6 is printed as 406
    for table in read_paper(name).tables:
        for row in table.rows:
            for value in row.reported:
                written = str(value) if isinstance(value, str) else f"{value:g}"
                known = written == "-" or {written, f"{value}", f"{value:.2f}"} & numbers if not isinstance(value, str) else True
                assert known or written.replace(".", "") in digits, (table.name, row.label, value)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_make_what_can_be_built(words: tuple[str, ...]) -> None:
    """Every objective has its teacher, and every flag is understood."""
    (recipe,) = understand(" ".join(("steadydetr", *words)))
    if words[0] == "distill":
        assert recipe.teachers[-1] == TrainedTeacher(words[words.index("--teacher") + 1])
    if words[0] == "train":
        with torch.device("meta"):
            replace(recipe, detector=recipe.detector.without_pretrained()).build(91)


def test_teachers_of_commands_are_trained_by_a_command() -> None:
    for name in paper_names():
        paper = read_paper(name)
        named = {
            row.words[row.words.index("--teacher") + 1] for table in paper.tables for row in table.rows if row.words[:1] == ("distill",)
        }
        assert named == paper.teachers.keys()
        assert all(recipe_of(Row("", (), words=words)).teachers == () for words in paper.teachers.values())


def test_what_a_recipe_reports_is_what_its_row_reports() -> None:
    """A recipe that names a table has the AP of that table's row."""
    for name in names():
        recipe = find(name)
        known = re.fullmatch(r"([\d.]+) \(Table (\d+).*\)", recipe.reported)
        if known is None or name.startswith("detrdistill"):
            continue
        paper = "stable-dino" if name.startswith("stable-") else "od-detr"
        _, table = find_table(f"{paper}:{known[2]}")
        rows = [row for row in table.rows if row.words[:2] == ("train", name) and len(row.words) == 2]
        column = table.columns.index("AP") if "AP" in table.columns else table.columns.index("mask AP")
        assert [f"{row.reported[column]}" for row in rows] == [known[1]], name


LD, FD, AD = LogitsDistillation(), FeatureDistillation(), AssignmentDistillation()
FEATURES = {"FGD": FGD(), "FKD": FKD(), "MGD": MGD(), "FGFI": FGFI(), "FitNet": FeatureDistillation(mask="ones")}
LEARNED: dict[str, dict[str, tuple[Objective, ...]]] = {  # of DETRDistill's tables: what their rows learn from the teacher
    "1": {"Baseline w/o KD": ()} | {label: (objective,) for label, objective in FEATURES.items()},
    "2": {"Baseline w/o KD": (), "KD w/ Eq. 6": (FeatureDistillation(mask="mean"),), "KD w/ Eq. 8": (FD,)},
    "5": {"None": (), "LD": (LD,), "FD": (FD,), "AD": (AD,), "LD + FD": (LD, FD), "LD + FD + AD": (LD, FD, AD)},
    "6": {
        "none": (),
        "positive classes": (LogitsDistillation(positive_box=False, negative_box=False),),
        "positive boxes": (LogitsDistillation(positive_class=False, negative_box=False),),
        "negative boxes": (LogitsDistillation(positive_class=False, positive_box=False),),
        "positive classes and boxes": (LogitsDistillation(negative_box=False),),
        "positive and negative boxes": (LogitsDistillation(positive_class=False),),
        "all": (LD,),
    },
    "7": {"Baseline": (), "Last-stage Distillation": (LogitsDistillation(stages="last"),), "Progressive Distillation": (LD,)},
    "S4": {
        "teacher": (),
        "student": (),
        "Teacher Init": (TeacherInit(),),
        "Teacher Group": (AssignmentDistillation(matching="own"),),
        "Teacher Assigned": (AD,),
    },
}
LEARNED["3"] = {
    f"{detector}, {label}": learned
    for detector in ("AdaMixer", "Deformable DETR", "Conditional DETR")
    for label, learned in {"teacher": (), "student": (), "DETRDistill": (LD, FD, AD), **LEARNED["1"]}.items()
    if label not in ("Baseline w/o KD", "FKD", "FGFI")
}
STAGES = ("6/6", "6/3", "3/6", "3/3")
LEARNED["4"] = {"teacher, 6/6": ()} | {
    f"{n}, {label}": w for n in STAGES for label, w in {"student": (), "DETRDistill": (LD, FD, AD)}.items()
}


@pytest.mark.parametrize("number", LEARNED)
def test_rows_of_detrdistill_learn_what_they_say(number: str) -> None:
    """From the teacher; and all trains as long."""
    _, table = find_table(f"detrdistill:{number}")
    made = {row.label: recipe_of(row) for row in table.rows}
    own = (SetPrediction, Denoising)
    assert {label: tuple(o for o in recipe.objectives if not isinstance(o, own)) for label, recipe in made.items()} == LEARNED[number]
    if "epochs" in table.columns:
        assert all(made[row.label].training.epochs == row.reported[table.columns.index("epochs")] for row in table.rows)
    else:
        assert {recipe.training.epochs for recipe in made.values()} == {12}


NAMED = {  # what the rows of a table may differ in
    "stable-dino:6": "criterion.class_target criterion.class_cost criterion.loss_weights.label detector.transformer.fusion",
    "stable-dino:7": "criterion.class_target",
    "stable-dino:8": "criterion.loss_weights.label",
    "stable-dino:9": "criterion.class_cost criterion.cost_weights.label",
    "od-detr:2": "objectives teachers criterion.class_target criterion.alpha",
    "od-detr:3": "objectives criterion.class_target criterion.alpha",
    "od-detr:4": "objectives",
    "od-detr:5": "objectives teachers",
    "od-detr:6": "objectives",
    "od-detr:8": "objectives teachers criterion.class_target criterion.alpha detector.transformer.share_decoder",
    "od-detr:9": "detector.transformer.share_decoder",
    "detrdistill:1": "objectives teachers",
    "detrdistill:2": "objectives teachers",
    "detrdistill:5": "objectives teachers",
    "detrdistill:6": "objectives teachers",
    "detrdistill:7": "objectives teachers",
}


@pytest.mark.parametrize("name", NAMED)
def test_rows_of_a_table_differ_in_the_named_part_alone(name: str) -> None:
    """Not in data, schedule, seed, decay or denoising; and what is reported for one of them is said of no other."""
    _, table = find_table(name)
    made = [recipe_of(row) for row in table.rows]
    first, *others = (to_plain(replace(recipe, name=""), decisive=True) for recipe in made)
    denoising = {tuple(o for o in recipe.objectives if isinstance(o, Denoising)) for recipe in made}
    for row, other in zip(table.rows[1:], others, strict=True):
        wrong = [line for line in differences(first, other) if not line.startswith(tuple(NAMED[name].split()))]
        assert not wrong, f"{row.command} differs from {table.rows[0].command} in {wrong}"
    assert len(denoising) == 1
    for recipe in made:
        published = find(recipe.name) if recipe.name in names() else None
        same = published is not None and to_plain(published, decisive=True)["objectives"] == to_plain(recipe, decisive=True)["objectives"]
        assert not recipe.reported or same, f"{recipe.name} in table {name} shows {recipe.reported}, which is of other objectives"


def test_small_rows_keep_what_is_compared() -> None:
    """Flags of training, data and backbone are left out; a recipe without a small sister has no command."""
    _, table = at_small_scale(*find_table("od-detr:2"))
    assert [row.words[1] for row in table.rows] == ["small-refine-deformable-detr"] + ["small-od-deformable-detr"] * 4
    assert table.rows[0].words == ("train", "small-refine-deformable-detr", "--detector.transformer.share-decoder")
    paper, table = at_small_scale(*find_table("detrdistill:3"))
    assert "runs/dino-r101" not in paper.teachers or paper.teachers["runs/dino-r101"][1] in names()
    _, table = at_small_scale(*find_table("od-detr:11"))
    assert not any(row.words for row in table.rows)
    assert {*SMALL.values()} <= {*names()} and {*SMALL} <= {*names()}


@pytest.mark.parametrize("name", [table.name for table in TABLES])
def test_small_commands_are_understood(name: str) -> None:
    paper, table = at_small_scale(*find_table(name))
    for row in table.rows:
        if row.words:
            assert recipe_of(row).name and (row.words[0] == "train" or row.words[row.words.index("--teacher") + 1] in paper.teachers)


def other_choices() -> list[str]:
    """The flags of DETRDistill's "Other choices", those that begin with a dot written out."""
    (text,) = re.findall(r"^Other choices: (.*--objectives\.logits.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    found: list[str] = []
    for fragment in re.findall(r"`((?:--|\.)[^`]+)`", text):
        found.append(re.sub(r"^\.", found[-1].split()[0].rpartition(".")[0] + "." if found else "", fragment))
    return found


@pytest.mark.parametrize("flags", other_choices())
def test_other_choices_of_detrdistill_change_an_objective(flags: str) -> None:
    value = " 3" if flags.endswith(".weight") else ""
    words = read_paper("detrdistill").short["X"]
    plain, recipe = (recipe_of(Row("", (), words=(*words, *more))) for more in ((), (flags + value).split()))
    assert recipe.objectives != plain.objectives and replace(recipe, objectives=plain.objectives) == replace(plain, reported="")


def finished_run(folder: Path, recipe: Recipe, ap: float) -> None:
    folder.mkdir(parents=True)
    content = {"format": FORMAT, "recipe": to_plain(recipe), "classes": ["a"], "category_ids": [1], "data": {}}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "summary.json").write_text(json.dumps({"finished": True, "seconds": 1.0}))
    common = {"kind": "eval", "step": 1, "epoch": 1} | dict.fromkeys(REQUIRED_NAMES, 0.0) | {"per_class": {}}
    records = [common | {"weights": w, "ap": ap + more, "ap50": 2 * ap} for w, more in (("model", 0), ("ema", 1))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_tables_fit_a_narrow_terminal(table: Table) -> None:
    """80 columns show whole numbers and whole words above them."""
    console = PlainConsole(width=80)
    with console.capture() as capture:
        console.print(grid_of(table, {}))
    words = capture.get().split()
    assert "…" not in capture.get()
    assert all(word in words for row in table.rows for value in row.reported for word in str(value).split())
    assert all(word in words for column in table.columns for word in column.split())


def test_runs_are_shown_beside_the_row_that_they_are_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever their data and seed; runs of other recipes, unfinished ones and other files are passed over."""
    _, table = find_table("od-detr:7")
    dino, od = (recipe_of(row) for row in table.rows)
    for seed, ap in ((0, 40.0), (1, 42.0)):
        data = replace(dino.data, source=f"elsewhere{seed}")
        finished_run(tmp_path / "deep" / "er" / f"s{seed}", replace(dino, data=data, training=replace(dino.training, seed=seed)), ap)
    finished_run(tmp_path / "other", replace(od, training=replace(od.training, lr=1.0)), 30.0)
    finished_run(tmp_path / "unfinished", od, 30.0)
    (tmp_path / "unfinished" / "summary.json").unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    found = papers.measured({"a": dino, "b": od}, {"a": "ema", "b": "ema"}, ("epochs", "AP", "AP50", "AP75"), tmp_path)
    assert found == {"a": (2, ["-", "42.0 ± 1.4", "82.0 ± 2.8", "0.0 ± 0.0"])}
    assert papers.measured({"a": dino}, {"a": "model"}, ("AP",), tmp_path) == {"a": (2, ["41.0 ± 1.4"])}
    main(["paper", "od-detr:7", "--runs", str(tmp_path), "--data", "my data"])
    shown = capsys.readouterr().out
    assert "2 runs here" in shown and "42.0 ± 1.4" in shown and "50.7" in shown
    assert "steadydetr train dino-4scale-r50-24ep --training.ema-decay 0.9996 --data 'my data'" in shown


def test_tables_are_listed_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    main(["paper"])
    shown = capsys.readouterr().out
    assert all(f" {table.name} " in shown for table in TABLES)
    main(["paper", "stable-dino"])
    shown = capsys.readouterr().out
    assert "stable-dino:6" in shown and "od-detr" not in shown
    for words, message in {
        "od-dter": "there is no paper 'od-dter'; did you mean 'od-detr'?",
        "od-detr:77": "there is no table od-detr:77; of od-detr there are od-detr:1, od-detr:2",
        "od-detr --run": "--run needs a table",
        "detrdistill:S3 --run": "no row of detrdistill:S3 is trained",
        "od-detr:2 --run --seeds 0": "--seeds 0 must lie in",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["paper", *words.split()])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_rows_are_trained_after_their_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the teachers that were just trained, on the data that are named."""
    calls: list[tuple[dict[str, Recipe], int, Path]] = []
    monkeypatch.setattr(papers, "compare_recipes", lambda recipes, seeds, output, jobs, device: calls.append((recipes, seeds, output)))
    main(
        [
            "paper",
            "detrdistill:5",
            "--run",
            "--seeds",
            "2",
            "--data",
            "shapes:images=9",
            "--output",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    (teachers, once, place), (rows, seeds, output) = calls
    assert (once, place, seeds, output) == (1, tmp_path / "out" / "teachers", 2, tmp_path / "out" / "rows")
    assert [*teachers] == ["runs-adamixer-r101"] and [*rows] == ["none", "ld", "fd", "ad", "ld-fd", "ld-fd-ad"]
    trained = str(tmp_path / "out" / "teachers" / "runs-adamixer-r101" / "seed0")
    assert [recipe.teachers for recipe in rows.values()] == [(), *[(TrainedTeacher(trained),)] * 5]
    assert {recipe.data.source for recipe in (*teachers.values(), *rows.values())} == {"shapes:images=9"}


def test_commands_end_with_places() -> None:
    assert command(Row("", (), words=("train", "x")), None) == "steadydetr train x --data path/to/coco"
    assert command(Row("", (), words=("cost", "x")), "a b") == "steadydetr cost x"
    assert command(Row("", (), words=("distill", "x")), "a b") == "steadydetr distill x --data 'a b'"
