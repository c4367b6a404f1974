"""What stands in for CUDA's driver where there is no GPU: kernels run in Triton's interpreter, on the CPU's memory.

What is launched comes as it does to the driver: PTX, an entry, a grid, addresses of arguments.
"""

import ctypes
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.fusion.node import KernelNode, KernelVariant
from exporters.kernels.plan import TensorType

_SOURCE = """
typedef int (*Launched)(const void *ptx, const char *entry, const unsigned *grid, unsigned threads, unsigned shared,
                        void **arguments);
typedef struct { const void *ptx; const char *entry; unsigned shared; } Function;
static Launched launched;
static Function functions[256];
static int count, modules, contexts[2], current;
void stand_in(Launched function) { launched = function; }
int loaded(void) { return modules; }
void enter(int context) { current = context; }
int cuCtxGetCurrent(void **found) { *found = &contexts[current]; return 0; }
int cuModuleLoadData(void **module, const void *ptx) { *module = (void *)ptx; modules++; return 0; }
int cuModuleUnload(void *module) { modules--; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *entry) {
    functions[count] = (Function){module, entry, 48 << 10};
    *function = &functions[count++];
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    if (attribute == 8) ((Function *)function)->shared = value;
    return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned b, unsigned c,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    Function *f = function;
    unsigned grid[3] = {x, y, z};
    /* the CPU's provider has no stream */
    if (b != 1 || c != 1 || x == 0 || y == 0 || z == 0 || stream || extra || shared > f->shared) return 1;
    return launched(f->ptx, f->entry, grid, threads, shared, arguments);
}
"""
_LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass
class StandIn:
    """A driver's library, as a file."""

    path: Path
    kernels: dict[bytes, tuple[KernelNode, KernelVariant, int]] = field(default_factory=dict, repr=False)
    """By PTX: also the shared memory that it takes."""
    launches: list[str] = field(default_factory=list)
    """The steps that were launched, with how many tokens a program took."""
    fails: int = 0
    """The error that launches end with."""

    def know(self, nodes: Mapping[str, KernelNode], operators: Any) -> None:
        for place, node in enumerate(nodes.values()):
            for number, variant in enumerate(node.variants):
                compiled = operators[place].variants[number]
                self.kernels[compiled.ptx] = node, variant, compiled.shared

    @property
    def loaded(self) -> int:
        """Modules that are."""
        count: int = ctypes.CDLL(str(self.path)).loaded()
        return count

    def enter(self, context: int) -> None:
        """Make one of two contexts current."""
        ctypes.CDLL(str(self.path)).enter(context)

    def launched(self, ptx: bytes, entry: bytes, grid: Any, threads: int, shared: int, arguments: Any) -> int:
        node, variant, wanted = self.kernels[ptx]
        launch, kernel = variant.launch, node.step.kernel
        if self.fails:
            return self.fails
        if (entry.decode(), threads, shared) != (
            kernel.function.fn.__name__,
            32 * launch.tile_config.num_warps,
            wanted,
        ):
            return 1
        self.launches.append(f"{node.step.name}:{launch.tile_config.tokens}")
        values = iter(arguments[n] for n in range(len(launch.inputs) + len(launch.sizes) + len(launch.outputs)))
        inputs = {name: _tensor(next(values), tensor) for name, tensor in launch.inputs.items()}
        sizes = [ctypes.c_int32.from_address(next(values)).value for _ in launch.sizes]
        outputs = [_tensor(next(values), tensor) for tensor in launch.outputs.values()]
        kernel.function[tuple(grid[:3])](
            *(inputs.get(name) for name in kernel.inputs), *sizes, *outputs, **launch.constants, UPCAST=False
        )
        return 0


def stand_in(folder: Path) -> tuple[StandIn, Callable[..., int]]:
    """A driver, and its function, which must live as long."""
    source, path = folder / "driver.c", folder / "libcuda.so"
    source.write_text(_SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    driver = StandIn(path)
    function = _LAUNCHED(driver.launched)
    ctypes.CDLL(str(path)).stand_in(function)
    return driver, function


def _tensor(place: int, described: TensorType) -> Tensor:
    """The tensor whose address lies at `place`; kernels know its size."""
    dtype: torch.dtype = getattr(torch, described.dtype)
    address = ctypes.c_void_p.from_address(place).value
    assert address is not None
    return torch.frombuffer((ctypes.c_byte * dtype.itemsize).from_address(address), dtype=dtype)
