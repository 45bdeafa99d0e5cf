"""Small detectors and batches that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steadydetr import kinds
from steadydetr.detectors import (
    AdaMixerConfig,
    ConditionalDETRConfig,
    DABDeformableDETRConfig,
    DeformableDETRConfig,
    DetectorConfig,
    DINOConfig,
    DNDABDeformableDETRConfig,
    HDeformableDETRConfig,
    MaskDINOConfig,
    PlainTransformerConfig,
    TransformerConfig,
)
from steadydetr.learning.criterion import Criterion
from steadydetr.nn.configs import SmallBackboneConfig
from steadydetr.objectives import Denoising, DNDenoising, MaskDenoising, Objective, OneToMany, SetPrediction
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Stages, Targets

torch.set_num_threads(1)
SHARED = Path(os.environ.get("STEADYDETR_SHARED", Path(__file__).resolve().parents[2] / "shared"))
BACKBONE = SmallBackboneConfig(stem=4, channels=(4, 8, 8, 8))
TINY = TransformerConfig(
    width=16, heads=2, ffn=16, encoder_layers=1, decoder_layers=2, levels=3, dropout=0.0, norm_groups=4, encoder_points=2, decoder_points=2
)
TINY_PLAIN = PlainTransformerConfig(width=16, heads=2, ffn=16, encoder_layers=1, decoder_layers=2, dropout=0.0)
DETECTORS: dict[str, DetectorConfig] = {
    "deformable": DeformableDETRConfig(BACKBONE, TINY, queries=12),
    "refine": DeformableDETRConfig(BACKBONE, TINY, queries=12, refine=True),
    "two-stage": DeformableDETRConfig(BACKBONE, TINY, queries=12, refine=True, two_stage=True),
    "dab": DABDeformableDETRConfig(BACKBONE, TINY, queries=12),
    "dab-two-stage": DABDeformableDETRConfig(BACKBONE, TINY, queries=12, two_stage=True),
    "dino": DINOConfig(BACKBONE, TINY, queries=12),
    "dn-dab": DNDABDeformableDETRConfig(BACKBONE, TINY, queries=12),
    "h-deformable": HDeformableDETRConfig(BACKBONE, TINY, queries=12, one_to_many_queries=20),
    "maskdino": MaskDINOConfig(replace(BACKBONE, fine_map=True), TINY, queries=12, box_init="no"),  # without masks learned
    "dino-shared-decoder": DINOConfig(BACKBONE, replace(TINY, share_decoder=True), queries=12),
    "conditional": ConditionalDETRConfig(BACKBONE, TINY_PLAIN, queries=12),
    "adamixer": AdaMixerConfig(
        BACKBONE, 16, queries=12, decoder_layers=2, heads=2, ffn=16, groups=2, in_points=4, out_points=6, levels=3, norm_groups=4
    ),
}
CLASSES = 5


@pytest.fixture(params=list(DETECTORS))
def detector_config(request: pytest.FixtureRequest) -> DetectorConfig:
    return DETECTORS[request.param]


@pytest.fixture
def table() -> Iterator[None]:
    """The table of parts is as it was before, after tests that enter something."""
    kinds.load_own()  # what a test is the first to import must stay
    before = {name: getattr(kinds, name).copy() for name in ("_parts", "_words", "_kinds")}
    yield
    for name, value in before.items():
        setattr(kinds, name, value)


def make_batch(counts: tuple[int, ...], seed: int = 0, size: int = 64, first_id: int = 0, masks: bool = False) -> Batch:
    """Random images and objects; image ids count from `first_id`. The last image is padded where there are several.

    Masks fill the boxes of objects, as if there were no padding.
    """
    generator = torch.Generator().manual_seed(seed)
    images, objects = len(counts), sum(counts)
    centre = torch.rand(objects, 2, generator=generator) * 0.5 + 0.25
    side = torch.rand(objects, 2, generator=generator) * 0.3 + 0.1
    padding = torch.zeros(images, size, size, dtype=torch.bool)
    if images > 1:
        padding[-1, :, size * 3 // 4 :] = True
    labels = torch.randint(CLASSES, (objects,), generator=generator)
    targets = Targets(labels, torch.cat((centre, side), 1), counts)
    return Batch(
        images=torch.rand(images, 3, size, size, generator=generator),
        padding=padding,
        targets=targets.with_box_masks((size, size)) if masks else targets,
        image_ids=tuple(range(first_id, first_id + images)),
        original_sizes=((size, size),) * images,
    )


def part_of(batch: Batch, images: list[int]) -> Batch:
    """What a rank or a micro-batch gets that is dealt these images."""
    targets = batch.targets.split()
    return replace(
        batch,
        images=batch.images[images],
        padding=batch.padding[images],
        targets=Targets.cat([targets[i] for i in images]),
        image_ids=tuple(batch.image_ids[i] for i in images),
        original_sizes=tuple(batch.original_sizes[i] for i in images),
    )


def make_stages(stages: int, images: int, queries: int, seed: int = 0) -> Stages:
    """Random predictions in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(stages, images, queries, CLASSES, generator=generator, dtype=torch.float64)
    boxes = torch.rand(stages, images, queries, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
    return Stages(logits, boxes)


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return make_batch


def own_objectives(config: DetectorConfig) -> tuple[Objective, ...]:
    """Those of the detector's paper besides the main one."""
    if isinstance(config, DINOConfig):
        return (Denoising(number=4, box_noise=0.4),)
    if isinstance(config, DNDABDeformableDETRConfig):
        return (DNDenoising(groups=2),)
    if isinstance(config, MaskDINOConfig):
        return (MaskDenoising(number=6),)
    return (OneToMany(repeats=3),) if isinstance(config, HDeformableDETRConfig) else ()


def make_method(config: DetectorConfig, seed: int = 0, perturb: bool = True) -> Method:
    """A method with weights away from their special initial values."""
    torch.manual_seed(seed)
    method = Method(config.build(CLASSES), Criterion(), (SetPrediction(), *own_objectives(config)))
    if perturb:
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return method


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data: {SHARED} is not there (STEADYDETR_SHARED names another place)")
    return SHARED
