"""The report: what it shows and says, of whole, unfinished and older runs, of one and of several."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from steadydetr.drawing.report import write_report
from steadydetr.runs.records import by_recipe, read_run, read_runs
from tests.report.conftest import Record, rewrite, text_of, titles
from tests.test_train import tiny

# one run


def test_one_run_shows_everything(copy: Callable[..., Path]) -> None:
    run = copy()
    path = write_report([run])
    assert path == run / "report.html"
    page = path.read_text()
    names = re.findall("<h2>(.*?)</h2>", page)
    assert names == [
        *("Runs", "Learning", "Average precision", "Average precision by class", "Stability of matching", "Losses"),
        *("Learning rate and gradient", "Speed and memory", "Predictions", "Where queries look", "Configuration"),
    ]
    assert re.findall(r'<a href="#(\w+)">', page) == re.findall(r'<section id="(\w+)">', page)
    terms = [f"{part}/{name}" for part in ("main", "proposals", "denoising") for name in ("class", "l1", "giou")]
    stability = [title for title in titles(page) if "nstab" in title or "Consistency" in title]
    assert len(stability) == 6 and len(titles(page)) == 4 + 6 + 1 + 9 + 2 + 2 and set(terms) < set(titles(page))
    assert page.count("data:image/jpeg") == 2 and 'class="lacks"' not in page


def test_facts_and_tables(copy: Callable[..., Path]) -> None:
    run = copy()
    records = read_run(run, "run")
    last, summary = records.last("eval", "model"), json.loads((run / "summary.json").read_text())
    assert last is not None and records.best is not None
    text = text_of(write_report([run]).read_text())
    best = f"{records.best['ap']:.1f} epoch {records.best['epoch']}"
    assert re.search(rf"run tiny {best}, \w+ finished 2 of 2 12 of 12 48 {summary['seconds']:.0f} s", text)
    assert records.parameters is not None and f"{records.parameters / 1e6:.2f} M 0" in text
    assert re.search(rf"run trained 12 {last['ap']:.1f} {last['ap50']:.1f} {last['ap75']:.1f}", text)
    assert "AR100 VOC AP50 VOC07 AP50" in text and f"{last['voc_ap50']:.1f} {last['voc07_ap50']:.1f} run" in text
    assert summary["voc07_ap50"] == last["voc07_ap50"] and summary["voc_ap50"] == last["voc_ap50"]
    assert "disc" in text and "transformer: transformer width: 16 heads: 2" in text


def test_parameters_are_those_of_the_detector(trained: Path) -> None:
    detector = tiny().detector.build(6)
    assert read_run(trained, "run").parameters == sum(p.numel() for p in detector.parameters())


def test_svg_shows_the_numbers_and_needs_nothing(trained: Path, tmp_path: Path) -> None:
    page = write_report([trained], tmp_path / "page.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "url(" not in page and "@import" not in page
    svg = base64.b64decode(re.findall(r"svg\+xml;base64,([^\"]+)", page)[0]).decode()
    assert "<svg" in svg and "<text" not in svg  # letters are outlines


# runs that lack something


def test_unfinished_run_with_a_half_written_line(copy: Callable[..., Path]) -> None:
    run = copy(change=lambda r: r if r["step"] < 9 else None, finished=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    text = text_of(write_report([run]).read_text())
    assert "not finished 1 of 2 8 of 12 32 about" in text
    assert "no predictions.png; a run draws it when it is finished" in text
    assert "run: needs two measurements at ends of epochs" in text


def test_run_that_has_just_begun(copy: Callable[..., Path]) -> None:
    run = copy(change=lambda r: None, finished=False)
    for name in ("last", "best"):
        shutil.rmtree(run / name)
    for records in ("", None):
        if records is None:
            (run / "metrics.jsonl").unlink()
        page = write_report([run]).read_text()
        assert not titles(page) and "not evaluated yet" in page and "no step logged yet" in page and "not measured yet" in page
        assert "not finished 0 of 2 0 0" in text_of(page)


def test_run_of_an_older_version(copy: Callable[..., Path]) -> None:
    """No stability, no memory, no average."""

    def older(record: Record) -> Record | None:
        record.pop("memory_gib", None)
        return None if record["kind"] == "stability" or record.get("weights") == "ema" else record

    page = write_report([copy(change=older)]).read_text()
    assert "run: not measured yet" in page and "run: its version logged none" in page
    assert "run: no averaged weights (training.ema_decay)" in page and "their average" not in page
    assert "Images per second" in titles(page) and "Peak memory, GiB" not in titles(page)


def test_values_that_are_not_finite_and_terms_of_zero(copy: Callable[..., Path]) -> None:
    def change(record: Record) -> Record:
        if record["kind"] == "train":
            record["gradient_norm"] = float("inf") if record["step"] == 3 else float("nan")
            record["losses"]["main/class"] = 0.0
            record["losses"]["$x^$_"] = -1.0
        return record

    page = write_report([copy(change=change)]).read_text()
    assert "main/class" in titles(page) and "$x^$_" in titles(page)
    assert "Gradient norm, before clipping" not in titles(page)


def test_long_runs_stay_small(copy: Callable[..., Path]) -> None:
    run = copy()
    path = run / "metrics.jsonl"
    record = next(r for r in map(json.loads, path.read_text().splitlines()) if r["kind"] == "train")
    with open(path, "a") as file:
        file.writelines(json.dumps(record | {"step": step}) + "\n" for step in range(13, 20_000))
    assert write_report([run]).stat().st_size < 2_000_000


def test_broken_predictions_are_said(copy: Callable[..., Path]) -> None:
    run = copy()
    (run / "predictions.png").write_bytes(b"\x89PNG\r\n")
    assert "its predictions.png cannot be read" in write_report([run]).read_text()


# several runs


def test_two_runs_side_by_side(copy: Callable[..., Path], tmp_path: Path) -> None:
    a, b = copy("a"), copy("b")

    def other(config: Record) -> None:
        config["recipe"]["training"]["lr"] = 0.5
        config["recipe"]["objectives"].pop()

    rewrite(b / "config.json", other)
    page = write_report([a, b], tmp_path / "both.html").read_text()
    text = text_of(page)
    assert "2 runs side by side" in text and "training.lr 0.001 0.5" in text
    assert "objectives.denoising.number" in text and "training.epochs" not in text
    assert page.count("data:image/jpeg") == 4 and "<b>" in page and "do not compare" not in page
    rewrite(b / "config.json", lambda config: config["recipe"]["data"].update(val_source="elsewhere"))
    assert "not evaluated on the same data" in write_report([a, b], tmp_path / "both.html").read_text()
    assert len(set(re.findall(r"background:(#\w+)", page))) == 2


def test_same_runs_differ_in_nothing(copy: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report([copy("a"), copy("b")], tmp_path / "both.html").read_text()
    assert "Nothing: all runs have the same recipe, seed and classes." in page


def test_folder_of_compare(copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs by their relative path, a colour for each label, what was moved aside left out, a run named twice taken once."""
    for label in ("base", "more"):
        for seed in (10, 2):
            folder = copy(f"out/{label}/seed{seed}")
            rewrite(folder / "config.json", lambda c, label=label, seed=seed: (c["recipe"].update(name=label), seeded(c, seed)))  # type: ignore[misc]
    copy("out/base/seed2-unsaved1")
    runs = read_runs([tmp_path / "out", tmp_path / "out/base/seed2"])
    assert [run.label for run in runs] == ["base/seed2", "base/seed10", "more/seed2", "more/seed10"]
    assert {name: len(members) for name, members in by_recipe(runs).items()} == {"base": 2, "more": 2}
    monkeypatch.chdir(tmp_path)
    page = write_report([tmp_path / "out"]).read_text()
    assert (tmp_path / "report.html").exists()
    assert len(set(re.findall(r"background:(#\w+)", page))) == 2
    assert "training.seed 2, 10 2, 10" in text_of(page)


def seeded(config: Record, seed: int) -> None:
    config["recipe"]["training"]["seed"] = seed


def test_runs_of_one_name_are_told_apart(copy: Callable[..., Path], tmp_path: Path) -> None:
    a, b = copy("a/run"), copy("b/run")
    """By the path from where they part."""
    assert [run.label for run in read_runs([a, b])] == ["a/run", "b/run"]
    assert [run.label for run in read_runs([copy("out/base/seed2")])] == ["base/seed2"]
