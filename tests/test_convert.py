"""Files of other projects: what is read from them, and what their errors say."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steadydetr.checkpoints.convert import convert_file, load_foreign, unwrap
from steadydetr.checkpoints.key_maps import listed, missing_copies, recognise, rename

WEIGHTS = {"a.weight": torch.ones(2)}


def test_a_training_checkpoint(tmp_path: Path) -> None:
    """As the originals save it: command line, optimiser and scheduler beside the weights, from a parallel run."""
    scheduler = {"milestones": Counter([40]), "last_epoch": 12}
    content = {"model": {"module.a.weight": torch.ones(2)}, "args": argparse.Namespace(lr=1e-4), "lr_scheduler": scheduler, "epoch": 12}
    torch.save(content, tmp_path / "checkpoint.pth")
    loaded = load_foreign(tmp_path / "checkpoint.pth")
    assert loaded.keys() == {"a.weight"} and torch.equal(loaded["a.weight"], torch.ones(2))


@pytest.mark.parametrize("wrapper", ["ema_model", "ema_state", "ema_state_dict", "teacher"])
def test_averaged_weights_come_first(wrapper: str) -> None:
    plain = {"model": WEIGHTS}
    assert unwrap(plain | {wrapper: {"a.weight": torch.zeros(2)}})["a.weight"].sum() == 0
    assert unwrap(plain | {wrapper: {}}) is not None and unwrap(plain | {wrapper: {}})["a.weight"].sum() == 2  # kept, but never filled


def test_containers_within_containers() -> None:
    assert unwrap({"state_dict": {"model": WEIGHTS}}).keys() == WEIGHTS.keys()
    assert unwrap([1, 2]) == {}


def test_folder_of_hugging_face(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert load_foreign(tmp_path).keys() == WEIGHTS.keys()


def test_errors_say_what_the_file_holds(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_foreign(tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_foreign(tmp_path)
    torch.save({"optimizer": 1, "step": 2}, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=r"holds no state dict but optimizer, step; .* model, state_dict"):
        load_foreign(tmp_path / "state.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"broken\.pth cannot be read"):
        load_foreign(tmp_path / "broken.pth")


class Custom:
    """Stands for an object whose class an unsafe load would import."""


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "config": Custom()}, tmp_path / "custom.pth")
    with pytest.raises(ValueError, match="save the weights alone"):
        load_foreign(tmp_path / "custom.pth")


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="choose another folder"):
        convert_file(tmp_path / "checkpoint.pth", tmp_path)


def test_layouts() -> None:
    assert recognise(["transformer.decoder.layers.3.cross_attn.value_proj.bias"]) == "original"
    assert recognise(["backbone.res2.0.conv1.weight", "transformer.encoder.layers.0.attentions.0.value_proj.bias"]) == "detrex"
    with pytest.raises(ValueError, match=r"no known layout: .* like head\.weight"):
        recognise(["head.weight"])


def test_long_lists_say_how_much_they_leave_out() -> None:
    assert listed(["a", "b", "c"], most=2) == "a, b and 1 more"


def test_a_head_that_one_stage_lacks() -> None:
    keys = {f"class_embed.{stage}.{kind}" for stage in range(3) for kind in ("weight", "bias")}
    assert missing_copies(keys) == []
    assert missing_copies(keys - {"class_embed.0.bias"}) == ["class_embed.0.bias"]


def test_memory_fusions_stand_in_order() -> None:
    """Stable-DINO's simple fusion is the encoder's only one, or comes after the dense one."""
    simple, dense = {"transformer.fusion_run.weight": torch.ones(2)}, {"transformer.encoder.fusion_layer.0.weight": torch.zeros(2)}
    assert rename(simple, "detrex").keys() == {"encoder.fusions.0.project.weight"}
    assert rename(dense | simple, "detrex").keys() == {"encoder.fusions.0.project.weight", "encoder.fusions.1.project.weight"}
