"""What a plugin launches for given shapes, up to the driver's own functions, which are recorded."""

import ctypes
from typing import Any

import pytest

from exporters.tensorrt.plugins.launch import Arguments, Driver, LaunchError, choose, prepare

TOKENS = ["*", ["dim", 0, 0], ["dim", 0, 1]]


def kernel(capability: int, entry: str, shared: int = 1024) -> dict[str, Any]:
    return {"capability": capability, "entry": entry, "ptx": f"ptx of {entry}", "shared": shared, "num_warps": 4}


DESCRIBED = {
    "kernel": "linear",
    "inputs": ["bfloat16", "bfloat16"],
    "outputs": [{"dtype": "float32", "shape": [["dim", 0, 0], ["dim", 0, 1], 64]}],
    "sizes": [TOKENS],
    "variants": [
        {"tokens": 4, "grid": [16, TOKENS, 1], "kernels": [kernel(80, "one"), kernel(120, "one120")]},
        {
            "tokens": None,
            "grid": [2, ["//", ["+", TOKENS, 63], 64], 1],
            "kernels": [kernel(80, "many", 60_000), kernel(120, "many120")],
        },
    ],
}


class Recorder:
    """In the place of libcuda."""

    def __init__(self, capability: tuple[int, int] = (8, 9), status: dict[str, int] | None = None) -> None:
        self.capability, self.status = capability, status or {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.context = 7

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            match name:
                case "cuCtxGetDevice":
                    arguments[0]._obj.value = 0
                case "cuCtxGetCurrent":
                    arguments[0]._obj.value = self.context
                case "cuDeviceGetAttribute":
                    arguments[0]._obj.value = self.capability[arguments[1] - 75]
                case "cuModuleGetFunction":
                    arguments[0]._obj.value = sum(arguments[2])
                case "cuLaunchKernel":
                    function, *numbers, stream, array, _ = arguments
                    pointer, size, output = (
                        ctypes.cast(array[place], ctypes.POINTER(kind))[0]
                        for place, kind in ((0, ctypes.c_void_p), (2, ctypes.c_int32), (3, ctypes.c_void_p))
                    )
                    self.launched.append(
                        (function.value, [n.value for n in numbers], stream.value, pointer, size, output)
                    )
            return self.status.get(name, 0)

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.mark.parametrize(
    ("batch", "length", "variant", "grid"),
    [(1, 1, 0, (16, 1, 1)), (2, 2, 0, (16, 4, 1)), (1, 5, 1, (2, 1, 1)), (8, 100, 1, (2, 13, 1))],
)
def test_few_tokens_take_the_decoding_form(batch: int, length: int, variant: int, grid: tuple[int, int, int]) -> None:
    call = prepare(DESCRIBED, [(batch, length, 32), (64, 32)])
    assert call.variant is DESCRIBED["variants"][variant]
    assert (call.sizes, call.grid) == ([batch * length], grid)


@pytest.mark.parametrize(
    ("capability", "expected"), [(80, "one"), (86, "one"), (90, "one"), (120, "one120"), (121, "one")]
)
def test_a_gpu_takes_its_own_kernel_or_an_older_portable_one(capability: int, expected: str) -> None:
    assert choose(DESCRIBED["variants"][0], capability)["entry"] == expected


def test_a_gpu_without_a_kernel_is_told_what_there_is() -> None:
    variant = {"kernels": [kernel(90, "x"), kernel(120, "y")]}
    with pytest.raises(LaunchError, match="are for compute capability 90, 120, and this GPU has 100: build it again"):
        choose(variant, 100)


def test_arguments_are_pointers_then_sizes_then_pointers() -> None:
    arguments = Arguments([1 << 40, 2], [-3, 4], [5])
    kinds = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    values = [ctypes.cast(at, ctypes.POINTER(kind))[0] for at, kind in zip(arguments.array, kinds, strict=True)]
    assert values == [1 << 40, 2, -3, 4, 5]


def test_a_kernel_is_loaded_once_and_launched_on_the_stream() -> None:
    cuda = Recorder()
    driver = Driver(cuda)
    for _ in range(2):
        driver.run(DESCRIBED, [(1, 2, 32), (64, 32)], [0x1000, 0x2000], [0x3000], 99)
    driver.run(DESCRIBED, [(2, 50, 32), (64, 32)], [0x1000, 0x2000], [0x3000], 99)
    one, many = sum(b"one"), sum(b"many")
    assert cuda.launched[0] == cuda.launched[1] == (one, [16, 2, 1, 128, 1, 1, 1024], 99, 0x1000, 2, 0x3000)
    assert cuda.launched[2] == (many, [2, 2, 1, 128, 1, 1, 60_000], 99, 0x1000, 100, 0x3000)
    assert cuda.names().count("cuModuleLoadData") == 2
    # more shared memory than every kernel may have is asked for
    (asked,) = [arguments for name, arguments in cuda.calls if name == "cuFuncSetAttribute"]
    assert (asked[0].value, asked[1:]) == (many, (8, 60_000))
    loaded = [arguments[1] for name, arguments in cuda.calls if name == "cuModuleLoadData"]
    assert loaded == [b"ptx of one\0", b"ptx of many\0"]


def test_a_kernel_is_loaded_for_each_context() -> None:
    """A function of one context cannot be launched in another: two engines of a process may have one each."""
    cuda = Recorder()
    driver = Driver(cuda)
    for context in (7, 8, 7):
        cuda.context = context
        driver.run(DESCRIBED, [(1, 2, 32), (64, 32)], [0x1000, 0x2000], [0x3000], 99)
    assert cuda.names().count("cuModuleLoadData") == 2 and len(cuda.launched) == 3


def test_nothing_is_launched_for_no_tokens() -> None:
    cuda = Recorder()
    Driver(cuda).run(DESCRIBED, [(0, 5, 32), (64, 32)], [1, 2], [3], 4)
    assert not cuda.calls


def test_an_error_of_the_driver_says_which() -> None:
    with pytest.raises(LaunchError, match="cuModuleLoadData: CUDA error 218"):
        Driver(Recorder(status={"cuModuleLoadData": 218})).run(DESCRIBED, [(1, 1, 32), (64, 32)], [1, 2], [3], 4)
