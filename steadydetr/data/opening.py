"""From what a user says after `--data` to a data set: folders are recognised by their layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from steadydetr.data.folders import Dataset, FolderDataset, JoinedDataset, Subset, read_coco, read_voc
from steadydetr.data.index import join
from steadydetr.data.shapes import ShapesConfig, ShapesDataset

ROBOFLOW = "_annotations.coco.json"
LAYOUTS = """What was looked for:
  COCO       annotations/instances_SPLIT*.json beside folders of images
  Roboflow   SPLIT/_annotations.coco.json with the images beside it (SPLIT: train, valid, test)
  VOC        JPEGImages, Annotations, ImageSets/Main/SPLIT.txt (or VOC2007 and VOC2012 folders of these)
  shapes     the word itself, as in shapes or shapes:size=128,images=2000,seed=0"""


def open_data(where: str | Path, split: str = "train") -> Dataset:
    """The data set behind a folder or the word `shapes`.

    Args:
        where: a folder in COCO, Roboflow COCO or VOC layout; `shapes[:option=value,...]`; several joined by `+`.
        split: train, val, test or the name of any split that the folder has.

    Raises:
        ValueError: the layout is not recognised or has no such split; says what was looked for and what is there.
    """
    text = str(where)
    if "+" in text and not Path(text).exists():
        return join_data([open_data(part.strip(), split) for part in text.split("+")])
    if text == "shapes" or text.startswith("shapes:"):
        return ShapesDataset(parse_shapes(text), split)
    root = Path(text).expanduser()
    if not root.is_dir():
        raise ValueError(f"--data {text}: there is no such folder. {LAYOUTS}")
    for opener in (_open_coco, _open_roboflow, _open_voc, _open_voc_years):
        if (dataset := opener(root, split)) is not None:
            return dataset
    found = ", ".join(sorted(p.name + "/" * p.is_dir() for p in root.iterdir())[:12]) or "nothing"
    raise ValueError(f"--data {text}: no layout of data was recognised. {LAYOUTS}\nFound there: {found}")


def join_data(parts: list[Dataset]) -> JoinedDataset:
    return JoinedDataset(join([part.index for part in parts]), tuple(parts))


def parse_shapes(text: str) -> ShapesConfig:
    """`shapes:size=128,images=2000` -> ShapesConfig."""
    options: dict[str, int] = {}
    known = list(ShapesConfig.__dataclass_fields__)
    for item in filter(None, text.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key.strip() not in known or not value.strip().isdigit():
            raise ValueError(f"--data {text}: {item!r} is not understood; options are {', '.join(f'{k}=NUMBER' for k in known)}")
        options[key.strip()] = int(value)
    return ShapesConfig(**options)


def _open_coco(root: Path, split: str) -> FolderDataset | None:
    folder = root / "annotations"
    files = sorted(folder.glob("instances_*.json")) if folder.is_dir() else []
    if not files:
        return None
    matching = [f for f in files if f.stem.removeprefix("instances_") == split]
    matching = matching or [f for f in files if f.stem.removeprefix("instances_").startswith(split)]
    present = ", ".join(f.name for f in files)
    if len(matching) != 1:
        what = "no annotation file" if not matching else "several annotation files"
        raise ValueError(
            f"{folder} has {what} for split {split!r}; it holds {present}. Name one with --data.train-split or --data.val-split"
        )
    name = matching[0].stem.removeprefix("instances_")
    places = [root / name, root / "images" / name, root / "images", root]
    images = next((place for place in places if place.is_dir()), root)
    return read_coco(matching[0], images, f"{root.name}-{name}")


def _open_roboflow(root: Path, split: str) -> FolderDataset | None:
    present = sorted(path.parent.name for path in root.glob(f"*/{ROBOFLOW}"))
    if not present:
        return None
    names = [name for name in ({"val": "valid"}.get(split, split), split) if name in present]
    if not names:
        raise ValueError(f"{root} has no split {split!r}; it holds {', '.join(present)}")
    return read_coco(root / names[0] / ROBOFLOW, root / names[0], f"{root.name}-{names[0]}")


def _open_voc(root: Path, split: str) -> FolderDataset | None:
    if not (root / "ImageSets" / "Main").is_dir():
        return None
    return read_voc(root, split, f"{root.name}-{split}")


def _open_voc_years(root: Path, split: str) -> Dataset | None:
    """VOCdevkit: every year that has the split (the test set of 2012 was never published)."""
    years = sorted(path for path in root.glob("VOC*") if (path / "ImageSets" / "Main").is_dir())
    with_split = [year for year in years if (year / "ImageSets" / "Main" / f"{split}.txt").exists()]
    if not years:
        return None
    if not with_split:
        raise ValueError(f"none of {', '.join(year.name for year in years)} in {root} has a split {split!r}")
    parts: list[Dataset] = [read_voc(year, split, f"{year.name}-{split}") for year in with_split]
    return parts[0] if len(parts) == 1 else join_data(parts)


def for_training(dataset: Dataset, filter_empty: bool = False, limit: int | None = None) -> tuple[Dataset, int]:
    """The data set without crowd regions and boxes that cannot be trained on, and how many of the latter were dropped.

    Args:
        filter_empty: leave out images that have no object left.
        limit: only the first images.
    """
    usable = dataset.index.usable()
    dropped = int((~usable & ~dataset.index.crowd).sum())
    index = dataset.index.keep_rows(usable)
    positions = np.flatnonzero(index.counts > 0) if filter_empty else np.arange(len(index))
    positions = positions[:limit]
    if not len(positions):
        raise ValueError(f"{dataset.name} has no image to train on")
    return Subset(index.keep_images(positions), dataset, positions), dropped


def first_images(dataset: Dataset, limit: int | None) -> Dataset:
    if limit is None or limit >= len(dataset.index):
        return dataset
    positions = np.arange(limit)
    return Subset(dataset.index.keep_images(positions), dataset, positions)
