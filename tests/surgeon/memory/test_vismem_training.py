"""What trains of memory that is called for, and when; the backbone frozen, checkpointed, and with adapters on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from checkpoints import has_tokenizer
from surgeon import models
from surgeon.live import graft_parameters, unfreeze_grafts
from surgeon.memory.memory_tokens import KINDS
from surgeon.saving import save
from vismem_models import FORMERS, SEEING, TWO, VisMemPair, extended, positions_of, randomise_vismem, span

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
every_former = pytest.mark.parametrize("short_former", FORMERS)
Pairs = Callable[..., VisMemPair]


def fresh(pair: VisMemPair) -> Any:
    """A model of the test's own, as inserted."""
    return models.load(pair.directory / "patched").double().train()


def batch(pair: VisMemPair) -> dict[str, Any]:
    """Two rows with both memories, as a trainer feeds them."""
    short, long = (span(pair.tokens, kind) for kind in KINDS)
    whole = extended(pair.kwargs(SEEING, TWO), [[7, *short, 8, 9, *long, 10, 11], [7, 8, *long, 9, *short, 10, 11]])
    whole["position_ids"] = positions_of(pair.model, whole)
    labels = whole["input_ids"].clone()
    labels[torch.isin(labels, torch.tensor([*pair.tokens.end.values(), pair.tokens.placeholder]))] = -100
    return {**whole, "labels": labels}


def loss_of(model: Any, kwargs: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**kwargs).loss
    return loss


def memory_parameters(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".vismem." in name}


def without_gradient(parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name for name, p in parameters.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)}


@pytest.mark.parametrize("model_type", ["qwen3_vl", "internvl"])
@every_former
def test_all_but_what_is_behind_a_zero_moves_first(vismem_pair: Pairs, model_type: str, short_former: str) -> None:
    """A's gradient passes B, which is zero at insertion."""
    pair = vismem_pair(model_type, short_former)
    model, kwargs = fresh(pair), batch(pair)
    parameters = memory_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    loss_of(model, kwargs).backward()
    first_to_rest = {name for name in parameters if ".reduce." in name}
    used = int(kwargs["input_ids"].shape[1]) + 4
    assert without_gradient(parameters) == first_to_rest
    positions = model.model.vismem.query_builder.positions.grad
    assert positions[:10].abs().sum() > 0 and not positions[used:].any()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, kwargs).backward()
    assert not without_gradient(parameters)
    for parameter in parameters.values():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())


@every_former
def test_a_few_steps_lower_the_loss_with_the_backbone_frozen(vismem_pair: Pairs, short_former: str) -> None:
    pair = vismem_pair("qwen3_vl", short_former)
    model, kwargs = fresh(pair), batch(pair)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = dict(graft_parameters(model))
    assert own.keys() == memory_parameters(model).keys()
    assert unfreeze_grafts(model) == sum(parameter.numel() for parameter in own.values())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own.keys()
    optimizer = torch.optim.Adam(own.values(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, kwargs)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == own.keys()


@pytest.fixture
def all_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts to fp32 too, as norms have them: formers are large derivatives, and steps tiny."""
    cast = torch.Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tensor.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return tensor
        return cast(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: to(tensor, torch.float32))


@every_former
def test_gradients_are_those_of_finite_differences(vismem_pair: Pairs, short_former: str, all_in_fp64: None) -> None:
    """Along a direction of each part's parameters, through both memories, the second of which is formed of the
    first."""
    pair = vismem_pair("internvl", short_former)
    model, kwargs = fresh(pair), batch(pair)
    randomise_vismem(model)
    loss_of(model, kwargs).backward()
    generator = torch.Generator().manual_seed(0)
    for part in ("query_builder", "short", "long"):
        own = {name: p for name, p in memory_parameters(model).items() if f".vismem.{part}." in name}
        steps = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in own.items()}
        slope = sum(float((p.grad * steps[name]).sum()) for name, p in own.items() if p.grad is not None)
        losses = []
        with torch.no_grad():
            for size in (1e-6, -2e-6):
                for name, parameter in own.items():
                    parameter.add_(steps[name], alpha=size)
                losses.append(float(loss_of(model, kwargs)))
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-2), part
        assert abs(slope) > 0.01


@every_former
def test_gradient_checkpointing_changes_nothing(vismem_pair: Pairs, short_former: str) -> None:
    pair = vismem_pair("qwen3_vl", short_former)
    model, kwargs = fresh(pair), batch(pair)
    randomise_vismem(model)
    plain = loss_of(model, kwargs)
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    loss = loss_of(model, kwargs)
    torch.testing.assert_close(loss, plain, atol=1e-9, rtol=0)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() >= memory_parameters(model).keys()
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * scale + 1e-12, rtol=0, msg=name)


def test_rows_that_never_invoke_leave_it_without_gradient(vismem_pair: Pairs) -> None:
    """Without invocations nothing of it runs, in training neither."""
    pair = vismem_pair("qwen3_vl")
    model, kwargs = fresh(pair), pair.kwargs(SEEING)
    loss_of(model, {**kwargs, "labels": kwargs["input_ids"]}).backward()
    assert all(parameter.grad is None for parameter in memory_parameters(model).values())


# -- adapters -----------------------------------------------------------------------------------------------------
def adapted_targets(targets: Any) -> LoraConfig:
    torch.manual_seed(0)
    return LoraConfig(r=4, target_modules=targets, init_lora_weights=False)


@pytest.fixture
def trained(vismem_pair: Pairs) -> Iterator[tuple[VisMemPair, Any]]:
    pair = vismem_pair("qwen3_vl")
    yield pair, models.load(pair.directory / "trained").double()


@torch.no_grad()
def logits_of(model: Any, kwargs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**kwargs).logits
    return logits


def test_lora_on_the_backbone_is_merged_and_saved(trained: tuple[VisMemPair, Any], tmp_path: Path) -> None:
    """By the names of the decoder's layers, as everyone writes them."""
    pair, model = trained
    kwargs = batch(pair)
    before = {name: parameter.clone() for name, parameter in memory_parameters(model).items()}
    plain = logits_of(model, kwargs)
    tuned = get_peft_model(model, adapted_targets(["q_proj", "v_proj"])).double()
    logits = logits_of(tuned, kwargs)
    assert (logits - plain).abs().max() > 0.1
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, kwargs), logits, atol=1e-6, rtol=0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in memory_parameters(merged).items())
    assert memory_parameters(merged).keys() == before.keys()
    save(merged, tmp_path / "merged", pair.directory / "patched")
    again = models.load(tmp_path / "merged").double()
    torch.testing.assert_close(logits_of(again, kwargs), logits, atol=1e-6, rtol=0)


def test_lora_beside_the_whole_memory(trained: tuple[VisMemPair, Any]) -> None:
    """`modules_to_save` trains all of it, and merges into plain modules."""
    pair, model = trained
    kwargs = batch(pair)
    names = set(dict(graft_parameters(model)))
    config = LoraConfig(
        r=4, target_modules=r".*language_model\.layers\.\d+\.self_attn\.[qv]_proj", modules_to_save=["vismem"]
    )
    tuned = get_peft_model(model, config).double()
    own = dict(graft_parameters(tuned))
    assert len(own) == len(names) and all(parameter.requires_grad for parameter in own.values())
    loss = loss_of(tuned.train(), kwargs)
    loss.backward()
    assert not without_gradient(own)
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(0.01)
    logits = logits_of(tuned.eval(), kwargs)
    merged = tuned.merge_and_unload()
    assert set(dict(graft_parameters(merged))) == names
    torch.testing.assert_close(logits_of(merged, kwargs), logits, atol=1e-6, rtol=0)
