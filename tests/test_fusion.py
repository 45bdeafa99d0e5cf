"""Memory fusion (Stable-DINO Fig. 4): wiring against a slow twin, the projection, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadydetr.detectors import TransformerConfig
from steadydetr.nn.configs import FusionKind
from steadydetr.nn.encoder import Encoder, EncoderLayer
from tests.reference import stable as slow


def encoder_of(kind: FusionKind, depth: int, checkpointing: bool = False) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(lambda: EncoderLayer(8, 2, 1, 2, 8, 0.0), depth, 8, kind, checkpointing=checkpointing)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def run(encoder: Encoder, tokens: Tensor) -> Tensor:
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    return encoder(tokens, torch.zeros_like(tokens), padding, torch.ones(len(tokens), 1, 2), ((2, 3),))


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("kind", ["none", "simple", "u_like", "dense"])
def test_fusion_equals_its_twin(kind: FusionKind, depth: int) -> None:
    """Which outputs go into which layer and fusion, and what comes out."""
    encoder, tokens = encoder_of(kind, depth), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    names, seen = {id(tokens): "x"}, []
    alive = []  # so that no name's id is given to another tensor

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        inputs = args[0] if isinstance(args[0], tuple | list) else args[:1]
        seen.append(tuple(names[id(version)] for version in inputs))
        fused = sum(name.startswith("f") for name in names.values())
        names[id(output)] = f"f{fused + 1}" if module in list(encoder.fusions) else str(len(names) - fused)
        alive.append(output)

    for part in (*encoder.layers, *encoder.fusions):
        part.register_forward_hook(record)
    output = run(encoder, tokens)
    assert seen == slow.wiring(kind, depth)
    assert output is alive[-1] and output.shape == tokens.shape
    assert len(encoder.fusions) == sum(len(step) > 1 for step in seen)  # each has its own parameters


def test_a_fusion_is_a_normalised_projection() -> None:
    encoder = encoder_of("dense", 2)
    versions = [torch.randn(1, 6, 8) for _ in range(3)]
    weight, bias, norm = encoder.fusions[0].project.weight, encoder.fusions[0].project.bias, encoder.fusions[0].norm
    expected = norm(sum((part @ weight[:, 8 * i : 8 * i + 8].T for i, part in enumerate(versions)), bias))
    torch.testing.assert_close(encoder.fusions[0](versions), expected)
    plain = Encoder(lambda: EncoderLayer(8, 2, 1, 2, 8, 0.0), 2, 8, "dense", fusion_norm=False)
    assert not list(plain.fusions[0].norm.parameters())


@pytest.mark.parametrize("kind", ["simple", "u_like", "dense", "dense_simple"])
def test_checkpointing_changes_nothing(kind: FusionKind) -> None:
    outcomes = []
    for on in (False, True):
        tokens = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = run(encoder_of(kind, 3, on), tokens)
        outcomes.append((output, *torch.autograd.grad(output.square().sum(), tokens)))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_fusion_needs_an_encoder() -> None:
    with pytest.raises(ValueError, match=r"transformer\.fusion = dense needs an encoder"):
        TransformerConfig(encoder_layers=0, fusion="dense")
