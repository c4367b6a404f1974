"""Inputs of the chains of a graft at one size: types for planning, and random tensors for running."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.kernels.kernel import Chain, Chains, chains_of
from exporters.kernels.plan import TensorType, plan
from surgeon.memory.graft import Graft
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
    """Whether tokens of a row see different images."""
    visual_tokens: bool = False
    """Whether some tokens are an image's."""

    def __str__(self) -> str:
        marks = ", a mask per token" * self.mask_per_token + ", visual tokens" * self.visual_tokens
        return f"{self.dtype}, batch {self.batch} x {self.length}, {self.slots} slots{marks}"


def attention_workload(graft: Graft, size: Size) -> tuple[Chain, Types]:
    """The chain that reads the memory, and its inputs. Raises TypeError for a kind of graft that has none."""
    chain: Chain = _chains(graft).attend(_eps(graft))
    weights = graft.weights()
    batch, length = size.batch, size.length
    stream = TensorType((batch, length, _width(weights)), size.dtype)
    angles = TensorType((batch, length, _head_dim(graft) // 2), "float32")
    memory = _memory(graft, size)
    types = {
        "hidden_states": stream,
        **dict.fromkeys(("keys", "values"), memory),
        "memory_mask": TensorType((batch, *((length,) * size.mask_per_token), size.slots), "bool"),
        "visual_token_mask": TensorType((batch, length), "bool"),
        **dict.fromkeys(("cos", "sin"), angles),
        "residual": stream,
    }
    names = [name for name in chain.inputs if name not in types]
    types |= {name: TensorType(tuple(w.shape), size.dtype) for name, w in zip(names, weights, strict=True)}
    if not size.visual_tokens:
        del types["visual_token_mask"]
    return chain, {name: types[name] for name in chain.inputs if name in types}


def memory_workload(graft: Graft, size: Size) -> tuple[Chain, Types]:
    """The chain that fills the memory, and its inputs. Raises TypeError for a kind of graft that has none."""
    chain: Chain = _chains(graft).write_memory(_eps(graft), _head_dim(graft))
    weights = graft.memory_weights()
    angles = TensorType((size.batch, size.slots, _head_dim(graft) // 2), "float32")
    types = {
        "visual_embeds": TensorType((size.batch, size.slots, _width(weights)), size.dtype),
        **dict.fromkeys(("cos", "sin"), angles),
    }
    names = [name for name in chain.inputs if name not in types]
    types |= {name: TensorType(tuple(w.shape), size.dtype) for name, w in zip(names, weights, strict=True)}
    return chain, {name: types[name] for name in chain.inputs}


def _chains(graft: Graft) -> Chains:
    chains = chains_of(graft.kind)
    if chains is None:
        raise TypeError(f"no fused kernels for grafts of kind {graft.kind!r}")
    return chains


def _eps(graft: Graft) -> float:
    eps: float = graft.eps  # type: ignore[assignment]
    return eps


def _head_dim(graft: Graft) -> int:
    head_dim: int = graft.head_dim  # type: ignore[assignment]
    return head_dim


def _width(weights: Sequence[Tensor]) -> int:
    """The hidden size: what comes first is a norm of hidden states, or projects them."""
    return weights[0].shape[-1]


def _memory(graft: Graft, size: Size) -> TensorType:
    """Keys or values, as the chain that fills the memory makes them."""
    chain, types = memory_workload(graft, size)
    tensor_types = {
        value: launch.outputs[name] for launch in plan(chain, types) for name, value in launch.step.outputs.items()
    }
    return tensor_types["keys"]


def draw(types: Mapping[str, TensorType], device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors whose products stay near one. Masks are full, and gates open."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, tensor_type in types.items():
        dtype, shape = getattr(torch, tensor_type.dtype), tensor_type.shape
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
        tensors[name] = tensor.to(dtype).contiguous()
    return tensors


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
