"""Grafts as custom operators of ONNX Runtime compute what their functions do: the library and the tables as on a GPU,
with an interpreter of kernels in the place of CUDA's driver."""

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from cuda_stand_in import StandIn
from exporters.fusion import fused_kernels
from exporters.kernels.aot import CompileError
from exporters.onnxruntime import BundleRuntime, bundle_runtime
from exporters.onnxruntime.custom_ops import Device, Fused, cuda_device, fuse, fused, native
from graft_graphs import inputs_of, model_of
from pairs import Pair, image
from surgeon.inputs import Prompt
from surgeon.memory.visibility import Visibility

CAPABILITY = 80


def device(driver: StandIn, alignment: int = 1) -> Device:
    """The CPU's memory is not placed as a GPU's is."""
    return Device(CAPABILITY, "CPUExecutionProvider", str(driver.path), alignment)


def session(model: ir.Model, kernels: Fused | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if kernels is not None:
        kernels.register(options)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def evaluate(ort_session: ort.InferenceSession, kind: str, length: int, visibility: Visibility = "all") -> np.ndarray:
    feeds = inputs_of(kind, length, visibility=visibility)
    output: np.ndarray = ort_session.run(None, {value.name: feeds[value.name] for value in ort_session.get_inputs()})[0]
    return output


def replaced(model: ir.Model, driver: StandIn, alignment: int = 1) -> Fused:
    kernels = fuse(model, device(driver, alignment))
    assert kernels is not None
    driver.know(kernels.nodes, kernels.table.operators)
    return kernels


@pytest.mark.parametrize(
    ("kind", "visibility"), [pytest.param("pvm", "causal", marks=pytest.mark.long), ("mixin", "all")]
)
def test_a_graft_computes_what_its_function_does(driver: StandIn, kind: str, visibility: Visibility) -> None:
    model = model_of(kind, visibility=visibility)
    kernels = replaced(model, driver)
    steps = [node.op_type for node in model.graph]
    before, after = session(model_of(kind, visibility=visibility)), session(model, kernels)
    gc.collect()  # what tables point to is theirs
    variants = set()
    for length in (1, 2, 17):
        driver.launches.clear()
        want, got = (evaluate(ort_session, kind, length, visibility) for ort_session in (before, after))
        assert got.shape == want.shape and np.abs(got - want).max() < 1e-5
        assert [launched.split(":")[0] for launched in driver.launches] == steps
        variants |= set(driver.launches)
    assert {f"{steps[0]}:{tokens}" for tokens in (1, 16, 64)} <= variants


@pytest.mark.parametrize("kind", ["pvm", "mixin"])
def test_no_memory_adds_nothing_and_no_tokens_are_not_launched(driver: StandIn, kind: str) -> None:
    model = model_of(kind)
    kernels = replaced(model, driver)
    ort_session = session(model, kernels)
    feeds = inputs_of(kind, 5)
    keys, values, mask = feeds["keys"][:, :, :0], feeds["values"][:, :, :0], feeds["memory_mask"][:, :0]
    empty_memory = feeds | {"keys": keys, "values": values, "memory_mask": mask}
    (got,) = ort_session.run(
        None, {value.name: np.ascontiguousarray(empty_memory[value.name]) for value in ort_session.get_inputs()}
    )
    want = feeds["hidden_states"] if kind == "mixin" else np.zeros_like(feeds["hidden_states"])
    np.testing.assert_array_equal(got, want)
    driver.launches.clear()
    assert evaluate(ort_session, kind, 0).shape[1] == 0 and not driver.launches


def test_several_graphs_have_their_operators_and_unload_them(driver: StandIn) -> None:
    graphs = {kind: model_of(kind) for kind in ("pvm", "mixin")}
    kernels = {kind: replaced(model, driver) for kind, model in graphs.items()}
    sessions = {kind: session(model, kernels[kind]) for kind, model in graphs.items()}
    for _ in range(2):
        for kind, ort_session in sessions.items():
            evaluate(ort_session, kind, 1)
    assert driver.loaded == 6 + 5  # each once
    del ort_session
    for left, kind in ((5, "pvm"), (0, "mixin")):
        del sessions[kind]
        gc.collect()
        assert driver.loaded == left


def test_each_context_has_its_kernels(driver: StandIn) -> None:
    model = model_of("mixin")
    kernels = replaced(model, driver)
    ort_session = session(model, kernels)
    for loaded, context in ((5, 0), (10, 1), (10, 0)):
        driver.enter(context)
        assert np.isfinite(evaluate(ort_session, "mixin", 1)).all() and driver.loaded == loaded


def test_operators_are_those_of_the_provider_that_is_named(driver: StandIn) -> None:
    model = model_of("pvm")
    kernels = fuse(model, replace(device(driver), provider="CUDAExecutionProvider"))
    with pytest.raises(Exception, match=r"pvm_text"):  # this session has the CPU's alone
        session(model, kernels)


def test_what_the_driver_says_is_told(driver: StandIn) -> None:
    model = model_of("pvm")
    kernels = replaced(model, driver)
    ort_session = session(model, kernels)
    driver.fails = 700
    with pytest.raises(Exception, match=r"pvm_text: cuLaunchKernel \(700\)"):
        evaluate(ort_session, "pvm", 1)
    driver.fails = 0
    assert np.isfinite(evaluate(ort_session, "pvm", 1)).all()


def test_a_tensor_that_kernels_would_read_wrongly_is_refused(driver: StandIn) -> None:
    model = model_of("pvm")
    kernels = replaced(model, driver, alignment=16)
    ort_session = session(model, kernels)
    feeds = {value.name: inputs_of("pvm", 1)[value.name] for value in ort_session.get_inputs()}
    memory = np.zeros(feeds["keys"].nbytes + 32, dtype=np.uint8)
    start = -memory.ctypes.data % 16 + 4
    keys = memory[start : start + feeds["keys"].nbytes].view(np.float32).reshape(feeds["keys"].shape)
    keys[:] = feeds["keys"]
    with pytest.raises(Exception, match="pvm_attend: a tensor is not placed at a multiple of 16 bytes"):
        ort_session.run(None, feeds | {"keys": keys})


def test_a_bundle_answers_the_same(export: Callable[..., Pair], driver: StandIn) -> None:
    recipe = ("pvm:layers=1,latent=64", "mixin:layers=2,num_heads=2,intermediate=48")
    pair = export("qwen3_vl", recipe, head_dim=32, visibility="causal")
    plain, runtime = (BundleRuntime(pair.bundle, provider="cpu", threads=1) for _ in range(2))
    runtime.options = replace(runtime.options, fused=device(driver))
    kernels = runtime.decoder.fused
    assert kernels is not None and kernels.functions == {"PersistentVisualMemory": 1, "Mixin": 1}
    driver.know(kernels.nodes, kernels.table.operators)
    prompts = [Prompt("What is it?", (image(64, 96),)), Prompt("A star is a")]
    fused_logits, expected = [], []
    for each, logits in ((runtime, fused_logits), (plain, expected)):
        state, last = each.start(each.prepare(prompts))
        logits.append(last)
        for _ in range(3):
            logits.append(each.step(state, logits[-1].argmax(-1)))
    for got, want in zip(fused_logits, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    steps = [launched.split(":")[0] for launched in driver.launches]
    assert steps.count("pvm_inject") == steps.count("mixin_down") >= 4
    assert runtime.vision.fused is None and plain.decoder.fused is None


def test_what_kernels_do_not_take_stays_beside_them(
    export: Callable[..., Pair], driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions and operators of one domain in a graph; what grafts add, and what they add it to, as outputs."""
    real = fused_kernels.reason_against
    monkeypatch.setattr(
        fused_kernels, "reason_against", lambda kind, *rest: "not this one" if kind == "mixin" else real(kind, *rest)
    )
    pair = export("qwen3_vl", ("pvm:layers=1,latent=64", "mixin:layers=2,num_heads=2,intermediate=48"), head_dim=32)
    names = ("persistent_visual_memory.1", "hidden_states.1", "mixin.2")
    plain, runtime = (BundleRuntime(pair.bundle, provider="cpu", threads=1, extra_outputs=names) for _ in range(2))
    runtime.options = replace(runtime.options, fused=device(driver))
    with pytest.warns(UserWarning, match="not this one; standard operators stay"):
        kernels = runtime.decoder.fused
    assert kernels is not None and kernels.functions == {"PersistentVisualMemory": 1}
    driver.know(kernels.nodes, kernels.table.operators)
    prompts = [Prompt("What is it?", (image(64, 96),))]
    (state, logits), (plain_state, expected) = (each.start(each.prepare(prompts)) for each in (runtime, plain))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    for name in names:
        want = plain_state.extra[name]
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(state.extra[name], want, atol=1e-4, rtol=0, err_msg=name)
    assert driver.launches


def test_kernels_that_do_not_compile_leave_the_graph_as_it_was(
    export: Callable[..., Pair], driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise CompileError("pvm_text does not compile: no such register")

    monkeypatch.setattr(fused, "compile_nodes", fail)
    pair = export("qwen3_vl", ("pvm:layers=1,2,latent=64",), head_dim=32)
    runtime = BundleRuntime(pair.bundle, provider="cpu", threads=1)
    runtime.options = replace(runtime.options, fused=device(driver))
    with pytest.warns(UserWarning, match=r"decoder\.onnx: pvm_text does not compile: no such register; standard"):
        _, logits = runtime.start(runtime.prepare([Prompt("A star is a")]))
    assert runtime.decoder.fused is None and np.isfinite(logits).all()


# -- choosing --------------------------------------------------------------------------------------------------------
@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "reason_against_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 3))
    cuda_device.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_a_gpu_gets_kernels_that_run_there() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda = cuda_device()
    assert cuda is not None and cuda.capability == 89 and cuda.provider == "CUDAExecutionProvider"
    cuda_device.cache_clear()


def test_bundles_take_them_on_cuda_alone(export: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_runtime, "choose_provider", lambda provider: provider)
    monkeypatch.setattr(bundle_runtime, "cuda_device", lambda: Device(CAPABILITY))
    grafted = export("qwen3_vl", ("pvm:layers=1,2,latent=64",), head_dim=32)

    def taken(provider: Literal["cpu", "cuda", "tensorrt-rtx"], fused_kernels: bool = True) -> Device | None:
        return BundleRuntime(grafted.bundle, provider=provider, fused_kernels=fused_kernels).options.fused

    assert taken("cuda") == Device(CAPABILITY)
    assert taken("cuda", fused_kernels=False) is taken("cpu") is taken("tensorrt-rtx") is None


@pytest.mark.usefixtures("gpu")
def test_without_a_compiler_standard_operators_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    native.build.cache_clear()
    with pytest.warns(UserWarning, match="no fused kernels in ONNX Runtime: the C compiler /nowhere/cc does not run"):
        assert cuda_device() is None
    cuda_device.cache_clear()
    native.build.cache_clear()
