"""What the chains of a graft are given at one size: types for planning, and random tensors for running."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.kernels import mixin, pvm
from exporters.kernels.kernel import Chain
from exporters.kernels.plan import TensorType
from surgeon.memory.graft import Graft
from surgeon.memory.mixin import Mixin
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.rotary import Rope

Types = dict[str, TensorType]


@dataclass(frozen=True)
class Size:
    """Of a request."""

    batch: int = 1
    length: int = 1
    """Tokens of a row: 1 where it decodes."""
    slots: int = 1024
    dtype: str = "bfloat16"
    mask_per_token: bool = False
    """Whether tokens of a row see different pictures."""
    visual_tokens: bool = False
    """Whether some tokens are a picture's."""

    def __str__(self) -> str:
        marks = ", a mask per token" * self.mask_per_token + ", visual tokens" * self.visual_tokens
        return f"{self.dtype}, batch {self.batch} x {self.length}, {self.slots} slots{marks}"


def reading(graft: Graft, size: Size) -> tuple[Chain, Types]:
    """The chain that reads the memory, and its inputs. Raises TypeError for a kind of graft that has none."""

    def dense(*shape: int) -> TensorType:
        return TensorType(shape, size.dtype)

    batch, length, slots = size.batch, size.length, size.slots
    mask_shape = (batch, length, slots) if size.mask_per_token else (batch, slots)
    if isinstance(graft, PersistentVisualMemory):
        chain, heads, width = pvm.chain(graft.eps), graft.num_key_value_heads, graft.text_proj.in_features
    elif isinstance(graft, Mixin):
        chain, heads, width = mixin.chain(graft.eps), graft.num_heads, graft.q_proj.in_features
    else:
        raise TypeError(f"no fused kernels for grafts of kind {graft.kind!r}")
    memory = dense(batch, heads, slots, graft.head_dim)
    types = {
        "hidden_states": dense(batch, length, width),
        "keys": memory,
        "values": memory,
        "memory_mask": TensorType(mask_shape, "bool"),
    }
    if isinstance(graft, Mixin):
        angles = TensorType((batch, length, graft.head_dim // 2), "float32")
        types |= {"cos": angles, "sin": angles}
    else:
        types["onto"] = dense(batch, length, width)
        if size.visual_tokens:
            types["visual_token_mask"] = TensorType((batch, length), "bool")
    names = [name for name in chain.inputs if name not in (*types, "visual_token_mask")]
    types |= {name: dense(*weight.shape) for name, weight in zip(names, graft.weights(), strict=True)}
    return chain, {name: types[name] for name in chain.inputs if name in types}


def filling(graft: Graft, size: Size) -> tuple[Chain, Types]:
    """The chain that fills the memory, and its inputs. Raises TypeError for a kind of graft that has none."""
    if isinstance(graft, PersistentVisualMemory):
        chain, width = pvm.memory_chain(graft.eps, graft.head_dim), graft.text_proj.in_features
    elif isinstance(graft, Mixin):
        chain, width = mixin.memory_chain(graft.eps, graft.head_dim), graft.q_proj.in_features
    else:
        raise TypeError(f"no fused kernels for grafts of kind {graft.kind!r}")
    angles = TensorType((size.batch, size.slots, graft.head_dim // 2), "float32")
    types = {"visual_embeds": TensorType((size.batch, size.slots, width), size.dtype)}
    types |= {"cos": angles, "sin": angles} if isinstance(graft, Mixin) else {}
    names = [name for name in chain.inputs if name not in types]
    weights = zip(names, graft.memory_weights(), strict=True)
    types |= {name: TensorType(tuple(weight.shape), size.dtype) for name, weight in weights}
    return chain, {name: types[name] for name in chain.inputs}


def draw(types: Mapping[str, TensorType], device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors whose products stay near one. Masks are full, and gates open."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn = {}
    for name, wanted in types.items():
        dtype, shape = getattr(torch, wanted.dtype), wanted.shape
        noise = torch.randn(shape, generator=generator, device=device)
        if dtype == torch.bool:
            tensor = torch.full(shape, name == "memory_mask", device=device)
        elif name in ("cos", "sin"):
            positions = torch.arange(shape[1], device=device).expand(1, shape[0], -1)
            tensor = Rope(2 * shape[2], 1e6)(positions)[("cos", "sin").index(name)]
        elif shape == (1,):
            tensor = 0.6 + 0.2 * noise.abs()
        elif len(shape) == 1:
            tensor = 1 + 0.2 * noise
        else:
            tensor = noise / shape[1] ** 0.5 if len(shape) == 2 else noise
        drawn[name] = tensor.to(dtype).contiguous()
    return drawn


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
