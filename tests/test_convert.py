"""Files of other projects: what is read from them, and what their errors say."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from steadydetr.checkpoints import layouts
from steadydetr.checkpoints.convert import convert_file, convert_state_dict, load_foreign, unwrap
from steadydetr.checkpoints.key_maps import listed, missing_copies, recognise, rename
from steadydetr.detectors import DetectorConfig
from steadydetr.kinds import register
from steadydetr.nn.named_tensors import NamedTensors

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
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"link exists already: choose another folder"):
        convert_file(tmp_path / "checkpoint.pth", tmp_path / "link")
    (tmp_path / ".new.old").mkdir()  # a name that is taken while a folder is replaced
    with pytest.raises(FileExistsError, match=r"\.new\.old exists already: choose another folder"):
        convert_file(tmp_path / "checkpoint.pth", tmp_path / "new")


@pytest.mark.parametrize(("content", "named"), [({"recipe": {}}, "run"), ({"category_ids": [1]}, "run/best")])
def test_what_is_ours_needs_no_conversion(content: dict[str, object], named: str, tmp_path: Path) -> None:
    folder = tmp_path / named
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    save_file(WEIGHTS, folder / "model.safetensors")
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(ValueError, match=rf"{named} is of steadydetr already .*steadydetr eval .*{named} --data DATA"):
            load_foreign(path)


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


def test_every_file_of_a_layout_is_listed() -> None:
    files = {path.stem for path in Path(layouts.__file__).parent.glob("*.py")}
    assert len(layouts.BY_NAME) == len(layouts.LAYOUTS) == len(files - {"__init__", "base"})


def test_errors_name_the_layouts_and_their_detectors() -> None:
    with pytest.raises(ValueError) as error:
        recognise(["head.weight"])
    assert str(error.value) == (
        "no known layout: none of original, detrex, mmdet, adamixer, hugging face, conditional detr of mmdet 3, conditional detr"
        " of detrex, conditional detr, conditional detr of hugging face writes keys like head.weight. Known are Deformable DETR,"
        " H-Deformable-DETR and DINO (their repositories), DINO, DAB-, DN-DAB- and H-Deformable-DETR (detrex), Deformable DETR"
        " (mmdet 2), AdaMixer (its repository), Deformable DETR (Hugging Face), Conditional DETR (mmdet 3), Conditional DETR"
        " (detrex), Conditional DETR (its repository), Conditional DETR (Hugging Face)"
    )


class Linear(nn.Module):
    """A detector as far as converting needs one: an encoder of one layer, two decoder stages with one class head for both."""

    stages = 2

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        layer = nn.ModuleDict({"ffn": nn.ModuleDict({"linear1": nn.Linear(width, 3, bias=False)})})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([layer])})
        self.decoder = nn.ModuleDict({"class_heads": nn.ModuleList([nn.Linear(width, num_classes)])})


@dataclass(frozen=True)
class LinearConfig(DetectorConfig):
    """As it would stand in a package of another project."""

    width: int = 64

    def build(self, num_classes: int) -> Any:
        return Linear(self.width, num_classes)

    @property
    def shares_heads(self) -> bool:
        return True

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        return None if tensors.has("level_embed") else cls(tensors.shape("encoder.layers.0.ffn.linear1.weight")[1])


LINEAR = {
    "transformer.encoder.layers.0.linear1.weight": torch.ones(3, 4),
    **{f"class_embed.{stage}.weight": torch.zeros(5, 4) for stage in range(2)},
    **{f"class_embed.{stage}.bias": torch.zeros(5) for stage in range(2)},
}


@pytest.mark.usefixtures("table")
def test_a_detector_of_another_package_is_found() -> None:
    register("linear")(LinearConfig)
    converted = convert_state_dict(LINEAR)
    assert (converted.config, converted.num_classes, converted.layout) == (LinearConfig(width=4), 5, "original")
    assert converted.state.keys() == Linear(4, 5).state_dict().keys()
    with pytest.raises(ValueError, match=r"class_heads\.1\.bias differs .* the config says that they are shared"):
        convert_state_dict(LINEAR | {"class_embed.1.bias": torch.ones(5)})
    with pytest.raises(ValueError, match=r"missing: encoder\.layers\.0\.ffn\.linear1\.weight, whose shape tells"):
        convert_state_dict({key.replace("linear1.weight", "linear1.bias"): value for key, value in LINEAR.items()})


@pytest.mark.usefixtures("table")
def test_a_file_of_no_detector() -> None:
    with pytest.raises(ValueError, match=r"no detector recognises .* layout original: not .*dino.*of encoder\.layers, class_heads\.0"):
        convert_state_dict(LINEAR)


@pytest.mark.usefixtures("table")
def test_a_file_of_two_detectors() -> None:
    @dataclass(frozen=True)
    class TwinConfig(LinearConfig):
        @classmethod
        def from_tensors(cls, tensors: NamedTensors) -> Self | None:
            return cls()

    register("linear")(LinearConfig)
    register("twin")(TwinConfig)
    with pytest.raises(ValueError, match=r"several detectors recognise .* layout original: tests:linear, tests:twin\. Leave out"):
        convert_state_dict(LINEAR)
    assert convert_state_dict(LINEAR, LinearConfig(4)).config == LinearConfig(4)


@pytest.mark.usefixtures("table")
def test_a_detector_made_of_another_does_not_claim_its_files() -> None:
    @dataclass(frozen=True)
    class VariantConfig(LinearConfig):
        """Inherits `from_tensors`."""

    register("linear")(LinearConfig)
    register("variant")(VariantConfig)
    assert type(convert_state_dict(LINEAR).config) is LinearConfig
