"""The query builder against what its authors published, and against torch's own encoder."""

import pytest
import torch
from torch import Tensor, nn

from golden import published_query_builder
from surgeon.memory.inserted import Constant, Normal
from surgeon.memory.query_builder import POSITIONS, QueryBuilder


@torch.no_grad()
def test_it_computes_what_the_authors_published() -> None:
    builder, tensors = published_query_builder()
    torch.testing.assert_close(builder(tensors["input.H"]), tensors["output.Q"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_is_not_seen() -> None:
    builder, tensors = published_query_builder()
    hidden_states, padding = tensors["input.H"], tensors["input.padding"]
    assert padding.any() and not padding.all()
    queries = builder(hidden_states, padding)
    torch.testing.assert_close(queries, tensors["output.Q_padded"], atol=1e-5, rtol=0)
    noise = torch.randn(hidden_states.shape) * padding[..., None]
    assert torch.equal(builder(hidden_states + noise, padding), queries)
    assert (builder(hidden_states + noise) - queries).abs().max() > 0.01


def drawn(builder: QueryBuilder) -> QueryBuilder:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in builder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise * 0.2 if name.endswith("norm.weight") else noise * 0.2)
    return builder


@torch.no_grad()
def by_torchs_own_encoder(builder: QueryBuilder, hidden_states: Tensor) -> Tensor:
    """[B, L, d] -> [B, K, d]."""
    width = builder.query_init.shape[1]
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for own, theirs in zip(builder.layers, encoder.layers, strict=True):
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": own.qkv.weight, "self_attn.in_proj_bias": own.qkv.bias,
                "self_attn.out_proj.weight": own.out.weight, "self_attn.out_proj.bias": own.out.bias,
                "linear1.weight": own.up.weight, "linear1.bias": own.up.bias,
                "linear2.weight": own.down.weight, "linear2.bias": own.down.bias,
                "norm1.weight": own.attention_norm.weight, "norm1.bias": own.attention_norm.bias,
                "norm2.weight": own.mlp_norm.weight, "norm2.bias": own.mlp_norm.bias,
            }
        )  # fmt: skip
    length = hidden_states.shape[1]
    x = torch.cat((builder.enter(hidden_states), builder.query_init.expand(len(hidden_states), -1, -1)), 1)
    x = x + builder.positions[: x.shape[1]]
    mask = torch.zeros(x.shape[1], x.shape[1])
    mask[:length, length:] = -torch.inf
    encoded: Tensor = builder.norm(encoder(x, mask))
    queries: Tensor = builder.leave(encoded[:, length:])
    return queries


@pytest.mark.parametrize("width", [None, 48, 24])
@torch.no_grad()
def test_a_width_of_its_own(width: int | None) -> None:
    builder = drawn(QueryBuilder(48, 5, width))
    assert builder.query_init.shape == (5, width or 48)
    assert isinstance(builder.enter, nn.Linear) == isinstance(builder.leave, nn.Linear) == (width == 24)
    hidden_states = torch.randn(2, 17, 48)
    queries = builder(hidden_states)
    assert queries.shape == (2, 5, 48)
    torch.testing.assert_close(queries, by_torchs_own_encoder(builder, hidden_states), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_states_do_not_see_the_queries() -> None:
    builder, tensors = published_query_builder()
    encoded: list[Tensor] = []
    builder.layers[-1].register_forward_hook(lambda module, args, output: encoded.append(output))
    before = builder(tensors["input.H"])
    builder.query_init += torch.randn(builder.query_init.shape)
    after = builder(tensors["input.H"])
    length = tensors["input.H"].shape[1]
    assert torch.equal(encoded[0][:, :length], encoded[1][:, :length])
    assert (encoded[0][:, length:] - encoded[1][:, length:]).abs().amin((0, 1)).max() > 0.01
    assert (before - after).abs().max() > 0.01


@torch.no_grad()
def test_it_takes_as_many_hidden_states_as_it_says() -> None:
    builder = drawn(QueryBuilder(16, 3))
    assert builder.max_hidden_states == POSITIONS - 3
    assert builder(torch.zeros(1, builder.max_hidden_states, 16)).shape == (1, 3, 16)
    with pytest.raises(IndexError):
        builder(torch.zeros(1, builder.max_hidden_states + 1, 16))


def test_heads_have_to_share_its_width() -> None:
    with pytest.raises(ValueError, match="width 20 is not divisible by its 8 heads"):
        QueryBuilder(64, 4, 20)


@pytest.mark.parametrize("width", [None, 8])
def test_values_at_insertion(width: int | None) -> None:
    builder = QueryBuilder(16, 3, width)
    initialisers = builder.initialisers(0.02)
    assert initialisers.keys() == dict(builder.named_parameters()).keys()
    for name, initialiser in initialisers.items():
        expected = Constant(0.0) if name.endswith("bias") else Normal(0.02)
        assert initialiser == (Constant(1.0) if name.endswith("norm.weight") else expected), name
