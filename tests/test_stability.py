"""Measures of stability: by hand, against slow twins, on detectors and during training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steadydetr.data import DataConfig, FixedSize, open_data
from steadydetr.detectors import DetectorConfig
from steadydetr.equations.stability import consistency, held_targets, instability, unstable_score
from steadydetr.learning.criterion import Criterion
from steadydetr.metrics.stability import compare_matches, held_out, match_dataset
from steadydetr.tools.evaluate import measure_checkpoint
from steadydetr.training.loop import train
from tests.conftest import CLASSES, DETECTORS
from tests.reference import stability as slow
from tests.test_train import tiny


def test_unstable_score_by_hand() -> None:
    """The paper's example: ten objects, one of which changes its query, is 10%."""
    before, image = torch.arange(10), torch.zeros(10, dtype=torch.int64)
    after = before.clone()
    after[3] = 17
    assert float(unstable_score(before, after, image, 1)) == pytest.approx(10)
    # a second image with one object that keeps its query: mean over images; a third without objects does not count
    image = torch.tensor([0] * 10 + [1])
    extra = torch.tensor([5])
    assert float(unstable_score(torch.cat((before, extra)), torch.cat((after, extra)), image, 3)) == pytest.approx(5)


def test_instability_by_hand() -> None:
    """A target that moves to an idle query changes two queries, a swap of two targets two, all targets moved 2 x objects."""
    image = torch.zeros(2, dtype=torch.int64)

    def between(a: list[int], b: list[int]) -> float:
        return float(instability(*(held_targets(torch.tensor(x), image, 1, 6) for x in (a, b))))

    assert between([0, 1], [0, 1]) == 0
    assert between([0, 1], [0, 2]) == 2
    assert between([0, 1], [1, 0]) == 2
    assert between([0, 1], [4, 5]) == 4
    assert between([0, -1], [0, 3]) == 1  # a target without a query holds none


def random_matches(counts: tuple[int, ...], queries: int, generator: random.Random) -> list[dict[int, int]]:
    return [dict(enumerate(generator.sample(range(queries), n))) for n in counts]


def as_tensors(matches: list[dict[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [(query, i) for i, image in enumerate(matches) for query in image.values()]
    return torch.tensor([query for query, _ in rows]), torch.tensor([i for _, i in rows])


@pytest.mark.parametrize("counts", [(3, 1, 4), (2, 0, 5), (7,)])
def test_measures_equal_their_twins(counts: tuple[int, ...]) -> None:
    generator = random.Random(0)
    before, after = (random_matches(counts, 9, generator) for _ in range(2))
    (a, image), (b, _) = as_tensors(before), as_tensors(after)
    held = [held_targets(x, image, len(counts), 9) for x in (a, b)]
    assert float(instability(*held)) == pytest.approx(slow.instability(before, after, 9))
    assert float(unstable_score(a, b, image, len(counts))) == pytest.approx(slow.unstable_score(before, after))
    assert float(consistency(a, b)) == pytest.approx(slow.consistency(before, after))


CONFIG = DataConfig("shapes:size=64,images=7", resize=FixedSize(64, 64), workers=0)


def test_any_batch_size_measures_the_same(detector_config: DetectorConfig) -> None:
    torch.manual_seed(0)
    detector, data = detector_config.build(6), held_out(open_data(CONFIG.source, "val"), None)
    one, many = (match_dataset(detector, Criterion(), data, CONFIG, size) for size in (1, 4))
    assert torch.equal(one.query, many.query) and torch.equal(one.image, many.image)
    assert (one.images, one.ids) == (many.images, many.ids)
    assert detector.training  # left as it was


def test_a_model_is_consistent_with_itself(detector_config: DetectorConfig) -> None:
    torch.manual_seed(0)
    detector, data = detector_config.build(6), held_out(open_data(CONFIG.source, "val"), None)
    matched = match_dataset(detector, Criterion(), data, CONFIG, 4)
    measured = compare_matches(matched, matched.query[-1], matched)
    assert measured.between_epochs == 0 and measured.consistency == [100.0] * detector.stages
    two_stage = matched.proposal is not None
    numbers = [str(stage + 1) for stage in range(detector.stages)]
    assert list(measured.unstable_score) == (numbers if two_stage else numbers[1:]) and len(measured.between_stages) == len(numbers) - 1
    assert matched.query.min() >= 0 and matched.query.max() < matched.ids
    assert measured.objects == len(data.index.labels) and measured.images == len(data.index)


def test_two_stage_queries_go_by_their_token() -> None:
    """The rank of a query is no identity: another image's scores reorder it."""
    torch.manual_seed(0)
    detector, data = DETECTORS["dino"].build(CLASSES + 1), held_out(open_data(CONFIG.source, "val"), 1)
    assert match_dataset(detector, Criterion(), data, CONFIG, 1).ids == 8 * 8 + 4 * 4 + 2 * 2


def stability_records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "stability"]


def test_training_follows_the_matching(tmp_path: Path) -> None:
    """At every evaluation and at named steps, both weights; instability between evaluations from the second one on."""
    train(tiny(epochs=2, ema_decay=0.9, stability_images=5, stability_steps=(3, 6)), tmp_path / "run", device="cpu")
    records = stability_records(tmp_path / "run")
    assert [(r["step"], r["weights"]) for r in records] == [(s, w) for s in (3, 6, 12) for w in ("model", "ema")]
    assert [r["between_epochs"] is None for r in records] == [True] * 4 + [False] * 2
    assert all((r["consistency"] is None) == (r["weights"] == "ema") for r in records)
    assert all(0 <= score <= 100 for r in records for score in r["unstable_score"].values())
    again = measure_checkpoint(tmp_path / "run", "shapes:size=64,images=24", images=5, device="cpu", workers=0)
    assert again["model"].unstable_score == records[-2]["unstable_score"]
    assert again["model"].consistency == records[-2]["consistency"] and again["ema"].between_stages == records[-1]["between_stages"]


def test_no_images_no_measures(tmp_path: Path) -> None:
    train(tiny(epochs=1, stability_images=0), tmp_path / "run", device="cpu")
    assert not stability_records(tmp_path / "run")


def test_checkpoints_of_other_classes_are_refused(tmp_path: Path) -> None:
    train(replace(tiny(epochs=1), name="other"), tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="the checkpoint knows the classes"):
        measure_checkpoint(tmp_path / "run", str(write_other_data(tmp_path / "data")), device="cpu", workers=0)


def write_other_data(folder: Path) -> Path:
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    torch_image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    from PIL import Image

    Image.fromarray(torch_image).save(folder / "val2017/a.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 64}],
        "categories": [{"id": 7, "name": "hat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [4, 4, 30, 30], "area": 900, "iscrowd": 0}],
    }
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return folder
