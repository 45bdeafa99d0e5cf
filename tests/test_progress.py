"""What a user sees of a run: every step, the rate, the time left, the phases, and at the end what came of it."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

import steadydetr.training.progress
from steadydetr.cli import main
from steadydetr.cli.train import show_result
from steadydetr.metrics.table import percent
from steadydetr.runs.folder import RunFolder
from steadydetr.runs.records import read_run
from steadydetr.training.pictures import best_detector
from steadydetr.training.progress import ConsoleWriter, Progress
from tests.test_cli import SHAPES, TINY


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that progress believes it is."""
    now = [1000.0]
    monkeypatch.setattr(steadydetr.training.progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then_with_rate_and_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.begin(100, 0)
    for step in range(1, 101):
        clock[0] += 2
        progress.step(step, 12.34)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/100  training  12.3 images/s"
    assert lines[1] == "step 9/100  training  12.3 images/s  0:03:02 left"
    assert lines[-1] == "step 100/100  training  12.3 images/s" and 12 < len(lines) < 16


def test_the_line_of_a_step_tells_what_was_logged_last(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.begin(2, 0)
    ConsoleWriter(progress, 31.25).write({"kind": "train", "step": 1, "epoch": 0, "loss": 4.5, "images_per_second": 1.0})
    progress.step(1, 8.0)
    assert capsys.readouterr().out == "step 1/2  epoch 1  loss 4.50  AP 31.2  8.0 images/s\n"


def test_an_evaluation_says_how_far_it_is(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in Progress().track(range(20), "evaluating the trained weights", 20):
        clock[0] += 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluating the trained weights: 1/20" and lines[-1] == "evaluating the trained weights: 17/20" and len(lines) == 5


def test_in_a_terminal_the_bar_moves_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.bar.live.console = progress.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress.live = True
    progress.begin(50, 10)
    for step in range(11, 14):
        progress.step(step, 5.0)
        assert progress.bar.tasks[0].completed == step and progress.bar.tasks[0].fields["rate"] == "5.0 images/s"
    inside = [[task.description for task in progress.bar.tasks] for _ in progress.track([1], "evaluating", 1)]
    assert inside == [["training", "evaluating"]] and len(progress.bar.tasks) == 1


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_number_of_the_bar_is_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    progress = Progress()
    progress.begin(1011, 0)
    progress.message = "epoch 12  loss 39.48  AP 10.0"
    progress.step(999, 12.3)
    screen = Console(file=io.StringIO(), width=width)
    screen.print(progress.bar.make_tasks_table(progress.bar.tasks))
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown and "999/1011" in shown and "-:--:-- left" in shown and ("12.3 images/s" in shown) == (width >= 60)
    assert all(word in shown for word in progress.message.split()), shown


@pytest.mark.parametrize("width", ["40", "80"])
def test_no_number_of_the_table_is_cut(trained: tuple[Path, str], width: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", width)
        show_result(trained[0])
    shown = capsys.readouterr().out
    table = shown.partition("\nIn ")[0]
    assert "…" not in shown and "medium" in table and max(len(line) for line in table.splitlines()) <= int(width), table


def evaluation(**values: Any) -> dict[str, Any]:
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    return {"kind": "eval", "step": 1, "epoch": 3, "weights": "ema", "warnings": (), **dict.fromkeys(names, 10.0), **values}


def test_sizes_that_no_object_has_are_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    assert percent(-1) == "-" and percent(0) == "0.0" and percent(12.345, 2) in ("12.35", "12.34")
    ConsoleWriter(Progress()).write(evaluation(ap_large=-1.0))
    assert capsys.readouterr().out == "epoch 3 (average weights): AP 10.0, AP50 10.0, AP75 10.0, small 10.0, medium 10.0, large -\n"


def test_a_note_on_masks_does_not_call_ap_low(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleWriter(Progress()).write(evaluation(ap=90.0, warnings=("2 of 9 annotations have no mask: no detected mask can find them",)))
    assert capsys.readouterr().out.splitlines()[1] == "  note on AP: 2 of 9 annotations have no mask: no detected mask can find them"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run in a folder with a blank in its name, and what its command printed."""
    folder, said = tmp_path_factory.mktemp("runs") / "a run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", said)
        main(["train", "quickstart", "--data", SHAPES, "--output", str(folder), "--training.epochs", "2", *TINY])
    return folder, said.getvalue()


def test_a_run_ends_with_a_table_its_files_and_what_comes_next(trained: tuple[Path, str]) -> None:
    folder, said = trained
    assert "Loading shapes:" in said and "Drawing pictures" in said
    (line,) = (line for line in said.splitlines() if line.startswith("{"))  # which only programs see: this is no terminal
    assert json.loads(line) == json.loads((folder / "summary.json").read_text())
    end = said[said.index(line) :]
    rows = [line.split() for line in end.partition("\nIn ")[0].splitlines()[1:] if re.search(r"\w", line)]
    assert [row[0] for row in rows] == ["weights", "epoch", "AP", "AP50", "AP75", "small", "medium", "large"], end
    assert rows[0][1] == "best:" and rows[0][3:] == ["trained", "average"] and {len(row) for row in rows[1:]} == {4}, end
    assert all(name in end for name in ("predictions.png", "curves.png", "summary.json", "best/, last/"))
    commands = [shlex.split(line) for line in end.splitlines() if line.startswith("  steadydetr ")]
    assert [words[1] for words in commands] == ["report", "predict"] and {words[2] for words in commands} == {str(folder)}


def test_summary_and_pictures_say_whose_weights_they_show(trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = trained
    summary, best = RunFolder(folder).read_summary(), read_run(folder, "run").best
    assert summary is not None and best is not None
    assert (summary["best_ap"], summary["best_weights"], summary["best_epoch"]) == (best["ap"], best["weights"], best["epoch"])
    assert Image.open(folder / "predictions.png").width > 100


def test_a_table_of_a_run_that_found_nothing(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Evaluations are missing where metrics.jsonl was taken away."""
    folder, _ = trained
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    show_result(tmp_path)
    assert f"steadydetr report {tmp_path}" in capsys.readouterr().out


def test_pictures_show_the_best_detector(trained: tuple[Path, str]) -> None:
    folder, _ = trained

    class Finished:
        pass

    run: Any = Finished()
    run.folder, run.accelerator, run.state, run.method = RunFolder(folder), Finished(), Finished(), Finished()
    run.accelerator.device, run.method.student = "cpu", "the student"
    run.state.best_weights, run.state.best_epoch = "ema", 2
    detector, whose = best_detector(run)
    assert detector != "the student" and whose == "best, average weights of epoch 2"
    run.folder = RunFolder(folder / "best")
    assert best_detector(run) == ("the student", "trained weights")
