"""Live against the transformers package: its port of the original Swin transformer, tiny and random, gives the same maps."""

from __future__ import annotations

import re
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

from steadydetr.nn.backbone import PaddedSwinBlock, TimmBackbone
from steadydetr.nn.configs import TimmBackboneConfig

transformers = pytest.importorskip("transformers")

WIDTH, BLOCKS, HEADS = 16, (2, 2, 2, 2), (1, 2, 4, 8)
RENAMED = {
    r"swin\.embeddings\.patch_embeddings\.projection": "body.patch_embed.proj",
    r"swin\.embeddings\.norm": "body.patch_embed.norm",
    r"swin\.encoder\.layers\.(\d)\.blocks": r"body.layers_\1.blocks",
    r"attention\.relative_position_bias\.": "attn.",
    r"attention\.o_proj": "attn.proj",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
}


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """In float64, with nothing at zero."""
    torch.manual_seed(7)
    config = transformers.SwinConfig(embed_dim=WIDTH, depths=BLOCKS, num_heads=HEADS, out_features=["stage2", "stage3", "stage4"])
    model: nn.Module = transformers.SwinBackbone(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def ours(theirs: nn.Module, monkeypatch: pytest.MonkeyPatch) -> TimmBackbone:
    """With their weights."""
    tiny = partial(timm.create_model, embed_dim=WIDTH, depths=BLOCKS, num_heads=HEADS)
    monkeypatch.setattr("steadydetr.nn.backbone.timm.create_model", tiny)
    backbone = TimmBackboneConfig("swin_tiny_patch4_window7_224", (1, 2, 3), "none", frozen_stages=0, output_norm=True).build()
    backbone.load_state_dict(by_our_names(theirs.state_dict()))
    return backbone.double().eval()


def by_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value are one matrix of ours, and maps are halved at the beginning of a stage instead of the end."""
    found: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        if name.startswith("swin.layernorm."):  # of the whole model; the maps have norms of their own
            continue
        for pattern, replacement in RENAMED.items():
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"swin\.encoder\.layers\.(\d)\.downsample", lambda match: f"body.layers_{int(match[1]) + 1}.downsample", name)
        name = re.sub(r"hidden_states_norms\.stage(\d)", lambda match: f"norms.{int(match[1]) - 2}", name)
        found.setdefault(re.sub(r"attention\.[qkv]_proj", "attn.qkv", name), []).append(value)
    return {name: torch.cat(values) for name, values in found.items()}


@pytest.mark.parametrize("size", [(224, 224), (61, 90), (131, 259)])
def test_same_maps(theirs: nn.Module, ours: TimmBackbone, size: tuple[int, int]) -> None:
    """Also where sides are no multiples of the patch, nor maps of the window, and where a stage fits into one window."""
    pixels = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = theirs(pixels).feature_maps, ours(pixels)
    for theirs_of_stage, ours_of_stage in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours_of_stage, theirs_of_stage, rtol=1e-6, atol=3e-6)  # their softmax is float32


def test_timm_alone_gives_other_maps(theirs: nn.Module, ours: TimmBackbone) -> None:
    """What D-17 is for: it shifts before it pads."""
    pixels = torch.randn(1, 3, 131, 259, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for module in ours.modules():
        if type(module) is PaddedSwinBlock:
            module.__class__ = PaddedSwinBlock.__base__
    with torch.no_grad():
        expected, actual = theirs(pixels).feature_maps[0], ours(pixels)[0]
    assert (actual - expected).abs().max() > 0.05 * expected.abs().max()
