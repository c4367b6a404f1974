"""Memory that the model calls for: a bundle forms and feeds what transformers does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.onnxruntime import BundleRuntime
from exporters.validation.runners import BundleRunner
from pairs import MAX_LENGTH, MIXIN, PVM, VISMEM, Pair, image, make_pair
from surgeon.errors import InputError, OptionError, TooLongError
from surgeon.generation import Generation, Sampling
from surgeon.inputs import Prompt
from surgeon.memory.invoked_memory import InvokedMemory
from surgeon.memory.memory_tokens import LONG, SHORT, Kind
from surgeon.parity.torch_runner import TorchRunner
from surgeon.torch_generate import TorchGenerator

Export = Callable[..., Pair]
PROMPTS = [
    Prompt("What is it?", (image(64, 96),)),
    Prompt("A star is a"),
    Prompt("Compare them.", (image(64, 64, 1), image(96, 128, 3))),
]
SCHEDULE: list[dict[int, Kind]] = [{0: SHORT, 2: LONG}, {1: LONG, 3: LONG}, {4: LONG, 5: SHORT}]
OFTEN, SELDOM = ("qwen3_vl", "internvl"), ("qwen2_5_vl", "llava_onevision", "ovis2")
FAMILIES = [*OFTEN, *(pytest.param(model_type, marks=pytest.mark.long) for model_type in SELDOM)]
STEPS = 7
TOLERANCE = 1e-4
"""fp32 against fp32: the same arithmetic in another order, over logits of about 10."""


@pytest.fixture(scope="module")
def pair(export: Export) -> Pair:
    return export("qwen3_vl", VISMEM)


def essence(generation: Generation) -> tuple[list[int], str, list[tuple[int, str]]]:
    calls = [(call.token, call.kind) for call in generation.invocations]
    return generation.token_ids, generation.finish_reason, calls


def check_forced(pair: Pair) -> None:
    """Rows that call at other steps, for other kinds, in other orders."""
    reference, candidate = TorchRunner(pair.checkpoint, "fp32"), BundleRunner(pair.bundle)
    expected = reference.called_trace(PROMPTS, STEPS, SCHEDULE)
    actual = candidate.called_trace(PROMPTS, STEPS, SCHEDULE)
    np.testing.assert_allclose(actual.step_logits, expected.step_logits, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    silent = reference.called_trace(PROMPTS, STEPS, [{}, {}, {}], expected.tokens)
    changed = np.abs(silent.step_logits - expected.step_logits).max(-1)
    for row, wanted in enumerate(SCHEDULE):  # from the first call on memory matters, and not before it
        first = min(wanted)
        assert changed[row, :first].max(initial=0) < TOLERANCE and changed[row, first:].min() > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", FAMILIES)
def test_forced_invocations_are_those_of_transformers(export: Export, model_type: str) -> None:
    check_forced(export(model_type, VISMEM))


def test_with_pvm_and_mixin_and_a_short_former_in_the_decoder(export: Export) -> None:
    language = (VISMEM[0], f"{VISMEM[1]},short_former=language")
    check_forced(export("qwen3_vl", (*PVM, *MIXIN, *language)))


@pytest.mark.parametrize("mode", ["auto", "always", "off"])
def test_free_invocations_are_those_of_transformers(pair: Pair, mode: str) -> None:
    torch_answers = TorchGenerator(pair.model, pair.inputs).generate(PROMPTS, 24, memory=mode, max_invocations=3)
    answers = BundleRuntime(pair.bundle, threads=1).generate(PROMPTS, 24, memory=mode, max_invocations=3)
    assert list(map(essence, answers)) == list(map(essence, torch_answers))
    counts = [len(answer.invocations) for answer in answers]
    assert (min(counts) >= 1 and max(counts) <= 3) if mode == "always" else (mode == "auto" or not any(counts))


def test_sampled_tokens_do_not_depend_on_how_latents_are_fed(pair: Pair) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    torch_answers = TorchGenerator(pair.model, pair.inputs).generate(PROMPTS, 12, sampling, memory="always")
    answers = BundleRuntime(pair.bundle, threads=1).generate(PROMPTS, 12, sampling, memory="always")
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in torch_answers]


def test_an_invocation_leaves_the_cache_that_single_steps_leave(pair: Pair) -> None:
    """The chunk of latents and end token, against the same tokens one by one."""
    runtime = BundleRuntime(pair.bundle, threads=1)
    assert runtime.memory_tokens is not None
    invoke = runtime.memory_tokens.invoke[LONG]
    inputs = runtime.prepare(PROMPTS[:1])
    state, _ = runtime.start(inputs)
    runtime.step(state, np.array([invoke]))
    logits = runtime.invoke(state, 0, LONG)
    output = pair.model.generate(
        **pair.inputs.prepare(PROMPTS[:1]).model_kwargs(),
        logits_processor=[lambda ids, scores: scores.index_fill(1, torch.tensor([invoke]), 1e4)],
        max_new_tokens=1,
        max_invocations=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = int(state.lengths[0])
    np.testing.assert_allclose(logits, output.logits[-1][0].numpy(), atol=TOLERANCE, rtol=TOLERANCE)
    for index, layer in enumerate(output.past_key_values.layers[: pair.manifest.sizes.num_hidden_layers]):
        for name, tensor in (("keys", layer.keys), ("values", layer.values)):
            cached = state.caches[f"past_{name}.{index}"][0, :, :length]
            np.testing.assert_allclose(cached.numpy(), tensor[0].numpy(), atol=TOLERANCE, rtol=TOLERANCE)
    memory = InvokedMemory.of(output.past_key_values)
    assert memory is not None and state.remembered[0].length == memory.length == length
    np.testing.assert_allclose(state.remembered[0].seen_and_said()[-1], memory.said(0, 0)[0][-1], atol=TOLERANCE)


def test_a_row_that_has_no_room_for_memory_does_not_call(pair: Pair) -> None:
    runtime = BundleRuntime(pair.bundle, threads=1)
    assert runtime.memory_tokens is not None
    prompt_length = int(runtime.prepare(PROMPTS[:1]).lengths[0])
    runtime.max_length = prompt_length + runtime.memory_tokens.longest  # none would be left for a token of the answer
    (answer,) = runtime.generate(PROMPTS[:1], 32, memory="always")
    assert answer.invocations == [] and len(answer.token_ids) == runtime.memory_tokens.longest
    runtime.max_length += 2
    (answer,) = runtime.generate(PROMPTS[:1], 32, memory="always")
    (call,) = answer.invocations
    fed = runtime.memory_tokens.latents[call.kind] + 2
    assert call.token == 0 and answer.finish_reason == "length"
    assert len(answer.token_ids) == runtime.memory_tokens.longest + 2 - fed


def test_what_cannot_be_formed_is_refused(pair: Pair, export: Export) -> None:
    runtime = BundleRuntime(pair.bundle, threads=1)
    assert runtime.memory_tokens is not None
    state, _ = runtime.start(runtime.prepare(PROMPTS[1:2]))
    runtime.step(state, np.array([runtime.memory_tokens.invoke[SHORT]]))
    with pytest.raises(InputError, match="looks at an image again, and this row has none"):
        runtime.invoke(state, 0, SHORT)
    state.lengths[:] = MAX_LENGTH - 1
    with pytest.raises(TooLongError):
        runtime.invoke(state, 0, LONG)
    with pytest.raises(OptionError, match="no memory that it could call for"):
        BundleRuntime(export("qwen3_vl").bundle, threads=1).generate(PROMPTS[:1], 1, memory="always")
    with pytest.raises(InputError, match="spells the memory token <ml_I>"):
        runtime.generate([Prompt("Say <ml_I> now.")], 1)


def test_a_later_turn_is_remembered(pair: Pair) -> None:
    """Images and text of a second turn are in the memory that is formed then."""
    runtime = BundleRuntime(pair.bundle, threads=1)
    state, _ = runtime.start(runtime.prepare(PROMPTS[:1]))
    seen = sum(map(len, state.remembered[0].visual))
    later = runtime.prepare([Prompt("And this?", (image(64, 64, 5),))])
    runtime.append(state, later)
    remembered = state.remembered[0]
    assert sum(map(len, remembered.visual)) > seen and len(remembered.images) == 2
    assert remembered.length == int(state.lengths[0])


def test_separators_behind_separators_and_behind_memory_call_for_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every token ends a sentence, one call at the beginning is all that `always` makes."""
    runtime = BundleRuntime(pair.bundle, threads=1)
    assert runtime.memory_tokens is not None
    every = tuple(range(pair.manifest.sizes.vocab_size))
    ordinary = [token for token in every if token not in runtime.memory_tokens.ids]
    runtime.memory_tokens = replace(runtime.memory_tokens, separators=tuple(ordinary))
    monkeypatch.setitem(pair.model.config.surgeon["vismem"], "separators", ordinary)
    answers = [
        runtime.generate(PROMPTS, 6, memory="always"),
        TorchGenerator(pair.model, pair.inputs).generate(PROMPTS, 6, memory="always"),
    ]
    assert [[call.token for call in answer.invocations] for batch in answers for answer in batch] == [[0]] * 6


def test_long_memory_of_a_decoder_whose_rotary_embedding_is_scaled(tmp_path: Path) -> None:
    """YaRN turns by other frequencies and multiplies cos and sin by a number of its own."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    recipe = (VISMEM[0], f"{VISMEM[1]},short_former=language")
    pair = make_pair(tmp_path, "internvl", recipe, torch.float32, text_type="llama", rope_parameters=rope)
    assert pair.model.model.language_model.rotary_emb.attention_scaling > 1.1
    check_forced(pair)
