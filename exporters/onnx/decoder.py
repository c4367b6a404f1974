"""decoder.onnx: one graph for prefill and decoding, over static key/value buffers."""

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from exporters.onnx import functions
from exporters.onnx.assembly import Assembly
from exporters.onnx.memory import layer_entries, memory_entries
from exporters.onnx.rope import GraftRopes, layer_grafts, num_position_axes, rotary
from exporters.onnx.trace import Placeholder, Program, parameter_names, placeholder
from surgeon import ops
from surgeon.errors import BundleError
from surgeon.families import Family
from surgeon.memory.decoder_layer import grafts_at
from surgeon.memory.rotary import Rotary
from surgeon.memory.visibility import visibility_of
from surgeon.positions import record_of


class PositionTables(nn.Module):
    """What the layers share: rotary angles, the grafts' too, which slots a token sees, and DeepStack features."""

    inv_freq: Tensor
    rope_axes: Tensor

    def __init__(
        self,
        constants: Mapping[str, Tensor],
        rope_scaling: float,
        graft_ropes: GraftRopes,
        max_length: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.rope_scaling, self.max_length, self.dtype = rope_scaling, max_length, dtype
        self.graft_ropes = graft_ropes
        for name, value in constants.items():
            self.register_buffer(name, value.to("meta"), persistent=False)

    def forward(
        self, position_ids: Tensor, write_indices: Tensor, deepstack: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """position_ids [A, B, S], write_indices [B], deepstack [K, B, S, d] -> cos, sin [B, S, hd / 2], mask bool
        [B, 1, S, Smax], K features [B, S, d], and cos, sin for each kind of graft with a rope."""
        cos, sin = rotary(position_ids, self.inv_freq, self.rope_axes)
        if self.rope_scaling != 1.0:
            cos, sin = cos * self.rope_scaling, sin * self.rope_scaling

        # a new token sees the slots up to its own; Reshape alone, because TensorRT refuses Unsqueeze here in bf16
        slots = torch.arange(self.max_length, device=write_indices.device).view(1, 1, 1, -1)
        tokens = torch.arange(position_ids.shape[2], device=write_indices.device).view(1, 1, -1, 1)
        mask = slots <= write_indices.view(-1, 1, 1, 1) + tokens

        features = () if deepstack is None else tuple(deepstack[i] for i in range(deepstack.shape[0]))
        grafts = [part for pair in self.graft_ropes(position_ids, self.dtype).values() for part in pair]
        return cos.to(self.dtype), sin.to(self.dtype), mask, *features, *grafts


class PreNormLayer(nn.Module):
    """A pre-norm decoder layer, written out over the submodules of a transformers layer.

    Which optional parts it has (biases, norms of queries and keys, grafts) is read off its submodules.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        write_indices: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        visual_token_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        memory: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        rotary: Mapping[str, Rotary] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [B, S, d]; cos, sin, mask as from `PositionTables`; memory: keys and values by kind of graft;
        memory_mask [B, M], or of each token [B, S, M]; rotary: cos and sin by kind, of grafts with a rope ->
        hidden_states, present keys, present values."""
        attn = self.layer.self_attn
        batch, length, width = hidden_states.shape

        def read(graft: Any, x: Tensor) -> Tensor:
            assert memory is not None and memory_mask is not None and visual_token_mask is not None
            turned = None if rotary is None else rotary.get(graft.kind)
            return functions.call(graft, x, *memory[graft.kind], memory_mask, visual_token_mask, turned)

        for _, graft in grafts_at(self.layer, "before_layer"):
            hidden_states = read(graft, hidden_states)

        # Tokens as rows [B * S, d] where they are treated one by one, so that a linear layer is one Gemm
        h = hidden_states.view(-1, width)
        q, k, v = heads(attn, norm(self.layer.input_layernorm, h), batch)
        keys = ops.cache_update(past_keys, ops.rope(k, cos, sin), write_indices)
        values = ops.cache_update(past_values, v, write_indices)
        attended = ops.attention(ops.rope(q, cos, sin), keys, values, mask, attn.scaling)
        residual = h + attn.o_proj(attended.transpose(1, 2).reshape(-1, attn.o_proj.in_features))
        h = residual + mlp(self.layer, residual)
        hidden_states = h.view(batch, length, width)
        for _, graft in grafts_at(self.layer, "beside_mlp"):
            hidden_states = hidden_states + read(graft, residual.view(batch, length, width))
        return hidden_states, keys, values


LAYERS: dict[str, type[nn.Module]] = {"pre_norm": PreNormLayer}
"""By the family's placement of norms."""


def heads(attn: Any, x: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, S, hd] of x [B * S, d], before they are turned."""
    q, k, v = (
        projection(x).view(batch, -1, projection.out_features // attn.head_dim, attn.head_dim)
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    if hasattr(attn, "q_norm"):
        q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def mlp(layer: Any, residual: Tensor) -> Tensor:
    """residual [B * S, d] -> what the MLP adds to it."""
    x = norm(layer.post_attention_layernorm, residual)
    output: Tensor = layer.mlp.down_proj(layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
    return output


class Head(nn.Module):
    """The final norm and the vocabulary projection, of the wanted tokens alone; where memory is formed of them, the
    last hidden states of all tokens too."""

    def __init__(self, final_norm: nn.Module, lm_head: nn.Module, last_hidden_state: bool) -> None:
        super().__init__()
        self.norm, self.lm_head, self.last_hidden_state = final_norm, lm_head, last_hidden_state

    def forward(self, hidden_states: Tensor, logits_indices: Tensor) -> tuple[Tensor, ...]:
        """hidden_states [B, S, d], logits_indices [B, T] -> logits [B, T, V], and last_hidden_state [B, S, d]."""
        batch, length, width = hidden_states.shape
        first = torch.arange(batch, device=logits_indices.device).view(-1, 1) * length
        selected = hidden_states.view(-1, width).index_select(0, (first + logits_indices).view(-1))
        logits: Tensor = self.lm_head(norm(self.norm, selected))
        logits = logits.view(batch, logits_indices.shape[1], logits.shape[1])
        return (logits, norm(self.norm, hidden_states)) if self.last_hidden_state else (logits,)


def norm(module: Any, x: Tensor) -> Tensor:
    """A transformers RMSNorm module as one operator."""
    return ops.rms_norm(x, module.weight, module.variance_epsilon)


def decoder_graph(
    family: Family,
    config: PretrainedConfig,
    model: PreTrainedModel,
    dtype: torch.dtype,
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> ir.Model:
    """The decoder of `model`, which is on the meta device and of `dtype`, over caches of `max_length` slots.

    Inputs and outputs as in docs/bundle.md; initialisers bear the model's parameter names and have no values.
    `progress(done, total)` is called after each layer. Raises BundleError where the decoder does what this graph cannot
    say: another shape of layer, sliding windows, rotary frequencies that depend on the length.
    """
    text = family.text_config(config)
    _check(family, text, max_length)
    decoder: Any = model.get_submodule(family.text_model)
    parts = _Programs(family, config, dtype, max_length)
    ropes = GraftRopes.of(graft for layer in decoder.layers for graft in layer_grafts(layer))
    assembly = Assembly("decoder")

    shared = assembly.add(parts.positions(decoder.rotary_emb, ropes).trace(), {}, {})
    deepstack = [shared[f"deepstack.{i}"] for i in range(family.deepstack_layers(config))]
    common: dict[str, ir.Value | str] = {name: shared[name] for name in ("cos", "sin", "mask")}
    common |= {name: shared[name] for kind in ropes.kinds for name in (f"cos.{kind}", f"sin.{kind}")}
    common |= {name: name for name in ("write_indices", *_MASKS)}
    hidden_states: ir.Value | str = "inputs_embeds"
    traced: dict[str, ir.Model] = {}
    present = []
    for index, layer in enumerate(decoder.layers):
        inputs = common | {"hidden_states": hidden_states}
        for kind in layer_entries(layer, parts.width, dtype):
            for part in ("keys", "values"):
                inputs[f"memory_{part}.{kind}"] = f"memory_{part}.{index}.{kind}"
        program = parts.layer(layer)
        key = _kind(layer)
        if key not in traced:
            traced[key] = program.trace()
        outputs = assembly.add(traced[key], inputs, parameter_names(program.module, model), suffix=f".{index}")
        hidden_states = outputs["hidden_states"]
        if index < len(deepstack):
            hidden_states = assembly.add_node("Add", [hidden_states, deepstack[index]], f"deepstack_added.{index}")
        present += [outputs["present_keys"], outputs["present_values"]]
        if progress:
            progress(index + 1, len(decoder.layers))

    head = parts.head(decoder.norm, model.get_submodule(family.lm_head), bool(record_of(config).get("vismem")))
    inputs = {"hidden_states": hidden_states, "logits_indices": "logits_indices"}
    outputs = assembly.add(head.trace(), inputs, parameter_names(head.module, model), suffix=".head")
    for name, value in outputs.items():
        value.name = name

    names = ["inputs_embeds", "position_ids", "write_indices", "logits_indices"]
    names += ["deepstack"] if deepstack else []
    entries = memory_entries(decoder)
    names += [name for name in _MASKS if assembly.reads(name)]  # a graft may have no use for one
    names += [f"memory_{part}.{entry.name}" for entry in entries for part in ("keys", "values")]
    names += [f"past_{part}.{i}" for i in range(len(decoder.layers)) for part in ("keys", "values")]
    return assembly.finish(names, [*outputs.values(), *present])


class _Programs:
    """The programs of the decoder's parts."""

    def __init__(self, family: Family, config: PretrainedConfig, dtype: torch.dtype, max_length: int) -> None:
        self.family, self.config, self.dtype, self.max_length = family, config, dtype, max_length
        self.width = family.text_config(config).hidden_size
        self.head_dim = family.head_dim(config)
        alike = visibility_of(record_of(config)) == "all"
        self.memory_mask = ("B", "M") if alike else ("B", "S", "M")

    def positions(self, rotary_emb: Any, graft_ropes: GraftRopes) -> Program:
        with torch.device("cpu"):  # not in the checkpoint, and without values on the meta device
            rotary = type(rotary_emb)(config=self.family.text_config(self.config))
        constants = {
            "inv_freq": rotary.inv_freq.float(),
            "rope_axes": torch.tensor(tuple(self.family.rope_axes(self.config)), dtype=torch.int64),
        }
        inputs = {
            "position_ids": placeholder(num_position_axes(self.family, self.config), "B", "S", dtype=torch.int64),
            "write_indices": placeholder("B", dtype=torch.int64),
        }
        features = range(self.family.deepstack_layers(self.config))
        if features:
            inputs["deepstack"] = placeholder(len(features), "B", "S", self.width, dtype=self.dtype)
        scaling = float(rotary.attention_scaling)
        module = PositionTables(constants, scaling, graft_ropes, self.max_length, self.dtype)
        outputs = ["cos", "sin", "mask", *(f"deepstack.{i}" for i in features)]
        outputs += [f"{part}.{kind}" for kind in graft_ropes.kinds for part in ("cos", "sin")]
        return Program.of(module, inputs, outputs, constants=constants | graft_ropes.constants("graft_ropes."))

    def layer(self, layer: Any) -> Program:
        def floats(*shape: int | str) -> Placeholder:
            return placeholder(*shape, dtype=self.dtype)

        attn = layer.self_attn
        kv_heads = attn.k_proj.out_features // attn.head_dim
        angles = floats("B", "S", attn.head_dim // 2)
        cache = floats("B", kv_heads, self.max_length, attn.head_dim)
        inputs: dict[str, Any] = {
            "hidden_states": self.hidden_states,
            "cos": angles,
            "sin": angles,
            "mask": placeholder("B", 1, "S", self.max_length, dtype=torch.bool),
            "write_indices": placeholder("B", dtype=torch.int64),
            "past_keys": cache,
            "past_values": cache,
        }
        names = list(inputs)
        if entries := layer_entries(layer, self.width, self.dtype):
            inputs["visual_token_mask"] = placeholder("B", "S", dtype=torch.bool)
            inputs["memory_mask"] = placeholder(*self.memory_mask, dtype=torch.bool)
            inputs["memory"] = {
                kind: (floats("B", heads, "M", head_dim),) * 2 for kind, (heads, head_dim) in entries.items()
            }
            names += _MASKS
            names += [f"memory_{part}.{kind}" for kind in entries for part in ("keys", "values")]
            if ropes := GraftRopes.of(layer_grafts(layer)).ropes:
                inputs["rotary"] = {kind: (floats("B", "S", rope.head_dim // 2),) * 2 for kind, rope in ropes.items()}
                names += [f"{part}.{kind}" for kind in ropes for part in ("cos", "sin")]
        outputs = ["hidden_states", "present_keys", "present_values"]
        return Program.of(LAYERS[self.family.norm_placement](layer), inputs, outputs, input_names=names)

    def head(self, final_norm: nn.Module, lm_head: nn.Module, last_hidden_state: bool) -> Program:
        indices = placeholder("B", "T", dtype=torch.int64)
        inputs = {"hidden_states": self.hidden_states, "logits_indices": indices}
        outputs = ["logits", "last_hidden_state"] if last_hidden_state else ["logits"]
        return Program.of(Head(final_norm, lm_head, last_hidden_state), inputs, outputs)

    @property
    def hidden_states(self) -> Placeholder:
        return placeholder("B", "S", self.width, dtype=self.dtype)


def _kind(layer: Any) -> str:
    """Layers of one kind have the same graph over other weights."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
    return f"{layer}{shapes}{layer.self_attn.scaling}"


def _check(family: Family, text: Any, max_length: int) -> None:
    if family.norm_placement not in LAYERS:
        raise BundleError(
            f"cannot export decoder layers with norms placed as {family.norm_placement!r}; supported: "
            f"{', '.join(LAYERS)}"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise BundleError(
            "cannot export a decoder with sliding-window attention (layer_types in the config); "
            "set use_sliding_window to false if the context stays within the window"
        )
    rope_type = text.rope_parameters["rope_type"]
    if rope_type == "dynamic":
        # the plain frequencies, as long as no position lies beyond those of the pretraining
        if max_length > text.max_position_embeddings:
            raise BundleError(
                f"cannot export rotary embeddings of type 'dynamic' for max_length {max_length}: beyond "
                f"{text.max_position_embeddings} tokens (max_position_embeddings) their frequencies change with the "
                f"length; use a max_length of at most {text.max_position_embeddings}"
            )
    elif rope_type == "longrope":
        raise BundleError(
            "cannot export rotary embeddings of type 'longrope', whose frequencies change with the length; "
            "supported: default, linear, dynamic, llama3, yarn"
        )


_MASKS = ("visual_token_mask", "memory_mask")
