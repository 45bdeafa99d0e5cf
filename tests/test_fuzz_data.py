"""Annotation files that hypothesis has mutated: each is read rightly or is an error that a user can mend, and `check` never raises.

What is right is told by a slow reading of the same JSON, which leaves out what it does not understand.
More examples: FUZZ=5000 python -m pytest tests/test_fuzz_data.py
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steadydetr.cli import USER_ERRORS
from steadydetr.data import open_data
from steadydetr.data.check import check_data
from steadydetr.data.images import FORMATS, open_picture
from steadydetr.data.index import AnnotationIndex
from tests.data_folders import COCO, XML, coco_folder, picture, voc_folder

EXAMPLES = int(os.environ.get("FUZZ", "40"))
fuzzed = settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)

ODD_NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 7.5, 1e308, -1e308, 1e-320, 2**31, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 10**400, math.nan, math.inf]
)
ODD_TEXTS = st.sampled_from(
    ["", ".", "..", "/", "1.png", "../1.png", "/etc/passwd", "\0", "x" * 5000, "[/b]", "\x1b[31m", "é\u202e", "\ud800", "true"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | ODD_NUMBERS | ODD_TEXTS | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["id", "name", "bbox", "x"]), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as keys and positions from the top."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(*path, key) for key in keys] + [place for key in keys for place in places(value[key], (*path, key))]


@st.composite
def mutated_json(draw: st.DrawFn) -> Any:
    """A COCO file in which up to four fields or entries are taken away, doubled or something else."""
    content = copy.deepcopy(COCO)
    for _ in range(draw(st.integers(1, 4))):
        if not (there := places(content)):
            break
        *path, key = draw(st.sampled_from(there))
        parent = content
        for step in path:
            parent = parent[step]
        change = draw(st.sampled_from(["drop", "replace", "replace", "repeat"]))
        if change == "drop":
            del parent[key]
        elif change == "replace" or not isinstance(parent, list):
            parent[key] = draw(VALUES)
        else:
            parent.append(copy.deepcopy(parent[key]))
    return content


@st.composite
def mutated_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A file that is cut, has bytes changed or repeated, or is something else altogether."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 12))
        change = draw(st.sampled_from(["cut", "put", "drop", "repeat"]))
        if change == "cut":
            del content[at:]
        elif change == "put":
            content[at : at + length] = draw(
                st.binary(max_size=12) | st.sampled_from([b"[" * 3000, b"<a>" * 3000, b"9" * 5000, b"\xef\xbb\xbf"])
            )
        elif change == "drop":
            del content[at : at + length]
        else:
            content[at:at] = content[max(0, at - length) : at] * draw(st.integers(1, 50))
    encoding = draw(st.sampled_from(["", "", "", "utf-16", "utf-32-be", "utf-8-sig", "latin-1", "gb18030"]))
    return content.decode("utf-8", "replace").encode(encoding, "replace") if encoding else bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "data"


def emptied(folder: Path) -> Path:
    """The folder, made anew for an example."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def assert_a_line(message: str) -> None:
    assert len(message.splitlines()) == 1 and not any(unicodedata.category(c) in ("Cc", "Cs") for c in message), repr(message)


def reading(root: Path) -> AnnotationIndex | None:
    """The training split, or None where it is an error of a user; `check` takes it too, and finds what keeps it from being read."""
    report = check_data(root, ("train",), workers=1)
    for finding in report.findings:
        assert_a_line(str(finding))
    try:
        index = open_data(root).index
    except USER_ERRORS as error:
        assert not isinstance(error, UnicodeError) and str(root) in str(error)
        assert_a_line(str(error))
        assert report.fatal
        return None
    assert len(report.splits) == 1
    assert index.sizes.min() > 0 and len(index.boxes_xyxy) == index.counts.sum() and (index.labels < len(index.classes)).all()
    return index


def slow_reading(content: dict[str, Any]) -> dict[str, Any]:
    """What a COCO file says that can be read: for every image its file and objects (class, xyxy, crowd)."""
    categories = {c["id"]: c["name"] for c in content["categories"]}
    found = {}
    for image in content["images"]:
        objects = []
        for annotation in content["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, w, h = annotation["bbox"]
                corners = tuple(float(np.float32(v)) for v in (x, y, x + w, y + h))
                objects.append((categories[annotation["category_id"]], corners, bool(annotation.get("iscrowd"))))
        found[image["id"]] = (image["file_name"], objects)
    return found


def as_found(index: AnnotationIndex) -> dict[str, Any]:
    found = {}
    for position, image in enumerate(index.image_ids.tolist()):
        rows = range(len(index.labels))[index.rows(position)]
        objects = [(index.classes[index.labels[row]], tuple(index.boxes_xyxy[row].tolist()), bool(index.crowd[row])) for row in rows]
        found[image] = (index.file(position), objects)
    return found


@fuzzed
@given(content=mutated_json())
def test_mutated_coco_is_read_rightly_or_named(content: Any, folder: Path) -> None:
    root = emptied(folder)
    coco_folder(root, content)
    index = reading(root)
    if index is None:
        return
    with np.errstate(over="ignore"):
        expected = slow_reading(content)
    found = as_found(index)
    assert found.keys() == expected.keys()
    for image, (file, objects) in expected.items():
        assert found[image][0] == file and len(found[image][1]) == len(objects)
        for (name, box, crowd), (found_name, found_box, found_crowd) in zip(objects, found[image][1], strict=True):
            assert (found_name, found_crowd) == (name, crowd)
            np.testing.assert_allclose(found_box, box, rtol=1e-5, atol=1e-30)


@fuzzed
@given(content=mutated_bytes(json.dumps(COCO).encode()))
def test_mutated_json_is_read_or_named(content: bytes, folder: Path) -> None:
    root = emptied(folder)
    coco_folder(root, content)
    reading(root)


@fuzzed
@given(content=mutated_bytes(f'<?xml version="1.0" encoding="utf-8"?>\n{XML}'.encode()))
def test_mutated_xml_is_read_or_named(content: bytes, folder: Path) -> None:
    root = emptied(folder)
    voc_folder(root, content)
    reading(root)


@fuzzed
@given(before=st.sampled_from(["8", "6", "2", "1", "5", "4", "nut", "a.png"]), text=st.text(max_size=8) | ODD_TEXTS)
def test_xml_with_other_values_is_read_or_named(before: str, text: str, folder: Path) -> None:
    root = emptied(folder)
    voc_folder(root, XML.replace(f">{before}<", f">{text}<").encode("utf-8", "surrogatepass"))
    reading(root)


@fuzzed
@given(content=mutated_bytes(b"a\nb 1\nc\n") | st.binary(max_size=40))
def test_mutated_lists_are_read_or_named(content: bytes, folder: Path) -> None:
    root = emptied(folder)
    for stem in "abc":
        voc_folder(root, listed=content, stem=stem, image=f"{stem}.png")
    reading(root)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    place = tmp_path_factory.mktemp("pictures")
    contents = {kind: picture(place / kind, (40, 30), format=kind).read_bytes() for kind in FORMATS}
    return contents.__getitem__


@fuzzed
@given(kind=st.sampled_from(FORMATS), data=st.data())
def test_mutated_pictures_are_read_or_named(kind: str, data: st.DataObject, pictures: Callable[[str], bytes], folder: Path) -> None:
    path = emptied(folder) / "a.jpg"
    path.write_bytes(data.draw(mutated_bytes(pictures(kind))))
    try:
        assert open_picture(path).mode == "RGB"
    except ValueError as error:
        assert str(path) in str(error)
        assert_a_line(str(error))
