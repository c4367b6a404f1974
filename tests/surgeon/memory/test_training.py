"""What trains, and when: gradients at insertion, gradient checkpointing, LoRA on top, saving what was trained."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from checkpoints import QWEN_TYPES, tiny_model
from patching import apply, batch, image, open_gates, patched_pair
from surgeon import models
from surgeon.live import graft_parameters

GRID = (1, 4, 6)


@pytest.fixture(params=QWEN_TYPES)
def patched(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    return patched_pair(tmp_path, request.param)[1]


def loss_of(model: PreTrainedModel, images: bool = True) -> torch.Tensor:
    row = [5, 6, *image(GRID), 7, 8, 9] if images else [5, 6, 7, 8, 9]
    kwargs = batch(model, [row, row], [GRID, GRID] if images else [])
    return model(**kwargs, labels=kwargs["input_ids"]).loss


def branch(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".pvm." in name}


def test_gate_moves_first_and_every_matrix_second(patched: PreTrainedModel) -> None:
    patched.train()
    optimizer = torch.optim.SGD(branch(patched).values(), lr=0.1)
    loss_of(patched).backward()
    assert all(float(p.grad.abs().sum()) > 0 for name, p in branch(patched).items() if name.endswith("alpha"))
    optimizer.step()
    assert all(float(p.detach()) != 0 for name, p in branch(patched).items() if name.endswith("alpha"))
    optimizer.zero_grad()
    loss_of(patched).backward()
    still = [name for name, p in branch(patched).items() if p.grad is None or float(p.grad.abs().sum()) == 0]
    assert not still


def test_nothing_moves_without_images(patched: PreTrainedModel) -> None:
    open_gates(patched)
    patched.train()
    loss_of(patched, images=False).backward()
    assert all(p.grad is None or not p.grad.any() for p in branch(patched).values())


def test_gradient_checkpointing_changes_nothing(patched: PreTrainedModel) -> None:
    open_gates(patched)
    patched.train()
    loss_of(patched).backward()
    expected = {name: p.grad.clone() for name, p in branch(patched).items()}
    patched.zero_grad()
    with pytest.raises(ValueError, match="use_reentrant"):
        patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    patched.gradient_checkpointing_enable()
    patched.enable_input_require_grads()
    loss_of(patched).backward()
    for name, parameter in branch(patched).items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_save_and_reload(patched: PreTrainedModel, tmp_path: Path) -> None:
    open_gates(patched)
    patched.save_pretrained(tmp_path / "tuned")
    reloaded = models.load(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "modeling_surgeon.py").is_file()
    with torch.no_grad():
        assert torch.equal(loss_of(reloaded), loss_of(patched))


def test_lora_on_top(patched: PreTrainedModel, tmp_path: Path) -> None:
    open_gates(patched)
    before = loss_of(patched).detach()
    torch.manual_seed(0)  # LoRA's matrices are drawn
    tuned = get_peft_model(patched, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "text_proj"]))
    assert any(".pvm.text_proj.lora_A" in name for name, p in tuned.named_parameters() if p.requires_grad)
    torch.testing.assert_close(loss_of(tuned), before)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(tuned).backward()
        optimizer.step()
    assert loss_of(tuned) < before
    grafted = [p for n, p in tuned.named_parameters() if ".pvm." in n and "lora_B" in n]
    assert grafted and all(bool(p.abs().sum()) for p in grafted)
    with torch.no_grad():
        adapted = loss_of(tuned)
    merged = tuned.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(merged), adapted)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loss_of(models.load(tmp_path / "merged")), loss_of(merged))


def test_grafts_whole_beside_lora(tmp_path: Path) -> None:
    """docs/usage.md: `modules_to_save` trains every tensor of the grafts, gates first, and merges into plain ones."""
    tiny_model("qwen3_vl").save_pretrained(tmp_path / "source")
    apply(tmp_path / "source", tmp_path / "patched", "pvm:layers=1,latent=32", "mixin:layers=0")
    model = models.load(tmp_path / "patched")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["pvm", "mixin"])
    tuned = get_peft_model(model, config)
    # of what PEFT keeps twice, the copy that is used
    own = dict(graft_parameters(tuned))
    assert len(own) == 26 and all(parameter.requires_grad for parameter in own.values())
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(tuned).backward()
        optimizer.step()
    with torch.no_grad():
        trained = loss_of(tuned)
    merged = tuned.merge_and_unload()
    after = merged.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    grafts = {name for name in before if ".pvm." in name or ".mixin." in name}
    attention = {name for name in before if name.endswith(("self_attn.q_proj.weight", "self_attn.v_proj.weight"))}
    assert changed == grafts | attention and len(grafts) == 26
    merged.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        torch.testing.assert_close(loss_of(models.load(tmp_path / "trained")), trained)
