"""A saved detector in use: files, folders, COCO image lists, results, pictures, other data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import steadydetr
from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.checkpoints.folder import load_detector, save_detector
from steadydetr.data import FixedSize
from steadydetr.tools.evaluate import align_classes, evaluate_checkpoint
from steadydetr.tools.image_files import list_sources, picture_names, predict_files
from tests.conftest import DETECTORS, make_method

NAMES, IDS = ("disc", "square", "triangle", "cross", "ring"), (3, 5, 8, 13, 21)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    method = make_method(DETECTORS["dino"])
    save_detector(tmp_path / "detector", method.student.state_dict(), DetectorCard(DETECTORS["dino"], NAMES, IDS, FixedSize(64, 64), top=9))
    return tmp_path / "detector"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate(((40, 60), (80, 50))):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_one_image_and_several(checkpoint: Path, images: Path) -> None:
    detector = steadydetr.load(checkpoint, "cpu")
    found = detector.predict(images / "0.png", threshold=0)
    assert len(found) == 9 and found.names == NAMES and set(found.class_names) <= set(NAMES)
    assert (found.scores[:-1] >= found.scores[1:]).all()
    assert len(found.above(1.1)) == 0
    array = np.asarray(Image.open(images / "0.png"))
    several = detector.predict([images / "1.png", array], 0)
    torch.testing.assert_close(several[1].scores, found.scores, rtol=1e-4, atol=1e-6)
    assert found.draw(images / "0.png", threshold=0.0).size == (60, 40)
    other = found.to_supervision()
    assert len(other) == 9 and list(other.data["class_name"]) == found.class_names


def test_files_folders_and_image_lists(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """A broken image is named and left out; results carry the ids of the list and of the classes."""
    (images / "broken.png").write_bytes(b"nothing")
    detector = steadydetr.load(checkpoint, "cpu")
    report = predict_files(detector, [images, images / "1.png"], tmp_path / "out", batch_size=2)
    assert report.images == 3 and report.detections == 27 and "broken.png" in report.failures[0]
    assert (tmp_path / "out/0.png").exists()
    (tmp_path / "list.json").write_text(json.dumps({"images": [{"id": 77, "file_name": "1.png"}]}))
    with pytest.raises(FileExistsError, match=r"was made by `steadydetr predict`: choose another --output, or add --overwrite"):
        predict_files(detector, [images], tmp_path / "out")
    predict_files(detector, [tmp_path / "list.json"], tmp_path / "out", image_folder=images, draw=False, overwrite=True)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results) == 9 and {row["image_id"] for row in results} == {77}
    assert {row["category_id"] for row in results} <= set(IDS)
    assert all(row["file_name"] == "1.png" and row["category_name"] == NAMES[IDS.index(row["category_id"])] for row in results)
    with pytest.raises(ValueError, match="no image or folder"):
        list_sources([tmp_path / "absent.jpg"])


def test_hidden_files_of_a_folder_are_passed_over(images: Path) -> None:
    """As `._0.png`, which macOS writes beside every file on foreign disks. One that is named is read."""
    (images / "._0.png").write_bytes(b"\0\5\x16\7Mac OS X")
    assert {Path(source.path).name for source in list_sources([images])} == {"0.png", "1.png"}
    assert len(list_sources([images / "._0.png"])) == 1


def test_an_image_list_without_its_images_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"images": [{"id": 77, "file_name": "1.png"}]}))
    with pytest.raises(ValueError, match=r"list\.json: its images are not in .*1\.png: name their folder by --image-folder"):
        list_sources([tmp_path / "list.json"])


def test_pictures_have_names_of_their_own(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """Equal names in two folders, of two formats, that differ by capitals; the same image twice; an input that lies in the output."""
    paths = [Path("a/x.jpg"), Path("b/x.jpg"), Path("b/x.png"), Path("c/X.jpg"), Path("b/x.jpg"), Path("b/x.jpg"), Path("out/y.png")]
    assert picture_names(paths, Path("out")) == ["x.png", "x_jpg.png", "x_png.png", "c_X.png", "b_x.png", "x_2.png", "y_png.png"]
    before = (images / "0.png").read_bytes()
    detector = steadydetr.load(checkpoint, "cpu")
    with pytest.raises(FileExistsError, match="no command of steadydetr has made it: choose another --output"):
        predict_files(detector, [images], images)
    assert not (images / "results.json").exists()
    (images / "results.json").symlink_to(images / "1.png")
    predict_files(detector, [images], images, overwrite=True)
    assert (images / "0.png").read_bytes() == before and (images / "0_png.png").exists()
    assert not (images / "results.json").is_symlink() and Image.open(images / "1.png").size == (50, 80)


def test_no_input_is_replaced_by_way_of_a_link(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """An image elsewhere that is a link into the output, and an image list that is called as our results are."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/0.jpg").symlink_to(images / "0.png")
    assert picture_names([tmp_path / "linked/0.jpg"], images) == ["0_jpg.png"]
    (images / "results.json").write_text(listed := json.dumps({"images": [{"id": 77, "file_name": "1.png"}]}))
    (tmp_path / "list.json").symlink_to(images / "results.json")
    for path in (images / "results.json", tmp_path / "list.json"):
        with pytest.raises(FileExistsError, match=r"list.json|results.json would be replaced by the results: choose another --output"):
            predict_files(steadydetr.load(checkpoint, "cpu"), [path], images, image_folder=images, overwrite=True)
    assert (images / "results.json").read_text() == listed


@pytest.mark.parametrize("name", ["a" * 251, "\U0001f600" * 60])
def test_names_as_long_as_they_may_be(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """In bytes. Another image of the same name leaves no room for more than a part of it."""
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / folder / f"{name}.png")
    predict_files(steadydetr.load(checkpoint, "cpu"), [tmp_path / folder for folder in "abc"], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3 and (tmp_path / "out/results.json").exists()


def test_classes_must_agree_by_name(checkpoint: Path) -> None:
    card = load_detector(checkpoint).card
    assert align_classes(("ring", "disc"), card) == [1, -1, -1, -1, 0]
    with pytest.raises(ValueError, match=r"others: \['star'\]"):
        evaluate_checkpoint(checkpoint, "shapes:images=2", workers=0, device="cpu")


def test_damaged_checkpoints_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_checkpoint(tmp_path / "absent")
    (checkpoint / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_detector(checkpoint)


def test_an_interrupted_write_keeps_the_checkpoint_before(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    monkeypatch.setattr("steadydetr.checkpoints.folder._replace_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_detector(checkpoint, {"x": torch.zeros(1)}, load_detector(checkpoint).card)
    assert (checkpoint / "model.safetensors").read_bytes() == before
