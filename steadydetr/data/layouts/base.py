"""What a layout of data offers: a way in which data sets lie on disk, recognised, read and checked by one class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from steadydetr.data.dataset import Dataset


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a data set."""

    kind: str
    file: str
    entry: str
    message: str
    fatal: bool = False  # training would stop; otherwise the entry is skipped


class DataLayout(ABC):
    """A frozen dataclass without fields. `--data` takes the first layout, in the order of registration, that recognises the place."""

    looked_for: str  # one line of the message that is shown where no layout recognises a folder: its name, and which files tell it

    @abstractmethod
    def recognises(self, where: str) -> bool:
        """Whether the place, a folder as a rule, is of this layout. It may not exist."""

    @abstractmethod
    def open(self, where: str, split: str) -> Dataset:
        """The split `split` (train, val, test or a name of the layout's own).

        Raises:
            ValueError: there is no such split, or a file cannot be read; names it, and says what there is.
        """

    def check(self, where: str, split: str) -> Iterator[Finding]:
        """What keeps a split from being opened at all, for `steadydetr check`. Boxes and images are checked for all layouts alike."""
        return iter(())
