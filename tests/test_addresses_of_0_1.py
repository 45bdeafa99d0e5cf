"""Names that version 0.1 had elsewhere can be imported from there for good."""

from __future__ import annotations

import importlib

import pytest

WHERE = {
    "evaluation": {"Results": "metrics.results", "evaluate": "metrics.evaluation"},
    "detections": {"Detections": "tools.detections", "open_picture": "data.images"},
    "predict": {"Predictor": "tools.predictor", "load": "tools.predictor", "align_classes": "tools.evaluate", "relabel": "tools.evaluate"},
}


@pytest.mark.parametrize("old", WHERE)
def test_names_of_0_1_are_those_of_today(old: str) -> None:
    module = importlib.import_module(f"steadydetr.{old}")
    assert set(module.__all__) == set(WHERE[old])
    for name, home in WHERE[old].items():
        assert getattr(module, name) is getattr(importlib.import_module(f"steadydetr.{home}"), name)
