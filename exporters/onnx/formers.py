"""query_builder.onnx, short_former.onnx and long_former.onnx: how memory that the model calls for is formed."""

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from exporters.onnx.assembly import single
from exporters.onnx.decoder import heads, mlp, norm
from exporters.onnx.rope import rotary
from exporters.onnx.short_former import short_former_graph
from exporters.onnx.trace import Program, parameter_names, placeholder
from surgeon import ops
from surgeon.families import Family
from surgeon.memory.long_former import LongFormer
from surgeon.memory.lora import adapted
from surgeon.memory.query_builder import QueryBuilder
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.vismem import VisMem

QUERY_BUILDER, SHORT_FORMER, LONG_FORMER = "query_builder", "short_former", "long_former"


def former_graphs(
    family: Family, config: PretrainedConfig, model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, Any]:
    """By name what makes each graph of a model that calls for memory; nothing for another. `model` is on the meta
    device and of `dtype`."""
    vismem: VisMem | None = getattr(model.base_model, "vismem", None)
    if vismem is None:
        return {}
    formers = {SHORT_FORMER: vismem.short, LONG_FORMER: vismem.long}

    def former(name: str) -> ir.Model:
        module = formers[name]
        if isinstance(module, ShortFormer):
            return short_former_graph(family, model, module, vismem.query_builder.num_queries, dtype)
        assert isinstance(module, LongFormer)
        return _long_former(name, family, config, model, module, vismem.query_builder.num_queries, dtype)

    return {
        QUERY_BUILDER: lambda: _query_builder(model, vismem.query_builder, dtype),
        SHORT_FORMER: lambda: former(SHORT_FORMER),
        LONG_FORMER: lambda: former(LONG_FORMER),
    }


class _Queries(nn.Module):
    """The query builder, of one row."""

    def __init__(self, builder: QueryBuilder) -> None:
        super().__init__()
        self.builder = builder

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        """hidden_states [1, L, d] -> queries [1, K, d]."""
        return (self.builder(hidden_states),)


def _query_builder(model: PreTrainedModel, builder: QueryBuilder, dtype: torch.dtype) -> ir.Model:
    width = model.config.get_text_config().hidden_size
    module = _Queries(builder)
    program = Program.of(module, {"hidden_states": placeholder(1, "L", width, dtype=dtype)}, ["queries"])
    return single(QUERY_BUILDER, program, parameter_names(module, model))


class LongFormerGraph(nn.Module):
    """A LongFormer of pre-norm layers, written out over views of them in which its adapters act."""

    inv_freq: Tensor

    def __init__(self, former: LongFormer, decoder: Any, inv_freq: Tensor, rope_scaling: float) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(
            adapted(decoder.layers[index], former.adapters.get_submodule(str(index))) for index in former.layers
        )
        self.memory_init, self.norm, self.rope_scaling = former.memory_init, decoder.norm, rope_scaling
        self.register_buffer("inv_freq", inv_freq.to("meta"), persistent=False)
        self.register_buffer("rope_axes", torch.zeros(len(inv_freq), dtype=torch.int64, device="meta"), False)

    def forward(self, hidden_states: Tensor, queries: Tensor) -> tuple[Tensor]:
        """hidden_states [1, L, d], queries [1, K, d] -> latents [1, N, d]."""
        x = torch.cat((hidden_states[0], queries[0], self.memory_init))
        length, width = x.shape
        places = torch.arange(length, device=x.device)
        cos, sin = rotary(places.view(1, 1, -1), self.inv_freq, self.get_buffer("rope_axes"))
        cos, sin = ((angle * self.rope_scaling).to(x.dtype) for angle in (cos, sin))
        mask = (places.view(1, 1, 1, -1) <= places.view(1, 1, -1, 1)).expand(1, 1, length, length)
        for layer in self.layers:
            attn = layer.self_attn
            q, k, v = heads(attn, norm(layer.input_layernorm, x), 1)
            attended = ops.attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v, mask, attn.scaling)
            x = x + attn.o_proj(attended.transpose(1, 2).reshape(-1, attn.o_proj.in_features))
            x = x + mlp(layer, x)
        count = self.memory_init.shape[0]
        return (norm(self.norm, x.narrow(0, length - count, count)).view(1, count, width),)


def _long_former(
    name: str,
    family: Family,
    config: PretrainedConfig,
    model: PreTrainedModel,
    former: LongFormer,
    num_queries: int,
    dtype: torch.dtype,
) -> ir.Model:
    decoder: Any = model.get_submodule(family.text_model)
    with torch.device("cpu"):  # not in the checkpoint, and without values on the meta device
        embedding = type(decoder.rotary_emb)(config=family.text_config(config))
    constants = {"inv_freq": embedding.inv_freq.float(), "rope_axes": torch.zeros(len(embedding.inv_freq)).long()}
    module = LongFormerGraph(former, decoder, embedding.inv_freq, float(embedding.attention_scaling))
    width = decoder.config.hidden_size
    inputs = {
        "hidden_states": placeholder(1, "L", width, dtype=dtype),
        "queries": placeholder(1, num_queries, width, dtype=dtype),
    }
    program = Program.of(module, inputs, ["latents"], constants=constants)
    return single(name, program, parameter_names(module, model))
