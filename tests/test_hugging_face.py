"""Data sets of the package `datasets`, an extra: the same targets as from COCO, faults, and what is said without it."""

from __future__ import annotations

import io
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from steadydetr.data import Limits, open_data
from steadydetr.data.check import check_data
from steadydetr.data.folder import DataFolder
from steadydetr.data.layouts.hugging_face import Place, TableDataset
from tests.data_folders import picture
from tests.test_evaluation import one_class
from tests.test_layouts_b import CLASSES, FOLDER_OF, ITEMS, Item, coco, objects_of, targets


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def tables(kind: str = "lists", sizes: bool = True, corners: bool = False, named: bool = True, names: bool = True) -> Any:
    """The items as data sets: objects as a list of each field, or as a list of objects."""
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install steadydetr[hf]")
    label = datasets.ClassLabel(names=list(CLASSES)) if named else datasets.Value("string")
    box = datasets.List(datasets.Value("float64"), length=4)
    each = {"bbox": box, "category": label}
    listed = {"bbox": datasets.List(box), "category": datasets.List(label)}
    features = {"image": datasets.Image(), "objects": listed if kind == "lists" else datasets.List(each)}
    features |= {"width": datasets.Value("int32"), "height": datasets.Value("int32")} if sizes else {}

    def row(item: Item) -> dict[str, Any]:
        objects = objects_of(item)
        boxes = [[x, y, x + w, y + h] if corners else [x, y, w, h] for x, y, w, h in objects["bbox"]]
        categories = objects["categories"] if named else [CLASSES[number] for number in objects["categories"]]
        value: Any = {"bbox": boxes, "category": categories}
        if kind != "lists":
            value = [{"bbox": b, "category": c} for b, c in zip(boxes, categories, strict=True)]
        found = {"image": {"bytes": png(item.size), "path": item.name if names else None}, "objects": value}
        return found | ({"width": item.size[0], "height": item.size[1]} if sizes else {})

    return datasets.DatasetDict(
        {
            FOLDER_OF[split]: datasets.Dataset.from_list([row(item) for item in items], features=datasets.Features(features))
            for split, items in ITEMS.items()
        }
    )


def save_parquet(found: Any, root: Path) -> None:
    (root / "data").mkdir(parents=True)
    for split, table in found.items():
        table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("options", [{}, {"kind": "objects"}, {"sizes": False}, {"named": False}])
@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_tables_give_the_same_targets(
    saved: str, options: dict[str, Any], split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install steadydetr[hf]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found, root = tables(**options), tmp_path / "tables"
    found.save_to_disk(root) if saved == "disk" else save_parquet(found, root)
    coco(tmp_path / "coco", ITEMS)
    assert targets(root, split) == targets(tmp_path / "coco", split)
    assert {finding.kind for finding in check_data(root).findings} - {"classes without objects"} == {"box smaller than a pixel"}
    copy = pickle.loads(pickle.dumps(open_data(root, split)))  # as loading processes that are not forked get it
    assert (copy.load_image(0) == open_data(root, split).load_image(0)).all()


def test_corners_are_taken_where_they_are_said_and_never_guessed(tmp_path: Path) -> None:
    tables(corners=True).save_to_disk(tmp_path / "t")
    coco(tmp_path / "coco", ITEMS)
    assert targets(f"hf:{tmp_path / 't'},bbox=xyxy", "train") == targets(tmp_path / "coco", "train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"1 of 6 boxes end beyond their image, and all fit as corners: say which .*,bbox=xyxy"):
        open_data(tmp_path / "t", "train")
    assert open_data(f"hf:{tmp_path / 't'},bbox=xywh", "train").index.boxes_xyxy.max() > 101


def test_faults_name_the_row(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install steadydetr[hf]")
    features = {"image": datasets.Image(), "objects": {"bbox": datasets.List(datasets.List(datasets.Value("float64")))}}
    features["objects"]["category"] = datasets.List(datasets.ClassLabel(names=["nut"]))

    def save(name: str, cell: dict[str, Any], bbox: list[list[float]], category: list[int]) -> str:
        rows = [{"image": {"bytes": png((8, 6)), "path": None}, "objects": {"bbox": [[1, 1, 3, 3]], "category": [0]}}]
        rows.append({"image": cell, "objects": {"bbox": bbox, "category": category}})
        datasets.Dataset.from_list(rows, features=datasets.Features(features)).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    cell, box = {"bytes": png((8, 6)), "path": None}, [[1, 1, 2, 2]]
    cases = {
        save("a", {"bytes": b"no picture", "path": None}, box, [0]): "row 1: cannot read the image row 1: it is damaged",
        save("c", cell, box, [-1]): "row 1: its class -1 is none of the 1 class labels",
        save("d", cell, [[1, 1, 2]], [0]): "there are boxes that are not four numbers",
        save("e", cell, box, [0, 0]): "rows with other numbers of boxes than of classes",
    }
    for where, message in cases.items():
        with pytest.raises(ValueError, match=message):
            open_data(where)
        assert any(finding.fatal for finding in check_data(where).findings)
    plain = datasets.Dataset.from_list([{"text": "no image"}])
    plain.save_to_disk(tmp_path / "plain")
    with pytest.raises(ValueError, match="needs a column of images and one called objects; it has text"):
        open_data(tmp_path / "plain")


def test_images_that_are_files_lie_in_the_data_folder(tmp_path: Path) -> None:
    """A table may name files instead of holding images, as those that the hub keeps as files do."""
    for folder in ("inside", "outside"):
        picture(tmp_path / folder / "a.png")
    index = one_class([[1, 1, 3, 3]], [False])
    for folder, message in (("inside", ""), ("outside", "lies outside the data folder .*outside allow")):
        table = [{"image": {"bytes": None, "path": str(tmp_path / folder / "a.png")}}]
        sized = replace(index, sizes=np.array([[6, 8]], np.int32))
        dataset = TableDataset(sized, tmp_path / "inside", "t", DataFolder(tmp_path / "inside"), table)
        if message:
            with pytest.raises(ValueError, match=message):
                dataset.load_image(0)
        else:
            assert dataset.load_image(0).shape == (6, 8, 3)


@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_tables_outside_the_data_folder_are_read_only_if_allowed(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to parquet files, and names in what save_to_disk has written."""
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install steadydetr[hf]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found, root = tables(), tmp_path / "tables"
    if saved == "disk":
        found["train"].save_to_disk(root)
        (root / "data-00000-of-00001.arrow").rename(tmp_path / "other.arrow")
        state = json.loads((root / "state.json").read_text())
        (root / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": "../other.arrow"}]}))
    else:
        save_parquet(found, tmp_path / "elsewhere")
        root.mkdir()
        (root / "train.parquet").symlink_to(tmp_path / "elsewhere" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="outside the data folder"):
        open_data(root)
    split = "all" if saved == "disk" else "train"
    assert len(open_data(root, split, Limits(outside="allow")).index) == len(ITEMS["train"])


@pytest.mark.parametrize("words", ["bbox=cxcywh", "bbox", "colour=red"])
def test_options_that_are_none(words: str) -> None:
    with pytest.raises(ValueError, match=r"bbox=cxcywh must be xywh|is not understood; options are config"):
        open_data(f"hf:owner/name,{words}")
    assert Place.of("hf:owner/name,config=full,bbox=xyxy") == Place("owner/name", "full", "xyxy")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"owner/name needs the package datasets: pip install 'steadydetr\[hf\]'"):
        open_data("hf:owner/name")


def test_without_a_network_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install steadydetr[hf]")
    from huggingface_hub import constants

    asked: list[bool] = []

    def load(*_: Any, download_config: Any, **__: Any) -> None:
        asked.append(download_config.local_files_only and constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("no network")

    def unreachable(address: str) -> None:
        raise ConnectionError(f"{address} cannot be reached")

    monkeypatch.setattr("steadydetr.fetching.check_reachable", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load)
    for settings in (constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"owner/name cannot be loaded: .*Without a network: save it elsewhere with save_to_disk"):
        open_data("hf:owner/name")
    assert asked == [True] and not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE  # as they were before


def test_rows_of_two_splits_are_the_same_image_only_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without a name is called by its number, which is the same in every split."""
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install steadydetr[hf]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(name: str, val: list[int]) -> Path:
        """Grey pictures, named by how grey they are."""
        features = {"image": datasets.Image(), "objects": {"bbox": datasets.List(datasets.List(datasets.Value("float64")))}}
        features["objects"]["category"] = datasets.List(datasets.ClassLabel(names=["nut"]))
        found = {}
        for split, greys in (("train", [1, 2, 3]), ("validation", val)):
            pictures = [io.BytesIO() for _ in greys]
            for grey, file in zip(greys, pictures, strict=True):
                Image.fromarray(np.full((6, 8, 3), grey, np.uint8)).save(file, "PNG")
            rows = [{"image": {"bytes": f.getvalue()}, "objects": {"bbox": [[1, 1, 3, 3]], "category": [0]}} for f in pictures]
            found[split] = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        datasets.DatasetDict(found).save_to_disk(tmp_path / name)
        return tmp_path / name

    assert "image in both splits" not in {finding.kind for finding in check_data(save("other", [4, 5])).findings}
    shared = [finding for finding in check_data(save("shared", [4, 2])).findings if finding.kind == "image in both splits"]
    assert [(finding.file, finding.entry) for finding in shared] == [("row 1", "train and val")]


def test_a_table_without_splits_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install steadydetr[hf]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tables()["train"].save_to_disk(tmp_path / "table")
    whole, train, val = (open_data(tmp_path / "table", split) for split in ("all", "train", "val"))
    assert len(train.index) + len(val.index) == len(whole.index) == len(ITEMS["train"]) and len(val.index)
    position = next(i for i in range(len(whole.index)) if whole.index.file(i) == val.index.file(0))
    assert (val.load_image(0) == whole.load_image(position)).all()
