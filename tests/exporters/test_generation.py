"""One way to generate and one to stream, whatever form a model has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image

from checkpoints import has_tokenizer, tiny_checkpoint, tiny_model
from exporters.generation import generate, open_generator, stream
from exporters.onnxruntime import BundleRuntime
from pairs import Pair
from passes.pvm import PVM
from passes.rope_dhr import RopeDHR
from patching import apply
from surgeon import models
from surgeon.errors import BundleError, InputError, OptionError
from surgeon.generation import Sampling
from surgeon.inputs import Prompt
from surgeon.live import graft
from surgeon.torch_generate import TorchGenerator

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")
CHART = Path(models.__file__).parent / "parity" / "data" / "chart.png"
ASKED: dict[str, Any] = {"prompt": "What is this?", "images": [CHART], "max_new_tokens": 10}
SAMPLING = Sampling(temperature=0.8, top_k=50, seed=4)


@pytest.fixture(scope="module")
def pair(export: Callable[..., Pair]) -> Pair:
    return export("qwen3_vl")


@pytest.mark.parametrize("form", ["bundle", "runtime", "model"])
def test_every_form_answers_as_the_checkpoint(form: str, pair: Pair) -> None:
    forms: dict[str, Callable[[], Any]] = {
        "bundle": lambda: pair.bundle,
        "runtime": lambda: BundleRuntime(pair.bundle),
        "model": lambda: models.load(pair.checkpoint),
    }
    model = forms[form]()
    for options in (ASKED, ASKED | {"sampling": SAMPLING}, ASKED | {"system": "Be brief."}):
        expected = generate(pair.checkpoint, **options)
        assert len(expected.token_ids) == 10 and expected.finish_reason == "length"
        assert generate(model, **options) == expected
        pieces = list(stream(model, **options))
        assert "".join(pieces) == expected.text and len(pieces) > 1


def test_a_batch_of_a_checkpoint_is_answered_as_each_alone(pair: Pair) -> None:
    prompts = [Prompt("What is this?", (CHART,)), Prompt("Hi"), Prompt("Compare them.", (CHART, CHART))]
    pieces: list[tuple[int, str]] = []
    generator = open_generator(pair.checkpoint)
    together = generator.generate(prompts, 8, on_text=lambda row, text: pieces.append((row, text)))
    assert together == [generator.generate([prompt], 8)[0] for prompt in prompts]
    for row, each in enumerate(together):
        assert "".join(text for of, text in pieces if of == row) == each.text
    assert generator.generate(prompts, 0) == [type(together[0])("", [], "length")] * 3


def test_a_model_in_memory_keeps_its_settings(pair: Pair) -> None:
    model = models.load(pair.checkpoint)
    model.generation_config.temperature = 3.0
    before = model.generation_config
    generate(model, **ASKED)
    assert model.generation_config is before and before.temperature == 3.0
    with pytest.raises(InputError):
        generate(model, "What?", ["no.png"])
    assert model.generation_config is before


def test_what_would_be_asked_otherwise_than_it_seems_is_refused(pair: Pair) -> None:
    model = models.load(pair.checkpoint)
    alone = generate(model, "What is this?", Image.open(CHART), max_new_tokens=3)
    assert alone == generate(model, "What is this?", [CHART], max_new_tokens=3)
    with pytest.raises(OptionError, match="provider cuda is for bundles; .* is a checkpoint"):
        generate(pair.checkpoint, **ASKED, provider="cuda")
    for path in (pair.checkpoint, pair.bundle):
        with pytest.raises(InputError, match="the prompt is not valid Unicode"):
            generate(path, "what\udcff")
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(OptionError, match=r"gradient checkpointing.*call model.eval\(\) first"):
        generate(model, **ASKED)
    assert generate(model.eval(), **ASKED) == generate(pair.checkpoint, **ASKED)


def test_a_model_that_was_grafted_into_is_asked_as_it_is_now(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "internvl", num_hidden_layers=2)
    model = graft(source, PVM(layers=[1], latent=32), RopeDHR())
    apply(source, tmp_path / "patched", "pvm:layers=1,latent=32", "rope-dhr")
    for positions in ("dhr", "plain"):
        asked = ASKED | {"positions": positions}
        assert generate(model, **asked) == generate(tmp_path / "patched", **asked)


def test_what_cannot_generate_is_refused(pair: Pair) -> None:
    model = models.load(pair.checkpoint)
    assert generate(model, "What?", CHART, max_new_tokens=2) == generate(model, "What?", [CHART], max_new_tokens=2)
    with pytest.raises(OptionError, match="max_new_tokens is -1"):
        generate(model, "What?", max_new_tokens=-1)
    for wrong in (get_peft_model(model, LoraConfig(target_modules=["q_proj"])), 3):
        with pytest.raises(OptionError, match="cannot generate with a"):
            generate(wrong, "What?")
    with pytest.raises(OptionError, match="names no directory"):
        generate(tiny_model("qwen3_vl"), "What?")


def test_a_stream_ends_with_its_listener_and_raises_where_it_fails(pair: Pair) -> None:
    steps = 0

    class Counted(TorchGenerator):
        def generate(self, prompts: Any, max_new_tokens: int, sampling: Any, on_text: Any, positions: Any) -> Any:
            def count(row: int, text: str) -> None:
                nonlocal steps
                steps += 1
                on_text(row, text)

            return super().generate(prompts, max_new_tokens, sampling, count, positions)

    listening = stream(Counted(pair.checkpoint), "Hi", max_new_tokens=400)
    assert next(listening)
    listening.close()  # type: ignore[attr-defined]
    assert steps < 100
    with pytest.raises(InputError, match="does not exist"):
        next(stream(pair.bundle, "Hi", ["no.png"]))


def test_a_bundle_is_computed_by_the_provider_that_is_named(pair: Pair) -> None:
    with pytest.raises(BundleError, match="unknown provider 'rocm'"):
        generate(pair.bundle, "What?", provider="rocm")  # type: ignore[arg-type]
