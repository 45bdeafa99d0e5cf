"""Data without a split to validate on are divided, by names, classes and a seed alone; images in both splits are told."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steadydetr.checkpoints.folder import load_progress
from steadydetr.cli import main
from steadydetr.data import DataConfig, open_data
from steadydetr.data.check import check_data
from steadydetr.data.dataset import join_data, take_images
from steadydetr.data.hold_out import LARGEST_FAMILY, HoldOut, families
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts import ALL, layout_of
from steadydetr.data.opening import open_train_and_val
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import RunFolder
from steadydetr.training.loop import train
from steadydetr.training.preparation import open_both
from tests.data_folders import COCO, coco_folder, coco_with, picture
from tests.exports import EXPORTS, export
from tests.test_layouts_b import WRITERS, Item
from tests.test_train import StopAfter, tiny


def index_of(labels: Sequence[Sequence[int]], names: Sequence[str] = (), classes: int = 0) -> AnnotationIndex:
    """Images of these labels."""
    flat = [label for of_one in labels for label in of_one]
    classes = classes or max(flat, default=0) + 1
    return AnnotationIndex.build(
        image_ids=np.arange(len(labels)),
        files=names or [f"images/{number}.jpg" for number in range(len(labels))],
        sizes=np.full((len(labels), 2), 9),
        counts=[len(of_one) for of_one in labels],
        boxes_xyxy=np.tile([1, 1, 5, 5], (len(flat), 1)),
        labels=flat,
        classes=tuple(f"class {label}" for label in range(classes)),
        category_ids=tuple(range(classes)),
    )


def random_labels(images: int, classes: int, seed: int = 0) -> list[list[int]]:
    """Objects of classes of which each is half as frequent as the one before."""
    rng = np.random.default_rng(seed)
    shares = 0.5 ** np.arange(classes)
    return [rng.choice(classes, rng.poisson(3), p=shares / shares.sum()).tolist() for _ in range(images)]


def held_names(index: AnnotationIndex, hold_out: HoldOut) -> set[str]:
    return {index.file(position) for position in np.flatnonzero(hold_out.choose(index)).tolist()}


# The choice


TOGETHER = [
    ["car_jpg.rf.0a1b2c.jpg", "car_jpg.rf.ffee99.jpg", "car.jpg"],  # Roboflow
    ["cat.jpg", "cat - Copy.jpg", "cat - Copy (2).jpg"],  # Windows
    ["dog.jpg", "dog copy.jpg", "dog copy 2.jpg"],  # macOS
    ["cow.jpg", "cow (copy).jpg", "cow (another copy).jpg", "cow (3rd copy).jpg"],  # GNOME
    ["bus.jpg", "bus (1).jpg", "bus(2).jpg"],  # browsers
    ["x/van.jpg", "y/van.jpg", "y\\van.png"],  # other folders and endings
    ["Stra\N{LATIN SMALL LETTER SHARP S}e \N{LATIN SMALL LETTER O WITH DIAERESIS}.jpg", "STRASSE o\N{COMBINING DIAERESIS}.JPG"],  # systems
]
APART = [
    "clip_0001.jpg",
    "clip_0002.jpg",
    "photo-1.jpg",
    "photo-2.jpg",
    "scan (1).jpg",  # of a series, whose first one is no scan.jpg
    "scan (2).jpg",
    *(f"room{number}/image.jpg" for number in range(LARGEST_FAMILY + 1)),
    *(f"download ({number}).jpg" for number in range(1, LARGEST_FAMILY + 1)),  # pictures that a browser saved from a search
    "download.jpg",
]


def test_versions_of_a_picture_are_a_family() -> None:
    names = [name for family in TOGETHER for name in family] + APART
    found = families(names)
    assert [len(set(found[: len(TOGETHER[0])]))] == [1]
    keys = dict(zip(names, found, strict=True))
    assert all(len({keys[name] for name in family}) == 1 for family in TOGETHER)
    assert len({keys[family[0]] for family in TOGETHER}) == len(TOGETHER) and len({keys[name] for name in APART}) == len(APART)


def test_what_a_group_is_can_be_said() -> None:
    names = ["a/clip1_001.jpg", "b/clip1_002.jpg", "clip2_001.jpg", "other.jpg", "more.jpg"]
    one, two, three, four, five = families(names, r"(clip\d+)_")
    assert one == two and len({one, three, four, five}) == 4 and len(set(families(names))) == 5
    with pytest.raises(ValueError, match=r"val_group = '\(' is no regular expression"):
        HoldOut(val_group="(")
    with pytest.raises(ValueError, match=r"cannot be divided.*--data\.val-group \^. puts them into one group"):
        HoldOut(val_group="^.").choose(index_of([[0], [0]], ["a1.jpg", "a2.jpg"]))


def test_no_family_is_divided() -> None:
    """Not even of augmented copies alone, of which each has many."""
    names = [f"train/{number // 3}_jpg.rf.{number:x}.jpg" for number in range(300)]
    labels = [[label % 4] for label in range(100) for _ in range(3)]
    held = held_names(index_of(labels, names), HoldOut())
    assert abs(len(held) - 30) <= 3 and len({name.partition("_")[0] for name in held}) == len(held) / 3


def test_the_share_holds_for_all_images_and_for_every_class() -> None:
    labels = random_labels(1000, 8)
    index = index_of(labels)
    for share in (0.1, 0.3, 0.5):
        held = HoldOut(val_share=share).choose(index)
        assert abs(held.sum() - share * len(labels)) < 8 + 1  # a class may be rounded up
        for label in range(8):
            has = np.array([label in of_one for of_one in labels])
            assert abs((has & held).sum() - share * has.sum()) < 1 + 0.02 * has.sum()
        empty = np.array([not of_one for of_one in labels])
        assert abs((empty & held).sum() - share * empty.sum()) <= 1


def test_a_class_keeps_an_image_to_train_on() -> None:
    """Rare ones are looked at first, so that they are on both sides where that can be."""
    labels = [[0], [0, 1], [0, 1, 2], [0], [0, 3], [0, 3], *([0] for _ in range(14))]
    for seed in range(20):
        held = HoldOut(val_seed=seed).choose(index_of(labels))
        train = Counter(label for of_one, is_val in zip(labels, held, strict=True) if not is_val for label in of_one)
        assert all(train[label] for label in range(4)) and held.sum() >= 2


def test_the_choice_is_of_names_and_seed_alone() -> None:
    """The order of files, the class of another image and the ids do not matter; another seed does."""
    labels = random_labels(200, 3)
    index = index_of(labels)
    held = held_names(index, HoldOut())
    order = np.random.default_rng(1).permutation(200)
    assert held_names(index.keep_images(order), HoldOut()) == held
    backslashes = index_of(labels, [index.file(position).replace("/", "\\") for position in range(200)])
    assert held_names(backslashes, HoldOut()) == {name.replace("/", "\\") for name in held}
    other = held_names(index, HoldOut(val_seed=1))
    assert len(other & held) < len(held) / 2


def test_added_images_leave_the_others_where_they_are() -> None:
    """But for some at the border, at most one for each class and each image."""
    labels = random_labels(500, 5)
    before = held_names(index_of(labels, classes=5), HoldOut())
    for more in (1, 5, 50):
        names = [f"images/{number}.jpg" for number in range(500)] + [f"images/new{number}.jpg" for number in range(more)]
        after = held_names(index_of(labels + random_labels(more, 5, seed=2), names, 5), HoldOut())
        old = {name for name in after if "new" not in name}
        assert len(before ^ old) <= min(more, 12) and len(after) >= len(before)


@pytest.mark.parametrize("images", [2, 3, 5, 9])
def test_small_sets_are_divided_too(images: int) -> None:
    assert HoldOut().choose(index_of([[0]] * images)).sum() == 1
    assert HoldOut().choose(index_of([[label] for label in range(images)])).sum() == 1  # where each has a class of its own
    names = [f"{number}/image.jpg" for number in range(images)]  # which look like versions of one
    assert HoldOut().choose(index_of([[0]] * images, names)).sum() == 1


def test_a_share_is_above_none_and_below_all() -> None:
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"val_share = .* must be a share of the images, above 0 and below 1"):
            DataConfig(val_share=share)


# Places


def json_folder(root: Path, images: int = 8, prefix: str = "") -> Path:
    """A COCO file beside images of two classes; prefix: of the names of images."""
    names = [f"{prefix}{number}.png" for number in range(images)]
    for name in names:
        picture(root / name)
    entries = [{"id": number, "file_name": name, "width": 8, "height": 6} for number, name in enumerate(names, 1)]
    boxes = [
        {"id": n, "image_id": n, "category_id": (3, 9)[n % 2], "bbox": [1, 1, 3, 4], "area": 12, "iscrowd": 0} for n in range(1, images + 1)
    ]
    (root / "result.json").write_text(json.dumps({**COCO, "images": entries, "annotations": boxes}))
    return root


UNSPLIT = [name for name, (_, splits, *_) in EXPORTS.items() if splits == (ALL,)]


def write_unsplit(name: str, root: Path) -> Path:
    if name in EXPORTS:
        export(name, root)
        return root
    items = [Item(f"{number}.png", (30, 20), (("nut", 1, 1, 9, 9),)) for number in range(4)]
    WRITERS[name](root, {"train": items})
    if name.startswith("LabelStudio"):
        (root / "train.json").rename(root / "export.json")
    elif name == "Labelme":
        for file in (root / "train").iterdir():
            file.rename(root / file.name)
        (root / "train").rmdir()
    else:
        shutil.move(root / "train", root / "photos")
    return root


@pytest.mark.parametrize("name", [*UNSPLIT, "LabelStudio", "LabelStudio, JSON-MIN", "Labelme", "ImageFolder", "ImageFolder, CSV"])
def test_every_layout_calls_its_one_split_all(name: str, tmp_path: Path) -> None:
    """And it is divided into train and val, which together are all."""
    place = str(write_unsplit(name, tmp_path))
    assert layout_of(place).splits(place) == (ALL,)
    whole, train, val = (open_data(place, split).index for split in (ALL, "train", "val"))
    parts = [{one.file(position) for position in range(len(one))} for one in (train, val)]
    assert not parts[0] & parts[1] and all(parts)
    assert parts[0] | parts[1] == {whole.file(position) for position in range(len(whole))}
    report = check_data(place)
    assert [split.name for split in report.splits] == ["train", "val"] and "is not split" in report.held_out[0]
    assert sum(split.images for split in report.splits) == len(whole)


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    """Train is divided where there is no val, and a test split is left alone. In Python train is what the place calls so."""
    for split in ("train", "test"):
        coco_folder(tmp_path, splits=(split,))
    said: list[str] = []
    found = open_train_and_val(DataConfig(str(tmp_path)), say=said.append)
    assert (len(found.train.index), len(found.val.index)) == (1, 1) and "has no split to validate on beside train" in said[0]
    assert found.train.name.endswith("-train") and found.val.name.endswith("-val")
    assert len(open_data(tmp_path, "test").index) == len(open_data(tmp_path, "train").index) == 2
    assert len(open_data(tmp_path, "val").index) == 1
    coco_folder(tmp_path, splits=("dev",))  # which is another word for it
    found = open_train_and_val(DataConfig(str(tmp_path)))
    assert (len(found.train.index), len(found.val.index), found.divisions) == (2, 2, [])


def test_a_split_that_is_named_must_be_there(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    with pytest.raises(ValueError, match=r"no annotation file for split 'minival'; it holds instances_train\.json"):
        open_train_and_val(DataConfig(str(tmp_path), val_split="minival"))


def test_with_a_source_to_validate_on_nothing_is_divided(tmp_path: Path) -> None:
    a, b = json_folder(tmp_path / "a", prefix="a"), json_folder(tmp_path / "b", 3, prefix="b")
    found = open_train_and_val(DataConfig(str(a), str(b)))
    assert (len(found.train.index), len(found.val.index), found.divisions) == (8, 3, [])


def test_joined_places_are_divided_one_by_one(tmp_path: Path) -> None:
    a, b = json_folder(tmp_path / "a", prefix="a"), json_folder(tmp_path / "b", 3, prefix="b")
    for split in ("train", "val"):
        coco_folder(tmp_path / "c", splits=(split,))
    found = open_train_and_val(DataConfig(f"{a}+{b}+{tmp_path / 'c'}"))
    assert [len(part.index) for part in found.train.parts] == [7, 2, 2]  # type: ignore[attr-defined]
    assert [len(part.index) for part in found.val.parts] == [1, 1, 2]  # type: ignore[attr-defined]
    assert [division.place for division in found.divisions] == [str(a), str(b)]
    joined = join_data([found.train, found.val])
    some = take_images(joined, np.array([1, 6, 9, 13]), "some")
    assert [some.index.file(i) for i in range(4)] == [joined.index.file(i) for i in (1, 6, 9, 13)]
    assert all(some.load_image(i).shape == (6, 8, 3) for i in range(4))


def test_what_cannot_be_divided_says_what_to_do(tmp_path: Path) -> None:
    one = json_folder(tmp_path, 1)
    with pytest.raises(
        ValueError, match=r"brings no split to validate on.*: there is one\. Add images, or name others.*--data\.val-source"
    ):
        open_train_and_val(DataConfig(str(one)))
    report = check_data(one)
    assert [finding.kind for finding in report.findings if finding.fatal] == ["missing split"] and report.splits[0].images == 1


def test_few_images_and_classes_on_one_side_are_told(tmp_path: Path) -> None:
    place, said = json_folder(tmp_path, 3), list[str]()  # one image has a nut
    open_train_and_val(DataConfig(str(place)), say=said.append)
    assert said[0] == (
        f"{place} is not split: 1 of its 3 images (33%) are held out to validate on, chosen by name and class (--data.val-share 0.1,"
        " --data.val-seed 0). AP on so few tells little: a larger --data.val-share holds out more"
    )
    assert said[1] == f"{place}: too few images show nut: none of them is left to validate on"


# Runs


def recipe_on(place: Path | str, **data: Any) -> Recipe:
    recipe = tiny("small-dino", epochs=1, batch_size=2, stability_images=0)
    return replace(recipe, data=replace(recipe.data, source=str(place), **data))


def names(index: AnnotationIndex) -> list[str]:
    return [index.file(position) for position in range(len(index))]


@pytest.mark.slow
def test_a_run_keeps_its_division(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """splits.json has it; resuming and evaluating go by it, also where images were added, which a run that goes on does not take."""
    place, run = json_folder(tmp_path / "data"), tmp_path / "run"
    recipe = recipe_on(place, val_share=0.3)
    with monkeypatch.context() as patch:
        StopAfter(1, patch)
        assert not train(recipe, run, device="cpu")["finished"]
    (division,) = RunFolder(run).read_splits()
    assert (division.place, division.split) == (str(place), ALL) and len(division.val) == 2
    assert sorted((*division.train, *division.val)) == sorted(names(open_data(place, ALL).index))
    json_folder(place, 40)
    capsys.readouterr()
    main(["eval", str(run), "--data", str(place), "--device", "cpu", "--workers", "0"])
    out = capsys.readouterr().out
    assert "2 of its 8 images (25%) are held out to validate on" in out and "32 images that the run did not know are left out" in out
    with pytest.raises(ValueError, match=r"data has 32 images more than when the run began, the first is 8\.png"):
        train(recipe, run, resume=True, device="cpu")
    json_folder(place, 7)
    with pytest.raises(ValueError, match=r"was started otherwise.*data\.(train|val): "):
        train(recipe, run, resume=True, device="cpu")
    json_folder(place)
    moved = place.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(HoldOut, "choose", None)  # another version may choose otherwise
    StopAfter(2, monkeypatch)
    assert not train(recipe_on(moved, val_share=0.3), run, resume=True, device="cpu")["finished"]
    assert load_progress(run / "last")["step"] == 2


def test_evaluation_on_a_divided_split_is_of_the_runs_part(tmp_path: Path) -> None:
    coco_folder(tmp_path / "data")
    found = open_train_and_val(DataConfig(str(tmp_path / "data"), val_seed=3))
    for split, part in (("train", found.train), ("val", found.val)):
        assert names(open_data(tmp_path / "data", split, divisions=found.divisions).index) == names(part.index)


def test_a_damaged_splits_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text('{"format": 2, "divisions": [{"place": "a", "split": "all", "train": [1], "val": []}]}')
    with pytest.raises(ValueError, match=r"splits\.json: "):
        RunFolder(tmp_path).read_splits()


# The same images twice


def said_of(place: Path | str, **data: Any) -> list[str]:
    said: list[str] = []
    open_both(recipe_on(place, **data), said.append)
    return said


REFUSED = r"all images to validate on are trained on too: .*--data\.same-images allow"


@pytest.mark.parametrize("case", ["asked twice", "all twice", "the same source", "a link", "lists", "shapes"])
def test_equal_splits_are_refused_unless_asked_for(case: str, tmp_path: Path) -> None:
    place: Path | str = json_folder(tmp_path / "data")
    options: dict[str, Any] = {"val_split": "all"}
    if case == "asked twice":
        coco_folder(tmp_path / "data", splits=("train", "val"))
        options = {"val_split": "train"}
    elif case == "all twice":
        options |= {"train_split": "all"}
    elif case == "the same source":
        options = {"val_source": str(place)}
    elif case == "a link":
        (tmp_path / "link").symlink_to(place)
        options = {"val_source": str(tmp_path / "link")}
    elif case == "lists":  # two files for the same images
        shutil.copy(tmp_path / "data/result.json", tmp_path / "data/val.json")
        (tmp_path / "data/result.json").rename(tmp_path / "data/train.json")
        options = {}
    elif case == "shapes":
        place, options = "shapes:size=64,images=8", {"val_split": "train"}
    with pytest.raises(ValueError, match=REFUSED):
        said_of(place, **options)
    assert any("are trained on too" in sentence for sentence in said_of(place, same_images="allow", **options))
    if case == "lists":
        (finding,) = [finding for finding in check_data(place).findings if finding.fatal]
        assert finding.kind == "same images" and "--data.same-images allow" in finding.message


def test_some_images_in_both_splits_are_a_warning(tmp_path: Path) -> None:
    """Whether an image is the same, its file tells or its content, not its name."""
    coco_folder(tmp_path, splits=("train", "val"))
    assert not [sentence for sentence in said_of(tmp_path) if "trained on too" in sentence]
    assert "image in both splits" not in {finding.kind for finding in check_data(tmp_path).findings}
    shutil.copy(tmp_path / "train/1.png", tmp_path / "val/1.png")
    assert "1 of the 2 images to validate on are trained on too: 1.png" in said_of(tmp_path)
    assert [f.file for f in check_data(tmp_path).findings if f.kind == "image in both splits"] == ["1.png"]


def test_versions_of_an_image_in_both_splits_are_told(tmp_path: Path) -> None:
    """Of Roboflow, where someone made the versions before the splits."""
    for split, files in (("train", ("a_jpg.rf.1.png", "b_jpg.rf.2.png")), ("val", ("A_jpg.rf.3.png", "c_jpg.rf.4.png"))):
        images = [{"id": i, "file_name": file, "width": 8, "height": 6} for i, file in enumerate(files, 1)]
        coco_folder(tmp_path, {**COCO, "images": images}, (split,))
        for file in files:
            picture(tmp_path / split / file)
    sentence = "of 1 of the 2 images to validate on other versions are trained on, by their names: A_jpg.rf.3.png"
    assert sentence in said_of(tmp_path)
    found = [f for f in check_data(tmp_path).findings if f.kind == "versions of an image in both splits"]
    assert [finding.message for finding in found] == [sentence] and not found[0].fatal


def test_other_shapes_of_the_same_names_are_no_overlap() -> None:
    assert not said_of("shapes:size=64,images=8", val_source="shapes:size=64,images=8,seed=1", val_split="train")


def test_classes_that_only_validation_has_are_told(tmp_path: Path) -> None:
    only_nuts = coco_with(annotations=[COCO["annotations"][0]])
    coco_folder(tmp_path, only_nuts)
    coco_folder(tmp_path, splits=("val",))
    assert any("has objects of classes that no image to train on shows: bolt" in sentence for sentence in said_of(tmp_path))


def test_what_is_wrong_with_the_training_split_is_told_first(tmp_path: Path) -> None:
    """Where both splits are broken alike, as after a wrong encoding."""
    for split in ("train", "val"):
        path = tmp_path / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "\u00e9"}]}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"instances_train\.json is not utf-8 text"):
        open_train_and_val(DataConfig(source=str(tmp_path)))
