"""Launches compiled to PTX ahead of time, on a machine that needs no GPU."""

import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache as cached
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from exporters.child_process import ProcessError, run_child
from exporters.kernels.folder import VARIABLE
from exporters.kernels.plan import Launch
from exporters.kernels.support import warn_once
from surgeon.checkpoint import staged_file
from surgeon.cleanup import temporary_directory
from surgeon.errors import SurgeonError, TargetError

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capabilities that kernels are compiled for -> the shared memory that one program of them may have."""
_PTX_VERSIONS = {100: 86, 120: 87}
_PTX_VERSION = 80
"""86 for 8.6: the first that knows a capability, or 8.0 (CUDA 12.0). A driver refuses PTX of a version later than its
own, and Triton would write that of the ptxas that comes with it."""
_LAST_PORTABLE = 89
"""PTX for compute capabilities up to this one runs on all later ones."""
_FORMAT = 1
"""Incremented when the content of a cache entry, or the way it is compiled, changes."""
_CHILD = Path(__file__).with_name("aot_child.py")
_ROOT = Path(__file__).parents[2]
_PARTS = Path(__file__).with_name("_parts.py")
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "bool": "i1", "int32": "i32"}
_JOBS_OF_A_CHILD = 12
"""From here on a second process is worth its start."""


class CompileError(SurgeonError):
    """A kernel that does not compile for a target, or does not fit it."""

    exit_code = 3


class _Compiled(BaseModel):
    """The child's report of one kernel, which is also the format of a cache entry."""

    model_config = ConfigDict(strict=True)

    entry: Annotated[str, Field(min_length=1)]
    ptx: str
    shared: Annotated[int, Field(ge=0)]
    num_warps: Annotated[int, Field(gt=0, le=32)]
    scratch: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.ptx.rstrip().endswith("}"):
            raise ValueError("the PTX does not end")
        if not re.search(rf"\.entry\s+{re.escape(self.entry)}\s*\(", self.ptx):
            raise ValueError(f"the PTX has no entry {self.entry}")
        return self


@dataclass(frozen=True)
class Job:
    """A launch to compile. Its sizes may be symbolic: they are arguments."""

    launch: Launch
    capability: int
    """89 for 8.9. PTX for those up to 89 runs on all later ones; from 90 on Triton's is for one alone ("sm_90a")."""
    aligned: bool = False
    """Whether every pointer is a multiple of 16 bytes, which makes accesses wider. TensorRT sees to that for whatever a
    plugin reads and writes, torch for tensors that it allocated; a view may begin anywhere, and so may a weight that
    was mapped from inside a safetensors file."""


@dataclass(frozen=True)
class Parameter:
    kind: Literal["input", "size", "output"]
    """Inputs and outputs are pointers, sizes int32."""
    name: str


@dataclass(frozen=True)
class CompiledKernel:
    entry: str
    ptx: str
    shared: int
    """Bytes of dynamic shared memory."""
    num_warps: int
    capability: int
    parameters: tuple[Parameter, ...]
    """In order; there are no others."""


def compile_launches(jobs: Sequence[Job], cache: Path | None = None, *, fit: bool = False) -> list[CompiledKernel]:
    """Compile each. `cache`: a folder in which results are kept for the next time, by all that they depend on. `fit`:
    what needs more shared memory than its target has is compiled with fewer stages, which changes nothing else.

    Triton works in processes of its own. Raises CompileError for a capability that is not supported, a kernel that
    fails to compile, or one that needs more shared memory than its target has.
    """
    kernels = _compile(jobs, cache)
    while fit and (over := [n for n, job in enumerate(jobs) if _too_large(job, kernels[n]) and _stages(job) > 1]):
        jobs = [replace(job, launch=job.launch.with_fewer_stages()) if n in over else job for n, job in enumerate(jobs)]
        for n, again in zip(over, _compile([jobs[n] for n in over], cache), strict=True):
            kernels[n] = again
    return [_finish(job, kernel) for job, kernel in zip(jobs, kernels, strict=True)]


def capability_for(gpu: int) -> int | None:
    """What to compile for, so that it runs on a GPU of compute capability `gpu`; None for one that is too old."""
    portable = [capability for capability in SHARED_KIB if capability <= min(gpu, _LAST_PORTABLE)]
    return gpu if gpu in SHARED_KIB else max(portable, default=None)


def name_of(launch: Launch, capability: int) -> str:
    """A compiled launch in messages."""
    tokens = launch.tile_config.tokens
    return f"{launch.step.name} ({tokens} token{'s'[: tokens > 1]} a program) for compute capability {capability}"


# -- jobs for Triton ----------------------------------------------------------------------------------------------
def _parameters(launch: Launch) -> tuple[Parameter, ...]:
    inputs = [Parameter("input", name) for name in launch.step.kernel.inputs if name in launch.inputs]
    sizes = [Parameter("size", name) for name in launch.sizes]
    return (*inputs, *sizes, *(Parameter("output", name) for name in launch.outputs))


def _describe(job: Job) -> dict[str, Any]:
    """A job for the child, JSON: everything that the PTX depends on."""
    if job.capability not in SHARED_KIB:
        raise CompileError(
            f"kernels are not compiled for compute capability {job.capability}; there are "
            f"{', '.join(map(str, SHARED_KIB))}, and what is compiled for 80 runs on all later ones"
        )
    launch = job.launch
    function = launch.step.kernel.function.fn
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for name in launch.step.kernel.inputs:
        tensor = launch.inputs.get(name)
        signature[f"{name}_ptr"] = "constexpr" if tensor is None else f"*{_TYPES[tensor.dtype]}"
        if tensor is None:
            constants[f"{name}_ptr"] = None
    signature |= dict.fromkeys(launch.sizes, "i32")
    signature |= {f"{name}_ptr": f"*{_TYPES[tensor.dtype]}" for name, tensor in launch.outputs.items()}
    constants |= launch.constants | {"UPCAST": False}
    signature |= {name: "constexpr" for name in constants if name not in signature}
    return {
        "module": function.__module__,
        "function": function.__name__,
        "signature": signature,
        "constants": constants,
        "aligned": [place for place, kind in enumerate(signature.values()) if kind[0] == "*" and job.aligned],
        "capability": job.capability,
        "ptx_version": _PTX_VERSIONS.get(job.capability, _PTX_VERSION),
        "num_warps": launch.tile_config.num_warps,
        "num_stages": launch.tile_config.num_stages,
    }


def _key(description: dict[str, Any]) -> str:
    content = {
        "format": _FORMAT,
        "triton": importlib.metadata.version("triton"),
        "source": _source_digest(description["module"]),
        **description,
    }
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


@cached
def _source_digest(module: str) -> str:
    """Of a kernel's module and of the code that all kernels share."""
    source = sys.modules[module].__file__
    assert source is not None
    return hashlib.sha256(Path(source).read_bytes() + _PARTS.read_bytes()).hexdigest()


# -- compiling ----------------------------------------------------------------------------------------------------
def _compile(jobs: Sequence[Job], cache: Path | None) -> list[dict[str, Any]]:
    """The child's report of each job, from the cache where it was compiled before."""
    descriptions = [_describe(job) for job in jobs]
    keys = [_key(description) for description in descriptions]
    kernels = {key: kernel for key in dict.fromkeys(keys) if (kernel := _kept(cache, key)) is not None}
    missing = {
        key: (job, description)
        for key, job, description in zip(keys, jobs, descriptions, strict=True)
        if key not in kernels
    }
    for key, kernel in _compile_all(missing).items():
        kernels[key] = kernel
        if cache is not None:
            _keep(cache, key, kernel)
    return [kernels[key] for key in keys]


def _compile_all(jobs: dict[str, tuple[Job, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """In several processes where there are enough jobs."""
    if not jobs:
        return {}
    count = min(os.cpu_count() or 1, -(-len(jobs) // _JOBS_OF_A_CHILD))
    keys = list(jobs)
    shares = [{key: jobs[key] for key in keys[start::count]} for start in range(count)]
    kernels: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(count) as pool:
        for share in pool.map(_compile_share, shares):
            kernels |= share
    return kernels


def _compile_share(jobs: dict[str, tuple[Job, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    keys = list(jobs)
    names = [name_of(job.launch, job.capability) for job, _ in jobs.values()]
    with temporary_directory("surgeon-kernels-") as folder:
        jobs_file = folder / "jobs.json"
        paths = [str(_ROOT), *(path for path in sys.path if path)]
        jobs_file.write_text(json.dumps({"paths": paths, "jobs": [description for _, description in jobs.values()]}))
        events: list[dict[str, Any]] = []
        try:
            run_child(
                [str(jobs_file)],
                "compiling kernels",
                folder / "log",
                _CHILD,
                on_event=events.append,
                without=("TRITON_INTERPRET",),
            )
        except ProcessError as error:
            where = names[len(events)] if len(events) < len(names) else names[-1]
            raise CompileError(f"{where}: {error}; another version of triton may compile it") from error
    for event in events:
        if event["event"] == "failed":
            reason = " ".join(event["reason"].split())
            raise CompileError(f"{names[event['number']]} does not compile: {reason}")
    return {keys[event["number"]]: event for event in events}


def _kept(cache: Path | None, key: str) -> dict[str, Any] | None:
    if cache is None:
        return None
    try:
        return _Compiled.model_validate_json((cache / f"{key}.json").read_text()).model_dump()
    except (OSError, ValueError):  # not there, or damaged: compiled again
        return None


def _keep(cache: Path, key: str, kernel: dict[str, Any]) -> None:
    """A folder that cannot be written to costs the time of the next compilation, and no more."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with staged_file(cache / f"{key}.json", overwrite=True) as file:
            file.write_text(json.dumps(kernel))
    except (OSError, TargetError) as error:
        warn_once(f"compiled kernels are not kept: {error}; ${VARIABLE} says where")


def _too_large(job: Job, kernel: dict[str, Any]) -> bool:
    return bool(kernel["shared"] > SHARED_KIB[job.capability] * 1024)


def _stages(job: Job) -> int:
    return job.launch.tile_config.num_stages


def _finish(job: Job, kernel: dict[str, Any]) -> CompiledKernel:
    name = name_of(job.launch, job.capability)
    if _too_large(job, kernel):
        required, limit = f"{kernel['shared'] / 1024:.0f} KiB", SHARED_KIB[job.capability]
        raise CompileError(
            f"{name} needs {required} of shared memory, which has {limit}: take smaller tile configs or fewer stages "
            f"than {asdict(job.launch.tile_config)}"
        )
    parameters = _parameters(job.launch)
    if kernel["scratch"]:
        raise CompileError(f"{name} needs {kernel['scratch']} bytes of scratch memory, which is not supported")
    ptx = strip_scratch(kernel["ptx"], kernel["entry"], len(parameters))
    return CompiledKernel(kernel["entry"], ptx, kernel["shared"], kernel["num_warps"], job.capability, parameters)


def strip_scratch(ptx: str, entry: str, count: int) -> str:
    """PTX with its first `count` parameters alone: behind the kernel's own Triton adds pointers to scratch memory.

    Raises CompileError where the code reads one of those.
    """
    start = ptx.index(".entry")
    body = ptx.index("{", start)
    head, code = ptx[start:body], ptx[body:]
    for number in {int(digits) for digits in re.findall(rf"\b{entry}_param_(\d+)\b", head)}:
        if number >= count:
            if re.search(rf"\b{entry}_param_{number}\b", code):
                raise CompileError(f"{entry}: its code uses parameter {number}, which is Triton's and not the kernel's")
            head = re.sub(rf",\s*\.param[^,\n]*\b{entry}_param_{number}\b", "", head)
    return ptx[:start] + head + code
