"""Grafting into a model in memory gives the model that patching its checkpoint gives."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from checkpoints import QWEN_TYPES, tiny_model
from passes.mixin import Mixin
from passes.pvm import PVM
from patching import apply, batch, image
from surgeon import models
from surgeon.errors import OptionError
from surgeon.live import graft, graft_parameters, unfreeze_grafts
from surgeon.pipeline import PreconditionError

GRID = (1, 4, 6)
PASSES = ("pvm:layers=1,latent=32", "mixin:layers=0")


def passes() -> tuple[object, object]:
    return PVM(layers=[1], latent=32), Mixin(layers=[0])


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**batch(model, [[5, 6, *image(GRID), 7, 8, 9]], [GRID])).logits


def open_all(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, parameter in graft_parameters(model):
            if name.endswith(("alpha", "gate")):
                parameter.fill_(0.7)


@pytest.fixture(params=QWEN_TYPES)
def plain(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param).eval()


def test_it_is_the_patched_checkpoint_over_the_same_tensors(plain: PreTrainedModel, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path / "source")
    apply(tmp_path / "source", tmp_path / "patched", *PASSES, seed=3)
    expected = models.load(tmp_path / "patched")
    before, parameters, state = logits(plain), dict(plain.named_parameters()), torch.get_rng_state()

    model = graft(plain, *passes(), seed=3)
    assert model is plain and torch.equal(torch.get_rng_state(), state)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters() if name in parameters)
    assert torch.equal(logits(model), before)
    record = {key: value for key, value in expected.config.surgeon.items() if key != "source"}  # which is no file
    assert model.config.surgeon == record and model.config.model_type == expected.config.model_type
    tensors = expected.state_dict()
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert type(model).__mro__ == type(expected).__mro__ and not model.training

    open_all(model), open_all(expected)
    assert torch.equal(logits(model), logits(expected)) and not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "saved")
    for again in (models.load(tmp_path / "saved"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(again), logits(model))


def test_grafts_alone_are_unfrozen_and_train(plain: PreTrainedModel) -> None:
    with pytest.raises(OptionError, match="no grafts to train"):
        unfreeze_grafts(plain)
    model = graft(plain, *passes()).train()
    own = dict(graft_parameters(model))
    assert len(own) == 26 and all(".pvm." in name or ".mixin." in name for name in own)
    assert unfreeze_grafts(model) == sum(parameter.numel() for parameter in own.values())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own.keys()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    for _ in range(2):
        inputs = batch(model, [[5, 6, *image(GRID), 7, 8, 9]], [GRID])
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == own.keys()
    assert len(dict(graft_parameters(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))))) > 26


def test_a_checkpoint_is_loaded_for_it(tmp_path: Path) -> None:
    tiny_model("qwen3_vl").save_pretrained(tmp_path / "source")
    model = graft(tmp_path / "source", *passes(), dtype=torch.bfloat16)
    assert {parameter.dtype for _, parameter in model.named_parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(models.load(tmp_path / "source", dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "nothing says what to graft"),
        ([PVM], "PVM is no pass: give each as an argument, such as"),
        (["pvm:layers=2"], "'pvm:layers=2' is no pass"),
        ([[PVM(layers=[1])]], "is no pass: give each as an argument"),
    ],
)
def test_what_is_no_pass(wrong: list[Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        graft(tiny_model("qwen3_vl"), *wrong)


def test_a_checkpoint_is_planned_before_its_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3_vl").save_pretrained(tmp_path / "source")
    monkeypatch.setattr("surgeon.live.load", lambda *arguments, **options: pytest.fail("it was loaded"))
    with pytest.raises(PreconditionError, match="99"):
        graft(tmp_path / "source", PVM(layers=[99], latent=32))


def test_another_model_of_the_same_config_stays_as_it_is(plain: PreTrainedModel, tmp_path: Path) -> None:
    other = type(plain)(plain.config)
    before = copy.deepcopy(other.config.to_dict())
    graft(plain, *passes())
    assert other.config.to_dict() == before and not hasattr(other.config, "surgeon")
    own = [module.config for module in plain.modules() if hasattr(module, "config")]
    assert plain.config is not other.config and other.config not in own


def test_layers_may_be_any_sequence() -> None:
    assert PVM(layers=(1, 2)).options.layers == PVM(layers=range(1, 3)).options.layers == [1, 2]


def test_what_its_config_does_not_make_would_be_lost_and_is_refused() -> None:
    class Mine(type(tiny_model("qwen3_vl"))):  # type: ignore[misc]
        pass

    def subclassed() -> PreTrainedModel:
        model = tiny_model("qwen3_vl")
        model.__class__ = Mine
        return model

    def shortened() -> PreTrainedModel:
        model = tiny_model("qwen3_vl")
        del model.model.language_model.layers[-1]
        return model

    def adapted() -> PreTrainedModel:
        model = tiny_model("qwen3_vl")
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        return model

    for make, message in (
        (subclassed, "is Mine, and"),
        (shortened, "is none, and"),
        (adapted, "q_proj' is Linear, and"),
    ):
        model = make()
        kind, config = type(model), model.config.to_dict()
        with pytest.raises(OptionError, match=message):
            graft(model, *passes())
        assert type(model) is kind and model.config.to_dict() == config


def test_a_batch_of_text_alone_trains_grafts_too(plain: PreTrainedModel) -> None:
    model = graft(plain, *passes()).train()
    unfreeze_grafts(model)
    inputs = batch(model, [[5, 6, 7, 8]], [])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for _, parameter in graft_parameters(model))


def test_what_cannot_be_grafted_into_is_refused_and_stays(tmp_path: Path) -> None:
    plain = tiny_model("qwen3_vl")
    kind, config = type(plain), plain.config.to_dict()
    for wrong, message in (
        (get_peft_model(tiny_model("qwen3_vl"), LoraConfig(target_modules=["q_proj"])), "graft first, and wrap"),
        (plain.base_model, "grafts are for the whole Qwen3VLForConditionalGeneration"),
        (graft(tiny_model("qwen3_vl"), *passes()), "it has grafts already"),
    ):
        with pytest.raises(OptionError, match=message):
            graft(wrong, *passes())
    with pytest.raises(OptionError, match="name a pass, such as PVM"):
        graft(plain)
    with pytest.raises(OptionError, match="dtype is for a checkpoint"):
        graft(plain, *passes(), dtype=torch.float16)
    with pytest.raises(PreconditionError, match="layer 9 is out of range"):
        graft(plain, PVM(layers=[1], latent=32), Mixin(layers=[9]))
    with pytest.raises(OptionError, match="option 'latent'"):
        PVM(layers=[1], latent=0)
    assert type(plain) is kind and plain.config.to_dict() == config


def test_where_a_model_lies_and_what_its_weights_are_decide() -> None:
    whole, spread, quantised = (tiny_model("qwen3_vl") for _ in range(3))
    whole.hf_device_map = {"model": "cpu", "lm_head": "cpu"}
    assert graft(whole, *passes()) is whole
    spread.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    quantised.hf_quantizer = object()
    for wrong, message in ((spread, "it is spread over devices"), (quantised, "its weights are quantised")):
        with pytest.raises(OptionError, match=message):
            graft(wrong, *passes())
