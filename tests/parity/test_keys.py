"""Every key of the official checkpoints at their real size lands on a parameter of the right shape; every golden case has its test."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steadydetr.checkpoints.convert import convert_state_dict
from steadydetr.checkpoints.key_maps import recognise
from steadydetr.detectors import (
    AdaMixerConfig,
    ConditionalDETRConfig,
    DABDeformableDETRConfig,
    DeformableDETRConfig,
    DINOConfig,
    DNDABDeformableDETRConfig,
    HDeformableDETRConfig,
    MaskDINOConfig,
)
from steadydetr.recipes import find
from tests.parity import (  # noqa: F401  they claim their cases
    test_golden_adamixer,
    test_golden_align,
    test_golden_conditional,
    test_golden_detectors,
    test_golden_detrex,
    test_golden_distillation,
    test_golden_features,
    test_golden_hybrid,
    test_golden_losses,
    test_golden_maskdino,
    test_golden_modules,
    test_golden_stable,
)
from tests.parity.golden import case_names, files, is_claimed

EXPECTED = {
    "original/keys/conditional_detr_*.json": ConditionalDETRConfig,
    "original/keys/deformable_detr_*.json": DeformableDETRConfig,
    "original/keys/dino_*.json": DINOConfig,
    "original/keys/h_deformable_detr_r50.json": HDeformableDETRConfig,
    "original/keys/h_deformable_detr_r50_no_tricks.json": DeformableDETRConfig,
    "detrex/keys/h_deformable_detr_r50_two_stage.json": HDeformableDETRConfig,
    "detrex/keys/h_deformable_detr_r50_one_stage.json": DeformableDETRConfig,
    "detrex/keys/dn_deformable_detr_*.json": DNDABDeformableDETRConfig,
    "detrex/keys/detrex_dino_*.json": DINOConfig,
    "detrex/keys/stable_dino_*.json": DINOConfig,
    "detrex/keys/align_detr_*.json": DINOConfig,
    "detrex/keys/dab_deformable_detr_*.json": DABDeformableDETRConfig,
    "detrex/keys/maskdino_r50_instance_*.json": MaskDINOConfig,
    "mmdet/keys/*deformable_detr_*.json": DeformableDETRConfig,
    "mmdet/keys/adamixer_*.json": AdaMixerConfig,
}
NOT_BUILT = {
    "detrex/x_dab_detr_*": "DAB-DETR",
    "detrex/x_deta_*": "DETA",
    "mmdet/detrdistill_contrastive_*": "the contrastive loss of the released DETRDistill (D-41)",
}


def key_files() -> list[Any]:
    return [
        pytest.param(path, kind, id=f"{path.parent.parent.name}-{path.stem}")
        for pattern, kind in EXPECTED.items()
        for path in files(pattern)
        if not path.name.endswith(".info.json") and "init_stats" not in path.name
    ]


def read(path: Path) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in json.loads(path.read_text()).items()}


@pytest.mark.parametrize(("path", "kind"), key_files())
def test_every_key_has_its_place(path: Path, kind: type) -> None:
    converted = convert_state_dict(read(path))
    assert isinstance(converted.config, kind)
    if kind is not AdaMixerConfig:  # which has no encoder
        assert converted.config.transformer.fusion == ("dense" if path.name.startswith("stable_dino") else "none")


@pytest.mark.parametrize(
    ("project", "file", "recipe"),
    [
        ("original", "conditional_detr_r50", "conditional-detr-r50-50ep"),
        ("original", "dino_4scale_r50", "dino-4scale-r50-12ep"),
        ("original", "dino_5scale_r50", "dino-5scale-r50-12ep"),
        ("original", "h_deformable_detr_r50", "h-deformable-detr-r50-12ep"),
        ("detrex", "h_deformable_detr_r50_two_stage", "h-deformable-detr-r50-12ep"),
        ("detrex", "dn_deformable_detr_r50", "dn-dab-deformable-detr-r50-50ep"),
        ("detrex", "stable_dino_r50_4scale", "stable-dino-4scale-r50-12ep"),
        ("detrex", "stable_dino_swinl_4scale", "stable-dino-4scale-swin-l-12ep"),
        ("detrex", "align_detr_r50_4scale", "align-dino-4scale-r50-12ep"),
        ("detrex", "maskdino_r50_instance_3s_dowsample1_2048", "maskdino-r50-50ep"),
        ("mmdet", "adamixer_r50_1x_100q", "adamixer-r50-100q-12ep"),
        ("mmdet", "adamixer_r50_300q", "adamixer-r50-300q-12ep"),
        ("mmdet", "adamixer_r101_100q", "adamixer-r101-100q-12ep"),
    ],
)
def test_a_converted_checkpoint_is_the_detector_of_its_recipe(project: str, file: str, recipe: str) -> None:
    """DINO's own repository ties the heads of all stages, Stable-DINO's and Align-DETR's do not, nor do their label embeddings agree."""
    [path] = files(f"{project}/keys/{file}.json")
    state = read(path)
    for key in state if file[:8] != "maskdino" else ():  # only their values tell whether heads are tied
        if re.search(r"(class|bbox)_embed\.\d+\.", key):
            start = 0 if project == "original" else int(re.findall(r"_embed\.(\d+)\.", key)[0])
            state[key] = torch.full(state[key].shape, float(start))
    ours, wanted = convert_state_dict(state).config, find(recipe).detector
    assert replace(ours, backbone=wanted.backbone) == wanted


# what detrex and mmdet 3 call the tensors of Conditional DETR's repository, by their code (detrex: projects/conditional_detr/converter.py)
DETREX = {
    r"^backbone\.0\.body\.(?=conv1|bn1)": "backbone.stem.",
    r"^backbone\.0\.body\.layer(\d)": lambda m: f"backbone.res{int(m[1]) + 1}",
    r"^(backbone.*)bn(\d)": r"\1conv\2.norm",
    r"downsample\.0": "shortcut",
    r"downsample\.1": "shortcut.norm",
    r"(decoder.*)sa_([qk])(content|pos)_proj": r"\1attentions.0.\2_\3_proj",
    r"(decoder.*)ca_([qk])(content|pos|pos_sine)_proj": r"\1attentions.1.\2_\3_proj",
    r"\.q_(?=content|pos)": ".query_",
    r"\.k_(?=content|pos)": ".key_",
    r"sa_v_proj": "attentions.0.value_proj",
    r"ca_v_proj": "attentions.1.value_proj",
    r"(decoder.*)self_attn": r"\1attentions.0",
    r"cross_attn": "attentions.1",
    r"(encoder.*)self_attn": r"\1attentions.0.attn",
    r"decoder\.norm\.": "decoder.post_norm_layer.",
    r"norm([123])\.": lambda m: f"norms.{int(m[1]) - 1}.",
    r"linear1": "ffns.0.layers.0.0",
    r"linear2": "ffns.0.layers.1",
}
MMDET = {
    r"^backbone\.0\.body": "backbone",
    r"^input_proj": "neck.convs.0.conv",
    r"^query_embed": "query_embedding",
    r"^class_embed": "bbox_head.fc_cls",
    r"^bbox_embed\.layers\.0": "bbox_head.reg_ffn.layers.0.0",
    r"^bbox_embed\.layers\.1": "bbox_head.reg_ffn.layers.1",
    r"^bbox_embed\.layers\.2": "bbox_head.fc_reg",
    r"^transformer\.": "",
    r"(encoder.*)self_attn": r"\1self_attn.attn",
    r"sa_(\w+_proj)": r"self_attn.\1",
    r"ca_(\w+_proj)": r"cross_attn.\1",
    r"decoder\.norm\.": "decoder.post_norm.",
    r"norm([123])\.": lambda m: f"norms.{int(m[1]) - 1}.",
    r"linear1": "ffn.layers.0.0",
    r"linear2": "ffn.layers.1",
}


@pytest.mark.parametrize(("names", "layout"), [(DETREX, "detrex"), (MMDET, "mmdet 3")], ids=["detrex", "mmdet"])
def test_conditional_detr_of_other_toolboxes(names: dict[str, Any], layout: str) -> None:
    """The same tensors under their names become the same detector, tensor by tensor; a key too much or too few is named."""
    [path] = files("original/keys/conditional_detr_r50.json")
    state = {key: torch.full(shape, float(number)) for number, (key, shape) in enumerate(json.loads(path.read_text()).items())}

    def named(key: str) -> str:
        for pattern, name in names.items():
            key = re.sub(pattern, name, key)
        return key

    theirs = {named(key): value for key, value in state.items()}
    assert len(theirs) == len(state) and recognise(theirs) == f"conditional detr of {layout}"
    wanted, converted = convert_state_dict(state), convert_state_dict(theirs)
    assert converted.config == wanted.config and converted.state.keys() == wanted.state.keys()
    assert all(torch.equal(value, wanted.state[key]) for key, value in converted.state.items())
    with pytest.raises(ValueError, match=r"left over.*surprise\.weight"):
        convert_state_dict(theirs | {"surprise.weight": torch.empty(3)})
    removed = next(key for key in theirs if "encoder.layers.1." in key and key.endswith("out_proj.bias"))
    with pytest.raises(ValueError, match=r"missing: encoder\.layers\.1\.self_attention\.out_proj\.bias"):
        convert_state_dict({key: value for key, value in theirs.items() if key != removed})


@pytest.mark.parametrize(("path", "kind"), key_files())
def test_missing_and_left_over_keys_are_named(path: Path, kind: type) -> None:
    state = read(path)
    with pytest.raises(ValueError, match=r"left over.*surprise\.weight"):
        convert_state_dict(state | {"surprise.weight": torch.empty(3, device="meta")})
    if kind is AdaMixerConfig:
        removed, ours = "roi_head.bbox_head.1.iof_tau", r"decoder\.layers\.1\.overlap_scale"
    else:
        removed = next(key for key in state if "encoder.layers.1." in key and key.endswith(("output_proj.bias", "out_proj.bias")))
        ours = r"encoder\.layers\.1\.(attention\.output_proj|self_attention\.out_proj)\.bias"
    with pytest.raises(ValueError, match=f"missing: {ours}"):
        convert_state_dict({key: value for key, value in state.items() if key != removed})


def test_unknown_layout_says_what_is_known() -> None:
    with pytest.raises(ValueError, match="no known layout"):
        convert_state_dict({"weird.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", case_names())
def test_every_case_has_a_test(name: str) -> None:
    """Or belongs to what is not built, never both."""
    missing = [what for pattern, what in NOT_BUILT.items() if fnmatch.fnmatch(name, pattern)]
    if is_claimed(name):
        assert not missing, f"{name} has a test, yet {missing[0]} is said not to be built"
        return
    assert missing, f"no test runs {name}"
    pytest.skip(f"{name} belongs to {missing[0]}, which is not built")
