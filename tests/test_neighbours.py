"""What is found in an image does not depend on the images beside it: evaluation, measurement and prediction never pad."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.data import DataConfig, Dataset, EvalLoader, FixedSize, open_data
from steadydetr.data.loading import batches_of_one_size
from steadydetr.data.transforms import EvalTransform, ShortestSide
from steadydetr.detectors import DetectorConfig
from steadydetr.learning.criterion import Criterion
from steadydetr.metrics.evaluation import collect, prediction_function
from steadydetr.metrics.results import Results
from steadydetr.metrics.stability import held_out, match_dataset
from steadydetr.tools.predictor import Predictor

SIZES = ((40, 60), (60, 40), (40, 60), (33, 90), (80, 120), (61, 47), (60, 40))  # height, width
CONFIG = DataConfig(resize=ShortestSide(64, 128), workers=0)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Pictures of noise of several sizes, with two objects each."""
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    noise = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"val/{number}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)],
        "categories": [{"id": 1, "name": "nut"}, {"id": 2, "name": "bolt"}],
        "annotations": [
            {"id": 2 * i + k, "image_id": i, "category_id": 1 + k, "bbox": [3 * i, 5, 9, 9 + i], "area": 81, "iscrowd": 0}
            for i in range(len(SIZES))
            for k in (0, 1)
        ],
    }
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(content))
    return open_data(tmp_path, "val")


def by_image(results: Results) -> list[tuple[Tensor, Tensor]]:
    """Boxes and scores of every image."""
    rows = [results.image_ids == number for number in range(len(SIZES))]
    return [(torch.from_numpy(results.boxes_xyxy[row]), torch.from_numpy(results.scores[row])) for row in rows]


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_detections(data: Dataset, detector_config: DetectorConfig, batch_size: int) -> None:
    torch.manual_seed(0)
    predict = prediction_function(detector_config.build(2).eval(), "cpu", top=5)
    alone, together = (by_image(collect(predict, EvalLoader(data, CONFIG, size))) for size in (1, batch_size))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_detections_of_a_list_of_pictures(data: Dataset, detector_config: DetectorConfig) -> None:
    torch.manual_seed(0)
    card = DetectorCard(detector_config, ("nut", "bolt"), (1, 2), CONFIG.resize, top=5)
    predictor = Predictor(detector_config.build(2).eval(), card, torch.device("cpu"))
    pictures = [data.load_image(position) for position in range(len(SIZES))]
    for picture, found in zip(pictures, predictor.predict(pictures), strict=True):
        alone = predictor.predict(picture)
        torch.testing.assert_close(found.boxes_xyxy, alone.boxes_xyxy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-4)


def test_matches_in_the_order_of_the_data(data: Dataset, detector_config: DetectorConfig) -> None:
    torch.manual_seed(0)
    detector = detector_config.build(2)
    alone, together = (match_dataset(detector, Criterion(), held_out(data, None), CONFIG, size) for size in (1, 4))
    assert torch.equal(alone.query, together.query) and torch.equal(alone.image, together.image)
    assert alone.image.tolist() == [number for number in range(len(SIZES)) for _ in (0, 1)]
    if alone.proposal is not None and together.proposal is not None:
        assert torch.equal(alone.proposal, together.proposal)


def test_no_batch_is_padded(data: Dataset) -> None:
    loader = EvalLoader(data, CONFIG, 2)
    assert not any(batch.padding.any() for batch in loader)
    assert loader.positions == [0, 2, 1, 6, 3, 4, 5]  # 40 x 60 and 80 x 120 become one size, but two fill a batch
    assert [image for batch in loader for image in batch.image_ids] == loader.positions


@pytest.mark.parametrize("resize", [ShortestSide(64, 128), ShortestSide(800, 1333), FixedSize(24, 36)])
@pytest.mark.parametrize("size", [(40, 60), (33, 90), (480, 639), (1, 700)])
def test_the_size_is_known_without_the_image(resize: EvalTransform, size: tuple[int, int]) -> None:
    assert resize.resized(size) == tuple(resize.build()(torch.zeros(3, *size, dtype=torch.uint8)).shape[-2:])


def test_batches_of_one_size() -> None:
    a, b = (2, 3), (3, 2)
    assert batches_of_one_size([a, b, a, a, b], 2) == [[0, 2], [1, 4], [3]]
    assert batches_of_one_size([a, b, a], 1) == [[0], [1], [2]]
    assert batches_of_one_size([], 4) == []
