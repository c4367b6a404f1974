"""What users of transformers rely on of any model, for every family, patched: the part of transformers' own common
tests of models and of generation that a graft could break. Grafts are as if trained."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from checkpoints import FAMILIES, has_tokenizer, tiny_checkpoint
from patching import apply, randomise_grafts
from surgeon import models
from surgeon.inputs import Inputs, Prompt
from surgeon.memory.graft import Graft

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")


def image(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


SEEING, WORDS = Prompt("What is it?", (image(90, 42, 0),)), Prompt("hello there")


class Case(NamedTuple):
    path: Path
    source: Path
    model: PreTrainedModel
    inputs: Inputs

    def kwargs(self, *prompts: Prompt, side: Any = "left") -> dict[str, Any]:
        return self.inputs.prepare(prompts or (SEEING, WORDS), side).model_kwargs()

    def generate(self, *prompts: Prompt, **options: Any) -> list[list[int]]:
        kwargs = self.kwargs(*prompts)
        with torch.no_grad():
            tokens = self.model.generate(**kwargs, max_new_tokens=6, min_new_tokens=6, **options)
        return tokens[:, kwargs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    source = tiny_checkpoint(directory / "source", request.param)
    apply(source, directory / "fresh", "mixin:layers=2", "pvm:layers=1,3,latent=32")
    model = models.load(directory / "fresh")
    randomise_grafts(model)
    model.save_pretrained(directory / "patched")
    for file in source.iterdir():
        if not (directory / "patched" / file.name).exists() and file.suffix != ".safetensors":
            (directory / "patched" / file.name).write_bytes(file.read_bytes())
    return Case(directory / "patched", source, model, Inputs.from_directory(source))


@pytest.fixture
def model(case: Case) -> PreTrainedModel:
    """One that a test may change."""
    return models.load(case.path)


@torch.no_grad()
def logits(model: Any, kwargs: dict[str, Any]) -> Tensor:
    return model(**kwargs).logits


def test_the_same_twice(case: Case) -> None:
    kwargs = case.kwargs()
    assert torch.equal(logits(case.model, kwargs), logits(case.model, kwargs))
    assert case.generate(do_sample=False) == case.generate(do_sample=False)


def test_loaded_with_its_own_code_it_is_the_same(case: Case) -> None:
    own, loading = AutoModelForImageTextToText.from_pretrained(
        case.path, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert torch.equal(logits(own, case.kwargs()), logits(case.model, case.kwargs()))


def test_hidden_states_and_attentions(case: Case, model: PreTrainedModel) -> None:
    """As many as the base gives, of its shapes, and with gradients."""
    model.set_attn_implementation("eager")
    kwargs = case.kwargs()
    outputs = model(**kwargs, output_hidden_states=True, output_attentions=True, use_cache=False)
    text = model.config.get_text_config()
    (rows, length), layers = kwargs["input_ids"].shape, text.num_hidden_layers
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(rows, length, text.hidden_size)] * (layers + 1)
    heads = (rows, text.num_attention_heads, length, length)
    assert [tuple(a.shape) for a in outputs.attentions] == [heads] * layers
    outputs.hidden_states[1].retain_grad()
    outputs.logits.sum().backward()
    assert outputs.hidden_states[1].grad is not None and bool(outputs.hidden_states[1].grad.any())
    present = kwargs["attention_mask"].bool()
    expected = logits(case.model, kwargs)[present]
    torch.testing.assert_close(outputs.logits.detach()[present], expected, atol=1e-4, rtol=1e-4)


def test_padding_on_either_side_and_rows_together_change_nothing(case: Case) -> None:
    alone = [logits(case.model, case.kwargs(prompt))[0] for prompt in (SEEING, WORDS)]
    # a forward of some families numbers padding too, which `generate` does not: on the left the longest row alone
    for side, rows in (("left", 1), ("right", 2)):
        kwargs = case.kwargs(side=side)
        together = logits(case.model, kwargs)
        for row in range(rows):
            own = kwargs["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][own], alone[row], atol=2e-5, rtol=1e-4)
    assert case.generate(do_sample=False) == [case.generate(p, do_sample=False)[0] for p in (SEEING, WORDS)]


def test_logits_of_the_last_tokens_alone(case: Case) -> None:
    kwargs = case.kwargs()
    with torch.no_grad():
        last = case.model(**kwargs, logits_to_keep=2).logits
    torch.testing.assert_close(last, logits(case.model, kwargs)[:, -2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"return_dict_in_generate": False, "num_beams": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_greedy_tokens(case: Case, options: dict[str, Any]) -> None:
    expected = case.generate(SEEING, do_sample=False)
    assert case.generate(SEEING, do_sample=False, **options) == expected


def test_a_smaller_model_drafts(case: Case) -> None:
    """Assisted decoding, which crops what drafts left in the cache; the assistant is the model with closed gates."""
    assistant = models.load(case.path)
    for module in assistant.modules():
        if isinstance(module, Graft):
            for gate in module.gates:
                module.get_parameter(gate).data.zero_()
    expected = case.generate(SEEING, do_sample=False)
    assert case.generate(SEEING, do_sample=False, assistant_model=assistant) == expected


def test_sampling_is_reproducible_and_follows_its_rows(case: Case) -> None:
    def sampled() -> list[list[int]]:
        torch.manual_seed(0)
        return case.generate(do_sample=True, num_return_sequences=2)

    assert sampled() == sampled() and len(sampled()) == 4


def test_beams_of_a_batch_are_those_of_each_row(case: Case) -> None:
    together = case.generate(do_sample=False, num_beams=3)
    assert together[0] == case.generate(SEEING, do_sample=False, num_beams=3)[0]


def test_scores_and_lengths_are_what_was_asked_for(case: Case) -> None:
    kwargs = case.kwargs()
    with torch.no_grad():
        result = case.model.generate(
            **kwargs,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    assert len(result.logits) == 3 and len(result.hidden_states) == 3
    assert result.past_key_values.get_seq_length() == kwargs["input_ids"].shape[1] + 2


def test_embeddings_can_be_resized(case: Case, model: PreTrainedModel) -> None:
    kwargs = case.kwargs()
    before, size = logits(model, kwargs), model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size + 8)
    after = logits(model, kwargs)
    assert after.shape[-1] == size + 8
    torch.testing.assert_close(after[..., :size], before, atol=1e-5, rtol=1e-5)


def test_each_attention_agrees(case: Case, model: PreTrainedModel) -> None:
    kwargs = case.kwargs()
    outputs = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs.append(logits(model, kwargs))
    present = kwargs["attention_mask"].bool()
    torch.testing.assert_close(outputs[0][present], outputs[1][present], atol=1e-4, rtol=1e-4)


def test_it_learns(case: Case, model: PreTrainedModel) -> None:
    """Everything trains, with and without recomputing the layers: the same gradients, and a loss that falls."""
    kwargs = case.kwargs(SEEING)
    labels = kwargs["input_ids"].clone()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**kwargs, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    assert {name for name, _ in model.named_parameters() if ".pvm." in name or ".mixin." in name} <= set(plain)
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    assert recomputed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-5, rtol=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**kwargs, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_model_made_of_its_config_has_values_everywhere(case: Case) -> None:
    """As `from_config` makes it, and as missing weights would be filled: gates closed, nothing left as it was."""
    fresh_model = type(case.model)._from_config(case.model.config)
    for name, parameter in fresh_model.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name
    for module in fresh_model.modules():
        if isinstance(module, Graft):
            assert all(not bool(module.get_parameter(gate).any()) for gate in module.gates)
            assert all(bool(p.any()) for name, p in module.named_parameters() if name not in module.gates)
