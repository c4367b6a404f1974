"""Low-rank adapters that act in one call alone: the algebra of PEFT's LoRA over modules that stay as they are.

PEFT puts its adapters into the model, where they act on whatever runs through it. A former's must not: ordinary
decoding is the untouched backbone. So they are kept beside the modules that they adapt, in a tree of the same names,
and a call that wants them runs on a view of the modules in which they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.memory.inserted import Constant, Initialiser, Normal

SUFFIX = "_low_rank"


class LowRank(nn.Module):
    """What an adapter adds to a linear layer: x -> scale * B A x. Its matrices have no name of PEFT's: that trains
    whatever is called lora_, whosever it is."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        added: Tensor = self.expand(self.reduce(x.to(self.reduce.weight.dtype))) * self.scale
        return added.to(x.dtype)

    def initialisers(self) -> dict[str, Initialiser]:
        """As PEFT's: A drawn, with the standard deviation of its uniform distribution; B zero, so nothing is added."""
        return {
            "reduce.weight": Normal((3 * self.reduce.in_features) ** -0.5),
            "expand.weight": Constant(0.0),
        }


class Adapters(nn.Module):
    """A node of the tree that has the names of the modules it adapts; its leaves are `LowRank`, and `SUFFIX` is behind
    the names of the layers that they adapt, so that who looks for these (PEFT's target_modules) does not meet them."""

    @classmethod
    def of(cls, blocks: Mapping[str, nn.Module], targets: Sequence[str], rank: int, alpha: float) -> "Adapters":
        """Adapters for every linear layer of the blocks that `targets` names (`is_named`, within its block). `blocks`:
        by the names that they are to have in the tree. Raises ValueError as `check_targets`."""
        check_targets(list(blocks.values()), targets)
        tree = cls()
        for name, block in blocks.items():
            branch = tree._child(name)
            for path, linear in linear_layers(block):
                if any(is_named(path, target) for target in targets):
                    *parents, leaf = path.split(".")
                    node = branch
                    for parent in parents:
                        node = node._child(parent)
                    node.add_module(leaf + SUFFIX, LowRank(linear.in_features, linear.out_features, rank, alpha / rank))
        return tree

    def _child(self, name: str) -> "Adapters":
        if name not in self._modules:
            self.add_module(name, Adapters())
        child = self._modules[name]
        assert isinstance(child, Adapters)
        return child


def is_named(path: str, target: str) -> bool:
    """Whether `target` names a layer of this path, as PEFT's target_modules do: by the whole path, or its end."""
    return path == target or path.endswith(f".{target}")


class UnknownTargetError(ValueError):
    """A target that no linear layer has."""


def check_targets(blocks: Sequence[nn.Module], targets: Sequence[str]) -> None:
    """Raises UnknownTargetError for a target that no linear layer of the blocks has, with those that there are."""
    paths = sorted({path for block in blocks for path, _ in linear_layers(block)})
    unmatched = [target for target in targets if not any(is_named(path, target) for path in paths)]
    if unmatched or not targets:
        raise UnknownTargetError(
            f"no linear layer is called {', '.join(unmatched) or 'anything'}; there are {', '.join(paths) or 'none'}"
        )


def linear_layers(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Path and module of every linear layer within a block, its grafts aside."""
    grafts: Mapping[str, Any] = getattr(block, "graft_sites", {})
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and path.split(".")[0] not in grafts:
            yield path, module


class AdaptedLinear(nn.Module):
    """A linear layer and an adapter beside it: x -> W x + b + scale * B A x. Both are used through their modules, so
    what shards, offloads or quantises the layer's weight goes on working."""

    def __init__(self, base: nn.Module, low_rank: LowRank) -> None:
        super().__init__()
        self.base, self.low_rank = base, low_rank
        self.in_features, self.out_features = low_rank.reduce.in_features, low_rank.expand.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        output: Tensor = self.base(x)
        return output + self.low_rank(x)


def adapted(module: nn.Module, adapters: nn.Module) -> Any:
    """A view of `module` in which the adapters act: it shares every parameter and every module but those on the way to
    an adapted layer. `module` itself is as it was, and the view is not kept."""
    if isinstance(adapters, LowRank):
        return AdaptedLinear(module, adapters)
    view: Any = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    children = dict(module._modules)
    for adapter_name, child in adapters.named_children():
        name = adapter_name.removesuffix(SUFFIX)
        original = children[name]
        assert original is not None
        children[name] = adapted(original, child)
    view.__dict__["_modules"] = children
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:  # accelerate binds its forward to the module that it was hooked to, which has no adapter
        view.__dict__["forward"] = _hooked(view, hook)
    return view


def _hooked(view: Any, hook: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(view, *args, **kwargs)
        return hook.post_forward(view, type(view).forward(view, *args, **kwargs))

    return forward


def low_rank_product(low_rank: LowRank) -> Tensor:
    """What an adapter adds to its layer's weight, [out_features, in_features]."""
    return F.linear(low_rank.expand.weight, low_rank.reduce.weight.T) * low_rank.scale
