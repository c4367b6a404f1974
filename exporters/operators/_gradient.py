"""The gradient of an operator as that of its reference implementation, computed again from the inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_recomputed(operator: Any, definition: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Give a `torch.library.custom_op` the gradient of `definition`, which takes the same arguments.

    Nothing but the inputs is kept for the way back: the definition runs again there, which costs what a forward costs.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(each, Tensor) for each in inputs]
        ctx.others = [None if isinstance(each, Tensor) else each for each in inputs]
        ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        with torch.enable_grad():
            inputs = [
                next(saved).detach().requires_grad_(needed) if is_tensor else other
                for is_tensor, other, needed in zip(ctx.is_tensor, ctx.others, ctx.needs_input_grad, strict=True)
            ]
            output = definition(*inputs)
            wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
            found = iter(torch.autograd.grad(output, wanted, grads, allow_unused=True))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

    operator.register_autograd(backward, setup_context=setup)
