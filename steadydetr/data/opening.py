"""Opens the data set that `--data` names, whose layout is recognised from the files that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from steadydetr.data.config import DataConfig
from steadydetr.data.dataset import Dataset, join_data
from steadydetr.data.division import Division, saved_division
from steadydetr.data.hold_out import DEFAULT_HOLD_OUT, HoldOut
from steadydetr.data.layouts import ALL, DataLayout, Finding, NoMasks, NoSplit, Report, joined_places, layout_of, stop
from steadydetr.files import counted, printable
from steadydetr.limits import DEFAULT_LIMITS, Limits

MOST_SAID = 5  # remarks of one kind
BOXES_ALONE = "To train on boxes alone: --data.no-masks, and of MaskDINO --criterion.masks none --detector.box-init no too"


class Splits(NamedTuple):
    """What is trained on and what is validated on, as they are in the data, and how places that are not split were divided for that."""

    train: Dataset
    val: Dataset
    divisions: list[Division]


def open_data(
    where: str | Path,
    split: str = "train",
    limits: Limits = DEFAULT_LIMITS,
    say: Callable[[str], None] | None = None,
    hold_out: HoldOut = DEFAULT_HOLD_OUT,
    divisions: Sequence[Division] = (),
    masks: bool = False,
) -> Dataset:
    """The data set behind a folder or the word `shapes`.

    Args:
        where: a folder or file of a layout that is known (docs/data.md), or that a plugin brings; `shapes[:option=value,...]`; several
            joined by `+`.
        split: train, val, test or the name of any split that the place has; `all` where it is not split. Where it is not, train and val
            are what `hold_out` makes of it; where only val is missing, val is what it holds out of train.
        limits: what may be read: whether files outside the folder, and how large.
        say: is told what is remarkable about the annotations, such as polygons of which the boxes are taken.
        hold_out: how a place is divided where it has to be.
        divisions: those of a run, which then count instead, also for the split that they divide.
        masks: read the masks of objects too; `index.decode_masks(position)` gives those of an image.

    Raises:
        ValueError: the layout is not recognised, has no such split or no masks; says what was looked for and what is there.
    """
    opener, parts = _Opener(telling(say) if say else stop, say, hold_out, divisions), list[Dataset]()
    for place in joined_places(where):
        parts.append(opener.one(layout_of(place, limits, masks), place, split))
    return _joined(parts)


def open_train_and_val(
    data: DataConfig, report: Report = stop, say: Callable[[str], None] | None = None, divisions: Sequence[Division] | None = None
) -> Splits:
    """The images to train on and those to validate on.

    Args:
        report: takes what is wrong or remarkable with entries.
        say: is told how places were divided.
        divisions: those of a run that goes on, since which no image may have been added; None: of no run.

    Raises:
        ValueError: as `open_data`.
    """
    opener = _Opener(report, say, data, divisions or (), goes_on=divisions is not None)
    train, val, made = list[Dataset](), list[Dataset](), list[Division]()
    for place in joined_places(data.source):
        layout = layout_to_train_on(place, data, data.masks)
        if data.val_source:
            train.append(opener.whole(layout, place, data.train_split)[0])
        else:
            both = opener.both(layout, place, data.train_split, data.val_split)
            train.append(both.train)
            val.append(both.val)
            made += both.divisions
    for place in joined_places(data.val_source) if data.val_source else ():
        val.append(opener.whole(layout_to_train_on(place, data, data.masks), place, data.val_split)[0])
    return Splits(_joined(train), _joined(val), made)


def layout_to_train_on(place: str, limits: Limits, masks: bool) -> DataLayout:
    """The layout of a place; where it has no masks and they are wanted, the error says how to train without them."""
    try:
        return layout_of(place, limits, masks)
    except NoMasks as error:
        raise NoMasks(f"{error}. {BOXES_ALONE}") from error


@dataclass(frozen=True)
class _Opener:
    """Opens places, and divides those that have to be."""

    report: Report
    say: Callable[[str], None] | None
    hold_out: HoldOut
    saved: Sequence[Division]  # of a run
    goes_on: bool = False  # whether that run goes on

    def one(self, layout: DataLayout, place: str, split: str) -> Dataset:
        """A split of a place, or the part of it that would be trained or validated on where there is no such split."""
        try:
            found = layout.inspect(place, split, self.report)
        except NoSplit:
            if split not in ("train", "val"):
                raise
            both = self.divided(place, *self.whole(layout, place, "train"))
            return both.train if split == "train" else both.val
        division = saved_division(self.saved, place, found.index)
        return division.part(found, "train") if division and division.split == split != ALL else found

    def both(self, layout: DataLayout, place: str, train_split: str, val_split: str) -> Splits:
        """Both splits of a place, of which the first is divided if there is none to validate on and nobody has named one."""
        train, split = self.whole(layout, place, train_split)
        try:
            return Splits(train, layout.inspect(place, val_split, self.report), [])
        except NoSplit:
            if val_split != "val":
                raise
        return self.divided(place, train, split)

    def divided(self, place: str, whole: Dataset, split: str) -> Splits:
        division = saved_division(self.saved, place, whole.index) or Division.of(place, split, whole, self.hold_out)
        train, val = division.part(whole, "train"), division.part(whole, "val")
        new = division.unknown(whole.index)
        if new and self.goes_on:
            raise ValueError(
                f"{printable(place)} has {counted(len(new), 'image')} more than when the run began, the first is {printable(new[0])}: a run"
                " that goes on keeps its images. Take them out again, or start a new run from its weights: --from"
            )
        sentences = division.sentences(train.index, val.index, self.hold_out)
        if new:
            sentences.append(
                f"{printable(place)}: {counted(len(new), 'image')} that the run did not know are left out, as {printable(new[0])}"
            )
        if self.say:
            for sentence in sentences:
                self.say(sentence)
        return Splits(train, val, [division])

    def whole(self, layout: DataLayout, place: str, split: str) -> tuple[Dataset, str]:
        """A split, or all images of a place that is not split; with what it is called there."""
        try:
            return layout.inspect(place, split, self.report), split
        except NoSplit as error:
            if split not in ("train", "val"):
                raise
            try:
                return layout.inspect(place, ALL, self.report), ALL
            except NoSplit:
                raise error from None


def _joined(parts: list[Dataset]) -> Dataset:
    return parts[0] if len(parts) == 1 else join_data(parts)


def telling(say: Callable[[str], None]) -> Report:
    """The report of a reader that stops at a fault, and says the first remarks of each kind."""
    told = Counter[str]()

    def report(finding: Finding) -> None:
        stop(finding)
        told[finding.kind] += 1
        if told[finding.kind] <= MOST_SAID:
            more = ". Further ones are not named; `steadydetr check` names all" if told[finding.kind] == MOST_SAID else ""
            say(f"{finding.kind}: {finding}{more}")

    return report
