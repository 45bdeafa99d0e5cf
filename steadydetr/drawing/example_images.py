"""The images of a data set on which sampling points and feature masks are drawn."""

from __future__ import annotations

from collections.abc import Iterator

from steadydetr.data import DataConfig, Dataset, EvalLoader, first_images, for_training
from steadydetr.structures import Batch


def first_objects(dataset: Dataset, config: DataConfig, count: int) -> Iterator[tuple[int, Batch, int]]:
    """Position, batch and largest object of the first images with objects; every batch is one image."""
    few = first_images(for_training(dataset)[0], 10 * count)
    for position, batch in enumerate(EvalLoader(few, config, batch_size=1, masks=True)):
        if count and len(batch.targets.labels):
            yield position, batch, int(batch.targets.boxes[:, 2:].prod(1).argmax())
            count -= 1
