"""A run for the report to show, and what reads a page."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steadydetr.files import write_json
from steadydetr.training.loop import train
from tests.test_train import tiny

EVIL = "<script>alert(1)</script>"
Record = dict[str, Any]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a run can have."""
    folder = tmp_path_factory.mktemp("report") / "whole"
    train(tiny(ema_decay=0.9, stability_images=8), folder, device="cpu")
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the trained run under another name, its records changed or dropped by a function."""

    def make(name: str = "run", change: Callable[[Record], Record | None] = lambda record: record, finished: bool = True) -> Path:
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        path = folder / "metrics.jsonl"
        records = [change(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records if record))
        if not finished:
            for file in ("summary.json", "predictions.png", "curves.png"):
                (folder / file).unlink()
        return folder

    return make


def rewrite(path: Path, change: Callable[[Record], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def titles(page: str) -> list[str]:
    """Of the figures."""
    return [html.unescape(alt).split(" over ")[0] for alt in re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="([^"]*)"', page)]
