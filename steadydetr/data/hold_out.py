"""Which images of a data set without splits are held out to validate on: a function of their names, their classes and a seed alone.

Every image belongs to a family: what is by its name the same picture in several versions. Families are never divided. A family's place in
the order of choice is a hash of its name, so neither the order of the files nor what else there is changes it: where images are added, at
the border alone some others change sides (D-141).

I images, F families in the order of their hashes, C classes; class C is that of images without objects.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.data.index import AnnotationIndex
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_FAMILY = 10  # images of one name in other folders or with other numbers in parentheses; more are taken for different pictures
ROBOFLOW = re.compile(r"[_.](?:jpe?g|png|bmp|webp|tiff?|gif)\.rf\.[0-9a-z]+$", re.IGNORECASE)  # NAME_jpg.rf.HASH, a version of NAME.jpg
COPY = re.compile(r" - copy(?: \(\d+\))?$| copy(?: \d+)?$| \((?:another |\d+\w\w )?copy\)$", re.IGNORECASE)  # of Windows, macOS, GNOME
NUMBERED = re.compile(r" ?\(\d+\)$")  # of browsers: NAME (1), or of Windows for the files of a series


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """What is held out to validate on where data bring no such split."""

    val_share: float = 0.1  # of the images of a place that brings no split to validate on, which are then held out of those to train on
    val_seed: int = 0  # of that choice; training.seed does not change it
    val_group: str = ""  # regular expression: images in whose names it matches the same text stay together; see docs/data.md

    def __post_init__(self) -> None:
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share = {self.val_share} must be a share of the images, above 0 and below 1")
        try:
            re.compile(self.val_group)
        except re.error as error:
            raise ValueError(f"val_group = {self.val_group!r:.80} is no regular expression: {error}") from None

    def choose(self, index: AnnotationIndex) -> NDArray[np.bool_]:
        """[I] whether an image is held out.

        Raises:
            ValueError: there is a single image, or all of them are one group.
        """
        names = [index.file(position) for position in range(len(index))]
        keys = families(names, self.val_group)
        if len(set(keys)) < 2 and not self.val_group:
            keys = [_plain(name) for name in names]
        if len(set(keys)) < 2:
            why = f"--data.val-group {self.val_group} puts them into one group" if self.val_group else "there is one"
            raise ValueError(f"its images cannot be divided into some to train and some to validate on: {why}")
        hashes = {key: hashlib.blake2b(f"{self.val_seed} {key}".encode(), digest_size=8).digest() for key in set(keys)}
        rank = {key: number for number, key in enumerate(sorted(hashes, key=lambda key: (hashes[key], key)))}
        family = np.fromiter((rank[key] for key in keys), np.int64, len(keys))
        chosen: NDArray[np.bool_] = choose_families(family, index, self.val_share)[family]
        return chosen


DEFAULT_HOLD_OUT = HoldOut()


def families(names: Sequence[str], group: str = "") -> list[str]:
    """[I] the family of every image by its file name.

    Without `group` these are together: versions of one picture that Roboflow made (NAME_jpg.rf.HASH.jpg), copies (`NAME copy`,
    `NAME - Copy (2)`, ` (copy)`), and, as long as they are few, the same name in other folders or with another ending, and `NAME (1)`
    beside `NAME`. With it: what it matches in the names, by its first group if it has any; images in which it matches nothing stay alone.
    """
    plain = [_plain(name) for name in names]
    if group:
        found = [re.search(group, name) for name in plain]
        texts = [match[1 if match.re.groups else 0] if match else None for match in found]
        return [name if text is None else f"group {text}" for text, name in zip(texts, plain, strict=True)]
    parts = [name.rpartition("/") for name in plain]
    stems = [file.rpartition(".")[0] or file for _, _, file in parts]
    certain = [COPY.sub("", ROBOFLOW.sub("", stem)).casefold() for stem in stems]
    there = set(certain)
    bare = [NUMBERED.sub("", stem) for stem in certain]
    merged = [short if short in there else stem for short, stem in zip(bare, certain, strict=True)]
    versions = {(key, folder, stem) for key, (folder, _, _), stem in zip(merged, parts, certain, strict=True)}
    sizes = Counter(key for key, _, _ in versions)  # versions of one picture in a folder count as one
    pairs = zip(merged, parts, certain, strict=True)
    return [key if sizes[key] <= LARGEST_FAMILY else f"{folder}/{stem}" for key, (folder, _, _), stem in pairs]


def version_of(name: str) -> str:
    """What a version that Roboflow made is one of; empty for other names."""
    stem = _plain(name).rpartition("/")[2].rpartition(".")[0]
    bare = ROBOFLOW.sub("", stem)
    return bare.casefold() if bare != stem else ""


def _plain(name: str) -> str:
    """The name as every system writes it."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def choose_families(family: NDArray[np.int64], index: AnnotationIndex, share: float) -> NDArray[np.bool_]:
    """[F] which families are held out: iterative stratification (Sechidis et al. 2011) into two parts, over families.

    The class that is in the fewest undecided families comes first. Of these the first ones are held out until their images of the class
    have the share, and the others are not. A class keeps a family to train on; what the share is short of then comes from the first
    families of all.

    Args:
        family: [I] number of every image's family, in 0 .. F - 1.
    """
    count, classes = int(family.max()) + 1, len(index.classes) + 1
    choice = _Choice(family, _labels_by_image(index), count, classes, share)
    while (undecided := np.flatnonzero(choice.undecided_of_class)).size:
        choice.decide(int(undecided[choice.undecided_of_class[undecided].argmin()]))
    choice.fill()
    return choice.held


def _labels_by_image(index: AnnotationIndex) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every pair of an image and a class that it has, each once."""
    classes = len(index.classes) + 1
    objects = index.image_of_row * classes + index.labels
    empty = np.flatnonzero(index.counts == 0) * classes + classes - 1
    pairs, _ = np.unique(np.concatenate((objects, empty)), return_counts=True)  # with counts it sorts, which is much faster here
    return pairs // classes, pairs % classes


class _Choice:
    """The state of the choice."""

    def __init__(
        self, family: NDArray[np.int64], pairs: tuple[NDArray[np.int64], NDArray[np.int64]], count: int, classes: int, share: float
    ) -> None:
        image, label = pairs
        members, images = np.unique(label * count + family[image], return_counts=True)  # by class, then in the order of families
        self.family, self.label, self.images = members % count, members // count, images
        self.start = np.searchsorted(self.label, np.arange(classes + 1))  # where each class begins in these
        order = np.argsort(self.family, kind="stable")
        self.row, self.row_start = order, np.searchsorted(self.family[order], np.arange(count + 1))  # the same by family
        self.sizes = np.bincount(family, minlength=count)
        self.held, self.undecided = np.zeros(count, bool), np.ones(count, bool)
        self.undecided_of_class = np.bincount(self.label, minlength=classes)  # families
        self.in_training = self.undecided_of_class.copy()  # families of each class that are not held out
        self.wanted = share * np.bincount(self.label, images, minlength=classes)  # images of each class
        self.got = np.zeros(classes, np.int64)
        self.short = max(1, math.floor(share * len(family) + 0.5))  # images that are still to be held out

    def decide(self, label: int) -> None:
        """Decide on all undecided families of a class: the first ones, or else the smallest, are held out."""
        rows = np.arange(self.start[label], self.start[label + 1])
        rows = rows[self.undecided[self.family[rows]]]
        for row in rows.tolist():
            if (missing := self._missing(label)) <= 0:
                break
            if self.images[row] < 2 * missing:  # more would be further from what is wanted than none
                self._hold(int(self.family[row]))
        for row in rows[self.images[rows].argsort(kind="stable")].tolist():
            if self.got[label] or self._missing(label) <= 0:
                break
            self._hold(int(self.family[row]))
        decided = self.family[rows]
        self.undecided[decided] = False
        of_these = np.concatenate([self._rows(f) for f in decided.tolist()])
        self.undecided_of_class -= np.bincount(self.label[of_these], minlength=len(self.got))

    def _missing(self, label: int) -> int:
        """Images of a class that are still to be held out: at least one as long as the whole is short of its share, else rounded down."""
        wanted = self.wanted[label] + 1e-9
        return int((max(1, math.floor(wanted + 0.5)) if self.short > 0 else math.floor(wanted)) - self.got[label])

    def fill(self) -> None:
        """Hold out what is short of the share; at least one family."""
        for f in np.flatnonzero(~self.held).tolist() if self.short > 0 else ():
            if self.sizes[f] < 2 * self.short:
                self._hold(f)
            if self.short <= 0:
                break
        if not self.held.any():
            self.held[np.argmin(self.sizes)] = True

    def _hold(self, f: int) -> None:
        """Hold out a family, unless it is the last one of a class."""
        rows = self._rows(f)
        labels = self.label[rows]
        if (self.in_training[labels] > 1).all():
            self.held[f] = True
            self.in_training[labels] -= 1
            self.got[labels] += self.images[rows]
            self.short -= int(self.sizes[f])

    def _rows(self, f: int) -> NDArray[np.int64]:
        return self.row[self.row_start[f] : self.row_start[f + 1]]
