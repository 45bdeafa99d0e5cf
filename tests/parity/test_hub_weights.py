"""Small random models of the transformers package, read from folders and from a server that stands for the Hub, predict what theirs do."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.convert import convert_file
from steadydetr.checkpoints.folder import load_detector, save_detector
from steadydetr.checkpoints.weights import TrainedWeights, read_weights
from steadydetr.cli import main
from steadydetr.data.coco_classes import IDS, NAMES
from steadydetr.data.transforms import FixedSize, ShortestSide
from tests.conftest import DETECTORS
from tests.parity.test_transformers import CLASSES, QUERIES, VARIANTS, batch, peer
from tests.servers import closed_port, of_repository, serving, use_hub

transformers = pytest.importorskip("transformers")

THINGS = tuple(f"thing {i}" for i in range(CLASSES))


def saved(folder: Path, variant: str = "plain", names: tuple[str, ...] = THINGS, **config: Any) -> Any:
    """A random model of theirs with its names and its image processor, in a folder."""
    model = peer(variant).float()
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    transformers.DeformableDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder)
    change(folder / "config.json", **config)
    return model


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def check_predictions(found: TrainedWeights, model: Any) -> None:
    given = batch()
    detector = found.card.detector.build(len(found.card.classes)).eval()
    detector.load_state_dict(found.state)
    images = given.images.float()
    with torch.no_grad():
        ours = detector(images, given.padding)
        theirs = model(pixel_values=detector.normalise(images, given.padding), pixel_mask=(~given.padding).long())
    torch.testing.assert_close(ours.logits[-1], theirs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.boxes[-1], theirs.pred_boxes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_repository_of_theirs(variant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Heads, queries, names and sizes come from its configs; once it is in the cache, no network is needed."""
    model = saved(tmp_path / "theirs", variant)
    with serving(of_repository("owner/name", tmp_path / "theirs")) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        found = read_weights("hub:owner/name")
        assert read_weights("hub:owner/name@main").card == found.card
    assert found.where == "hub:owner/name" and found.card.detector.queries == QUERIES  # type: ignore[attr-defined]
    assert found.card.classes == THINGS and found.card.category_ids == (0, 1, 2, 3, 4) and found.card.resize == ShortestSide(96, 160)
    check_predictions(found, model)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it tries again"))
    assert read_weights("hub:owner/name").card == found.card


def test_a_repository_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = DETECTORS["dino"]
    card = DetectorCard(config, ("cat", "dog"), (3, 7), FixedSize(64, 48), top=50, nms=0.7)
    state = config.build(2).state_dict()
    save_detector(tmp_path / "ours", state, card)
    with serving(of_repository("owner/name", tmp_path / "ours")) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        found = read_weights("hub:owner/name")
    assert found.card == card and found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], value) for name, value in state.items())


@pytest.mark.parametrize("named", ["", "model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_theirs(named: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "theirs", "two_stage")
    if named == "pytorch_model.bin":
        (tmp_path / "theirs" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "theirs" / named)
    found = read_weights(tmp_path / "theirs" / named)
    assert found.card.classes == THINGS and found.card.resize == ShortestSide(96, 160)
    check_predictions(found, model)


def test_convert_reads_their_configs_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "theirs", "two_stage")
    main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert "5 classes" in capsys.readouterr().out
    loaded = load_detector(tmp_path / "ours")
    assert loaded.card.classes == THINGS
    check_predictions(TrainedWeights(loaded.card, loaded.detector.state_dict(), ""), model)
    (tmp_path / "names.txt").write_text("\n".join("abcde"))
    words = ["convert", str(tmp_path / "theirs"), str(tmp_path / "other"), "--classes", str(tmp_path / "names.txt"), "--queries", "7"]
    main(words)
    card = load_detector(tmp_path / "other").card
    assert card.classes == tuple("abcde") and card.detector.queries == 7  # type: ignore[attr-defined]


def test_refinement_that_starts_from_equal_heads(tmp_path: Path) -> None:
    """Their heads of all stages are equal before training, and then only the config tells that they are not shared."""
    model = saved(tmp_path / "theirs", "refine")
    state = model.state_dict()
    for name in [name for name in state if "_embed.0." in name]:
        for stage in (1, 2):
            state[name.replace("_embed.0.", f"_embed.{stage}.")].copy_(state[name])
    (tmp_path / "theirs" / "model.safetensors").unlink()
    torch.save(
        {name: value for name, value in state.items() if ".decoder.bbox_embed." not in name}, tmp_path / "theirs" / "pytorch_model.bin"
    )
    found = read_weights(tmp_path / "theirs")
    assert found.card.detector.refine  # type: ignore[attr-defined]
    check_predictions(found, model)


def coco_names() -> tuple[str, ...]:
    by_id = dict(zip(IDS, NAMES, strict=True))
    return tuple(by_id.get(i, "N/A") for i in range(91))


@pytest.mark.parametrize(
    ("names", "rows", "classes", "ids"),
    [
        (coco_names(), 91, tuple(f"unused {i}" if name == "N/A" else name for i, name in enumerate(coco_names())), tuple(range(91))),
        (NAMES, 80, NAMES, IDS),
        (tuple(f"LABEL_{i}" for i in range(3)), 3, ("class 0", "class 1", "class 2"), (1, 2, 3)),
    ],
)
def test_names_of_coco_and_placeholders(
    names: tuple[str, ...], rows: int, classes: tuple[str, ...], ids: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tests.parity.test_transformers.CLASSES", rows)
    saved(tmp_path, names=names)
    card = read_weights(tmp_path).card
    assert card.classes == classes and card.category_ids == ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "detr", "architectures": ["DetrForSegmentation"]}, "another architecture, DetrForSegmentation; .* alone are read"),
        ({"model_type": "rt_detr", "architectures": None}, "another architecture, rt_detr"),
        ({"architectures": ["DeformableDetrModel"]}, "another architecture, DeformableDetrModel"),
        ({"architectures": 7}, "another architecture, deformable_detr"),
        ({"dilation": True}, "dilation = True, which is not built here; only False is"),
        ({"position_embedding_type": "learned"}, "position_embedding_type = learned"),
        ({"encoder_attention_heads": 2}, "different numbers of heads"),
        ({"encoder_attention_heads": "4"}, "encoder_attention_heads = 4 is no number"),
        ({"two_stage_num_proposals": 0}, "two_stage_num_proposals = 0 is no number"),
        ({"id2label": ["a"]}, "id2label does not name the classes 0, 1, 2"),
        ({"id2label": {"1": "a"}}, "id2label does not name the classes 0, 1, 2"),
        ({"id2label": {"0": "a", "1": "b"}}, "5 class rows, but id2label in config.json names 2"),
        ({"id2label": {str(i): "a" for i in range(5)}}, "several classes one name in id2label: a"),
        ({"id2label": {}}, "id2label does not name"),
    ],
)
def test_repositories_that_are_refused(fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Most before their weights are fetched."""
    saved(tmp_path / "theirs", **fields)
    with serving(of_repository("owner/name", tmp_path / "theirs")) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        with pytest.raises(ValueError, match=rf"^hub:owner/name: .*{message}"):
            read_weights("hub:owner/name")
        assert ("rows" in message) == any("safetensors" in line for line in server.asked)
    with pytest.raises(ValueError, match=message):
        convert_file(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    ("fields", "resize"),
    [
        ({"size": {"height": 64, "width": 80}}, FixedSize(64, 80)),
        ({"size": 96, "max_size": 128}, ShortestSide(96, 128)),  # of old versions
        ({"size": {"shortest_edge": 96, "longest_edge": None}}, ShortestSide(96, 2**14)),
        ({"size": {"max_height": 96, "max_width": 96}}, ShortestSide()),
        ({"size": None}, ShortestSide()),
    ],
)
def test_sizes_of_their_image_processors(fields: dict[str, Any], resize: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path / "preprocessor_config.json", **fields)
    assert read_weights(tmp_path).card.resize == resize


@pytest.mark.parametrize(
    ("fields", "mean", "std"),
    [
        ({}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1]}, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)),
        ({"do_normalize": False}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_pixels_are_normalised_as_by_their_image_processors(fields: dict[str, Any], mean: object, std: object, tmp_path: Path) -> None:
    """Also after conversion, and by the detector that is built."""
    saved(tmp_path / "theirs")
    change(tmp_path / "theirs" / "preprocessor_config.json", **fields)
    convert_file(tmp_path / "theirs", tmp_path / "ours")
    for found in (read_weights(tmp_path / "theirs").card, load_detector(tmp_path / "ours").card):
        assert (found.detector.backbone.mean, found.detector.backbone.std) == (mean, std)
    detector = load_detector(tmp_path / "ours").detector
    assert (tuple(detector.mean.flatten().tolist()), tuple(detector.std.flatten().tolist())) == (pytest.approx(mean), pytest.approx(std))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, r"preprocessor_config\.json is damaged: image_mean = \[0\.5, 0\.5\] is not three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, r"preprocessor_config\.json is damaged: image_std"),
        ({"size": {"height": 0, "width": 80}}, r"preprocessor_config\.json: .*height"),
    ],
)
def test_image_processors_that_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path / "preprocessor_config.json", **fields)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path)


def test_a_command_writes_a_repository_as_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "theirs", "refine")
    with serving(of_repository("owner/name", tmp_path / "theirs")) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        main(["weights", "hub:owner/name", "--output", str(tmp_path / "ours")])
    assert "hub:owner/name: DeformableDETR, " in capsys.readouterr().out
    loaded = load_detector(tmp_path / "ours")
    check_predictions(TrainedWeights(loaded.card, loaded.detector.state_dict(), ""), model)


def test_without_a_network_it_is_said_what_to_bring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use_hub(monkeypatch, closed_port(), tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it tries again"))
    with pytest.raises(SystemExit) as end:
        main(["weights", "hub:owner/name", "--output", str(tmp_path / "ours")])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "steadydetr weights: hub:owner/name: 127.0.0.1 cannot be reached (Connection refused). Without a network, bring config.json and"
        " model.safetensors of https://huggingface.co/owner/name in a folder, and name that\n"
    )


def test_a_repository_whose_weights_are_not_finite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = DETECTORS["deformable"]
    state = config.build(1).state_dict()
    state["level_embed"] = torch.full_like(state["level_embed"], torch.nan)
    save_detector(tmp_path / "ours", state, replace(DetectorCard(config, ("cat",), (1,))))
    with serving(of_repository("owner/name", tmp_path / "ours")) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        with pytest.raises(ValueError, match=r"^hub:owner/name: .*is of no use: 1 of \d+ tensors \(level_embed\)"):
            read_weights("hub:owner/name")
