"""Data sets of strangers: nothing outside their folder is read, no program is started, nothing blocks, and names are only names."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import EpsImagePlugin, Image, features

import steadydetr
from steadydetr.cli import check as check_command
from steadydetr.cli.training_arguments import read_training_arguments
from steadydetr.config import from_plain, to_plain
from steadydetr.data import DataConfig, open_data
from steadydetr.data.check import check_data
from steadydetr.data.coco_classes import class_list
from steadydetr.data.dataset import FolderDataset
from steadydetr.data.images import FORMATS, open_picture
from steadydetr.data.layouts import Finding
from steadydetr.data.transforms import DetrTransform, FixedSize, FixedSizeTransform, Sample, ShortestSide, Transform, apply, seeded
from steadydetr.detectors import Prediction
from steadydetr.drawing.run_pictures import draw_predictions
from steadydetr.limits import Limits
from steadydetr.recipes import find
from steadydetr.tools.image_files import list_sources
from steadydetr.training.preparation import open_both
from steadydetr.training.progress import Progress
from tests.data_folders import coco_folder, coco_with, picture, voc_folder

ALLOWED = Limits(outside="allow")


def opened(root: Path, limits: Limits = Limits()) -> FolderDataset:  # noqa: B008
    dataset = open_data(root, "train", limits)
    assert isinstance(dataset, FolderDataset)
    return dataset


def link(place: Path, target: Path) -> None:
    """Move what is at `place` to `target` and leave a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    place.rename(target)
    place.symlink_to(target)


def name_outside(root: Path, name: str) -> None:
    picture(root.parent / "secret.png")
    coco_folder(root, coco_with(image={"file_name": name.format(root.parent)}))


def link_image(root: Path) -> None:
    coco_folder(root)
    link(root / "train" / "1.png", root.parent / "elsewhere" / "1.png")


def link_images(root: Path) -> None:
    coco_folder(root)
    link(root / "train", root.parent / "elsewhere" / "train")


WAYS_OUT: dict[str, tuple[Any, str]] = {
    "absolute": (lambda root: name_outside(root, "{}/secret.png"), r"secret\.png lies outside the data folder"),
    "dots": (lambda root: name_outside(root, "../../secret.png"), r"train/\.\./\.\./secret\.png lies outside the data folder"),
    "link": (link_image, r"train/1\.png is a link to .*elsewhere/1\.png, outside the data folder"),
    "linked folder": (link_images, r"train is a link to .*elsewhere/train, outside the data folder"),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_images_outside_the_data_folder_are_read_only_if_allowed(way: str, tmp_path: Path) -> None:
    make, message = WAYS_OUT[way]
    root = tmp_path / "data"
    make(root)
    with pytest.raises(ValueError, match=rf"{message} .*--data\.outside allow"):
        opened(root).check_files()  # before training
    with pytest.raises(ValueError, match=message):
        opened(root).load_image(0)
    assert opened(root, ALLOWED).load_image(0).shape == (6, 8, 3)
    opened(root, ALLOWED).check_files()


@pytest.mark.parametrize("way", WAYS_OUT)
def test_check_names_images_outside_the_data_folder(way: str, tmp_path: Path) -> None:
    """Once for a linked folder, and also where they are allowed."""
    make, message = WAYS_OUT[way]
    root = tmp_path / "data"
    make(root)
    for limits in (Limits(), ALLOWED):
        (finding,) = check_data(root, ("train",), limits=limits).findings
        assert finding.kind == "image outside the data folder" and finding.fatal == (limits.outside == "refuse")
        assert re.search(message, finding.message)
        assert ("2 images" in finding.entry) == (way == "linked folder")


def test_training_takes_the_option(tmp_path: Path) -> None:
    link_images(tmp_path / "data")
    coco_folder(tmp_path / "data", splits=("val",))
    recipe = replace(find("small-dino"), data=DataConfig(str(tmp_path / "data"), workers=0))
    with pytest.raises(ValueError, match=r"--data\.outside allow"):
        open_both(recipe, print)
    allowed, _ = read_training_arguments("small-dino", ["--data", str(tmp_path / "data"), "--data.outside", "allow"])[:2]
    assert allowed.data.outside == "allow" and len(open_both(allowed, print)[0].index) == 2


def test_the_data_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    """And so may what stays within it."""
    coco_folder(tmp_path / "real")
    (tmp_path / "real" / "train" / "1.png").rename(tmp_path / "real" / "first.png")
    (tmp_path / "real" / "train" / "1.png").symlink_to("../first.png")
    (tmp_path / "data").symlink_to(tmp_path / "real")
    assert opened(tmp_path / "data").load_image(0).shape == (6, 8, 3)
    opened(tmp_path / "data").check_files()
    assert not check_data(tmp_path / "data", ("train",)).findings


@pytest.mark.parametrize("layout", ["coco", "xml", "list"])
def test_annotations_outside_the_data_folder_are_read_only_if_allowed(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    path = coco_folder(root) if layout == "coco" else voc_folder(root)
    path = root / "ImageSets/Main/train.txt" if layout == "list" else path
    link(path, tmp_path / "elsewhere" / path.name)
    with pytest.raises(ValueError, match=r"is a link to .*, outside the data folder .*--data\.outside allow"):
        open_data(root)
    assert check_data(root, ("train",)).fatal
    assert len(open_data(root, "train", ALLOWED).index) > 0


def test_a_linked_folder_of_annotations_is_not_even_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be the whole disk."""
    voc_folder(tmp_path / "data")
    (tmp_path / "data/Annotations").rename(tmp_path / "elsewhere")
    (tmp_path / "data/Annotations").symlink_to(tmp_path / "elsewhere")
    assert len(open_data(tmp_path / "data", "train", ALLOWED).index) > 0
    monkeypatch.setattr(os, "walk", lambda *_: pytest.fail("listed"))
    with pytest.raises(ValueError, match=r"Annotations is a link to .*elsewhere, outside the data folder"):
        open_data(tmp_path / "data")


def test_a_list_cannot_lead_to_annotations_outside(tmp_path: Path) -> None:
    voc_folder(tmp_path / "data", listed="../../secret\n")
    (tmp_path / "secret.xml").write_text("<annotation/>")
    with pytest.raises(ValueError, match=r"secret\.xml lies outside the data folder"):
        open_data(tmp_path / "data")


def test_links_that_lead_in_a_circle_are_named(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    (tmp_path / "train" / "1.png").unlink()
    (tmp_path / "train" / "1.png").symlink_to("1.png")
    with pytest.raises(ValueError, match=r"1\.png"):
        opened(tmp_path).load_image(0)
    assert any("1.png" in finding.file for finding in check_data(tmp_path, ("train",)).findings)


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 2500, "", ".", "..", "a\0b", "1.png/2.png", "é\u202e.png"])
def test_impossible_names_are_named(name: str, tmp_path: Path) -> None:
    coco_folder(tmp_path, coco_with(image={"file_name": name}))
    with pytest.raises(ValueError) as raised:
        opened(tmp_path).check_files()
        opened(tmp_path).load_image(0)
    assert "\n" not in str(raised.value) and "\u202e" not in str(raised.value)
    assert check_data(tmp_path, ("train",)).fatal


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("kind", ["json", "xml", "list", "image"])
def test_pipes_are_refused(kind: str, tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    path = coco_folder(tmp_path) if kind in ("json", "image") else voc_folder(tmp_path)
    path = {"list": tmp_path / "ImageSets/Main/train.txt", "image": tmp_path / "train/1.png"}.get(kind, path)
    make_pipe(path)
    with pytest.raises(ValueError, match=f"{path.name} is a pipe, not a file"):
        opened(tmp_path).load_image(0)
    assert any("is a pipe" in finding.message for finding in check_data(tmp_path, ("train",)).findings)


def test_devices_and_folders_are_refused(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    image = tmp_path / "train" / "1.png"
    for target, what in (("/dev/zero", "a device"), (str(tmp_path), "a folder")):
        image.unlink()
        image.symlink_to(target)
        with pytest.raises(ValueError, match=rf"1\.png is {what}, not a file"):
            opened(tmp_path, ALLOWED).load_image(0)


def test_pipes_as_lists_of_images_and_classes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.json")
    with pytest.raises(ValueError, match=r"list\.json is a pipe"):
        list_sources([tmp_path / "list.json"])
    with pytest.raises(ValueError, match=r"list\.json is a pipe"):
        class_list(str(tmp_path / "list.json"), 3)
    with pytest.raises(ValueError, match=r"list\.json is a pipe"):
        open_picture(tmp_path / "list.json")


def test_eps_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow tells formats by content, and runs Ghostscript for this one."""
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    Image.new("RGB", (8, 6)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: it is damaged, or none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"):
        open_picture(tmp_path / "a.jpg")
    assert not started


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS"])
def test_only_known_formats_are_opened(kind: str, tmp_path: Path) -> None:
    """Whatever the file is called."""
    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    picture(tmp_path / "a.png", (16, 16), format=kind)
    if kind in (*FORMATS, "MPO"):
        assert open_picture(tmp_path / "a.png").size == (16, 16)
    else:
        with pytest.raises(ValueError, match="it is damaged, or none of"):
            open_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_pixels=47), r"1\.png: it has 8 x 6 pixels, more than max_pixels = 47 allows"),
        (Limits(max_file_mb=1), r"1\.png has 2 MiB, more than max_file_mb = 1 allows"),
        (Limits(max_annotation_mb=1), r"instances_train\.json has 2 MiB, more than max_annotation_mb = 1 allows"),
    ],
)
def test_limits(limits: Limits, message: str, tmp_path: Path) -> None:
    for path in (coco_folder(tmp_path), tmp_path / "train/1.png", tmp_path / "train/2.png"):
        with open(path, "ab") as file:
            file.write(b" " * 2**21)
    assert opened(tmp_path, replace(limits, max_pixels=48, max_file_mb=3, max_annotation_mb=3)).load_image(0).shape == (6, 8, 3)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, limits).load_image(0)
    assert any(re.search(message, finding.message) for finding in check_data(tmp_path, ("train",), limits=limits).findings)


def test_a_long_xml_file_is_not_read(tmp_path: Path) -> None:
    path = voc_folder(tmp_path)
    os.truncate(path, 2**20 + 1)
    with pytest.raises(ValueError, match=r"a\.xml has 1 MiB, more than max_file_mb = 1 allows"):
        open_data(tmp_path, "train", Limits(max_file_mb=1))


def test_the_limit_of_pixels_takes_the_place_of_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which warns or raises beyond a global variable, and stays as the user has set it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(picture(tmp_path / "a.png")).size == (8, 6)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_bomb_is_named_and_the_others_are_looked_at(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "train" / "1.png")  # 200 megapixels in 25 kB
    (finding,) = check_data(tmp_path, ("train",)).findings
    assert finding.kind == "unreadable image" and "20000 x 10000 pixels, more than max_pixels" in finding.message


@pytest.mark.parametrize("field", [{"outside": "perhaps"}, {"max_pixels": 0}, {"max_file_mb": -1}, {"max_annotation_mb": 0}])
def test_limits_that_are_none(field: dict[str, Any]) -> None:
    (name, value), *_ = field.items()
    for kind in (Limits, DataConfig):
        with pytest.raises(ValueError, match=f"{name} = {value!r} must be"):
            kind(**field)


def test_configs_without_limits_are_read() -> None:
    plain = {key: value for key, value in to_plain(DataConfig()).items() if not hasattr(Limits(), key)}
    assert len(plain) == len(to_plain(DataConfig())) - 4 and from_plain(plain) == DataConfig()


HOSTILE = "[/model] [red]:smile: \x1b[31m\u202e\r"


def test_check_prints_names_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without markup, and control characters as escapes."""
    monkeypatch.setenv("COLUMNS", "400")
    content = coco_with(image={"file_name": f"{HOSTILE}.png"}, category={"name": HOSTILE}, annotation={"bbox": [90, 90, 3, 3]})
    coco_folder(tmp_path, content)
    with pytest.raises(SystemExit, match="1"):
        check_command.run([str(tmp_path), "--splits", "train"])
    out = capsys.readouterr().out
    assert out.count("[/model] [red]:smile: \\x1b[31m\\u202e\\r") >= 3  # class, missing image, box outside
    assert "\x1b[31m" not in out and "\u202e" not in out


def test_check_shows_whole_names_in_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a log, which has 80 columns: a name that is cut does not say which file is meant."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "photo_" + "0123456789" * 12
    coco_folder(tmp_path, coco_with(image={"file_name": f"{name}.png"}, category={"name": name}))
    with pytest.raises(SystemExit, match="1"):
        check_command.run([str(tmp_path), "--splits", "train"])
    table, findings = capsys.readouterr().out.split("missing image")
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines()]
    assert name in "".join(cells[0] for cells in lines if cells)
    assert f"{name}.png" in findings


def test_check_takes_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link_images(tmp_path / "data")
    words = [str(tmp_path / "data"), "--splits", "train"]
    with pytest.raises(SystemExit, match="1"):
        check_command.run(words)
    check_command.run([*words, "--outside", "allow"])
    with pytest.raises(SystemExit, match="1"):
        check_command.run([*words, "--outside", "allow", "--max-pixels", "10"])
    assert "max_pixels" in capsys.readouterr().out


def test_progress_prints_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().say(f"{HOSTILE} of x[0]")
    assert "[/model] [red]:smile: \\x1b[31m\\u202e\\r of x[0]" in capsys.readouterr().out


def test_findings_are_lines() -> None:
    assert str(Finding("kind", "a.json", "image 3", "is odd")) == "a.json: image 3: is odd"
    assert str(Finding("kind", "a.json", "", "a.json is odd")) == "a.json is odd"


@pytest.mark.parametrize("shape", [(2, 3000), (3000, 2), (1, 30_000), (30_000, 1), (1, 1)])
@pytest.mark.parametrize(
    "transform", [ShortestSide(), DetrTransform(), FixedSize(), FixedSizeTransform(), FixedSizeTransform(zoom=0.5, transpose=1.0)]
)
def test_line_scans_keep_a_pixel(shape: tuple[int, int], transform: Transform) -> None:
    image, box = torch.zeros(*shape, 3, dtype=torch.uint8).permute(2, 0, 1), torch.tensor([[0.0, 0, shape[1], shape[0]]])
    for seed in range(3):
        with seeded(seed):
            out = apply(transform.build(), Sample(image, box, torch.tensor([0])))
        assert min(out.image.shape) >= 1 and max(out.image.shape) <= 1333


def test_line_scans_are_drawn(tmp_path: Path) -> None:
    coco_folder(tmp_path, coco_with(image={"width": 3000, "height": 2}, category={"name": HOSTILE}))
    picture(tmp_path / "train" / "1.png", (3000, 2))
    nothing = Prediction(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    draw_predictions(opened(tmp_path), [0], [nothing], tmp_path / "drawn.png")
    assert open_picture(tmp_path / "drawn.png").width > 300


def test_no_console_reads_markup() -> None:
    """Names of runs, recipes, classes and files are printed by all of them."""
    sources = {path: path.read_text() for path in Path(steadydetr.__file__).parent.rglob("*.py")}
    consoles = [(path.name, found) for path, text in sources.items() for found in re.findall(r"\bConsole\((.*)\)", text)]
    assert consoles and [name for name, found in consoles if "markup=False, emoji=False" not in found] == []
