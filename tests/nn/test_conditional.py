"""Attention of Conditional DETR against loops, and the plain encoder against torch's own layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from steadydetr.nn.attention import Rows
from steadydetr.nn.conditional import ConditionalCrossAttention, ConditionalSelfAttention
from steadydetr.nn.encoder import PlainEncoder, PlainEncoderLayer
from tests.reference import conditional as slow


def vectors(rows: int, seed: int, dim: int = 8) -> Tensor:
    return torch.randn(1, rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("first", [True, False])
def test_cross_attention_equals_its_twin(first: bool) -> None:
    """In the first layer position is added to content too; padding is not looked at."""
    torch.manual_seed(0)
    module = ConditionalCrossAttention(8, 2, first).double()
    content, position, sine = (vectors(3, seed) for seed in range(3))
    tokens, places = vectors(5, 3), vectors(5, 4)
    padding = torch.tensor([[False, True, False, False, True]])
    query, key, place = module.query_content(content), module.key_content(tokens), module.key_position(places)
    assert (module.query_position is not None) == first
    if module.query_position is not None:
        query, key = query + module.query_position(position), key + place
    given = (query, module.query_sine(sine), key, place, module.value(tokens), padding)
    mixed = torch.tensor(slow.cross_attention(*(tensor[0].tolist() for tensor in given), heads=2), dtype=torch.float64)
    found = module(content, position, sine, tokens, places, padding)
    torch.testing.assert_close(found[0], module.out_proj(mixed))
    other = torch.where(padding[..., None], 7.0, tokens)
    torch.testing.assert_close(module(content, position, sine, other, places, padding), found)


def test_self_attention_is_that_of_torch() -> None:
    """With the same projection of content and position it is torch's own, whose queries and keys are content + position."""
    torch.manual_seed(0)
    module, theirs = ConditionalSelfAttention(8, 2).double(), nn.MultiheadAttention(8, 2, batch_first=True).double()
    state = {f"{name}.weight": value for name, value in zip(("query", "key", "value"), theirs.in_proj_weight.chunk(3), strict=True)}
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        biases = theirs.in_proj_bias.chunk(3)
        for parts, bias in ((("query_content", "query_position"), biases[0]), (("key_content", "key_position"), biases[1])):
            for part in parts:
                getattr(module, part).weight.copy_(state[f"{part.split('_')[0]}.weight"])
                getattr(module, part).bias.copy_(bias / 2)
        module.value.weight.copy_(state["value.weight"])
        module.value.bias.copy_(biases[2])
    module.out_proj.load_state_dict(theirs.out_proj.state_dict())
    content, position = vectors(6, 0), vectors(6, 1)
    plan = [Rows(slice(0, 4), (slice(0, 4),), None), Rows(slice(4, 6), (slice(4, 6), slice(0, 4)), None)]
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    hidden[:4, 4:] = True
    placed = content + position
    expected, _ = theirs(placed, placed, content, attn_mask=hidden)
    torch.testing.assert_close(module(content, position, plan), expected)


def test_the_plain_encoder_is_that_of_torch() -> None:
    torch.manual_seed(0)
    encoder = PlainEncoder(lambda: PlainEncoderLayer(8, 2, 12, 0.0), 2, 8).double()
    tokens, padding = torch.cat((vectors(6, 0), vectors(6, 1))), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    expected = tokens
    for layer in encoder.layers:
        theirs = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True).double()
        assert isinstance(layer, PlainEncoderLayer)
        for mine, other in (
            (layer.self_attention, theirs.self_attn),
            (layer.norm, theirs.norm1),
            (layer.ffn.linear1, theirs.linear1),
            (layer.ffn.linear2, theirs.linear2),
            (layer.ffn.norm, theirs.norm2),
        ):
            nn.Module.load_state_dict(other, mine.state_dict())
        expected = theirs(expected, src_key_padding_mask=padding)
    found = encoder(tokens, torch.zeros_like(tokens), padding)
    torch.testing.assert_close(found[~padding], expected[~padding])
