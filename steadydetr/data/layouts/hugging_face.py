"""Data sets of Hugging Face's package `datasets`, from the hub or saved on disk, whose images lie in tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from steadydetr.data.columns import id_array
from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.images import picture_size
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.base import ALL, InspectedLayout, Report, fault
from steadydetr.data.layouts.common import as_corners, choose_split, splits_of
from steadydetr.data.layouts.image_folder import BOX_FIELDS, CLASS_FIELDS, by_number
from steadydetr.data.picture_inputs import Encoded
from steadydetr.data.reading import expanded
from steadydetr.fetching import hub_or_cache
from steadydetr.files import one_line, printable
from steadydetr.kinds import register
from steadydetr.lazy import np

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

PREFIX, OPTIONS = "hf:", ("config", "bbox", "revision")
THREADS = 8
SAVED = ("dataset_dict.json", "state.json")


class Place(NamedTuple):
    """`hf:owner/name,config=full,bbox=xyxy`, taken apart."""

    name: str
    config: str | None = None
    bbox: str | None = None
    revision: str | None = None

    @staticmethod
    def of(where: str) -> Place:
        name, *words = where.removeprefix(PREFIX).split(",") if where.startswith(PREFIX) else [where]
        options = dict(word.partition("=")[::2] for word in words)
        if wrong := [word for word in words if word.partition("=")[0] not in OPTIONS or not word.partition("=")[2]]:
            raise ValueError(
                f"--data {printable(where)}: {wrong[0]!r} is not understood; options are config=NAME, bbox=xywh or xyxy, revision=NAME"
            )
        if options.get("bbox", "xywh") not in ("xywh", "xyxy"):
            raise ValueError(f"--data {printable(where)}: bbox={options['bbox']} must be xywh (COCO's, the default) or xyxy")
        return Place(name, options.get("config"), options.get("bbox"), options.get("revision"))


@register("hugging-face-layout")
@dataclass(frozen=True)
class HuggingFace(InspectedLayout):
    """`hf:owner/name`, or a folder that `save_to_disk` has written, or one of parquet files called as their splits."""

    looked_for = (
        "Hugging Face: hf:owner/name[,config=NAME][,bbox=xyxy], a folder of save_to_disk, or *.parquet (pip install steadydetr[hf])"
    )

    def recognises(self, where: str) -> bool:
        root = expanded(where)
        return where.startswith(PREFIX) or _is_saved(root) or bool(_parquet(root))

    def splits(self, where: str) -> tuple[str, ...]:
        place, root = Place.of(where), expanded(Place.of(where).name)
        return splits_of(load_tables(place, root, self._source(root)))

    def inspect(self, where: str, split: str, report: Report) -> TableDataset:
        place = Place.of(where)
        root = expanded(place.name)
        source = self._source(root)
        tables = load_tables(place, root, source)
        name = choose_split(root, tables, split)
        return read_table(tables, name, place, source, report)

    def _source(self, root: Path) -> DataFolder:
        """What paths in a table may lead to."""
        return DataFolder(root if root.is_dir() else _cache(), self.limits)


def load_tables(place: Place, root: Path, source: DataFolder) -> dict[str, Dataset]:
    """The tables of all splits. Raises ValueError where the package is missing or the data set cannot be loaded; says what to do."""
    for path in (path for paths in _parquet(root).values() for path in paths):
        source.check_inside(path)
    tables = _load(place, root)
    if _is_saved(root):
        for path in (Path(file["filename"]) for table in tables.values() for file in table.cache_files):
            source.check_inside(path)
    return tables


def _is_saved(root: Path) -> bool:
    """Whether `save_to_disk` has written a folder."""
    return any((root / name).is_file() for name in SAVED)


def _load(place: Place, root: Path) -> dict[str, Dataset]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"--data {printable(place.name)} needs the package datasets: pip install 'steadydetr[hf]'") from error
    datasets.disable_progress_bars()
    try:
        if _is_saved(root):
            saved = datasets.load_from_disk(str(root))
            return dict(saved) if isinstance(saved, datasets.DatasetDict) else {ALL: saved}
        if files := _parquet(root):
            return dict(datasets.load_dataset("parquet", data_files={split: list(map(str, paths)) for split, paths in files.items()}))
        with hub_or_cache() as why, _offline(bool(why)):
            config = datasets.DownloadConfig(local_files_only=bool(why))
            return dict(datasets.load_dataset(place.name, place.config, revision=place.revision, download_config=config))
    except Exception as error:  # of nearly any class
        hint = ". Without a network: save it elsewhere with save_to_disk, and give that folder" if not root.is_dir() else ""
        raise ValueError(f"--data {printable(place.name)} cannot be loaded: {one_line(error)}{hint}") from error


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Within the block, the package's own setting, which it heeds where it ignores that of the call."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _parquet(root: Path) -> dict[str, list[Path]]:
    """Parquet files by split, as the hub names them: data/train-00000-of-00002.parquet, train.parquet, full/train/0000.parquet."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")]):
        found.setdefault(path.stem.partition("-")[0], []).append(path)
    return found


def _cache() -> Path:
    """Where the package keeps what it has fetched, images in files among it."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME)


@dataclass(frozen=True)
class TableDataset(FolderDataset):
    """A data set whose images are in a table, encoded; they are decoded as files are."""

    table: Any = None  # a datasets.Dataset of one column, not decoded

    in_files: ClassVar[bool] = False

    def image_file(self, position: int) -> Encoded | Path:
        """The image file in a row, or the path of one. Raises ValueError where there is neither."""
        cell = self.table[position]["image"] or {}
        if content := cell.get("bytes"):
            limit = self.data_folder.limits.max_file_mb
            if len(content) > limit * 2**20:
                raise ValueError(f"{self.index.file(position)} has {len(content) / 2**20:.0f} MiB, more than max_file_mb = {limit} allows")
            return Encoded(content, self.index.file(position))
        if not cell.get("path"):
            raise ValueError(f"{self.index.file(position)} has no image")
        path = Path(cell["path"])
        self.data_folder.check_inside(path)
        return path

    def size(self, position: int) -> tuple[int, int] | str:
        """Height and width from the head of an image, or why there is none."""
        try:
            return picture_size(self.image_file(position), self.data_folder.limits)
        except ValueError as error:
            return str(error)

    def way_out(self, position: int) -> str:
        return ""  # `image_file` refuses paths out of the folder

    def missing(self, position: int) -> bool:
        return False

    def take(self, positions: NDArray[np.int64], name: str) -> TableDataset:
        return replace(self, index=self.index.keep_images(positions), name=name, table=self.table.select(positions))

    def check_files(self) -> None:
        """There are no files to look for."""


# Tables


class Objects(NamedTuple):
    """The objects of a table's rows, flat: R rows, A objects."""

    counts: NDArray[np.int64]  # [R]
    boxes: NDArray[np.float64]  # [A, 4] as they are in the table
    categories: list[int | str]  # [A]


def read_table(tables: dict[str, Dataset], split: str, place: Place, source: DataFolder, report: Report) -> TableDataset:
    """A split as a data set. Raises ValueError where it has no column of images or of objects; says which columns there are."""
    where = f"{place.name}, split {split}"
    table = tables[split]
    image_column = _column_of(table, "Image")
    if image_column is None or "objects" not in table.column_names:
        raise ValueError(
            f"--data {printable(where)}: it needs a column of images and one called objects; it has {', '.join(table.column_names)}"
        )
    objects = _objects(table, where)
    named = _class_names(table.features["objects"])
    classes = named or _names_used(tables, where)
    labels = _labels(objects, classes, bool(named), where, report)
    pictures = _images_only(table, image_column)
    files = [name or f"row {row}" for row, name in enumerate(_paths(pictures))]
    boxes = objects.boxes.copy()
    if place.bbox != "xyxy":
        boxes[:, 2:] += boxes[:, :2]
    with np.errstate(over="ignore"):
        index = AnnotationIndex.build(
            image_ids=_ids(table),
            files=files,
            sizes=np.zeros((len(files), 2)),
            counts=objects.counts,
            boxes_xyxy=boxes,
            labels=labels.clip(0),
            classes=classes,
            category_ids=tuple(range(len(classes))),
        ).keep_rows(labels >= 0)
    dataset = TableDataset(index, source.root, f"{place.name.rpartition('/')[2]}-{split}", source, pictures)
    return _with_sizes(dataset, table, objects, place, where, report)


def _with_sizes(dataset: TableDataset, table: Dataset, objects: Objects, place: Place, where: str, report: Report) -> TableDataset:
    """The data set with the sizes of its images, of the columns width and height or else of the images; those without are left out."""
    count = len(dataset.index)
    if {"width", "height"} <= set(table.column_names):
        columns = table.select_columns(["height", "width"]).with_format("numpy")[:]
        sizes = np.column_stack((columns["height"], columns["width"])).astype(np.int32)
        reasons = {position: "its width or height is not positive" for position in np.flatnonzero((sizes <= 0).any(1)).tolist()}
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(dataset.size, range(count)))
        sizes = np.array([(0, 0) if isinstance(size, str) else size for size in found], np.int32).reshape(-1, 2)
        reasons = {position: size for position, size in enumerate(found) if isinstance(size, str)}
    for position, reason in reasons.items():
        report(fault("unknown image size", where, f"row {position}", reason))
    kept = np.setdiff1d(np.arange(count), list(reasons))
    if not len(kept):
        raise ValueError(f"--data {printable(where)} has no image that can be used")
    _refuse_corners(objects, sizes, place, where)
    index = replace(dataset.index, sizes=sizes)
    if not reasons:
        return replace(dataset, index=index)
    return replace(dataset, index=index.keep_images(kept), table=dataset.table.select(kept))


def _refuse_corners(objects: Objects, sizes: NDArray[np.int32], place: Place, where: str) -> None:
    """Raise ValueError where nobody has said what boxes are, some end beyond their image as x, y, w, h, and all fit as corners."""
    if place.bbox is not None or not len(objects.boxes):
        return
    fit, beyond = as_corners(objects.boxes, np.repeat(sizes, objects.counts, 0))
    if fit and beyond:
        raise ValueError(
            f"--data {printable(where)}: as x, y, width, height, {beyond} of {len(objects.boxes)} boxes end beyond their image,"
            f" and all fit as corners: say which they are, as in {PREFIX}{printable(place.name)},bbox=xyxy (or bbox=xywh)"
        )


def _column_of(table: Dataset, kind: str) -> str | None:
    """The column of images: `image`, or else the first of that kind of feature."""
    names = [name for name, feature in table.features.items() if type(feature).__name__ == kind]
    return "image" if "image" in names else next(iter(names), None)


def _images_only(table: Dataset, column: str) -> Dataset:
    """The column of images alone, called `image`, whose values are bytes and paths."""
    import datasets

    alone = table.select_columns([column])
    alone = alone if column == "image" else alone.rename_column(column, "image")
    return alone.cast_column("image", datasets.Image(decode=False))


def _paths(pictures: Dataset) -> list[str]:
    """What images were called when the table was made; empty where it does not say, or twice the same."""
    import pyarrow.compute as pc

    chunks = pictures.with_format("arrow")[:].column("image").chunks
    names = [os.path.basename(path or "") for chunk in chunks for path in pc.struct_field(chunk, "path").to_pylist()]
    return names if len(set(names)) == len(names) else [""] * len(names)


def _objects(table: Dataset, where: str) -> Objects:
    """The objects of all rows, as a list of each field or a list of objects. Raises ValueError where they are not as they must be."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pa.concat_arrays(table.select_columns(["objects"]).with_format("arrow")[:].column("objects").chunks)
    as_list = not pa.types.is_struct(column.type)
    struct = pc.list_flatten(column) if as_list else column
    if not pa.types.is_struct(struct.type):
        raise ValueError(f"--data {printable(where)}: objects are {struct.type}, and have no boxes with classes")
    fields = [field.name for field in struct.type]
    box, category = (next((name for name in names if name in fields), None) for names in (BOX_FIELDS, CLASS_FIELDS))
    if box is None or category is None:
        wanted = f"one of {', '.join(BOX_FIELDS)}, and one of {', '.join(CLASS_FIELDS)}"
        raise ValueError(f"--data {printable(where)}: objects have {', '.join(fields)}; they need {wanted}")
    boxes, categories = pc.struct_field(struct, box), pc.struct_field(struct, category)
    counts = pc.fill_null(pc.list_value_length(column if as_list else boxes), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if not as_list:
        if not pc.fill_null(pc.list_value_length(categories), 0).equals(pc.fill_null(pc.list_value_length(boxes), 0)):
            raise ValueError(f"--data {printable(where)}: there are rows with other numbers of boxes than of classes")
        boxes, categories = pc.list_flatten(boxes), pc.list_flatten(categories)
    if len(boxes) and set(pc.list_value_length(boxes).unique().to_pylist()) != {4}:
        raise ValueError(f"--data {printable(where)}: there are boxes that are not four numbers")
    values = pc.list_flatten(boxes).to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, 4)
    return Objects(counts, values, categories.to_pylist())


def _class_names(feature: Any) -> tuple[str, ...]:
    """The names of the class labels in a feature of objects; none where classes are plain numbers or texts."""
    if type(feature).__name__ == "ClassLabel":
        return tuple(feature.names)
    below = feature.values() if isinstance(feature, dict) else feature if isinstance(feature, list) else [getattr(feature, "feature", None)]
    return next((names for one in below if one is not None and (names := _class_names(one))), ())


def _names_used(tables: dict[str, Dataset], where: str) -> tuple[str, ...]:
    """The classes that occur in any split, in the order of the alphabet, or of their numbers."""
    return tuple(sorted({str(value) for table in tables.values() for value in _objects(table, where).categories}, key=by_number))


def _labels(objects: Objects, classes: Sequence[str], numbered: bool, where: str, report: Report) -> NDArray[np.int64]:
    """[A] the class of every object; -1, reported, where it has none.

    Args:
        numbered: numbers are those of class labels; else they are names.
    """
    numbers = dict(enumerate(classes)) if numbered else {int(name): name for name in classes if name.isdecimal()}
    label_of = {name: label for label, name in enumerate(classes)}
    known: dict[Any, int] = {**label_of, **{number: label_of[name] for number, name in numbers.items()}}
    labels = [known.get(value, -1) for value in objects.categories]
    found = np.array(labels, dtype=np.int64)
    rows = np.repeat(np.arange(len(objects.counts)), objects.counts)
    for at in np.flatnonzero(found < 0).tolist():
        message = f"its class {objects.categories[at]!r} is none of the {len(classes)} class labels"
        report(fault("unknown class", where, f"row {rows[at]}", message))
    return found


def _ids(table: Dataset) -> Any:
    """The column image_id where it has a different value for each image, else 1, 2, ..."""
    values = table["image_id"][:] if "image_id" in table.column_names else []
    usable = len(set(values)) == len(table) and {*map(type, values)} <= {int, str}
    return id_array(values) if usable else np.arange(1, len(table) + 1)
