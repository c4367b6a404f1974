"""The Python files that travel with a patched checkpoint, so that transformers loads it without this tool."""

import ast
import importlib.util
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from surgeon.errors import SurgeonError
from surgeon.families import Family, family
from surgeon.grafts import asks_for_patched_class, class_makers, model_parts
from surgeon.memory import patched

ENTRY = "modeling_surgeon"
_OWN_IMPORT = re.compile(r"^(\s*)from (surgeon\.[\w.]+) import ", re.MULTILINE)
_ALLOWED = {"torch", "transformers", *sys.stdlib_module_names}


def _flat_name(module: str) -> str:
    return "surgeon_" + module.removeprefix("surgeon.").replace(".", "_")


def _travelling(module: str, files: dict[str, str]) -> None:
    """Add a module and what it imports of surgeon to `files`: flat file name -> source with flat imports."""
    if _flat_name(module) in files:
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    if spec.submodule_search_locations is not None:  # transformers does not see what `from . import x` leads to
        raise SurgeonError(f"{module} is a package: whatever travels with checkpoints imports names of its files")
    source = Path(spec.origin).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        for name in imported:
            top = name.split(".")[0]
            if isinstance(node, ast.Import) and top == "surgeon":
                raise SurgeonError(
                    f"{module} travels with checkpoints: write `from {name} import ...` for what it needs"
                )
            if top != "surgeon" and top not in _ALLOWED:
                raise SurgeonError(f"{module} travels with checkpoints and may not import {name}")
    files[_flat_name(module)] = _OWN_IMPORT.sub(lambda m: f"{m[1]}from .{_flat_name(m[2])} import ", source)
    for match in _OWN_IMPORT.finditer(source):
        _travelling(match[2], files)


def travelling_files(described: Family, record: dict[str, Any]) -> dict[str, str]:
    """File name -> text of everything that a checkpoint of this family with this record needs to load."""
    files: dict[str, str] = {}
    make_model, make_base_model = class_makers(record)
    parts = model_parts(described, record)
    for module in (make_model.__module__, *(part.__module__ for part in parts)):
        _travelling(module, files)
    within_base_model = described.text_model.split(".", 1)[1]

    def class_call(maker: str, base: str, text_model: str) -> list[str]:
        arguments = [base, repr(text_model), repr(described.norm_placement), repr(described.visual_token_keys)]
        return [
            f"{maker}(",
            *(f"    {argument}," for argument in [*arguments, *(part.__name__ for part in parts)]),
            ")",
        ]

    first, *model = class_call(make_model.__name__, described.model_class, described.text_model)
    base_model = class_call(make_base_model.__name__, described.base_model_class, within_base_model)
    lines = [
        '"""Loads this checkpoint in transformers, grafts included. Written by surgeon; see surgeon-recipe.yaml."""',
        "",
        f"from transformers import {described.config_class}, {described.base_model_class}, {described.model_class}",
        "",
        f"from .{_flat_name(make_model.__module__)} import {make_base_model.__name__}, {make_model.__name__}",
        f"from .{_flat_name(patched.__name__)} import patched_config_class",
        *(f"from .{_flat_name(part.__module__)} import {part.__name__}" for part in parts),
        "",
        f"SurgeonConfig = patched_config_class({described.config_class})",
        f"SurgeonModel = {first}",
        *model,
        "# transformers looks a class up, and finds its source file, by these.",
        'SurgeonConfig.__name__, SurgeonModel.__name__ = "SurgeonConfig", "SurgeonModel"',
        "SurgeonConfig.__module__ = SurgeonModel.__module__ = __name__",
        "",
        "",
        f"class {_base_model_name(described)}(",
        *(f"    {line}" for line in base_model),
        "):",
        '    """The model without its head, which `AutoModel` gives."""',
        "",
    ]
    files[ENTRY] = "\n".join(lines)
    return {f"{name}.py": text for name, text in files.items()}


def travelling_file_names(config: dict[str, Any]) -> list[str]:
    """The files that this tool wrote beside a patched config.json; none beside a plain one."""
    record: Any = config.get(patched.RECORD)
    if not asks_for_patched_class(record):
        return []
    return list(travelling_files(family(config["model_type"]), record))


def _base_model_name(described: Family) -> str:
    return f"Surgeon{described.base_model_class}"


def auto_map(described: Family) -> dict[str, str]:
    """What config.json needs for `from_pretrained(..., trust_remote_code=True)`."""
    classes = {
        "AutoConfig": "SurgeonConfig",
        "AutoModel": _base_model_name(described),
        "AutoModelForImageTextToText": "SurgeonModel",
        "AutoModelForMultimodalLM": "SurgeonModel",
    }
    return {auto_class: f"{ENTRY}.{name}" for auto_class, name in classes.items()}


def foreign_auto_map(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config's `auto_map` that lead to code which is not this tool's."""
    entries = config.get("auto_map")
    own = auto_map(family(config["model_type"]))
    return {k: v for k, v in entries.items() if own.get(k) != v} if isinstance(entries, dict) else {}


def patched_config(
    config: dict[str, Any], model_type: str, record: dict[str, Any], trust_remote_code: bool = False
) -> dict[str, Any]:
    """The config.json of a patched checkpoint: that of the plain one, whose family is `model_type`, and the record.
    With a record of new tokens alone it stays a plain model's.

    `trust_remote_code`: whether what else the plain one's `auto_map` leads to is kept.
    """
    if not asks_for_patched_class(record):
        kept = foreign_auto_map(config) if trust_remote_code else {}
        plain = {key: value for key, value in config.items() if key != "auto_map"}
        return {**plain, **({"auto_map": kept} if kept else {}), patched.RECORD: record}
    return {
        **config,
        "architectures": ["SurgeonModel"],
        "auto_map": {**(foreign_auto_map(config) if trust_remote_code else {}), **auto_map(family(model_type))},
        "model_type": patched.MODEL_TYPE_PREFIX + model_type,
        patched.RECORD: record,
    }


def set_vocab_size(config: dict[str, Any], text_size: int, whole_size: int | None) -> None:
    """Set the numbers of tokens in the content of a config.json, wherever they stand there: the text model's, and the
    whole model's own where its family has one."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = {**text, "vocab_size": text_size}
    if whole_size is not None or "vocab_size" in config or not isinstance(text, dict):
        config["vocab_size"] = text_size if whole_size is None else whole_size


def write_remote_code(directory: Path, config: PretrainedConfig) -> int:
    """Write the travelling files of a patched config into a checkpoint directory. Returns the bytes written."""
    files = travelling_files(family(config.model_type), getattr(config, patched.RECORD))
    return sum((directory / name).write_text(text, encoding="utf-8") for name, text in files.items())


@cache
def with_remote_code(maker: Callable[..., type], arguments: tuple[Any, ...]) -> type[PreTrainedModel]:
    """The patched class that `maker(*arguments)` makes, with a `save_pretrained` that writes the travelling files
    too."""
    model_class: Any = maker(*arguments)

    class Saved(model_class):
        made_by = (with_remote_code, (maker, arguments))

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            self.config.auto_map = auto_map(family(self.config.model_type))
            super().save_pretrained(save_directory, *args, **kwargs)
            write_remote_code(Path(save_directory), self.config)

    Saved.__name__ = Saved.__qualname__ = model_class.__name__
    return Saved
