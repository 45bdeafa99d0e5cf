"""JSON files and files of tensors with something wrong in them: they are read rightly, or refused by an error that a user can mend.

`STEADYDETR_FUZZ=5000` in the environment tries so many of each kind instead of a few dozen.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from steadydetr import load
from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.convert import convert_state_dict, load_foreign
from steadydetr.checkpoints.folder import load_progress, load_training_state, save_detector
from steadydetr.cli import USER_ERRORS
from steadydetr.config import read_recipe, to_plain
from steadydetr.data.transforms import FixedSize
from steadydetr.drawing.report import page_sections
from steadydetr.recipes import find
from steadydetr.runs.models import average_state, load_models
from steadydetr.runs.records import read_runs
from tests.conftest import CLASSES, DETECTORS

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 10**9, 10**400, 0.5, -0.5, 1e308, 1e-320, float("nan"), float("inf")),
    *("", "x", "x" * 5000, "../../../etc/passwd", "/dev/zero", "https://example.org/x", "\\\\host\\share", "\x1b[2J", "a\0b", "\ud800"),
    *("hf-hub:attacker/beacon", "local-dir:/tmp", "steadydetr.__main__", "os.system", "builtins:exec", "dino", "half-sine"),
    *([], [1], [[]], ["x"] * 2000, [{}], {}, {"kind": []}, {"kind": "steadydetr.__main__"}, {"type": "os.system"}),
    *({"function": "os.system"}, {"kind": "half-sine"}, {"kind": "focal-cost"}, {"kind": "recipe"}, {"kind": "x:y"}, {"format": 99}),
    *({"kind": "fixed-size", "height": 10**6}, {"kind": "transformer", "decoder_layers": 10**6}),
    {"kind": "timm-backbone", "name": "hf-hub:attacker/beacon"},
)
SEEDS = st.integers(0, 2**32)
Change = Callable[[random.Random], None]
fuzz = settings(
    max_examples=int(os.environ.get("STEADYDETR_FUZZ", "40")),
    derandomize="STEADYDETR_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt to reach the network is none of the errors that are allowed."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a file reached the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with averaged weights in its training state."""
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    config = DETECTORS["deformable"]
    state = config.build(CLASSES).state_dict()
    card = DetectorCard(config, tuple("abcde"), tuple(range(CLASSES)), FixedSize(32, 32))
    save_detector(folder, state, card, {"method": {}, "teachers": {}, "average": dict(state), "optimiser": {}}, {"step": 1})
    return folder


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for one test."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def read_or_refuse(read: Callable[[], object]) -> None:
    """Read a file; the only exceptions allowed are those that the command line shows as one line."""
    try:
        read()
    except USER_ERRORS as error:
        assert str(error)


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Within the block the file has this content, afterwards its own again."""
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(original)


def changed(plain: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one or two things replaced, taken out or put in, anywhere in it."""
    result = copy.deepcopy(plain)
    for _ in range(chance.choice((1, 1, 2))):
        places = [(holder, key) for holder in containers(result) for key in (holder if isinstance(holder, dict) else range(len(holder)))]
        if not places:
            return chance.choice(ODD)
        holder, key = chance.choice(places)
        action = chance.randrange(8)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[chance.choice(("kind", "type", "function", "format", "", "x" * 5000, "\x1b[2J", "__class__"))] = chance.choice(ODD)
        elif action == 2:
            other, from_ = chance.choice(places)
            holder[key] = copy.deepcopy(other[from_] if from_ in other or (isinstance(other, list) and from_ < len(other)) else None)
        else:
            holder[key] = copy.deepcopy(chance.choice(ODD))
    return result


def containers(value: Any) -> Iterator[Any]:
    """Every list and dictionary in a JSON value, itself included."""
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def as_text(plain: Any, chance: random.Random) -> bytes:
    """The value as JSON text, in a quarter of the cases damaged."""
    text = json.dumps(plain).encode()
    damage = chance.randrange(12)
    if damage == 0:
        return text[: chance.randrange(len(text))]
    if damage == 1:
        return damaged(text, chance)
    return b"[" * 100_000 if damage == 2 else text


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A few bytes replaced, or a part left out."""
    result = bytearray(content)
    for _ in range(chance.randrange(1, 6)):
        result[chance.randrange(len(result))] = chance.randrange(256)
    if chance.randrange(4) == 0:
        start = chance.randrange(len(result))
        del result[start : start + chance.randrange(1, 100)]
    return bytes(result)


@given(seed=SEEDS)
@fuzz
def test_a_changed_config_of_a_checkpoint_is_read_or_refused(copied: Path, seed: int) -> None:
    chance, path = random.Random(seed), copied / "config.json"
    with replaced(path, as_text(changed(json.loads(path.read_bytes()), chance), chance)):
        read_or_refuse(lambda: load(copied, "cpu").predict(Image.new("RGB", (20, 30))))


@pytest.mark.parametrize("name", ["small-stable-dino", "small-distill-deformable-detr"])
@given(seed=SEEDS)
@fuzz
def test_a_changed_recipe_is_read_or_refused(tmp_path: Path, name: str, seed: int) -> None:
    chance, path = random.Random(seed), tmp_path / "recipe.json"
    path.write_bytes(as_text(changed(to_plain(find(name)), chance), chance))
    read_or_refuse(lambda: to_plain(read_recipe(path)))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json"])
@given(seed=SEEDS)
@fuzz
def test_a_report_of_a_run_with_a_changed_file_is_made_or_refused(run: Path, name: str, seed: int) -> None:
    chance, path = random.Random(seed), run / name
    lines = path.read_bytes().splitlines() if name == "metrics.jsonl" else [path.read_bytes()]
    chosen = chance.randrange(len(lines))
    lines[chosen] = as_text(changed(json.loads(lines[chosen]), chance), chance)
    with replaced(path, b"\n".join(lines) + b"\n"):
        read_or_refuse(lambda: page_sections(read_runs([run])))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without checkpoints, as it was recorded."""
    monkeypatch.setattr("steadydetr.drawing.plot.panel_svg", lambda *_: b"")
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = to_plain(replace(find("small-stable-dino"), notes=""))
    (folder / "config.json").write_text(json.dumps({"format": 2, "recipe": recipe, "classes": ["a"], "category_ids": [1]}))
    (folder / "summary.json").write_text(json.dumps({"finished": True, "seconds": 3.5, "ap": 1.0}))
    at = {"step": 4, "epoch": 1, "weights": "model"}
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": 4, "epoch": 0, "loss": 3.0, "losses": {"main/l1": 3.0}, "lr": 1e-4, "gradient_norm": 2.0}
        | {"images_per_second": 9.0, "memory_gib": 1.0, "measures": {"a": 1.0}},
        {"kind": "eval"} | at | {name: 1.0 for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")}
        | {name: 1.0 for name in ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large", "voc_ap50", "voc07_ap50")}
        | {"per_class": {"a": 1.0}, "per_class_ap50": {"a": 1.0}, "images": 3, "warnings": []},
        {"kind": "stability"} | at | {"unstable_score": {"1": 5.0, "2": 3.0}, "between_stages": [0.5], "between_epochs": 0.5}
        | {"consistency": [50.0, 60.0], "images": 4, "objects": 9},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "progress.pt"])
@given(seed=SEEDS)
@fuzz
def test_damaged_tensors_of_a_checkpoint_are_read_or_refused(copied: Path, name: str, seed: int) -> None:
    read: dict[str, Callable[[], object]] = {
        "model.safetensors": lambda: load_models(copied, "cpu"),
        "training_state.pt": lambda: average_state(load_training_state(copied)),
        "progress.pt": lambda: load_progress(copied),
    }
    path = copied / name
    with replaced(path, damaged_tensors(path.read_bytes(), random.Random(seed))):
        read_or_refuse(read[name])


def damaged_tensors(content: bytes, chance: random.Random) -> bytes:
    """The file with damage in its header, in a number of its header, or in the pickle of a torch file; in one case of four, anywhere."""
    if chance.randrange(4) == 0:
        return damaged(content, chance)
    if content[:2] == b"PK":
        method = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(file := io.BytesIO(), "w", method) as after:
            for entry in before.infolist():
                part = before.read(entry)
                after.writestr(entry.filename, damaged(part, chance) if entry.filename.endswith("data.pkl") else part)
        return file.getvalue()
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    if chance.randrange(2):
        numbers = list(re.finditer(rb"\d+", header))
        number = chance.choice(numbers)
        header = header[: number.start()] + str(chance.choice((0, 1, 10**12, 10**30, -1))).encode() + header[number.end() :]
    else:
        header = damaged(header, chance)
    return len(header).to_bytes(8, "little") + header + rest


@given(seed=SEEDS)
@fuzz
def test_a_damaged_checkpoint_of_another_project_is_converted_or_refused(foreign: bytes, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "foreign.pth"
    path.write_bytes(damaged_tensors(foreign, random.Random(seed)))
    read_or_refuse(lambda: convert_state_dict(load_foreign(path)))


@pytest.fixture(scope="module")
def foreign() -> bytes:
    """Keys of the original Deformable DETR, which are recognised, with tensors that are not enough."""
    keys = ("transformer.level_embed", "query_embed.weight", "class_embed.0.bias", "bbox_embed.0.layers.0.weight")
    torch.save({"model": {key: torch.zeros(4, 8) for key in keys}, "epoch": 3, "args": None}, file := io.BytesIO())
    return file.getvalue()
