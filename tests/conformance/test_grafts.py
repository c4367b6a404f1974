"""What every graft must do, whichever it is: nothing here names one.

A graft is found by the pass that inserts it, and inserted as its file in `tests/graft_cases` says.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

import passes
from checkpoints import has_tokenizer, tiny_checkpoint
from exporters.kernels.kernel import chains_of
from exporters.onnx import functions
from exporters.onnxruntime import BundleRuntime
from graft_case import graft_cases
from pairs import Pair, image, make_pair
from patching import apply, randomise_grafts
from surgeon import models
from surgeon.graft_pass import GraftPass
from surgeon.inputs import Inputs, Prompt
from surgeon.live import graft_parameters
from surgeon.memory.graft import Graft
from surgeon.memory.reference import INPUTS, argument_names, weight_names

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
KINDS = tuple(graft_cases())
every_graft = pytest.mark.parametrize("kind", KINDS)
SEEING, WORDS = Prompt("What is it?", (image(96, 64),)), Prompt("A star is a")


def test_every_graft_has_a_case() -> None:
    """A new graft is a pass, a module and a file in tests/graft_cases, all named by its kind."""
    kinds = {each.kind for each in passes.registry().values() if issubclass(each, GraftPass)}
    assert kinds == set(KINDS)


@pytest.fixture(scope="module")
def directories(shared: Callable[..., Path]) -> Callable[[str], tuple[Path, Path]]:
    """A plain checkpoint, and the same with a graft just inserted."""

    def make(kind: str, folder: Path) -> None:
        source = tiny_checkpoint(folder / "source", "qwen3_vl", num_hidden_layers=3)
        apply(source, folder / "patched", graft_cases()[kind].recipe)

    def get(kind: str) -> tuple[Path, Path]:
        folder = shared(f"graft {kind}", lambda path: make(kind, path))
        return folder / "source", folder / "patched"

    return get


def rows(directory: Path, *prompts: Prompt) -> dict[str, Any]:
    return Inputs.from_directory(directory).prepare(prompts or (SEEING, WORDS)).model_kwargs()


@torch.no_grad()
def logits(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    output: torch.Tensor = model(**kwargs).logits
    return output


@every_graft
def test_just_inserted_it_changes_nothing(directories: Callable[[str], tuple[Path, Path]], kind: str) -> None:
    source, patched = directories(kind)
    plain, grafted = models.load(source), models.load(patched)
    assert torch.equal(logits(grafted, rows(patched)), logits(plain, rows(source)))
    new = dict(grafted.named_parameters()).keys() - dict(plain.named_parameters()).keys()
    assert new == {name for name, _ in graft_parameters(grafted)} and all(f".{kind}." in name for name in new)
    # norms are one, gates and biases zero: noise in them is a mistake that no logit shows yet
    flat = {name: parameter for name, parameter in graft_parameters(grafted) if parameter.ndim == 1}
    assert all(float(parameter.std(correction=0)) == 0 for parameter in flat.values())


@every_graft
def test_just_inserted_its_gates_learn_and_then_all_of_it(
    directories: Callable[[str], tuple[Path, Path]], kind: str
) -> None:
    model: Any = models.load(directories(kind)[1])
    kwargs = rows(directories(kind)[1])
    grafts = [module for module in model.modules() if isinstance(module, Graft)]
    for opened in (False, True):
        if opened:
            randomise_grafts(model)
        model.zero_grad()
        model(**kwargs, labels=kwargs["input_ids"]).loss.backward()
        for graft in grafts:
            for name, parameter in graft.named_parameters():
                if opened or name in graft.gates:
                    assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (opened, name)


@every_graft
def test_trained_it_changes_rows_with_images_and_no_other(
    directories: Callable[[str], tuple[Path, Path]], kind: str
) -> None:
    source, patched = directories(kind)
    plain, grafted = models.load(source), models.load(patched)
    randomise_grafts(grafted)
    kwargs = rows(patched)
    before, after = logits(plain, kwargs), logits(grafted, kwargs)
    assert not torch.allclose(after[0], before[0], atol=1e-2)
    words = rows(patched, WORDS)
    assert torch.equal(logits(grafted, words), logits(plain, words))
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


@every_graft
def test_trained_it_decodes_as_in_one_forward(directories: Callable[[str], tuple[Path, Path]], kind: str) -> None:
    """Token by token from the cache, and the whole sequence at once."""
    patched = directories(kind)[1]
    model: Any = models.load(patched)
    randomise_grafts(model)
    kwargs = rows(patched, SEEING)
    generated = model.generate(
        **kwargs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids, length = generated.sequences, kwargs["input_ids"].shape[1]
    whole = {**kwargs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    added = torch.zeros(1, ids.shape[1] - length, dtype=torch.long)
    whole["mm_token_type_ids"] = torch.cat([kwargs["mm_token_type_ids"], added], 1)
    expected = logits(model, whole)[0, length - 1 : -1]
    torch.testing.assert_close(torch.cat(generated.logits), expected, rtol=0, atol=1e-4)


@every_graft
def test_saved_by_transformers_and_loaded_with_its_own_code_it_is_the_same(
    directories: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    model: Any = models.load(directories(kind)[1])
    randomise_grafts(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    kwargs = rows(directories(kind)[1])
    assert torch.equal(logits(again, kwargs), logits(model, kwargs))


@pytest.mark.parametrize("as_function", [True, False], ids=["as one function", "in standard operators"])
@every_graft
def test_a_bundle_computes_it(
    export: Callable[..., Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, as_function: bool
) -> None:
    """Whether it is one node of its own in the graph, or traced."""
    recipe = (graft_cases()[kind].recipe,)
    if as_function:
        if kind not in functions.registry():
            pytest.skip("it has no function: the other case is its only form")
        pair = export("qwen3_vl", recipe)
    else:
        others = {name: each for name, each in functions.registry().items() if name != kind}
        monkeypatch.setattr(functions, "registry", lambda: others)
        pair = make_pair(tmp_path, "qwen3_vl", recipe, torch.float32)
    calls = [node for node in pair.graph("decoder").node if node.domain == functions.DOMAIN]
    assert bool(calls) == as_function
    runtime = BundleRuntime(pair.bundle, threads=1)
    state, last = runtime.start(runtime.prepare((SEEING, WORDS)))
    step_logits = [last]
    while len(step_logits) < 8:
        step_logits.append(runtime.step(state, step_logits[-1].argmax(-1)))
    tokens, expected = pair.greedy(pair.inputs.prepare((SEEING, WORDS)), len(step_logits))
    np.testing.assert_allclose(np.stack(step_logits, axis=1), expected, atol=1e-4, rtol=0)
    assert np.stack(step_logits, axis=1).argmax(-1).tolist() == tokens.tolist()


@every_graft
def test_its_reference_implementation_is_what_it_computes(
    directories: Callable[[str], tuple[Path, Path]], kind: str
) -> None:
    """For a graft that has one: over tensors alone, with arguments by their names, its own and the call's."""
    model: Any = models.load(directories(kind)[1])
    randomise_grafts(model)
    graft = next(module for module in model.modules() if isinstance(module, Graft))
    assert (graft.reference is None) == (graft.memory_reference is None)
    if graft.reference is None or graft.memory_reference is None:
        assert chains_of(kind) is None and kind not in functions.registry()
        return
    rotary = None if graft.rope is None else graft.rope(torch.arange(5).expand(1, 2, 5))
    angles = {} if rotary is None else dict(zip(("cos", "sin"), rotary, strict=True))
    width = model.config.text_config.hidden_size
    embeds, hidden_states = torch.randn(2, 2, 5, width).unbind()
    mask, visual = (
        torch.arange(5) < torch.tensor([5, 0])[:, None],
        torch.tensor([[True, False, False, False, False]] * 2),
    )
    with torch.no_grad():
        keys, values = graft.project(embeds, rotary)
        arguments = {"visual_embeds": embeds, **angles, **weights(graft, graft.memory_reference)}
        for ours, expected in zip(call(graft, graft.memory_reference, arguments), (keys, values), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
        arguments = {
            "hidden_states": hidden_states, "keys": keys, "values": values, "memory_mask": mask,
            "visual_token_mask": visual, **angles, **weights(graft, graft.reference),
        }  # fmt: skip
        expected = graft.attend(hidden_states, keys, values, mask, visual, rotary)
        torch.testing.assert_close(call(graft, graft.reference, arguments), expected, rtol=0, atol=1e-6)


def weights(graft: Graft, reference: Any) -> dict[str, torch.Tensor]:
    """By the names of the graft's own parts, read here without its help."""
    parts = {name: getattr(graft, name) for name in weight_names(reference)}
    return {name: part if isinstance(part, torch.Tensor) else part.weight for name, part in parts.items()}


def call(graft: Any, reference: Any, arguments: dict[str, Any]) -> Any:
    named = {name: arguments[name] for name in argument_names(reference) if name in arguments}
    assert set(named) - set(INPUTS) == set(weight_names(reference))
    needed = [p.name for p in inspect.signature(reference).parameters.values() if p.default is p.empty]
    assert set(needed) <= {*named, "eps"}
    return reference(**named, eps=graft.eps)
