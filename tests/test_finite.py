"""Weights that are read are finite; what messages say of tensors and images that are not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import load_detector, load_training_state, save_detector
from steadydetr.config import from_plain, to_plain
from steadydetr.finite import images_named, tensors_in, where_not_finite
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.runs.training_config import TrainingConfig
from steadydetr.training.preparation import prepare
from tests.conftest import CLASSES, DETECTORS
from tests.test_train import tiny


def test_messages_name_images_and_tensors_that_are_not_finite() -> None:
    assert images_named([7]) == "image 7" and images_named({9, 2}) == "images 2, 9"
    assert images_named(range(20)).endswith(", 14, 15 and 4 more")
    tensors = {str(n): torch.tensor(math.nan if n > 1 else 0.0) for n in range(7)} | {"whole": torch.tensor(3)}
    assert where_not_finite(tensors) == "5 of 7 tensors (2, 3, 4 and 2 more)"
    assert where_not_finite({"whole": torch.tensor(3)}) == where_not_finite({}) == where_not_finite({"0": torch.tensor(0.0)}) == ""
    nested = dict(tensors_in({"a": {"b": [torch.tensor(1)], "c": 2.0}, "d": torch.tensor(4)}))
    assert nested == {"a.b.0": torch.tensor(1), "d": torch.tensor(4)}


def test_weights_that_are_read_are_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint, of a training state, of a backbone, and those that a run starts with."""
    config = DETECTORS["deformable"]
    detector = config.build(CLASSES)
    next(detector.parameters()).data.fill_(math.nan)
    names = tuple("abcde")
    state = {"method": detector.state_dict(), "optimiser": {}, "average": None}
    save_detector(tmp_path / "bad", detector.state_dict(), DetectorCard(config, names, (1, 2, 3, 4, 5)), state)
    with pytest.raises(ValueError, match=r"bad/model\.safetensors is of no use: 1 of \d+ tensors \(.*\) hold NaN"):
        load_detector(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"bad/training_state\.pt is of no use: 1 of \d+ tensors \(method\."):
        load_training_state(tmp_path / "bad")
    body = TimmBackboneConfig("test_resnet", out_indices=(2, 3, 4), weights="none").build().body
    save_file({name: torch.full_like(value, math.inf) for name, value in body.state_dict().items()}, tmp_path / "body.safetensors")
    with pytest.raises(ValueError, match=r"backbone\.weights = .*body\.safetensors' is of no use: \d+ of \d+ tensors"):
        TimmBackboneConfig("test_resnet", out_indices=(2, 3, 4), weights=str(tmp_path / "body.safetensors")).build()
    monkeypatch.setattr(torch.nn.init, "xavier_uniform_", lambda tensor, *_: tensor.data.fill_(math.nan))
    with pytest.raises(ValueError, match="the weights to start with are not finite"):
        prepare(tiny(), tmp_path / "run", resume=False, device="cpu")
    assert not (tmp_path / "run").exists()


def test_float16_is_not_offered() -> None:
    """Not in a saved recipe either: its gradients overflow as a matter of course."""
    with pytest.raises(ValueError, match=r"precision = 'fp16': str is not any of \('no', 'bf16', 'auto'\)"):
        from_plain(to_plain(TrainingConfig()) | {"precision": "fp16"})
