"""The gradient of an operator as that of its reference implementation, computed again from the inputs."""

from typing import Any

import torch
from torch import Tensor

from surgeon.memory.reference import Reference


def register_recomputed(operator: Any, reference: Reference) -> None:
    """Give a `torch.library.custom_op` the gradient of its reference implementation.

    Nothing but the inputs is kept for the way back: the reference runs again there, which costs what a forward costs.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        with torch.enable_grad():
            inputs = [
                next(saved).detach().requires_grad_(needed) if is_tensor else other
                for is_tensor, other, needed in zip(ctx.is_tensor, ctx.others, ctx.needs_input_grad, strict=True)
            ]
            output = reference(*inputs)
            needed_inputs = [value for value, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
            computed = iter(torch.autograd.grad(output, needed_inputs, grads, allow_unused=True))
        return tuple(next(computed) if needed else None for needed in ctx.needs_input_grad)

    operator.register_autograd(backward, setup_context=setup)
