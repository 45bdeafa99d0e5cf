"""A trained detector in use: images in, detections out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image

from steadydetr.checkpoints.folder import DetectorCard, choose_device, load_detector
from steadydetr.data.images import Picture, open_picture
from steadydetr.data.loading import LoadedSample, batches_of_one_size, collate
from steadydetr.data.transforms import Sample, apply
from steadydetr.detectors import Detector
from steadydetr.finite import NotFiniteError
from steadydetr.metrics.evaluation import prediction_function
from steadydetr.tools.detections import Detections


@dataclass(frozen=True)
class Predictor:
    """A detector with the names of its classes and the size that it sees images at. Made by `load`."""

    detector: Detector
    card: DetectorCard
    device: torch.device

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, by label."""
        return self.card.classes

    @overload
    def predict(self, images: Picture, threshold: float = 0.0) -> Detections: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, images: Sequence[Picture], threshold: float = 0.0) -> list[Detections]: ...
    def predict(self, images: Picture | Sequence[Picture], threshold: float = 0.0) -> Detections | list[Detections]:
        """Detections of one image (path, Pillow image or RGB array) or of several, those of one size in one batch.

        Args:
            threshold: detections with a lower score are left out.

        Raises:
            ValueError: an image cannot be read; names it.
            FloatingPointError: detections are NaN or infinite; names the image.
        """
        single = isinstance(images, (str, Path, Image.Image, np.ndarray))
        pictures: Sequence[Picture] = [images] if single else images  # type: ignore[list-item, assignment]
        samples = [self._sample(open_picture(picture)) for picture in pictures]
        predict_batch = prediction_function(self.detector, self.device, self.card.top, self.card.nms)
        found: dict[int, Detections] = {}
        for batch in batches_of_one_size((sample.size for sample in samples), len(samples)):
            predictions = predict_batch(collate([samples[number] for number in batch]))
            found |= {n: Detections(b.cpu(), s.cpu(), l.cpu(), self.names) for n, (b, s, l) in zip(batch, predictions, strict=True)}
        detections = [found[number] for number in range(len(samples))]
        for number, (picture, of_one) in enumerate(zip(pictures, detections, strict=True), 1):
            if not (of_one.boxes_xyxy.isfinite().all() and of_one.scores.isfinite().all()):
                name = picture if isinstance(picture, (str, Path)) else f"image {number} of {len(pictures)}"
                raise NotFiniteError(f"the detections of {name} are not finite: the model's numbers overflow on it")
        detections = [of_one.above(threshold) for of_one in detections]
        return detections[0] if single else detections

    def _sample(self, picture: Image.Image) -> LoadedSample:
        """The image as the detector was trained to see it."""
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
        empty = Sample(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return LoadedSample(apply(self.card.resize.build(), empty), 0, (picture.height, picture.width))


def load(path: str | Path, device: str | torch.device = "auto") -> Predictor:
    """The detector of a run folder (its best), of a checkpoint folder, or of a converted checkpoint.

    Args:
        device: "cpu", "cuda" or "auto", which takes a GPU if there is one.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged or of another version; names the file.
    """
    chosen = choose_device(device)
    loaded = load_detector(path, chosen)
    return Predictor(loaded.detector, loaded.card, chosen)
