"""Layouts of data as tools export them: each is recognised by one class and gives the same targets; faults are named."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from steadydetr.cli import main
from steadydetr.data import open_data
from steadydetr.data.check import check_data
from steadydetr.data.dataset import Dataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.layouts import DataLayout, Finding, NoSplit, layout_of
from steadydetr.kinds import options
from steadydetr.limits import Limits
from tests.data_folders import picture
from tests.exports import CLASSES, EXPORTS, NAMES, NAMES_LIST, Photo, coco, export, of, write, xml

Target = tuple[tuple[int, ...], list[list[float]], list[str]]


def targets(dataset: Dataset) -> dict[str, Target]:
    """Size, boxes and names of classes of every image, by the last part of its name."""
    index, found = dataset.index, {}
    for position in range(len(index)):
        rows = index.rows(position)
        names = [index.classes[label] for label in index.labels[rows]]
        found[index.file(position).rpartition("/")[2]] = (tuple(index.sizes[position]), index.boxes_xyxy[rows].tolist(), names)
        assert dataset.load_image(position).shape[:2] == tuple(index.sizes[position])
    assert not index.crowd.any() and not index.difficult.any() and index.boxes_xyxy.dtype == np.float32
    return found


def expected(photos: tuple[Photo, ...]) -> dict[str, Target]:
    return {
        p.name.rpartition("/")[2]: (p.size[::-1], [[float(np.float32(v)) for v in box[1:]] for box in p.boxes], [box[0] for box in p.boxes])
        for p in photos
    }


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_gives_the_same_targets(name: str, tmp_path: Path) -> None:
    """Bit for bit, with the splits that it has; and nothing of it is a fault."""
    photos = export(name, tmp_path)
    kind, splits, _, _ = EXPORTS[name]
    layout = layout_of(str(tmp_path))
    assert type(layout).__name__ == kind
    assert layout.splits(str(tmp_path)) == splits
    for split in splits:
        assert targets(open_data(tmp_path, split)) == expected(of(split, photos))
    report = check_data(tmp_path, splits)
    assert not report.fatal
    classes = {open_data(tmp_path, split).index.classes for split in splits}
    assert len(classes) == 1


@pytest.mark.parametrize("name", EXPORTS)
def test_no_other_layout_claims_an_export(name: str, tmp_path: Path) -> None:
    """So that the order in which layouts are asked does not matter."""
    export(name, tmp_path)
    claiming = [kind.__name__ for kind in options(DataLayout).values() if kind().recognises(str(tmp_path))]
    assert claiming == [EXPORTS[name][0]]


def faults(root: Path, splits: tuple[str, ...] = ("train",)) -> list[str]:
    return [str(finding) for finding in check_data(root, splits).findings if finding.fatal]


def remarks(root: Path, split: str = "train") -> list[str]:
    """What `train` says; `check` says the same."""
    said, found = list[str](), list[Finding]()
    open_data(root, split, say=said.append)
    layout_of(str(root)).inspect(str(root), split, found.append)
    assert said == [f"{finding.kind}: {finding}" for finding in found] and set(found) <= set(check_data(root, (split,)).findings)
    return [finding.message for finding in found]


def yolo(root: Path, label: str | bytes = "0 0.5 0.5 0.5 0.5\n", description: str = NAMES_LIST) -> Path:
    """One image of 8 x 6 pixels. Gives its label file."""
    picture(root / "images/train/a.png")
    (root / "data.yaml").write_text(f"train: images/train\nval: images/train\n{description}", encoding="utf-8")
    path = root / "labels/train/a.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(label if isinstance(label, bytes) else label.encode())
    return path


LABEL_FAULTS: dict[str, tuple[str | bytes, str]] = {
    "four columns": (
        "0 0.5 0.5 0.5\n",
        "line 1: it has 4 columns: a line is class x y width height, or class x1 y1 x2 y2 x3 y3 [.]{3}([.] |$)",
    ),
    "a class alone": ("0 .5 .5 .5 .5\n0\n", "line 2: it has 1 columns"),
    "a class beyond the names": (
        "\n0 .5 .5 .5 .5\n4 .5 .5 .5 .5",
        "line 3: it has the class 4, but the classes are 0 to 3. If these labels count",
    ),
    "a negative class": ("-1 .5 .5 .5 .5", "line 1: it has the class -1"),
    "half a class": ("0.5 .5 .5 .5 .5", "line 1: it has the class 0.5"),
    "pixels": ("0 4 3 8 6", "line 1: it has 4 among its coordinates, which are shares of the image's width and height, 0 to 1"),
    "a negative coordinate": ("0 .5 -1.5 .5 .5", "line 1: it has -1.5 among its coordinates"),
    "NaN": ("0 .5 nan .5 .5", "line 1: it has nan among its coordinates"),
    "infinity": ("0 .5 .5 inf .5", "line 1: it has inf among its coordinates"),
    "comma decimals": ("0 0,5 0,5 0,5 0,5", "line 1: it has '0,5': write a point in place of the comma"),
    "a name of a class": ("0 .5 .5 .5 .5\nbolt .5 .5 .5 .5", "line 2: it has 'bolt', which is no number"),
    "a name in other letters": ("Öse .5 .5 .5 .5", "line 1: it has 'Öse', which is no number"),
    "several": ("0 1\n\n0 2\n0 .5 .5 .5 .5\n0 3", "line 1: it has 2 columns.*; and 2 more lines are wrong"),
    "several words": ("x\n0 .5 .5 .5 .5\ny", "line 1: it has 'x', which is no number; and 1 more lines are wrong"),
    "no text": (b"0 .5 .5 .5 .5\xff\n", "is not utf-8 text"),
    "a polygon of pixels": ("0 .1 .1 .5 .1 80 .5", "line 1: it has 80 among its coordinates"),
}


@pytest.mark.parametrize("kind", LABEL_FAULTS)
def test_labels_that_cannot_be_used_are_named(kind: str, tmp_path: Path) -> None:
    """With file and line; `check` reads the lines that can be used."""
    label, message = LABEL_FAULTS[kind]
    path = yolo(tmp_path, label)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message) as raised:
        open_data(tmp_path)
    assert "\n" not in str(raised.value)
    report = check_data(tmp_path, ("train",))
    assert any(re.search(message, str(finding)) for finding in report.findings if finding.fatal) and len(report.splits) == 1
    usable = 0 if isinstance(label, bytes) else len(re.findall(r"^0 \.5 \.5 \.5 \.5$", label, re.M))
    assert sum(report.splits[0].class_counts.values()) == usable


@pytest.mark.parametrize(
    "label",
    ["0 .5 .5 .5 .5\r\n", "\ufeff0 .5 .5 .5 .5", "0\t0.5\t0.5  0.5 0.50\n\n \n", "0.0 5e-1 .5 .5 .5\r", "\n\n0 .5 .5 .5 .5"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_labels_may_be_written_in_many_ways(label: str, encoding: str, tmp_path: Path) -> None:
    yolo(tmp_path, label.encode(encoding))
    assert open_data(tmp_path).index.boxes_xyxy.tolist() == [[2.0, 1.5, 6.0, 4.5]]
    assert not faults(tmp_path)


def test_what_becomes_a_box_is_said(tmp_path: Path) -> None:
    """In one sentence for each kind, with the number and the first place."""
    path = yolo(
        tmp_path,
        "0 .5 .5 .5 .5\n0 .5 .5 .5 .5 .9\n1 .1 .1 .5 .1 .5 .5 .1 .5\n1 0 0 1 0 .5 1\n1 0 0 1 0 .5 1 .25\n2 .5 .5 .25 .5\n2 .5 .5 .25 .5\n",
    )
    assert remarks(tmp_path) == [
        f"1 lines with a sixth column, a confidence are taken as boxes, without regard to it; the first: {path}, line 2",
        f"2 polygons are taken as the boxes around them; the first: {path}, line 4",
        f"1 oriented boxes or polygons of four corners are taken as the boxes around them; the first: {path}, line 3",
        f"3 lines that repeat another of their file are left out; the first: {path}",
    ]


DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "no YAML": ("names: [a", "data.yaml is not YAML: "),
    "a tab": ("names:\n\t- a\n", "data.yaml is not YAML: "),
    "code": ("names: !!python/object/apply:os.system [ls]", "data.yaml is not YAML: could not determine a constructor"),
    "aliases": ("a: &a [x]\nnames: *a", r"data.yaml uses aliases \(\*name\), which no description of a data set needs"),
    "nested": ("names: " + "[" * 3000, "data.yaml is not YAML: "),
    "too long": ("names: [a]\n#" + "x" * 2**20, "data.yaml has 1.0 MiB"),
    "names without a number": ("nc: 2\nnames: [a]", "nc is 2, but names lists 1 classes"),
    "a gap": ("names: {0: a, 2: b}", "the keys of names must be the numbers of the classes: 0 to 1, each once"),
    "a key twice": ('names: {0: a, "0": b}', "the keys of names must be the numbers"),
    "a truth": ("names: [a, no]", "name 1 of names is no text for YAML: put it in quotes"),
    "a list in it": ("names: [[a]]", "name 0 of names is no text"),
    "no names": ("names:", "names must list the classes"),
    "a word": ("names: cat", "names must list the classes"),
    "a name twice": ("names: [a, b, a]", "classes 0 and 2 are both called 'a'"),
    "an empty name": ("names: [a, '']", "the name of class 1 is empty"),
    "half a number": ("nc: 1.5", "nc must be the number of classes"),
    "keypoints": ("names: [a]\nkpt_shape: 17", "kpt_shape must be two numbers"),
    "a path that is none": ("names: [a]\ntest: [{a: b}]", "test must be a path, or a list of paths"),
    "a part that is missing": (
        "names: [a]\ntest: [images/train, images/other]",
        "test: images/other is not there, which is a part of the split",
    ),
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_descriptions_of_yolo_that_cannot_be_used_are_named(kind: str, tmp_path: Path) -> None:
    description, message = DESCRIPTIONS[kind]
    yolo(tmp_path, description=description)
    with pytest.raises(ValueError, match=message) as raised:
        open_data(tmp_path)
    assert str(tmp_path / "data.yaml") in str(raised.value) and "\n" not in str(raised.value)
    assert any(re.search(message, line) for line in faults(tmp_path))


def test_names_of_yolo_may_be_counted_or_numbers(tmp_path: Path) -> None:
    yolo(tmp_path, description="nc: 2\n")
    assert open_data(tmp_path).index.classes == ("class_0", "class_1")
    yolo(tmp_path, description="names: {'1': 7, 0: two words}\n")
    assert open_data(tmp_path).index.classes == ("two words", "7")


def test_a_place_may_be_the_description_itself(tmp_path: Path) -> None:
    """Also where it lies beside another one, which a folder alone leaves open."""
    yolo(tmp_path)
    (tmp_path / "other.yml").write_text("train: images/train\nnames: [one, two, three, four, five]\n")
    with pytest.raises(ValueError, match=r"several files that describe a data set of YOLO: data.yaml, other.yml. Give one"):
        open_data(tmp_path)
    assert open_data(tmp_path / "data.yaml").index.classes == CLASSES
    assert len(open_data(tmp_path / "other.yml").index.classes) == 5


def test_a_split_whose_folder_is_missing_is_named(tmp_path: Path) -> None:
    """Roboflow names a test split where it exports none."""
    export("YOLO of Roboflow", tmp_path)
    with pytest.raises(NoSplit, match=r"data.yaml has no split 'test': test: ../test/images is not there"):
        open_data(tmp_path, "test")
    export("YOLO", tmp_path / "plain")
    with pytest.raises(NoSplit, match=r"data.yaml has no split 'test'; it holds train, val"):
        open_data(tmp_path / "plain", "test")


def test_splits_may_be_called_as_the_place_calls_them(tmp_path: Path) -> None:
    """And otherwise than by another year."""
    photos = export("VOC of Roboflow", tmp_path / "voc")
    export("COCO", tmp_path / "coco")
    for place, split in (("voc", "val"), ("voc", "valid"), ("voc", "validation"), ("coco", "val2017"), ("coco", "valid"), ("coco", "val")):
        assert len(open_data(tmp_path / place, split).index) == len(of("val", photos))
    for place, split in (("voc", "val2014"), ("coco", "val2014"), ("voc", "other")):
        with pytest.raises(NoSplit):
            open_data(tmp_path / place, split)


def test_places_that_are_not_split_say_so(tmp_path: Path) -> None:
    for name in ("YOLO of Label Studio", "VOC of labelImg", "CVAT", "COCO of Label Studio"):
        export(name, tmp_path / name)
        with pytest.raises(NoSplit, match="is not split, so it has no split 'test': all its images are the split 'all'"):
            open_data(tmp_path / name, "test")


def test_paths_of_another_machine_are_told(tmp_path: Path) -> None:
    export("YOLO of several folders", tmp_path)
    assert remarks(tmp_path, "val")[:1] == [
        f"1 path of another place is read as images/v in place of /content/drive/mine/images/v; the first: {tmp_path / 'set.yml'}"
    ]
    export("YOLO of Roboflow", tmp_path / "roboflow")
    assert not remarks(tmp_path / "roboflow")
    elsewhere = tmp_path / "elsewhere"
    yolo(elsewhere)
    write(tmp_path / "there.yaml", f"path: {elsewhere}\ntrain: images/train\n{NAMES}")
    assert not remarks(tmp_path / "there.yaml")


def test_yolo_stays_in_its_folder(tmp_path: Path) -> None:
    """Roboflow's `../train/images` means the folder beside the file, even where one lies above it."""
    export("YOLO of Roboflow", tmp_path / "one" / "set")
    picture(tmp_path / "one/train/images/strange.png")
    assert "strange.png" not in {open_data(tmp_path / "one/set").index.file(i) for i in range(4)}
    outside = tmp_path / "outside"
    yolo(outside)
    for place in ("../outside/images/train", str(outside / "images/train")):
        write(tmp_path / "set" / "data.yaml", f"train: {place}\n{NAMES}")
        with pytest.raises(ValueError, match=r"lies outside the data folder .*--data.outside allow"):
            open_data(tmp_path / "set")
        assert len(open_data(tmp_path / "set", limits=Limits(outside="allow")).index.labels) == 1
    write(tmp_path / "listed" / "data.yaml", f"train: list.txt\n{NAMES}")
    write(tmp_path / "listed" / "list.txt", f"{outside / 'images/train/a.png'}\n../outside/images/train/a.png\n")
    with pytest.raises(ValueError, match=r"outside the data folder|there is no image"):
        open_data(tmp_path / "listed")
    assert open_data(tmp_path / "listed", limits=Limits(outside="allow")).index.counts.tolist() == [1, 1]


@pytest.mark.parametrize("linked", ["images", "labels", "images/train/a.png", "labels/train/a.txt", "data.yaml"])
def test_links_out_of_a_yolo_folder_are_refused(linked: str, tmp_path: Path) -> None:
    root, outside = tmp_path / "set", tmp_path / "outside"
    yolo(root)
    outside.mkdir()
    os.rename(root / linked, outside / "moved")
    os.symlink(outside / "moved", root / linked)
    with pytest.raises(ValueError, match=r"is a link to .*outside the data folder"):
        open_data(root)
    assert faults(root)
    assert len(open_data(root, limits=Limits(outside="allow")).index.labels) == 1


def test_lists_of_yolo_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    yolo(tmp_path, description=NAMES_LIST + "test: list.txt\n")
    write(tmp_path / "list.txt", "./images/train/a.png\n\nnotes.doc\nimages/missing.png\n")
    found = faults(tmp_path, ("test",))
    assert any(re.search(r"list.txt: line 3: 'notes.doc' is no image", line) for line in found)
    assert any(re.search(r"there is no image .*images/missing.png", line) for line in found)
    write(tmp_path / "list.txt", "images\\train\\a.png\n")
    assert open_data(tmp_path, "test").index.file(0) == "images/train/a.png"


def test_classes_of_yolo_without_description_are_asked_for(tmp_path: Path) -> None:
    export("YOLO of Label Studio", tmp_path)
    write(tmp_path / "labels/classes.txt", "one\n")
    with pytest.raises(ValueError, match=r"classes.txt and .*labels/classes.txt list different classes"):
        open_data(tmp_path, "all")
    os.remove(tmp_path / "labels/classes.txt")
    write(tmp_path / "classes.txt", "one\n\nthree\n")
    with pytest.raises(ValueError, match="the name of class 1 is empty"):
        open_data(tmp_path, "all")
    os.remove(tmp_path / "classes.txt")
    with pytest.raises(ValueError, match=r"has label files of YOLO, but no names of classes: list them, one a line, in its classes.txt"):
        open_data(tmp_path, "all")
    for name in ("a.yaml", "b.yaml"):
        write(tmp_path / name, NAMES_LIST)
    with pytest.raises(ValueError, match=r"has several files that name classes: a.yaml, b.yaml. Keep one of them"):
        open_data(tmp_path, "all")


def test_labelimg_writes_the_classes_beside_the_labels(tmp_path: Path) -> None:
    """Also in a folder images/ that holds both."""
    for name in ("classes.txt", "a.txt"):
        write(tmp_path / "images" / name, "one\n" if name == "classes.txt" else "0 .5 .5 .5 .5\n")
    picture(tmp_path / "images/a.png")
    index = open_data(tmp_path, "all").index
    assert index.classes == ("one",) and index.counts.tolist() == [1]


def test_what_is_no_image_of_the_set_is_left_alone(tmp_path: Path) -> None:
    """Hidden folders of notebooks, and what macOS packs beside each file."""
    for name in ("YOLO", "VOC of labelImg", "YOLO of labelImg", "COCO of Label Studio"):
        photos, root = export(name, tmp_path / name), tmp_path / name
        for path in [path for path in root.rglob("*") if path.is_file()]:
            write(path.parent / f"._{path.name}", "macOS")
            write(path.parent / ".ipynb_checkpoints" / path.name, "a copy")
        split = EXPORTS[name][1][0]
        assert targets(open_data(root, split)) == expected(of(split, photos))


def test_keypoints_are_left_out(tmp_path: Path) -> None:
    yolo(tmp_path, "0 .5 .5 .5 .5 .1 .1 2 .2 .2 1\n", NAMES_LIST + "kpt_shape: [2, 3]\n")
    assert open_data(tmp_path).index.boxes_xyxy.tolist() == [[2.0, 1.5, 6.0, 4.5]]
    assert "boxes with keypoints are read without these" in remarks(tmp_path)[0]


def test_images_without_label_files_are_told(tmp_path: Path) -> None:
    path = yolo(tmp_path)
    picture(tmp_path / "images/train/b.png")
    assert open_data(tmp_path).index.counts.tolist() == [1, 0]
    assert "1 images without a label file are taken to show no object; the first: labels/train/b.txt" in remarks(tmp_path)[0]
    os.remove(path)
    assert remarks(tmp_path)[0].endswith("none is where it was looked for; the first: labels/train/a.txt")


@pytest.mark.parametrize("name", ["1a2b-b.txt", "b.TXT", "Capture_d%C3%A9cran.txt"])
def test_label_files_of_no_image_are_told_where_images_have_none(name: str, tmp_path: Path) -> None:
    path = yolo(tmp_path)
    write(path.with_name(name), path.read_text())
    assert not remarks(tmp_path)
    picture(tmp_path / "images/train/b.png")
    (told,) = remarks(tmp_path)
    assert "1 label files have the name of no image and are not read while 1 of 2 images have no label file" in told and name in told


def test_sizes_are_kept_for_each_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large sets; the images of all splits lie in one folder."""
    monkeypatch.setattr("steadydetr.data.picture_sizes.KEPT_FROM", 1)
    monkeypatch.setenv("STEADYDETR_CACHE", str(tmp_path / "cache"))
    export("YOLO", tmp_path / "set")
    splits = EXPORTS["YOLO"][1]
    first = [open_data(tmp_path / "set", split).index.sizes.tolist() for split in splits]

    def read(folder: DataFolder, path: Path) -> tuple[int, int]:
        raise AssertionError(path)

    monkeypatch.setattr(DataFolder, "picture_size", read)
    assert [open_data(tmp_path / "set", split).index.sizes.tolist() for split in splits] == first and len(splits) > 1


def test_boxes_that_reach_out_are_kept_as_in_other_layouts(tmp_path: Path) -> None:
    yolo(tmp_path, "0 0 .5 1 .5\n0 .5 .5 -.25 .5\n")
    assert open_data(tmp_path).index.boxes_xyxy.tolist() == [[-4, 1.5, 4, 4.5], [5, 1.5, 3, 4.5]]
    assert [f.kind for f in check_data(tmp_path, ("train",)).findings] == [
        "classes without objects",
        "box without area",
        "box reaches out of the image",
    ]


# CVAT


def cvat(root: Path, shapes: str, size: str = 'width="8" height="6"') -> Path:
    """One image of 8 x 6 pixels with these shapes. Gives annotations.xml."""
    picture(root / "images/a.png")
    labels = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
    head = f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
    return write(root / "annotations.xml", f'{head}<image id="0" name="a.png" {size}>{shapes}</image></annotations>')


def shape(kind: str, attributes: str, inside: str = "") -> str:
    return f'<{kind} label="bolt" source="manual" occluded="1" {attributes} z_order="0">{inside}</{kind}>'


R = 8**0.5  # half the diagonal of a square of 4 pixels
SHAPES: dict[str, tuple[str, list[float], str]] = {
    "box": ('xtl="1" ytl="2" xbr="5.25" ybr="6"', [1, 2, 5.25, 6], ""),
    "a box turned by 90 degrees": ('xtl="1" ytl="2" xbr="5" ybr="4" rotation="90.00"', [2, 1, 4, 5], "1 rotated boxes"),
    "a box turned by 45 degrees": (
        'xtl="2" ytl="1" xbr="6" ybr="5" rotation="45.00"',
        [4 - R, 3 - R, 4 + R, 3 + R],
        "1 rotated boxes",
    ),
    "polygon": ('points="1,2;5.5,0;3,4"', [1, 0, 5.5, 4], "1 polygons"),
    "mask": ('rle="0, 12" left="1" top="2" width="4" height="3"', [1, 2, 5, 5], "1 masks"),
    "ellipse": ('cx="4" cy="3" rx="2" ry="1"', [2, 2, 6, 4], "1 ellipses"),
    "an ellipse turned by 90 degrees": ('cx="4" cy="3" rx="2" ry="1" rotation="270"', [3, 1, 5, 5], "1 ellipses"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_cvat_become_boxes(name: str, tmp_path: Path) -> None:
    attributes, box, said = SHAPES[name]
    kind = next(kind for kind in ("box", "polygon", "mask", "ellipse") if kind in name)
    path = cvat(tmp_path, shape(kind, attributes))
    np.testing.assert_allclose(open_data(tmp_path, "all").index.boxes_xyxy, [box], rtol=1e-6)
    expected_remark = [f"{said} are taken as the boxes around them; the first: image a.png, {kind} 1"] if said else []
    assert remarks(tmp_path, "all") == expected_remark and path.exists()


def test_shapes_without_boxes_are_left_out_and_told(tmp_path: Path) -> None:
    more = "".join(shape(kind, 'points="1,2;3,4"') for kind in ("points", "polyline", "points"))
    more += '<tag label="bolt" source="manual"></tag><skeleton label="bolt"><points label="1" outside="0" points="1,1"/></skeleton>'
    cvat(tmp_path, more + shape("box", 'xtl="1" ytl="2" xbr="5" ybr="6"') + shape("box", 'outside="1" xtl="1" ytl="2" xbr="5" ybr="6"'))
    assert len(open_data(tmp_path, "all").index.labels) == 1
    kinds = [line.partition(" are left out")[0] for line in remarks(tmp_path, "all")]
    assert kinds == [f"{n} shapes of the kind {kind}" for n, kind in ((2, "points"), (1, "polyline"), (1, "tag"), (1, "skeleton"))]


def test_crowd_and_difficult_of_cvat_are_read(tmp_path: Path) -> None:
    """Attributes that mean the same in COCO's and VOC's exports of CVAT."""
    corners = 'xtl="1" ytl="2" xbr="5" ybr="6"'
    attribute = '<attribute name="{}">{}</attribute>'
    shapes = [(), ("is_crowd", "true"), ("difficult", "true"), ("difficult", "false"), ("colour", "true")]
    cvat(tmp_path, "".join(shape("box", corners, attribute.format(*one) if one else "") for one in shapes))
    index = open_data(tmp_path, "all").index
    assert index.crowd.tolist() == [False, True, False, False, False]
    assert index.difficult.tolist() == [False, False, True, False, False]


def test_frames_of_a_video_are_found(tmp_path: Path) -> None:
    """CVAT exports them as files, but names them without an ending."""
    path = cvat(tmp_path, "")
    path.write_text(path.read_text().replace('name="a.png"', 'name="frame_000000"'))
    picture(tmp_path / "images/frame_000000.PNG")
    assert open_data(tmp_path, "all").index.file(0) == "images/frame_000000.PNG"


CVAT_FAULTS: dict[str, tuple[str, str, str]] = {
    "a track": (
        "</image>",
        '</image><track id="0" label="bolt"></track>',
        "export of `CVAT for video`.*export .* again as `CVAT for images 1.1`",
    ),
    "another root": ("annotations>", "annotationz>", "is not a file of CVAT|no layout of data was recognised"),
    "half a file": ("</image></annotations>", "", "is not XML: "),
    "entities": ("<annotations>", '<!DOCTYPE a [<!ENTITY x "y">]><annotations>', "defines entities"),
    "no label": (r"<labels>.*</labels>", "<labels/>", "its label 'bolt' is none of the task"),
    "an unknown label": ('label="bolt"', 'label="screw"', "image a.png, box 1: its label 'screw' is none of the task: bolt, nut m4"),
    "no number": ('xtl="1"', 'xtl="one"', "image a.png, box 1: xtl is 'one' instead of a number"),
    "not finite": ('xtl="1"', 'xtl="inf"', "image a.png, box 1: xtl is 'inf' instead of a number"),
    "no corner": ('xbr="5"', "", "image a.png, box 1: xbr is empty or missing"),
    "no size": ('width="8"', "", "image a.png: width is empty or missing"),
    "no width": ('width="8"', 'width="0"', "image a.png: width 0 and height 6 are no size"),
    "half a pixel": ('width="8"', 'width="8.5"', "image a.png: width 8.5 and height 6 are no size"),
    "no name": ('name="a.png"', 'name=" "', "cannot be the name of a file"),
    "points that are none": ("<box ", '<polygon label="bolt" points="1;2"/><box ', "image a.png, polygon 1: its points are not x,y;x,y"),
    "no image": (r"<image .*</image>", "", "lists no image that can be used|is not split"),
}


@pytest.mark.parametrize("kind", CVAT_FAULTS)
def test_files_of_cvat_that_cannot_be_used_are_named(kind: str, tmp_path: Path) -> None:
    old, new, message = CVAT_FAULTS[kind]
    path = cvat(tmp_path, shape("box", 'xtl="1" ytl="2" xbr="5" ybr="6"'))
    content = re.sub(old, new, path.read_text(encoding="utf-8"), flags=re.S)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        open_data(tmp_path, "all")
    if kind != "another root":
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert kind == "no image" or any(re.search(message, line) for line in faults(tmp_path, ("all",)))


def test_ids_of_cvat_are_its_numbers_or_names(tmp_path: Path) -> None:
    export("CVAT", tmp_path)
    assert open_data(tmp_path, "all").index.image_ids.tolist() == list(range(6))
    content = (tmp_path / "annotations.xml").read_text(encoding="utf-8").replace('image id="5"', 'image id="0"')
    write(tmp_path / "annotations.xml", content)
    assert open_data(tmp_path, "all").index.image_ids.tolist() == [1, 2, 3, 4, 5, 6]


# VOC and COCO


def test_images_that_nobody_has_annotated_are_left_out_and_told(tmp_path: Path) -> None:
    """Label Studio writes no file for an image without boxes either, which is not known to have none."""
    export("VOC of labelImg", tmp_path)
    picture(tmp_path / "new.png")
    assert len(open_data(tmp_path, "all").index) == 6
    (line,) = remarks(tmp_path, "all")
    assert line.startswith("1 images without an XML file are left out") and line.endswith("the first: new.png")


def test_faults_of_voc_without_lists_are_named(tmp_path: Path) -> None:
    export("VOC of Roboflow", tmp_path)
    write(tmp_path / "train" / "z.xml", "<annotation><object><name>bolt</name></object></annotation>")
    write(tmp_path / "valid" / "z.xml", "<annotation>")
    with pytest.raises(ValueError, match=r"valid/z.xml is not XML|train/z.xml: object 1 is without bndbox"):
        open_data(tmp_path)
    assert {Path(f.file).name for f in check_data(tmp_path, ("train", "val")).findings if f.fatal} == {"z.xml"}
    write(tmp_path / "val" / "a.xml", xml(Photo("a.png", (8, 6), ())))
    with pytest.raises(ValueError, match=r"has valid/ and val/, which both could be split 'val'"):
        open_data(tmp_path, "val")


def test_other_xml_files_are_no_voc(tmp_path: Path) -> None:
    write(tmp_path / "layout.xml", "<annotations><x/></annotations>")
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no layout of data was recognised"):
        open_data(tmp_path)


def test_a_coco_file_may_be_the_place(tmp_path: Path) -> None:
    photos = export("COCO, a file for each split", tmp_path)
    assert targets(open_data(tmp_path / "my_val_set.json", "all")) == expected(of("val", photos))
    write(tmp_path / "other_train.json", json.dumps(coco(photos)))
    with pytest.raises(ValueError, match=r"has other_train.json and train.json for split 'train': remove one of them, or give one"):
        open_data(tmp_path)


@pytest.mark.parametrize("name", ["COCO", "COCO in annotations"])
def test_a_coco_file_in_annotations_may_be_the_place(name: str, tmp_path: Path) -> None:
    """Its images lie beside that folder, not in it."""
    photos, files = export(name, tmp_path), sorted((tmp_path / "annotations").glob("*.json"))
    assert len(files) == 2
    for path in files:
        split = "val" if "val" in path.stem else "train"
        assert targets(open_data(path, "all")) == expected(of(split, photos))


def test_json_files_that_are_no_coco_are_left_alone(tmp_path: Path) -> None:
    for number in range(30):  # one for each image, of a tool that is not known
        write(tmp_path / f"{number}.json", json.dumps({"version": "5", "regions": [], "imagePath": "a.png"}))
    write(tmp_path / "package.json", json.dumps({"info": {}, "name": "x"}))
    with pytest.raises(ValueError, match="no layout of data was recognised"):
        open_data(tmp_path)


def test_what_is_made_of_polygons_is_said_by_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line, with the file of the description as the place."""
    boxes = sum(len(photo.boxes) for photo in of("train", export("YOLO with polygons", tmp_path / "set")))
    words = ["--data", str(tmp_path / "set/data.yaml"), "--output", str(tmp_path / "run"), "--device", "cpu", "--data.workers", "0"]
    main(["train", "small-dino", *words, "--training.epochs", "1", "--training.batch-size", "2", "--training.warmup-steps", "1"])
    assert f"{boxes} polygons are taken as the boxes around them" in " ".join(capsys.readouterr().out.split())


TEXTS = (".json", ".xml", ".txt", ".yaml", ".yml", ".data", ".names", ".labels")


@pytest.mark.parametrize("name", EXPORTS)
def test_changed_exports_are_read_or_named_in_one_line(name: str, tmp_path: Path) -> None:
    """Bytes of its text files changed, removed and repeated at random; `check` never raises anything but that there is no such data."""
    export(name, tmp_path)
    split = EXPORTS[name][1][0]
    files = sorted(path for path in tmp_path.rglob("*") if path.name.endswith(TEXTS))
    random = np.random.default_rng(0)
    for _ in range(40):
        path = files[random.integers(len(files))]
        content = path.read_bytes()
        start = int(random.integers(len(content) + 1))
        piece = (
            bytes(random.integers(0, 256, 2, dtype=np.uint8))
            if random.random() < 0.5
            else random.choice([b"-", b"9", b"\n", b"", b" ", b"/"])
        )
        path.write_bytes(content[:start] + bytes(piece) + content[start + int(random.integers(0, 4)) :])
        for read in (lambda: open_data(tmp_path, split), lambda: check_data(tmp_path, (split,))):
            try:
                read()
            except ValueError as error:
                assert "\n" not in str(error).partition("What was looked for:")[0]
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["labels/train/a.txt", "data.yaml", "annotations.xml", "train.json", "a.xml"])
def test_pipes_in_place_of_files_are_refused(name: str, tmp_path: Path) -> None:
    """At once, since reading one could wait for ever."""
    if name == "labels/train/a.txt":
        yolo(tmp_path).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=r"is a pipe, not a file|no layout of data was recognised"):
        open_data(tmp_path)
