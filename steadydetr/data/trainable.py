"""Whether training can start on a data set, and what of it training will not see. `check` and `train` say it in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from steadydetr.data.dataset import Dataset
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.common import as_corners
from steadydetr.data.overlap import shared_images, shared_versions
from steadydetr.data.transforms import Sample, TrainTransform, apply, seeded
from steadydetr.files import counted, listed, one_line, printable
from steadydetr.lazy import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRIES = 20  # of a transform, which has random parts
NORMALISED = "all boxes lie within 0..1 pixels: they look normalised, pixels are expected"
CORNERS = (
    "many boxes reach out of their image, and all would fit if they were x, y, x, y: they look like corners, where x, y, width, height is"
    " expected"
)
ELSEWHERE = (
    "no mask lies where the box of its object does: masks may be normalised, have x and y swapped, be row by row, or belong to an image of"
    " another size; COCO's are in pixels, x before y, runs column by column"
)
MUCH = 2**32  # bytes for the masks of one image  # D-234
MANY = 0.1  # share of the boxes that reach out of their image
ALLOW_SAME = (
    "What is learned by heart would count as found. Choose another --data.val-split or --data.val-source, or neither, and a part is held"
    " out where the data bring no split to validate on. To see whether a detector can learn these images at all: --data.same-images allow"
)


class SharedImages(NamedTuple):
    sentence: str  # empty: there are none
    all: bool  # that are validated on


def how_images_are_shared(train: Dataset, val: Dataset) -> SharedImages:
    """The images to validate on that are trained on too, in a sentence."""
    shared, total = shared_images(val, train), len(val.index)
    if not shared:
        return SharedImages("", False)
    how_many = "all images" if len(shared) == total else f"{len(shared)} of the {counted(total, 'image')}"
    first = listed((printable(val.index.file(position)) for position in shared), 3)
    return SharedImages(f"{how_many} to validate on are trained on too: {first}", len(shared) == total)


def how_versions_are_shared(train: Dataset, val: Dataset) -> str:
    """The images to validate on of which other versions are trained on, in a sentence; empty if there are none."""
    shared = shared_versions(val, train)
    if not shared:
        return ""
    first = listed((printable(val.index.file(position)) for position in shared), 3)
    return (
        f"of {len(shared)} of the {counted(len(val.index), 'image')} to validate on other versions are trained on, by their names: {first}"
    )


def check_transform(transform: TrainTransform, channels: int) -> None:
    """Raise ValueError where a transform cannot take images of so many channels, as changes of colours, or other fillings, cannot."""
    for seed in range(TRIES):
        sample = Sample(
            torch.zeros(channels, 48, 64, dtype=torch.uint8), torch.tensor([[8.0, 8, 40, 40]]), torch.zeros(1, dtype=torch.long)
        )
        try:
            with seeded(seed):
                apply(transform.build(), sample)
        except Exception as error:  # as torchvision raises
            raise ValueError(
                f"data.transform = {transform} does not take images of {counted(channels, 'channel')}: {one_line(error, 200)}. Leave out"
                " what changes colours or fills with one, or take detector.backbone.image_channels 3"
            ) from error


def why_no_object(index: AnnotationIndex) -> str:
    """Why there is no object to train on; empty where there is one."""
    total, crowd, maskless = len(index.labels), int(index.crowd.sum()), int((index.without_mask & ~index.crowd).sum())
    if index.usable().any():
        return ""
    if not total:
        return "no image has an annotation"
    kinds = {"crowd regions (iscrowd 1)": crowd, "without a mask": maskless}
    kinds["boxes without area or outside their image"] = total - crowd - maskless
    return f"of its {total} annotations {' and '.join(f'{n} are {kind}' for kind, n in kinds.items() if n)}"


def look_normalised(index: AnnotationIndex) -> bool:
    """Whether all boxes that can be trained on lie within the first pixel of larger images."""
    boxes = index.boxes_xyxy[index.usable()]
    return bool(len(boxes)) and float(boxes.max()) <= 1.01 and int(index.sizes.max()) > 8


def look_like_corners(index: AnnotationIndex) -> bool:
    """Whether boxes were read as x, y, width, height where their numbers are two corners: many reach out of their image so, and none
    would as corners."""
    rows = index.usable()
    low, high = index.boxes_xyxy[rows, :2], index.boxes_xyxy[rows, 2:]
    fit, beyond = as_corners(np.concatenate((low, high - low), 1), index.sizes[index.image_of_row[rows]])
    return fit and beyond > MANY * len(low)


def masks_elsewhere(index: AnnotationIndex) -> NDArray[np.bool_]:
    """[A] whether less than half of the box around the mask of an object lies in the object's own box, or in the image at all.

    The object's box is taken a pixel larger on each side, and the mask's at least a pixel wide and high. Crowd regions are not looked at.
    """
    if index.masks is None:
        return np.zeros(len(index.labels), bool)
    sizes = index.sizes[index.image_of_row]
    low, high = np.split(index.masks.boxes(sizes[:, 0]), 2, 1)
    thin = np.maximum(1 - (high - low), 0) / 2
    low, high = low - thin, high + thin
    boxes = index.boxes_xyxy.clip(0, sizes[:, [1, 0, 1, 0]])
    common = np.minimum(high, boxes[:, 2:] + 1) - np.maximum(low, boxes[:, :2] - 1)
    inside = (np.clip(common, 0, None) / (high - low)).prod(1)
    elsewhere: NDArray[np.bool_] = index.usable() & (inside < 0.5)
    return elsewhere


def look_elsewhere(index: AnnotationIndex) -> bool:
    """Whether that is so of all objects that can be trained on."""
    return bool(index.usable().any() and np.array_equal(masks_elsewhere(index), index.usable()))


def say_elsewhere(index: AnnotationIndex) -> str:
    """How many objects that is so of, in a sentence; empty if of none. `check` names each."""
    elsewhere = int(masks_elsewhere(index).sum())
    said = f"of {counted(elsewhere, 'object')} most of the mask lies outside of the box; `steadydetr check --masks` names them"
    return said if elsewhere else ""


def memory_of_masks(index: AnnotationIndex) -> str:
    """A sentence on the image whose masks take the most memory while it is prepared, where that is much; else empty."""
    if index.masks is None or not len(index):
        return ""
    memory = 2 * index.counts * index.sizes.prod(1, dtype=np.int64)  # decoded, and copied by a step of a transform
    position = int(memory.argmax())
    if memory[position] < MUCH:
        return ""
    height, width = index.sizes[position].tolist()
    return (
        f"to prepare {printable(index.file(position))}, a loading process needs about {memory[position] / 2**30:.0f} GiB for the masks of"
        f" {index.counts[position]} objects in {width} x {height} pixels: cut such images into parts, make them smaller, or take fewer"
        " --data.workers"
    )


def smaller_than_a_pixel(index: AnnotationIndex, scale: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[A] whether a box has a side below a pixel at this scale [I, 2] (h, w): transforms drop it. Only what is in its image counts."""
    image = index.image_of_row
    sides = index.sizes[image][:, [1, 0, 1, 0]].astype(np.float64)
    boxes = index.boxes_xyxy.clip(0, sides)
    smaller: NDArray[np.bool_] = ((boxes[:, 2:] - boxes[:, :2]) * scale[image][:, ::-1] < 1).any(1)
    return smaller


def most_of_a_class(index: AnnotationIndex) -> int:
    """The most objects of one class in an image, without crowd regions."""
    rows = ~index.crowd
    keys = index.image_of_row[rows] * len(index.classes) + index.labels[rows]
    return int(np.unique(keys, return_counts=True)[1].max(initial=0))


def how_classes_differ(first: Sequence[str], second: Sequence[str]) -> str:
    """Both lists, and in what they differ; empty where they are the same in the same order."""
    if tuple(first) == tuple(second):
        return ""
    both = " against ".join(f"[{listed((repr(printable(name)) for name in names), 10)}]" for names in (first, second))
    if sorted(first) == sorted(second):
        return f"{both}: the same names, but in another order of their ids"
    if sorted(map(_plain, first)) == sorted(map(_plain, second)):
        return f"{both}: the names differ in capital letters or blanks"
    only = [[name for name in one if name not in other] for one, other in ((first, second), (second, first))]
    sides = [
        f"only the {side} has {listed(map(printable, names), 10)}" for side, names in zip(("first", "second"), only, strict=True) if names
    ]
    return f"{both}: {', '.join(sides)}"


def alike_classes(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ only in capital letters or blanks."""
    first_of: dict[str, str] = {}
    return [(first, name) for name in classes if (first := first_of.setdefault(_plain(name), name)) != name]


def _plain(name: str) -> str:
    return "".join(name.casefold().split())
