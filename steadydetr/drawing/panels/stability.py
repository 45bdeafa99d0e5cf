"""How steadily the runs match queries to objects, of metrics/stability.py."""

from __future__ import annotations

from collections.abc import Sequence

from steadydetr.drawing.panels.base import STABILITY, Panel, ReportFigure, at_last_measurement, measured_stages, over_measurements
from steadydetr.runs.records import Records

NOT_MEASURED = "not measured yet"
NEEDS_AVERAGE = "needs averaged weights (training.ema_decay) and a measurement"


def unstable_score_by_layer(runs: Sequence[Records]) -> list[Panel]:
    layers = measured_stages(runs, lambda r: list(r["unstable_score"]))
    lines = at_last_measurement(runs, lambda r: r["unstable_score"], layers)
    return [Panel("Unstable score by layer, %", "decoder layer", lines, NOT_MEASURED, x_names=layers)]


def unstable_score_by_step(runs: Sequence[Records]) -> list[Panel]:
    lines = over_measurements(runs, "stability", "step", lambda r: list(r["unstable_score"].values())[-1] if r["unstable_score"] else None)
    return [Panel("Unstable score, last layer, %", "step", lines, NOT_MEASURED)]


def instability_by_stage(runs: Sequence[Records]) -> list[Panel]:
    pairs = measured_stages(runs, lambda r: [f"{k}–{k + 1}" for k in range(1, len(r["between_stages"]) + 1)])
    lines = at_last_measurement(runs, lambda r: dict(zip(pairs, r["between_stages"], strict=False)), pairs)
    return [Panel("Instability between stages", "stages", lines, "not measured yet, or one stage only", x_names=pairs)]


def instability_by_epoch(runs: Sequence[Records]) -> list[Panel]:
    lines = over_measurements(runs, "stability", "epoch", lambda r: r["between_epochs"], at_epochs=True)
    return [Panel("Instability between epochs", "epoch", lines, "needs two measurements at ends of epochs")]


def consistency_by_step(runs: Sequence[Records]) -> list[Panel]:
    lines = over_measurements(runs, "stability", "step", lambda r: r["consistency"][-1] if r["consistency"] else None)
    return [Panel("Consistency with the average, last stage, %", "step", lines, NEEDS_AVERAGE)]


def consistency_by_stage(runs: Sequence[Records]) -> list[Panel]:
    stages = measured_stages(runs, lambda r: [str(k) for k in range(1, len(r["consistency"] or ()) + 1)])
    lines = at_last_measurement(runs, lambda r: dict(zip(stages, r["consistency"] or (), strict=False)), stages)
    return [Panel("Consistency with the average by stage, %", "stage", lines, NEEDS_AVERAGE, x_names=stages)]


FIGURES = (
    ReportFigure("unstable-score", STABILITY, unstable_score_by_layer, paper="Stable-DINO Fig. 3"),
    ReportFigure("unstable-score-by-step", STABILITY, unstable_score_by_step),
    ReportFigure("instability-by-stage", STABILITY, instability_by_stage, paper="DETRDistill Fig. 7"),
    ReportFigure("instability", STABILITY, instability_by_epoch, paper="OD-DETR Fig. 1"),
    ReportFigure("consistency", STABILITY, consistency_by_step, paper="OD-DETR Fig. 5"),
    ReportFigure("consistency-by-stage", STABILITY, consistency_by_stage),
)
