"""What every operator does on a GPU."""

from collections.abc import Sequence

from torch import Tensor

from exporters.kernels import launch
from exporters.kernels.kernel import Chain
from exporters.kernels.tuned import choose


def run(chain: Chain, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """A chain on its inputs in order, as they come, its launches cut as tuned -> its outputs."""
    return launch.run(chain, launch.contiguous(dict(zip(chain.inputs, tensors, strict=True))), choose)
