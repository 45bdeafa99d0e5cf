"""Masks of COCO files: read on request, kept beside the boxes, and decoded as pycocotools does, to the last pixel."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as reference
from pycocotools.coco import COCO as PycocoTools

from steadydetr.cli import main
from steadydetr.data import AnnotationIndex, open_data
from steadydetr.data.check import check_data
from steadydetr.data.columns import Lists
from steadydetr.data.index import join_indices
from steadydetr.data.layouts import coco_file
from steadydetr.data.layouts.coco_masks import FARTHEST, runs_of_text
from steadydetr.data.masks import Masks
from steadydetr.data.opening import BOXES_ALONE
from steadydetr.limits import Limits
from tests.data_folders import coco_folder, coco_with, picture, voc_folder
from tests.test_lvis import lvis_file, lvis_folder
from tests.test_trainable import said

SIZE = (6, 8)  # (h, w) of the images
SQUARE = [[1.0, 2, 4, 2, 4, 6, 1, 6]]  # 3 columns of 4 rows
RUNS = {"counts": [2, 4, 2, 4, 36], "size": [*SIZE]}  # rows 2 to 5 of the first column, and 2 to 5 of the second


def text_of(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Compressed run lengths, by pycocotools."""
    found = reference.encode(np.asfortranarray(mask, np.uint8))
    return {"counts": found["counts"].decode(), "size": [*mask.shape]}


def runs_of(mask: NDArray[np.bool_]) -> list[int]:
    """The run lengths of a mask, pixel by pixel."""
    runs, inside = [0], False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x] != inside:
                inside = not inside
                runs.append(0)
            runs[-1] += 1
    return runs


def random_masks(seed: int, count: int = 12) -> list[NDArray[np.bool_]]:
    """Of all sorts: noise, blocks, nearly empty and nearly full ones."""
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(1, 12)), int(rng.integers(1, 12))) for _ in range(count)]
    noise = [rng.random(size) < rng.choice([0.02, 0.5, 0.97]) for size in sizes]
    return [np.kron(one, np.ones((rng.integers(1, 9), rng.integers(1, 40)), bool)) for one in noise]


def content_with(*segmentations: Any) -> dict[str, Any]:
    """An annotation of the first image for each."""
    row = {"image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    return coco_with(annotations=[row | {"id": 10 + i, "segmentation": value} for i, value in enumerate(segmentations)])


def index_of(root: Path, content: Any) -> AnnotationIndex:
    coco_folder(root, content)
    return open_data(root, masks=True).index


@pytest.mark.parametrize("chunk", [2**20, 3000])
def test_every_mask_of_coco128_is_that_of_pycocotools(chunk: int, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the parts end by which the file is read."""
    of = coco_file.JsonLists.of
    monkeypatch.setattr(coco_file.JsonLists, "of", lambda path, file: of(path, file, chunk))
    data, rows = open_data(shared / "data" / "coco128", "val", masks=True), 0
    known = PycocoTools(str(shared / "data" / "coco128" / "annotations" / "instances_val2017.json"))
    for position in range(len(data.index)):
        masks = data.masks(position)  # type: ignore[attr-defined]
        ids = data.index.annotation_ids[data.index.rows(position)].tolist()
        assert masks.dtype == bool and len(masks) == len(ids)
        for mask, id_ in zip(masks, ids, strict=True):
            assert np.array_equal(mask, known.annToMask(known.anns[id_]))
        rows += len(ids)
    assert rows == len(known.anns) == len(data.index.labels) > 900 and data.index.crowd.any()
    assert data.index.masks is not None and data.index.masks.present.all()


@pytest.mark.parametrize("decimals", [1, 2, 15])
def test_polygons_fill_what_they_do_in_64_bits(decimals: int, tmp_path: Path) -> None:
    """Many numbers of one decimal lie between two fifths of a pixel, where the nearest number of 32 bits is often rounded otherwise."""
    rng = np.random.default_rng(decimals)
    drawn = [[(rng.random(6 + 2 * (i % 9)) * 12 - 2).round(decimals).tolist() for _ in range(1 + i % 3)] for i in range(200)]
    masks = index_of(tmp_path, content_with(*drawn)).decode_masks(0)
    for mask, polygons in zip(masks, drawn, strict=True):
        assert np.array_equal(mask, reference.decode(reference.merge(reference.frPyObjects(polygons, *SIZE))))


@pytest.mark.parametrize("seed", range(3))
def test_polygons_hold_the_pixels_within_them(seed: int, tmp_path: Path) -> None:
    """By the rule of even and odd crossings, pixel by pixel; but for those that the outline passes by within a pixel."""
    rng = np.random.default_rng(seed)
    height, width = 40, 50
    content, corners = content_with(), rng.random((5, 2)) * [width, height]
    for image in content["images"]:
        image |= {"height": height, "width": width}
    content["annotations"] = content_with([corners.ravel().tolist()])["annotations"]
    (mask,) = index_of(tmp_path, content).decode_masks(0)
    compared = 0
    for y, x in np.ndindex(height, width):
        centre, inside, near = np.array([x + 0.5, y + 0.5]), False, False
        for a, b in zip(corners, np.roll(corners, 1, 0), strict=True):
            along = np.clip(np.dot(centre - a, b - a) / np.dot(b - a, b - a), 0, 1)
            near |= bool(np.linalg.norm(a + along * (b - a) - centre) < 1)
            if (a[1] > centre[1]) != (b[1] > centre[1]):
                inside ^= bool(centre[0] < a[0] + (centre[1] - a[1]) / (b[1] - a[1]) * (b[0] - a[0]))
        compared += not near
        assert near or inside == mask[y, x]
    assert compared > 1000 and 0 < mask.sum() < mask.size


@pytest.mark.parametrize("seed", range(3))
def test_run_lengths_as_numbers_and_as_text_are_the_mask(seed: int, tmp_path: Path) -> None:
    for number, mask in enumerate(random_masks(seed)):
        text, runs = text_of(mask), runs_of(mask)
        assert runs_of_text(text["counts"]) == runs
        content = content_with(text, {"counts": runs, "size": [*mask.shape]})
        content["images"][0] |= {"height": mask.shape[0], "width": mask.shape[1]}
        index = index_of(tmp_path / str(number), content)
        assert all(np.array_equal(found, mask) for found in index.decode_masks(0))
        assert index.masks is not None and (index.masks.present == mask.any()).all()


def test_a_square_and_runs_by_hand(tmp_path: Path) -> None:
    square, runs, *none = index_of(tmp_path, content_with(SQUARE, RUNS, [], None)).decode_masks(0)
    known = np.zeros((2, *SIZE), bool)
    known[0, 2:6, 1:4], known[1, 2:6, 0:2] = True, True
    assert np.array_equal(square, known[0]) and np.array_equal(runs, known[1])
    assert [mask.any() for mask in none] == [False, False]


def mixed(seed: int) -> dict[str, Any]:
    """Annotations with masks of all kinds, and without, in random order of two images."""
    drawn, rng = random_masks(seed, 2), np.random.default_rng(seed)
    kinds = [SQUARE, [*SQUARE, [0.0, 0, 3, 0, 3, 2]], RUNS, text_of(rng.random(SIZE) < 0.5), [], None, {"counts": [9], "size": [3, 3]}]
    content = content_with(*(kinds[int(rng.integers(len(kinds)))] for _ in range(12 + len(drawn))))
    for row in content["annotations"]:
        row["image_id"] = int(rng.integers(1, 3))
    return content


@pytest.mark.parametrize("seed", range(4))
def test_masks_stay_with_their_annotations(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However annotations and images are chosen, ordered, joined and sent to other processes."""
    monkeypatch.setattr("steadydetr.data.columns.BLOCK", 3)
    rng, index = np.random.default_rng(seed), index_of(tmp_path / "a", mixed(seed))
    other = index_of(tmp_path / "b", mixed(seed + 10))
    assert index.masks is not None
    dense, image = np.concatenate([index.decode_masks(i) for i in (0, 1)]), index.image_of_row
    keep = rng.random(len(dense)) < 0.6
    kept = pickle.loads(pickle.dumps(index.keep_rows(keep)))
    assert all(np.array_equal(kept.decode_masks(i), dense[keep & (image == i)]) for i in (0, 1))
    turned = index.keep_images(np.array([1, 0]))
    assert all(np.array_equal(turned.decode_masks(i), index.decode_masks(1 - i)) for i in (0, 1))
    both = join_indices([index, other])
    assert all(np.array_equal(both.decode_masks(2 + i), other.decode_masks(i)) for i in (0, 1))
    assert np.array_equal(both.decode_masks(1), index.decode_masks(1)) and both.masks is not None and len(both.masks) == len(both.labels)
    order = rng.permutation(len(dense))
    taken = index.masks.take(order)
    assert np.array_equal(taken.decode(slice(0, len(dense)), *SIZE), dense[order]) and (taken.state == index.masks.state[order]).all()


def test_lists_are_taken_in_little_memory() -> None:
    """However many numbers each has."""
    lists, order = Lists.of([range(first, first + 500) for first in range(8000)]), np.random.default_rng(0).permutation(8000)
    tracemalloc.start()
    taken = lists.take(order)
    (_, peak), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()
    assert np.array_equal(taken.values.reshape(8000, 500), lists.values.reshape(8000, 500)[order]) and peak < 2 * lists.values.nbytes


def test_masks_belong_to_the_identity_of_data(tmp_path: Path) -> None:
    plain = coco_folder(tmp_path, content_with(SQUARE)) and open_data(tmp_path).index
    first, other = (index_of(tmp_path, content_with(value)) for value in (SQUARE, RUNS))
    assert plain.masks is None and len({plain.identity, first.identity, other.identity}) == 3
    assert open_data(tmp_path).index.identity == plain.identity
    assert join_indices([plain, first]).masks is None
    with pytest.raises(ValueError, match="masks=True"):
        plain.decode_masks(0)


@pytest.mark.parametrize("seed", range(3))
def test_points_and_lines_hold_no_pixel(seed: int, tmp_path: Path) -> None:
    """Wherever they stand among polygons, which tools write of masks of a pixel or a row; pycocotools fills none, where it reads them."""
    rng = np.random.default_rng(seed)
    thin = [(rng.random(int(rng.integers(3)) * 2) * 12 - 2).round(int(rng.integers(3))).tolist() for _ in range(60)]
    first = [[part, *SQUARE] for part in thin]
    last = [[*SQUARE, part, *SQUARE] for part in thin]
    index = index_of(tmp_path, content_with(*first, *last, *([part, part] for part in thin)))
    known = reference.decode(reference.frPyObjects(SQUARE, *SIZE))[..., 0]
    for part in last:
        assert np.array_equal(reference.decode(reference.merge(reference.frPyObjects(part, *SIZE))), known)
    masks = index.decode_masks(0)
    assert all(np.array_equal(mask, known) for mask in masks[:120]) and not masks[120:].any()
    assert index.masks is not None and index.masks.present.tolist() == [True] * 120 + [False] * 60


def test_a_polygon_without_a_list_around_it_is_read(tmp_path: Path) -> None:
    """As Supervision and MyVision wrote it; of two corners it is a line, also beside an entry that cannot be used."""
    content = content_with(SQUARE, SQUARE[0], [1, 2, 4, 6])
    square, flat, line = index_of(tmp_path, content).decode_masks(0)
    assert square.sum() == 12 and np.array_equal(flat, square) and not line.any()
    content["annotations"].append({"id": 9})
    coco_folder(tmp_path, content)
    findings = check_data(tmp_path, ("train",), masks=True).findings
    assert [f.entry for f in findings if "mask" in f.kind or "COCO" in f.kind] == [
        "annotations[3]",
        "annotations[3]",
        "annotations[3]",
        "annotation 12",
    ]


BROKEN: dict[str, tuple[Any, str]] = {
    "odd": ([[1.0, 2, 3, 4, 5, 6, 7]], r"`segmentation\[0\]` has 7 numbers"),
    "odd and few": ([SQUARE[0], [1, 2, 3]], r"`segmentation\[1\]` has 3 numbers"),
    "odd and flat": ([1, 2, 3, 4, 5], r"`segmentation\[0\]` has 5 numbers"),
    "corners apart": ([[1, 2], [4, 2], [4, 6], [1, 6]], r"`segmentation` has a list for each corner: .* must be one list, \[\[x1, y1"),
    "numbers beside lists": ([SQUARE[0], 1, 2], r"`segmentation` has numbers beside lists: a mask is polygons, \[\[x1, y1"),
    "deeper": ([SQUARE], r"got `array` - at `segmentation\[0\]\[0\]`; a mask is polygons, \[\[x1, y1, x2, y2, ...\], ...\], or run"),
    "listed runs": ([RUNS], r'got `object` - at `segmentation\[0\]`; a mask is .*, or run lengths, {"size": \[height, width\], "counts"'),
    "printed bytes": (RUNS | {"counts": "b'0140'"}, r"what Python prints of bytes; write counts.decode\(\) - at `segmentation`"),
    "NaN": ([[1, 2, float("nan"), 4, 5, 6]], r"got `null` - at `segmentation\[0\]\[2\]`; NaN and Infinity count as null"),
    "infinite": ([[1, 2, float("inf"), 4, 5, 6]], r"got `null` - at `segmentation\[0\]\[2\]`; NaN and Infinity count as null"),
    "far": ([[1, 2, 1e9, 4, 5, 6]], r"`segmentation\[0\]` is too large"),
    "far below": ([[1, 2, -1e9, 4, 5, 6]], r"`segmentation\[0\]` is too large"),
    "far off": ([[2**21, 2**21, 2**21 + 1, 2**21, 2**21, 2**21 + 1]], r"`segmentation\[0\]` is too large"),
    "long": ([[0, 0, FARTHEST / 64, 5] * 64], r"`segmentation\[0\]` is too large"),
    "long, around 0": ([[-FARTHEST / 128, 0, FARTHEST / 128, 5] * 64], r"`segmentation\[0\]` is too large"),
    "words": ([["a", 2, 3, 4, 5, 6]], r"got `str` - at `segmentation\[0\]\[0\]`"),
    "text": ("polygon", r"got `str` - at `segmentation`; a mask is polygons"),
    "less": (RUNS | {"counts": [2, 4]}, r"`counts` add up to 6, not to the 6 x 8 pixels of `size` - at `segmentation`\. `steadydetr"),
    "more": (RUNS | {"counts": [2, 47]}, r"`counts` add up to 49, not to the 6 x 8 pixels"),
    "negative": (RUNS | {"counts": [50, -2]}, r"`int` >= 0 - at `segmentation.counts\[1\]`"),
    "fractions": (RUNS | {"counts": [47.5, 0.5]}, r"got `float` - at `segmentation.counts\[0\]`"),
    "no size": ({"counts": [48]}, r"missing required field `size` - at `segmentation`"),
    "no counts": ({"size": [*SIZE]}, r"missing required field `counts` - at `segmentation`"),
    "negative size": ({"counts": [48], "size": [-6, -8]}, r"not to the -6 x -8 pixels"),
    "no text of runs": (RUNS | {"counts": "hello, world"}, r"`counts` is a text, but not one of run lengths - at `segmentation`"),
    "a sign below": (RUNS | {"counts": ",4"}, r"`counts` is a text, but not one of run lengths"),
    "a sign above": (RUNS | {"counts": "w4"}, r"`counts` is a text, but not one of run lengths"),
    "foreign letters": (RUNS | {"counts": "ab\u00e9"}, r"`counts` is a text, but not one of run lengths"),
    "no text at all": (RUNS | {"counts": ""}, r"`counts` is a text, but not one of run lengths"),
    "text that breaks off": (RUNS | {"counts": text_of(np.eye(90, dtype=bool))["counts"] + "P"}, r"`counts` is a text, but not one of"),
    "text of large numbers": (RUNS | {"counts": "o" * 40 + "0"}, r"text of run lengths that are too large"),
    "text below zero": (RUNS | {"counts": "2O"}, r"`counts` is a text of run lengths below 0"),
    "text of another size": (RUNS | {"counts": text_of(np.eye(5, dtype=bool))["counts"]}, r"`counts` add up to 25, not to the 6 x 8"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_mask_is_named(kind: str, tmp_path: Path) -> None:
    """With file, entry and field, beside the others, by `check` and by training; and nobody minds who asks for no masks."""
    value, message = BROKEN[kind]
    path = coco_folder(tmp_path, content_with(SQUARE, value, RUNS))
    (finding,) = [finding for finding in check_data(tmp_path, ("train",), masks=True).findings if finding.fatal]
    assert (finding.kind, finding.file, finding.entry) == ("not COCO", str(path), "annotations[1]")
    with pytest.raises(ValueError, match=rf"instances_train.json: annotations\[1\]: .*{message}"):
        open_data(tmp_path, masks=True)
    assert not [finding for finding in check_data(tmp_path, ("train",)).findings if finding.fatal]
    assert len(open_data(tmp_path).index.labels) == 3


def test_annotations_without_a_mask_are_named_and_not_trained_on(tmp_path: Path) -> None:
    content = content_with(SQUARE, [], None, {"counts": [2, 7], "size": [3, 3]}, {"counts": [48], "size": [*SIZE]}, [[], [1, 2, 4, 6]])
    del content["annotations"][2]["segmentation"]
    coco_folder(tmp_path, content, ("train", "val"))
    picture(tmp_path / "val" / "1.png")
    report = check_data(tmp_path, ("train",), masks=True)
    found = [finding for finding in report.findings if finding.kind == "annotation without a mask"]
    assert [(f.entry.split()[-1], f.message.partition(" (")[0], f.fatal) for f in found] == [
        ("11", "its `segmentation` is empty", False),
        ("12", "has no `segmentation`", False),
        ("13", "`size` of its `segmentation` is not that of its image", False),
        ("14", "its `segmentation` is empty", False),
        ("15", "no polygon of its `segmentation` has three corners", False),
    ]
    assert all(f.file.endswith("train: 1.png") for f in found) and not report.failed
    assert not [f for f in check_data(tmp_path, ("train",)).findings if "mask" in f.kind]
    sentences = [sentence for sentence in said(tmp_path, masks=True, same_images="allow") if "mask" in sentence]
    assert len(sentences) == 1 and "5 annotations without a mask are not trained on" in sentences[0]
    assert not [sentence for sentence in said(tmp_path, same_images="allow") if "mask" in sentence]
    assert open_data(tmp_path, masks=True).index.usable().tolist() == [True] + [False] * 5


@pytest.mark.parametrize("seed", range(3))
def test_boxes_around_masks_are_those_of_their_pixels(seed: int, tmp_path: Path) -> None:
    """Of run lengths exactly; of polygons the outermost corners, wherever they lie. An annotation without a mask has none."""
    masks = [mask for mask in random_masks(seed) if mask.any()]
    found = Masks.of_pixels(masks).boxes(np.array([len(mask) for mask in masks]))
    for box, mask in zip(found.tolist(), masks, strict=True):
        y, x = mask.nonzero()
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    index = index_of(tmp_path, content_with(SQUARE, RUNS, [], [[-3, 1, 20, 1.5, 20, 9], SQUARE[0]]))
    assert index.masks is not None
    outer = index.masks.boxes(np.full(4, SIZE[0]))
    assert np.array_equal(outer, [[1, 2, 4, 6], [0, 2, 2, 6], [np.nan] * 4, [-3, 1, 20, 9]], equal_nan=True)
    assert not len(Masks.of_pixels([]).boxes(np.zeros(0)))


def test_areas_that_are_not_annotated_are_those_of_masks(tmp_path: Path) -> None:
    """What is annotated stays; without masks, and where an annotation has none, it is that of the box."""
    triangle, ring = [[1, 2, 7, 2, 1, 5]], [[0, 0, 8, 0, 8, 6, 0, 6, 0, 0, 2, 2, 2, 4, 4, 4, 4, 2, 2, 2]]
    content = content_with(SQUARE, triangle, [*SQUARE, *triangle], ring, RUNS, [], SQUARE)
    for annotation in content["annotations"][:-1]:
        del annotation["area"]
    content["annotations"][-1]["area"] = 5
    coco_folder(tmp_path, content | {"annotations": [a | {"bbox": [0, 0, 8, 6]} for a in content["annotations"]]})
    index = open_data(tmp_path, masks=True).index
    assert index.areas.tolist() == [12, 9, 21, 44, 8, 48, 5] and open_data(tmp_path).index.areas.tolist() == [48] * 6 + [5]
    assert index.keep_images(np.array([1, 0])).areas.tolist() == index.areas.tolist()
    assert index.areas[0] == index.decode_masks(0)[0].sum() and index.areas[4] == index.decode_masks(0)[4].sum()


ELSEWHERE: dict[str, Any] = {
    "normalised": [[0.125, 0.3, 0.5, 0.3, 0.5, 0.9, 0.125, 0.9]],
    "of a larger image": [[10, 20, 40, 20, 40, 60, 10, 60]],
    "mirrored": [[4, 2, 7, 2, 7, 6, 4, 6]],
    "row by row": {"counts": [17, 3, 5, 3, 5, 3, 5, 3, 4], "size": [*SIZE]},
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_masks_that_lie_elsewhere_than_boxes_are_named(kind: str, tmp_path: Path) -> None:
    """Each, and training says how many there are; where no mask is where its box is, there is nothing to train on."""
    picture(tmp_path / "val" / "1.png")
    coco_folder(tmp_path, content_with(SQUARE, ELSEWHERE[kind], {"counts": [8, 4, 2, 4, 2, 4, 24], "size": [*SIZE]}), ("train", "val"))
    report = check_data(tmp_path, ("train",), masks=True)
    assert [(f.entry, f.fatal) for f in report.findings if "mask" in f.kind] == [("annotation 11", False)] and not report.failed
    assert len([s for s in said(tmp_path, masks=True, same_images="allow") if "of 1 object most of the mask lies outside" in s]) == 2
    coco_folder(tmp_path, content_with(ELSEWHERE[kind], []), ("train", "val"))
    assert [f.kind for f in check_data(tmp_path, ("train",), masks=True).findings if f.fatal] == ["masks that lie elsewhere"]
    with pytest.raises(ValueError, match=r"no object to train on: no mask lies where the box of its object does: .* x and y swapped"):
        said(tmp_path, masks=True, same_images="allow")


def test_masks_that_take_much_memory_are_told_before_training(tmp_path: Path) -> None:
    """As an image of many objects may have them; other images have none, and without masks nothing is said."""
    for count, told in ((200, True), (20, False)):
        content = content_with(*[[[1, 2, 2001, 2, 2001, 2002, 1, 2002]]] * count)
        content["annotations"] = [annotation | {"bbox": [1, 2, 2000, 2000]} for annotation in content["annotations"]]
        content["images"] = [image | {"width": 4000, "height": 5000} for image in content["images"]]
        coco_folder(tmp_path, content, ("train", "val"))
        found = [s for s in said(tmp_path, masks=True, same_images="allow") if "GiB" in s]
        assert len(found) == told
        if told:
            assert "to prepare 1.png, a loading process needs about 7 GiB for the masks of 200 objects in 4000 x 5000 pixels" in found[0]
        assert not [s for s in said(tmp_path, same_images="allow") if "GiB" in s]


def test_without_any_mask_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    coco_folder(tmp_path, content_with([], None), ("train", "val"))
    with pytest.raises(ValueError, match=r"no object to train on: of its 2 annotations 2 are without a mask. To train on boxes"):
        said(tmp_path, masks=True, same_images="allow")


def test_lvis_has_masks(tmp_path: Path) -> None:
    file = lvis_file(images=3)
    for row in file["annotations"]:
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    index = open_data(lvis_folder(tmp_path, file), "val", masks=True).index
    assert index.federated is not None and index.masks is not None and index.masks.present.all()
    for position in range(len(index)):
        for mask, box in zip(index.decode_masks(position), index.boxes_xyxy[index.rows(position)].astype(int), strict=True):
            known = np.zeros((200, 300), bool)
            known[box[1] : box[3], box[0] : box[2]] = True
            assert (mask != known).sum() < box[2] - box[0] + box[3] - box[1]


def test_other_layouts_say_who_gives_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc_folder(tmp_path / "voc")
    coco_folder(tmp_path / "coco", content_with(SQUARE))
    message = "masks are read of COCO, .*; this is VOC"
    for place in (str(tmp_path / "voc"), f"{tmp_path / 'coco'}+{tmp_path / 'voc'}", f"{tmp_path / 'voc'},images-in={tmp_path}"):
        with pytest.raises(ValueError, match=message):
            open_data(place, masks=True)
    with pytest.raises(SystemExit):
        main(["train", "small-dino", "--data", str(tmp_path / "voc"), "--data.masks", "--output", str(tmp_path / "run")])
    assert f"this is VOC. {BOXES_ALONE}" in capsys.readouterr().err
    elsewhere = open_data(f"{tmp_path / 'coco'},images-in={tmp_path / 'coco' / 'train'}", masks=True)
    assert elsewhere.index.masks is not None and elsewhere.index.masks.present.all()


def test_layouts_of_coco_files_elsewhere_have_masks(tmp_path: Path) -> None:
    text = json.dumps(content_with(SQUARE, RUNS))
    for place, name in (("one", "labels.json"), ("two", "train/_annotations.coco.json")):
        for number in (1, 2):
            picture(tmp_path / place / Path(name).parent / f"{number}.png")
        (tmp_path / place / name).write_text(text)
        index = open_data(tmp_path / place, "all" if place == "one" else "train", masks=True).index
        assert index.decode_masks(0).any((1, 2)).tolist() == [True, True]


def test_an_image_of_too_many_pixels_is_not_filled(tmp_path: Path) -> None:
    coco_folder(tmp_path, content_with(SQUARE))
    data = open_data(tmp_path, limits=Limits(max_pixels=47), masks=True)
    with pytest.raises(ValueError, match=r"1.png is annotated with 8 x 6 pixels, more than max_pixels = 47"):
        data.masks(0)  # type: ignore[attr-defined]


def test_no_mask_and_no_annotation(tmp_path: Path) -> None:
    index = index_of(tmp_path, content_with())
    assert index.decode_masks(0).shape == (0, *SIZE) and index.keep_images(np.array([1])).decode_masks(0).shape == (0, *SIZE)
    nothing = Lists.of([])
    assert Masks(np.zeros(0, np.uint8), nothing, nothing, nothing).decode(slice(0, 0), 2, 3).shape == (0, 2, 3)


SIZES = [word for part in ("transform", "resize") for side in ("height", "width") for word in (f"--data.{part}.{side}", "64")]


def test_a_run_with_masks_and_its_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train reads them, saves that it did, and trains on what has one."""
    coco_folder(tmp_path / "data", content_with(SQUARE, None, RUNS), ("train", "val"))
    where, run = str(tmp_path / "data"), tmp_path / "run"
    words = ["--data.workers", "0", "--training.epochs", "1", "--training.batch-size", "1", "--device", "cpu", "--data.filter-empty"]
    words += ["--data.same-images", "allow", *SIZES]
    main(["train", "small-dino", "--data", where, "--data.masks", "--output", str(run), *words])
    said = capsys.readouterr()
    assert (said.out + said.err).count("1 annotation without a mask") == 1
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["data"]["masks"] is True and "1 images, 2 annotations" in config["data"]["train"]
    main(["check", where, "--splits", "train", "--masks"])
    assert "annotation 11: has no `segmentation`" in capsys.readouterr().out
    main(["check", where, "--splits", "train"])
    assert "segmentation" not in capsys.readouterr().out
