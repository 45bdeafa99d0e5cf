"""A trained detector in use: images in, detections out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import load_detector
from steadydetr.data.images import Picture, open_pixels
from steadydetr.data.loading import LoadedSample, batches_of_one_size, collate
from steadydetr.data.picture_inputs import TAKEN, is_one_picture
from steadydetr.data.transforms import Sample, apply
from steadydetr.data.video import frames, is_video
from steadydetr.detectors import Detector
from steadydetr.detectors.base import evaluating
from steadydetr.devices import choose_device
from steadydetr.finite import NotFiniteError
from steadydetr.limits import DEFAULT_LIMITS, Limits
from steadydetr.metrics.evaluation import prediction_function
from steadydetr.tools.detections import THRESHOLD, Detections

T = TypeVar("T")
BATCH = 4  # images in one forward pass


@dataclass(frozen=True, repr=False)
class Predictor:
    """A detector with the names of its classes and the size that it sees images at. Made by `load`; called, it predicts."""

    detector: Detector
    card: DetectorCard
    device: torch.device

    def __repr__(self) -> str:
        return f"Predictor({type(self.detector).__name__}, {len(self.names)} classes, {self.card.resize}, on {self.device})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, by label."""
        return self.card.classes

    @overload
    def predict(self, images: Picture, threshold: float = THRESHOLD, batch_size: int = BATCH) -> Detections: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, images: Iterable[Picture], threshold: float = THRESHOLD, batch_size: int = BATCH) -> list[Detections]: ...
    def predict(
        self, images: Picture | Iterable[Picture], threshold: float = THRESHOLD, batch_size: int = BATCH
    ) -> Detections | list[Detections]:
        """Detections of one image or of several; of a video, those of every frame.

        Args:
            images: a path or address (http, https), the bytes of an image file, an open binary file, a Pillow image, an array [H, W, 3]
                or [H, W] of uint8 (RGB or grey), a tensor [3, H, W] or [H, W] of uint8 or of floats in 0 .. 1, an iterable of these, or
                the path of a video. A detector of images of other channels takes arrays and tensors of so many too.
            threshold: detections with a lower score are left out; 0 gives all candidates.
            batch_size: images that are open at a time; those of one size among them share a forward pass.

        Raises:
            ValueError: an image cannot be read; names it. `threshold` or `batch_size` cannot be.
            TypeError: something is no image.
            FloatingPointError: detections are NaN or infinite; names the image.
        """
        if is_video(images):
            return [found for _, found in self.predict_video(images, threshold, batch_size)]
        if is_one_picture(images):
            return self._predict([images], threshold)[0]
        if not isinstance(images, Iterable) or isinstance(images, (Mapping, Set)):
            raise TypeError(f"predict takes one image or a list of them: an image is {TAKEN}, not {type(images).__name__}")
        found: list[Detections] = []
        for some in _chunks(images, batch_size):
            found += self._predict(some, threshold, first=len(found) + 1)
        return found

    __call__ = predict

    def predict_video(
        self, path: str | Path, threshold: float = THRESHOLD, batch_size: int = BATCH, limits: Limits = DEFAULT_LIMITS
    ) -> Iterator[tuple[Image.Image, Detections]]:
        """Every frame of a video file with its detections, while it is being decoded.

        Args:
            batch_size: frames in one forward pass.

        Raises:
            ValueError: the file cannot be decoded (any further); names it.
            ImportError: PyAV is not installed.
        """
        for pictures in _chunks(frames(Path(path).expanduser(), limits), batch_size):
            yield from zip(pictures, self._predict(pictures, threshold), strict=True)

    def _predict(self, pictures: Sequence[Any], threshold: float, first: int = 1) -> list[Detections]:
        """Detections of several images, all open at once; `first` is what an error calls the first of them."""
        if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold!r:.80} must be a number in 0 to 1: it is a score")
        samples = [self._sample(open_pixels(picture, self.detector.image_channels)) for picture in pictures]
        predict_batch = prediction_function(self.detector, self.device, self.card.top, self.card.nms, masks=True)
        found: dict[int, Detections] = {}
        with evaluating(self.detector):
            for batch in batches_of_one_size((sample.size for sample in samples), len(samples)):
                for number, one in zip(batch, predict_batch(collate([samples[number] for number in batch])), strict=True):
                    columns = (one.boxes_xyxy.cpu(), one.scores.cpu(), one.labels.cpu())
                    found[number] = Detections(*columns, self.names, samples[number].original_size, one.masks)
        detections = [found[number] for number in range(len(samples))]
        for number, (picture, of_one) in enumerate(zip(pictures, detections, strict=True), first):
            if not (of_one.boxes_xyxy.isfinite().all() and of_one.scores.isfinite().all()):
                name = picture if isinstance(picture, (str, Path)) else f"image {number}"
                raise NotFiniteError(f"the detections of {name} are not finite: the model's numbers overflow on it")
        return [of_one.above(threshold) for of_one in detections]

    def _sample(self, pixels: NDArray[np.uint8]) -> LoadedSample:
        """The image [H, W, C] as the detector was trained to see it."""
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        empty = Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return LoadedSample(apply(self.card.resize.build(), empty), 0, pixels.shape[:2])


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, `size` at a time, which are taken only when they are wanted."""
    if size < 1:
        raise ValueError(f"batch_size {size} must be at least 1")
    left = iter(items)
    while some := list(islice(left, size)):
        yield some


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
