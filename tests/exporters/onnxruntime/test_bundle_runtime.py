"""A bundle computes what transformers computes from its checkpoint."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import QWEN_TYPES
from exporters.onnxruntime import BundleRuntime
from pairs import MAX_LENGTH, MIXIN, PLAIN, PVM, Pair, Row, image
from surgeon.errors import BundleError, InputError
from surgeon.inputs import ModelInputs, Prompt
from surgeon.memory.visibility import Visibility

Export = Callable[..., Pair]
STEPS = 64

PROMPTS = [
    Prompt("What is it?", (image(64, 96),)),
    Prompt("A star is a"),
    Prompt("Compare them.", (image(64, 64, 1), image(160, 96, 2), image(96, 128, 3))),
]
FIRST_AND_LAST: list[Row] = [
    [image(96, 64, 4), " is an image of"],
    ["This is an image:", image(64, 128, 5)],
    [image(64, 64, 6)],
]


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def decode(runtime: BundleRuntime, inputs: ModelInputs, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [B, steps] and logits [B, steps, V]."""
    state, last = runtime.start(inputs)
    logits = [last]
    while len(logits) < steps:
        logits.append(runtime.step(state, logits[-1].argmax(-1)))
    stacked = np.stack(logits, axis=1)
    return stacked.argmax(-1), stacked


FIRST_TURN: list[Row] = [["one", image(64, 96, 1), "two three"], ["nothing to see"], ["see", image(64, 64, 2)]]
SECOND_TURN: list[Row] = [["and", image(96, 96, 3)], ["still nothing here, now longer"], [image(64, 64, 4), "so"]]


@pytest.fixture
def pair(export: Export) -> Pair:
    return export("qwen3_vl")


@pytest.fixture
def runtime(pair: Pair) -> BundleRuntime:
    return BundleRuntime(pair.bundle, threads=1)


# -- equality with torch -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model_type", "recipe", "visibility"),
    [
        ("qwen3_vl", PVM, "causal"),
        ("qwen3_vl", PLAIN, "causal"),
        ("qwen3_vl", MIXIN + PVM, "all"),
        ("qwen2_5_vl", PVM, "all"),
        ("qwen2_5_vl", PLAIN, "all"),
        ("qwen2_5_vl", MIXIN + PVM, "causal"),
    ],
)
def test_logits_and_greedy_tokens_are_those_of_torch(
    export: Export, model_type: str, recipe: tuple[str, ...], visibility: Visibility
) -> None:
    pair = export(model_type, recipe, visibility=visibility)
    runtime = BundleRuntime(pair.bundle, threads=1)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[2:]):
        tokens, logits = decode(runtime, runtime.prepare(prompts), STEPS)
        expected_tokens, expected = pair.greedy(pair.inputs.prepare(prompts), STEPS)
        close(logits, expected)
        assert tokens.tolist() == expected_tokens.tolist()
    layers = runtime.manifest.sizes.num_hidden_layers
    assert runtime.decoder.rewrites["GroupedQueryAttention"] == layers
    assert runtime.vision.rewrites["PackedMultiHeadAttention"] == {"qwen3_vl": 3, "qwen2_5_vl": 1}[model_type]


@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_an_image_as_the_first_and_the_last_thing(export: Export, model_type: str) -> None:
    """Compared with one pass over prompt and answer: behind a prompt whose last token is an image's, transformers'
    `generate` continues each position axis from that token, and not as its own positions of the whole sequence do."""
    pair = export(model_type)
    runtime = BundleRuntime(pair.bundle, threads=1)
    inputs = pair.raw(FIRST_AND_LAST)
    tokens, logits = decode(runtime, inputs, 8)
    for row, length in enumerate(inputs.lengths):
        alone = pair.raw(FIRST_AND_LAST[row : row + 1])
        whole = dataclasses.replace(
            alone,
            input_ids=np.concatenate((alone.input_ids, tokens[row : row + 1]), axis=1),
            attention_mask=np.ones((1, length + 8), dtype=np.int64),
            mm_token_type_ids=np.pad(alone.mm_token_type_ids, ((0, 0), (0, 8))),
        )
        with torch.no_grad():
            expected = pair.model(**whole.model_kwargs()).logits.numpy()
        close(logits[row], expected[0, length - 1 : -1])


def test_the_grafts_are_seen(pair: Pair, runtime: BundleRuntime) -> None:
    """The bundles these tests compare would be worth little if the memory changed nothing."""
    inputs = runtime.prepare(PROMPTS[:1])
    state, logits = runtime.start(inputs)
    token = logits.argmax(-1)
    seen = runtime.step(state, token)
    state, _ = runtime.start(inputs)
    state.memory_mask[:] = False
    assert np.abs(runtime.step(state, token) - seen).max() > 0.1


@pytest.mark.parametrize("options", [{"fast_attention": False}, {"low_memory": True}], ids=str)
def test_options_change_no_numbers(pair: Pair, runtime: BundleRuntime, options: dict) -> None:
    _, expected = decode(runtime, runtime.prepare(PROMPTS), 8)
    _, logits = decode(BundleRuntime(pair.bundle, threads=1, **options), runtime.prepare(PROMPTS), 8)
    close(logits, expected)


def test_a_row_is_the_same_alone_and_in_a_batch(runtime: BundleRuntime) -> None:
    _, batch = decode(runtime, runtime.prepare(PROMPTS), 8)
    for row, prompt in enumerate(PROMPTS):
        _, alone = decode(runtime, runtime.prepare([prompt]), 8)
        np.testing.assert_allclose(batch[row], alone[0], atol=1e-5)


def test_padding_on_either_side(pair: Pair, runtime: BundleRuntime) -> None:
    right, left = pair.raw(FIRST_AND_LAST, "right"), pair.raw(FIRST_AND_LAST, "left")
    assert np.array_equal(runtime.start(right)[1], runtime.start(left)[1])


def test_logits_at_every_position(pair: Pair, runtime: BundleRuntime) -> None:
    inputs = runtime.prepare(PROMPTS)
    state, logits = runtime.start(inputs, logits="all")
    kwargs = pair.inputs.prepare(PROMPTS, padding_side="right").model_kwargs()
    with torch.no_grad():
        expected = pair.model(**kwargs).logits.numpy()
    for row, length in enumerate(inputs.lengths):
        close(logits[row, :length], expected[row, :length])
    assert state.lengths.tolist() == inputs.lengths.tolist()


def test_hidden_states(pair: Pair) -> None:
    names = ["hidden_states.1", "hidden_states.2"]
    runtime = BundleRuntime(pair.bundle, threads=1, extra_outputs=names)
    inputs = runtime.prepare(PROMPTS[:1])
    hidden_states: dict[str, torch.Tensor] = {}
    hooks = [
        pair.model.model.language_model.layers[i].register_forward_hook(
            lambda module, args, output, i=i: hidden_states.__setitem__(f"hidden_states.{i}", output)
        )
        for i in (1, 2)
    ]
    with torch.no_grad():
        pair.model(**inputs.model_kwargs())
    for hook in hooks:
        hook.remove()
    state, logits = runtime.start(inputs)
    assert list(state.extra) == names
    for name in names:
        close(state.extra[name], hidden_states[name].numpy())
    runtime.step(state, logits.argmax(-1))
    assert state.extra[names[0]].shape == (1, 1, 64)


def test_hidden_states_of_a_step_outlast_the_next(pair: Pair) -> None:
    runtime = BundleRuntime(pair.bundle, threads=1, extra_outputs=["hidden_states.1"])
    state, logits = runtime.start(runtime.prepare(PROMPTS[:1]))
    kept = []
    for _ in range(3):
        logits = runtime.step(state, logits.argmax(-1))
        kept.append((state.extra["hidden_states.1"], state.extra["hidden_states.1"].copy()))
    for hidden_states, at_once in kept:
        np.testing.assert_array_equal(hidden_states, at_once)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 0.1), (torch.bfloat16, 1.0)], ids=str)
def test_half_precision_is_close(export: Export, dtype: torch.dtype, atol: float) -> None:
    """Logits are spread over a dozen units, and rounding is 2^-11 and 2^-8 of each value, layer after layer."""
    pair = export("qwen3_vl", MIXIN + PVM, dtype)
    runtime = BundleRuntime(pair.bundle, threads=1)
    expected_tokens, expected = pair.greedy(pair.inputs.prepare(PROMPTS), 16)
    state, last = runtime.start(runtime.prepare(PROMPTS))
    logits = [last] + [runtime.step(state, expected_tokens[:, i]) for i in range(15)]
    stacked = np.stack(logits, axis=1)
    assert stacked.dtype == np.float32 and 0 < np.abs(stacked - expected).max() < atol
    cosine = (stacked * expected).sum(-1) / np.linalg.norm(stacked, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.998
    assert next(iter(state.caches.values())).dtype == (torch.float16 if dtype == torch.float16 else torch.float32)


def test_bfloat16_rounds_as_torch_does(export: Export) -> None:
    """As far from fp32 as the same model in torch's bf16, not nearer: the rounding is there."""
    pair = export("qwen3_vl", MIXIN + PVM, torch.bfloat16)
    runtime = BundleRuntime(pair.bundle, threads=1)
    inputs = runtime.prepare(PROMPTS[:1])
    _, bundle_logits = runtime.start(inputs, logits="all")
    with torch.no_grad():
        exact = pair.model(**inputs.model_kwargs()).logits.numpy()
        rounded_model = pair.model.to(torch.bfloat16)
        rounded = rounded_model(**inputs.model_kwargs(torch.bfloat16)).logits.float().numpy()
        pair.__dict__.pop("model")  # its weights are rounded now
    ours, theirs = (float(np.sqrt(np.mean((logits - exact) ** 2))) for logits in (bundle_logits, rounded))
    assert 0.5 < ours / theirs < 2


# -- requests ----------------------------------------------------------------------------------------------------
def count_calls(runtime: BundleRuntime, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    calls = {"vision": 0, "memory": 0}
    for name in calls:
        session = getattr(runtime, name)
        run = session.run

        def counted(feeds: dict, name: str = name, run: Callable = run) -> dict:
            calls[name] += 1
            return run(feeds)

        monkeypatch.setattr(session, "run", counted)
    return calls


def test_memory_is_computed_once_when_images_enter(
    pair: Pair, runtime: BundleRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(runtime, monkeypatch)
    decode(runtime, runtime.prepare(PROMPTS), 5)
    assert calls == {"vision": 4, "memory": 1}
    state, _ = runtime.start(pair.raw(FIRST_TURN))
    runtime.append(state, pair.raw(SECOND_TURN))
    assert calls == {"vision": 8, "memory": 3}
    runtime.append(state, pair.raw([["no"], ["new"], ["image"]]))
    decode(runtime, runtime.prepare(PROMPTS[1:2]), 3)
    assert calls == {"vision": 8, "memory": 3}


def test_requests_do_not_disturb_each_other(pair: Pair, runtime: BundleRuntime) -> None:
    batches = [runtime.prepare(PROMPTS), pair.raw(FIRST_AND_LAST[:2]), runtime.prepare(PROMPTS[1:2])]
    alone = [decode(runtime, batch, 6)[1] for batch in batches]
    started = [runtime.start(batch) for batch in batches]
    together = [[logits] for _, logits in started]
    for _ in range(5):
        for (state, _), logits in zip(started, together, strict=True):
            logits.append(runtime.step(state, logits[-1].argmax(-1)))
    for logits, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(np.stack(logits, axis=1), expected)


@pytest.mark.parametrize(
    ("model_type", "recipe", "visibility"),
    [
        ("qwen3_vl", PVM, "all"),
        ("qwen3_vl", PLAIN, "all"),
        ("qwen3_vl", MIXIN, "causal"),
        ("qwen2_5_vl", PVM, "causal"),
        ("qwen2_5_vl", PLAIN, "causal"),
        ("qwen2_5_vl", MIXIN, "all"),
    ],
)
def test_a_later_turn_with_new_images(
    export: Export, model_type: str, recipe: tuple[str, ...], visibility: Visibility
) -> None:
    """Turn by turn through transformers' own cache, row by row: positions continue, the memory grows."""
    pair = export(model_type, recipe, visibility=visibility)
    runtime = BundleRuntime(pair.bundle, threads=1)
    state, logits = runtime.start(pair.raw(FIRST_TURN))
    answer = logits.argmax(-1)
    runtime.step(state, answer)
    turn_logits = runtime.append(state, pair.raw(SECOND_TURN), logits="all")
    after = runtime.step(state, answer)
    for row in range(3):
        first, second = (pair.raw(turn[row : row + 1]) for turn in (FIRST_TURN, SECOND_TURN))
        begin = next_position(pair, first)
        end = begin + 1 + next_position(pair, second)
        positions, _ = runtime.family.position_ids(
            runtime.config, second.input_ids, second.attention_mask, second.grids
        )
        kwargs = second.model_kwargs()
        del kwargs["attention_mask"]
        token = torch.tensor([[answer[row]]])
        with torch.no_grad():
            cache = pair.model(**first.model_kwargs(), use_cache=True).past_key_values
            pair.model(input_ids=token, position_ids=torch.full((3, 1, 1), begin), past_key_values=cache)
            expected = pair.model(
                **kwargs, position_ids=torch.from_numpy(positions + begin + 1), past_key_values=cache
            ).logits.numpy()
            last = pair.model(input_ids=token, position_ids=torch.full((3, 1, 1), end), past_key_values=cache).logits
        length = expected.shape[1]
        close(turn_logits[row, :length], expected[0])
        close(after[row], last[0, 0].numpy())
        assert state.lengths[row] == first.lengths[0] + length + 2
        assert state.next_positions[row] == end + 1


def next_position(pair: Pair, inputs: ModelInputs) -> int:
    config, family = pair.inputs.config, inputs.family
    _, next_positions = family.position_ids(config, inputs.input_ids, inputs.attention_mask, inputs.grids)
    return int(next_positions[0])


def test_rows_that_do_not_go_on_are_not_touched(pair: Pair, runtime: BundleRuntime) -> None:
    inputs = pair.raw(FIRST_AND_LAST)
    state, logits = runtime.start(inputs)
    tokens = logits.argmax(-1)
    for _ in range(3):
        runtime.step(state, tokens, np.array([True, False, True]))
    assert (state.lengths - inputs.lengths).tolist() == [3, 0, 3]
    waited = runtime.step(state, tokens, np.array([False, True, False]))[1]
    other, _ = runtime.start(inputs)
    np.testing.assert_allclose(waited, runtime.step(other, tokens)[1], atol=1e-5)


# -- limits ------------------------------------------------------------------------------------------------------
def test_a_row_may_fill_the_cache_beside_others(pair: Pair, runtime: BundleRuntime) -> None:
    """Padding that would not fit behind the long row must not be written, nor move what is there."""
    long = "word " * MAX_LENGTH
    token = pair.inputs.tokenize(long, [])
    room = MAX_LENGTH - 3

    def row(ids: list[int]) -> ModelInputs:
        array = np.array([ids])
        return ModelInputs(runtime.family, array, np.ones_like(array), np.zeros_like(array), [[]], [[]])

    def rows(*ids: list[int]) -> ModelInputs:
        parts = [row(i) for i in ids]
        length = max(map(len, ids))
        stack = [np.pad(p.input_ids[0], (0, length - p.input_ids.shape[1])) for p in parts]
        mask = [np.arange(length) < len(i) for i in ids]
        return ModelInputs(
            runtime.family,
            np.stack(stack),
            np.stack(mask).astype(np.int64),
            np.zeros((2, length), int),
            [[], []],
            [[], []],
        )

    state, _ = runtime.start(rows(token[:room], token[:4]))
    logits = runtime.append(state, rows(token[3:6], token[:40]))
    alone_state, _ = runtime.start(row(token[:room]))
    np.testing.assert_allclose(logits[0], runtime.append(alone_state, row(token[3:6]))[0], atol=1e-5)
    assert state.lengths.tolist() == [MAX_LENGTH, 44]
    other, _ = runtime.start(row(token[:4]))
    runtime.append(other, row(token[:40]))
    # a full row beside one that goes on
    going = runtime.step(state, np.array([1, token[9]]), np.array([False, True]))
    np.testing.assert_allclose(going[1], runtime.step(other, np.array([token[9]]))[0], atol=1e-5)
    with pytest.raises(BundleError, match=f"maximum of {MAX_LENGTH} tokens"):
        runtime.step(state, np.array([1, 1]))
    with pytest.raises(BundleError, match=f"row 0 has {MAX_LENGTH + 1} tokens.*exported for {MAX_LENGTH}"):
        runtime.append(state, rows([1], [1]))


def test_a_prompt_that_is_too_long(runtime: BundleRuntime) -> None:
    with pytest.raises(BundleError, match=rf"row 1 has \d+ tokens, the bundle was exported for {MAX_LENGTH}"):
        runtime.start(runtime.prepare([Prompt("short"), Prompt("word " * MAX_LENGTH)]))


def test_another_number_of_rows(pair: Pair, runtime: BundleRuntime) -> None:
    state, _ = runtime.start(pair.raw(FIRST_TURN))
    with pytest.raises(BundleError, match=r"has 3 row\(s\), and append got 2"):
        runtime.append(state, pair.raw(SECOND_TURN[:2]))


def test_tokens_of_no_embedding_are_refused(pair: Pair, runtime: BundleRuntime) -> None:
    """ONNX counts negative ids from the end of the vocabulary."""
    inputs = pair.raw(FIRST_TURN)
    state, logits = runtime.start(inputs)
    tokens = logits.argmax(-1)
    vocab = runtime.manifest.sizes.vocab_size
    for wrong in (-1, vocab):
        with pytest.raises(InputError, match=f"token {wrong} is not in the model's vocabulary of {vocab}"):
            runtime.step(state, np.array([*tokens[:-1], wrong]))
    for shape in ((len(tokens), 1), (1,)):
        with pytest.raises(InputError, match=rf"one token a row, \[{len(tokens)}\]; tokens are \[{shape[0]}"):
            runtime.step(state, np.zeros(shape, dtype=np.int64))
    # of a row that does not go on, the token means nothing
    going = runtime.step(state, np.array([*tokens[:-1], -1]), np.arange(len(tokens)) < len(tokens) - 1)
    other, _ = runtime.start(inputs)
    np.testing.assert_array_equal(going[:-1], runtime.step(other, tokens)[:-1])
    inputs.input_ids[0, -1] = vocab
    with pytest.raises(InputError, match=f"token {vocab} "):
        runtime.start(inputs)


# -- what cannot be ----------------------------------------------------------------------------------------------
def test_an_unknown_extra_output(pair: Pair) -> None:
    runtime = BundleRuntime(pair.bundle, extra_outputs=["hidden_state.1"])
    with pytest.raises(BundleError, match=r"no value named 'hidden_state.1'; the nearest are hidden_states\.1"):
        runtime.start(runtime.prepare(PROMPTS[1:2]))


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        BundleRuntime(tmp_path)


def test_a_bundle_without_its_config(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "processor" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"config\.json cannot be read"):
        BundleRuntime(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sizes.num_hidden_layers", 9),
        ("sizes.hidden_size", 128),
        ("sizes.vocab_size", 100),
        ("tokens.image", 7),
        ("visibility", "all"),
        ("source.grafts", []),
        ("positions", {"scheme": "rope_dhr", "tile_order": "row"}),
        ("allocation", "memory"),
    ],
)
def test_a_manifest_of_another_model_than_its_config(pair: Pair, tmp_path: Path, key: str, value: object) -> None:
    bundle = Path(shutil.copytree(pair.bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    *path, last = key.split(".")
    reduce(dict.__getitem__, path, manifest)[last] = value
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=rf"bundle.json says that {key} is .*damaged, export it again"):
        BundleRuntime(bundle)


def test_rows_that_are_exchanged_between_steps_keep_their_cache_and_memory(runtime: BundleRuntime) -> None:
    """What was bound for the steps before is another's then."""
    inputs = runtime.prepare(PROMPTS)
    state, logits = runtime.start(inputs)
    token = logits.argmax(-1)
    logits = runtime.step(state, token)
    expected = runtime.step(state, logits.argmax(-1))

    state, _ = runtime.start(inputs)
    logits = runtime.step(state, token)
    order = list(range(len(token)))[::-1]
    exchanged = dataclasses.replace(
        state,
        lengths=state.lengths[order],
        next_positions=state.next_positions[order],
        caches={name: tensor[order] for name, tensor in state.caches.items()},
        memory={name: tensor[order] for name, tensor in state.memory.items()},
        memory_mask=state.memory_mask[order],
        memory_places=state.memory_places[order],
    )
    np.testing.assert_allclose(runtime.step(exchanged, logits.argmax(-1)[order]), expected[order], atol=1e-5)
