"""A patched model where libraries put models: on several devices, on the disk, in a pickle, in eight bits."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
    Qwen3VLConfig,
)

from checkpoints import QWEN_TYPES, tiny_model
from command import ROOT
from patching import apply, batch, image, randomise_grafts
from surgeon import models
from surgeon.memory.graft import Graft
from surgeon.memory.patched import patched_config_class

GRID = (1, 4, 6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched Qwen3-VL whose grafts are as if trained."""
    directory = tmp_path_factory.mktemp("elsewhere")
    tiny_model("qwen3_vl").save_pretrained(directory / "a")
    apply(directory / "a", directory / "b", "mixin:layers=2", "pvm:layers=1,3,latent=32")
    model = models.load(directory / "b")
    randomise_grafts(model)
    model.save_pretrained(directory / "trained")
    return directory / "trained"


@pytest.fixture
def model(checkpoint: Path) -> PreTrainedModel:
    return models.load(checkpoint)


def kwargs_for(model: PreTrainedModel) -> dict[str, Tensor]:
    return batch(model, [[5, 6, *image(GRID), 7, 8], [9, 10]], [GRID])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**kwargs_for(model)).logits


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_it_computes_the_same(checkpoint: Path, model: PreTrainedModel, tmp_path: Path, where: str) -> None:
    """Weights are fetched as each module is called, and are nowhere else."""
    limits = {"cpu": "200KB" if where == "disk" else "1GB"}
    options: dict[str, Any] = {"device_map": "auto", "max_memory": limits, "offload_folder": str(tmp_path)}
    if where == "cpu":
        from accelerate import cpu_offload

        dispatched = cpu_offload(models.load(checkpoint), execution_device=torch.device("cpu"))
        assert next(dispatched.model.language_model.layers[1].pvm.q_proj.parameters()).device.type == "meta"
    else:
        dispatched = models.load(checkpoint, **options)
        assert "disk" in dispatched.hf_device_map.values()
        split = [
            name for name in dispatched.hf_device_map if ".layers." in name and name.split(".layers.")[1].count(".")
        ]
        assert not split  # no layer is torn apart
    assert torch.equal(logits(dispatched), logits(model))
    kwargs = kwargs_for(model)
    with torch.no_grad():
        tokens = [each.generate(**kwargs, max_new_tokens=5, do_sample=False) for each in (dispatched, model)]
    assert torch.equal(*tokens)


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_the_model(model: PreTrainedModel, copied: Callable[[Any], Any]) -> None:
    other = copied(model)
    assert type(other) is type(model)
    assert all(type(a) is type(b) for a, b in zip(other.modules(), model.modules(), strict=True))
    assert torch.equal(logits(other), logits(model))
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()
    with torch.no_grad():
        other.model.language_model.layers[1].pvm.alpha.zero_()
    assert not torch.equal(logits(other), logits(model))


def test_a_pickle_is_read_by_another_process(model: PreTrainedModel, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "model.pt")
    torch.save(kwargs_for(model), tmp_path / "inputs.pt")
    code = (
        "import sys, torch; model, kwargs = (torch.load(f, weights_only=False) for f in sys.argv[1:3]);"
        "torch.save(model(**kwargs).logits.detach(), sys.argv[3])"
    )
    files = [str(tmp_path / name) for name in ("model.pt", "inputs.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=ROOT, timeout=120)
    torch.testing.assert_close(torch.load(files[2]), logits(model), atol=1e-5, rtol=1e-5)


def quantised_dynamically(model: PreTrainedModel) -> Any:
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def quantised_by_torchao(model: PreTrainedModel) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    return quantised


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("quantised", [quantised_dynamically, quantised_by_torchao])
def test_eight_bits(model: PreTrainedModel, quantised: Callable[[PreTrainedModel], Any]) -> None:
    """Against the same model with each weight rounded to what the eight bits hold, which those libraries tell."""
    small = quantised(model)
    grafted = [module for module in small.modules() if isinstance(module, Graft)]
    linears = [child for graft in grafted for name, child in graft.named_children() if name.endswith("_proj")]
    plain = [child for child in linears if type(child) is torch.nn.Linear and type(child.weight) is torch.nn.Parameter]
    assert linears and not plain  # it reached the grafts
    whole, rounded = logits(model), logits(small)
    assert 0 < float((rounded - whole).abs().max()) < 0.1 * float(whole.abs().max())
    for graft in grafted:
        graft.get_parameter(graft.gates[0]).data.zero_()
    without = logits(small)
    assert float((without - rounded).abs().max()) > 1e-2  # the grafts count


def test_hidden_states_and_attentions_are_the_bases(checkpoint: Path) -> None:
    source, patched = models.load(checkpoint.parent / "a"), models.load(checkpoint.parent / "b")
    for model in (source, patched):
        model.set_attn_implementation("eager")
    kwargs = kwargs_for(source)
    with torch.no_grad():
        want, have = (m(**kwargs, output_hidden_states=True, output_attentions=True) for m in (source, patched))
        base = patched.model(**kwargs, output_hidden_states=True)
    layers = source.config.text_config.num_hidden_layers
    assert len(want.hidden_states) == layers + 1 and len(want.attentions) == layers
    for name in ("hidden_states", "attentions"):
        own, others = getattr(have, name), getattr(want, name)
        assert len(own) == len(others) and all(torch.equal(a, b) for a, b in zip(own, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base.hidden_states, want.hidden_states, strict=True))


@pytest.mark.parametrize("model_type", QWEN_TYPES)
def test_auto_classes_give_the_patched_model_with_and_without_its_head(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "a")
    apply(tmp_path / "a", tmp_path / "b", "pvm:layers=1,3,latent=32")
    model = models.load(tmp_path / "b")
    randomise_grafts(model)
    model.save_pretrained(tmp_path / "c")
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        whole = auto_class.from_pretrained(tmp_path / "c", trust_remote_code=True)
        assert torch.equal(logits(whole), logits(model))
    base, loading = AutoModel.from_pretrained(tmp_path / "c", trust_remote_code=True, output_loading_info=True)
    assert not loading["missing_keys"] and not hasattr(base, "lm_head")
    kwargs = kwargs_for(model)
    with torch.no_grad():
        assert torch.equal(base(**kwargs).last_hidden_state, model.model(**kwargs).last_hidden_state)
    base.save_pretrained(tmp_path / "d")
    again = AutoModel.from_pretrained(tmp_path / "d", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**kwargs).last_hidden_state, base(**kwargs).last_hidden_state)


def test_the_base_model_takes_its_arguments_in_order(model: PreTrainedModel) -> None:
    """As TRL and others call it."""
    kwargs = kwargs_for(model)
    with torch.no_grad():
        expected = model.model(**kwargs).last_hidden_state
        ids, mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
        assert torch.equal(model.model(ids, mask, **kwargs).last_hidden_state, expected)
        assert torch.equal(model(ids, mask, **kwargs).logits, model.lm_head(expected))
        (tuple_first, *_) = model.model(ids, mask, return_dict=False, **kwargs)
        assert torch.equal(tuple_first, expected)


class TheirConfig(patched_config_class(Qwen3VLConfig)):  # type: ignore[misc]
    """As a user would derive one."""


def test_a_class_that_somebody_derived_is_pickled_as_theirs() -> None:
    again = pickle.loads(pickle.dumps(TheirConfig()))
    assert type(again) is TheirConfig
