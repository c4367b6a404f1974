"""What every operator does on a GPU."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from exporters.kernels import launch
from exporters.kernels.kernel import Chain
from exporters.kernels.tuned import choose


def run(chain: Chain, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """A chain on the arguments of its reference implementation, as they come, with tile configs as tuned -> its
    outputs."""
    return launch.run(chain, launch.contiguous({name: arguments[name] for name in chain.inputs}), choose)
