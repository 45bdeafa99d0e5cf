"""YOLO: a label file for each image; splits and names of classes in a YAML file, in darknet's files, or told by folders and classes.txt."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.base import ALL, InspectedLayout, NoSplit, Report, fault
from steadydetr.data.layouts.common import (
    Listings,
    Remarks,
    choose_split,
    files_below,
    head_of,
    ids_of_names,
    is_image,
    is_split,
    named,
    split_folders,
    splits_of,
    standard_split,
)
from steadydetr.data.layouts.yolo_labels import LabelFile, read_labels
from steadydetr.data.picture_sizes import picture_sizes
from steadydetr.data.reading import decode_text, expanded, is_file_name, is_hidden
from steadydetr.files import listed, printable
from steadydetr.kinds import register
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

YAML, DARKNET = (".yaml", ".yml"), (".data",)
CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")  # of labelImg and Label Studio, darknet and CVAT, Roboflow
LONGEST_YAML = 2**20  # bytes; such files have a name for each class, and no annotation
MOST_CLASSES = 100_000
LONGEST_LINE = 4096  # bytes of a file's first line that are looked at
LOOKED_AT = 20  # label files by which YOLO's are told from other texts
A_LABEL = re.compile(rb"\s*\d+(\.0*)?([ \t]+[-+.,\deE]+){4,}\s*")


@register("yolo-layout")
@dataclass(frozen=True)
class Yolo(InspectedLayout):
    """A place may be the YAML file, the folder with it, or one above it."""

    gives_masks = True
    looked_for = (
        "YOLO: data.yaml (or that file itself), or obj.data, or classes.txt with images/ and labels/, or with a .txt beside each image"
    )

    def recognises(self, where: str) -> bool:
        place = expanded(where)
        if place.is_file():
            return place.suffix.lower() in (*YAML, *DARKNET)
        return bool(_descriptions(place)) or any(_has_labels(one, place) for one in itertools.chain(*_places(place).values()))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(self._contents(where).splits)

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        data, remarks = self._contents(where), Remarks()
        source = DataFolder(data.root, self.limits)
        if missing := [text for name, text in data.missing.items() if standard_split(name) == standard_split(split)]:
            raise NoSplit(f"{printable(data.file)} has no split {split!r}: {printable(missing[0])} is not there")
        name = choose_split(data.file, data.splits, split)
        for text in data.moved.get(name, ()):
            remarks.add("paths of another place", "path of another place", f"is read as {text}", printable(data.file))
        images = Listings(data.root)
        files = [file for place in data.splits[name] for file in _images(place, images, source, report)]
        sizes = _sizes(files, source, report)
        files = [file for file, known in zip(files, sizes[:, 0] > 0, strict=True) if known]
        if not files:
            raise ValueError(f"{printable(data.file)}: split {split!r} has no image that can be used")
        pixels = sizes[sizes[:, 0] > 0].astype(np.int64)
        label_files = list(_label_files(files, images, source, remarks))
        labels = read_labels(label_files, pixels, len(data.classes), data.keypoints, source, report, remarks, self.masks)
        index = AnnotationIndex.build(
            image_ids=ids_of_names([os.path.splitext(file)[0] for file in files]),
            files=files,
            sizes=pixels,
            counts=labels.counts,
            boxes_xyxy=labels.boxes,
            labels=labels.classes,
            classes=data.classes,
            category_ids=tuple(range(len(data.classes))),
            masks=labels.masks,
        )
        remarks.tell(data.file, report)
        return FolderDataset(index, data.root, f"{data.root.name}-{name}", source)

    def _contents(self, where: str) -> YoloData:
        place = expanded(where)
        root = place.parent if place.is_file() else place
        source, file = DataFolder(root, self.limits), _description(place)
        if file is None:
            return _read_folders(root, source)
        return (_read_yaml if file.suffix.lower() in YAML else _read_darknet)(file, root, source)


@dataclass(frozen=True)
class YoloData:
    """What a description of a data set says of it."""

    root: Path
    file: Path  # the description, or the folder where there is none
    classes: tuple[str, ...]
    splits: dict[str, list[Path]]  # folders of images and lists of them
    missing: dict[str, str] = field(default_factory=dict)  # splits that are named, but of which nothing is there
    moved: dict[str, list[str]] = field(default_factory=dict)  # paths that are those of another machine, and what is there in their place
    keypoints: int = 0  # numbers in a line after the box


def _description(place: Path) -> Path | None:
    """The file that describes a data set. ValueError where there are several."""
    found = [place] if place.is_file() else _descriptions(place)
    if len(found) > 1:
        names = listed((printable(path.relative_to(place)) for path in found), 10)
        raise ValueError(f"{printable(place)} has several files that describe a data set of YOLO: {names}. Give one of them as --data")
    return found[0] if found else None


def _descriptions(folder: Path) -> list[Path]:
    """YOLO's YAML files or darknet's files in a folder, or else in the folders in it."""
    found = _descriptions_in(folder)
    if not found and folder.is_dir():
        with os.scandir(folder) as entries:
            found = [path for entry in itertools.islice(entries, LOOKED_AT) if entry.is_dir() for path in _descriptions_in(Path(entry))]
    return sorted(found)


def _descriptions_in(folder: Path) -> list[Path]:
    found = []
    for name in sorted(named(folder, YAML)):
        head = head_of(folder / name, LONGEST_YAML)
        if re.search(rb"^(names|nc)\s*:", head, re.M) and re.search(rb"^(train|val|valid|test)\s*:", head, re.M):
            found.append(folder / name)
    for name in [] if found else sorted(named(folder, DARKNET)):
        if re.search(rb"^\s*names\s*=", head_of(folder / name), re.M):
            found.append(folder / name)
    return found


# YAML


def _read_yaml(file: Path, root: Path, source: DataFolder) -> YoloData:
    """data.yaml of Ultralytics and Roboflow.

    Raises ValueError where it cannot be used; names the field.
    """
    values = _load_yaml(file, source)
    bases = [file.parent / _text(values["path"], "path", file)] if values.get("path") not in (None, "") else []
    bases = [base for base in bases if base.is_dir()] + [file.parent, root]
    data = YoloData(root, file, _class_names(values, file), {}, keypoints=_keypoints(values, file))
    for key in (key for key in values if isinstance(key, str) and is_split(key) and values[key]):
        texts = values[key] if isinstance(values[key], list) else [values[key]]
        for text in (_text(value, key, file) for value in texts):
            found, as_written = _locate(text, bases, root)
            if found is None:
                data.missing[key] = f"{key}: {text}"
                continue
            data.splits.setdefault(key, []).append(found)
            if not as_written:
                data.moved.setdefault(key, []).append(f"{os.path.relpath(found, root)} in place of {text}")
    for key in data.missing.keys() & data.splits.keys():
        raise ValueError(f"{printable(file)}: {printable(data.missing[key])} is not there, which is a part of the split")
    return data


def _load_yaml(file: Path, source: DataFolder) -> dict[Any, Any]:
    content = source.read_entry(file)
    if len(content) > LONGEST_YAML:
        raise ValueError(f"{printable(file)} has {len(content) / 2**20:.1f} MiB: a description of a data set has at most 1")
    text = decode_text(content, file).lstrip("\ufeff")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError(f"{printable(file)} uses aliases (*name), which no description of a data set needs; such a file is not read")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{printable(file)} is not YAML: {printable(' '.join(str(error).split()))[:200]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{printable(file)} is not a description of a data set of YOLO, which has names and train")
    return values


def _text(value: object, field: str, file: Path) -> str:
    if not isinstance(value, str) or not is_file_name(value):
        raise ValueError(f"{printable(file)}: {field} must be a path, or a list of paths")
    return value.replace("\\", "/")


def _class_names(values: dict[Any, Any], file: Path) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers in label files."""
    names, number = values.get("names"), values.get("nc")
    if isinstance(names, dict):
        keys = [int(key) if isinstance(key, int) or (isinstance(key, str) and key.isdecimal() and len(key) < 7) else -1 for key in names]
        if sorted(keys) != list(range(len(keys))):
            raise ValueError(f"{printable(file)}: the keys of names must be the numbers of the classes: 0 to {len(keys) - 1}, each once")
        names = [name for _, name in sorted(zip(keys, names.values(), strict=True), key=lambda pair: pair[0])]
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or not 0 < number <= MOST_CLASSES):
        raise ValueError(f"{printable(file)}: nc must be the number of classes, 1 to {MOST_CLASSES}")
    if names is None and number is not None:
        names = [f"class_{position}" for position in range(number)]  # as Ultralytics calls them
    if not isinstance(names, list) or not names:
        raise ValueError(f"{printable(file)}: names must list the classes: names: [cat, dog]")
    for position, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ValueError(f"{printable(file)}: name {position} of names is no text for YAML: put it in quotes")
    if number is not None and number != len(names):
        raise ValueError(f"{printable(file)}: nc is {number}, but names lists {len(names)} classes: mend one, or leave nc out")
    return _checked(map(str, names), file)


def _checked(names: Iterable[str], file: Path) -> tuple[str, ...]:
    position_of = dict[str, int]()
    for position, name in enumerate(name.strip() for name in names):
        if not name:
            raise ValueError(f"{printable(file)}: the name of class {position} is empty")
        if (first := position_of.setdefault(name, position)) != position:
            raise ValueError(f"{printable(file)}: classes {first} and {position} are both called {printable(name)!r}")
    return tuple(position_of)


def _keypoints(values: dict[Any, Any], file: Path) -> int:
    """Numbers in a line that are keypoints of its object, of a data set for poses."""
    shape = values.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and 0 < n < 10_000 for n in shape):
        raise ValueError(f"{printable(file)}: kpt_shape must be two numbers: how many keypoints, and 2 or 3 values of each")
    return int(shape[0] * shape[1])


def _locate(text: str, bases: list[Path], root: Path) -> tuple[Path | None, bool]:
    """The folder or list that a path means, from one of the `bases` on, and whether it lies where the path says.

    Exports name places that were those of another machine, and Roboflow's `../train/images` means `train/images` beside the file. So,
    before a path that leads out of the data folder is followed, its end is looked for in the folder (D-126).
    """
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    fewest = 1 if text.endswith(".txt") else 2  # parts of its end that are enough
    ends = [base.joinpath(*parts[start:]) for start in range(max(len(parts) - fewest + 1, 1)) for base in bases]
    written = [base / text for base in bases]
    there = [path for path in (*written, *(ends if parts else ())) if os.path.exists(path)]
    found = next((path for path in there if not DataFolder(root).way_out(path)), there[0] if there else None)
    meant = written + (ends[: len(bases)] if text.startswith("../") else [])
    return found, found in meant


# darknet


def _read_darknet(file: Path, root: Path, source: DataFolder) -> YoloData:
    """obj.data of darknet and CVAT: lines of `name = value`, whose paths begin in the folder that darknet is started in."""
    text = decode_text(source.read_entry(file), file)
    pairs = (line.partition("=") for line in text.splitlines() if not line.lstrip().startswith("#"))
    values = {key.strip(): value.strip() for key, _, value in pairs if value.strip()}
    bases = [file.parent, root]
    names, _ = _locate(values.get("names", "obj.names"), bases, root)
    names = names or next((file.parent / name for name in CLASS_FILES if (file.parent / name).is_file()), None)
    if names is None:
        raise ValueError(f"{printable(file)}: names = {printable(values.get('names', ''))} is not there: it lists the classes, one a line")
    data = YoloData(root, file, _class_list(names, source), {})
    for key in filter(is_split, values):
        found, _ = _locate(values[key], bases, root)
        if found is None:
            data.missing[key] = f"{key} = {values[key]}"
        else:
            data.splits[key] = [found]
    return data


def _class_list(file: Path, source: DataFolder) -> tuple[str, ...]:
    """The classes of a file that has one a line."""
    lines = decode_text(source.read_entry(file), file).lstrip("\ufeff").rstrip().splitlines()
    if not lines or len(lines) > MOST_CLASSES:
        raise ValueError(f"{printable(file)} must list the classes, one a line, and has {len(lines)} lines")
    return _checked(lines, file)


# Folders alone


def _read_folders(root: Path, source: DataFolder) -> YoloData:
    """Images and labels in folders, and the names of the classes in classes.txt, or in a data.yaml that says nothing of splits."""
    splits = _places(root)
    folders = dict.fromkeys(folder for name in ("", *splits) for folder in _folders_of(root, name))
    lists = [folder / name for folder in folders for name in CLASS_FILES if (folder / name).is_file()]
    if not lists:
        if (file := _yaml_of_names(root)) is None:
            raise ValueError(
                f"{printable(root)} has label files of YOLO, but no names of classes: list them, one a line, in its classes.txt"
            )
        values = _load_yaml(file, source)
        return YoloData(root, file, _class_names(values, file), splits, keypoints=_keypoints(values, file))
    classes = _class_list(lists[0], source)
    for other in lists[1:]:
        if _class_list(other, source) != classes:
            raise ValueError(f"{printable(lists[0])} and {printable(other)} list different classes: remove the one that is wrong")
    return YoloData(root, root, classes, splits)


def _folders_of(root: Path, split: str) -> tuple[Path, ...]:
    """Where tools write the list of classes: labelImg beside the label files, wherever these are."""
    return root / split, root / split / "labels", root / "labels" / split, root / "images" / split


def _yaml_of_names(root: Path) -> Path | None:
    """The YAML file that names the classes, as supervision writes it; ValueError where there are several."""
    found = [root / name for name in sorted(named(root, YAML)) if re.search(rb"^(names|nc)\s*:", head_of(root / name, LONGEST_YAML), re.M)]
    if len(found) > 1:
        names = listed(printable(path.name) for path in found)
        raise ValueError(f"{printable(root)} has several files that name classes: {names}. Keep one of them")
    return found[0] if found else None


def _places(root: Path) -> dict[str, list[Path]]:
    """The folders or lists of images of each split, or of the split `all`."""
    lists = [name for name in sorted(named(root, (".txt",))) if is_split(name[:-4]) and _is_list(root / name)]
    if lists:
        return {name[:-4]: [root / name] for name in lists}
    if names := split_folders(root / "images"):
        return {name: [root / "images" / name] for name in names}
    if names := split_folders(root):
        return {name: [root / name / "images" if (root / name / "images").is_dir() else root / name] for name in names}
    return {ALL: [root / "images" if (root / "images").is_dir() else root]}


def _is_list(file: Path) -> bool:
    return is_image(_first_line(file).decode("utf-8", "replace").strip())


def _first_line(file: Path) -> bytes:
    return head_of(file, LONGEST_LINE).partition(b"\n")[0]


def _has_labels(place: Path, root: Path) -> bool:
    """Whether a folder or a list of images has label files of YOLO, beside them or in the folder for labels."""
    folder = place.parent if place.is_file() else place
    labels = root / os.path.dirname(_label_of(os.path.join(os.path.relpath(folder, root), "a.jpg")))
    for start in dict.fromkeys((labels, folder / "labels", folder)):
        walked = itertools.islice(os.walk(start), LOOKED_AT)
        texts = (os.path.join(inner, name) for inner, _, names in walked for name in sorted(names) if name.lower().endswith(".txt"))
        for text in itertools.islice((text for text in texts if os.path.basename(text) not in CLASS_FILES), LOOKED_AT):
            if A_LABEL.fullmatch(_first_line(Path(text))):
                return True
    return False


# Images and their labels


def _images(place: Path, images: Listings, source: DataFolder, report: Report) -> Iterator[str]:
    """The images of a folder or of a list, relative to the data folder where they lie in it."""
    source.check_inside(place)
    if place.is_file():
        yield from _listed(place, images, source, report)
    else:
        start = _relative(place, images.root)
        yield from (os.path.join(start, file) if start != "." else file for file in files_below(place))


def _listed(file: Path, images: Listings, source: DataFolder, report: Report) -> Iterator[str]:
    """The images of a list: a path a line, relative to the list or to the data folder, or as it was on another machine."""
    start = _relative(file.parent, images.root)
    for number, line in enumerate(decode_text(source.read_list(file), file).lstrip("\ufeff").splitlines(), 1):
        text = line.strip().replace("\\", "/")
        if not text:
            continue
        if not is_file_name(text) or not is_image(text):
            report(fault("impossible file name", file, f"line {number}", f"{text[:80]!r} is no image"))
            continue
        written = [os.path.normpath(os.path.join(start, text)), os.path.normpath(text)]
        parts = [part for part in text.split("/") if part not in ("", ".", "..")]
        ends = (os.path.join(base, *parts[cut:]) for cut in range(len(parts)) for base in ("", start))
        inside = (path for path in written if not path.startswith(("/", "..")) or source.limits.outside == "allow")
        yield next((path for path in itertools.chain(inside, map(os.path.normpath, ends)) if images.is_there(path)), written[0])


def _sizes(files: list[str], source: DataFolder, report: Report) -> NDArray[np.int32]:
    """[I, 2] height and width of the images, which are relative to the data folder; 0 where one cannot be read, which is reported."""
    for folder in {os.path.dirname(file) for file in files}:  # one that leads elsewhere is an error of its own, not one of each image
        source.check_inside(source.root / folder)

    def wrong(position: int, reason: str) -> None:
        report(fault("unknown image size", source.root / files[position], "", reason))

    return picture_sizes(source, source.root, files, wrong)


def _relative(path: Path, root: Path) -> str:
    """The path from the data folder on; the whole path where it lies outside."""
    inner = os.path.relpath(path, root)
    return str(path.absolute()) if inner.startswith("..") else inner


def _label_of(file: str) -> str:
    """The label file of an image: that of its name in `labels/`, in place of the last `images/` of its path, or else beside it."""
    before, images, after = f"/{file}".rpartition("/images/")
    return os.path.splitext(f"{before}/labels/{after}".removeprefix("/") if images else file)[0] + ".txt"


def _label_files(files: list[str], images: Listings, source: DataFolder, remarks: Remarks) -> Iterator[LabelFile | None]:
    """The label file of each image; None for an image without one, which has no object."""
    missing, checked = list[str](), set[str]()
    for file in files:
        beside = os.path.splitext(file)[0] + ".txt"
        found = next((path for path in (_label_of(file), beside) if images.is_there(path)), None)
        if found is None:
            missing.append(file)
            yield None
            continue
        if (folder := os.path.dirname(found)) not in checked:
            source.check_inside(images.root / folder)
            checked.add(folder)
        yield LabelFile(images.root / found, images.is_link(found))
    if not missing:
        return
    if alone := list(_labels_alone(files, images, source)) if len(missing) < len(files) else []:
        remarks.add(
            "label files without an image",
            "label files have the name of no image and are not read",
            f"while {len(missing)} of {len(files)} images have no label file, and count as images without objects",
            alone[0],
            len(alone),
        )
    else:
        what = "are all that there are: none is where it was looked for" if len(missing) == len(files) else "are taken to show no object"
        remarks.add("images without labels", "images without a label file", what, _label_of(missing[0]), len(missing))


def _labels_alone(files: list[str], images: Listings, source: DataFolder) -> Iterator[str]:
    """The label files, in folders of such for these images, that belong to no image: one of the two may have been renamed."""
    folders = {os.path.dirname(_label_of(file)): os.path.dirname(file) for file in files}
    for folder, pictures in folders.items():
        if source.way_out(images.root / folder):
            continue
        known = {os.path.splitext(name)[0] + ".txt" for name in images.names_in(pictures) if is_image(name)}
        for name in sorted({name for name in images.names_in(folder) if name.lower().endswith(".txt")} - known):
            if not is_hidden(name) and A_LABEL.fullmatch(_first_line(images.root / folder / name)):
                yield os.path.join(folder, name)
