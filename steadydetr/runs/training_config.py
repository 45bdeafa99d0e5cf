"""How a run is trained: optimiser, schedule, precision, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from steadydetr.config import check_within
from steadydetr.kinds import changeable, register


@register("training")
@dataclass(frozen=True)
class TrainingConfig:
    """Defaults: DINO's 12 epochs (lr x 0.1 at epoch 11, batch 16, backbone at a tenth of the rate)."""

    epochs: int = 12
    epoch_steps: int = 0  # steps that are called an epoch here; 0: as many as one pass over the data takes
    passes: int = 0  # over the data, at least: where the epochs are shorter than that, they get more steps; 0: as they are
    patience: int = changeable(0)  # evaluations without a better AP after which the run ends, its best being kept; 0: never
    freeze: tuple[str, ...] = ()  # parts of the detector that are not trained: backbone, encoder, decoder.layers.0, ...
    batch_size: int | Literal["auto"] = 16  # images per optimiser step, over all processes and micro-batches; auto: as many as fit
    lr_batch_size: int = 0  # images per step that lr is meant for, where batch_size is auto; 0: lr stays as it is
    accumulation: int | Literal["auto"] = changeable(1)  # micro-batches per step on each process; auto: as few as fit
    lr: float = 1e-4
    weight_decay: float = 1e-4
    backbone_lr_factor: float = 0.1
    encoder_lr_factor: float = 1.0  # of the encoder and of the neck before it
    offset_lr_factor: float = 1.0  # of sampling offsets and reference points; 0.1 in Deformable DETR
    decay_norms: bool = True  # False: no weight decay on norms, as in detrex
    decay_vectors: bool = True  # False: no weight decay on any bias or other one-dimensional parameter
    clip: float = 0.1  # largest norm of the whole gradient; 0: no clipping
    schedule: Literal["step", "cosine"] = "step"
    drop_epochs: tuple[float, ...] = (11,)  # where the step schedule multiplies the rate by 0.1; below 1: shares of the run
    warmup_steps: int = 0  # linear, from 0
    precision: Literal["no", "bf16", "auto"] = "no"  # bf16: autocast to bfloat16; auto: bf16 on a GPU that has it
    tf32: bool = changeable(True)  # GPUs that can compute products of float32 in TF32, with 10 bits of the mantissa
    compile: bool = changeable(False)  # torch.compile, encoder and decoder layer by layer, of teachers too
    ema_decay: float | None = 0.0  # of the averaged weights, evaluated and saved beside the trained ones; 0: none; None: 2.8% of the run
    sync_batch_norm: bool = False  # statistics of trained batch norm over all processes
    seed: int = 0
    eval_every: int = changeable(1)  # epochs; the last epoch is always evaluated
    eval_batch_size: int = changeable(4)
    save_every: int = changeable(0)  # steps between checkpoints within an epoch; 0: at the end of epochs only
    log_every: int = changeable(10)  # steps
    stability_images: int = changeable(100)  # held-out images whose matching is followed, at every evaluation; 0: none
    stability_steps: tuple[int, ...] = changeable(())  # also after these steps (Stable-DINO Fig. 3: 5000)

    def __post_init__(self) -> None:
        rates = dict.fromkeys(("weight_decay", "backbone_lr_factor", "encoder_lr_factor", "offset_lr_factor", "clip"), (0, 10**9))
        counts = ("warmup_steps", "save_every", "stability_images", "epoch_steps", "patience", "passes", "lr_batch_size")
        steps = dict.fromkeys(counts, (0, 10**12))
        check_within("training", self, lr=(0, 10**6), seed=(0, 2**32 - 1), **rates, **steps)
        for name in ("epochs", "batch_size", "accumulation", "eval_every", "eval_batch_size", "log_every"):
            if getattr(self, name) != "auto" and not 1 <= getattr(self, name) <= 10**9:
                raise ValueError(f"training.{name} = {getattr(self, name)} must be at least 1, and at most {10**9}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"training.ema_decay = {self.ema_decay} must lie in 0 <= decay < 1; None: 2.8% of the run")
        if self.lr <= 0:
            raise ValueError(f"training.lr = {self.lr} must be positive")
        if self.precision not in ("no", "bf16", "auto"):  # float16 needs its gradient scaled
            raise ValueError(f"training.precision = {self.precision!r} must be no, bf16 or auto")
        if not all(0 < drop <= 10**9 for drop in self.drop_epochs):
            raise ValueError(f"training.drop_epochs = {self.drop_epochs} must be positive: epochs, or below 1 shares of the run")

    @property
    def images_per_step(self) -> int:
        """`batch_size`, which a run has found where it was auto."""
        if self.batch_size == "auto":
            raise ValueError("training.batch_size is auto, which only a run can tell: give a number of images")
        return self.batch_size

    @property
    def micro_batches(self) -> int:
        """`accumulation`, which a run has found where it was auto."""
        return 1 if self.accumulation == "auto" else self.accumulation

    @property
    def drops(self) -> tuple[float, ...]:
        """When the learning rate is multiplied by 0.1, in epochs from the start of the run, earliest first."""
        return drops_of(self.schedule, self.drop_epochs, self.epochs)


def drops_of(schedule: str, drop_epochs: Sequence[float], epochs: int) -> tuple[float, ...]:
    """`TrainingConfig.drops` from its fields alone, for recipes that are read as plain JSON."""
    if schedule != "step":
        return ()
    return tuple(sorted(drop if drop >= 1 else drop * epochs for drop in drop_epochs))
