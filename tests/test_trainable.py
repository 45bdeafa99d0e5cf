"""What training cannot learn from is said before the first step, by `check` and by `train` in the same words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steadydetr.cli import main
from steadydetr.cli.check import render
from steadydetr.data import DataConfig, DetrTransform, FixedSizeTransform, open_data
from steadydetr.data.check import CheckReport, check_data
from steadydetr.data.trainable import how_classes_differ
from steadydetr.data.transforms import Sample, TrainTransform, apply
from steadydetr.metrics.evaluation import evaluate
from steadydetr.metrics.low_ap import COUNTED, explain_low_ap
from steadydetr.metrics.results import Results
from steadydetr.recipes import find
from steadydetr.training.loop import train
from steadydetr.training.preparation import open_both, unreadable_of_both
from tests.data_folders import COCO, XML, coco_folder, coco_with, voc_folder

SMALL = FixedSizeTransform(height=64, width=64)


def recipe_for(root: Path, **data: Any) -> Any:
    recipe = find("small-dino")
    return replace(recipe, data=DataConfig(str(root), workers=0, **{"transform": SMALL} | data))


def said(root: Path, **data: Any) -> list[str]:
    """What training says of a data set before its first step."""
    sentences: list[str] = []
    open_both(recipe_for(root, **data), sentences.append)
    return sentences


def with_boxes(*boxes: list[float], **fields: Any) -> dict[str, Any]:
    """All boxes are in the first image."""
    rows = [{"id": i, "image_id": 1, "category_id": 9, "bbox": box, "area": box[2] * box[3], **fields} for i, box in enumerate(boxes)]
    return {**COCO, "annotations": rows}


NOTHING: dict[str, tuple[dict[str, Any], str, bool]] = {  # annotations, what is said, whether `check`, which knows no transform, sees it
    "no annotation": (with_boxes(), "no image has an annotation", True),
    "crowd": (with_boxes([1, 1, 4, 4], iscrowd=1), r"of its 1 annotations 1 are crowd regions \(iscrowd 1\)", True),
    "flat": (with_boxes([1, 1, 0, 4], [90, 1, 4, 4]), "of its 2 annotations 2 are boxes without area or outside their image", True),
    "both": (
        coco_with(annotations=with_boxes([1, 1, 0, 4])["annotations"] + COCO["annotations"][1:2]),
        "of its 2 annotations 1 are crowd .* and 1 are",
        True,
    ),
    "tiny": (with_boxes([2, 2, 0.1, 3]), "all 1 are smaller than a pixel at the size of training", False),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_nothing_to_train_on_is_an_error(kind: str, tmp_path: Path) -> None:
    content, message, seen = NOTHING[kind]
    coco_folder(tmp_path, content)
    coco_folder(tmp_path, splits=("val",))
    with pytest.raises(ValueError, match=f"-train has no object to train on: {message}"):
        open_both(recipe_for(tmp_path), print)
    report = check_data(tmp_path)
    assert report.fatal == seen == any(f.kind == "no object to train on" for f in report.findings)
    assert "ready to train" not in last_line(report)


def test_objects_that_only_a_large_training_size_keeps_are_named(tmp_path: Path) -> None:
    coco_folder(tmp_path, with_boxes([2, 2, 0.1, 3], [2, 2, 3, 3]), ("train", "val"))
    report = check_data(tmp_path)
    assert [f.entry[:12] for f in report.findings if f.kind == "box smaller than a pixel"] == ["annotation 0"] * 2
    assert "ready to train" not in last_line(report) and not report.fatal


def last_line(report: CheckReport) -> str:
    return str(render(report).renderables[-1])


def test_a_limit_that_leaves_no_object_is_an_error(tmp_path: Path) -> None:
    coco_folder(tmp_path, coco_with(annotations=[{**COCO["annotations"][0], "image_id": 2}]), ("train", "val"))
    with pytest.raises(ValueError, match="no object to train on: the images that are taken have none"):
        open_both(recipe_for(tmp_path, limit=1), print)


def test_objects_that_are_dropped_are_counted(tmp_path: Path) -> None:
    coco_folder(tmp_path, with_boxes([2, 2, 0.1, 3], [2, 2, 3, 3], [1, 1, 0, 2]), ("train", "val"))
    assert said(tmp_path) == [
        f"{tmp_path.name}-train: 1 boxes without area or outside their image are not trained on",
        f"{tmp_path.name}-train: 1 of 2 objects are smaller than a pixel at the size of training, and are not trained on",
    ]


def test_boxes_that_look_normalised_are_named(tmp_path: Path) -> None:
    """Whatever the size of training would make of them."""
    content = with_boxes([0.2, 0.1, 0.7, 0.8])
    content["images"] = [image | {"width": 12} for image in content["images"]]
    coco_folder(tmp_path, content, ("train", "val"))
    for side in (8, 800):
        with pytest.raises(ValueError, match=r"no object to train on: .*look normalised"):
            open_both(recipe_for(tmp_path, transform=FixedSizeTransform(height=side, width=side)), print)
    found = [f.fatal for f in check_data(tmp_path).findings if f.kind == "boxes that look normalised"]
    assert found == [True, False]  # of train, of val
    coco_folder(tmp_path, splits=("train",))
    assert any("all boxes lie within 0..1 pixels: they look normalised" in sentence for sentence in said(tmp_path))
    index = open_data(tmp_path, "val").index
    far = Results(index.image_ids[:1], np.float32([[4, 4, 8, 8]]), np.float32([0.9]), np.array([1]))
    assert any("of the annotations all boxes lie within 0..1" in warning for warning in evaluate(far, index).warnings)


def test_corners_in_place_of_sizes_are_named(tmp_path: Path) -> None:
    """By `check` and by `train`, where boxes reach out of their image and all would fit as corners."""
    coco_folder(tmp_path, with_boxes([1, 1, 4, 5], [3, 2, 8, 6]), ("train", "val"))
    assert [f.fatal for f in check_data(tmp_path).findings if f.kind == "boxes that look like corners"] == [False] * 2
    assert len([s for s in said(tmp_path) if "all would fit if they were x, y, x, y: they look like corners" in s]) == 2
    for good in ([1, 1, 4, 5], [3, 2, 5, 4]), ([3, 2, 8, 6], [4, 4, 3, 2]):
        coco_folder(tmp_path, with_boxes(*good), ("train", "val"))
        assert not [s for s in said(tmp_path) if "corners" in s]


def test_classes_that_nothing_shows_are_named(tmp_path: Path) -> None:
    """As the first one where labels of YOLO count from 1."""
    coco_folder(tmp_path, with_boxes([1, 1, 4, 4]), ("train", "val"))
    found = [str(f) for f in check_data(tmp_path).findings if f.kind == "classes without objects"]
    assert found == [f"{tmp_path.name}-train: no image to train on shows nut"]


def test_a_fault_of_all_splits_is_one_finding(tmp_path: Path) -> None:
    """And no table is shown that has no column."""
    (tmp_path / "data.yaml").write_text("names: 3\ntrain: a\n")
    report = check_data(tmp_path)
    assert [f.entry for f in report.findings] == ["train, val, test"]
    assert len(render(report).renderables) == 2


def test_more_objects_than_queries_and_than_the_metric_counts(tmp_path: Path) -> None:
    boxes = [[i % 7, i % 5, 1, 1] for i in range(COUNTED + 1)]
    coco_folder(tmp_path, with_boxes(*boxes), ("train", "val"))
    sentences = said(tmp_path)
    assert [s for s in sentences if f"images hold up to {len(boxes)} objects, the detector has 40 queries" in s]
    assert [s for s in sentences if f"up to {len(boxes)} objects of one class, of which COCO's metrics count {COUNTED} detections" in s]
    index = open_data(tmp_path, "val").index
    perfect = Results(index.image_ids[index.image_of_row], index.boxes_xyxy, np.ones(len(boxes), np.float32), index.labels.astype(int))
    assert any("no detector reaches AP 100" in warning for warning in evaluate(perfect, index).warnings)
    assert check_data(tmp_path).splits[0].most_in_image == len(boxes)
    coco_folder(tmp_path, with_boxes(*boxes[:40]), ("train", "val"))
    assert said(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "what"), [(with_boxes(), "no annotation"), (with_boxes([1, 1, 4, 4], iscrowd=1), "only crowd regions")]
)
def test_a_low_ap_of_an_empty_data_set_is_not_blamed_on_classes(content: dict[str, Any], what: str, tmp_path: Path) -> None:
    coco_folder(tmp_path)
    coco_folder(tmp_path, content, ("val",))
    index = open_data(tmp_path, "val").index
    results = Results(index.image_ids[:1], np.float32([[1, 1, 4, 4]]), np.float32([0.9]), np.array([0]))
    (reason,) = explain_low_ap(results, index)
    assert reason == f"the data set has no object to find ({what}), so that AP is undefined (-1)"
    assert said(tmp_path) == [f"{tmp_path.name}-val has no object to find, so that AP is undefined (-1)"]
    assert [(f.kind, f.fatal) for f in check_data(tmp_path).findings if "object" in f.kind] == [("no object", False)]


TRANSFORMS: list[TrainTransform] = [
    FixedSizeTransform(height=40, width=90),
    FixedSizeTransform(height=40, width=90, transpose=0.5),
    FixedSizeTransform(height=40, width=90, zoom=0.5),
    DetrTransform(shortest=(120, 200), longest=333),
    DetrTransform(shortest=(480, 800), crop=False),
    DetrTransform(shortest=(120, 200), longest=333, crop=False, zoom_out=2.0, zoom=0.4),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_no_object_grows_more_than_the_largest_scale(transform: TrainTransform) -> None:
    """Which some nearly reach."""
    most = np.zeros(2)
    for height, width in ((300, 200), (200, 640)):
        scale = transform.largest_scale(np.array([[height, width]], np.int32))
        assert scale is not None and scale.shape == (1, 2)
        sample = Sample(torch.zeros(3, height, width, dtype=torch.uint8), torch.tensor([[90.0, 95, 110, 105]]), torch.zeros(1))
        for seed in range(40):
            torch.manual_seed(seed)
            for x0, y0, x1, y1 in apply(transform.build(), sample).boxes_xyxy.tolist():
                grown = np.array([y1 - y0, x1 - x0]) / (10, 20)
                if not getattr(transform, "transpose", 0):
                    most = np.maximum(most, grown / scale[0])
                assert (np.sort(grown) <= np.sort(scale[0]).max() + 1e-3).all()
    assert (most <= 1 + 1e-6).all()


def test_a_transform_that_does_not_know_its_scale_is_not_asked(tmp_path: Path) -> None:
    assert TrainTransform.largest_scale(SMALL, np.ones((1, 2), np.int32)) is None
    assert find("small-dino").data.transform.largest_scale(np.ones((3, 2), np.int32)).shape == (3, 2)


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        (("a", "b"), ("a", "b"), ""),
        (("a", "b"), ("b", "a"), "['a', 'b'] against ['b', 'a']: the same names, but in another order of their ids"),
        (("Cat", "b"), ("cat", "b "), "['Cat', 'b'] against ['cat', 'b ']: the names differ in capital letters or blanks"),
        (("a", "b"), ("a",), "['a', 'b'] against ['a']: only the first has b"),
        (("a",), ("a", "b\n"), "['a'] against ['a', 'b\\\\n']: only the second has b\\n"),
    ],
)
def test_how_classes_differ(first: tuple[str, ...], second: tuple[str, ...], how: str) -> None:
    assert how_classes_differ(first, second) == how


def test_classes_of_splits(tmp_path: Path) -> None:
    """Those of a split that training does not open stop nothing; the table has the classes of all."""
    coco_folder(tmp_path, splits=("train", "val"))
    coco_folder(tmp_path, coco_with(category={"name": "washer"}), ("test",))
    report = check_data(tmp_path)
    assert [(f.kind, f.fatal) for f in report.findings if "classes" in f.kind] == [("other classes", False)]
    assert last_line(report).endswith("None of them stops training.")
    classes = render(report).renderables[1]
    assert list(classes.columns[0].cells) == ["nut", "bolt", "washer"] and list(classes.columns[3].cells) == ["-", "2", "1"]
    coco_folder(tmp_path, coco_with(category={"name": "Bolt"}), ("val",))
    found = {f.kind: f for f in check_data(tmp_path).findings}
    assert found["different classes"].fatal and "classes that look alike" in found
    with pytest.raises(ValueError, match=r"training and validation data have different classes: .*only the second has Bolt"):
        open_both(recipe_for(tmp_path), print)


def test_check_is_ready_only_where_training_starts(tmp_path: Path) -> None:
    content = coco_with(annotations=[COCO["annotations"][0], COCO["annotations"][2]])
    coco_folder(tmp_path / "a", content, ("train",))
    assert last_line(check_data(tmp_path / "a", ("train",))) == "Nothing is wrong with these splits."
    coco_folder(tmp_path / "b", content, ("val",))
    report = check_data(tmp_path / "b")
    assert not report.fatal and [f.kind for f in report.findings] == ["missing split"] and last_line(report) == "1 finding."


def break_image(root: Path, split: str, number: int, how: Callable[[Path], object]) -> None:
    how(root / split / f"{number}.png")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", [lambda path: path.write_bytes(b"\x89PNG broken"), Path.unlink], ids=["broken", "missing"])
def test_unreadable_images_are_left_out_by_name_if_asked(workers: int, how: Callable[[Path], object], tmp_path: Path) -> None:
    coco_folder(tmp_path, coco_with(annotations=[{**COCO["annotations"][0], "image_id": i, "id": i} for i in (1, 2)]), ("train", "val"))
    break_image(tmp_path, "train", 1, how)
    recipe = recipe_for(tmp_path, unreadable="skip")
    recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    sentences: list[str] = []
    left_out = unreadable_of_both(recipe, sentences.append)
    assert left_out == ({0}, set()) and sentences[0].endswith("-train: 1 of 2 images are left out, which cannot be read:")
    assert "train/1.png" in sentences[1] and len(sentences) == 2
    train, val, _ = open_both(recipe, print, left_out)
    assert train.index.image_ids.tolist() == [2] and train.load_image(0).shape == (6, 8, 3) and len(val.index) == 2
    assert unreadable_of_both(recipe_for(tmp_path), print) == (set(), set())
    break_image(tmp_path, "train", 2, how)
    with pytest.raises(ValueError, match=r"-train: none of its 2 images can be read: .*train/1\.png"):
        unreadable_of_both(recipe, print)


def test_settings_of_unreadable_images() -> None:
    with pytest.raises(ValueError, match=r"data\.unreadable = 'ignore' must be error or skip"):
        DataConfig(unreadable="ignore")  # type: ignore[arg-type]


def test_classes_of_voc_that_look_alike_are_two(tmp_path: Path) -> None:
    voc_folder(tmp_path, xml=XML.replace("bolt", "Nut"))
    found = [f for f in check_data(tmp_path, ("train",)).findings if f.kind == "classes that look alike"]
    assert [f.entry for f in found] == ["'Nut' and 'nut'"] and not found[0].fatal


def roboflow(root: Path, folder: str, annotations: list[dict[str, Any]], zero: dict[str, Any], group: str) -> None:
    """A folder of Roboflow's with a category 0."""
    content = coco_with(annotations=annotations)
    content["categories"] = [zero, *(entry | {"supercategory": group} for entry in content["categories"])]
    path = coco_folder(root / "made", content, (folder,))
    (root / folder).mkdir()
    path.rename(root / folder / "_annotations.coco.json")


ROWS = COCO["annotations"]


@pytest.mark.parametrize(
    ("zero", "group", "classes"),
    [
        ({"id": 0, "name": "parts", "supercategory": "none"}, "parts", ("nut", "bolt")),
        ({"id": 0, "name": "nut", "supercategory": "none"}, "nut", ("nut", "bolt")),
        ({"id": 0, "name": "washer", "supercategory": "none"}, "parts", ("washer", "nut", "bolt")),
        ({"id": 0, "name": "washer", "supercategory": "washer"}, "washer", ("washer", "nut", "bolt")),
        ({"id": 0, "name": "washer"}, "", ("washer", "nut", "bolt")),
    ],
)
def test_category_0_is_left_out_only_as_the_group_of_the_others(zero: dict[str, Any], group: str, classes: Any, tmp_path: Path) -> None:
    """Whether a split has a box of a class does not decide whether it is one."""
    roboflow(tmp_path, "train", ROWS, zero, group)
    roboflow(tmp_path, "val", ROWS[2:], zero, group)
    assert [open_data(tmp_path, split).index.classes for split in ("train", "val")] == [classes] * 2


def test_category_0_counts_where_it_has_boxes(tmp_path: Path) -> None:
    roboflow(tmp_path, "train", [ROWS[0] | {"category_id": 0}], {"id": 0, "name": "parts", "supercategory": "none"}, "parts")
    assert open_data(tmp_path).index.classes == ("parts", "nut", "bolt")


def test_two_folders_for_one_split_are_ambiguous(tmp_path: Path) -> None:
    zero = {"id": 0, "name": "parts", "supercategory": "none"}
    for folder in ("train", "val", "valid"):
        roboflow(tmp_path, folder, ROWS, zero, "parts")
    with pytest.raises(ValueError, match="has valid/ and val/, which both could be split 'val': remove or rename one of them"):
        open_data(tmp_path, "val")
    assert open_data(tmp_path, "valid").index.classes == ("nut", "bolt")
    assert [f.entry for f in check_data(tmp_path).findings if f.kind == "unreadable split"] == ["val"]


def test_a_run_leaves_out_what_it_cannot_read_and_names_a_batch_norm_of_one_value(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Torch itself would say "Expected more than 1 value per channel" and name no flag."""
    root = tmp_path / "data"
    coco_folder(root, coco_with(annotations=[{**COCO["annotations"][0], "image_id": i, "id": i} for i in (1, 2)]), ("train", "val"))
    (root / "val" / "2.png").write_bytes(b"broken")
    recipe = recipe_for(root, unreadable="skip", transform=FixedSizeTransform(height=32, width=32))
    training = replace(recipe.training, epochs=1, batch_size=1, accumulation=1)
    with pytest.raises(ValueError, match=r"a batch norm sees a single value of each channel.*--training\.batch-size"):
        train(replace(recipe, training=training), tmp_path / "run", device="cpu")
    told = capfd.readouterr()
    assert "1 of 2 images are left out, which cannot be read" in " ".join((told.out + told.err).split())
    assert "1 to validate on" in " ".join((told.out + told.err).split())


@pytest.mark.parametrize("width", ["40", "80"])
def test_check_cuts_no_name(width: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A finding stands in one line, with the whole name of its file, however narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", width)
    name = "a-long-name-" * 10 + ".png"
    coco_folder(tmp_path, splits=("val", "test"))
    coco_folder(tmp_path, coco_with(image={"file_name": name}))
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path)])
    said = capsys.readouterr().out
    assert "…" not in said and "difficult" in said
    assert sum(name in line for line in said.splitlines()) == 1 and said.endswith("Something stops training.\n")
