"""What a detector takes from the weights of another one: classes by name, rows of queries and levels, stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.class_names import folded, joined_classes, match_classes
from steadydetr.checkpoints.start import Start
from steadydetr.checkpoints.transfer import Transfer, transfer
from steadydetr.checkpoints.weights import TrainedWeights
from steadydetr.detectors import (
    AdaMixerConfig,
    DABDeformableDETRConfig,
    DeformableDETRConfig,
    Detector,
    DetectorConfig,
    DINOConfig,
    MaskDINOConfig,
    TransformerConfig,
)
from steadydetr.nn.configs import SmallBackboneConfig

BACKBONE = SmallBackboneConfig(8, (8, 8, 16, 16))
TRANSFORMER = TransformerConfig(
    width=16, heads=2, ffn=16, encoder_layers=2, decoder_layers=3, levels=3, norm_groups=4, dropout=0.0, encoder_points=2, decoder_points=3
)
DINO = DINOConfig(BACKBONE, TRANSFORMER, queries=12)
DETECTORS: dict[str, DetectorConfig] = {
    "dino": DINO,
    "dino with heads of its own": DINO.changed(share_heads=False, spare_label=False),
    "deformable": DeformableDETRConfig(BACKBONE, TRANSFORMER, queries=12),
    "two-stage": DeformableDETRConfig(BACKBONE, TRANSFORMER, queries=12, refine=True, two_stage=True),
    "dab": DABDeformableDETRConfig(BACKBONE, TRANSFORMER, queries=12),
    "maskdino": MaskDINOConfig(replace(BACKBONE, fine_map=True), TRANSFORMER, queries=12),
    "adamixer": AdaMixerConfig(BACKBONE, 16, 12, 3, 2, 16, groups=2, in_points=4, out_points=6, levels=3, norm_groups=4),
}
THEIRS = ("cat", "traffic light", "dog", "Fire_Hydrant")
IMAGES, PADDING = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 64, 96, dtype=torch.bool)


def build(config: DetectorConfig, classes: int, seed: int) -> Detector:
    """A detector with random values everywhere, so that none is equal to another by its initialisation."""
    torch.manual_seed(seed)
    detector = config.build(classes).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return detector


def trained(config: DetectorConfig, classes: Sequence[str] = THEIRS, seed: int = 1) -> tuple[Detector, TrainedWeights]:
    detector = build(config, len(classes), seed)
    card = DetectorCard(config, tuple(classes), tuple(range(1, len(classes) + 1)))
    return detector, TrainedWeights(card, dict(detector.state_dict()), "their weights")


def start_from(
    weights: TrainedWeights, config: DetectorConfig, classes: Sequence[str], **options: Any
) -> tuple[Detector, Transfer, Detector]:
    """The detector with the weights, what became of them, and the same detector before."""
    detector, before = build(config, len(classes), 2), build(config, len(classes), 2)
    return detector, transfer(detector, config, classes, weights, **options), before


def logits(detector: Detector) -> Tensor:
    with torch.no_grad():
        return detector(IMAGES, PADDING).logits


@pytest.mark.parametrize("config", DETECTORS.values(), ids=DETECTORS)
def test_with_the_same_classes_it_is_the_same_detector(config: DetectorConfig) -> None:
    old, weights = trained(config)
    new, found, _ = start_from(weights, config, THEIRS)
    assert torch.equal(logits(new), logits(old))
    assert [*found.sentences()] == ["4 of 4 classes have weights"]


@pytest.mark.parametrize("config", [config for name, config in DETECTORS.items() if name in ("deformable", "dab")])
def test_scores_of_known_classes_stay_and_new_classes_start_anew(config: DetectorConfig) -> None:
    """One-stage detectors: the classes do not decide which queries there are."""
    old, weights = trained(config)
    new, found, before = start_from(weights, config, ("Dog", "boat", "CAT", "fire hydrant"))
    assert torch.equal(logits(new)[..., [0, 2, 3]], logits(old)[..., [2, 0, 3]])
    head, fresh = (detector.state_dict()["decoder.class_heads.0.weight"] for detector in (new, before))
    assert torch.equal(head[1], fresh[1])
    assert [*found.sentences()] == ["3 of 4 classes have weights; 1 start anew: boat; 1 of the weights are dropped: traffic light"]


@pytest.mark.parametrize("config", DETECTORS.values(), ids=DETECTORS)
def test_rows_of_classes_go_by_name_in_every_tensor(config: DetectorConfig) -> None:
    old, weights = trained(config)
    ours = ("dog", "boat", "Traffic-Light")
    new, _, before = start_from(weights, config, ours)
    theirs, mine, fresh = old.state_dict(), new.state_dict(), before.state_dict()
    changed = {name for name in mine if mine[name].shape != theirs[name].shape}
    assert changed >= {"decoder.class_heads.0.weight", "decoder.class_heads.0.bias"}
    for name in mine:
        if name not in changed:
            assert torch.equal(mine[name], theirs[name]), name
            continue
        rows = {0: theirs[name][2], 1: fresh[name][1], 2: theirs[name][1]}
        for label, row in rows.items():
            assert torch.equal(mine[name][label], row), (name, label)
        for spare in range(3, len(mine[name])):  # DINO's label that stands for no class
            assert torch.equal(mine[name][spare], theirs[name][spare + 1]), name


def test_classes_may_all_start_anew() -> None:
    old, weights = trained(DINO)
    new, found, before = start_from(weights, DINO, THEIRS, by_name=False)
    for name in ("decoder.class_heads.0.weight", "proposal_head.class_head.bias", "label_content.weight"):
        assert torch.equal(new.state_dict()[name][:4], before.state_dict()[name][:4])
    assert torch.equal(new.state_dict()["label_content.weight"][4], old.state_dict()["label_content.weight"][4])
    assert found.classes.dropped == THEIRS and found.classes.started == THEIRS


@pytest.mark.parametrize(
    ("ours", "renamed", "kept"),
    [
        (("cat", "dog"), (), {"cat": "cat", "dog": "dog"}),
        (("TRAFFICLIGHT", "fire-hydrant "), (), {"TRAFFICLIGHT": "traffic light", "fire-hydrant ": "Fire_Hydrant"}),
        (("puppy",), ("dog=puppy",), {"puppy": "dog"}),
        (("a=b", "cat"), ("dog=a=b",), {"a=b": "dog", "cat": "cat"}),
        (("cat", "puppy"), ("cat=puppy",), {"puppy": "cat"}),
        (("bird",), (), {}),
    ],
)
def test_classes_are_matched_by_name(ours: tuple[str, ...], renamed: tuple[str, ...], kept: dict[str, str]) -> None:
    match = match_classes(THEIRS, ours, renamed)
    assert match.kept == kept
    assert match.pairs == [(ours.index(name), THEIRS.index(old)) for name, old in kept.items()]
    assert set(match.started) == set(ours) - set(kept) and set(match.dropped) == set(THEIRS) - set(kept.values())


def test_a_name_that_is_equal_comes_before_one_that_is_alike() -> None:
    """Both detectors tell "Cat" from "cat"."""
    assert match_classes(("Cat", "cat"), ("cat", "Cat")).pairs == [(0, 1), (1, 0)]
    assert match_classes(("cat",), ("Cat", "cat")).pairs == [(1, 0)]


@pytest.mark.parametrize(
    ("theirs", "ours", "renamed", "message"),
    [
        (THEIRS, ("cat",), ("dgo=cat",), "the weights have no class 'dgo'; did you mean 'dog'"),
        (THEIRS, ("cat",), ("dog=cta",), "the data have no class 'cta'; did you mean 'cat'"),
        (THEIRS, ("cat",), ("dog",), "give the name in the weights and the name in the data"),
        (("T shirt", "t-shirt"), ("tshirt",), (), "may be any of T shirt, t-shirt of the weights"),
        (THEIRS, ("kitten", "puppy"), ("cat=puppy", "cat=kitten"), "kitten, puppy of the data are one class of the weights"),
        (THEIRS, ("CAT", "Cat"), (), "CAT, Cat of the data are one class of the weights"),
    ],
)
def test_classes_that_cannot_be_matched_are_named(
    theirs: tuple[str, ...], ours: tuple[str, ...], renamed: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        match_classes(theirs, ours, renamed)


@pytest.mark.parametrize("name", ["Traffic Light", "traffic_light", "TRAFFIC-LIGHT", " trafficlight"])
def test_names_are_folded(name: str) -> None:
    assert folded(name) == "trafficlight"


def test_old_classes_stay_beside_new_ones() -> None:
    names, ids = joined_classes(("dog", "boat"), (7, 2), THEIRS, (1, 2, 3, 9))
    assert names == ("dog", "boat", "cat", "traffic light", "Fire_Hydrant")
    assert ids == (7, 2, 1, 10, 9)  # 2 is taken by the data


@pytest.mark.parametrize("queries", [5, 20])
@pytest.mark.parametrize("name", ["dino", "deformable", "dab"])
def test_the_first_queries_are_kept(name: str, queries: int) -> None:
    old, weights = trained(DETECTORS[name])
    new, found, before = start_from(weights, DETECTORS[name].changed(queries=queries), THEIRS)
    learned = {name: tensor for name, tensor in new.state_dict().items() if name.startswith("query_") and len(tensor) == queries}
    assert learned
    for name, tensor in learned.items():
        least = min(queries, 12)
        assert torch.equal(tensor[:least], old.state_dict()[name][:least]), name
        assert torch.equal(tensor[least:], before.state_dict()[name][least:]), name
    which = ", which go with the best proposals" if "proposal_head.class_head.weight" in new.state_dict() else ""
    kept = f"the first 5 of 12 queries are kept{which}" if queries == 5 else f"all 12 queries are kept{which}; 8 start anew"
    assert found.remarks == [kept]


def test_levels_of_the_same_stride_are_kept() -> None:
    """Three levels become four and three again, block by block of every head."""
    old, weights = trained(DINO)
    config = DINO.changed(transformer=replace(TRANSFORMER, levels=4))
    new, found, before = start_from(weights, config, THEIRS)
    assert found.remarks == ["feature levels of stride 8, 16, 32 are kept, of 8, 16, 32; 64 start anew"]
    for name, points in (("encoder.layers.1.attention", 2), ("decoder.layers.2.cross_attention", 3)):
        for part, per_point in (("sampling_offsets", 2), ("attention_weights", 1)):
            for kind in ("weight", "bias"):
                mine, theirs, fresh = (d.state_dict()[f"{name}.{part}.{kind}"] for d in (new, old, before))
                row = 0
                for head in range(2):
                    for level in range(4):
                        for value in range(points * per_point):
                            source = theirs[(head * 3 + level) * points * per_point + value] if level < 3 else fresh[row]
                            assert torch.equal(mine[row], source), (name, part, kind, head, level)
                            row += 1
    assert torch.equal(new.state_dict()["level_embed"][:3], old.state_dict()["level_embed"])
    assert torch.equal(new.state_dict()["neck.convs.3.weight"], before.state_dict()["neck.convs.3.weight"])
    back, found, _ = start_from(TrainedWeights(DetectorCard(config, THEIRS, (1, 2, 3, 4)), dict(new.state_dict()), "w"), DINO, THEIRS)
    assert torch.equal(logits(back), logits(old)) and len(found.remarks) == 1


@pytest.mark.parametrize("name", ["dino with heads of its own", "maskdino"])
def test_the_first_stages_are_kept(name: str) -> None:
    config = DETECTORS[name]
    old, weights = trained(config)
    fewer = config.changed(transformer=replace(TRANSFORMER, encoder_layers=1, decoder_layers=2))
    new, found, _ = start_from(weights, fewer, THEIRS)
    assert found.remarks == ["the first 1 of 2 encoder layers are kept", "the first 2 of 3 decoder layers are kept"]
    heads = ("decoder.class_heads.1.weight",) if name.startswith("dino") else ()
    for name in ("encoder.layers.0.ffn.linear1.weight", "decoder.layers.1.ffn.linear1.weight", *heads):
        assert torch.equal(new.state_dict()[name], old.state_dict()[name])
    with pytest.raises(ValueError, match=r"decoder\.layers\.2\.\S+ is missing.*--allow-partial.*decoder\.layers\.2"):
        start_from(TrainedWeights(DetectorCard(fewer, THEIRS, (1, 2, 3, 4)), dict(new.state_dict()), "w"), config, THEIRS)


@pytest.mark.parametrize("option", ["share_heads", "share_decoder"])
def test_what_stages_share_is_copied_for_each(option: str) -> None:
    shared = (
        DINO.changed(share_heads=True) if option == "share_heads" else DINO.changed(transformer=replace(TRANSFORMER, share_decoder=True))
    )
    own = DINO.changed(share_heads=False)
    old, weights = trained(shared)
    new, _, _ = start_from(weights, own, THEIRS)
    assert torch.equal(logits(new), logits(old))
    with pytest.raises(ValueError, match="is left over"):
        start_from(trained(own)[1], shared, THEIRS)


def test_what_does_not_fit_is_listed_and_may_be_allowed() -> None:
    _, weights = trained(DINO)
    wider = DINO.changed(transformer=replace(TRANSFORMER, ffn=24, fusion="dense"))
    with pytest.raises(
        ValueError, match=r"their weights does not fit DINO.*is \[16, 16\] there and \[24, 16\] here.*--allow-partial decoder"
    ):
        start_from(weights, wider, THEIRS)
    allowed = ("encoder", *(f"decoder.layers.{i}.ffn" for i in range(3)))
    new, found, before = start_from(weights, wider, THEIRS, partial=allowed)
    assert torch.equal(new.state_dict()["decoder.layers.1.ffn.linear1.weight"], before.state_dict()["decoder.layers.1.ffn.linear1.weight"])
    assert torch.equal(new.state_dict()["encoder.layers.0.norm.weight"], weights.state["encoder.layers.0.norm.weight"])
    assert all(name.startswith(("encoder.", "decoder.layers.")) for name in found.started)
    assert any("as was allowed: decoder.layers.0.ffn" in sentence for sentence in found.sentences())
    with pytest.raises(ValueError, match=r"encoder\.fusions\S* is left over"):
        start_from(trained(wider)[1], DINO, THEIRS, partial=("decoder",))


def test_weights_that_are_not_finite_are_refused() -> None:
    _, weights = trained(DINO)
    weights.state["level_embed"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="level_embed"):
        start_from(weights, DINO, THEIRS)


def test_start_loads_what_its_fields_say() -> None:
    _, weights = trained(DINO)
    start = Start("their weights", classes=("dog=puppy",))
    found = start.load(build(DINO, 1, 2), DINO, ("puppy",), weights)
    assert found.as_plain()["classes"] == {"kept": {"puppy": "dog"}, "started": (), "dropped": ("cat", "traffic light", "Fire_Hydrant")}
