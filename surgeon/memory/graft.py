"""What every graft is: a module inside a decoder layer that reads the visual memory."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from surgeon.memory.fused import FusedForm
from surgeon.memory.rotary import Rope, Rotary


@dataclass(frozen=True)
class Normal:
    """Drawn from a normal distribution around zero."""

    std: float


@dataclass(frozen=True)
class Constant:
    value: float


Initialiser = Normal | Constant


class Graft(nn.Module, ABC):
    """A branch grafted into one decoder layer.

    `project` turns visual embeddings into this layer's keys and values, once, when a picture enters; `forward` reads
    them for every token. Nothing is kept on the module between calls.
    """

    kind: ClassVar[str]
    """Its name: the attribute of the layer that holds it, and the name of its file."""
    site: ClassVar[Literal["before_layer", "beside_mlp"]]
    """Where the layer calls it. `before_layer`: its output replaces the layer's input. `beside_mlp`: it reads what the
    MLP's norm reads, and its output is added to the MLP's."""

    gates: ClassVar[tuple[str, ...]]
    """The parameters that are zero at insertion, which together make the graft change exactly nothing."""
    rope: Rope | None = None
    """How its queries and keys turn with their positions; None where positions do not matter to it."""
    fused: FusedForm | None = None
    """What `read` and `remember` take in its place on the form's devices."""

    @classmethod
    @abstractmethod
    def from_config(cls, text_config: Any, options: dict[str, Any]) -> Self:
        """The module for one layer of a decoder with this config. `options`: the graft's part of the pass record."""

    def initialisers(self, std: float) -> dict[str, Initialiser]:
        """Parameter name -> its value at insertion: the layer computes what it did before, and the graft can learn.

        Gates are zero, norms one, matrices normal: a second zero matrix behind a zero gate would leave both without
        gradient for ever.
        """
        return {name: self._initialiser(name, std) for name, _ in self.named_parameters()}

    def _initialiser(self, name: str, std: float) -> Initialiser:
        if name in self.gates:
            return Constant(0.0)
        return Constant(1.0) if name.endswith("norm.weight") else Normal(std)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Set every parameter to its value at insertion, in place."""
        for name, initialiser in self.initialisers(std).items():
            parameter = self.get_parameter(name)
            match initialiser:
                case Normal(std=scale):
                    parameter.normal_(0.0, scale)
                case Constant(value=value):
                    parameter.fill_(value)

    @abstractmethod
    def project(self, visual_embeds: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """visual_embeds [B, M, d], as they enter the decoder, and where the graft has a `rope` the angles of their
        positions -> keys, values [B, Hm, M, hd]."""

    @abstractmethod
    def forward(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """hidden_states [B, S, d]; keys, values [B, Hm, M, hd]; memory_mask bool [B, M], False where padded, or
        [B, S, M] where tokens of a row see different pictures; visual_token_mask bool [B, S], True at visual tokens,
        None where there is none; rotary: the angles of the tokens' positions, for a graft with a `rope`
        -> [B, S, d]."""

    def fused_on(self, tensor: Tensor) -> FusedForm | None:
        """Its fused form, if it has one for the tensor's device. Under autocast it has none: the dtypes that it chooses
        operator by operator are not those of one operator for all."""
        device = tensor.device.type
        if self.fused is None or device not in self.fused.devices or torch.is_autocast_enabled(device):
            return None
        return self.fused


def weight_of(linear: nn.Module) -> Tensor:
    """What a projection multiplies with, [out, in]: its weight, and what adapters on it (PEFT's LoRA) add."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    if not hasattr(linear, "get_delta_weight") or linear.merged or linear.disable_adapters:
        return weight
    for adapter in linear.active_adapters:  # type: ignore[union-attr]
        if adapter in linear.lora_A:  # type: ignore[operator]
            weight = weight + linear.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
    return weight


def read(
    graft: Graft,
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    memory_mask: Tensor,
    visual_token_mask: Tensor | None,
    rotary: Rotary | None,
    onto: Tensor | None = None,
) -> Tensor:
    """`graft(...)`, fused where it can be, and added to `onto` [B, S, d] where that is given -> [B, S, d]."""
    form = graft.fused_on(hidden_states)
    if form is not None:
        return form.forward(graft, hidden_states, keys, values, memory_mask, visual_token_mask, rotary, onto)
    output: Tensor = graft(hidden_states, keys, values, memory_mask, visual_token_mask, rotary)
    return output if onto is None else onto + output


def remember(graft: Graft, visual_embeds: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """`graft.project(...)`, fused where it can be."""
    form = graft.fused_on(visual_embeds)
    return graft.project(visual_embeds, rotary) if form is None else form.project(graft, visual_embeds, rotary)
