"""Every launch compiles for every target without a GPU, and what comes out is PTX that ptxas takes."""

import dataclasses
import importlib
import json
import re
import subprocess
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from triton.backends.nvidia.compiler import get_ptxas

from exporters.kernels import aot, mixin, pvm
from exporters.kernels.aot import SHARED_KIB, CompiledKernel, CompileError, Job, compile_launches, strip_scratch
from exporters.kernels.kernel import TileConfig
from exporters.kernels.plan import Launch, TensorType, plan, plan_step
from exporters.kernels.support import warn_once

CAPABILITIES = list(SHARED_KIB)


def of(dtype: str, **shapes: tuple[int, ...]) -> dict[str, TensorType]:
    return {name: TensorType(shape, "bool" if name.endswith("mask") else dtype) for name, shape in shapes.items()}


def pvm_launches(
    dtype: str,
    length: int,
    d: int = 4096,
    latent: int = 512,
    inner: int = 1536,
    head_dim: int = 128,
    slots: int = 1024,
    per_token: bool = True,
) -> list[Launch]:
    """Of Qwen3-VL-8B by default; `per_token`: whose mask over the memory is of each token."""
    memory, square = (1, 1, slots, head_dim), (latent, latent)
    input_types = of(
        dtype, hidden_states=(1, length, d), keys=memory, values=memory,
        memory_mask=(1, *[length] * per_token, slots),
        visual_token_mask=(1, length), text_proj=(latent, d), input_norm=(latent,), q_proj=square, q_norm=(head_dim,),
        o_proj=square, post_attention_norm=(latent,), gate_proj=(inner, latent), up_proj=(inner, latent),
        down_proj=(latent, inner), output_proj=(d, latent), alpha=(1,), residual=(1, length, d),
    )  # fmt: skip
    return plan(pvm.chain(1e-6), input_types)


def mixin_launches(
    dtype: str,
    length: int,
    d: int = 2048,
    heads: int = 16,
    inner: int = 8192,
    head_dim: int = 128,
    slots: int = 1792,
    per_token: bool = True,
) -> list[Launch]:
    """Of CoMemo 2B by default; `per_token` as above."""
    memory, angles, width = (1, heads, slots, head_dim), (1, length, head_dim // 2), heads * head_dim
    input_types = of(
        dtype, hidden_states=(1, length, d), keys=memory, values=memory,
        memory_mask=(1, *[length] * per_token, slots), cos=angles, sin=angles,
        norm=(d,), q_proj=(width, d), o_proj=(d, width), attn_gate=(1,), ffn_norm=(d,), gate_proj=(inner, d),
        up_proj=(inner, d), down_proj=(d, inner), ff_gate=(1,),
    )  # fmt: skip
    return plan(mixin.chain(1e-5), input_types)


def small_pvm(dtype: str, length: int) -> list[Launch]:
    return pvm_launches(dtype, length, d=96, latent=64, inner=40, head_dim=32, slots=10)


def small_mixin(dtype: str, length: int) -> list[Launch]:
    return mixin_launches(dtype, length, d=96, heads=3, inner=40, head_dim=32, slots=10)


def assemble(kernel: CompiledKernel, folder: Path, capability: int | None = None) -> str:
    """What ptxas says of a kernel's PTX, empty where it takes it. `capability`: another GPU's."""
    target = capability or kernel.capability
    path = folder / f"{kernel.entry}-{target}-{id(kernel)}.ptx"
    path.write_text(kernel.ptx)
    arch = f"sm_{target}{'a' if target >= 90 else ''}"
    command = [get_ptxas(target).path, f"-arch={arch}", "-o", str(path.with_suffix(".cubin")), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr or f"ptxas ended with {done.returncode}"


def assembled(kernels: list[CompiledKernel], folder: Path) -> set[str]:
    with ThreadPoolExecutor(2) as pool:
        return set(pool.map(lambda kernel: assemble(kernel, folder), kernels))


def parameters(kernel: CompiledKernel) -> list[str]:
    """The types of the entry's parameters, as the PTX has them."""
    head = kernel.ptx[kernel.ptx.index(".entry") :].partition("{")[0]
    return re.findall(r"\.param \.(\w+)", head)


@pytest.mark.parametrize("launches", [pvm_launches, pytest.param(mixin_launches, marks=pytest.mark.long)])
def test_real_sizes_compile_for_every_target(launches: Callable[..., list[Launch]], tmp_path: Path) -> None:
    planned = [launch for length in (1, 512) for launch in launches("bfloat16", length)]
    alike = [launch for length in (1, 512) for launch in launches("bfloat16", length, per_token=False)]
    planned += [launch for launch in alike if "mask" in launch.inputs]  # the rest is the same
    jobs = [Job(launch, each, aligned=True) for launch in planned for each in CAPABILITIES]
    compiled = compile_launches(jobs)
    assert assembled(compiled, tmp_path) == {""}
    for job, kernel in zip(jobs, compiled, strict=True):
        launch = job.launch
        names = [name for name in launch.step.kernel.inputs if name in launch.inputs]
        assert [p.name for p in kernel.parameters] == [*names, *launch.sizes, *launch.outputs]
        assert parameters(kernel) == ["u32" if p.kind == "size" else "u64" for p in kernel.parameters]
        assert kernel.capability == job.capability and kernel.num_warps == launch.tile_config.num_warps
        assert kernel.shared <= SHARED_KIB[job.capability] * 1024
        assert f".entry {kernel.entry}(" in kernel.ptx and "/exporters/" not in kernel.ptx
        # no later than the drivers that a GPU of this capability may have
        (version,) = re.findall(r"^\.version (\d+\.\d+)$", kernel.ptx, re.MULTILINE)
        assert version == {100: "8.6", 120: "8.7"}.get(job.capability, "8.0")


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.long)])
@pytest.mark.parametrize("launches", [small_pvm, small_mixin])
def test_other_dtypes_compile(launches: Callable[[str, int], list[Launch]], dtype: str, tmp_path: Path) -> None:
    compiled = compile_launches([Job(launch, 80) for length in (1, 20) for launch in launches(dtype, length)])
    assert assembled(compiled, tmp_path) == {""}
    # PTX of 8.0 is for all that comes later
    assert [assemble(compiled[1], tmp_path, later) for later in (89, 120)] == ["", ""]


def test_ptxas_refuses_what_is_damaged(tmp_path: Path) -> None:
    (kernel,) = compile_launches([Job(small_pvm("float16", 1)[0], 80)])
    assert assemble(kernel, tmp_path) == ""
    without = dataclasses.replace(kernel, ptx=re.sub(r"\.param \.u32 \w+,?", "", kernel.ptx, count=1))
    assert "error" in assemble(without, tmp_path)


def test_aligned_pointers_make_accesses_wider() -> None:
    launch = pvm_launches("bfloat16", 1)[0]
    apart, aligned = compile_launches([Job(launch, 80), Job(launch, 80, aligned=True)])
    assert "ld.global.v4." in aligned.ptx and "ld.global.v4." not in apart.ptx


# -- refusals -----------------------------------------------------------------------------------------------------
def large() -> Launch:
    """More than any rule asks for."""
    launch = next(each for each in pvm_launches("bfloat16", 512, head_dim=256) if each.step.name == "pvm_retrieve")
    return plan_step(launch.step, launch.inputs, lambda step, inputs: TileConfig(tokens=64, outputs=64, num_stages=3))


@pytest.mark.parametrize("launches", [pvm_launches, mixin_launches])
def test_large_heads_fit_the_smallest_gpu(launches: Callable[..., list[Launch]]) -> None:
    size = {"latent": 512} if launches is pvm_launches else {"heads": 4}
    planned = [*launches("float32", 512, d=512, inner=256, head_dim=256, **size)]
    assert all(each.shared <= 99 << 10 for each in compile_launches([Job(each, 120) for each in planned]))


def test_too_much_shared_memory_is_an_error_or_takes_fewer_stages() -> None:
    with pytest.raises(
        CompileError, match=r"pvm_retrieve \(64 tokens a program\) for compute capability 120 needs \d+ "
    ):
        compile_launches([Job(large(), 120)])
    (fitting,) = compile_launches([Job(large(), 120)], fit=True)
    assert fitting.shared <= 99 * 1024


def test_what_no_number_of_stages_makes_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_large(jobs: list[Job], cache: Path | None) -> list[dict[str, Any]]:
        asked.extend(job.launch.tile_config.num_stages for job in jobs)
        return [{"entry": "k", "ptx": HEAD, "shared": 100 << 10, "num_warps": 4, "scratch": 0} for _ in jobs]

    monkeypatch.setattr(aot, "_compile", compile_large)
    expected = "100 KiB of shared memory, which has 99: take smaller tile configs.*num_stages': 1"
    with pytest.raises(CompileError, match=expected):
        compile_launches([Job(large(), 89)], fit=True)
    assert asked == [3, 2, 1]


@pytest.mark.parametrize(("capability", "largest"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_a_program_may_have_all_of_its_shared_memory_and_no_more(
    capability: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KiB of a thread block, as NVIDIA's CUDA programming guide has them for each compute capability."""
    job = Job(small_pvm("float16", 1)[0], capability)
    kernel = {"entry": "k", "ptx": HEAD + "{ ret; }", "shared": largest << 10, "num_warps": 4, "scratch": 0}
    monkeypatch.setattr(aot, "_compile", lambda jobs, cache: [kernel])
    assert compile_launches([job])[0].shared == largest << 10
    kernel["shared"] = (largest << 10) + 1
    with pytest.raises(CompileError, match=f"{capability} needs {largest} KiB of shared memory, which has {largest}:"):
        compile_launches([job])


def test_an_unknown_capability_is_told() -> None:
    with pytest.raises(CompileError, match="compute capability 75; there are 80, 86"):
        compile_launches([Job(small_pvm("float16", 1)[0], 75)])


def with_function(launch: Launch, module: str, name: str) -> Launch:
    """The launch, of a kernel defined elsewhere."""
    function = types.SimpleNamespace(fn=getattr(importlib.import_module(module), name))
    kernel = dataclasses.replace(launch.step.kernel, function=function)
    return dataclasses.replace(launch, step=dataclasses.replace(launch.step, kernel=kernel))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.abort()", "pvm_text .* for compute capability 80: compiling kernels ended by SIGABRT"),
        ("raise ValueError('no such thing')", "pvm_text .* does not compile: ValueError: no such thing"),
    ],
)
def test_what_ends_or_stops_the_compiler_is_told_in_one_line(
    code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happens where kernels are compiled alone, that is, where they are not interpreted."""
    name = f"kernel_{abs(hash(code))}"
    body = f"import os\nif 'TRITON_INTERPRET' not in os.environ:\n    {code}\ndef kernel(): ...\n"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    launch = with_function(small_pvm("float16", 1)[0], name, "kernel")
    with pytest.raises(CompileError, match=expected) as raised:
        compile_launches([Job(launch, 80)])
    assert "\n" not in str(raised.value)


HEAD = (
    ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u32 k_param_1,\n\t.param .u64 .ptr .global k_param_2\n)\n"
)


def test_parameters_of_triton_are_taken_away_where_nobody_reads_them() -> None:
    ptx = HEAD + "{ ld.param.b32 %r1, [k_param_1]; ret; }"
    stripped = strip_scratch(ptx, "k", 2)
    assert "k_param_1\n)" in stripped and "k_param_2" not in stripped
    assert strip_scratch(ptx, "k", 3) == ptx
    with pytest.raises(CompileError, match="uses parameter 1"):
        strip_scratch(ptx, "k", 1)


def test_scratch_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(small_pvm("float16", 1)[0], 80)
    compiled = {"entry": "k", "ptx": HEAD, "shared": 0, "num_warps": 4, "scratch": 64}
    monkeypatch.setattr(aot, "_compile", lambda jobs, cache: [compiled])
    with pytest.raises(CompileError, match="needs 64 bytes of scratch memory"):
        compile_launches([job])


# -- the cache ----------------------------------------------------------------------------------------------------
@pytest.fixture
def compiled_count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kernels each child was given."""
    counts: list[int] = []

    def counting(jobs: dict[str, Any]) -> dict[str, Any]:
        counts.append(len(jobs))
        return share(jobs)

    share = aot._compile_share
    monkeypatch.setattr(aot, "_compile_share", counting)
    return counts


def test_the_second_time_nothing_is_compiled(tmp_path: Path, compiled_count: list[int]) -> None:
    launch = small_pvm("float16", 1)[0]
    first = compile_launches([Job(launch, 80), Job(launch, 80), Job(launch, 89)], tmp_path)
    assert compiled_count == [2] and first[0] == first[1] != first[2]
    assert compile_launches([Job(launch, 89), Job(launch, 80)], tmp_path) == [first[2], first[0]]
    assert compiled_count == [2]
    compile_launches([Job(launch, 80)])
    assert compiled_count == [2, 1]


def test_damaged_entries_are_compiled_again(tmp_path: Path, compiled_count: list[int]) -> None:
    damages: list[Callable[[dict[str, Any]], Any]] = [
        lambda entry: entry.pop("ptx"),
        lambda entry: entry.pop("scratch"),
        lambda entry: entry.update(shared="0"),
        lambda entry: entry.update(num_warps=None),
        lambda entry: entry.update(entry="another"),
        lambda entry: entry.update(ptx=entry["ptx"][:200]),
        lambda entry: entry.clear(),
    ]
    launch = small_pvm("float16", 1)[0]
    epsilons = [(number + 1) / 8 for number in range(len(damages) + 1)]
    jobs = [Job(dataclasses.replace(launch, constants=launch.constants | {"EPS": eps}), 80) for eps in epsilons]
    first = compile_launches(jobs, tmp_path)
    *files, cut_short = sorted(tmp_path.iterdir())
    for file, damage in zip(files, damages, strict=True):
        entry = json.loads(file.read_text())
        damage(entry)
        file.write_text(json.dumps(entry))
    cut_short.write_text(cut_short.read_text()[:100])
    assert compile_launches(jobs, tmp_path) == first and compiled_count == [len(jobs), len(jobs)]
    assert compile_launches(jobs, tmp_path) == first and len(compiled_count) == 2  # they were mended


def test_a_folder_that_cannot_be_written_to_is_said_once(tmp_path: Path, compiled_count: list[int]) -> None:
    (tmp_path / "file").touch()
    warn_once.cache_clear()
    launches = small_pvm("float16", 1)[:2]
    with pytest.warns(UserWarning, match="compiled kernels are not kept: .*SURGEON_KERNELS_DIR says where") as warned:
        kernels = compile_launches([Job(launch, 80) for launch in launches], tmp_path / "file" / "kernels")
    assert len(warned) == 1 and all(".entry" in each.ptx for each in kernels) and compiled_count == [2]


def test_whatever_changes_a_kernel_is_another_entry(tmp_path: Path, compiled_count: list[int]) -> None:
    launch = small_pvm("float16", 1)[0]
    compile_launches([Job(launch, 80)], tmp_path)
    changed = [
        Job(launch, 86),
        Job(launch, 80, aligned=True),
        Job(dataclasses.replace(launch, constants=launch.constants | {"EPS": 0.5}), 80),
        Job(dataclasses.replace(launch, tile_config=dataclasses.replace(launch.tile_config, num_warps=2)), 80),
        Job(small_pvm("float32", 1)[0], 80),
    ]
    compile_launches(changed, tmp_path)
    assert compiled_count == [1, len(changed)]


def test_another_source_or_triton_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = aot._describe(Job(small_pvm("float16", 1)[0], 80))
    before = aot._key(described)
    monkeypatch.setattr(aot.importlib.metadata, "version", lambda name: "0.0")
    other = aot._key(described)
    monkeypatch.undo()
    monkeypatch.setattr(aot, "_source_digest", lambda module: "another")
    assert len({before, other, aot._key(described)}) == 3


def test_another_source_of_what_kernels_share_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = aot._describe(Job(small_pvm("float16", 1)[0], 80))
    digest = aot._source_digest.__wrapped__  # the digest is kept for as long as the process lives
    monkeypatch.setattr(aot, "_source_digest", digest)
    before = aot._key(described)
    shared = tmp_path / "_parts.py"
    shared.write_bytes(aot._PARTS.read_bytes())
    monkeypatch.setattr(aot, "_PARTS", shared)
    assert aot._key(described) == before
    shared.write_bytes(shared.read_bytes().replace(b"+ x * weight", b"- x * weight"))
    assert aot._key(described) != before
