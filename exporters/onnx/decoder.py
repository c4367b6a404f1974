"""decoder.onnx: one graph for prefill and decoding, over static key/value buffers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from exporters.onnx import functions
from exporters.onnx.memory import memory_entries
from exporters.onnx.trace import Program, parameter_names
from surgeon import ops
from surgeon.errors import BundleError
from surgeon.families import Family
from surgeon.memory.decoder_layer import entry_name, grafts_at


class Decoder(nn.Module):
    """A pre-norm decoder and its head, written out for export over the submodules of a transformers model.

    Tokens are flattened to rows `[B * S, d]` wherever a layer treats them one by one, so that a linear layer is one
    Gemm. Which optional parts a layer has (biases, norms of queries and keys, grafts) is read off its submodules.
    """

    inv_freq: Tensor
    rope_axes: Tensor

    def __init__(self, decoder: Any, lm_head: nn.Module, constants: Mapping[str, Tensor], rope_scaling: float) -> None:
        super().__init__()
        self.layers, self.norm, self.lm_head = decoder.layers, decoder.norm, lm_head
        self.rope_scaling = rope_scaling
        for name, value in constants.items():
            self.register_buffer(name, value.to("meta"), persistent=False)

    def forward(
        self,
        *,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_indices: Tensor,
        logits_indices: Tensor,
        deepstack: Tensor | None = None,
        visual_token_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        memory: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        past: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Inputs and outputs as in docs/architecture.md; memory: keys and values by entry; past, present: by layer."""
        batch, length, width = inputs_embeds.shape
        cos, sin = self.rotary(position_ids, inputs_embeds.dtype)
        mask = self.visibility(write_indices, length, past[0][0].shape[2])
        num_deepstack = 0 if deepstack is None else deepstack.shape[0]

        def read(graft: Any, layer: Any, x: Tensor) -> Tensor:
            assert memory is not None and memory_mask is not None and visual_token_mask is not None
            keys, values = memory[entry_name(layer, graft)]
            x = x.view(batch, length, width)
            return functions.call(graft, x, keys, values, memory_mask, visual_token_mask).view(-1, width)

        h = inputs_embeds.view(-1, width)
        present = []
        for i, layer in enumerate(self.layers):
            for graft in grafts_at(layer, "before_layer"):
                h = read(graft, layer, h)
            attn, mlp = layer.self_attn, layer.mlp
            x = norm(layer.input_layernorm, h)
            q, k, v = (
                projection(x).view(batch, length, -1, attn.head_dim)
                for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            if hasattr(attn, "q_norm"):
                q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            keys = ops.cache_update(past[i][0], ops.rope(k, cos, sin), write_indices)
            values = ops.cache_update(past[i][1], v, write_indices)
            present.append((keys, values))
            a = ops.attention(ops.rope(q, cos, sin), keys, values, mask, attn.scaling)
            residual = h + attn.o_proj(a.transpose(1, 2).reshape(-1, attn.o_proj.in_features))
            x = norm(layer.post_attention_layernorm, residual)
            h = residual + mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
            for graft in grafts_at(layer, "beside_mlp"):
                h = h + read(graft, layer, residual)
            h = ops.label(h, f"hidden_states.{i}")
            if deepstack is not None and i < num_deepstack:
                h = h + deepstack[i].view(-1, width)

        first = torch.arange(batch, device=h.device).view(-1, 1) * length
        h = norm(self.norm, h.index_select(0, (first + logits_indices).view(-1)))
        logits = self.lm_head(h).view(batch, logits_indices.shape[1], -1)
        return logits, present

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [B, S, hd / 2] in `dtype`, the angles in fp32: each frequency turns with its axis of the positions."""
        angles = position_ids.float().index_select(0, self.rope_axes).permute(1, 2, 0) * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.rope_scaling != 1.0:
            cos, sin = cos * self.rope_scaling, sin * self.rope_scaling
        return cos.to(dtype), sin.to(dtype)

    def visibility(self, write_indices: Tensor, length: int, max_length: int) -> Tensor:
        """bool [B, 1, S, Smax]: a new token sees the slots up to its own. Built by Reshape alone, for TensorRT in bf16."""
        slots = torch.arange(max_length, device=write_indices.device).view(1, 1, 1, -1)
        tokens = torch.arange(length, device=write_indices.device).view(1, 1, -1, 1)
        return slots <= write_indices.view(-1, 1, 1, 1) + tokens


def norm(module: Any, x: Tensor) -> Tensor:
    """A transformers RMSNorm module as one operator."""
    return ops.rms_norm(x, module.weight, module.variance_epsilon)


def decoder_program(
    family: Family, config: PretrainedConfig, model: PreTrainedModel, dtype: torch.dtype, max_length: int
) -> Program:
    """The decoder of `model`, which is on the meta device and of `dtype`, over caches of `max_length` slots.

    Raises BundleError where the decoder does what this graph cannot say: another layer shape, sliding windows,
    rotary frequencies that depend on the length.
    """
    text = family.text_config(config)
    _check(family, text)
    decoder = model.get_submodule(family.text_model)
    with torch.device("cpu"):  # on the meta device, and not in the checkpoint: computed here
        rotary = type(decoder.rotary_emb)(config=text)  # type: ignore[operator]
    constants = {
        "inv_freq": rotary.inv_freq.float(),
        "rope_axes": torch.tensor(tuple(family.rope_axes(config)), dtype=torch.int64),
    }
    module = Decoder(decoder, model.get_submodule(family.lm_head), constants, float(rotary.attention_scaling))

    batch, length, slots, wanted = 2, 3, 5, 2
    B, S, M, T = (torch.export.Dim(name) for name in ("B", "S", "M", "T"))
    width = text.hidden_size

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs: dict[str, tuple[Tensor, dict[int, Any]]] = {
        "inputs_embeds": (empty(batch, length, width), {0: B, 1: S}),
        "position_ids": (empty(position_axes(family, config), batch, length, dtype=torch.int64), {1: B, 2: S}),
        "write_indices": (empty(batch, dtype=torch.int64), {0: B}),
        "logits_indices": (empty(batch, wanted, dtype=torch.int64), {0: B, 1: T}),
    }
    if num_deepstack := family.deepstack_layers(config):
        inputs["deepstack"] = (empty(num_deepstack, batch, length, width), {1: B, 2: S})
    example: dict[str, Any] = {name: tensor for name, (tensor, _) in inputs.items()}
    shapes: dict[str, Any] = {name: dims for name, (_, dims) in inputs.items()}
    names = list(inputs)

    entries = memory_entries(decoder)
    if entries:
        example["visual_token_mask"] = empty(batch, length, dtype=torch.bool)
        example["memory_mask"] = empty(batch, slots, dtype=torch.bool)
        example["memory"] = {
            e.name: tuple(empty(batch, e.num_key_value_heads, slots, e.head_dim) for _ in range(2)) for e in entries
        }
        shapes |= {"visual_token_mask": {0: B, 1: S}, "memory_mask": {0: B, 1: M}}
        shapes["memory"] = {e.name: ({0: B, 2: M}, {0: B, 2: M}) for e in entries}
        names += ["visual_token_mask", "memory_mask"]
        names += [f"memory_{part}.{e.name}" for e in entries for part in ("keys", "values")]

    cache = (text.num_key_value_heads, max_length, family.head_dim(config))
    layers = range(len(decoder.layers))  # type: ignore[arg-type]
    example["past"] = [(empty(batch, *cache), empty(batch, *cache)) for _ in layers]
    shapes["past"] = [({0: B}, {0: B}) for _ in layers]
    names += [f"past_{part}.{i}" for i in layers for part in ("keys", "values")]
    output_names = ["logits", *(f"present_{part}.{i}" for i in layers for part in ("keys", "values"))]
    return Program(module, example, shapes, names, output_names, constants, parameter_names(module, model))


def position_axes(family: Family, config: PretrainedConfig) -> int:
    """How many axes the family's position ids have."""
    one = np.ones((1, 1), dtype=np.int64)
    return int(family.position_ids(config, one, one, [[]])[0].shape[0])


def _check(family: Family, text: Any) -> None:
    if family.layer_shape != "pre_norm":
        raise BundleError(f"cannot export decoder layers of shape {family.layer_shape!r}; supported: pre_norm")
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise BundleError(
            "cannot export a decoder with sliding-window attention (layer_types in the config); "
            "set use_sliding_window to false if the context stays within the window"
        )
    rope_type = text.rope_parameters["rope_type"]
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise BundleError(
            f"cannot export rotary embeddings of type {rope_type!r}, whose frequencies change with the length; "
            "supported: default, linear, llama3, yarn"
        )


_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
