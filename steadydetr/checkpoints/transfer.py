"""The weights of a trained detector in another one: of other classes, which go by name, queries, feature levels and stages.

Which tensors have a row for every class, query or level is not listed anywhere: those whose shape grows when the detector is built, without
values, with one more of them. So this holds for detectors of other packages too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steadydetr.checkpoints.weights import TrainedWeights
from steadydetr.detectors import Detector, DetectorConfig
from steadydetr.files import listed, printable
from steadydetr.finite import where_not_finite
from steadydetr.kinds import nearest

Pairs = list[tuple[int, int]]  # of a row here and the row there that it takes its values from
LEVEL_LISTS = ("neck.convs", "neck.norms")  # lists of modules with one for each level
STAGE_LISTS = ("encoder.layers", "decoder.layers", "decoder.class_heads", "decoder.box_heads")  # and for each stage


@dataclass(frozen=True)
class ClassMatch:
    """Which classes of the data a trained detector knows."""

    pairs: Pairs  # label here, label there
    kept: dict[str, str]  # by our name, theirs
    started: tuple[str, ...]  # ours that it does not know
    dropped: tuple[str, ...]  # theirs that are not ours


@dataclass(frozen=True)
class Transfer:
    """What was taken from a trained detector, and what was not."""

    classes: ClassMatch
    remarks: list[str] = field(default_factory=list)  # on queries, levels, stages and single tensors
    started: list[str] = field(default_factory=list)  # tensors that start anew, as was allowed
    dropped: list[str] = field(default_factory=list)  # tensors that are left out, as was allowed

    def sentences(self) -> Iterator[str]:
        """For the user."""
        classes = self.classes
        total = len(classes.pairs) + len(classes.started)
        sentence = f"{len(classes.pairs)} of {total} classes have weights"
        for names, what in ((classes.started, "start anew"), (classes.dropped, "of the weights are dropped")):
            sentence += f"; {len(names)} {what}: {printable(listed(names, 12))}" if names else ""
        yield sentence
        yield from self.remarks
        for tensors, what in ((self.started, "start anew"), (self.dropped, "are left out")):
            if tensors:
                yield f"{len(tensors)} tensors {what}, as was allowed: {printable(listed(sorted(tensors), 6))}"

    def as_plain(self) -> dict[str, Any]:
        """As JSON values."""
        classes = {name: getattr(self.classes, name) for name in ("kept", "started", "dropped")}
        return {"classes": classes, "remarks": self.remarks, "tensors_started": self.started, "tensors_dropped": self.dropped}


def folded(name: str) -> str:
    """A class name without case, spaces, hyphens and underscores: "Traffic_Light" and "traffic light" are one."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def match_classes(theirs: Sequence[str], ours: Sequence[str], renamed: Sequence[str] = ()) -> ClassMatch:
    """Match classes by their names, equal ones first, then those that are equal when folded.

    Args:
        theirs: of the trained detector, in the order of its logits.
        ours: of the data.
        renamed: "theirs=ours", for those that are named otherwise.

    Raises:
        ValueError: a word of `renamed` names no class, or several classes of the one are equal to one of the other; says which.
    """
    given = dict(_renames(theirs, ours, renamed))
    there = {name: label for name, label in _by_name(theirs, ours).items() if label not in given.values()} | given
    pairs = [(label, there[name]) for label, name in enumerate(ours) if name in there]
    used = {label for _, label in pairs}
    if len(used) < len(pairs):
        doubled = [ours[label] for label, other in pairs if [old for _, old in pairs].count(other) > 1]
        raise ValueError(
            f"the classes {listed(doubled)} of the data are one class of the weights: say which it is, by --classes theirs=ours"
        )
    return ClassMatch(
        pairs,
        {ours[label]: theirs[other] for label, other in pairs},
        tuple(name for name in ours if name not in there),
        tuple(name for label, name in enumerate(theirs) if label not in used),
    )


def _by_name(theirs: Sequence[str], ours: Sequence[str]) -> dict[str, int]:
    """The label there, for each of our names that is known there."""
    exact = {name: label for label, name in enumerate(theirs)}
    alike: dict[str, list[int]] = {}
    for name, label in exact.items():
        alike.setdefault(folded(name), []).append(label)
    found = {}
    for name in ours:
        close = [exact[name]] if name in exact else alike.get(folded(name), [])
        if len(close) > 1:
            names = listed(theirs[label] for label in close)
            raise ValueError(f"class {name!r} of the data may be any of {names} of the weights: say which, by --classes theirs=ours")
        if close and (name in exact or theirs[close[0]] not in ours):
            found[name] = close[0]
    return found


def _renames(theirs: Sequence[str], ours: Sequence[str], renamed: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Our name and the label there of every "theirs=ours"; a name may hold the sign itself."""
    for word in renamed:
        cuts = [(word[: sign.start()].strip(), word[sign.end() :].strip()) for sign in re.finditer("=", word)]
        if not cuts:
            raise ValueError(f"--classes {word}: give the name in the weights and the name in the data, as in --classes automobile=car")
        known = [(old, new) for old, new in cuts if old in theirs and new in ours]
        if not known:
            old, new = cuts[0]
            wrong = f"the weights have no class {old!r}{nearest(old, theirs)}"
            raise ValueError(f"--classes {word}: {wrong if old not in theirs else f'the data have no class {new!r}{nearest(new, ours)}'}")
        yield known[0][1], theirs.index(known[0][0])


@dataclass(frozen=True)
class Rows:
    """The dimension of a tensor that has rows, and how those of another tensor go into them."""

    dim: int
    blocks: int  # the dimension is blocks x rows x the rest
    here: int
    there: int
    pairs: Pairs

    def fill(self, target: Tensor, value: Tensor) -> Tensor:
        """The target with those rows of the value; ValueError where the other dimensions differ."""
        filled = target.clone().movedim(self.dim, 0).unflatten(0, (self.blocks, self.here, -1))
        source = value.movedim(self.dim, 0).unflatten(0, (self.blocks, self.there, -1))
        if filled.shape[0] != source.shape[0] or filled.shape[2:] != source.shape[2:]:
            raise ValueError("other dimensions differ")
        for row, other in self.pairs:
            filled[:, row] = source[:, other]
        return filled.flatten(0, 2).movedim(0, self.dim)


def transfer(
    detector: Detector,
    config: DetectorConfig,
    classes: Sequence[str],
    weights: TrainedWeights,
    renamed: Sequence[str] = (),
    by_name: bool = True,
    partial: Sequence[str] = (),
) -> Transfer:
    """Give a detector that was just built, of this config and for these classes, the weights of a trained one.

    Args:
        renamed: see `match_classes`.
        by_name: False: every class starts anew.
        partial: names of modules or tensors that may start anew, or be left out, where they do not fit.

    Raises:
        ValueError: tensors are missing, left over or of other shapes, and are not named in `partial`; lists them.
    """
    there = weights.card
    match = match_classes(there.classes if by_name else (), classes, renamed)
    found = Transfer(match if by_name else replace(match, dropped=there.classes))
    sides = Sides(detector, config, untrained(there.detector, len(there.classes)), there.detector)
    rows = {name: each for what in (class_rows, query_rows, level_rows) for name, each in what(sides, match, found.remarks).items()}
    source = named_as_here(sides, weights.state, found.remarks)
    target, taken, wrong = detector.state_dict(), dict[str, Tensor](), dict[str, str]()
    for name, value in target.items():
        if name not in source:
            if not name.endswith("num_batches_tracked") and not sides.is_new_level(name):
                wrong[name] = f"{name} is missing"
        elif (fitting := fit(value, source[name], rows.get(name))) is not None:
            taken[name] = fitting
        else:
            wrong[name] = f"{name} is {list(source[name].shape)} there and {list(value.shape)} here"
    wrong |= {name: f"{name} is left over" for name in source.keys() - target.keys()}
    for name in [name for name in wrong if any(name == part or name.startswith(f"{part}.") for part in partial)]:
        (found.started if name in target else found.dropped).append(name)
        del wrong[name]
    if wrong:
        problems = printable(listed(sorted(wrong.values()), 10))
        raise ValueError(
            f"{weights.where} does not fit {detector.architecture} as it is configured here: {problems}."
            " Take the detector of the weights (`steadydetr finetune`), or allow these to start anew or to be left out: --allow-partial"
            f" {' '.join(sorted({part_of(name) for name in wrong})[:8])}"
        )
    if not_finite := where_not_finite(taken):
        raise ValueError(f"{weights.where} is of no use: {not_finite} hold NaN or infinite values")
    detector.load_state_dict(taken, strict=False)
    return found


def fit(target: Tensor, value: Tensor, rows: Rows | None) -> Tensor | None:
    """The value as the target takes it, whose further rows stay as they are; None if it does not fit."""
    if rows is None:
        return value if value.shape == target.shape else None
    try:
        return rows.fill(target, value)
    except (ValueError, RuntimeError):  # as torch does where a dimension is no multiple of the rows
        return None


def part_of(name: str) -> str:
    """What --allow-partial would call the part of a tensor: its first name, and with it the number in a list."""
    first, *rest = name.split(".")
    return ".".join([first, *rest[:2]]) if first in ("encoder", "decoder", "neck") else first


def untrained(config: DetectorConfig, num_classes: int) -> Detector:
    """The detector without values, so that it takes no memory."""
    with torch.device("meta"):
        return config.without_pretrained().build(num_classes)


def grown(before: Detector, after: Detector) -> dict[str, tuple[int, int]]:
    """The tensors that are larger in another detector: in which dimension, by how much."""
    found, larger = {}, after.state_dict()
    for name, tensor in before.state_dict().items():
        pairs = zip(tensor.shape, larger[name].shape, strict=True)
        sides = [(dim, more - side) for dim, (side, more) in enumerate(pairs) if side != more]
        if sides:
            found[name] = sides[0]
    return found


@dataclass(frozen=True)
class Sides:
    """The detector that is to be trained, and the trained one without its values."""

    here: Detector
    config: DetectorConfig
    there: Detector
    config_there: DetectorConfig

    def option(self, name: str) -> tuple[Any, Any]:
        """The value of a field of both configs, or of their transformers; None where there is no such field."""
        here, there = (
            getattr(config, name, getattr(getattr(config, "transformer", None), name, None)) for config in (self.config, self.config_there)
        )
        return here, there

    def with_one_more(self, name: str) -> Detector:
        """The detector here with one more of what a field of its config, or of its transformer, counts."""
        if hasattr(self.config, name):
            changed = self.config.changed(**{name: getattr(self.config, name) + 1})
        else:
            transformer = self.config.transformer  # type: ignore[attr-defined]
            changed = self.config.changed(transformer=replace(transformer, **{name: getattr(transformer, name) + 1}))
        return untrained(changed, self.here.num_classes)

    @property
    def levels(self) -> Pairs:
        """The levels of the same stride."""
        return [(i, j) for i, stride in enumerate(self.here.strides) for j, other in enumerate(self.there.strides) if stride == other]

    def is_new_level(self, name: str) -> bool:
        """Whether a tensor is one of the neck for a level that is not there."""
        numbered = re.match(rf"({'|'.join(map(re.escape, LEVEL_LISTS))})\.(\d+)\.", name)
        return numbered is not None and int(numbered[2]) not in dict(self.levels)


def class_rows(sides: Sides, match: ClassMatch, remarks: list[str]) -> dict[str, Rows]:
    """Rows of the classes by name; rows after those, such as DINO's label that stands for no class, stay in their order."""
    here, there, found = sides.here.num_classes, sides.there.num_classes, {}
    shapes, shapes_there = sides.here.state_dict(), sides.there.state_dict()
    for name, (dim, _) in grown(sides.here, untrained(sides.config, here + 1)).items():
        if name in shapes_there:
            total, total_there = shapes[name].shape[dim], shapes_there[name].shape[dim]
            spare = [(here + k, there + k) for k in range(min(total - here, total_there - there))]
            found[name] = Rows(dim, 1, total, total_there, [*match.pairs, *spare])
    return found


def query_rows(sides: Sides, match: ClassMatch, remarks: list[str]) -> dict[str, Rows]:
    """Where the numbers of queries differ: the first ones."""
    here, there = sides.option("queries")
    if not isinstance(here, int) or not isinstance(there, int) or here == there:
        return {}
    pairs = [(k, k) for k in range(min(here, there))]
    found = {name: Rows(dim, 1, here, there, pairs) for name, (dim, _) in grown(sides.here, sides.with_one_more("queries")).items()}
    ranks = ", which go with the best proposals" if getattr(sides.here, "proposal_head", None) is not None else ""
    kept = f"the first {here} of {there} queries are kept" if here < there else f"all {there} queries are kept, {here - there} start anew"
    remarks.append(f"{kept}{ranks}" if found else f"{here} queries instead of {there}, which all come from the image")
    return found


def level_rows(sides: Sides, match: ClassMatch, remarks: list[str]) -> dict[str, Rows]:
    """Where the feature levels differ: those of the same stride."""
    here, there = sides.here.strides, sides.there.strides
    if here == there or None in sides.option("levels"):
        return {}
    heads, _ = sides.option("heads")
    kept, new = (", ".join(str(stride) for stride in here if (stride in there) is known) for known in (True, False))
    sentence = f"feature levels of stride {kept} are kept, of {', '.join(map(str, there))}"
    remarks.append(f"{sentence}; {new} start anew" if new else sentence)
    larger = grown(sides.here, sides.with_one_more("levels"))
    return {name: Rows(dim, 1 if more == 1 else heads, len(here), len(there), sides.levels) for name, (dim, more) in larger.items()}


def named_as_here(sides: Sides, state: Mapping[str, Tensor], remarks: list[str]) -> dict[str, Tensor]:
    """The tensors of the trained detector by the names that they have here: of levels by stride, without stages that are not here.

    What all its stages share is copied for every stage where each has its own here.
    """
    number_here = {there: here for here, there in sides.levels}
    limits = {"encoder.layers": sides.option("encoder_layers"), **dict.fromkeys(STAGE_LISTS[1:], (sides.here.stages, sides.there.stages))}
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        numbered = re.fullmatch(rf"({'|'.join(map(re.escape, (*LEVEL_LISTS, *STAGE_LISTS)))})\.(\d+)\.(.+)", name)
        if numbered is None:
            named[name] = tensor
            continue
        parts, number, rest = numbered[1], int(numbered[2]), numbered[3]
        if parts in LEVEL_LISTS:
            if number in number_here:
                named[f"{parts}.{number_here[number]}.{rest}"] = tensor
        elif None in limits[parts] or number < limits[parts][0] or limits[parts][0] >= limits[parts][1]:
            named[name] = tensor
    for parts, (here, there) in limits.items():
        if here is not None and there is not None and here < there and parts.endswith("layers"):
            remarks.append(f"the first {here} of {there} {parts.replace('.', ' ')} are kept")
    for name in sides.here.state_dict():
        shared = re.sub(rf"^({'|'.join(map(re.escape, STAGE_LISTS[1:]))})\.\d+\.", r"\1.0.", name)
        if name not in named and shared in state and shared.replace(".0.", ".1.", 1) not in state:
            named[name] = state[shared]
    return named
