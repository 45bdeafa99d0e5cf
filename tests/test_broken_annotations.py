"""Annotation files with something wrong in them: each is read rightly, or named in one line, by `open_data` and by `check`."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steadydetr.data import open_data
from steadydetr.data.check import check_data
from steadydetr.data.coco_classes import class_list
from steadydetr.data.layouts import ENCODING
from steadydetr.tools.image_files import list_sources
from tests.data_folders import BOX, COCO, XML, coco_folder, coco_with, picture, voc_folder

NAMES = json.dumps(coco_with(category={"name": "Schräubchen"}), ensure_ascii=False)
WHOLE = json.dumps(COCO)


def faults(root: Path) -> list[str]:
    """The findings of `check` on a training split that stop training, as lines."""
    return [str(finding) for finding in check_data(root, ("train",)).findings if finding.fatal]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_of_json_are_read(encoding: str, tmp_path: Path) -> None:
    coco_folder(tmp_path, NAMES.encode(encoding))
    assert open_data(tmp_path).index.classes == ("Schräubchen", "bolt")


JSON_FAULTS: dict[str, tuple[bytes, str]] = {
    "latin-1": (NAMES.encode("latin-1"), r"instances_train.json is not utf-8 text \(byte 0xe4 at position \d+\): save it as UTF-8"),
    "half of UTF-16": (NAMES.encode("utf-16")[:-1], r"instances_train.json is not utf-16 text"),
    "NaN and more": (WHOLE.replace("0.5", "NaN").encode()[:-1], r"instances_train.json is not JSON: .*, in line 1, near .*\"bbox\": \[NaN"),
    "empty": (b"", r"instances_train.json is not JSON"),
    "truncated": (WHOLE[:90].encode(), r"instances_train.json is not JSON"),
    "lone surrogate": (WHOLE.replace("nut", r"\ud800").encode(), r"instances_train.json is not JSON"),
    "two values": (f"{WHOLE}\n[]".encode(), r"instances_train.json is not JSON: .* in line 2"),
    "nested": (WHOLE.replace("0.5", "[" * 100_000).encode(), r"instances_train.json is not JSON that can be read: it is nested too deep"),
    "nested where nobody looks": (f'{{"info": {"[" * 100_000}{"]" * 100_000}, {WHOLE[1:]}'.encode(), "nested too deep"),
    "a list": (b"[]", r"instances_train.json is not a COCO annotation file: Expected `object`, got `array`"),
    "no categories": (json.dumps({**COCO, "categories": []}).encode(), r"instances_train.json lists no category that can be used"),
    "no list of categories": (b'{"images": [], "annotations": []}', r"instances_train.json is not a COCO .*required field `categories`"),
    "no images": (json.dumps({**COCO, "images": []}).encode(), r"instances_train.json lists no image that can be used"),
}


@pytest.mark.parametrize("kind", JSON_FAULTS)
def test_json_that_cannot_be_used_is_named(kind: str, tmp_path: Path) -> None:
    content, message = JSON_FAULTS[kind]
    coco_folder(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path)
    assert any(re.search(message, line) for line in faults(tmp_path))


ENTRY_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "id of half a number": ({"image": {"id": 1.5}}, r"instances_train.json.*images\[0\].*Expected `int \| str`, got `float`"),
    "id of 4000 digits": ({"annotation": {"image_id": 10**4000}}, r"annotation 1: its image_id 1000.* is no image that the file lists"),
    "category id beyond 64 bits": ({"category": {"id": 2**64 - 1}}, r"categories\[0\].*Expected `int` <= \d+"),
    "id as text": ({"image": {"id": "1"}}, r"annotation 1: its image_id 1 is no image that the file lists"),
    "no file name": ({"image": {"file_name": None}}, r"images\[0\].*Expected `str`, got `null`"),
    "empty file name": ({"image": {"file_name": " "}}, r"image 1: file_name ' ' cannot be the name of a file"),
    "NUL in a file name": ({"image": {"file_name": "a\0.png"}}, r"image 1: file_name 'a\\x00.png' cannot be the name of a file"),
    "size as text": ({"image": {"width": "8"}}, r"images\[0\].*Expected `float \| null`, got `str`"),
    "half a pixel": ({"image": {"width": 8.5}}, r"image 1: width 8.5 and height 6 are no size"),
    "endless size": ({"image": {"height": 1e300}}, r"image 1: width 8 and height 1e\+300 are no size"),
    "NaN": (
        {"annotation": {"bbox": [1, 2, float("nan"), 4]}},
        r"annotations\[0\].*`null` - at `bbox\[2\]`; NaN and Infinity count as null",
    ),
    "Infinity": ({"annotation": {"bbox": [1, 2, 3, float("-inf")]}}, r"annotations\[0\].*bbox\[3\]`; NaN and Infinity count as null"),
    "category without letters": ({"category": {"name": " "}}, "category 3: its name is empty"),
    "box of three": ({"annotation": {"bbox": [1, 2, 3]}}, r"annotations\[0\].*Expected `array` of length 4"),
    "no box": ({"annotation": {"bbox": None}}, r"annotations\[0\].*got `null`"),
    "endless number": ({"annotation": {"bbox": [1, 2, 3, 10**400]}}, r"annotations\[0\].*out of range"),
    "category id that is no number": ({"annotation": {"category_id": "nut"}}, r"annotations\[0\].*Expected `int`.* at `category_id`"),
    "half a category": ({"annotation": {"category_id": 3.5}}, r"annotations\[0\].*Expected `int`.* at `category_id`"),
    "unknown image": ({"annotation": {"image_id": 77}}, r"annotation 1: its image_id 77 is no image that the file lists"),
    "unknown category": ({"annotation": {"category_id": 4}}, r"annotation 1: its category_id 4 is no category that the file lists"),
    "image id twice": ({"image": {"id": 2}}, r"image 2: ids must be unique"),
    "category id twice": ({"category": {"id": 9}}, r"category 9: 'bolt' has the id of another category"),
    "category name twice": ({"category": {"name": "bolt"}}, r"category 9: another category is called 'bolt' too"),
    "category without name": ({"category": {"name": None}}, r"categories\[0\].*Expected `str`, got `null`"),
}


@pytest.mark.parametrize("kind", ENTRY_FAULTS)
def test_entries_that_cannot_be_used_are_named(kind: str, tmp_path: Path) -> None:
    """With the file; `check` goes on with the others."""
    changes, message = ENTRY_FAULTS[kind]
    coco_folder(tmp_path, coco_with(**changes))
    with pytest.raises(ValueError, match=message) as raised:
        open_data(tmp_path)
    assert "instances_train.json" in str(raised.value) and "\n" not in str(raised.value)
    report = check_data(tmp_path, ("train",))
    assert any(re.search(message, str(finding)) for finding in report.findings if finding.fatal) and len(report.splits) == 1


def test_check_names_every_wrong_entry(tmp_path: Path) -> None:
    content = coco_with(image={"width": "8"}, category={"name": 5}, annotation={"bbox": []})
    content["annotations"][2]["image_id"] = 50
    coco_folder(tmp_path, content)
    entries = [finding.entry for finding in check_data(tmp_path, ("train",)).findings]
    assert {"images[0]", "categories[0]", "annotations[0]", "annotation 3"} <= set(entries)
    coco_folder(
        tmp_path, coco_with(image={"width": "8", "file_name": 3}, annotation={"bbox": [1, 2, "x", 4], "area": "y", "image_id": None})
    )
    found = [finding.message for finding in check_data(tmp_path, ("train",)).findings if finding.kind == "not COCO"]
    for field in ("width", "file_name", "bbox[2]", "area", "image_id"):
        assert sum(f"`{field}`" in message for message in found) == 1, (field, found)
    del (content := coco_with(image={"id": [1]}))["images"][0]["file_name"]
    coco_folder(tmp_path, content)
    assert sum("images[0]" in finding.entry for finding in check_data(tmp_path, ("train",)).findings) == 2


def test_every_fault_of_an_xml_file_is_named(tmp_path: Path) -> None:
    voc_folder(tmp_path, XML.replace("<ymin>1", "<ymin>").replace("<xmax>5", "<xmax>wide").replace("<width>8", "<width>x"))
    line = faults(tmp_path)[0]
    for place in (
        "object 1 (nut), ymin is empty",
        "object 1 (nut), xmax is 'wide'",
        "object 2 (bolt), ymin",
        "object 2 (bolt), xmax",
        "width is 'x'",
    ):
        assert place in line
    voc_folder(tmp_path, XML.replace("<object>", "<object/>" * 30 + "<object>", 1))
    assert "object 20 is without name; and 10 more" in faults(tmp_path)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"annotation": {"iscrowd": None}},
        {"annotation": {"iscrowd": False}},
        {"annotation": {"iscrowd": 0.0}},
        {"annotation": {"id": "3f2a-uuid"}},
        {"annotation": {"id": None}},
        {"annotation": {"id": 2**70}},
        {"annotation": {"category_id": "3"}},
        {"annotation": {"category_id": 3.0}},
        {"category": {"id": "3"}, "annotation": {"category_id": "3"}},
        {"annotation": {"area": None}},
        {"annotation": {"area": -1, "segmentation": None}},
        {"annotation": {"area": float("nan"), "segmentation": float("inf")}, "image": {"width": float("nan")}},
        {"image": {"width": 8.0, "height": 6.0}},
        {"image": {"width": None, "height": None}},
        {"image": {"width": -1, "height": 0}},
    ],
)
def test_fields_whose_meaning_is_clear_are_read(changes: dict[str, Any], tmp_path: Path) -> None:
    coco_folder(tmp_path / "plain")
    coco_folder(tmp_path / "changed", coco_with(**changes))
    plain, changed = (open_data(tmp_path / name).index for name in ("plain", "changed"))
    for name in ("sizes", "boxes_xyxy", "labels", "crowd", "areas", "offsets"):
        assert np.array_equal(getattr(plain, name), getattr(changed, name)), name
    assert not check_data(tmp_path / "changed", ("train",)).findings


NAMES_ON_DISK = {  # as written in the annotation file, and as the file is called
    "of Windows": ("a\\b\\1.png", "a/b/1.png"),
    "composed otherwise": ("\u00e9.png", "e\u0301.png"),
    "decomposed otherwise": ("e\u0301/1.png", "\u00e9/1.png"),
    "with a backslash": ("a\\1.png", "a\\1.png"),
    "of an address": ("38%20(HD)%20(3)..png", "38 (HD) (3)..png"),
    "of an address with accents": ("d/Capture_d%C3%A9cran.png", "d/Capture_de\u0301cran.png"),
    "with a percent sign": ("10%20.png", "10%20.png"),
}


@pytest.mark.parametrize("kind", NAMES_ON_DISK)
def test_names_of_other_systems_are_found(kind: str, tmp_path: Path) -> None:
    written, real = NAMES_ON_DISK[kind]
    coco_folder(tmp_path, coco_with(image={"file_name": written}))
    picture(tmp_path / "train" / real)
    dataset = open_data(tmp_path)
    dataset.check_files()
    assert dataset.index.file(0) == real and dataset.load_image(0).shape == (6, 8, 3)
    assert not check_data(tmp_path, ("train",)).findings
    (tmp_path / "list.json").write_text(json.dumps({"images": [{"id": 1, "file_name": written}]}))
    assert list_sources([tmp_path / "list.json"], tmp_path / "train")[0].path == tmp_path / "train" / real


def test_names_of_windows_lead_nowhere_else(tmp_path: Path) -> None:
    picture(tmp_path / "secret.png")
    coco_folder(tmp_path / "data", coco_with(image={"file_name": "..\\..\\secret.png"}))
    with pytest.raises(ValueError, match="outside the data folder"):
        open_data(tmp_path / "data").check_files()


@pytest.mark.parametrize("written", ["..\\..\\label-studio\\media\\upload\\4\\1.png", "C:\\me\\1.png", "/home/me/upload/1.png", "../1.png"])
def test_paths_of_another_machine_are_read_by_their_ends(written: str, tmp_path: Path) -> None:
    """As Label Studio from 1.16 on and X-AnyLabeling write them; but no image takes the annotations of another."""
    coco_folder(tmp_path, coco_with(image={"file_name": written}))
    dataset = open_data(tmp_path)
    dataset.check_files()
    assert dataset.index.file(0) == "1.png"
    (finding,) = check_data(tmp_path, ("train",)).findings
    assert f"are read by their ends; the first: 1.png in place of {written}" in finding.message and not finding.fatal
    other = coco_with(image={"file_name": written.replace("1.png", "2.png")})
    coco_folder(tmp_path, other)
    with pytest.raises(ValueError, match=r"image 1: file_name .* is not there, and its end, '2.png', is another image"):
        open_data(tmp_path)


@pytest.mark.parametrize("place", ["train", "images", "images/train"])
def test_names_may_begin_with_the_folder_of_the_images(place: str, tmp_path: Path) -> None:
    """As Label Studio writes them: images/1.png beside the folder images."""
    content = coco_with()
    for entry in content["images"]:
        entry["file_name"] = f"{place}/{entry['file_name']}"
        picture(tmp_path / entry["file_name"])
    coco_folder(tmp_path, content)
    dataset = open_data(tmp_path)
    dataset.check_files()
    assert dataset.load_image(0).shape == (6, 8, 3) and not check_data(tmp_path, ("train",)).findings


def test_a_data_set_one_folder_deeper_is_named(tmp_path: Path) -> None:
    """As archives are often unpacked."""
    coco_folder(tmp_path / "export" / "data")
    with pytest.raises(ValueError, match=r"lies one folder deeper: use .*export/data$"):
        open_data(tmp_path / "export")
    coco_folder(tmp_path / "export" / "more")
    with pytest.raises(ValueError, match=r"deeper: use (\S*)/data, or several that have the same classes: \1/data\+\1/more$"):
        open_data(tmp_path / "export")
    with pytest.raises(ValueError, match=r"Found there: export/. What was looked for: COCO: annotations/.*; Roboflow: "):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("set/train", "It is a part of .*/set: use that folder. What was looked for"),
        ("set/photos", "These are images alone: annotate them, or give the folder that holds their annotations too. What"),
        ("packed", "Unpack .*/packed/set.zip first. What"),
        ("packed/set.zip", "it is a file, which has to be unpacked"),
    ],
)
def test_what_to_do_with_a_place_that_is_no_data_set_is_said(place: str, advice: str, tmp_path: Path) -> None:
    coco_folder(tmp_path / "set")
    picture(tmp_path / "set/photos/1.png")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/set.zip").touch()
    with pytest.raises(ValueError, match=advice):
        open_data(tmp_path / place)


def test_where_no_image_is_there_that_is_said_once(tmp_path: Path) -> None:
    """As where the folder of the annotations alone was given."""
    coco_folder(tmp_path / "set", splits=("train", "val"))
    place, asked = tmp_path / "set/annotations", "give the folder that holds annotations and images, or say where the images are"
    assert [f.message for f in check_data(place).findings if f.kind == "missing image"] == [
        f"none of the 2 images is there: {asked}: --data PLACE,images-in=WHERE"
    ]
    with pytest.raises(ValueError, match=f"2 images are not in .*, the first is 1.png: {asked}"):
        open_data(place).check_files()


def test_a_box_beyond_float32_is_not_trained_on(tmp_path: Path) -> None:
    coco_folder(tmp_path, coco_with(annotation={"bbox": [1, 2, 1e300, 3], "area": 1e300}))
    with np.errstate(all="raise"):
        index = open_data(tmp_path).index
        assert index.usable().tolist() == [False, True, False]
    assert [f.kind for f in check_data(tmp_path, ("train",)).findings] == ["box of endless size"]


def test_an_image_without_size_and_file_costs_only_itself(tmp_path: Path) -> None:
    path = coco_folder(tmp_path, coco_with(image={"width": None}))
    (tmp_path / "train" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"image 1: cannot read the image .*1\.png"):
        open_data(tmp_path)
    report = check_data(tmp_path, ("train",))
    assert report.splits[0].images == 1 and [f.entry for f in report.findings] == ["image 1"]
    assert report.findings[0].file == str(path)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("utf-8", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("", "utf-16-le"),
        ("gb2312", "gbk"),
        ("Shift_JIS", "cp932"),
        ("latin-1", "latin-1"),
    ],
)
def test_encodings_of_xml_are_read(text: str, encoding: str, tmp_path: Path) -> None:
    name = "Öse" if encoding == "latin-1" else "螺丝" if encoding == "gbk" else "ねじ"
    head = f'<?xml version="1.0" encoding="{text}"?>' if text else ""
    voc_folder(tmp_path, (head + XML.replace("nut", name)).encode(encoding))
    assert open_data(tmp_path).index.classes == tuple(sorted(("bolt", name)))


ENTITY = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
XML_FAULTS: dict[str, tuple[str | bytes, str]] = {
    "external entity": (ENTITY + XML.replace("nut", "&x;"), "defines entities"),
    "billion laughs": ('<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>' + XML.replace("nut", "&b;"), "defines entities"),
    "entities in UTF-16": ((ENTITY + XML).encode("utf-16"), "defines entities"),
    "unknown entity": (XML.replace("nut", "&x;"), "is not XML: undefined entity"),
    "latin-1": (XML.replace("nut", "Öse").encode("latin-1"), r"is not utf-8 text \(byte 0xd6 at position \d+\): save it as UTF-8"),
    "unknown encoding": (f'<?xml version="1.0" encoding="klingon"?>{XML}', "has the encoding klingon, which is not known"),
    "encoding that is none": (f'<?xml version="1.0" encoding="punycode"?>{XML}', "has the encoding punycode, which is not known"),
    "encoding of bytes": (f'<?xml version="1.0" encoding="zlib"?>{XML}', "has the encoding zlib, which is not known"),
    "truncated": (XML[:-20], "is not XML: "),
    "empty": ("", "is not XML: no element found"),
    "another format": (XML.replace("annotation>", "annotations>"), r"is no annotation of Pascal VOC: it begins with <annotations>"),
    "NUL": (XML.replace("nut", "n\0t"), "is not XML: "),
    "width as text": (XML.replace("<width>8", "<width>eight"), "width is 'eight' instead of a number"),
    "endless width": (XML.replace("<width>8", "<width>inf"), "width is 'inf' instead of a number"),
    "half a pixel": (XML.replace("<width>8", "<width>8.5"), r"width 8\.5 and height 6 are no size"),
    "empty coordinate": (XML.replace("<ymin>1", "<ymin>"), r"object 1 \(nut\), ymin is empty or missing"),
    "coordinate that is no number": (XML.replace("<ymin>1", "<ymin>nan"), r"object 1 \(nut\), ymin is 'nan' instead of a number"),
    "no coordinate": (XML.replace("<xmax>5</xmax>", ""), r"object 1 \(nut\), xmax is empty or missing"),
    "no box": (XML.replace(BOX, ""), "object 1 is without bndbox"),
    "no name": (XML.replace("<name>nut</name>", "<name> </name>"), "object 1 is without name"),
}


@pytest.mark.parametrize("kind", XML_FAULTS)
def test_xml_that_cannot_be_used_is_named(kind: str, tmp_path: Path) -> None:
    content, message = XML_FAULTS[kind]
    path = voc_folder(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message) as raised:
        open_data(tmp_path)
    assert "\n" not in str(raised.value)
    assert any(re.search(message, line) for line in faults(tmp_path))


def test_whole_ids_may_be_written_with_a_decimal_point(tmp_path: Path) -> None:
    content = copy.deepcopy(COCO)
    for entry, field in ((content["images"][0], "id"), (content["categories"][1], "id")):
        entry[field] = float(entry[field])
    for annotation in content["annotations"]:
        annotation |= {"image_id": float(annotation["image_id"]), "category_id": float(annotation["category_id"])}
    coco_folder(tmp_path, content)
    index = open_data(tmp_path).index
    assert index.image_ids.tolist() == [1, 2] and index.category_ids == (3, 9) and len(index.labels) == 3
    assert not check_data(tmp_path, ("train",)).fatal


def test_names_of_xml_may_be_in_a_namespace(tmp_path: Path) -> None:
    voc_folder(tmp_path, XML.replace("<annotation>", '<annotation xmlns="urn:labels">'))
    assert len(open_data(tmp_path).index.labels) == 2 and not check_data(tmp_path, ("train",)).fatal


def test_lists_of_voc_may_name_the_files_of_images(tmp_path: Path) -> None:
    voc_folder(tmp_path, listed="a.png\na.b.PNG 1\n")
    voc_folder(tmp_path, listed="a.png\na.b.PNG 1\n", stem="a.b", image="a.b.png")
    index = open_data(tmp_path).index
    assert [index.file(position) for position in range(2)] == ["JPEGImages/a.png", "JPEGImages/a.b.png"]


def test_nested_xml_is_read(tmp_path: Path) -> None:
    voc_folder(tmp_path, XML.replace("</annotation>", "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>"))
    assert len(open_data(tmp_path).index.labels) == 2


@pytest.mark.parametrize("written", ["8.0", " 8 ", "8e0"])
def test_numbers_of_xml_may_be_written_in_many_ways(written: str, tmp_path: Path) -> None:
    voc_folder(tmp_path, XML.replace("<width>8", f"<width>{written}"))
    assert open_data(tmp_path).index.sizes.tolist() == [[6, 8]]


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>", "<size><width/></size>"])
def test_sizes_that_xml_does_not_tell_are_the_files(size: str, tmp_path: Path) -> None:
    xml = re.sub("<size>.*</size>", size, XML)
    voc_folder(tmp_path, xml)
    assert open_data(tmp_path).index.sizes.tolist() == [[6, 8]]
    (tmp_path / "JPEGImages" / "a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the image .*a\.png"):
        open_data(tmp_path)
    assert any("cannot read the image" in line for line in faults(tmp_path))


@pytest.mark.parametrize(
    ("written", "difficult"), [("1", True), ("true", True), (" True ", True), ("0", False), ("Unspecified", False), ("", False)]
)
def test_what_is_difficult_may_be_written_in_many_ways(written: str, difficult: bool, tmp_path: Path) -> None:
    voc_folder(tmp_path, XML.replace("<difficult>1", f"<difficult>{written}"))
    assert open_data(tmp_path).index.difficult.tolist() == [difficult, False]


def test_companions_that_macos_writes_are_no_annotations(tmp_path: Path) -> None:
    voc_folder(tmp_path)
    (tmp_path / "Annotations" / "._a.xml").write_bytes(b"\0\5\x16\7Mac OS X")
    assert len(open_data(tmp_path).index) == 1
    assert not check_data(tmp_path, ("train",)).findings


def test_one_bad_annotation_file_does_not_hide_another(tmp_path: Path) -> None:
    voc_folder(tmp_path, XML[:50], "a\nb\nc\n")
    voc_folder(tmp_path, listed="a\nb\nc\n", stem="b", image="b.jpg")
    report = check_data(tmp_path, ("train",))
    assert report.splits[0].images == 1
    assert {f.kind for f in report.findings} == {"unreadable annotation file", "missing annotation file"}
    assert any(finding.file.endswith("c.xml") for finding in report.findings)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", " 1\n", "  -1\n", "\n\n"])
def test_lists_of_other_systems_are_read(encoding: str, end: str, tmp_path: Path) -> None:
    voc_folder(tmp_path, listed=f"a{end}".encode(encoding))
    assert open_data(tmp_path).index.file(0) == "JPEGImages/a.png"
    report = check_data(tmp_path, ("train",))
    assert report.failed and not report.fatal
    assert [str(tmp_path / "ImageSets/Main/train.txt")] == [f.file for f in report.findings if f.kind == ENCODING]


@pytest.mark.parametrize("stem", ["my photo 1", "day/one", "a.b", "[x]", "²"])
@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".Jpg", ".jpeg", ".jfif", ".png", ".gif", ".ppm"])
def test_images_of_voc_are_found_by_their_stem(stem: str, ending: str, tmp_path: Path) -> None:
    """Whatever ending they have and the XML names."""
    voc_folder(tmp_path, XML.replace("a.png", "other"), f"{stem}\n", stem, f"{stem}{ending}")
    dataset = open_data(tmp_path)
    assert dataset.index.file(0) == f"JPEGImages/{stem}{ending}" and dataset.load_image(0).shape == (6, 8, 3)
    assert not check_data(tmp_path, ("train",)).findings


def test_of_several_images_the_xml_names_the_right_one(tmp_path: Path) -> None:
    voc_folder(tmp_path)
    picture(tmp_path / "JPEGImages" / "a.jpg")
    assert open_data(tmp_path).index.file(0) == "JPEGImages/a.png"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"photo\0\n", b"\xff\xfe\xff", b"\xe9\n", b"missing\n"])
def test_lists_that_cannot_be_used_are_named(content: bytes, tmp_path: Path) -> None:
    voc_folder(tmp_path, listed=content)
    with pytest.raises(ValueError, match=r"train\.txt|missing\.xml"):
        open_data(tmp_path)
    assert faults(tmp_path)


def test_check_says_what_training_would_stop_at(tmp_path: Path) -> None:
    """Two files for a split, no split to validate on, other classes in it."""
    coco_folder(tmp_path / "a", coco_with(images=COCO["images"][:1], annotations=COCO["annotations"][:1]))
    assert {f.kind for f in check_data(tmp_path / "a").findings} == {"missing split"}
    coco_folder(tmp_path / "b", coco_with(category={"name": "washer"}), ("train", "val"))
    coco_folder(tmp_path / "b")
    found = {f.kind: f for f in check_data(tmp_path / "b").findings}
    assert "only the first has nut, only the second has washer" in found["different classes"].message and found["different classes"].fatal
    os.rename(tmp_path / "a/annotations/instances_train.json", tmp_path / "a/annotations/instances_train1.json")
    coco_folder(tmp_path / "a", splits=("train2",))
    assert any("several annotation files" in line for line in faults(tmp_path / "a"))


def test_equal_names_in_different_folders_are_different_images(tmp_path: Path) -> None:
    for split, files in (("train", ("x/1.png", "y/1.png", "y/1.png")), ("val", ("z/1.png", "x/../x/1.png"))):
        images = [{"id": i, "file_name": file, "width": 8, "height": 6} for i, file in enumerate(files)]
        coco_folder(tmp_path, {**COCO, "images": images, "annotations": COCO["annotations"][::2]}, (split,))
        for file in files:
            picture(tmp_path / split / file)
    found = [(f.kind, f.file) for f in check_data(tmp_path).findings]
    assert found == [("image listed twice", "y/1.png"), ("image in both splits", "x/1.png")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [{"id": 1, "file_name": "\xe9.png"}]}', "is not utf-8 text"),
        (b'{"images": 3}', "is not a COCO image list"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "nested too deep|is not a COCO image list"),
        (b'{"images": [{"id": 1, "file_name": "\\u0000"}]}', "cannot be the name of a file"),
        (b'{"images": [{"id": 1.5, "file_name": "a.png"}]}', "Expected `int [|] str`, got `float`"),
        (b'{"images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]}', "image id 1 is used twice"),
        (b'{"images": [{"id": 1, "file_name": "../a.png"}]}', "outside the data folder .*--outside allow"),
    ],
)
def test_image_lists_that_cannot_be_used_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "list.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list_sources([path])


def test_image_lists_are_read(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('{"images": [{"id": 7, "file_name": "sub/a.png"}]}', encoding="utf-16")
    picture(tmp_path / "sub" / "a.png")
    (source,) = list_sources([tmp_path / "list.json"])
    assert (source.image_id, source.path) == (7, tmp_path / "sub/a.png")


def test_class_lists_are_read_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("nut\n螺丝\n", encoding="utf-16")
    assert class_list(str(path), 2)[0] == ("nut", "螺丝")
    path.write_bytes(b"\xe9t\xe9\n")
    with pytest.raises(ValueError, match=r"classes\.txt is not utf-8 text"):
        class_list(str(path), 1)
