"""A recipe for training on from a trained detector, made from its weights and from the number of images that there are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.start import Start
from steadydetr.data import DataConfig
from steadydetr.data.transforms import DetrTransform, EvalTransform, FixedSize, FixedSizeTransform, ShortestSide, TrainTransform
from steadydetr.learning.class_terms import FocalCost, HardTarget, PositionModulatedCost
from steadydetr.learning.teachers import EMATeacher, relative_decay
from steadydetr.objectives import DenoisingObjective, GroupMatching, OneToMany, SetPrediction
from steadydetr.recipes.align import align
from steadydetr.recipes.base import RECIPES, Recipe
from steadydetr.recipes.online import online
from steadydetr.recipes.stable import stable
from steadydetr.runs.training_config import TrainingConfig

TrainingMethod = Literal["plain", "od", "stable", "steady", "align"]
FEW_QUERIES = 300  # up to which Stable-DINO rescales its targets to 1 (paper Sec. 2.2)
EVALUATIONS = 20  # of a run, where a pass over the data takes less than that share of it
MOST_PASSES, LEAST_PASSES = 80, 12  # over the data, of few images and of many
OWN = (DenoisingObjective, OneToMany, GroupMatching)  # objectives by which detectors learn without a teacher, besides the main one
BATCHES = ((100, 4), (1000, 8))  # images of the data below which a step takes so many; otherwise as many as in the paper


def finetuned(card: DetectorCard, start: Start, images: int, method: TrainingMethod | None = None, before: Recipe | None = None) -> Recipe:
    """The recipe by which `steadydetr finetune` trains the detector of trained weights on.

    Args:
        card: of the weights.
        images: of the data to train on.
        method: to train by; None: with the losses of `before`, without its teachers.
        before: the recipe that the weights were trained by, where that is known. Otherwise it is the paper's for such a detector.
    """
    base = before or recipe_of(card)
    own = tuple(objective for objective in base.objectives if isinstance(objective, OWN))
    criterion = base.criterion
    if method is not None and not is_plain(base):
        criterion, own = recipe_of(card).criterion, tuple(o.weighed(None) if isinstance(o, DenoisingObjective) else o for o in own)
    recipe = Recipe(
        name=f"finetune-{_short(start.weights)}",
        detector=card.detector,
        criterion=criterion,
        objectives=(SetPrediction(), *own),
        data=replace(data_for(card.resize, base.data), masks=criterion.masks is not None),
        training=training_for(base.training, images),
        start=start,
        top=card.top,
        nms=card.nms,
        notes=f"{start.weights}, trained on",
    )
    return METHODS[method or "plain"](recipe)


def recipe_of(card: DetectorCard) -> Recipe:
    """The first recipe of the papers for such a detector, which is the baseline of its family.

    Raises:
        ValueError: no recipe has such a detector.
    """
    for make in RECIPES.values():
        recipe = make()
        if type(recipe.detector) is type(card.detector) and is_plain(recipe) and recipe.reported:
            return recipe
    raise ValueError(f"no recipe is known for {type(card.detector).__name__}: name one, `steadydetr train RECIPE --from WEIGHTS`")


def data_for(resize: EvalTransform, base: DataConfig) -> DataConfig:
    """Images of the size that the weights were made for, augmented at most as far as that size allows."""
    transform: TrainTransform = base.transform
    if isinstance(resize, ShortestSide):
        least = max(32, resize.shortest * 6 // 10 // 32 * 32)
        shortest = tuple(range(least, resize.shortest + 1, 32))
        usual = base.transform if isinstance(base.transform, DetrTransform) else DetrTransform()
        shortest = shortest if shortest[-1] == resize.shortest else (*shortest, resize.shortest)
        transform = replace(usual, shortest=shortest, longest=resize.longest)
    elif isinstance(resize, FixedSize):
        transform = FixedSizeTransform(resize.height, resize.width, zoom=0.5)
    return DataConfig(transform=transform, resize=resize, workers=base.workers)


def training_for(base: TrainingConfig, images: int) -> TrainingConfig:
    """A schedule for so many images: few of them are gone through more often, in smaller batches."""
    batch = batch_for(images, base.images_per_step)
    per_pass = images // batch
    passes = min(max(round(800 / math.sqrt(images)), LEAST_PASSES), MOST_PASSES)
    steps = passes * per_pass
    short = passes > EVALUATIONS
    return replace(
        base,
        epochs=EVALUATIONS if short else passes,
        passes=0,
        epoch_steps=math.ceil(steps / EVALUATIONS) if short else 0,
        batch_size=batch,
        accumulation="auto",
        lr=base.lr * math.sqrt(batch / base.images_per_step),
        encoder_lr_factor=0.5,
        backbone_lr_factor=min(base.backbone_lr_factor, 0.1),
        schedule="step",
        drop_epochs=(0.8,),
        warmup_steps=min(200, steps // 10),
        ema_decay=round(relative_decay(steps), 6),
    )


def batch_for(images: int, usual: int) -> int:
    """How many of so many images a step takes, where memory is no question: few data are gone through in smaller batches."""
    return min(next((size for below, size in BATCHES if images < below), usual), usual, images)


def with_method(recipe: Recipe, method: TrainingMethod) -> Recipe:
    """The recipe with one of the training methods; a ValueError where it has one already."""
    if not is_plain(recipe):
        raise ValueError(f"--method {method}: {recipe.name} has a training method already; take the recipe that it is based on")
    return METHODS[method](recipe)


def is_plain(recipe: Recipe) -> bool:
    """Whether a recipe has none of the training methods: no teachers, and loss, cost and matching of the detectors' own papers."""
    criterion, usual = recipe.criterion, (SetPrediction, *OWN)
    loss = isinstance(criterion.class_target, HardTarget)
    match = isinstance(criterion.class_cost, FocalCost) and criterion.matching is None
    return loss and match and not recipe.teachers and all(isinstance(objective, usual) for objective in recipe.objectives)


def _plain(recipe: Recipe) -> Recipe:
    return recipe


def _od(recipe: Recipe) -> Recipe:
    """The average teaches, so that no second one is kept."""
    taught = online(recipe, f"{recipe.name}-od", teacher=EMATeacher())
    return replace(taught, training=replace(taught.training, ema_decay=0.0))


def _stable(recipe: Recipe) -> Recipe:
    """Loss and cost alone: memory fusion would put layers between the encoder and what was trained to read it."""
    few = (recipe.detector.queries or FEW_QUERIES) <= FEW_QUERIES
    found = stable(recipe, "one" if few else "max", "", f"{recipe.name}-stable", fusion="none")
    return replace(found, training=recipe.training)


def _steady(recipe: Recipe) -> Recipe:
    """OD-DETR with the cost of Stable-DINO; the class target stays OD-DETR's, as in stable-od-dino."""
    found = _od(recipe)
    criterion = replace(found.criterion, class_cost=PositionModulatedCost())
    return replace(found, name=f"{recipe.name}-steady", criterion=criterion, notes=f"{found.notes} and position-modulated cost")


def _align(recipe: Recipe) -> Recipe:
    return align(recipe, "", f"{recipe.name}-align")


METHODS: dict[TrainingMethod, Callable[[Recipe], Recipe]] = {
    "plain": _plain,
    "od": _od,
    "stable": _stable,
    "steady": _steady,
    "align": _align,
}


def _short(weights: str) -> str:
    """Weights in the name of a recipe: the last part of a path, or of a name on a hub."""
    parts = [part for part in re.split(r"[\\/:@]", weights) if part and part not in ("best", "last", "ema")] or ["weights"]
    return re.sub(r"[^\w.+-]+", "-", parts[-1].rsplit(".", 1)[0] if "." in parts[-1][1:] else parts[-1])[:60].strip("-.") or "weights"
