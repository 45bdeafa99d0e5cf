"""Comparisons: the statistics, what is trained, kept and resumed, and what is said of failures."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from steadydetr.cli import main
from steadydetr.files import MARKER, claim_folder
from steadydetr.tools.compare import Difference, compare_recipes, paired_difference, with_labels
from tests.test_train import tiny

# a training that takes no time: AP is 10 * seed, and 3 more for the recipe called better
FAKE = """
import json, sys
from pathlib import Path
recipe, output = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--output") + 1])
seed = int(sys.argv[sys.argv.index("--seed") + 1])
if "broken" in str(recipe):
    sys.exit("no luck")
better = 3 if "better" in str(recipe) else 0
output.mkdir(parents=True, exist_ok=True)
with open(output.parent / "calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
(output / "summary.json").write_text(json.dumps({"ap": 10.0 * seed + better, "ap50": 60.0, "seconds": 1.0}))
record = {"kind": "stability", "step": 1, "epoch": 1, "weights": "model", "unstable_score": {"1": 30.0, "2": 20.0 - better}}
record |= {"between_stages": [], "between_epochs": None, "consistency": None}
(output / "metrics.jsonl").write_text(json.dumps(record) + "\\n")
"""


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    (tmp_path / "fake.py").write_text(FAKE)
    return [sys.executable, str(tmp_path / "fake.py")]


def test_interval_is_students() -> None:
    values, baseline = [50.0, 52.0, 51.0], [48.0, 51.5, 50.0]
    found = paired_difference(values, baseline)
    half = 4.30265272974946 * math.sqrt((25 / 36 + 16 / 36 + 1 / 36) / 2) / math.sqrt(3)  # t of 2 degrees of freedom; deltas 2, 0.5, 1
    assert (found.mean, found.low, found.high) == pytest.approx((3.5 / 3, 3.5 / 3 - half, 3.5 / 3 + half), abs=1e-11)
    equal = paired_difference([3.0, 13.0, 23.0], [0.0, 10.0, 20.0])
    assert (equal.mean, equal.low, equal.high) == pytest.approx((3.0, 3.0, 3.0), abs=1e-12)
    assert paired_difference([3.0], [1.0]) == Difference(2.0, None, None)


def test_every_recipe_with_every_seed(tmp_path: Path, fake: list[str]) -> None:
    said: list[str] = []
    recipes = with_labels([("base", tiny()), ("better", tiny(lr=0.1))])
    outcomes = compare_recipes(recipes, 3, tmp_path / "out", jobs=2, launch=fake, say=said.append)
    assert [o.metrics["ap"] for o in outcomes["better"]] == [3.0, 13.0, 23.0]
    assert outcomes["better"][0].metrics["unstable_score"] == 17.0
    table = (tmp_path / "out/comparison.md").read_text()
    assert "+3.0 [+3.0, +3.0]" in table and "10.0 ± 10.0" in table
    assert json.loads((tmp_path / "out/comparison.json").read_text())["base"][1]["metrics"]["ap"] == 10.0
    before = (tmp_path / "out/base/calls").read_text()
    compare_recipes(recipes, 3, tmp_path / "out", launch=fake, say=said.append)
    assert (tmp_path / "out/base/calls").read_text() == before  # finished runs are kept
    assert "6 are done, 0 to train" in said[-1]
    compare_recipes(recipes, 4, tmp_path / "out", launch=fake, say=said.append)
    assert len((tmp_path / "out/base/calls").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ["a", "a/seed0", "a/seed0.log"])
def test_links_in_a_comparison_are_not_followed(name: str, tmp_path: Path, fake: list[str]) -> None:
    """They would let whoever made the folder choose where recipes, runs and logs are written."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine").write_text("mine")
    claim_folder(tmp_path / "out", "compare")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).symlink_to(tmp_path / ("mine" if name.endswith("log") else "elsewhere"))
    with pytest.raises(FileExistsError, match=r"out/a.* is a link, which is not followed: choose another --output"):
        compare_recipes(with_labels([("a", tiny())]), 1, tmp_path / "out", launch=fake, say=str)
    assert (tmp_path / "mine").read_text() == "mine" and not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_of_other_recipes_is_left_alone(tmp_path: Path, fake: list[str]) -> None:
    """Version 0.1 left no mark, but its folders hold the recipes of their labels."""
    recipes = with_labels([("a", tiny())])
    (tmp_path / "cook/pasta").mkdir(parents=True)
    (tmp_path / "cook/comparison.md").write_text("mine")
    (tmp_path / "cook/pasta/recipe.json").write_text('{"kind": "pasta"}')
    with pytest.raises(FileExistsError, match="no command of steadydetr has made it: choose another --output"):
        compare_recipes(recipes, 1, tmp_path / "cook", launch=fake, say=str)
    (tmp_path / "cook/a").mkdir()
    (tmp_path / "cook/a/recipe.json").write_text('{"kind": "pasta"}')
    with pytest.raises(ValueError, match=r"a/recipe\.json: there is no 'pasta'"):
        compare_recipes(recipes, 1, tmp_path / "cook", launch=fake, say=str)
    assert (tmp_path / "cook/comparison.md").read_text() == "mine" and not (tmp_path / "cook" / MARKER).exists()
    compare_recipes(recipes, 1, tmp_path / "out", launch=fake, say=str)
    (tmp_path / "out" / MARKER).unlink()
    compare_recipes(recipes, 2, tmp_path / "out", launch=fake, say=str)


def test_another_recipe_under_a_label_is_refused(tmp_path: Path, fake: list[str]) -> None:
    compare_recipes({"base": tiny()}, 1, tmp_path / "out", launch=fake)
    with pytest.raises(ValueError, match=r"holds runs of another recipe.*training\.lr: 0\.001 -> 0\.1"):
        compare_recipes({"base": tiny(lr=0.1)}, 1, tmp_path / "out", launch=fake)
    stored = tmp_path / "out/base/recipe.json"
    plain = json.loads(stored.read_text())
    del plain["teachers"], plain["training"]["accumulation"]
    stored.write_text(json.dumps(plain))
    compare_recipes({"base": tiny()}, 1, tmp_path / "out", launch=fake)  # an earlier version did not know these fields
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        compare_recipes({"a/b": tiny()}, 1, tmp_path / "out", launch=fake)
    with pytest.raises(ValueError, match="stands for two recipes"):
        with_labels([("a", tiny()), ("a", tiny(lr=0.1))])


def test_failures_are_named_and_the_others_finished(tmp_path: Path, fake: list[str]) -> None:
    said: list[str] = []
    with pytest.raises(ChildProcessError, match=r"2 of 4 runs failed.*broken/seed0\.log"):
        compare_recipes({"base": tiny(), "broken": tiny(lr=0.1)}, 2, tmp_path / "out", launch=fake, say=said.append)
    assert sum("broken/seed" in line and "its last line: " in line and "no luck" in line for line in said) == 2
    assert "no luck" in (tmp_path / "out/broken/seed0.log").read_text()
    assert "| base | 2 |" in (tmp_path / "out/comparison.md").read_text()


@pytest.mark.slow
def test_interrupted_runs_go_on_and_unsaved_ones_start_anew(tmp_path: Path) -> None:
    """With real trainings, a few steps long."""
    recipe = replace(tiny(epochs=1), name="base")
    folder = tmp_path / "out/base/seed0"
    claim_folder(tmp_path / "out", "compare")
    claim_folder(folder, "train")  # as if killed before its first checkpoint
    said: list[str] = []
    outcomes = compare_recipes({"base": recipe}, 1, tmp_path / "out", say=said.append)
    assert len(outcomes["base"]) == 1
    (folder / "summary.json").unlink()
    assert len(compare_recipes({"base": recipe}, 1, tmp_path / "out", say=said.append)["base"]) == 1
    assert "base, seed 0: starts" in said and "base, seed 0: goes on" in said


def test_command_line(tmp_path: Path, fake: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "small-dino", "better=small-dino --criterion.class-cost position-modulated", "--seeds", "2"]
    main(
        [
            *words,
            "--output",
            str(tmp_path / "out"),
            "--launch",
            " ".join(fake),
            "--data",
            "shapes:images=16",
            "--",
            "--training.epochs",
            "2",
        ]
    )
    assert "better" in capsys.readouterr().out
    plain = json.loads((tmp_path / "out/better/recipe.json").read_text())
    assert plain["training"]["epochs"] == 2 and plain["data"]["source"] == "shapes:images=16" and plain["name"] == "better"
    assert plain["criterion"]["class_cost"]["kind"] == "position-modulated-cost"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["small-dino"], "at least two recipes"),
        (["small-dino", "small-dinoo"], "did you mean 'small-dino'"),
        (["small-dino", "quickstart", "--seeds", "0"], "--seeds 0 must lie in 1"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["compare", *words, "--output", str(tmp_path / "out")])
    assert exit_.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
