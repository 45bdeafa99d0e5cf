"""Images of one channel or of four: decoding, normalisation, the first convolution, training, evaluation and use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import adapt_input_conv
from torchvision.transforms import v2

import steadydetr
from steadydetr.checkpoints.start import Start
from steadydetr.checkpoints.weights import read_weights
from steadydetr.cli import main
from steadydetr.cli.training_arguments import read_training_arguments
from steadydetr.data import DataConfig, EvalLoader, open_data
from steadydetr.data.dataset import in_channels
from steadydetr.data.images import as_picture, open_pixels
from steadydetr.data.trainable import check_transform
from steadydetr.data.transforms import FixedSize, FixedSizeTransform, TrainTransform
from steadydetr.learning.teachers import TrainedTeacher
from steadydetr.nn.backbone import adapt_input
from steadydetr.nn.configs import SmallBackboneConfig, TimmBackboneConfig
from steadydetr.recipes.base import Recipe
from steadydetr.training.loop import train
from steadydetr.training.preparation import build_method, make_loaders, open_for_run
from steadydetr.training.processes import make_accelerator
from tests.conftest import BACKBONE, DETECTORS
from tests.data_folders import coco_folder
from tests.test_finetune import save
from tests.test_train import tiny, weights


def recipe_of(channels: int) -> Recipe:
    recipe = tiny("small-dino", epochs=1, stability_images=0)
    detector = recipe.detector.with_image_channels(channels)
    return replace(recipe, detector=detector, data=replace(recipe.data, source="shapes:size=64,images=8"))


# Pictures


def colours(path: Path, mode: str, **options: Any) -> np.ndarray:
    """A picture in which every pixel is another one."""
    values = np.arange(6 * 8 * len(mode), dtype=np.uint8).reshape(6, 8, -1)
    picture = Image.fromarray(values if values.shape[2] > 1 else values[..., 0])
    picture.save(path, **options)
    return values


def test_files_are_decoded_to_as_many_channels(tmp_path: Path) -> None:
    rgba, rgb, grey = (colours(tmp_path / f"{mode}.png", mode) for mode in ("RGBA", "RGB", "L"))
    as_grey = np.asarray(Image.fromarray(rgb).convert("L"))[..., None]
    opaque = np.full((6, 8, 1), 255, np.uint8)
    for name, channels, expected in (
        ("RGBA", 4, rgba),
        ("RGBA", 3, rgba[..., :3]),
        ("RGB", 4, np.concatenate((rgb, opaque), 2)),
        ("RGB", 1, as_grey),
        ("L", 1, grey),
        ("L", 3, grey.repeat(3, 2)),
        ("L", 4, np.concatenate((grey.repeat(3, 2), opaque), 2)),
    ):
        path = tmp_path / f"{name}.png"
        for image in (path, path.read_bytes(), Image.open(path)):
            assert (open_pixels(image, channels) == expected).all()


def test_a_fourth_band_that_would_be_lost_is_an_error(tmp_path: Path) -> None:
    """Of a TIFF file that does not call it alpha, Pillow reads three."""
    values = np.arange(6 * 8 * 4, dtype=np.uint8).reshape(6, 8, 4)
    Image.frombytes("RGBX", (8, 6), values.tobytes()).save(tmp_path / "bands.tif")
    Image.fromarray(values).save(tmp_path / "alpha.tif")
    assert (open_pixels(tmp_path / "alpha.tif", 4) == values).all() and (open_pixels(tmp_path / "bands.tif") == values[..., :3]).all()
    with pytest.raises(ValueError, match=r"bands\.tif: its fourth band is not called alpha .*save it as RGBA"):
        open_pixels(tmp_path / "bands.tif", 4)


def test_arrays_and_tensors_of_as_many_channels_are_taken() -> None:
    for channels in (1, 4, 5):
        pixels = np.arange(6 * 8 * channels, dtype=np.uint8).reshape(6, 8, channels)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        assert (open_pixels(pixels, channels) == pixels).all() and (open_pixels(tensor, channels) == pixels).all()
    with pytest.raises(ValueError, match=r"an image must be \[H, W, 5\] of uint8, not \[6, 8, 3\] uint8"):
        open_pixels(np.zeros((6, 8, 3), np.uint8), 5)
    with pytest.raises(ValueError, match=r"image_channels = 5, but image files are read with 1 \(grey\), 3 \(RGB\) or 4 channels"):
        open_pixels(Image.new("RGB", (8, 6)), 5)


def test_data_sets_have_as_many_channels(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    for number in (1, 2):
        Image.fromarray(np.full((6, 8, 4), (10, 20, 30, number), np.uint8)).save(tmp_path / "train" / f"{number}.png")
    for place in (str(tmp_path), f"{tmp_path}+{tmp_path}", "shapes:size=64,images=4"):
        dataset = open_data(place)
        for channels in (1, 3, 4):
            found = in_channels(dataset, channels)
            assert [found.load_image(i).shape[2] for i in range(len(found.index))] == [channels] * len(dataset.index)
            (batch, *_) = EvalLoader(found, DataConfig(workers=0, resize=FixedSize(64, 64)))
            assert batch.images.shape[1] == channels
        with pytest.raises(ValueError, match="image_channels = 2, but image files are read with"):
            in_channels(dataset, 2)
    assert in_channels(open_data(tmp_path), 4).load_image(1)[0, 0].tolist() == [10, 20, 30, 2]


# Weights


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_weights_of_rgb_are_adapted_as_timm_does(channels: int) -> None:
    weight = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(adapt_input(weight, channels), adapt_input_conv(channels, weight.clone()))


def test_a_backbone_takes_weights_of_rgb(tmp_path: Path) -> None:
    """From a file as from the hub."""
    torch.manual_seed(0)
    rgb = TimmBackboneConfig("resnet18", weights="none").build()
    save_file(rgb.body.state_dict(), tmp_path / "rgb.safetensors")
    for channels in (1, 4):
        config = TimmBackboneConfig("resnet18", weights=str(tmp_path / "rgb.safetensors"), image_channels=channels)
        own = config.build().body.state_dict()
        torch.testing.assert_close(own["conv1.weight"], adapt_input_conv(channels, rgb.body.state_dict()["conv1.weight"]))
    pixels = torch.rand(1, 1, 64, 64)
    grey = TimmBackboneConfig("resnet18", weights=str(tmp_path / "rgb.safetensors"), image_channels=1).build()
    for one, three in zip(grey(pixels), rgb(pixels.expand(-1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)


def test_pixels_are_normalised_by_channel() -> None:
    for config in (BACKBONE, TimmBackboneConfig("resnet18", weights="none", freeze_norm=False)):
        of_three = replace(DETECTORS["dino"], backbone=config).build(2)
        for channels in (1, 4):
            detector = replace(DETECTORS["dino"], backbone=replace(config, image_channels=channels)).build(2)
            assert detector.image_channels == channels and "mean" not in detector.state_dict()
            rows = [0, 1, 2] if channels == 1 else [0, 1, 2, 0]
            for name in ("mean", "std"):
                values = getattr(of_three, name)[rows]
                torch.testing.assert_close(getattr(detector, name), values.mean(0, keepdim=True) if channels == 1 else values)
            padding = torch.zeros(1, 64, 64, dtype=torch.bool)
            assert detector.eval()(torch.rand(1, channels, 64, 64), padding).logits.isfinite().all()
            with pytest.raises(ValueError, match=f"takes images of {channels} channels?, and these have 3"):
                detector(torch.rand(1, 3, 64, 64), padding)


def test_weights_of_a_detector_of_other_channels_are_adapted(tmp_path: Path) -> None:
    start = save(tmp_path / "start", classes=("nut",))
    for channels, how in ((1, "are summed"), (4, "are repeated or cut in their order, and scaled to about the same sum")):
        config = DETECTORS["dino"].with_image_channels(channels)
        detector = config.build(1)
        found = Start(str(start)).load(detector, config, ("nut",), read_weights(str(start)))
        name = "backbone.stem.0.weight"
        torch.testing.assert_close(detector.state_dict()[name], adapt_input_conv(channels, weights(start)[name]))
        assert found.remarks[0].endswith(f"instead of 3: the weights of the first convolution {how}")


def test_a_teacher_of_other_channels_is_refused(tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", classes=("nut",))
    recipe = replace(recipe_of(1), teachers=(TrainedTeacher(str(teacher)),))
    with pytest.raises(ValueError, match=r"the teacher takes images of 3 channels, the detector of 1.*image_channels"):
        build_method(recipe, ("nut",), 1, make_accelerator("cpu"), recipe.build_student(1))


# Training and use


@dataclass(frozen=True)
class Colours(TrainTransform):
    def build(self) -> v2.Transform:
        return v2.RandomPhotometricDistort()


def test_a_transform_that_needs_other_channels_is_refused() -> None:
    """Changes of saturation and hue leave a grey image as it is, in torchvision, and stop at four channels."""
    for channels in (1, 4):
        check_transform(FixedSizeTransform(64, 64, transpose=0.5, zoom=0.5), channels)
    check_transform(Colours(), 3)
    check_transform(Colours(), 1)
    recipe = recipe_of(4)
    with pytest.raises(ValueError, match=r"data\.transform = Colours\(\) does not take images of 4 channels: .*Leave out what changes"):
        open_for_run(replace(recipe, data=replace(recipe.data, transform=Colours())), make_accelerator("cpu"), print)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_detector_of_other_channels_is_evaluated_and_used(channels: int, tmp_path: Path) -> None:
    config = DETECTORS["dino"].with_image_channels(channels)
    run = save(tmp_path / "run", config, open_data("shapes:size=64,images=4").index.classes)
    main(["eval", str(run), "--data", "shapes:size=64,images=4", "--device", "cpu", "--workers", "0"])
    colours(tmp_path / "photo.png", "RGBA")
    main(["predict", str(run), str(tmp_path / "photo.png"), "--output", str(tmp_path / "found"), "--device", "cpu", "--threshold", "0"])
    detector = steadydetr.load(run, device="cpu")
    file, array = detector(tmp_path / "photo.png", threshold=0), open_pixels(tmp_path / "photo.png", channels)
    torch.testing.assert_close(file.boxes_xyxy, detector(array, threshold=0).boxes_xyxy)


def test_batches_have_the_channels_of_the_detector() -> None:
    recipe, accelerator = recipe_of(1), make_accelerator("cpu")
    train_data, val_data, _ = open_for_run(recipe, accelerator, print)
    loader, val_loader = make_loaders(recipe, train_data, val_data, accelerator)
    assert next(iter(val_loader)).images.shape[1] == next(loader.epoch(0))[0].images.shape[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_a_detector_of_other_channels_is_trained_and_drawn(channels: int, tmp_path: Path) -> None:
    train(recipe_of(channels), tmp_path, device="cpu")
    assert (tmp_path / "predictions.png").exists() and (tmp_path / "sampling.png").exists()


def test_pictures_of_any_channels_can_be_drawn() -> None:
    grey, rgba = np.full((6, 8, 1), 7, np.uint8), np.full((6, 8, 4), (1, 2, 3, 0), np.uint8)
    assert as_picture(grey).getpixel((0, 0)) == (7, 7, 7) and as_picture(rgba).getpixel((0, 0)) == (1, 2, 3)
    assert as_picture(np.full((6, 8, 5), 9, np.uint8)).size == (8, 6)


def test_channels_are_at_least_one() -> None:
    for config in (SmallBackboneConfig, TimmBackboneConfig):
        with pytest.raises(ValueError, match=r"detector\.backbone\.image_channels = 0 must"):
            config(image_channels=0)


@pytest.mark.parametrize(
    "flag", ["--detector.backbone.channels 1", "--detector.backbone.channels=1", "--detector.backbone.image-channels 1"]
)
@pytest.mark.parametrize("name", ["small-dino", "dino-4scale-r50-12ep"])
def test_channels_are_a_flag(name: str, flag: str) -> None:
    """One number; four of a small backbone are its widths, as they were in version 0.1."""
    assert read_training_arguments(name, flag.split())[0].detector.image_channels == 1
    recipe, _ = read_training_arguments("small-dino", [*flag.split(), *["--detector.backbone.channels", "4", "4", "8", "8"]])
    assert recipe.detector.backbone == SmallBackboneConfig(channels=(4, 4, 8, 8), image_channels=1)
