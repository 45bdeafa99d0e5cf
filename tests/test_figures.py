"""Figures of the papers, drawn of runs, as files; sampling points and feature masks."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import load_detector, save_detector
from steadydetr.cli import main
from steadydetr.cli.figures import DESCRIPTION
from steadydetr.data import DataConfig, FixedSize, open_data
from steadydetr.detectors import AdaMixerConfig, DetectorConfig
from steadydetr.drawing import paper_figures
from steadydetr.drawing.example_images import first_objects
from steadydetr.drawing.feature_masks import MASK_FIGURES
from steadydetr.drawing.panels import REPORT_FIGURES, Line, Panel
from steadydetr.drawing.panels.stability import instability_by_stage
from steadydetr.drawing.paper_figures import write_figures
from steadydetr.drawing.plot import plot_panel
from steadydetr.drawing.sampling_points import draw_sampling_points, plot_sampling_points
from steadydetr.learning.criterion import Criterion
from steadydetr.metrics.feature_masks import TeacherView, view_of_teacher
from steadydetr.metrics.sampling_points import SamplingPoints, sampling_points_of
from steadydetr.runs.records import read_runs_at_epochs
from steadydetr.training.loop import train
from tests.conftest import CLASSES, DETECTORS, make_batch
from tests.reference.features import dot
from tests.test_distill_training import save_teacher
from tests.test_train import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("figures") / "run"
    train(tiny(epochs=2, ema_decay=0.9, stability_images=5), folder, device="cpu")
    yield folder


def test_every_figure_is_drawn(run: Path, tmp_path: Path) -> None:
    written, missing = write_figures([run], tmp_path, data="shapes:size=64,images=5", objects=2, teacher=str(run))
    names = ["ap-around-drop", "unstable-score", "instability-by-stage", "instability", "consistency", "sampling-points"]
    names += ["query-masks", "level-masks", "activation"]
    assert [path.stem for path in written] == names and not missing
    for path in written:
        with Image.open(path) as image:
            low, high = image.convert("L").getextrema()
            assert min(image.size) > 200 and low < high


def test_a_run_as_it_was_after_an_epoch(run: Path, tmp_path: Path) -> None:
    """DETRDistill's Fig. 7 compares a student after its first epoch with models at their end."""
    (whole,), (early,) = read_runs_at_epochs([run, Path(f"{run}@1")])
    assert (whole.label, early.label, early.epochs_done) == ("run", "run after epoch 1", 1) and whole.epochs_done == 2
    last, first = (measured["between_stages"] for measured in whole.of("stability", "model")[::-1])
    [panel] = instability_by_stage([whole, early])
    drawn = {line.label: list(line.y) for line in panel.lines if line.weights == "model"}
    assert drawn == {"run": last, "run after epoch 1": first} and first != last
    assert {record["epoch"] for record in early.by_kind["train"]} == {0} and early.by_kind["eval"] == whole.by_kind["eval"][:2]
    written, missing = write_figures([run, Path(f"{run}@1")], tmp_path / "both")
    assert "instability-by-stage" in [path.stem for path in written] and missing["sampling-points"] == "needs --data"
    assert "not cut by @" in write_figures([Path(f"{run}@1")], tmp_path / "cut", data="shapes:size=64,images=5")[1]["query-masks"]
    with pytest.raises(ValueError, match=r"run@9: the run was not measured after epoch 9; it was after 1, 2$"):
        read_runs_at_epochs([Path(f"{run}@9")])
    with pytest.raises(FileNotFoundError, match="gone holds no run"):
        read_runs_at_epochs([tmp_path / "gone@1"])


def test_every_figure_has_a_name_of_its_own_and_is_in_the_help() -> None:
    names = [figure.name for figure in REPORT_FIGURES] + list(MASK_FIGURES)
    assert len(set(names)) == len(names)
    for figure in REPORT_FIGURES:
        assert not figure.paper or f"{figure.paper}:" in next(
            line for line in DESCRIPTION.splitlines() if line.startswith(f"{figure.name} ")
        )


def test_what_cannot_be_drawn_is_said(run: Path, tmp_path: Path) -> None:
    without = tmp_path / "run"
    without.mkdir()
    (without / "config.json").write_bytes((run / "config.json").read_bytes())
    with redirect_stdout(io.StringIO()) as out:
        main(["figures", str(without), "--output", str(tmp_path / "out"), "--format", "svg"])
    assert "No instability: needs two measurements" in out.getvalue() and "needs --data" in out.getvalue()
    with pytest.raises(SystemExit):
        main(["figures"])


def test_seeds_are_faint_and_their_mean_stands_out() -> None:
    lines = (Line("a/seed0", "ema", [1, 2], [0.0, 4.0]), Line("a/seed1", "ema", [2, 3], [2.0, 5.0]), Line("b", "ema", [1], [7.0]))
    axes = Figure().subplots()
    plot_panel(axes, Panel("AP", "epoch", lines, ""), {"a/seed0": "red", "a/seed1": "red", "b": "blue"})
    drawn = [(list(line.get_xdata()), list(line.get_ydata()), line.get_alpha()) for line in axes.lines]
    assert [(x, y) for x, y, alpha in drawn if alpha > 0.5] == [([2], [3.0]), ([1], [7.0])]
    assert [(x, y) for x, y, alpha in drawn if alpha < 0.5] == [([1, 2], [0.0, 4.0]), ([2, 3], [2.0, 5.0])]


def test_a_run_leaves_its_sampling_points(run: Path) -> None:
    with Image.open(run / "sampling.png") as image:
        assert image.width > 600  # two columns: trained and averaged weights


def test_sampling_points_are_those_of_the_attention(detector_config: DetectorConfig) -> None:
    """Weights of a head sum to 1; an untrained query samples around its reference; levels, heads and points are all there."""
    torch.manual_seed(0)
    detector, batch = detector_config.build(CLASSES), make_batch((3,))
    if not detector.samples_points:
        with pytest.raises(ValueError, match=f"{detector.architecture} has no deformable attention, so no sampling points to draw"):
            detector.record_sampling_points()
        return
    seen = sampling_points_of(detector, Criterion(), batch, 1)
    assert seen is not None
    config = detector_config
    heads, points = (config.groups, config.in_points) if isinstance(config, AdaMixerConfig) else (config.heads, 2)
    assert len(seen.points) == heads * config.levels * points == len(seen.weights)
    assert float(seen.weights.sum()) == pytest.approx(heads, rel=1e-5)
    assert torch.allclose(seen.points.mean(0), seen.reference, atol=0.3)
    assert 0 <= seen.score <= 1 and detector.training
    with pytest.raises(ValueError, match="has 3 objects"):
        sampling_points_of(detector, Criterion(), batch, 3)


def test_the_highest_weights_are_drawn_last() -> None:
    """What is drawn later covers what is drawn earlier, and each point has the colour of its own weight."""
    points, weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]]), torch.tensor([0.3, 0.9, 0.1, 0.5])
    box = torch.tensor([0.2, 0.2, 0.6, 0.6])
    axes = Figure().subplots()
    picture = torch.zeros(50, 100, 3, dtype=torch.uint8).numpy()
    plot_sampling_points(axes, picture, SamplingPoints(points, weights, torch.tensor([0.5, 0.5]), box, 0.4, 0.2), box, "model")
    [drawn] = axes.collections
    assert drawn.get_array().tolist() == pytest.approx([0.1, 0.3, 0.5, 0.9])
    assert drawn.get_offsets().tolist() == [pytest.approx(place) for place in ([50, 30], [10, 10], [70, 40], [30, 20])]
    outlines = [patch.get_bbox().bounds for patch in axes.patches]
    assert outlines == [pytest.approx((20, 10, 40, 20))] * 2


def test_points_are_of_the_image_not_of_its_padding() -> None:
    """The same image with and without padding on its right is looked at in the same places."""
    torch.manual_seed(0)
    detector = DETECTORS["deformable"].build(CLASSES)
    plain = make_batch((2,))
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    padding[..., 64:] = True
    padded = replace(plain, images=torch.cat((plain.images, torch.zeros(1, 3, 64, 32)), 3), padding=padding)
    one, other = (sampling_points_of(detector, Criterion(), batch, 0) for batch in (plain, padded))
    assert one is not None and other is not None
    assert torch.allclose(one.reference, other.reference, atol=1e-5)
    assert torch.allclose(other.points.mean(0), other.reference, atol=0.3)


def test_an_object_may_be_left_without_a_query(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = replace(DETECTORS["deformable"], queries=2).build(CLASSES)
    found = [sampling_points_of(detector, Criterion(), make_batch((3,)), target) for target in range(3)]
    assert sum(points is None for points in found) == 1
    data = open_data("shapes:size=64,images=40,most=6", "val")
    single = replace(DETECTORS["deformable"], queries=1).build(6)
    draw_sampling_points(
        {"a": single}, Criterion(), data, DataConfig(resize=FixedSize(64, 64), workers=0), tmp_path / "points.png", objects=4
    )
    assert (tmp_path / "points.png").exists()


def test_the_key_fits_below_one_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("steadydetr.drawing.plot.save_figure", lambda figure, _: figures.append(figure))
    data = open_data("shapes:size=64,images=2", "val")
    config = DataConfig(resize=FixedSize(64, 64), workers=0)
    draw_sampling_points({"a": DETECTORS["dino"].build(6)}, Criterion(), data, config, tmp_path / "points.png", objects=1)
    (figure,) = figures
    figure.draw_without_rendering()
    (key,) = (text for text in figure.texts if text.get_text().startswith("dots"))
    around = key.get_window_extent()
    assert around.x0 >= 0 and around.x1 <= figure.bbox.x1


def test_images_without_objects_draw_nothing(tmp_path: Path) -> None:
    data = open_data("shapes:size=64,images=2", "val")
    config = DataConfig(resize=FixedSize(64, 64), workers=0)
    draw_sampling_points({"a": DETECTORS["dino"].build(6)}, Criterion(), data, config, tmp_path / "none.png", objects=0)
    assert not (tmp_path / "none.png").exists()


def test_masks_need_a_teacher_that_is_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs' own is taken; without one, or where it is gone, the other figures are drawn all the same."""
    monkeypatch.setattr(paper_figures, "_models_that_sample_points", lambda *_: ({}, Path()))
    monkeypatch.setattr(paper_figures, "draw_feature_masks", lambda teacher, *_: [tmp_path / f"{type(teacher).__name__}.png"])
    data = "shapes:size=64,images=5"
    missing = write_figures([run], tmp_path / "out", data=data)[1]
    assert missing == dict.fromkeys(MASK_FIGURES, "needs a run with a trained teacher, or --teacher CHECKPOINT") | {
        "sampling-points": "needs a detector with deformable attention"
    }
    taught = tmp_path / "taught"
    shutil.copytree(run, taught)
    plain = json.loads((taught / "config.json").read_text())
    for checkpoint, drawn in ((run, True), (tmp_path / "nowhere", False)):
        plain["recipe"]["teachers"] = [{"kind": "trained-teacher", "checkpoint": str(checkpoint)}]
        (taught / "config.json").write_text(json.dumps(plain))
        written, missing = write_figures([taught], tmp_path / "out", data=data)
        assert ("DINO" in [path.stem for path in written]) == drawn
        assert drawn or "nowhere does not exist" in missing["activation"]


def test_a_strangers_run_names_no_teacher_in_the_network(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of another machine would be told who asks; what is no path at all is a mistake of the file."""
    monkeypatch.setattr(paper_figures, "_models_that_sample_points", lambda *_: ({}, Path()))
    plain = json.loads((shutil.copytree(run, tmp_path / "run") / "config.json").read_text())
    for teachers in ([{"checkpoint": "//host/share"}], [{"checkpoint": 5}], "//host/share", [[]]):
        plain["recipe"]["teachers"] = teachers
        (tmp_path / "run/config.json").write_text(json.dumps(plain))
        if isinstance(teachers[0], dict) and teachers[0]["checkpoint"] != 5:
            missing = write_figures([tmp_path / "run"], tmp_path / "out", data="shapes:size=64,images=5")[1]
            assert "'//host/share' is a place in the network: give it as --teacher, if you trust it" in missing["activation"]
        else:
            with pytest.raises(ValueError, match=r"config\.json: recipe: .*\$\.teachers"):
                write_figures([tmp_path / "run"], tmp_path / "out", data="shapes:size=64,images=5")


@pytest.mark.parametrize("more", [(), ("more",)])
def test_masks_are_of_the_objects_of_the_data(more: tuple[str, ...], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that knows the classes in another order, and one more, answers as one that knows those of the data."""
    data = open_data("shapes:size=64,images=5", "val")
    classes = (*more, *reversed(data.index.classes))
    _, batch, _ = next(first_objects(data, DataConfig(resize=FixedSize(64, 64), workers=0), 1))
    plain = load_detector(save_teacher(tmp_path / "plain", DETECTORS["refine"], data.index.classes)).detector
    other = DETECTORS["refine"].build(len(classes))
    state = plain.state_dict()
    for name in (name for name in state if "class_heads" in name):
        rows = [torch.zeros_like(state[name][0]) if kind in more else state[name][data.index.classes.index(kind)] for kind in classes]
        state[name] = torch.stack(rows)
    other.load_state_dict(state)
    save_detector(tmp_path / "other", other.state_dict(), DetectorCard(DETECTORS["refine"], classes, tuple(range(len(classes)))))
    drawn: list[TeacherView] = []
    monkeypatch.setattr(paper_figures, "_models_that_sample_points", lambda *_: ({}, Path()))
    monkeypatch.setattr(
        paper_figures, "draw_feature_masks", lambda teacher, *_: drawn.append(view_of_teacher(teacher, Criterion(), batch)) or []
    )
    for name in ("plain", "other"):
        _, missing = write_figures([run], tmp_path / "out", data="shapes:size=64,images=5", teacher=str(tmp_path / name))
        assert not set(MASK_FIGURES) & missing.keys()
    assert drawn[0].quality.count_nonzero() and torch.equal(drawn[0].quality, drawn[1].quality)


def test_a_teacher_of_other_classes_draws_no_masks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_figures, "_models_that_sample_points", lambda *_: ({}, Path()))
    strangers = save_teacher(tmp_path / "strangers", DETECTORS["refine"], ("cat", "dog"))
    _, missing = write_figures([run], tmp_path / "out", data="shapes:size=64,images=5", teacher=strangers)
    assert all("strangers knows the classes ['cat', 'dog'], but not" in missing[name] for name in MASK_FIGURES)


def test_masks_are_products_of_queries_and_tokens(detector_config: DetectorConfig) -> None:
    """Of the last stage; all queries by their quality, which only matched ones have; maps without padding."""
    torch.manual_seed(0)
    teacher, plain = detector_config.build(CLASSES), make_batch((3,))
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    padding[..., 64:] = True
    batch = replace(plain, images=torch.cat((plain.images, torch.zeros(1, 3, 64, 32)), 3), padding=padding)
    found = view_of_teacher(teacher, Criterion(), batch)
    assert teacher.training and 0 < len(found.quality.nonzero()) <= 3
    tokens, queries = found.memory.tokens[0].tolist(), found.queries.tolist()
    for q in (0, 5):
        assert found.masks[q].tolist() == pytest.approx([dot(token, queries[q]) for token in tokens], abs=1e-4)
    weighted = sum(w * mask for w, mask in zip(found.quality.tolist(), found.masks, strict=True))
    assert torch.allclose(found.weighted, weighted, atol=1e-4)
    assert [m.shape for m in found.levels(found.weighted)] == [(64 // stride, 64 // stride) for stride in teacher.strides]
    width = 96 // teacher.strides[0]  # of the finest level, of which two thirds are image
    last = found.weighted[: width * 64 // teacher.strides[0]][width * 2 // 3 - 1 :: width]
    assert torch.equal(found.levels(found.weighted)[0][:, -1], last)


def test_levels_are_averaged_at_the_size_of_the_finest() -> None:
    torch.manual_seed(0)
    found = view_of_teacher(DETECTORS["refine"].build(CLASSES), Criterion(), make_batch((1,)))
    lengths = [h * w for h, w in found.memory.levels]
    values = torch.cat([torch.full((n,), value) for n, value in zip(lengths, (1.0, 2.0, 6.0), strict=True)])
    assert torch.allclose(found.over_levels(values), torch.full((8, 8), 3.0))
