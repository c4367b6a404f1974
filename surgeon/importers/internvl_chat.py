"""InternVL 1.5 to 3.5 as published (InternVLChatModel): InternViT, an MLP projector, and a text model."""

from typing import Any

import transformers

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import CheckpointError
from surgeon.importers._internvl_files import InternVLFiles
from surgeon.importers._layout import Importer, Layout, Rule, rows, rule, setting
from surgeon.importers._text_models import text_model

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_VISION = "vision_config of config.json"


class InternVLChat(Importer):
    """InternVL, which becomes transformers' internvl."""

    model_type = "internvl_chat"

    def read(self, source: Checkpoint, image_token_id: int | None = None) -> Layout:
        """As `Importer.read`. Raises CheckpointError for what transformers' internvl is not."""
        files = InternVLFiles.read(source, image_token_id)
        config = source.config
        _refuse_other_models(config)
        llm, vision = setting(config, "llm_config", dict), setting(config, "vision_config", dict)
        name, text = text_model(llm)
        converted = _config(config, vision, text.config(llm), files.image_token_id)
        files.image_processor = _image_processor(config, converted["vision_config"]["image_size"])
        files.template = config.get("template")
        layout = Layout(
            config=converted,
            rules=[*_vision_rules(), *_projector_rules(), *text.rules(llm)],
            text_model=name,
            side_files=files,
            image_token_id=files.image_token_id,
            warnings=list(files.warnings),
        )
        if config.get("dynamic_image_size") and not config.get("use_thumbnail"):
            layout.warnings.append(
                "use_thumbnail is off in config.json, and transformers' image processor always adds a thumbnail to "
                "tiles: prompts with tiled images are not what the model was trained on"
            )
        return layout


IMPORTER = InternVLChat()


def _config(
    config: dict[str, Any], vision: dict[str, Any], text_config: dict[str, Any], image_token_id: int
) -> dict[str, Any]:
    """config.json of transformers' internvl."""
    side = setting(vision, "image_size", int, _VISION)
    if config.get("force_image_size", side) not in (side, None):
        raise CheckpointError(
            f"force_image_size is {config['force_image_size']}, and the vision tower's image_size {side}: position "
            "embeddings that are interpolated for each image are not supported"
        )
    patch, ratio = setting(vision, "patch_size", int, _VISION), setting(config, "downsample_ratio", float)
    tie = bool(text_config.get("tie_word_embeddings", False))
    converted = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "transformers_version": transformers.__version__,
        "dtype": config.get("dtype") or config.get("torch_dtype") or config["llm_config"].get("torch_dtype"),
        "text_config": {**text_config, "tie_word_embeddings": tie},
        "vision_config": _vision_config(vision),
        "image_token_id": image_token_id,
        "image_seq_length": int((side // patch) ** 2 * ratio**2),
        "downsample_ratio": ratio,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tie,
    }
    try:
        transformers.InternVLConfig.from_dict(converted)
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json cannot become an internvl config: {reason}") from error
    return converted


def _refuse_other_models(config: dict[str, Any]) -> None:
    version = config.get("ps_version", "v1")
    if version != "v2":
        raise CheckpointError(
            f"ps_version is {version!r}: that pixel shuffle transposes its output, and transformers' internvl only has "
            "'v2', so the weights would see other images than they were trained on"
        )
    for key in ("use_backbone_lora", "use_llm_lora"):
        if config.get(key):
            raise CheckpointError(f"{key} is {config[key]}: merge the LoRA weights into the model first")
    if config.get("pad2square"):
        raise CheckpointError("pad2square is on: transformers' image processor for internvl does not pad images")


def _vision_config(vision: dict[str, Any]) -> dict[str, Any]:
    eps, qk_norm = vision.get("layer_norm_eps", 1e-6), vision.get("qk_normalization", False)
    if qk_norm and eps != 1e-6:
        raise CheckpointError(f"qk_normalization with layer_norm_eps {eps}: transformers' internvl has 1e-6 there")
    norm_type = vision.get("norm_type", "rms_norm")
    if norm_type not in ("layer_norm", "rms_norm"):
        raise CheckpointError(f"norm_type is {norm_type!r} in {_VISION}; known: layer_norm, rms_norm")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    dropout = vision.get("attention_probs_dropout_prob", vision.get("attention_dropout", 0.0))
    return {
        **{key: setting(vision, key, int, _VISION) for key in sizes},
        "num_channels": vision.get("num_channels", 3),
        "attention_bias": vision.get("qkv_bias", False),
        "use_qk_norm": qk_norm,
        "hidden_act": vision.get("hidden_act", "gelu"),
        "hidden_dropout_prob": vision.get("dropout", 0.0),
        "attention_dropout": dropout,
        "projection_dropout": vision.get("dropout", 0.0),
        "initializer_range": vision.get("initializer_range", 0.02),
        "norm_type": norm_type,
        "layer_norm_eps": eps,
        "layer_scale_init_value": vision.get("initializer_factor", 0.1),
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,  # which means: no norm after the last layer
    }


def _vision_rules() -> list[Rule]:
    theirs, ours = r"vision_model\.encoder\.layers\.(\d+)\.", r"model.vision_tower.encoder.layer.\1."
    embeddings = "model.vision_tower.embeddings."
    return [
        rule(r"vision_model\.embeddings\.class_embedding", embeddings + "cls_token"),
        rule(r"vision_model\.embeddings\.position_embedding", embeddings + "position_embeddings"),
        rule(
            r"vision_model\.embeddings\.patch_embedding\.(weight|bias)", embeddings + r"patch_embeddings.projection.\1"
        ),
        rule(
            theirs + r"attn\.qkv\.(weight|bias)",
            {ours + rf"attention.{name}_proj.\2": rows(i, 3) for i, name in enumerate("qkv")},
        ),
        rule(theirs + r"attn\.proj\.(weight|bias)", ours + r"attention.projection_layer.\2"),
        rule(theirs + r"attn\.([qk])_norm\.weight", ours + r"attention.\2_norm.weight"),
        rule(theirs + r"norm1\.(weight|bias)", ours + r"layernorm_before.\2"),
        rule(theirs + r"norm2\.(weight|bias)", ours + r"layernorm_after.\2"),
        rule(theirs + r"mlp\.fc([12])\.(weight|bias)", ours + r"mlp.fc\2.\3"),
        rule(theirs + r"ls([12])", ours + r"lambda_\2"),
    ]


def _projector_rules() -> list[Rule]:
    projector = "model.multi_modal_projector."
    return [
        rule(r"mlp1\.0\.(weight|bias)", projector + r"layer_norm.\1"),
        rule(r"mlp1\.1\.(weight|bias)", projector + r"linear_1.\1"),
        rule(r"mlp1\.3\.(weight|bias)", projector + r"linear_2.\1"),
    ]


def _image_processor(config: dict[str, Any], side: int) -> dict[str, Any]:
    tiles = bool(config.get("dynamic_image_size", False))
    return {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "size": {"height": side, "width": side},
        "crop_to_patches": tiles,
        # transformers' processor asks for tiles whatever crop_to_patches says; one is the whole image
        "min_patches": config.get("min_dynamic_patch", 1) if tiles else 1,
        "max_patches": config.get("max_dynamic_patch", 6) if tiles else 1,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
