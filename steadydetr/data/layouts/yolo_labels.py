"""The label files of YOLO, read many at a time: a line is a class and a box, in shares of the image's size, or what has a box around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steadydetr.data.columns import Lists, offsets_of
from steadydetr.data.folder import DataFolder
from steadydetr.data.layouts.base import Report, fault
from steadydetr.data.layouts.common import BOXED, Remarks
from steadydetr.data.masks import FARTHEST, Masks, outline_length
from steadydetr.data.reading import decode_text, read_file
from steadydetr.files import printable
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILES = 2000  # that are parsed together
LOW, HIGH = -1.0, 2.0  # what lies beyond is no share of an image, however far a box reaches out (D-127)


@dataclass(frozen=True)
class LabelFile:
    path: Path
    may_leave: bool  # its path must be followed to know whether it lies in the data folder


@dataclass(frozen=True)
class Labels:
    """The boxes of I images, sorted by image; `counts` [I] says how many each has."""

    counts: NDArray[np.int64]
    classes: NDArray[np.int32]  # [A]
    boxes: NDArray[np.float32]  # [A, 4] xyxy in pixels
    masks: Masks | None = None  # of all A, where they were asked for; a line that is no polygon has none


def read_labels(
    files: Sequence[LabelFile | None],
    sizes: NDArray[np.int64],
    classes: int,
    keypoints: int,
    source: DataFolder,
    report: Report,
    remarks: Remarks,
    masks: bool = False,
) -> Labels:
    """Read a label file for each image, or None for an image without one.

    Args:
        sizes: [I, 2] (h, w) of the images in pixels.
        classes: how many there are.
        keypoints: numbers after a box that are its keypoints.
        report: takes what is wrong with a line, which is then left out: of each file the first line, and how many more.
        remarks: takes what is made of lines that are no boxes.
        masks: whether polygons are kept as masks.
    """
    parts = list[Labels]()
    for start in range(0, len(files), FILES):
        some = files[start : start + FILES]
        of_masks = sizes[start : start + FILES] if masks else None
        image, labels, boxes, polygons = _parse(some, classes, keypoints, source, report, remarks, of_masks)
        if (repeated := _repeated(image, labels, boxes)).any():
            first = some[image[repeated][0]]
            what, where = "lines that repeat another of their file", str(first and first.path)
            remarks.add("repeated lines", what, "are left out", where, int(repeated.sum()))
            image, labels, boxes = image[~repeated], labels[~repeated], boxes[~repeated]
            polygons = polygons.take(np.flatnonzero(~repeated))
        pixels = boxes * sizes[start + image][:, [1, 0, 1, 0]]
        found = Masks.of_polygons(polygons) if masks else None
        parts.append(Labels(np.bincount(image, minlength=len(some)), labels.astype(np.int32), pixels.astype(np.float32), found))
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("counts", "classes", "boxes")}
    of_parts = [part.masks for part in parts if part.masks is not None]
    return Labels(**columns, masks=of_parts[0].joined(of_parts[1:]) if of_parts else None)


def _parse(
    files: Sequence[LabelFile | None],
    classes: int,
    keypoints: int,
    source: DataFolder,
    report: Report,
    remarks: Remarks,
    sizes: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], Lists]:
    """Position of the image, class, box in shares of the image, and polygon in pixels, of every line that can be used.

    Args:
        sizes: [files, 2] (h, w) of the images in pixels, where polygons are wanted; else there are none.
    """
    texts = [_read(file, source, report) for file in files]
    try:
        values, columns = _numbers(texts)
    except ValueError:
        texts = [_without_words(file, text, report) for file, text in zip(files, texts, strict=True)]
        values, columns = _numbers(texts)
    file_of_line = np.repeat(np.arange(len(files)), [text.count(b"\n") + 1 for text in texts])
    first_line = np.searchsorted(file_of_line, file_of_line)
    first_value = np.cumsum(columns) - columns
    labels, boxes = np.zeros(len(columns)), np.zeros((len(columns), 4))
    wrong = np.full(len(columns), "", dtype=object)  # what is wrong with a line
    corners = np.zeros(len(columns), np.int64)  # how many numbers of a line are its polygon

    def place(line: int) -> str:
        file = files[file_of_line[line]]
        return f"{file and file.path}, line {line - first_line[line] + 1}"

    for width in np.unique(columns[columns > 0]).tolist():
        lines = np.flatnonzero(columns == width)
        rows = values[first_value[lines, None] + np.arange(width)]
        labels[lines] = rows[:, 0]
        wrong[lines] = _wrong(rows, classes)
        what, made, boxes[lines] = _to_boxes(rows, keypoints)
        if what == "":
            wrong[lines] = f"has {width} columns: a line is class x y width height, or class x1 y1 x2 y2 x3 y3 ..."
        elif sizes is not None and (numbers := _numbers_of_polygon(width, keypoints)):
            corners[lines] = numbers
            wrong[lines[_too_long(rows[:, 1 : 1 + numbers], sizes[file_of_line[lines]])]] = f"is a polygon of more than {FARTHEST} pixels"
        elif made:
            remarks.add(BOXED, what, made, place(int(lines[0])), len(lines))
    for file in np.unique(file_of_line[wrong != ""]).tolist():
        lines = np.flatnonzero((file_of_line == file) & (wrong != ""))
        more = f"; and {len(lines) - 1} more lines are wrong" if len(lines) > 1 else ""
        _report_line(files[file], int(lines[0] - first_line[lines[0]]) + 1, f"{wrong[lines[0]]}{more}", report)
    used = np.flatnonzero((columns > 0) & (wrong == ""))
    of_image = np.ones((len(used), 2), np.int64) if sizes is None else sizes[file_of_line[used]]
    polygons = _polygons(values, first_value[used] + 1, corners[used], of_image)
    return file_of_line[used], labels[used].astype(np.int64), boxes[used], polygons


def _polygons(values: NDArray[np.float64], first: NDArray[np.int64], counts: NDArray[np.int64], sizes: NDArray[np.int64]) -> Lists:
    """The polygon of every line in pixels, of the `counts` numbers from `first` on; sizes [lines, 2] (h, w) are those of the images."""
    within, line = _counted_up(counts), np.repeat(np.arange(len(counts)), counts)
    return Lists(values[first[line] + within] * sizes[line, 1 - within % 2], offsets_of(counts))


def _counted_up(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ..., count - 1 for every count."""
    starts = offsets_of(counts)
    return np.arange(starts[-1]) - np.repeat(starts[:-1], counts)


def _to_boxes(rows: NDArray[np.float64], keypoints: int) -> tuple[str, str, NDArray[np.float64]]:
    """What lines of so many columns are, what is made of them if they are no boxes, and the boxes xyxy. Unknown: ""."""
    width = rows.shape[1]
    if keypoints and width == 5 + keypoints:
        return "boxes with keypoints", "are read without these", _corners(rows[:, 1:5])
    if width in (5, 6):
        made = "are taken as boxes, without regard to it" if width == 6 else ""
        return "lines with a sixth column, a confidence" if made else "boxes", made, _corners(rows[:, 1:5])
    if width < 5:
        return "", "", np.zeros((len(rows), 4))
    points = rows[:, 1 : 1 + _numbers_of_polygon(width, keypoints)].reshape(len(rows), -1, 2)
    kind = "oriented boxes or polygons of four corners" if points.shape[1] == 4 else "polygons"
    return kind, "are taken as the boxes around them", np.concatenate((points.min(1), points.max(1)), 1)


def _numbers_of_polygon(width: int, keypoints: int) -> int:
    """How many numbers of a line of so many columns are a polygon, after the class; 0 where it is a box, or nothing."""
    if width < 7 or (keypoints and width == 5 + keypoints):
        return 0
    return width - 1 - (width + 1) % 2  # an even number of columns ends with a confidence


def _too_long(shares: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n] whether the polygons [n, numbers] are too large in images of these sizes [n, 2] (h, w) to be filled in little memory."""
    corners = shares.reshape(len(shares), -1, 2) * sizes[:, None, ::-1]
    too_long: NDArray[np.bool_] = (outline_length(corners) > FARTHEST) | (np.abs(corners) >= FARTHEST).any((1, 2))
    return too_long


def _corners(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(centre, size) -> xyxy."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate((centre - half, centre + half), 1)


def _wrong(rows: NDArray[np.float64], classes: int) -> NDArray[np.object_]:
    """What is wrong with the numbers of each line; empty where nothing is."""
    found = np.full(len(rows), "", dtype=object)
    with np.errstate(invalid="ignore"):
        no_share = ~((rows[:, 1:] >= LOW) & (rows[:, 1:] <= HIGH))
        no_class = ~((rows[:, 0] >= 0) & (rows[:, 0] < classes) & (rows[:, 0] == np.floor(rows[:, 0])))
    for row in np.flatnonzero(no_share.any(1)).tolist():
        value = rows[row, 1:][no_share[row]][0]
        found[row] = f"has {value:g} among its coordinates, which are shares of the image's width and height, 0 to 1"
    for row in np.flatnonzero(no_class).tolist():
        advice = ". If these labels count from 1, put a name that is not used before the others" if rows[row, 0] == classes else ""
        found[row] = f"has the class {rows[row, 0]:g}, but the classes are 0 to {classes - 1}{advice}"
    return found


def _numbers(texts: Sequence[bytes]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All numbers of the texts, and how many each line has. ValueError where a word is no number."""
    whole = b"\n".join(texts)
    words = whole.split()
    characters = np.frombuffer(whole, np.uint8)
    blank = np.isin(characters, np.frombuffer(b" \t\n\r\v\f", np.uint8))
    begins = ~blank & np.concatenate(([True], blank[:-1]))[: len(blank)]
    line_of_word = np.cumsum(characters == ord("\n"))[begins]
    columns = np.bincount(line_of_word, minlength=whole.count(b"\n") + 1)
    return np.fromiter(map(float, words), np.float64, len(words)), columns


def _read(file: LabelFile | None, source: DataFolder, report: Report) -> bytes:
    """The text of a label file with line feeds alone; empty where there is none, or none that can be read."""
    if file is None:
        return b""
    try:
        most = source.limits.max_file_mb
        data = source.read_entry(file.path) if file.may_leave else read_file(file.path, most, "max_file_mb")
        if not data.isascii() or b"\0" in data:
            data = decode_text(data, file.path).lstrip("\ufeff").encode()
    except (ValueError, FileNotFoundError) as error:
        report(fault("unreadable label file", file.path, "", str(error)))
        return b""
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _without_words(file: LabelFile | None, text: bytes, report: Report) -> bytes:
    """The text with empty lines in place of those that hold a word which is no number; the first of these is reported."""
    lines, wrong = text.split(b"\n"), dict[int, str]()
    for number, line in enumerate(lines):
        if word := next(_words(line), ""):
            lines[number], wrong[number] = b"", word
    if wrong:
        number, word = next(iter(wrong.items()))
        comma = ": write a point in place of the comma" if _is_number(word.replace(",", ".")) else ", which is no number"
        more = f"; and {len(wrong) - 1} more lines are wrong" if len(wrong) > 1 else ""
        _report_line(file, number + 1, f"has {printable(word)[:80]!r}{comma}{more}", report)
    return b"\n".join(lines)


def _words(line: bytes) -> Iterator[str]:
    """The words of a line that are no numbers."""
    yield from (word.decode("utf-8", "replace") for word in line.split() if not _is_number(word))


def _is_number(word: str | bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _report_line(file: LabelFile | None, number: int, message: str, report: Report) -> None:
    report(fault("unusable label", file and file.path, f"line {number}", f"it {message}"))


def _repeated(image: NDArray[np.int64], labels: NDArray[np.int64], boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[A] whether an earlier line of the same image has the same class and box."""
    keys = (*boxes.T, labels, image)
    order = np.lexsort(keys)  # stable: of equal ones the earlier first
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for key in keys:
        same &= np.diff(key[order]) == 0
    repeated = np.zeros(len(order), dtype=bool)
    repeated[order[1:][same]] = True
    return repeated
