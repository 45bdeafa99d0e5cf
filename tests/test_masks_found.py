"""Masks that a detector finds: their scores and pixels, in predictions, files, pictures, evaluation and the records of a run.

Of a DINO to which masks were given: the product of a query's content with the colours of the image, at a quarter of its size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import steadydetr
from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import save_detector
from steadydetr.cli import main
from steadydetr.data import DataConfig, Dataset, EvalLoader, FixedSize, open_data
from steadydetr.detectors import DINO, instance_masks, postprocess
from steadydetr.detectors.instance_masks import ImageSizes, image_sizes, to_original
from steadydetr.equations.mask_scores import mask_quality
from steadydetr.finite import NotFiniteError
from steadydetr.metrics.evaluation import collect, evaluate, prediction_function
from steadydetr.runs.records import read_run
from steadydetr.structures import MaskPredictions, Stages
from steadydetr.tools.detections import Detections
from steadydetr.tools.evaluate import evaluate_checkpoint
from steadydetr.tools.image_files import predict_files
from tests.conftest import DETECTORS, make_batch, make_method
from tests.data_folders import voc_folder
from tests.reference import mask_scores as slow
from tests.test_train import tiny

NAMES = ("disc", "square", "triangle", "cross", "ring", "star")


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Callable[..., Stages] = DINO.forward

    def with_masks(self: DINO, images: Tensor, padding: Tensor) -> Stages:
        stages = forward(self, images, padding)
        pixels = avg_pool2d(self.normalise(images, padding), 4)
        return replace(stages, masks=MaskPredictions(stages.content[..., :3] * 3, pixels))  # type: ignore[attr-defined]

    monkeypatch.setattr(DINO, "forward", with_masks)
    monkeypatch.setattr(DINO, "predicts_masks", True)


@pytest.fixture
def checkpoint(masked: None, tmp_path: Path) -> Path:
    method, card = make_method(DETECTORS["dino"]), DetectorCard(DETECTORS["dino"], NAMES[:5], (3, 5, 8, 13, 21), FixedSize(64, 64), top=9)
    save_detector(tmp_path / "detector", method.student.state_dict(), card)
    return tmp_path / "detector"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i, size in enumerate(((40, 60), (80, 50))):
        pixels = np.kron(np.random.default_rng(i).integers(0, 255, (size[0] // 10, size[1] // 10, 3)), np.ones((10, 10, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


# Scores and sizes


def test_quality_of_masks() -> None:
    """The mean probability inside: by hand, of a mask without a pixel, and as the slow twin has it."""
    three = torch.tensor(3.0).log()  # the logit of 0.75
    logits = torch.stack((torch.tensor([[three, -9.0], [0.0, 50.0]]), torch.tensor([[-1.0, 0.0], [-3.0, -0.1]])))
    assert mask_quality(logits).tolist() == pytest.approx([(0.75 + 1) / 2, 0], abs=1e-6)
    drawn = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert mask_quality(drawn).tolist() == pytest.approx([slow.quality(one.tolist()) for one in drawn], rel=1e-12)


@pytest.mark.parametrize(("seen", "original"), [((16, 24), (16, 24)), ((13, 24), (9, 31)), ((16, 10), (40, 25)), ((1, 1), (3, 2))])
def test_masks_are_enlarged_to_the_padded_image_cut_and_resized(seen: tuple[int, int], original: tuple[int, int]) -> None:
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = to_original(logits, ImageSizes((16, 24), seen, original))
    expected = torch.tensor([slow.original(one.tolist(), (16, 24), seen, original) for one in logits], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_sizes_of_padded_images() -> None:
    padding = torch.ones(2, 8, 9, dtype=torch.bool)
    padding[0, :8, :5] = padding[1, :3, :9] = False
    assert image_sizes(padding, [(4, 4), (6, 6)]) == [ImageSizes((8, 9), (8, 5), (4, 4)), ImageSizes((8, 9), (3, 9), (6, 6))]


def some_stages(seed: int = 0) -> tuple[Stages, Tensor]:
    """Two images, three queries of two classes, masks at a quarter of 16 x 24 pixels; of an earlier stage other ones."""
    g = torch.Generator().manual_seed(seed)
    masks = MaskPredictions(torch.randn(2, 2, 3, 5, generator=g), torch.randn(2, 5, 4, 6, generator=g))
    stages = Stages(torch.randn(2, 2, 3, 2, generator=g), torch.rand(2, 2, 3, 4, generator=g) / 2 + 0.25, masks=masks)
    padding = torch.zeros(2, 16, 24, dtype=torch.bool)
    padding[1, :, 20:] = True
    return stages, padding


@pytest.mark.parametrize("at_once", [1, 700, 2**24])
def test_scores_are_multiplied_by_the_quality_of_masks(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query by query, however many are computed at once; the order is that of the products. Boxes and labels go along."""
    monkeypatch.setattr(instance_masks, "PIXELS_AT_ONCE", at_once)
    largest: list[int] = []
    monkeypatch.setattr(instance_masks, "mask_quality", lambda logits: largest.append(logits.numel()) or mask_quality(logits))
    stages, padding = some_stages()
    sizes = [(32, 48), (20, 20)]
    plain = postprocess(replace(stages, masks=None), sizes, top=5)
    for i, found in enumerate(postprocess(stages, sizes, 5, padding=padding)):
        assert found.masks is not None and len(found.masks) == 5 == len(found.scores)
        expected = []
        for box, score, label in zip(plain[i].boxes_xyxy, plain[i].scores.tolist(), plain[i].labels.tolist(), strict=True):
            query = int((stages.logits[-1, i, :, label].sigmoid() - score).abs().argmin())
            logits = torch.einsum("d,dhw->hw", stages.masks.queries[-1, i, query], stages.masks.pixels[i])  # type: ignore[union-attr]
            mask = torch.tensor(slow.original(logits.tolist(), (16, 24), (16, 24 if i == 0 else 20), sizes[i]))
            expected.append((score * slow.quality(mask.tolist()), label, box, mask > 0))
        expected.sort(key=lambda one: -one[0])
        assert found.scores.tolist() == pytest.approx([score for score, *_ in expected], rel=1e-5)
        assert found.labels.tolist() == [label for _, label, *_ in expected]
        torch.testing.assert_close(found.boxes_xyxy, torch.stack([box for *_, box, _ in expected]))
        for mask, (*_, other) in zip(found.masks, expected, strict=True):
            assert mask.shape == sizes[i] and (torch.from_numpy(mask) != other).float().mean() < 0.002
    assert max(largest) <= max(at_once, 32 * 48)
    every, without = (postprocess(stages, sizes, 5, padding=padding, masks=masks) for masks in (True, False))
    assert all(one.masks is None and torch.equal(one.scores, other.scores) for one, other in zip(without, every, strict=True))


def test_suppression_takes_masks_along() -> None:
    stages, padding = some_stages()
    stages = replace(stages, boxes=stages.boxes[:, :, :1].expand(-1, -1, 3, -1))
    every, kept = (postprocess(stages, [(9, 9), (9, 9)], 6, nms, padding) for nms in (None, 0.5))
    for all_of, few in zip(every, kept, strict=True):
        assert all_of.masks is not None and few.masks is not None and len(few.masks) == len(few.scores) == 2  # one of each class
        rows = [int((all_of.scores == score).nonzero()[0]) for score in few.scores]
        assert few.masks.as_coco() == all_of.masks.take(np.array(rows)).as_coco()


def test_masks_need_the_padding() -> None:
    with pytest.raises(ValueError, match="postprocess needs their padding"):
        postprocess(some_stages()[0], [(9, 9), (9, 9)])


def test_a_mask_that_is_not_finite_is_no_detection() -> None:
    """An overflow would be a mask without a pixel, and a score of 0."""
    stages, padding = some_stages()
    broken = replace(stages.masks, pixels=stages.masks.pixels.clone())  # type: ignore[type-var, union-attr]
    broken.pixels[1, 0, 0, 0] = torch.nan

    class Broken(nn.Module):
        def forward(self, images: Tensor, padding: Tensor) -> Stages:
            return replace(stages, masks=broken)

    batch = replace(make_batch((1, 1)), padding=padding)
    with pytest.raises(NotFiniteError, match="detections of image 1 are not finite"):
        collect(prediction_function(Broken(), "cpu"), [batch])  # type: ignore[arg-type]


# Evaluation


class Oracle(nn.Module):
    """Finds every object: of the images that a loader gives, in order, its own masks and boxes."""

    def __init__(self, data: Dataset, resize: FixedSize) -> None:
        super().__init__()
        self.batches = iter(EvalLoader(data, DataConfig(resize=resize, workers=0), 1, masks=True))

    def forward(self, images: Tensor, padding: Tensor) -> Stages:
        targets = next(self.batches).targets
        assert targets.masks is not None and len(images) == 1
        logits = torch.full((1, 1, len(targets.labels), len(NAMES)), -9.0)
        logits[0, 0, torch.arange(len(targets.labels)), targets.labels] = 9
        pixels = (targets.masks.float() * 20 - 10)[None]
        return Stages(logits, targets.boxes[None, None], masks=MaskPredictions(torch.eye(len(targets.labels))[None, None], pixels))


@pytest.mark.parametrize(("size", "least"), [((96, 96), 99.9), ((160, 144), 90), ((64, 64), 70)])
def test_true_masks_are_found_again_at_the_original_size(size: tuple[int, int], least: float) -> None:
    """Exactly where nothing is resized, nearly where images are."""
    data = open_data("shapes:size=96,images=10", "val", masks=True)
    resize = FixedSize(*size)
    loader = EvalLoader(data, DataConfig(resize=resize, workers=0), 1)
    results = collect(prediction_function(Oracle(data, resize), "cpu", masks=True), loader)  # type: ignore[arg-type]
    found = evaluate(results, data.index)
    assert found.segm_ap > least and found.segm_ap50 > 99 and found.ap > 99.9
    assert results.masks is not None and results.masks.texts.values.nbytes < 100 * len(results.masks)


def test_a_checkpoint_is_evaluated_with_masks(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the data has any; where it has not, that is said, and scores and AP of boxes are the same."""
    options = {"workers": 0, "device": "cpu"}
    shapes = "shapes:size=64,images=6,classes=5"
    output = tmp_path / "metrics.json"
    found = evaluate_checkpoint(checkpoint, shapes, output=output, **options)  # type: ignore[arg-type]
    written, rows = json.loads(output.read_text()), json.loads((tmp_path / "metrics.results.json").read_text())
    assert written["segm_ap"] == found.segm_ap >= 0 and "segm_per_class" in written and len(rows) == 54
    assert all(row["segmentation"]["size"] == [64, 64] for row in rows)
    assert sum(float(reference.area(row["segmentation"])) for row in rows) > 0
    main(["eval", str(checkpoint), "--data", shapes, "--workers", "0", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "segm AP50" in said and "segm AP " in said
    voc_folder(tmp_path / "voc")
    sentences: list[str] = []
    with pytest.raises(ValueError, match="the data has others"):
        evaluate_checkpoint(checkpoint, str(tmp_path / "voc"), "train", say=sentences.append, **options)  # type: ignore[arg-type]
    assert "masks are not measured: " in sentences[0] and "this is VOC" in sentences[0]


# Predictions


def found_in(checkpoint: Path, images: Path) -> Detections:
    return steadydetr.load(checkpoint, "cpu").predict(images / "0.png", threshold=0)


def test_detections_have_masks_in_all_that_is_made_of_them(checkpoint: Path, images: Path) -> None:
    found = found_in(checkpoint, images)
    pixels = found.decode_masks()
    assert pixels.shape == (9, 40, 60) and pixels.dtype == bool and len({mask.tobytes() for mask in pixels}) > 2
    assert pixels.any() and not pixels.all()
    for part, rows in (
        (found[2:5], [2, 3, 4]),
        (found[[7, 0]], [7, 0]),
        (found[found.scores > found.scores[4]], [0, 1, 2, 3]),
        (found.above(float(found.scores[3])), [0, 1, 2, 3]),
        (found.of_classes(found.class_names[0]), [i for i, name in enumerate(found.class_names) if name == found.class_names[0]]),
        (found.clipped(), list(range(9))),
        (found[[]], []),
    ):
        assert (part.decode_masks() == pixels[rows]).all() and part.decode_masks().shape == (len(rows), 40, 60)
    assert [(one.mask == mask).all() for one, mask in zip(found, pixels, strict=True)] == [True] * 9
    for row, mask in zip(json.loads(found.to_json()), pixels, strict=True):
        assert (reference.decode(row["segmentation"]) == mask).all()
    assert (found.to_supervision().mask == pixels).all() and "segmentation" not in found.to_columns()
    plain = replace(found, masks=None)
    assert "segmentation" not in plain.to_dicts()[0] and next(iter(plain)).mask is None and plain.to_supervision().mask is None
    for make in (plain.decode_masks, plain.label_map):
        with pytest.raises(ValueError, match="these detections have no masks"):
            make()


def test_a_label_map_gives_a_pixel_to_the_highest_score(checkpoint: Path, images: Path) -> None:
    found = found_in(checkpoint, images)
    numbers, pixels = found.label_map(), found.decode_masks()
    first = np.where(pixels.any(0), pixels.argmax(0) + 1, 0)
    assert numbers.dtype == np.uint16 and (numbers == first).all() and numbers.any()


def test_drawn_masks_are_a_colour_with_an_edge(checkpoint: Path, images: Path) -> None:
    """Within a mask the picture shows through, at its edge it does not; outside it stays as it was."""
    found = found_in(checkpoint, images)
    k = int(np.argmin(np.abs(found.decode_masks().mean((1, 2)) - 0.4)))
    one = replace(found[k : k + 1], boxes_xyxy=torch.zeros(1, 4))
    drawn, before = (np.asarray(image).astype(int) for image in (one.draw(images / "0.png", 0), Image.open(images / "0.png")))
    mask, changed = one.decode_masks()[0], (drawn != before).any(-1)
    below = slice(24, None)  # of the caption
    assert not changed[below][~mask[below]].any() and changed[below][mask[below]].mean() > 0.95
    colours = np.unique(drawn[below][mask[below]], axis=0)
    assert len(colours) > 3  # the picture below shows
    assert (replace(one, masks=None).draw(images / "0.png", 0).tobytes()) != one.draw(images / "0.png", 0).tobytes()


def test_files_of_masks(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """A map for each image of what its picture shows, in a folder of its own; every mask in the results."""
    detector = steadydetr.load(checkpoint, "cpu")
    threshold = float(detector.predict(images / "0.png", 0).scores[4])
    predict_files(detector, [images, images / "0.png"], tmp_path / "out", threshold=threshold)
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["0.png", "0_png.png", "1.png"]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    for name, number in (("0", 1), ("1", 2)):
        found = detector.predict(images / f"{name}.png", 0)
        with Image.open(tmp_path / "out" / "masks" / f"{name}.png") as image:
            assert (np.asarray(image) == found.above(threshold).label_map()).all() and image.mode.startswith("I")
        masks = [row["segmentation"] for row in rows if row["image_id"] == number]
        assert (np.stack([reference.decode(mask) for mask in masks]) == found.decode_masks()).all()
    main(["predict", str(checkpoint), str(images), "--output", str(tmp_path / "bare"), "--no-masks", "--device", "cpu"])
    assert not (tmp_path / "bare" / "masks").exists() and (tmp_path / "bare" / "0.png").exists()


def test_a_map_of_masks_never_replaces_an_image_that_is_read(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    images.rename(tmp_path / "masks")
    before = (tmp_path / "masks" / "0.png").read_bytes()
    predict_files(steadydetr.load(checkpoint, "cpu"), [tmp_path / "masks"], tmp_path, overwrite=True, draw=False)
    assert (tmp_path / "masks" / "0.png").read_bytes() == before and (tmp_path / "masks" / "0_png.png").exists()


# Runs


def measured(folder: Path, masks: bool) -> dict[str, object]:
    """A run of two steps, and the record of its evaluation."""
    recipe = tiny(epochs=1, stability_images=0)
    data = replace(recipe.data, source="shapes:size=64,images=8", workers=0, masks=masks)
    steadydetr.train(replace(recipe, data=data), folder, device="cpu")
    record = read_run(folder, folder.name).last("eval", "model")
    assert record is not None
    return record


def test_a_run_records_ap_of_masks(masked: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In metrics.jsonl, in summary.json, and on the console."""
    record, summary = measured(tmp_path / "run", True), json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"segm_ap", "segm_ar_large", "segm_per_class"} <= set(record)
    assert {"segm_ap", "segm_ap50", "segm_ap75", "segm_per_class"} <= set(summary)
    said = capsys.readouterr()
    assert "segm AP" in said.out + said.err


@pytest.mark.slow
def test_a_run_shows_masks(masked: None, tmp_path: Path) -> None:
    """In the report and in pictures; a run without masks has none of it."""
    records = [measured(tmp_path / name, masks) for name, masks in (("with", True), ("without", False))]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("with", "without")]
    assert not any(name.startswith("segm") for name in (*records[1], *summaries[1]))
    assert records[0]["ap"] == records[1]["ap"]  # masks are not learned here, and change no box
    main(["report", str(tmp_path / "with"), str(tmp_path / "without"), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "segm AP50" in page and "segm AR100" in page
    main(["report", str(tmp_path / "without"), "--output", str(tmp_path / "plain.html")])
    assert "segm" not in (tmp_path / "plain.html").read_text()
    pictures = [np.asarray(Image.open(tmp_path / name / "predictions.png")) for name in ("with", "without")]
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any(-1).mean() > 0.01
