"""The weights of a trained detector in another one: of other classes, which go by name, queries, feature levels and stages.

Which tensors have a row for every class, query or level is not listed anywhere: those whose shape grows when the detector is built, without
values, with one more of them. So this holds for detectors of other packages too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steadydetr.checkpoints.class_names import ClassMatch, Pairs, match_classes
from steadydetr.checkpoints.weights import TrainedWeights
from steadydetr.detectors import Detector, DetectorConfig
from steadydetr.files import counted, listed, printable
from steadydetr.finite import where_not_finite
from steadydetr.nn.backbone import adapt_input

LEVEL_LISTS = ("neck.convs", "neck.norms")  # lists of modules with one for each level
DECODER_LISTS = ("decoder.layers", "decoder.class_heads", "decoder.box_heads")  # and for each stage of the decoder


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
    sides = Sides(detector, config, untrained(there.detector, len(there.classes)), there.detector)
    queries = query_rows(sides)
    rows = class_rows(sides, match.pairs) | queries | level_rows(sides)
    taken, wrong = fitting(sides, in_image_channels(sides, named_as_here(sides, weights.state)), rows)
    allowed = [name for name in wrong if any(name == part or name.startswith(f"{part}.") for part in partial)]
    refuse({name: what for name, what in wrong.items() if name not in allowed}, detector, weights)
    if not_finite := where_not_finite(taken):
        raise ValueError(f"{weights.where} is of no use: {not_finite} hold NaN or infinite values")
    detector.load_state_dict(taken, strict=False)
    here = detector.state_dict().keys()
    return Transfer(
        match if by_name else replace(match, dropped=there.classes),
        [*channel_remarks(sides), *query_remarks(sides, bool(queries)), *level_remarks(sides), *stage_remarks(sides)],
        [name for name in allowed if name in here],
        [name for name in allowed if name not in here],
    )


def fitting(sides: Sides, source: Mapping[str, Tensor], rows: Mapping[str, Rows]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that the detector here takes, and what is wrong with the others, both by name."""
    target, taken, wrong = sides.here.state_dict(), dict[str, Tensor](), dict[str, str]()
    for name, value in target.items():
        if name not in source:
            if not name.endswith("num_batches_tracked") and not sides.is_new_level(name):
                wrong[name] = f"{name} is missing"
        elif (found := fit(value, source[name], rows.get(name))) is not None:
            taken[name] = found
        else:
            wrong[name] = f"{name} is {list(source[name].shape)} there and {list(value.shape)} here"
    return taken, wrong | {name: f"{name} is left over" for name in source.keys() - target.keys()}


def refuse(wrong: Mapping[str, str], detector: Detector, weights: TrainedWeights) -> None:
    """Raise ValueError if anything is wrong with tensors, and say what could be done."""
    if wrong:
        problems = printable(listed(sorted(wrong.values()), 10))
        raise ValueError(
            f"{weights.where} does not fit {detector.architecture} as it is configured here: {problems}."
            " Take the detector of the weights (`steadydetr finetune`), or allow these to start anew or to be left out: --allow-partial"
            f" {' '.join(sorted({part_of(name) for name in wrong})[:8])}"
        )


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

    @property
    def queries(self) -> tuple[int, int] | None:
        """The numbers of queries here and there, if they differ."""
        here, there = self.config.queries, self.config_there.queries
        return None if here is None or there is None or here == there else (here, there)

    @property
    def channels(self) -> tuple[int, int]:
        """Those of images, here and there."""
        return self.config.image_channels, self.config_there.image_channels

    @property
    def has_other_levels(self) -> bool:
        """Whether the feature levels differ, of two detectors that declare them."""
        declared = self.config.levels is not None and self.config_there.levels is not None
        return declared and self.here.strides != self.there.strides

    @property
    def stages(self) -> dict[str, tuple[int | None, int | None]]:
        """The numbers of modules in lists that have one for each stage, here and there; None where a detector does not tell."""
        here, there = (side.stages - side.undecoded_stages for side in (self.here, self.there))
        decoder = (here, there)
        return {"encoder.layers": (self.config.encoder_layers, self.config_there.encoder_layers), **dict.fromkeys(DECODER_LISTS, decoder)}

    @property
    def levels(self) -> Pairs:
        """The levels of the same stride."""
        return [(i, j) for i, stride in enumerate(self.here.strides) for j, other in enumerate(self.there.strides) if stride == other]

    def is_new_level(self, name: str) -> bool:
        """Whether a tensor is one of the neck for a level that is not there."""
        numbered = re.match(rf"({_any_of(LEVEL_LISTS)})\.(\d+)\.", name)
        return numbered is not None and int(numbered[2]) not in dict(self.levels)


def class_rows(sides: Sides, pairs: Pairs) -> dict[str, Rows]:
    """Rows of the classes by name; rows after those, such as DINO's label that stands for no class, stay in their order."""
    here, there, found = sides.here.num_classes, sides.there.num_classes, {}
    shapes, shapes_there = sides.here.state_dict(), sides.there.state_dict()
    for name, (dim, _) in grown(sides.here, untrained(sides.config, here + 1)).items():
        if name in shapes_there:
            total, total_there = shapes[name].shape[dim], shapes_there[name].shape[dim]
            spare = [(here + k, there + k) for k in range(min(total - here, total_there - there))]
            found[name] = Rows(dim, 1, total, total_there, [*pairs, *spare])
    return found


def query_rows(sides: Sides) -> dict[str, Rows]:
    """Where the numbers of queries differ: the first ones."""
    if sides.queries is None:
        return {}
    here, there = sides.queries
    larger = grown(sides.here, untrained(sides.config.changed(queries=here + 1), sides.here.num_classes))
    return {name: Rows(dim, 1, here, there, [(k, k) for k in range(min(here, there))]) for name, (dim, _) in larger.items()}


def query_remarks(sides: Sides, have_rows: bool) -> Iterator[str]:
    """What becomes of the queries where their numbers differ. Those without rows in any tensor are made of the image."""
    if sides.queries is None:
        return
    here, there = sides.queries
    if not have_rows:
        yield f"{here} queries instead of {there}, which all come from the image"
        return
    proposals = any(name.startswith("proposal_head.") for name in sides.here.state_dict())
    which = ", which go with the best proposals" * proposals
    if here < there:
        yield f"the first {here} of {there} queries are kept{which}"
    else:
        yield f"all {there} queries are kept{which}; {here - there} start anew"


def level_rows(sides: Sides) -> dict[str, Rows]:
    """Where the feature levels differ: those of the same stride. Where attention weighs levels, each head has rows of its own."""
    if not sides.has_other_levels:
        return {}
    here, there = len(sides.here.strides), len(sides.there.strides)
    larger = grown(sides.here, untrained(sides.config.with_levels(here + 1), sides.here.num_classes))
    heads = sides.config.heads or 1
    return {name: Rows(dim, 1 if more == 1 else heads, here, there, sides.levels) for name, (dim, more) in larger.items()}


def level_remarks(sides: Sides) -> Iterator[str]:
    """Which feature levels are kept where they differ."""
    if sides.has_other_levels:
        here, there = sides.here.strides, sides.there.strides
        kept, new = (", ".join(str(stride) for stride in here if (stride in there) is known) for known in (True, False))
        sentence = f"feature levels of stride {kept} are kept, of {', '.join(map(str, there))}"
        yield f"{sentence}; {new} start anew" if new else sentence


def stage_remarks(sides: Sides) -> Iterator[str]:
    """Which stages are kept where there are fewer of them here."""
    for parts, (here, there) in sides.stages.items():
        if here is not None and there is not None and here < there and parts.endswith("layers"):
            yield f"the first {here} of {there} {parts.replace('.', ' ')} are kept"


def in_image_channels(sides: Sides, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, of which the first convolution is adapted where the images have another number of channels here."""
    here, there = sides.channels
    if here == there:
        return state
    larger = grown(sides.here, untrained(sides.config.with_image_channels(here + 1), sides.here.num_classes))
    return state | {name: adapt_input(state[name], here) for name in larger if name in state and state[name].ndim == 4}


def channel_remarks(sides: Sides) -> Iterator[str]:
    here, there = sides.channels
    if here != there:
        how = "are summed" if here == 1 else "are repeated or cut in their order, and scaled to about the same sum"
        yield f"images of {counted(here, 'channel')} instead of {there}: the weights of the first convolution {how}"


def named_as_here(sides: Sides, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the trained detector by the names that they have here: of levels by stride, without stages that are not here.

    What all its stages share is copied for every stage where each has its own here.
    """
    number_here = {there: here for here, there in sides.levels}
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        numbered = re.fullmatch(rf"({_any_of((*LEVEL_LISTS, *sides.stages))})\.(\d+)\.(.+)", name)
        if numbered is None:
            named[name] = tensor
            continue
        parts, number, rest = numbered[1], int(numbered[2]), numbered[3]
        if parts in LEVEL_LISTS:
            if number in number_here:
                named[f"{parts}.{number_here[number]}.{rest}"] = tensor
        else:
            here, there = sides.stages[parts]
            if here is None or there is None or number < here or here >= there:
                named[name] = tensor
    for name in sides.here.state_dict():
        shared = re.sub(rf"^({_any_of(DECODER_LISTS)})\.\d+\.", r"\1.0.", name)
        if name not in named and shared in state and shared.replace(".0.", ".1.", 1) not in state:
            named[name] = state[shared]
    return named


def _any_of(words: Iterable[str]) -> str:
    """A pattern for any of the words."""
    return "|".join(map(re.escape, words))
