"""What a layout of data offers: a way in which data sets lie on disk, recognised, read and checked by one class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from steadydetr.data.dataset import Dataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.reading import expanded
from steadydetr.files import listed, printable
from steadydetr.kinds import options
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


class NoMasks(ValueError):
    """The layout of the place has no masks."""


class NoSplit(ValueError):
    """The place has no such split."""


STANDARD = ("train", "val", "test")
ALL = "all"  # the split of a place that has one set of images and says nothing of training or validation (D-129)


@dataclass(frozen=True)
class DataLayout(ABC):
    """A frozen dataclass. `--data` takes the first layout, in the order of registration, that recognises the place."""

    limits: Limits = Limits()  # what may be read; FolderDataset takes it along for the images
    masks: bool = False  # whether they are asked for, of a layout that gives them

    gives_masks: ClassVar[bool] = False
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

    def asked_for_masks(self, where: str) -> DataLayout:
        """The layout, which will read masks. Raises NoMasks where it has none; names those that have."""
        if not self.gives_masks:
            layouts: list[DataLayout] = [kind() for kind in options(DataLayout).values()]
            able = listed((layout.looked_for.partition(":")[0] for layout in layouts if layout.gives_masks), 20)
            this = self.looked_for.partition(":")[0] or type(self).__name__
            raise NoMasks(f"data {printable(where)}: masks are read of {able}; this is {this}")
        return replace(self, masks=True)

    def folder(self, where: str) -> DataFolder:
        return DataFolder(expanded(where), self.limits)


class InspectedLayout(DataLayout):
    """A layout whose reader reports every fault and goes on: opening a split is stopping at the first."""

    @abstractmethod
    def inspect(self, where: str, split: str, report: Report) -> Dataset: ...

    def open(self, where: str, split: str) -> Dataset:
        return self.inspect(where, split, stop)


def fault(kind: str, file: object, entry: str, message: str) -> Finding:
    """A finding that stops training. Names that come from files are made printable."""
    return Finding(kind, printable(file), printable(entry), printable(message), fatal=True)
