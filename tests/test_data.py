"""Layouts, the index, the loader's order, shapes, and what `check` finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from steadydetr.cli.check import render
from steadydetr.data import DataConfig, DetrTransform, EvalLoader, FixedSize, FixedSizeTransform, TrainLoader, for_training, open_data
from steadydetr.data.check import check_data
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.loading import pad_batch
from steadydetr.data.shapes import CLASSES, ShapesConfig, ShapesDataset
from steadydetr.metrics.evaluation import evaluate
from steadydetr.metrics.results import Results
from steadydetr.recipes import find
from steadydetr.training.preparation import open_both


def coco(root: Path, split: str = "train", **changes: object) -> dict:
    """A COCO folder of three images: class ids with gaps, a crowd region, an image without objects, a box without area."""
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images = [{"id": 10 * (i + 1), "file_name": f"{split}{i}.png", "width": 60, "height": 40} for i in range(3)]
    for entry in images:
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(folder / str(entry["file_name"]))
    boxes = [(10, 7, [5, 5, 20, 10], 0), (10, 90, [1, 1, 9, 9], 0), (30, 7, [0, 0, 30, 30], 1), (30, 7, [3, 3, 0, 5], 0)]
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": crowd, "segmentation": [[1, 2, 3, 4]]}
        for i, (image, c, b, crowd) in enumerate(boxes)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}]}
    content |= changes
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return content


def test_coco_ids_with_gaps_and_crowds(tmp_path: Path) -> None:
    coco(tmp_path)
    dataset = open_data(tmp_path, "train")
    index = dataset.index
    assert index.classes == ("cat", "dog") and index.category_ids == (7, 90)
    assert index.labels.tolist() == [0, 1, 0, 0]
    assert index.boxes_xyxy[0].tolist() == [5, 5, 25, 15]
    assert index.counts.tolist() == [2, 0, 2] and index.crowd.tolist() == [False, False, True, False]
    training, dropped = for_training(dataset)
    assert dropped == 1 and training.index.counts.tolist() == [2, 0, 0]
    assert len(for_training(dataset, filter_empty=True)[0].index) == 1
    assert dataset.load_image(0).shape == (40, 60, 3)


def test_roboflow_layout_without_its_group_category(tmp_path: Path) -> None:
    content = coco(tmp_path / "source")
    content["categories"] = [entry | {"supercategory": "animals"} for entry in content["categories"]]
    content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
    for name in ("train", "valid"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "_annotations.coco.json").write_text(json.dumps(content))
    assert open_data(tmp_path / "set", "val").index.classes == ("cat", "dog")


def voc(root: Path, names: dict[str, list[str]]) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, stems in names.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(root / "JPEGImages" / f"{stem}.jpg")
            (root / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{stem}.jpg</filename><size><width>50</width><height>30</height></size>"
                "<object><name>zebra</name><difficult>1</difficult>"
                "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object>"
                "<object><name>ape</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></object></annotation>"
            )


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    voc(tmp_path, {"train": ["a1", "a2"], "test": ["a3"]})
    index = open_data(tmp_path, "train").index
    assert index.classes == ("ape", "zebra") and index.image_ids.tolist() == [1, 2]
    assert index.boxes_xyxy[0].tolist() == [0, 0, 10, 20] and index.difficult.tolist() == [True, False] * 2
    assert for_training(open_data(tmp_path, "train"))[1] == 2
    with pytest.raises(ValueError, match="no split 'minival'; ImageSets/Main holds test, train"):
        open_data(tmp_path, "minival")


def test_voc_years_and_joined_data(tmp_path: Path) -> None:
    voc(tmp_path / "VOC2007", {"trainval": ["000001"], "test": ["000002"]})
    voc(tmp_path / "VOC2012", {"trainval": ["2008_000001"]})
    both = open_data(tmp_path, "trainval")
    assert len(both.index) == 2 and len(open_data(tmp_path, "test").index) == 1
    assert len(set(both.index.image_ids.tolist())) == 2
    assert both.load_image(1).shape == (30, 50, 3)
    twice = open_data(f"{tmp_path / 'VOC2007'}+{tmp_path / 'VOC2012'}", "trainval")
    assert len(twice.index) == 2
    coco(tmp_path / "coco", "trainval")
    with pytest.raises(ValueError, match=r"same classes.*zebra.*cat"):
        open_data(f"{tmp_path / 'VOC2007'}+{tmp_path / 'coco'}", "trainval")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("shapes:colour=3", "'colour=3' is not understood"),
        ("shapes:size=20", "too small"),
        ("nowhere", "no such folder"),
        (".", "no layout of data was recognised"),
    ],
)
def test_what_is_not_understood(where: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_data(where)


def test_broken_files_are_named(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "train2017/train0.png").write_bytes((tmp_path / "train2017/train0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"train0\.png.*steadydetr check"):
        open_data(tmp_path).load_image(0)
    (tmp_path / "annotations/instances_train2017.json").write_text('{"images": [{"id": 1.5}]}')
    with pytest.raises(ValueError, match=r"instances_train2017\.json is not a COCO annotation file.*images\[0\]\.id"):
        open_data(tmp_path)


def test_references_to_nothing_are_errors(tmp_path: Path) -> None:
    content = coco(tmp_path)
    content["annotations"][0]["category_id"] = 55
    coco(tmp_path, annotations=content["annotations"])
    with pytest.raises(ValueError, match="category_id 55"):
        open_data(tmp_path)


def test_check_names_every_kind(tmp_path: Path) -> None:
    coco(tmp_path, "val")
    content = coco(tmp_path)
    extra = [
        {"id": 1, "image_id": 10, "category_id": 7, "bbox": [100, 100, 5, 5]},
        {"id": 9, "image_id": 10, "category_id": 7, "bbox": [50, 30, 30, 30]},
    ]
    coco(tmp_path, annotations=[*content["annotations"], *extra])
    (tmp_path / "train2017/train1.png").unlink()
    (tmp_path / "train2017/train2.png").write_bytes(b"not an image")
    for split in ("val",):
        names = json.loads((tmp_path / f"annotations/instances_{split}2017.json").read_text())
        names["images"][0]["file_name"] = "train0.png"  # of another size, so another picture
        names["images"][1]["file_name"] = "../train2017/train0.png"
        Image.fromarray(np.zeros((41, 60, 3), np.uint8)).save(tmp_path / "val2017/train0.png")
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(names))
    report = check_data(tmp_path)
    kinds = {finding.kind for finding in report.findings}
    assert kinds == {
        "annotation id used twice",
        "box without area",
        "box outside the image",
        "box reaches out of the image",
        "missing image",
        "unreadable image",
        "wrong image size",
        "image in both splits",
    }
    assert report.fatal and report.splits[0].class_counts == {"cat": 5, "dog": 1}
    assert render(report) is not None
    coco(tmp_path / "unknown", annotations=[{"id": 1, "image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1]}])
    found = {finding.kind for finding in check_data(tmp_path / "unknown").findings}
    assert {"unknown image", "unknown class"} <= found


def loader(workers: int = 0, **options: int) -> TrainLoader:
    config = DataConfig(transform=FixedSizeTransform(64, 64, transpose=0.5, zoom=0.7), workers=workers)
    dataset = for_training(ShapesDataset(ShapesConfig(size=64, images=13), "train"))[0]
    return TrainLoader(dataset, config, 4, **{"seed": 3} | options)


def test_batches_are_a_function_of_seed_epoch_and_step() -> None:
    first = [batch for step in loader().epoch(1) for batch in step]
    late = [batch for step in loader(workers=2).epoch(1, start_step=1) for batch in step]
    assert len(first) == 3 and len(late) == 2
    for a, b in zip(first[1:], late, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.targets.boxes, b.targets.boxes)
    assert next(iter(loader().epoch(2)))[0].image_ids != first[0].image_ids


def test_ranks_and_micro_batches_share_the_images_of_a_step() -> None:
    whole = next(iter(loader().epoch(0)))[0].image_ids
    micro = [b.image_ids for b in next(iter(loader(accumulation=2).epoch(0)))]
    ranks = [next(iter(loader(rank=r, world=2).epoch(0)))[0].image_ids for r in range(2)]
    assert sum(micro, ()) == whole and sum(ranks, ()) == whole


def test_every_image_is_evaluated_once() -> None:
    dataset = ShapesDataset(ShapesConfig(size=64, images=7), "val")
    config = DataConfig(resize=FixedSize(64, 64), workers=0)
    ids = [i for rank in range(2) for batch in EvalLoader(dataset, config, 3, rank, 2) for i in batch.image_ids]
    assert sorted(ids) == list(range(1, 8))


def test_padding_and_normalised_boxes(tmp_path: Path) -> None:
    coco(tmp_path)
    dataset = for_training(open_data(tmp_path))[0]
    config = DataConfig(transform=DetrTransform(shortest=(20,), crop=False, flip=0.0), workers=0)
    batch = next(iter(TrainLoader(dataset, config, 3).epoch(0)))[0]
    assert batch.images.shape == (3, 3, 20, 30) and batch.images.dtype == torch.uint8
    row = batch.image_ids.index(10)
    box = batch.targets.split()[row].boxes[0]
    torch.testing.assert_close(box, torch.tensor([15 / 60, 10 / 40, 20 / 60, 10 / 40]), atol=0.03, rtol=0)
    larger = pad_batch(batch, 32, 48)
    assert larger.images.shape[-2:] == (32, 48) and larger.padding[0, 20:].all() and not larger.padding[0, :20, :30].any()


def masks(dataset: ShapesDataset, position: int) -> np.ndarray:
    """Visible pixels of every object of an image, [n, size, size]."""
    patches = dataset._layout(position)
    found = np.zeros((len(patches), dataset.config.size, dataset.config.size), dtype=bool)
    for mask, patch in zip(found, patches, strict=True):
        height, width = patch.mask.shape
        mask[patch.top : patch.top + height, patch.left : patch.left + width] = patch.mask
    return found


@pytest.mark.parametrize("size", [128, 320])
def test_shapes_are_as_promised(size: int) -> None:
    dataset = ShapesDataset(ShapesConfig(size=size, images=60), "train")
    index = dataset.index
    area = (index.boxes_xyxy[:, 2:] - index.boxes_xyxy[:, :2]).prod(1)
    assert (area < 32**2).mean() > 0.3
    assert index.counts.min() >= 1 and index.counts.max() <= 12 and len(CLASSES) >= 6
    again = ShapesDataset(ShapesConfig(size=size, images=60), "train")
    assert np.array_equal(again.load_image(5), dataset.load_image(5))
    assert not np.array_equal(ShapesDataset(ShapesConfig(size=size, images=60), "val").load_image(5), dataset.load_image(5))
    for position in range(5):
        for mask, box in zip(masks(dataset, position), index.boxes_xyxy[index.rows(position)], strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == box.tolist()


def test_colour_says_nothing_about_the_class() -> None:
    """Blobs of colour, each given the class whose mean colour is nearest: AP50 stays below 20."""
    train, val = (ShapesDataset(ShapesConfig(images=60), split) for split in ("train", "val"))
    means = np.zeros((len(CLASSES), 3))
    colours: list[list[np.ndarray]] = [[] for _ in CLASSES]
    for i in range(60):
        image, rows = train.load_image(i), train.index.rows(i)
        for mask, label in zip(masks(train, i), train.index.labels[rows], strict=True):
            colours[label].append(image[mask].mean(0))
    means = np.array([np.mean(values, axis=0) for values in colours])
    ids, boxes, scores, labels = [], [], [], []
    for i in range(60):
        image = val.load_image(i).astype(float)
        background = np.median(image.reshape(-1, 3), axis=0)
        blobs, _ = ndimage.label(np.abs(ndimage.gaussian_filter(image, (1, 1, 0)) - background).max(2) > 55)
        for number, part in enumerate(ndimage.find_objects(blobs), 1):
            area = int((blobs[part] == number).sum())
            if area > 60:
                colour = image[part][blobs[part] == number].mean(0)
                ids.append(int(val.index.image_ids[i]))
                boxes.append([part[1].start, part[0].start, part[1].stop, part[0].stop])
                scores.append(area / 16384)
                labels.append(int(np.abs(means - colour).sum(1).argmin()))
    results = Results(np.array(ids), np.array(boxes, np.float32), np.array(scores, np.float32), np.array(labels))
    class_blind = Results(results.image_ids, results.boxes_xyxy, results.scores, np.zeros_like(results.labels))
    one_class = replace(val.index, labels=np.zeros_like(val.index.labels))
    assert evaluate(class_blind, one_class).ap50 > 25  # it does find the objects
    assert evaluate(results, val.index).ap50 < 20


def test_index_survives_selection() -> None:
    index = ShapesDataset(ShapesConfig(images=8), "train").index
    chosen = index.keep_images(np.array([5, 2]))
    assert chosen.file(1) == index.file(2) and chosen.image_ids.tolist() == [6, 3]
    assert np.array_equal(chosen.boxes_xyxy[chosen.rows(0)], index.boxes_xyxy[index.rows(5)])
    kept = index.keep_rows(index.labels == 0)
    assert (kept.labels == 0).all() and len(kept) == 8
    assert isinstance(kept, AnnotationIndex) and len(kept.boxes_xyxy) < len(index.boxes_xyxy)


def test_real_data_opens(shared: Path) -> None:
    cells = open_data(shared / "data/bccd/BCCD", "test")
    assert cells.index.classes == ("Platelets", "RBC", "WBC") and len(cells.index) == 72
    things = open_data(shared / "data/coco128", "val")
    assert len(things.index.classes) == 80 and len(things.index) == 128 and things.index.crowd.sum() == 10
    assert not check_data(shared / "data/coco128").fatal


@pytest.mark.parametrize(("part", "split"), [("a", "train"), ("b", "train"), ("b", "val")])
def test_every_part_of_joined_data_needs_its_images(part: str, split: str, tmp_path: Path) -> None:
    """Before training starts, whichever part and split."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for each in ("train", "val"):
            coco(tmp_path / name, each)
    recipe = replace(find("small-dino"), data=DataConfig(f"{tmp_path / 'a'}+{tmp_path / 'b'}"))
    assert len(open_both(recipe, print)[1].index) == 6
    (tmp_path / part / f"{split}2017/{split}1.png").unlink()
    with pytest.raises(ValueError, match=rf"{part}-{split}2017: 1 images are not in .*, the first is {split}1\.png\. `steadydetr check`"):
        open_both(recipe, print)
