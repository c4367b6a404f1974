"""What every graft is: a module inside a decoder layer that reads the visual memory."""

from abc import abstractmethod
from inspect import isfunction
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from surgeon.memory.fused import FusedForm, fused_form
from surgeon.memory.inserted import Constant, Initialiser, Inserted, Normal
from surgeon.memory.reading import Reading
from surgeon.memory.reference import Reference, weight_names
from surgeon.memory.rms_norm import RMSNorm
from surgeon.memory.rotary import Rope, Rotary


class Graft(Inserted):
    """A branch grafted into one decoder layer.

    `project` turns visual embeddings into this layer's keys and values, once, when an image enters; `attend` reads
    them for every token. Both go through the modules that hold the weights, and happen in `forward`, so that adapters,
    quantised layers, offloading and sharding work as they do for the backbone's layers. Nothing is kept on the module
    between calls.

    A graft that has a reference implementation, and one with norms, has `eps: float`.
    """

    kind: ClassVar[str]
    """Its name: the attribute of the layer that holds it, and the name of its file."""
    site: ClassVar[Literal["before_layer", "beside_mlp"]]
    """Where the layer calls it. `before_layer`: `attend` returns hidden_states with what it read added, which replaces
    the layer's input. `beside_mlp`: it is given what the MLP's norm is given, and returns what it read alone, which is
    added to the MLP's output."""

    gates: ClassVar[tuple[str, ...]]
    """The parameters that are zero at insertion, which together make the graft change exactly nothing."""
    rope: Rope | None = None
    """How its queries and keys turn with their positions; None where positions do not matter to it."""
    reference: ClassVar[Reference | None] = None
    """`attend` as a function of tensors (`surgeon.memory.reference`), a staticmethod, for a graft that is an operator
    or has kernels."""
    memory_reference: ClassVar[Reference | None] = None
    """`project` as one."""
    _weight_names: ClassVar[tuple[str, ...]] = ()
    _memory_weight_names: ClassVar[tuple[str, ...]] = ()
    fused: FusedForm | None = None
    """What computes the same in its place on the form's devices."""

    @classmethod
    @abstractmethod
    def from_config(cls, text_config: Any, options: dict[str, Any]) -> Self:
        """The module for one layer of a decoder with this config. `options`: what the pass's
        `graft_options` returned, and `kind`, `layers` and `visibility`."""

    def initialisers(self, std: float) -> dict[str, Initialiser]:
        """Parameter name -> its value at insertion: the layer computes what it did before, and the graft can learn.

        Gates and biases are zero, norms one, matrices normal: a second zero matrix behind a zero gate would leave both
        without gradient. Raises ValueError where a gate is no parameter.
        """
        own = {name for name, _ in self.named_parameters(recurse=False)}
        if unknown := sorted(set(self.gates) - own):
            raise ValueError(
                f"{type(self).__name__}.gates names {', '.join(unknown)}; its own parameters are "
                + ", ".join(sorted(own))
            )
        return {
            f"{path}.{name}" if path else name: self._initialiser(module, name, std)
            for path, module in self.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        }

    def _initialiser(self, module: nn.Module, name: str, std: float) -> Initialiser:
        if module is self and name in self.gates:
            return Constant(0.0)
        if name == "bias":
            return Constant(0.0)
        return Constant(1.0) if isinstance(module, RMSNorm | nn.RMSNorm | nn.LayerNorm) else Normal(std)

    @abstractmethod
    def project(self, visual_embeds: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """visual_embeds [B, M, d], as they enter the decoder, and where the graft has a `rope` the angles of their
        positions -> keys, values [B, Hm, M, hd]."""

    @abstractmethod
    def attend(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """hidden_states [B, S, d]; keys, values [B, Hm, M, hd]; memory_mask bool [B, M], False where padded, or
        [B, S, M] where tokens of a row see different images; visual_token_mask bool [B, S], True at visual tokens,
        None where there is none; rotary: the angles of the tokens' positions, for a graft with a `rope`
        -> [B, S, d].

        A token whose mask is False everywhere has no memory: it is left exactly as it is (`before_layer`) or gets
        exactly zero (`beside_mlp`), and no NaN."""

    def forward(self, hidden_states: Tensor, reading: Reading, entry: str, residual: Tensor | None = None) -> Tensor:
        """hidden_states [B, S, d]; `entry`: its name in the memory -> what it reads there, [B, S, d], added to
        `residual` [B, S, d] where that is given. What enters in this call is projected first."""
        keys, values = reading.entry(entry, self.kind, hidden_states.dtype, self.write_memory)
        mask, visual = reading.mask, reading.visual_token_mask
        return self.read_memory(hidden_states, keys, values, mask, visual, reading.rotary.get(self.kind), residual)

    def write_memory(self, visual_embeds: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """`project(...)`, fused where it can be."""
        form = self.fused_on(visual_embeds)
        return self.project(visual_embeds, rotary) if form is None else form.project(self, visual_embeds, rotary)

    def read_memory(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        visual_token_mask: Tensor | None,
        rotary: Rotary | None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`attend(...)`, fused where it can be, and added to `residual` [B, S, d] where that is given."""
        form = self.fused_on(hidden_states)
        if form is not None:
            return form.forward(self, hidden_states, keys, values, memory_mask, visual_token_mask, rotary, residual)
        output = self.attend(hidden_states, keys, values, memory_mask, visual_token_mask, rotary)
        return output if residual is None else residual + output

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if getattr(cls, "site", "before_layer") not in ("before_layer", "beside_mlp"):
            raise TypeError(f"{cls.__name__}.site is {cls.site!r}; it is 'before_layer' or 'beside_mlp'")
        if getattr(cls, "gates", None) == ():
            raise TypeError(f"{cls.__name__}.gates is empty: nothing would make the graft change nothing when inserted")
        for name in ("reference", "memory_reference"):
            if isfunction(vars(cls).get(name)):
                raise TypeError(f"{cls.__name__}.{name} is a function of tensors alone: write staticmethod(...)")
        cls._weight_names, cls._memory_weight_names = weight_names(cls.reference), weight_names(cls.memory_reference)

    def weights(self) -> tuple[Tensor, ...]:
        """Those that `reference` takes, in its order. A projection's is what it multiplies with (`weight_of`)."""
        return tuple(_tensor_of(getattr(self, name)) for name in self._weight_names)

    def memory_weights(self) -> tuple[Tensor, ...]:
        """Those that `memory_reference` takes, in its order."""
        return tuple(_tensor_of(getattr(self, name)) for name in self._memory_weight_names)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: not the fused form, which is of this installation."""
        return {name: value for name, value in self.__dict__.items() if name != "fused"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.fused = fused_form(self.kind)

    def fused_on(self, tensor: Tensor) -> FusedForm | None:
        """Its fused form, if it has one for the tensor's device and its projections are plain matrices. Under autocast
        it has none: the dtypes that it chooses operator by operator are not those of one operator for all."""
        device = tensor.device.type
        if self.fused is None or device not in self.fused.devices or torch.is_autocast_enabled(device):
            return None
        return self.fused if all(map(multiplies_by_a_matrix, self.children())) else None


def multiplies_by_a_matrix(module: nn.Module) -> bool:
    """Whether calling a projection is the product with `weight_of(projection)`, and nothing else. It is not where the
    weight is elsewhere until the module is called (offloaded), is no plain tensor (sharded, quantised), or where an
    adapter does more than add to it (dropout, DoRA)."""
    if hasattr(module, "_hf_hook"):
        return False
    if hasattr(module, "get_delta_weight"):
        active = not (module.merged or module.disable_adapters)
        return multiplies_by_a_matrix(module.base_layer) and not (active and (module.training or any_dora(module)))  # type: ignore[arg-type]
    if isinstance(module, RMSNorm):
        return type(module.weight) is nn.Parameter
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def any_dora(adapted: Any) -> bool:
    """Whether one of a PEFT layer's adapters scales what it is added to."""
    return bool(getattr(adapted, "lora_variant", None)) or any(getattr(adapted, "use_dora", {}).values())


def _tensor_of(part: Any) -> Tensor:
    """A gate, a norm's weight, or what a projection multiplies with."""
    if isinstance(part, Tensor):
        return part
    return part.weight if isinstance(part, RMSNorm) else weight_of(part)


def weight_of(linear: nn.Module) -> Tensor:
    """What a projection multiplies with, [out, in]: its weight, and what adapters on it (PEFT's LoRA) add."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    if not hasattr(linear, "get_delta_weight") or linear.merged or linear.disable_adapters:
        return weight
    for adapter in linear.active_adapters:  # type: ignore[union-attr]
        if adapter in linear.lora_A:  # type: ignore[operator]
            weight = weight + linear.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
    return weight
