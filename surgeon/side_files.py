"""What stands beside the weights of a patched checkpoint: the source's files, as its own loaders are to find them.

A patched config has a model_type of its own, by which transformers finds no processor; and code of the source is only
kept where that was asked for.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import IMAGE_PROCESSOR_MAPPING, PROCESSOR_MAPPING, TOKENIZER_MAPPING

from surgeon.checkpoint.reader import CONFIG, Checkpoint
from surgeon.checkpoint.share import share_file
from surgeon.errors import CheckpointError
from surgeon.families import Family
from surgeon.json_file import read_object

PROCESSOR_CONFIG = "processor_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
TOKENIZER = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
IMAGE_PROCESSOR_FILES = (IMAGE_PROCESSOR, PROCESSOR_CONFIG)
"""Of each list one at least is there, or the checkpoint has no such part."""
LICENSE_FILES = ("LICENSE", "NOTICE", "USE_POLICY")
"""How the names begin of those that go with weights wherever they go."""
AUTO_MAP = "auto_map"
_NESTED = "image_processor"
"""What the image processor is called in the processor's file."""
_CODE = ".py"


@dataclass
class CopiedFiles:
    bytes_written: int = 0
    left_out: list[str] = field(default_factory=list)
    """Code of the source, and what leads to it: file names, and "auto_map of <file>"."""


def copy_side_files(
    source: Checkpoint, directory: Path, own_files: Collection[str], trust_remote_code: bool
) -> CopiedFiles:
    """Copy what is needed beside the weights, except `own_files`, which are written anew. Without `trust_remote_code`
    the source's Python files stay behind, and entries that lead to them are taken out of the processors' files.

    Raises CheckpointError for a link out of the checkpoint, and for a file that is not JSON where one is.
    """
    copied = CopiedFiles()
    for file in source.side_files:
        if file.name in own_files:
            continue
        if file.suffix == _CODE and not trust_remote_code:
            copied.left_out.append(file.name)
            continue
        copied.bytes_written += share_file(file, directory / file.name, "copy").bytes_written
    if not trust_remote_code:
        for name in (PROCESSOR_CONFIG, IMAGE_PROCESSOR, VIDEO_PROCESSOR, TOKENIZER):
            if _edit(directory / name, _drop_auto_map):
                copied.left_out.append(f"{AUTO_MAP} of {name}")
    return copied


def copy_license_files(source: Checkpoint, directory: Path) -> None:
    """Copy the license, and notices beside it. Raises CheckpointError as `copy_side_files`."""
    for file in source.side_files:
        if file.name.upper().startswith(LICENSE_FILES):
            share_file(file, directory / file.name, "copy")


def image_processor_settings(directory: Path) -> dict[str, Any]:
    """How the image processor in a directory is set; empty where there is none. Raises CheckpointError."""
    content = _read(_image_processor_file(directory))
    return dict(content.get(_NESTED, {}) if _is_nested(content) else content)


def configure_image_processor(directory: Path, options: dict[str, Any]) -> None:
    """Change options of the image processor, where transformers reads them. Raises CheckpointError where there is
    none."""
    path = _image_processor_file(directory)
    if not path.is_file():
        raise CheckpointError(f"the checkpoint has no image processor to set {', '.join(sorted(options))} of")
    _edit(path, lambda content: (content[_NESTED] if _is_nested(content) else content).update(options))


def _image_processor_file(directory: Path) -> Path:
    """Of the two files that may describe it, the one that transformers reads first."""
    return directory / (PROCESSOR_CONFIG if _is_nested(_read(directory / PROCESSOR_CONFIG)) else IMAGE_PROCESSOR)


def _is_nested(content: dict[str, Any]) -> bool:
    return isinstance(content.get(_NESTED), dict)


def name_classes(directory: Path, family: Family) -> None:
    """Write into the processors' files the classes that transformers finds by a plain config's model_type, where they
    name none that it has: AutoProcessor and its kind then give what they give for the source, and run no code."""
    config_class = getattr(transformers, family.config_class)
    _name_tokenizer(directory, config_class)
    _name_image_processor(directory, config_class)
    if family.video_processor_class is not None:
        _name_video_processor(directory, family.video_processor_class)
    _name_processor(directory, config_class)


def _name_processor(directory: Path, config_class: Any) -> None:
    present = [name for name in (PROCESSOR_CONFIG, IMAGE_PROCESSOR, TOKENIZER) if (directory / name).is_file()]
    naming = next((name for name in present if _read(directory / name).get("processor_class")), None)
    if naming is not None and hasattr(transformers, str(_read(directory / naming)["processor_class"])):
        return
    processor = PROCESSOR_MAPPING.get(config_class, None)
    if processor is not None and present:
        _edit(directory / (naming or present[0]), lambda content: content.update(processor_class=processor.__name__))


def _name_tokenizer(directory: Path, config_class: Any) -> None:
    if any(_read(directory / name).get("tokenizer_class") for name in (TOKENIZER, CONFIG)):
        return
    tokenizer = TOKENIZER_MAPPING.get(config_class, None)
    if tokenizer is not None and any((directory / name).is_file() for name in (TOKENIZER, "tokenizer.json")):
        _edit(directory / TOKENIZER, lambda content: content.update(tokenizer_class=tokenizer.__name__))


def _name_image_processor(directory: Path, config_class: Any) -> None:
    path = _image_processor_file(directory)
    if not path.is_file():
        return

    def name(content: dict[str, Any]) -> None:
        described = content[_NESTED] if _is_nested(content) else content
        if "image_processor_type" not in described and "feature_extractor_type" not in described:
            # of several backends, each named as the first with a suffix; the plain name lets transformers choose
            backends = IMAGE_PROCESSOR_MAPPING.get(config_class, None) or {}
            processor_class = backends.get("pil") or backends.get("torchvision")
            if processor_class is not None:
                described["image_processor_type"] = processor_class.__name__.removesuffix("Pil").removesuffix("Fast")

    _edit(path, name)


def _name_video_processor(directory: Path, class_name: str) -> None:
    """In a file of its own, or in that which has it: transformers takes it to be named after the image processor."""
    processor = _read(directory / PROCESSOR_CONFIG)
    nested = processor.get("video_processor")
    own = (directory / VIDEO_PROCESSOR).is_file()
    described = nested or _read(directory / (VIDEO_PROCESSOR if own else IMAGE_PROCESSOR))
    inferred = str(described.get("image_processor_type")).replace("ImageProcessor", "VideoProcessor")
    if not described or "video_processor_type" in described or hasattr(transformers, inferred):
        return
    settings = {
        key: value for key, value in described.items() if key not in ("image_processor_type", "processor_class")
    }
    settings["video_processor_type"] = class_name
    if nested:
        _write(directory / PROCESSOR_CONFIG, {**processor, "video_processor": settings})
    else:
        _write(directory / VIDEO_PROCESSOR, settings)


def _drop_auto_map(content: dict[str, Any]) -> None:
    """Of a processor, and of those that it describes within."""
    for part in (content, *content.values()):
        if isinstance(part, dict):
            part.pop(AUTO_MAP, None)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> bool:
    """Change the JSON object in a file; one that is not there is empty. Returns whether it is another one now."""
    content = _read(path)
    change(content)
    if content == _read(path):
        return False
    _write(path, content)
    return True


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    return read_object(path, CheckpointError) if path.is_file() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
