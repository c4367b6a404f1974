"""Agreement with the PVM authors' published implementation: numbers stored in tests/data."""

import pytest
import torch
from safetensors.torch import load_file

from golden import DATA, expected_tensors, our_name, published_checkpoint
from surgeon import models
from surgeon.memory.pvm import PersistentVisualMemory


def test_block_equals_the_authors() -> None:
    tensors = load_file(DATA / "pvm_block_a.safetensors")
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    block = PersistentVisualMemory(64, 32, 96, head_dim=16, num_key_value_heads=1, eps=1e-6)
    block.load_state_dict({our_name(name): tensor for name, tensor in weights.items()})
    assert sum(p.numel() for p in block.parameters()) == 18529
    visual = tensors["input.visual_embeds"]
    mask = torch.arange(visual.shape[1]) < tensors["input.visual_lengths"][:, None]
    keys, values = block.project(visual)
    injection = block.attend(tensors["input.hidden_states"], keys, values, mask, tensors["input.query_is_visual"])
    torch.testing.assert_close(injection, tensors["output.injection"], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    model = models.load(published_checkpoint(tmp_path_factory.mktemp("golden")))
    expected = expected_tensors()
    inputs = {k: expected[k] for k in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    inputs["mm_token_type_ids"] = (expected["input_ids"] == model.config.image_token_id).long()
    return model, inputs, expected


def test_model_equals_the_authors(golden) -> None:  # type: ignore[no-untyped-def]
    model, inputs, expected = golden
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
        tokens = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert tokens[:, -12:].tolist() == expected["greedy"].tolist()


def test_model_with_gates_closed_equals_the_backbone(golden) -> None:  # type: ignore[no-untyped-def]
    model, inputs, expected = golden
    open_gates = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(".alpha")}
    assert all(float(alpha) != 0 for alpha in open_gates.values())
    with torch.no_grad():
        for name in open_gates:
            model.get_parameter(name).zero_()
        logits = model(**inputs).logits
        for name, alpha in open_gates.items():
            model.get_parameter(name).copy_(alpha)
    torch.testing.assert_close(logits, expected["logits_gate_zero"], atol=1e-5, rtol=0)
