"""Detectors that learn within minutes on two cores."""

from __future__ import annotations

from dataclasses import replace

from steadydetr.data import DataConfig, FixedSize, FixedSizeTransform
from steadydetr.detectors import (
    AdaMixerConfig,
    ConditionalDETRConfig,
    DeformableDETRConfig,
    DINOConfig,
    DNDABDeformableDETRConfig,
    HDeformableDETRConfig,
    MaskDINOConfig,
    PlainTransformerConfig,
    TransformerConfig,
)
from steadydetr.detectors.configs.deformable import with_transformer
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.mask_terms import MaskTerms
from steadydetr.learning.teachers import EMATeacher
from steadydetr.nn.configs import SmallBackboneConfig
from steadydetr.objectives import Denoising, DNDenoising, MaskDenoising, OneToMany, SetPrediction
from steadydetr.recipes.align import align
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.distill import distilled
from steadydetr.recipes.group import grouped
from steadydetr.recipes.maskdino import MASKDINO_CRITERION
from steadydetr.recipes.online import online
from steadydetr.recipes.stable import stable
from steadydetr.runs.training_config import TrainingConfig

SMALL_TRANSFORMER = TransformerConfig(
    width=96,
    heads=4,
    ffn=256,
    encoder_layers=1,
    decoder_layers=3,
    levels=3,
    dropout=0.0,
    temperature=20.0,
    position_offset=0.0,
)


@recipe
def quickstart() -> Recipe:
    """steadydetr train quickstart --output runs/quickstart: within 10 minutes on 2 cores; docs/results.md has what it reaches."""
    return replace(small_od_dino(), name="quickstart")


@recipe
def small_dino() -> Recipe:
    """The baseline: focal loss and cost."""
    return Recipe(
        name="small-dino",
        detector=DINOConfig(SmallBackboneConfig(), SMALL_TRANSFORMER, queries=40),
        criterion=Criterion(loss_weights=Weights(2.0, 5.0, 2.0), giou_eps=1e-6),
        objectives=(SetPrediction(), Denoising(number=40, box_noise=0.4)),
        data=DataConfig(source="shapes", transform=FixedSizeTransform(128, 128), resize=FixedSize(128, 128), workers=1),
        training=TrainingConfig(
            epochs=3,
            batch_size=8,
            lr=1e-3,
            backbone_lr_factor=1.0,
            decay_vectors=False,
            clip=0.5,
            drop_epochs=(0.85,),
            warmup_steps=50,
            eval_batch_size=20,
        ),
        notes="DINO of 1.8 M parameters on generated shapes of 128 px",
    )


@recipe
def small_stable_dino() -> Recipe:
    """Stable matching as it was tuned for few queries: targets rescaled to 1. No suppression, so that every part shows by itself."""
    start = small_dino()
    return replace(stable(start, "one", ""), name="small-stable-dino", nms=None, training=start.training)


@recipe
def small_align_dino() -> Recipe:
    return align(small_dino(), "", "small-align-dino")


@recipe
def small_deformable_detr() -> Recipe:
    """A two-stage Deformable DETR at the size of the quickstart."""
    start = small_dino()
    transformer = replace(SMALL_TRANSFORMER, temperature=10000.0, position_offset=-0.5)
    return replace(
        start,
        name="small-deformable-detr",
        detector=DeformableDETRConfig(SmallBackboneConfig(), transformer, queries=40, refine=True, two_stage=True),
        criterion=Criterion(loss_weights=Weights(2.0, 5.0, 2.0)),
        objectives=(SetPrediction(),),
        notes="two-stage Deformable DETR at the size of the quickstart",
    )


@recipe
def small_stable_deformable_detr() -> Recipe:
    start = small_deformable_detr()
    return replace(stable(start, "one", ""), name="small-stable-deformable-detr", nms=None, training=start.training)


@recipe
def small_refine_deformable_detr() -> Recipe:
    """One-stage, with iterative refinement: what OD-DETR builds on."""
    start = small_deformable_detr()
    detector = start.detector.changed(two_stage=False)
    notes = "Deformable DETR with refinement at the size of the quickstart"
    return replace(start, name="small-refine-deformable-detr", detector=detector, notes=notes)


@recipe
def small_od_deformable_detr() -> Recipe:
    """OD-DETR, whose teacher averages over the same share of the run as in the paper (`EMATeacher.decay` None, D-31)."""
    return online(small_refine_deformable_detr(), "small-od-deformable-detr", teacher=EMATeacher())


@recipe
def small_od_dino() -> Recipe:
    return online(small_dino(), "small-od-dino", teacher=EMATeacher())


@recipe
def small_teacher_deformable_detr() -> Recipe:
    """A teacher of three times the student's size, trained three times as long."""
    start = small_refine_deformable_detr()
    backbone = SmallBackboneConfig(stem=48, channels=(80, 160, 256, 320))
    return replace(
        start,
        name="small-teacher-deformable-detr",
        detector=with_transformer(start.detector, ffn=512, encoder_layers=2).changed(backbone=backbone),
        training=replace(start.training, epochs=3 * start.training.epochs),
        notes=f"{start.notes}, larger and longer: the teacher of small-distill-deformable-detr",
    )


@recipe
def small_distill_deformable_detr() -> Recipe:
    """steadydetr distill small-distill-deformable-detr --teacher runs/small-teacher-deformable-detr."""
    return replace(distilled(small_refine_deformable_detr()), name="small-distill-deformable-detr")


@recipe
def small_conditional_detr() -> Recipe:
    """Features of stride 16 alone, in a last stage that is dilated: images of 128 px have few cells at stride 32.

    It learns much more slowly than detectors that sample points: see docs/results.md.
    """
    start = small_deformable_detr()
    transformer = PlainTransformerConfig(width=96, heads=4, ffn=256, encoder_layers=1, decoder_layers=3, dropout=0.0)
    detector = ConditionalDETRConfig(SmallBackboneConfig(output_stride=16), transformer, queries=40)
    return replace(start, name="small-conditional-detr", detector=detector, notes="Conditional DETR at the size of the quickstart")


@recipe
def small_h_deformable_detr() -> Recipe:
    """`--objectives.one-to-many none` is its plain twin."""
    start = small_deformable_detr()
    transformer = replace(SMALL_TRANSFORMER, temperature=10000.0, position_offset=-0.5)
    return replace(
        start,
        name="small-h-deformable-detr",
        detector=HDeformableDETRConfig(SmallBackboneConfig(), transformer, queries=40, one_to_many_queries=120),
        objectives=(SetPrediction(), OneToMany()),
        notes="H-Deformable-DETR at the size of the quickstart",
    )


@recipe
def small_group_dino() -> Recipe:
    return grouped(small_dino(), 4, "small-group-dino")


@recipe
def small_dn_dab_deformable_detr() -> Recipe:
    start = small_dino()
    transformer = replace(SMALL_TRANSFORMER, temperature=10000.0, position_offset=-0.5)
    return replace(
        start,
        name="small-dn-dab-deformable-detr",
        detector=DNDABDeformableDETRConfig(SmallBackboneConfig(), transformer, queries=40),
        objectives=(SetPrediction(), DNDenoising()),
        notes="DN-DAB-Deformable-DETR at the size of the quickstart",
    )


@recipe
def small_maskdino() -> Recipe:
    """With masks of 32 x 32 cells, which 512 points of each are more than enough for. So few steps learn no masks to start boxes from."""
    start = small_dino()
    transformer = replace(SMALL_TRANSFORMER, temperature=10000.0)
    return replace(
        start,
        name="small-maskdino",
        detector=MaskDINOConfig(SmallBackboneConfig(fine_map=True), transformer, queries=40, box_init="no"),
        criterion=replace(MASKDINO_CRITERION, masks=MaskTerms(points=512)),
        objectives=(SetPrediction(), MaskDenoising(number=40)),
        data=replace(start.data, masks=True),
        notes="MaskDINO at the size of the quickstart",
    )


@recipe
def small_stable_maskdino() -> Recipe:
    start = small_maskdino()
    return replace(stable(start, "one", ""), name="small-stable-maskdino", nms=None, training=start.training)


@recipe
def small_adamixer() -> Recipe:
    """AdaMixer at the size of the quickstart."""
    start = small_dino()
    detector = AdaMixerConfig(
        SmallBackboneConfig(), width=96, queries=40, decoder_layers=3, heads=4, ffn=256, in_points=8, out_points=16, levels=3
    )
    return replace(
        start,
        name="small-adamixer",
        detector=detector,
        criterion=Criterion(loss_weights=Weights(2.0, 5.0, 2.0), l1_format="xyxy"),
        objectives=(SetPrediction(),),
        notes="AdaMixer at the size of the quickstart",
    )


@recipe
def small_teacher_adamixer() -> Recipe:
    """A teacher with a larger backbone and feed-forward, trained three times as long."""
    start = small_adamixer()
    backbone = SmallBackboneConfig(stem=48, channels=(80, 160, 256, 320))
    return replace(
        start,
        name="small-teacher-adamixer",
        detector=start.detector.changed(backbone=backbone, ffn=512),
        training=replace(start.training, epochs=3 * start.training.epochs),
        notes=f"{start.notes}, larger and longer: the teacher of small-distill-adamixer",
    )


@recipe
def small_distill_adamixer() -> Recipe:
    """steadydetr distill small-distill-adamixer --teacher runs/small-teacher-adamixer."""
    return replace(distilled(small_adamixer()), name="small-distill-adamixer")
