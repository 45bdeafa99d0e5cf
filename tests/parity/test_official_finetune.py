"""Checkpoints of other projects, of random weights in their real sizes and layouts, go through `finetune` to runs of other classes."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from steadydetr.checkpoints.folder import load_detector
from steadydetr.cli import main
from tests.parity.golden import OUTSIDE

CASES = {"original/keys/dino_4scale_r50.json": "DINO", "mmdet/keys/deformable_detr_r50.json": "DeformableDETR"}
SHORT = {"--data.workers": "0", "--training.epochs": "1", "--training.epoch-steps": "1", "--training.stability-images": "0"}
SMALL = {"--data.transform": "fixed-size", "--data.resize": "fixed-size", "--data.resize.height": "64", "--data.resize.width": "64"}
SMALL |= {"--data.transform.height": "64", "--data.transform.width": "64", "--training.batch-size": "2", "--device": "cpu"}


def random_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Norms that change nothing, small weights elsewhere. Heads are equal in all stages, as where they are shared."""

    def tensor(name: str, shape: list[int]) -> torch.Tensor:
        if len(shape) < 2:
            return torch.ones(shape) if name.endswith(("weight", "running_var")) else torch.zeros(shape)
        alike = re.sub(r"\.\d+", "", name.removeprefix("transformer.decoder.")) if "_embed." in name or "_branches." in name else name
        return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(alike.encode())))

    return {name: tensor(name, shape) for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}


def words(start: Path, output: Path, *more: str) -> list[str]:
    flags = [word for flag in (SHORT | SMALL).items() for word in flag]
    return ["finetune", str(start), "--data", "shapes:size=64,images=4", "--output", str(output), "--classes", "person=disc", *flags, *more]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_official_checkpoints_are_trained_on_for_other_classes(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, resumed for longer, evaluated; and they teach a small detector."""
    if not (OUTSIDE / case).exists():
        pytest.skip(f"{OUTSIDE / case} is not there")
    keys: Any = json.loads((OUTSIDE / case).read_text())
    start, run = tmp_path / "official.pth", tmp_path / "run"
    torch.save({"model" if "original" in case else "state_dict": random_weights(keys)}, start)
    main(words(start, run, "--training.drop-epochs", "5"))
    said = capsys.readouterr().out
    assert f"It starts from {start}:" in said and "1 of 6 classes have weights; 5 start anew: square, triangle, cross, ring, star" in said
    saved = json.loads((run / "start.json").read_text())["classes"]
    assert saved["kept"] == {"disc": "person"} and len(saved["dropped"]) >= 79
    longer = words(start, run, "--training.drop-epochs", "5", "--resume")
    start.rename(tmp_path / "moved.pth")  # a run that goes on needs them no more
    main([word if longer[i - 1] != "--training.epochs" else "2" for i, word in enumerate(longer)])
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    loaded = load_detector(run)
    assert type(loaded.detector).__name__ == CASES[case] and loaded.card.classes[0] == "disc"
    main(["eval", str(run), "--data", "shapes:size=64,images=2", "--device", "cpu"])


@pytest.mark.slow
def test_an_official_checkpoint_teaches(tmp_path: Path) -> None:
    """Of COCO's classes one is called otherwise here; those that the data do not have are no matter."""
    case = OUTSIDE / "original/keys/dino_4scale_r50.json"
    if not case.exists():
        pytest.skip(f"{case} is not there")
    torch.save({"model": random_weights(json.loads(case.read_text()))}, tmp_path / "official.pth")
    renamed = ("--teachers.teacher.classes", "person=disc")
    flags = [word for flag in (SHORT | SMALL).items() for word in flag]
    data = ("--data", "shapes:size=64,images=4,classes=1", "--output", str(tmp_path / "run"))
    main(["distill", "small-dino", "--teacher", str(tmp_path / "official.pth"), *data, *renamed, *flags, "--objectives.assignment", "none"])
    assert load_detector(tmp_path / "run").card.classes == ("disc",)
