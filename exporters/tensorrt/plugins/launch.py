"""A described plugin launched by the CUDA driver; the standard library alone is needed."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporters.fusion.formula import evaluate

Dims = Sequence[Sequence[int]]
"""The shape of every input."""
_PORTABLE_BELOW = 90
"""From here on Triton's PTX is for one compute capability alone."""
_UNASKED_SHARED = 48 << 10
"""Bytes of shared memory that every kernel may have."""
_MAJOR, _MINOR = 75, 76
_MAX_DYNAMIC_SHARED = 8


class LaunchError(RuntimeError):
    """A plugin that cannot run here."""


@dataclass(frozen=True)
class Call:
    """What a launch is for given shapes."""

    variant: dict[str, Any]
    sizes: list[int]
    grid: tuple[int, int, int]


def prepare(description: dict[str, Any], dims: Dims) -> Call:
    """The variant for these shapes: the first that goes as far as the first of the kernel's sizes, its tokens."""

    def value(formula: Any) -> int:
        return int(evaluate(formula, lambda place, axis: dims[place][axis]))

    sizes = [value(formula) for formula in description["sizes"]]
    variant = next(
        variant for variant in description["variants"] if variant["tokens"] is None or sizes[0] <= variant["tokens"]
    )
    x, y, z = (value(formula) for formula in variant["grid"])
    return Call(variant, sizes, (x, y, z))


def choose(variant: dict[str, Any], capability: int) -> dict[str, Any]:
    """The kernel for a GPU: its own, else the latest that runs on all later ones. Raises LaunchError."""
    kernels = {kernel["capability"]: kernel for kernel in variant["kernels"]}
    if capability in kernels:
        exact: dict[str, Any] = kernels[capability]
        return exact
    older = [candidate for candidate in kernels if candidate < min(capability, _PORTABLE_BELOW)]
    if not older:
        raise LaunchError(
            f"the engine's kernels are for compute capability {', '.join(map(str, sorted(kernels)))}, and this GPU has "
            f"{capability}: build it again with --target sm{capability}"
        )
    latest: dict[str, Any] = kernels[max(older)]
    return latest


class Arguments:
    """A kernel's arguments as the driver takes them: an array of pointers to each, which live as long as this does."""

    def __init__(self, inputs: Sequence[int], sizes: Sequence[int], outputs: Sequence[int]) -> None:
        self.values = [
            *map(ctypes.c_void_p, inputs),
            *map(ctypes.c_int32, sizes),
            *map(ctypes.c_void_p, outputs),
        ]
        self.array = (ctypes.c_void_p * len(self.values))(*(ctypes.addressof(value) for value in self.values))


class Driver:
    """The CUDA driver, with the kernels that it has loaded. Kernels belong to the context that is current."""

    def __init__(self, library: Any = None) -> None:
        """`library`: libcuda, or what stands in for it; loaded at the first launch."""
        self._library = library
        self._functions: dict[tuple[int, str], Any] = {}
        self._capabilities: dict[int, int] = {}

    def run(
        self, description: dict[str, Any], dims: Dims, inputs: Sequence[int], outputs: Sequence[int], stream: int
    ) -> None:
        """Launch on `stream`; `inputs` and `outputs`: addresses. Raises LaunchError."""
        call = prepare(description, dims)
        if 0 in call.grid:
            return
        kernel = choose(call.variant, self.capability())
        function = self._function(kernel)
        arguments = Arguments(inputs, call.sizes, outputs)
        self._check(
            "cuLaunchKernel",
            function,
            *map(ctypes.c_uint, call.grid),
            *map(ctypes.c_uint, (32 * kernel["num_warps"], 1, 1)),
            ctypes.c_uint(kernel["shared"]),
            ctypes.c_void_p(stream),
            arguments.array,
            None,
        )

    def capability(self) -> int:
        """Of the current context's GPU, 89 for 8.9."""
        device = ctypes.c_int()
        self._check("cuCtxGetDevice", ctypes.byref(device))
        if device.value not in self._capabilities:
            major, minor = ctypes.c_int(), ctypes.c_int()
            for number, attribute in ((major, _MAJOR), (minor, _MINOR)):
                self._check("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            self._capabilities[device.value] = 10 * major.value + minor.value
        return self._capabilities[device.value]

    def _function(self, kernel: dict[str, Any]) -> Any:
        context = ctypes.c_void_p()
        self._check("cuCtxGetCurrent", ctypes.byref(context))
        key = (context.value or 0, kernel["ptx"])
        if key not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._check("cuModuleLoadData", ctypes.byref(module), kernel["ptx"].encode() + b"\0")
            self._check("cuModuleGetFunction", ctypes.byref(function), module, kernel["entry"].encode())
            if kernel["shared"] > _UNASKED_SHARED:
                self._check("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, kernel["shared"])
            self._functions[key] = function
        return self._functions[key]

    def _check(self, name: str, *arguments: Any) -> None:
        if self._library is None:
            try:
                self._library = ctypes.CDLL("libcuda.so.1")
            except OSError as error:
                raise LaunchError(f"there is no CUDA driver: {error}") from error
        status = getattr(self._library, name)(*arguments)
        if status:
            raise LaunchError(f"{name}: CUDA error {status}")
