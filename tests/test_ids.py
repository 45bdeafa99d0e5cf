"""Ids of images and annotations are names: whatever they are, they come out as they went in, and metrics do not depend on them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from steadydetr.data import DataConfig, EvalLoader, FixedSize, TrainLoader, for_training, open_data
from steadydetr.data.check import check_data
from steadydetr.data.dataset import join_data
from steadydetr.data.index import AnnotationIndex
from steadydetr.detectors.base import Prediction
from steadydetr.finite import images_named
from steadydetr.metrics.evaluation import collect, evaluate
from steadydetr.metrics.results import Results, write_results
from steadydetr.structures import seed_of
from steadydetr.tools.image_files import list_sources
from tests.data_folders import COCO, coco_folder, voc_folder

IDS = {
    "beyond 2^53": (2**53 + 1, 2**53),
    "beyond 2^63": (2**64 - 1, 2**64 - 2),
    "of forty digits": (10**40 + 1, 10**40),
    "texts": ("cam1/000001", "cam1/000002"),
    "texts of digits": ("0001", "1"),
    "both": (1, "1"),
}


def with_ids(ids: tuple[int | str, ...]) -> dict:
    """The small data set with these ids of its images and, from the first on, of its annotations."""
    named = dict(zip((1, 2), ids, strict=True))
    images = [image | {"id": named[image["id"]]} for image in COCO["images"]]
    annotations = [row | {"image_id": named[row["image_id"]], "iscrowd": 0} for row in COCO["annotations"]]
    for row, id_ in zip(annotations, (*ids, 3), strict=True):
        row["id"] = id_
    return COCO | {"images": images, "annotations": annotations}


def perfect(index: AnnotationIndex) -> Results:
    """The truth as detections."""
    scores = np.linspace(1, 0.5, len(index.labels)).astype(np.float32)
    return Results(index.image_ids[index.image_of_row], index.boxes_xyxy, scores, index.labels.astype(np.int64))


@pytest.mark.parametrize("kind", IDS)
def test_ids_come_out_as_they_went_in(kind: str, tmp_path: Path) -> None:
    ids = IDS[kind]
    coco_folder(tmp_path, with_ids(ids), ("train", "val"))
    dataset = open_data(tmp_path, "val")
    index = dataset.index
    assert index.image_ids.tolist() == list(ids) and set(index.annotation_ids.tolist()) == {*ids, 3}
    assert not [finding for finding in check_data(tmp_path).findings if finding.kind != "image in both splits"]
    loader = EvalLoader(dataset, DataConfig(resize=FixedSize(16, 16), workers=0))
    results = collect(lambda batch: [Prediction(torch.zeros(1, 4), torch.ones(1), torch.ones(1).long())] * len(batch.image_ids), loader)
    write_results(tmp_path / "results.json", results, index.category_ids)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(id_, 9) for id_ in ids]
    subset, _ = for_training(dataset)
    batches = TrainLoader(subset, DataConfig(workers=0), 2).epoch(0)
    assert {id_ for batch in next(batches) for id_ in batch.image_ids} == set(ids)


@pytest.mark.parametrize("kind", IDS)
def test_metrics_do_not_depend_on_ids(kind: str, tmp_path: Path) -> None:
    coco_folder(tmp_path, with_ids(IDS[kind]))
    index = open_data(tmp_path).index
    evaluation = evaluate(perfect(index), index)
    assert evaluation.ap == pytest.approx(100) and evaluation.voc_ap50 == pytest.approx(100) and not evaluation.warnings
    other = replaced(perfect(index), index)
    assert evaluate(other, index).ap < 99


def replaced(results: Results, index: AnnotationIndex) -> Results:
    """The detections of each image on the other one."""
    ids = np.empty(len(results.image_ids), object)
    first, second = index.image_ids.tolist()
    ids[:] = [second if id_ == first else first for id_ in results.image_ids.tolist()]
    return Results(ids, results.boxes_xyxy, results.scores, results.labels)


def test_detections_on_images_of_other_data_count_for_nothing(tmp_path: Path) -> None:
    coco_folder(tmp_path, with_ids((1, 2)))
    index = open_data(tmp_path).index
    results = perfect(index)
    other = Results(np.full(3, 2**60), results.boxes_xyxy, results.scores, results.labels)
    assert evaluate(Results.cat([results, other]), index).ap == pytest.approx(100)
    assert "no detection is on an image of this data set: the image ids belong to another one" in evaluate(other, index).warnings


def test_a_text_is_not_the_number_that_it_looks_like(tmp_path: Path) -> None:
    content = with_ids((1, 2))
    content["annotations"][0]["image_id"] = "1"
    coco_folder(tmp_path, content)
    with pytest.raises(ValueError, match="its image_id '1' is no image that the file lists"):
        open_data(tmp_path)


def test_image_lists_keep_their_ids(tmp_path: Path) -> None:
    path = coco_folder(tmp_path, with_ids(IDS["both"]))
    assert [source.image_id for source in list_sources([path], tmp_path / "train")] == [1, "1"]


def test_joined_and_chosen_images_keep_their_ids(tmp_path: Path) -> None:
    for name, ids in (("a", ("x", "y")), ("b", (1, 2)), ("c", (3, 2**70))):
        coco_folder(tmp_path / name, with_ids(ids))
    parts = [open_data(tmp_path / name) for name in "abc"]
    index = join_data(parts).index
    assert index.image_ids.tolist() == ["x", "y", 1, 2, 3, 2**70]
    assert index.keep_images(np.array([5, 2])).image_ids.tolist() == [2**70, 1]
    assert index.keep_images(np.array([3, 2])).image_ids.dtype == np.int64
    assert join_data([parts[1], parts[1]]).index.image_ids.tolist() == [1, 2, 3, 4]
    assert index.identity == join_data(parts).index.identity != join_data(parts[::-1]).index.identity


def test_images_of_voc_named_by_time_stamps_keep_all_digits(tmp_path: Path) -> None:
    stems = [f"20230116_10304500{number}" for number in range(3)]
    for stem in stems:
        voc_folder(tmp_path, listed="\n".join(stems), stem=stem, image=f"{stem}.png")
    index = open_data(tmp_path).index
    assert index.image_ids.tolist() == [int(stem.replace("_", "")) for stem in stems]
    assert evaluate(perfect(index), index).ap == pytest.approx(100)


def test_what_ids_seed_does_not_change_between_processes() -> None:
    """Python's own hash of a text does, that of numbers does not."""
    assert seed_of(0, 1, "a") == seed_of(0, 1, zlib.crc32(b"a")) != seed_of(0, 1, "b")


def test_ids_are_named_in_messages() -> None:
    assert images_named([3, "b\n", "a", 2**70]) == f"images 3, {2**70}, 'a', 'b\\n'"
