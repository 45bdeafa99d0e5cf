"""A place without a split to validate on, divided into images to train and to validate on. The division is saved with the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from steadydetr.data.dataset import Dataset, take_images
from steadydetr.data.hold_out import HoldOut
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts import ALL
from steadydetr.files import counted, listed, printable
from steadydetr.lazy import np

FEW = 10  # images to validate on, below which AP tells little


@dataclass(frozen=True)
class Division:
    """Which images of a place, by their file names, are trained and validated on."""

    place: str
    split: str  # of the place, which is divided
    train: tuple[str, ...]
    val: tuple[str, ...]

    @staticmethod
    def of(place: str, split: str, whole: Dataset, hold_out: HoldOut) -> Division:
        """The division of a place. Raises ValueError where it has too few images; names it."""
        try:
            held = hold_out.choose(whole.index)
        except ValueError as error:
            raise ValueError(
                f"{printable(place)} brings no split to validate on, and {error}. Add images, or name others to validate on:"
                " --data.val-source, or --data.val-split"
            ) from None
        names = [whole.index.file(position) for position in range(len(whole.index))]
        train, val = (tuple(name for name, is_val in zip(names, held.tolist(), strict=True) if is_val is want) for want in (False, True))
        return Division(place, split, train, val)

    def part(self, whole: Dataset, role: Literal["train", "val"]) -> Dataset:
        """The images of the divided split that are trained or validated on."""
        wanted = set(getattr(self, role))
        positions = [position for position in range(len(whole.index)) if whole.index.file(position) in wanted]
        return take_images(whole, np.array(positions, dtype=np.int64), f"{whole.name.removesuffix(f'-{self.split}')}-{role}")

    def unknown(self, index: AnnotationIndex) -> list[str]:
        """The images that were not there when the place was divided."""
        known = {*self.train, *self.val}
        return [name for position in range(len(index)) if (name := index.file(position)) not in known]

    def sentences(self, train: AnnotationIndex, val: AnnotationIndex, hold_out: HoldOut) -> list[str]:
        """What was held out, and of which classes there is nothing on one side."""
        total, held = len(train) + len(val), len(val)
        why = "is not split" if self.split == ALL else f"has no split to validate on beside {printable(self.split)}"
        few = ". AP on so few tells little: a larger --data.val-share holds out more" if held < FEW else ""
        found = [
            f"{printable(self.place)} {why}: {held} of its {counted(total, 'image')} ({held / total:.0%}) are held out to validate on,"
            f" chosen by name and class (--data.val-share {hold_out.val_share:g}, --data.val-seed {hold_out.val_seed}){few}"
        ]
        for here, other, what in ((train, val, "to validate on"), (val, train, "to train on")):
            if missing := classes_only_in(here, other):
                found.append(
                    f"{printable(self.place)}: too few images show {listed(map(printable, missing), 10)}: none of them is left {what}"
                )
        return found


def classes_only_in(here: AnnotationIndex, other: AnnotationIndex) -> list[str]:
    """The classes that have objects here and none in the other index."""
    there = [set(np.unique(index.labels[~index.crowd]).tolist()) for index in (here, other)]
    return [here.classes[label] for label in sorted(there[0] - there[1])]


def saved_division(divisions: Sequence[Division], place: str, index: AnnotationIndex) -> Division | None:
    """The saved division of a place, which may have been moved since: that of its name, or else one that knows any of its images."""
    if not divisions:
        return None
    names = {index.file(position) for position in range(len(index))}
    candidates = sorted(divisions, key=lambda division: division.place != place)
    return next((division for division in candidates if not names.isdisjoint((*division.train, *division.val))), None)
