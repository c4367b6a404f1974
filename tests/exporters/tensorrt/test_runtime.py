"""Engines compute on the host what bundles do: pieces, profiles, buffers, later turns, positions.

The device is rehearsed (tests/rehearsal.py): what lies behind it, TensorRT on a GPU, is not tested here.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import has_tokenizer
from exporters.onnxruntime import BundleRuntime
from exporters.runtime import Runtime
from exporters.tensorrt import runtime as runtimes
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.library import gpu, installed_version
from exporters.tensorrt.profiles import Limits, Range
from exporters.tensorrt.runtime import EngineRuntime
from pairs import MAX_LENGTH, MIXIN, PLAIN, PVM, VISMEM, Pair, image
from rehearsal import CpuDevice, make_engines
from surgeon.inputs import ModelInputs, Prompt
from surgeon.memory.visibility import Visibility
from surgeon.positions import Positions

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")
Export = Callable[..., Pair]
Make = Callable[..., EngineRuntime]
LIMITS = Limits(
    prefill=Range.of(4, 16), batch=Range.of(1, 3), image_tokens=Range.of(1, 250), visual_tokens=Range.of(1, 400)
)
PROMPTS = [
    Prompt("What is it?", (image(84, 126),)),
    Prompt("A star is a"),
    Prompt("Compare them.", (image(64, 64, 1), image(84, 84, 2))),
]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def runtime(pair: Pair, limits: Limits = LIMITS, captures: bool = True, **options: object) -> EngineRuntime:
        path = tmp_path / f"engines{len(list(tmp_path.iterdir()))}"
        return EngineRuntime(make_engines(pair, path, limits, **options), device=CpuDevice(captures))  # type: ignore[arg-type]

    return runtime


def device(runtime: EngineRuntime) -> CpuDevice:
    assert isinstance(runtime._device, CpuDevice)
    return runtime._device


def conversation(runtime: Runtime, inputs: ModelInputs, later: ModelInputs) -> list[np.ndarray]:
    """Logits of a prompt, of steps, of a later turn with images and of steps after it; greedy tokens are fed."""
    state, logits = runtime.start(inputs)
    step_logits = [logits]
    for _ in range(4):
        step_logits.append(runtime.step(state, step_logits[-1].argmax(-1)))
    step_logits.append(runtime.append(state, later))
    for active in (None, np.array([True, False, True]), None):
        stepped = runtime.step(state, step_logits[-1].argmax(-1), active)
        step_logits.append(stepped if active is None else np.where(active[:, None], stepped, step_logits[-1]))
    return step_logits


def compare(
    runtime: Runtime, reference: Runtime, positions: Positions | None = None, prompts: list[Prompt] = PROMPTS
) -> None:
    inputs = reference.prepare(prompts, positions)
    images = (image(60, 60, 5),) if prompts is PROMPTS else ()
    later = reference.prepare([Prompt("And it?", images), Prompt("Why?"), Prompt("So?")], positions)
    logits, expected = conversation(runtime, inputs, later), conversation(reference, inputs, later)
    for ours, theirs in zip(logits, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
        assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("model_type", "recipe", "visibility"),
    [("qwen3_vl", MIXIN + PVM, "causal"), ("qwen2_5_vl", PLAIN, None), ("llava_onevision", MIXIN, "all")],
    ids=["qwen3_vl mixin pvm causal", "qwen2_5_vl", "llava_onevision mixin all"],
)
def test_logits_and_greedy_tokens_are_those_of_the_bundle(
    export: Export, make: Make, model_type: str, recipe: tuple[str, ...], visibility: Visibility | None
) -> None:
    pair = export(model_type, recipe, visibility=visibility)
    runtime = make(pair)
    many = model_type == "llava_onevision"  # one image has most of the cache's tokens there
    prompts = [Prompt("What is it?", (image(60, 60),)), *PROMPTS[1:2] * 2] if many else PROMPTS
    compare(runtime, BundleRuntime(pair.bundle, threads=1), prompts=prompts)
    lengths = device(runtime).lengths()
    assert max(lengths) == 16 and 1 in lengths and lengths.count(16) > 2  # prompts went in pieces


def test_pieces_of_a_prompt_see_what_stands_before_them(export: Export, make: Make) -> None:
    """A prompt in pieces, in one pass, and cut in front of its second image: each token sees the same."""
    pair = export("qwen3_vl", MIXIN + PVM, visibility="causal")
    runtime = make(pair)
    row: list[Any] = ["some words", image(64, 96, 1), "between the images", image(96, 64, 2), "end"]
    whole, prefix = pair.raw([row]), pair.raw([row[:3]])
    _, logits = runtime.start(whole, logits="all")
    assert max(device(runtime).lengths()) == 16 < whole.lengths[0]
    _, expected = BundleRuntime(pair.bundle, threads=1).start(whole, logits="all")
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    _, before = runtime.start(prefix, logits="all")
    np.testing.assert_allclose(logits[:, : prefix.lengths[0]], before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["dhr", "plain"])
@pytest.mark.parametrize(
    ("model_type", "recipe"),
    [
        ("internvl", (*MIXIN, *PVM, "rope-dhr:tile_order=column")),
        ("ovis2", (f"{MIXIN[0]},tiles=context", "rope-dhr")),
        ("internvl", (f"{MIXIN[0]},tiles=memory", "rope-dhr")),
    ],
    ids=["both", "context", "memory"],
)
def test_tiles_are_where_the_bundle_has_them(
    export: Export, make: Make, model_type: str, recipe: tuple[str, ...], positions: Positions
) -> None:
    pair = export(model_type, recipe)
    compare(make(pair), BundleRuntime(pair.bundle, threads=1), positions)


def test_more_logits_than_a_call_gives(export: Export, make: Make) -> None:
    pair = export("qwen3_vl")
    wide = Limits(prefill=Range.of(4, 200), batch=Range.of(1, 3))
    runtime, reference = make(pair, wide), BundleRuntime(pair.bundle, threads=1)
    inputs = reference.prepare([Prompt("word " * 50), PROMPTS[0]])
    _, logits = runtime.start(inputs, logits="all")
    _, expected = reference.start(inputs, logits="all")
    for row, length in enumerate(inputs.lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-4)
    assert max(device(runtime).lengths()) == 64
    runtime.start(inputs)
    assert max(device(runtime).lengths()) == inputs.lengths.max()  # at once where one is enough


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 2e-2), (torch.bfloat16, 0.2)], ids=str)
def test_half_precision_crosses_the_boundary(export: Export, make: Make, dtype: torch.dtype, atol: float) -> None:
    """Engines take and give their own dtype, the host fp32; kernels differ in how they round."""
    pair = export("qwen3_vl", MIXIN + PVM, dtype)
    runtime, reference = make(pair), BundleRuntime(pair.bundle, threads=1, fast_attention=False)
    inputs = reference.prepare(PROMPTS)
    (state, logits), (other, expected) = runtime.start(inputs), reference.start(inputs)
    np.testing.assert_allclose(logits, expected, atol=atol)
    assert {tensor.dtype for tensor in (*state.caches.values(), *state.memory.values())} == {dtype}
    token = expected.argmax(-1)
    np.testing.assert_allclose(runtime.step(state, token), reference.step(other, token), atol=atol)


def test_steps_are_captured_once_for_each_memory(export: Export, make: Make) -> None:
    runtime = make(export("qwen3_vl"))
    rehearsed = device(runtime)
    state, logits = runtime.start(runtime.prepare(PROMPTS))
    for _ in range(5):
        logits = runtime.step(state, logits.argmax(-1))
    assert (rehearsed.captured, rehearsed.replayed) == (1, 4)  # the first step is run, then recorded
    runtime.append(state, runtime.prepare([Prompt("Why?"), Prompt("So?"), Prompt("Ah.")]))
    runtime.step(state, logits.argmax(-1))
    assert (rehearsed.captured, rehearsed.replayed) == (1, 5)  # no new image: the same buffers
    runtime.append(state, runtime.prepare([PROMPTS[0], Prompt("So?"), Prompt("Ah.")]))
    for _ in range(2):
        runtime.step(state, logits.argmax(-1))
    assert (rehearsed.captured, rehearsed.replayed) == (2, 6)
    before = rehearsed.contexts
    del state
    state, logits = runtime.start(runtime.prepare(PROMPTS[:1]))
    runtime.step(state, logits.argmax(-1))
    assert rehearsed.contexts == before  # working memory is handed on


@pytest.mark.parametrize("captures", [True, False])
def test_requests_do_not_disturb_each_other(export: Export, make: Make, captures: bool) -> None:
    pair = export("qwen3_vl")
    runtime, reference = make(pair, captures=captures), BundleRuntime(pair.bundle, threads=1)
    batches = [runtime.prepare(PROMPTS), runtime.prepare(PROMPTS[:1]), runtime.prepare(PROMPTS[1:])]
    running = [(r, [r.start(batch) for batch in batches]) for r in (runtime, reference)]
    by_runtime = []
    for each, started in running:
        logits = [first for _, first in started]
        for _ in range(4):
            logits = [each.step(state, last.argmax(-1)) for (state, _), last in zip(started, logits, strict=True)]
        by_runtime.append(logits)
    for ours, theirs in zip(*by_runtime, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert (device(runtime).replayed > 0) == captures


def test_rows_that_lie_where_nothing_can_be_bound(export: Export, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's memory or cache may begin at an address that TensorRT does not take."""
    monkeypatch.setattr(runtimes, "ALIGNMENT", 1 << 40)  # so none but the first row's
    pair = export("qwen3_vl", MIXIN + PVM)
    compare(make(pair), BundleRuntime(pair.bundle, threads=1))


def test_a_row_may_fill_the_cache(export: Export, make: Make) -> None:
    pair = export("qwen3_vl", PLAIN)
    generations = [
        r.generate([Prompt("word " * 100)], 100) for r in (make(pair), BundleRuntime(pair.bundle, threads=1))
    ]
    assert generations[0] == generations[1] and generations[0][0].finish_reason == "length"
    assert len(generations[0][0].token_ids) < MAX_LENGTH - 100


# -- refusals ----------------------------------------------------------------------------------------------------
def test_more_than_the_engines_take(export: Export, make: Make) -> None:
    runtime = make(export("qwen3_vl"))
    with pytest.raises(EngineError, match=r"embed.engine: the request needs B 4, .* built for B 1..3.*--batch"):
        runtime.start(runtime.prepare([Prompt("a")] * 4))
    small = make(export("qwen3_vl"), Limits(prefill=LIMITS.prefill, image_tokens=Range.of(1, 4)))
    with pytest.raises(EngineError, match=r"vision.engine: the request needs M \d+, .* M 1..4.*--image-tokens"):
        small.start(small.prepare(PROMPTS[:1]))
    two = runtime.prepare([Prompt("b", (image(84, 84), image(84, 84)))])
    room = Limits(prefill=LIMITS.prefill, image_tokens=Range.of(1, 12), visual_tokens=Range.of(1, 12))
    with pytest.raises(EngineError, match=r"\d+ visual tokens in a row, the engines' memory holds 12.*--visual-tokens"):
        make(export("qwen3_vl"), room).start(two)


def test_more_images_over_several_turns_than_the_engines_memory_holds(export: Export, make: Make) -> None:
    room = Limits(prefill=LIMITS.prefill, image_tokens=Range.of(1, 12), visual_tokens=Range.of(1, 12))
    runtime = make(export("qwen3_vl"), room)
    state, _ = runtime.start(runtime.prepare([Prompt("a", (image(84, 84),))]))
    slots = state.memory_mask.shape[1]
    assert slots <= 12 < 2 * slots
    with pytest.raises(EngineError, match=rf"{2 * slots} visual tokens in a row, the engines' memory holds 12"):
        runtime.append(state, runtime.prepare([Prompt("b", (image(84, 84),))]))


def test_an_engine_that_was_left_out(export: Export, make: Make) -> None:
    runtime = make(export("qwen3_vl"), graphs=("embed", "vision", "memory"))
    with pytest.raises(EngineError, match="has no engine of decoder: build it without --graph"):
        runtime.start(runtime.prepare(PROMPTS[1:2]))


def test_a_damaged_engine(export: Export, tmp_path: Path) -> None:
    path = make_engines(export("qwen3_vl"), tmp_path / "engines", LIMITS)
    data = bytearray((path / "decoder.engine").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "decoder.engine").write_bytes(data)
    with pytest.raises(EngineError, match="decoder.engine is damaged or another"):
        EngineRuntime(path, device=CpuDevice())


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU here")
def test_without_a_gpu(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_engines(export("qwen3_vl"), tmp_path / "engines", LIMITS)
    expected = r"nothing was run.*\(sm89\), and CUDA finds none here\. What can be checked here:.*validate CKPT BUNDLE"
    with pytest.raises(EngineError, match=expected) as raised:
        EngineRuntime(path)
    assert "\n" not in str(raised.value) and f"surgeon inspect {path}" in str(raised.value)
    content = (path / "engine.json").read_text()
    version = f'"version": "{installed_version("tensorrt-rtx")}"'
    assert version in content
    (path / "engine.json").write_text(content.replace(version, '"version": "9.9.9"'))
    with pytest.raises(EngineError, match=r"are of tensorrt-rtx 9\.9\.9, here is"):  # the first thing that is wrong
        EngineRuntime(path)
    shutil.rmtree(path / "processor")


def test_the_library_has_what_the_device_calls() -> None:
    """As far as that can be seen where nothing can be loaded."""
    trt = pytest.importorskip("tensorrt_rtx")
    for owner, names in {
        trt.Runtime: ("deserialize_cuda_engine",),
        trt.ICudaEngine: ("create_execution_context", "create_runtime_config"),
        trt.IExecutionContext: (
            "set_input_shape",
            "set_tensor_address",
            "execute_async_v3",
            "set_optimization_profile_async",
            "is_stream_capturable",
        ),
        trt.IRuntimeConfig: ("set_execution_context_allocation_strategy", "create_runtime_cache", "set_runtime_cache"),
        trt.ExecutionContextAllocationStrategy: ("ON_PROFILE_CHANGE",),
    }.items():
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__}.{name}"
    assert trt.ILogger.INTERNAL_ERROR < trt.ILogger.ERROR < trt.ILogger.WARNING


def test_engines_form_memory_as_bundles_do(export: Export, make: Make) -> None:
    """In pieces of prefill, by profiles of their own, captured steps in between."""
    pair = export("qwen3_vl", VISMEM)
    engines, bundle = make(pair), BundleRuntime(pair.bundle, threads=1)
    answers, expected = (
        runtime.generate(PROMPTS, 12, memory="always", max_invocations=3) for runtime in (engines, bundle)
    )
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    calls = [[(call.token, call.kind) for call in answer.invocations] for answer in answers]
    assert calls == [[(call.token, call.kind) for call in answer.invocations] for answer in expected]
    assert all(calls) and {kind for row in calls for _, kind in row} == {"short", "long"}
