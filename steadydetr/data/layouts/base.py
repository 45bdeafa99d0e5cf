"""What a layout of data offers: a way in which data sets lie on disk, recognised, read and checked by one class."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from steadydetr.data.dataset import Dataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.reading import expanded
from steadydetr.files import listed, printable
from steadydetr.limits import Limits


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a data set."""

    kind: str
    file: str
    entry: str
    message: str
    fatal: bool = False  # training would stop; otherwise the entry is skipped

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file if self.file not in self.message else "", self.entry, self.message) if part)


ENCODING = "encoding of a list"  # the kind of a finding which other tools stop at, and training here does not

Report = Callable[[Finding], None]  # what a reader does with a finding: stop at it, or keep it and leave out the entry


def stop(finding: Finding) -> None:
    """The report of a reader that cannot go on after a fault: raise it as a ValueError."""
    if finding.fatal:
        raise ValueError(f"{finding}. `steadydetr check` lists every finding")


class NoSplit(ValueError):
    """The place has no such split."""


ALL = "all"  # the split of a place that has one set of images and says nothing of training or validation (D-129)
STANDARD = ("train", "val", "test")
ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}  # what exports call them


def standard_split(name: str) -> str:
    """train, val or test for what exports call these (valid, Validation, val2017, ...); any other name as it is."""
    lower = re.sub(r"(19|20)\d\d$", "", name.lower())
    return ALIASES.get(lower, lower if lower in STANDARD else name)


def splits_of(names: Iterable[str]) -> tuple[str, ...]:
    """The splits of a place by the names that its files or folders give them: train, val, test first; a single other one is `all`."""
    found = list(dict.fromkeys(map(standard_split, names)))
    if len(found) == 1 and found[0] not in STANDARD:
        return (ALL,)
    return tuple(sorted(found, key=lambda name: (STANDARD.index(name) if name in STANDARD else len(STANDARD), name)))


def choose_split(place: Path, names: Iterable[str], split: str, holder: str = "it") -> str:
    """The name, among those that a place has, which means `split`.

    Args:
        holder: what the names were found in, in words.

    Raises:
        NoSplit: there is none; says what there is.
        ValueError: several of them mean it; names them.
    """
    there = list(dict.fromkeys(names))
    if split == ALL and splits_of(there) == (ALL,):
        return there[0]
    found = [name for name in there if standard_split(name) == split] or [name for name in there if name == split]
    found = found or [name for name in there if standard_split(name) == ALIASES.get(split.lower())]
    if not found and splits_of(there) == (ALL,):
        raise NoSplit(f"{printable(place)} is not split, so it has no split {split!r}: all its images are the split {ALL!r}")
    if not found:
        holds = listed(map(printable, sorted(there)), 10) or "none"
        raise NoSplit(f"{printable(place)} has no split {split!r}; {holder} holds {holds}")
    if len(found) > 1:
        both = " and ".join(map(printable, found))
        raise ValueError(f"{printable(place)} has {both}, which both could be split {split!r}: remove or rename one of them")
    return found[0]


@dataclass
class Remarks:
    """What a reader makes of entries that are no boxes, counted over a whole split, because it can be all of them."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)  # by what they are and what is made of them
    first: dict[tuple[str, str], str] = field(default_factory=dict)  # where the first of each kind is

    def add(self, what: str, made: str, where: str, count: int = 1) -> None:
        if count:
            self.counts[what, made] = self.counts.get((what, made), 0) + count
            self.first.setdefault((what, made), where)

    def tell(self, kind: str, place: object, report: Report) -> tuple[str, ...]:
        """The sentences for `train`; `check` gets the same as findings that stop nothing."""
        sentences = []
        for (what, made), count in self.counts.items():
            entry, message = f"{count} {what}", f"{made}; the first: {self.first[what, made]}"
            report(Finding(kind, printable(place), printable(entry), printable(message)))
            sentences.append(printable(f"{entry} {message}"))
        return tuple(sentences)


@dataclass(frozen=True)
class DataLayout(ABC):
    """A frozen dataclass. `--data` takes the first layout, in the order of registration, that recognises the place."""

    limits: Limits = Limits()  # what may be read; FolderDataset takes it along for the images

    # one line of the message that is shown where no layout recognises a folder: the layout's name, and which files tell it
    looked_for: ClassVar[str]

    @abstractmethod
    def recognises(self, where: str) -> bool:
        """Whether the place, a folder as a rule, is of this layout. It may not exist."""

    @abstractmethod
    def open(self, where: str, split: str) -> Dataset:
        """The split `split` (train, val, test or a name of the layout's own).

        Raises:
            NoSplit: there is no such split; says what there is.
            ValueError: a file cannot be read; names it.
        """

    def splits(self, where: str) -> tuple[str, ...]:
        """The splits that are there: train, val, test, others by their own names, and only `all` where a place is not split."""
        return STANDARD  # of a layout that does not say: `open` tells which of these are missing

    def check(self, where: str, split: str) -> Iterator[Finding]:
        """What keeps a split from being opened at all, for `steadydetr check`. Boxes and images are checked for all layouts alike."""
        return iter(())

    def inspect(self, where: str, split: str, report: Report) -> Dataset:
        """The split without the entries that keep it from being opened, each of which is reported. Raises what `open` raises."""
        for finding in self.check(where, split):
            report(finding)
        return self.open(where, split)

    def folder(self, where: str) -> DataFolder:
        return DataFolder(expanded(where), self.limits)


def fault(kind: str, file: object, entry: str, message: str) -> Finding:
    """A finding that stops training. Names that come from files are made printable."""
    return Finding(kind, printable(file), printable(entry), printable(message), fatal=True)
