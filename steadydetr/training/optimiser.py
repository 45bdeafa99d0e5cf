"""AdamW with the papers' parameter groups, and learning-rate schedules as functions of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from steadydetr.nn.backbone import FrozenBatchNorm
from steadydetr.runs.training_config import TrainingConfig

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, FrozenBatchNorm)
OFFSETS = ("sampling_offsets", "query_reference")  # parameters with one of these in their name have the rate of `training.offset_lr_factor`


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, object]]:
    """The trainable parameters, as groups of the same learning rate and weight decay, for the optimiser.

    The backbone's rate is multiplied by `backbone_lr_factor`, that of sampling offsets and reference points by `offset_lr_factor`
    (Deformable DETR), that of neck and encoder, besides, by `encoder_lr_factor`; a group's "lr_factor" says which. Norms or all vectors
    have no weight decay where the config says so.
    """
    norm_parameters = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, parts = 1.0, name.split(".")
        if "backbone" in parts:
            factor = config.backbone_lr_factor
        elif any(part in name for part in OFFSETS):
            factor = config.offset_lr_factor
        if not {"encoder", "neck"}.isdisjoint(parts):
            factor *= config.encoder_lr_factor
        exempt = (not config.decay_norms and id(parameter) in norm_parameters) or (not config.decay_vectors and parameter.ndim <= 1)
        groups.setdefault((factor, 0.0 if exempt else config.weight_decay), []).append(parameter)
    return [{"params": p, "lr_factor": factor, "weight_decay": decay} for (factor, decay), p in groups.items()]


def make_optimiser(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; `set_rate` sets the rates of every step."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, fused=True)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of the whole gradient: NaN or infinite if one of its numbers is, or if it is beyond float32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clip_gradient(gradients: list[Tensor], norm: Tensor, most: float) -> None:
    """Scale the gradient, whose norm is given, so that its norm is at most `most`; the host does not wait for it."""
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1))


def rate_factor(step: int, steps_per_epoch: int, config: TrainingConfig) -> float:
    """What the learning rate is multiplied by at a step: warm-up, then steps down by 10, or half a cosine to 0."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * min(step / (config.epochs * steps_per_epoch), 1.0)))
    return warmup * 0.1 ** sum(step >= round(epoch * steps_per_epoch) for epoch in config.drops)


def first_drop(steps_per_epoch: int, config: TrainingConfig) -> int | None:
    """The first step that the step schedule makes with a lower rate; None if the schedule has no drops."""
    return round(config.drops[0] * steps_per_epoch) if config.drops else None


def set_rate(optimiser: torch.optim.Optimizer, factor: float, config: TrainingConfig) -> float:
    """Set the learning rate of every group; returns the rate of the groups whose "lr_factor" is 1."""
    for group in optimiser.param_groups:
        group["lr"] = config.lr * factor * group["lr_factor"]
    return config.lr * factor
