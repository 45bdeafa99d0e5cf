"""Further sinks of a run: they get every record, and a broken one loses neither the run nor its files."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from steadydetr.kinds import register
from steadydetr.runs.folder import RunFolder
from steadydetr.runs.sinks import JSONLines, RunLog, Sink, SinkWriter, open_sinks
from steadydetr.training.loop import train
from tests.test_train import tiny


@register("to-file")
@dataclass(frozen=True)
class ToFile(Sink):
    """Everything that it gets as lines of a file in the run folder; fails at a record of the kind `fails_at`."""

    called: str = "to-file"
    fails_at: str = ""

    @property
    def name(self) -> str:
        return self.called

    def open(self, folder: Path, recipe: dict[str, Any], resumed_step: int) -> SinkWriter:
        if self.fails_at == "open":
            raise ImportError("the tracker is not installed")
        return FileWriter(folder / self.called, self.fails_at, f"open {recipe['name']} {resumed_step}")


class FileWriter(SinkWriter):
    def __init__(self, path: Path, fails_at: str, first: str) -> None:
        self.path, self.fails_at = path, fails_at
        self.add(first)

    def add(self, line: str) -> None:
        with open(self.path, "a") as file:
            file.write(f"{line}\n")

    def write(self, record: dict[str, Any]) -> None:
        if record["kind"] == self.fails_at:
            raise RuntimeError("no network")
        self.add(json.dumps(record))
        record.clear()  # what a sink does with its record is nobody else's matter

    def say(self, message: str) -> None:
        self.add(f"say {message}")

    def close(self) -> None:
        self.add("close")
        if self.fails_at == "close":
            raise RuntimeError("still no network")


def lines_of(run: Path, name: str = "to-file") -> list[str]:
    return (run / name).read_text().splitlines()


def test_sinks_get_every_record_and_a_broken_one_is_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sinks = (ToFile("broken", fails_at="eval"), ToFile())
    recipe = replace(tiny(epochs=1, stability_images=4), sinks=sinks)
    assert train(recipe, tmp_path / "run", device="cpu")["finished"]
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["kind"] for record in records] == [*["train"] * 6, "eval", "stability"]
    first, *rest, last = lines_of(tmp_path / "run")
    assert (first, last) == ("open tiny 0", "close")
    assert [line for line in rest if not line.startswith("say ")] == records
    assert any(line.startswith("say tiny: ") for line in rest)
    broken = [line for line in lines_of(tmp_path / "run", "broken") if not line.startswith("say ")]
    assert broken == ["open tiny 0", *records[:6], "close"]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("The sink broken failed and is closed; the run goes on without it. RuntimeError: no network") == 1


def test_a_sink_that_cannot_be_opened_stops_before_the_run_is_there(tmp_path: Path) -> None:
    sinks = (ToFile(), ToFile("absent", fails_at="open"))
    with pytest.raises(ImportError, match="not installed"):
        train(replace(tiny(epochs=1), sinks=sinks), tmp_path / "run", device="cpu")
    assert lines_of(tmp_path / "run") == ["open tiny 0", "close"]
    assert not RunFolder(tmp_path / "run").is_started  # so that the same command works once the cause is gone
    with pytest.raises(ValueError, match="names of their own"):
        open_sinks((ToFile(), ToFile()), tmp_path, {}, 0)


def test_where_a_resumed_run_goes_on(tmp_path: Path) -> None:
    open_sinks((ToFile(),), tmp_path, {"name": "mine"}, 12)["to-file"].close()
    assert lines_of(tmp_path) == ["open mine 12", "close"]


def test_a_sink_that_fails_to_close_is_said(tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(SinkWriter):
        def write(self, record: dict[str, Any]) -> None: ...
        def say(self, message: str) -> None:
            said.append(message)

    log = RunLog((Listener(),), open_sinks((ToFile(fails_at="close"),), tmp_path, {"name": "mine"}, 0))
    log.close()
    log.close()
    assert said == ["The sink to-file failed and is closed; the run goes on without it. RuntimeError: still no network"]


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/training.md shows a whole sink; tensorboard itself need not be installed."""
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int) -> None:
            calls.append((folder.name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append(("closed",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    page = (Path(__file__).parents[1] / "docs/training.md").read_text()
    start, end = page.index("    from dataclasses import dataclass\n"), page.index("Sinks live in the main process")
    names: dict[str, Any] = {"__name__": __name__}
    exec(textwrap.dedent(page[start:end]), names)
    log = RunLog((), open_sinks((names["TensorBoard"](),), tmp_path, {}, 12))
    log.write({"kind": "train", "step": 13, "loss": 3.5, "losses": {"main/l1": 1.5}})
    log.write({"kind": "eval", "step": 13, "weights": "ema", "ap": 7.25, "per_class": {"disc": 1.0}})
    log.close()
    train_calls = [("train//loss", 3.5, 13), ("train//main/l1", 1.5, 13)]
    assert calls == [("tensorboard", 13), *train_calls, ("eval/ema/ap", 7.25, 13), ("closed",)]


def test_what_stands_in_the_run_folder_is_not_optional(tmp_path: Path) -> None:
    """A full disk must stop the run: its records would be lost."""
    with pytest.raises(OSError):
        RunLog((JSONLines(RunFolder(tmp_path / "gone")),)).write({"kind": "train"})


def test_records_are_trimmed_to_the_checkpoint(tmp_path: Path) -> None:
    """What remains keeps its bytes; a last line that was cut off by a kill is passed over."""
    folder = RunFolder(tmp_path)
    train_record = dict.fromkeys(("epoch", "loss", "losses", "lr", "gradient_norm", "images_per_second"), 0.1) | {"epoch": 0}
    for step in (1, 2, 3):
        folder.append_record({"kind": "train", "step": step} | train_record | {"losses": {"é/l1": float("nan")}})
    before = (tmp_path / "metrics.jsonl").read_text()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tr')
    folder.trim_records(2, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before.splitlines(keepends=True)[:2])
