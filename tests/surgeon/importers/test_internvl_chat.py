"""InternVL as published -> transformers' internvl: the same numbers, the same bytes, or a reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from checkpoints import tiny_model
from published import IMAGE_TOKEN_ID, expected_tensors, golden_checkpoint, publish
from surgeon.errors import CheckpointError, OptionError, SurgeonError
from surgeon.importing import import_checkpoint


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def load(directory: Path, **options: Any) -> Any:
    """The imported model, by transformers alone; fails where a key is missing, unexpected or of another shape."""
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


# -- numbers -----------------------------------------------------------------------------------------------------
def test_golden_internvl2_gives_the_authors_numbers(tmp_path: Path) -> None:
    source = golden_checkpoint(tmp_path / "source")
    report = import_checkpoint(source, tmp_path / "out", image_token_id=IMAGE_TOKEN_ID)
    assert (report.source_type, report.model_type, report.text_model) == ("internvl_chat", "internvl", "internlm2")
    assert report.bytes_written == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    (warning,) = report.warnings
    assert "no tokenizer" in warning

    model, expected = load(tmp_path / "out"), expected_tensors()
    with torch.no_grad():
        features = model.get_image_features(pixel_values=expected["pixel_values"]).pooler_output
        logits = model(input_ids=expected["input_ids"], pixel_values=expected["pixel_values"]).logits[:, -64:]
    torch.testing.assert_close(features.flatten(0, 1)[None], expected["visual_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected["logits_internvl2"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("internlm2", {"text_type": "llama"}),
        ("internlm2", {"text_type": "llama", "attention_bias": True, "num_key_value_heads": 1}),
        ("internlm2", {"text_type": "llama", "num_key_value_heads": 4}),
        ("llama", {"text_type": "llama", "tie_word_embeddings": True}),
        ("qwen2", {"text_type": "qwen2", "vision": {"use_qk_norm": True, "norm_type": "rms_norm"}}),
        ("qwen3", {"text_type": "qwen3", "vision": {"attention_bias": False}, "top": {"vision_feature_layer": -2}}),
    ],
)
def test_every_tensor_comes_through_bit_for_bit(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    model = tiny_model("internvl", dtype=torch.bfloat16, **options)
    source = publish(model, tmp_path / "source", text, shards=3)
    report = import_checkpoint(source, tmp_path / "out", image_token_id=model.config.image_token_id)
    assert report.text_model == text
    assert report.parameters == sum(p.numel() for p in model.parameters())

    tensors = tensors_of(tmp_path / "out")
    expected = dict(model.named_parameters())
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == torch.bfloat16
        assert torch.equal(tensors[name], tensor), name
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted(
        p.name for p in source.glob("*.safetensors")
    )
    imported = load(tmp_path / "out", dtype=torch.bfloat16)
    ids = torch.tensor([[1, 2, *[model.config.image_token_id] * 9, 3]])
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        assert torch.equal(
            imported(input_ids=ids, pixel_values=pixels).logits, model(input_ids=ids, pixel_values=pixels).logits
        )


def test_what_a_config_leaves_out_is_what_the_authors_code_takes(tmp_path: Path) -> None:
    """The defaults of the published InternLM2Config and InternVisionConfig."""
    llm = {
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_scaling": None,
    }
    vision = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_channels": 3, "initializer_range": 0.02}

    def leave_out(config: dict[str, Any]) -> None:
        for part, keys in (("llm_config", [*llm, "rope_theta"]), ("vision_config", vision)):
            for key in keys:
                config[part].pop(key, None)
        config["llm_config"].pop("bias", None)

    def with_biases(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith((".wqkv.weight", ".wo.weight"))]:
            tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))

    source = golden_checkpoint(tmp_path / "source", change=leave_out, change_tensors=with_biases)
    import_checkpoint(source, tmp_path / "out", image_token_id=500)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    llm.pop("rope_scaling")
    assert text["attention_bias"] is True
    assert {key: text[key] for key in llm} == llm
    assert {key: config["vision_config"][key] for key in vision} == vision
    assert load(tmp_path / "out").model.language_model.norm.variance_epsilon == 1e-6


def test_images_are_scaled_as_the_authors_scale_them(tmp_path: Path) -> None:
    """Bicubic, then ImageNet's mean and deviation."""
    import_checkpoint(golden_checkpoint(tmp_path / "source"), tmp_path / "out", image_token_id=500)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    processed = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    assert processed.shape == (1, 3, 64, 64)
    scaled = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)) / 255
    expected = (scaled - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(processed[0].transpose(1, 2, 0), expected, atol=1e-5)


def test_dynamic_ntk_scaling_is_the_published_formula(tmp_path: Path) -> None:
    def scaled(config: dict[str, Any]) -> None:
        config["llm_config"] |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}

    import_checkpoint(golden_checkpoint(tmp_path / "source", change=scaled), tmp_path / "out", image_token_id=500)
    rotary = load(tmp_path / "out").model.language_model.rotary_emb
    head_dim, base, longest, factor = 16, 1e6, 64, 2.0
    for length in (10, 64, 65, 200):
        cos, _ = rotary(torch.zeros(1), torch.arange(length)[None])
        stretched = base
        if length > longest:
            stretched = base * (factor * length / longest - (factor - 1)) ** (head_dim / (head_dim - 2))
        frequencies = 1 / stretched ** (torch.arange(0, head_dim, 2).double() / head_dim)
        angles = torch.arange(length).double()[:, None] * frequencies
        torch.testing.assert_close(cos[0, :, : head_dim // 2].double(), angles.cos(), atol=2e-5, rtol=0)


def test_tied_output_that_is_stored_as_well(tmp_path: Path) -> None:
    def tie(config: dict[str, Any]) -> None:
        config["llm_config"]["tie_word_embeddings"] = True

    def same(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.output.weight"] = tensors["language_model.model.tok_embeddings.weight"].clone()

    import_checkpoint(golden_checkpoint(tmp_path / "same", change=tie, change_tensors=same), tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    with pytest.raises(CheckpointError, match=r"output.weight.*different|different.*output.weight|are different"):
        import_checkpoint(golden_checkpoint(tmp_path / "other", change=tie), tmp_path / "out2")


# -- what is beside the weights ----------------------------------------------------------------------------------
def test_no_code_comes_along_and_the_licence_does(tmp_path: Path) -> None:
    source = golden_checkpoint(
        tmp_path / "source", change=lambda config: config.update(auto_map={"AutoModel": "modeling.Model"})
    )
    (source / "modeling.py").write_text("raise SystemExit('run')")
    (source / "LICENSE").write_text("MIT")
    import_checkpoint(source, tmp_path / "out", image_token_id=500)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in json.dumps(config)
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 64, "width": 64}
    assert (processor["min_patches"], processor["max_patches"], processor["crop_to_patches"]) == (1, 6, True)


def test_image_token_without_a_tokenizer(tmp_path: Path) -> None:
    source = golden_checkpoint(tmp_path / "source")
    report = import_checkpoint(source, tmp_path / "out")
    # <IMG_CONTEXT> is the third of the nine tokens that published checkpoints add to their text model's
    assert report.image_token_id == 600 - 7
    assert "593" in report.warnings[0] and "--image-token-id" in report.warnings[0]
    with pytest.raises(OptionError, match="outside the vocabulary of 600"):
        import_checkpoint(source, tmp_path / "out2", image_token_id=600)


# -- what cannot be ----------------------------------------------------------------------------------------------
def other_text_model(config: dict[str, Any]) -> None:
    config["llm_config"] |= {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}


def refused(source: Path, target: Path, *parts: str, kind: type[SurgeonError] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        import_checkpoint(source, target, image_token_id=500)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not target.exists() and not list(target.parent.glob(".*"))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (other_text_model, ("phi3 / Phi3ForCausalLM", "internlm2 / InternLM2ForCausalLM")),
        (lambda c: c["llm_config"].update(architectures=["InternLM2VEForCausalLM"]), ("InternLM2VEForCausalLM",)),
        (lambda c: c.update(ps_version="v1"), ("ps_version", "'v1'")),
        (lambda c: c.pop("ps_version"), ("ps_version", "'v1'")),
        (lambda c: c.update(use_llm_lora=16), ("use_llm_lora", "merge")),
        (lambda c: c.update(pad2square=True), ("pad2square",)),
        (lambda c: c.update(force_image_size=32), ("force_image_size is 32", "64")),
        (lambda c: c["llm_config"].update(rope_scaling={"type": "longrope"}), ("longrope",)),
        (lambda c: c["llm_config"].pop("hidden_size"), ("hidden_size is missing", "llm_config")),
        (lambda c: c["vision_config"].update(norm_type="none"), ("none",)),
        (lambda c: c["vision_config"].update(num_attention_heads=3), ("num_heads",)),
        (lambda c: c["llm_config"].update(hidden_act="unheard"), ("unheard",)),
        (lambda c: c["vision_config"].update(patch_size="2"), ("patch_size is '2'",)),
        (lambda c: c["llm_config"].update(num_key_value_heads=3), ("num_key_value_heads 3",)),
        (lambda c: c["llm_config"].update(intermediate_size=96), ("feed_forward.w1.weight", "[96, 64]")),
        (lambda c: c.update(model_type="other_chat"), ("'other_chat'", "internvl_chat")),
    ],
)
def test_a_config_that_cannot_be_converted(tmp_path: Path, change: Any, parts: tuple[str, ...]) -> None:
    refused(golden_checkpoint(tmp_path / "in" / "source", change=change), tmp_path / "out", *parts)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t.update({"vision_model.head.weight": torch.zeros(2)}), "vision_model.head.weight"),
        (lambda t: t.update({"language_model.model.layers.4.ffn_norm.weight": torch.zeros(64)}), "layers.4.ffn_norm"),
        (lambda t: t.pop("mlp1.3.bias"), "multi_modal_projector.linear_2.bias"),
        (lambda t: t.pop("language_model.model.layers.2.attention.wqkv.weight"), "layers.2.self_attn.k_proj.weight"),
    ],
)
def test_a_tensor_that_is_left_over_or_missing_is_named(tmp_path: Path, change: Any, name: str) -> None:
    refused(golden_checkpoint(tmp_path / "in" / "source", change_tensors=change), tmp_path / "out", name)


def test_rotary_buffers_of_old_checkpoints_are_no_leftovers(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(8)

    import_checkpoint(golden_checkpoint(tmp_path / "source", change_tensors=add), tmp_path / "out", image_token_id=500)
    load(tmp_path / "out")


def test_overwriting_is_asked_for(tmp_path: Path) -> None:
    source = golden_checkpoint(tmp_path / "source")
    import_checkpoint(source, tmp_path / "out")
    with pytest.raises(SurgeonError, match="--overwrite"):
        import_checkpoint(source, tmp_path / "out")
    import_checkpoint(source, tmp_path / "out", overwrite=True)


def test_one_file_of_another_name_has_an_index(tmp_path: Path) -> None:
    """Without one nothing would find it."""
    source = publish(tiny_model("internvl", text_type="llama"), tmp_path / "source", "internlm2", shards=1)
    (file,) = source.glob("*.safetensors")
    assert file.name != "model.safetensors"
    import_checkpoint(source, tmp_path / "out", image_token_id=3)
    load(tmp_path / "out")
