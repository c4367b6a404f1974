"""Whether fused kernels did the work: a graft whose tensors they do not take computes the same without them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn

from exporters.kernels import launch
from exporters.kernels.kernel import Chain
from surgeon.memory.graft import Graft


@contextmanager
def counted_chains() -> Iterator[Counter[str]]:
    """How often the operators run each chain of kernels inside, by its name; reference implementations run none, and
    replays of a CUDA graph are not seen."""
    counts: Counter[str] = Counter()
    run = launch.run

    def counting(chain: Chain, *arguments: Any) -> Any:
        counts[chain.name] += 1
        return run(chain, *arguments)

    with mock.patch.object(launch, "run", counting):
        yield counts


def chains_of(model: nn.Module, reads: int, fills: int = 0) -> Counter[str]:
    """What is counted where every graft reads its memory so often, and fills it, by fused kernels."""
    kinds = [module.kind for module in model.modules() if isinstance(module, Graft)]
    return Counter(kinds * reads + [f"{kind}_memory" for kind in kinds] * fills)
