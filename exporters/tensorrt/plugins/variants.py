"""What the fused kernels of an engine are cut and compiled for: its profiles, its targets."""

from collections.abc import Iterable, Sequence

from exporters.fusion.node import VariantSpec, variant_specs
from exporters.kernels.aot import capability_for
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.profiles import Profile


def variant_specs_for(profiles: Sequence[Profile]) -> list[VariantSpec]:
    """The variants that the profiles of a graph ask for."""
    most = largest(profiles)
    memory = max((profile.sizes["M"].opt for profile in profiles if "M" in profile.sizes), default=1)
    return variant_specs(most, most.get("B", 1) * most.get("S", 1), memory)


def largest(profiles: Iterable[Profile]) -> dict[str, int]:
    """Every symbol at its largest."""
    sizes: dict[str, int] = {}
    for profile in profiles:
        for symbol, size in profile.sizes.items():
            sizes[symbol] = max(sizes.get(symbol, 0), size.max)
    return sizes


def capabilities(targets: Iterable[str]) -> list[int]:
    """Those to compile for, so that each target ("sm89") has a kernel that runs there. Raises EngineError for one that
    kernels do not run on."""
    supported = set()
    for target in targets:
        capability = capability_for(int(target.removeprefix("sm")))
        if capability is None:
            raise EngineError(
                f"--kernels fused: the kernels need compute capability 8.0, and {target} is older: leave it out, or "
                "take --kernels standard"
            )
        supported.add(capability)
    return sorted(supported)
