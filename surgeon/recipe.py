"""Recipes: a YAML file <-> passes with options; and the short form of the command line."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgeon.errors import OptionError
from surgeon.pipeline import Pass, Registry, make_pass

FILE_NAME = "surgeon-recipe.yaml"


class Recipe(BaseModel):
    """What is done to a checkpoint. `passes`: one `{name: options}` each, in order."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    passes: list[dict[str, dict[str, Any] | None]]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Raises OptionError for a file that is missing, not YAML, or not a recipe."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise OptionError(f"recipe {path} does not exist") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise OptionError(f"recipe {path} is not readable YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise OptionError(f"recipe {path} is not a recipe: expected a mapping with the key 'passes'")
        try:
            recipe = cls(**content)
        except ValidationError as error:
            first = error.errors()[0]
            location = ".".join(str(part) for part in first["loc"])
            raise OptionError(f"recipe {path}: {location}: {first['msg']}; keys are version, seed, passes") from error
        if recipe.version != 1:
            raise OptionError(f"recipe {path} has version {recipe.version}; this version of surgeon reads version 1")
        if any(len(entry) != 1 for entry in recipe.passes):
            raise OptionError(f"recipe {path}: each entry of passes is one pass name with its options")
        return recipe

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], seed: int = 0) -> "Recipe":
        """From `name:key=value,key=value` arguments; a value may hold commas (`layers=8,16,24,latent=512`)."""
        return cls(seed=seed, passes=[parse_argument(argument) for argument in arguments])

    def make_passes(self, registry: Registry) -> list[Pass]:
        return [make_pass(registry, name, options or {}) for entry in self.passes for name, options in entry.items()]

    def dump(self) -> str:
        """The recipe as YAML."""
        header = "# Reproduces this checkpoint bit for bit: surgeon patch SOURCE OUT -r surgeon-recipe.yaml\n"
        return header + yaml.safe_dump(self.model_dump(), sort_keys=False, default_flow_style=None)


def parse_argument(argument: str) -> dict[str, dict[str, Any] | None]:
    """`pvm:layers=8,16,24,latent=512` -> `{"pvm": {"layers": "8,16,24", "latent": "512"}}`."""
    name, _, rest = argument.partition(":")
    options: dict[str, str] = {}
    last = None
    for piece in filter(None, rest.split(",")):
        key, equals, value = piece.partition("=")
        if equals:
            if key.strip() in options:
                raise OptionError(f"--pass {argument}: option {key.strip()!r} is given twice")
            last = key.strip()
            options[last] = value.strip()
        elif last is None:
            raise OptionError(f"--pass {argument}: expected name:option=value,..., found {piece!r}")
        else:
            options[last] += "," + piece.strip()
    return {name.strip(): dict(options)}


def argument_of(name: str, options: Mapping[str, Any]) -> str | None:
    """The reverse of `parse_argument`, where options that are None are left out; None where the short form cannot say
    it."""
    values = {key: _short(value) for key, value in options.items() if value is not None}
    argument = f"{name}:{','.join(f'{key}={value}' for key, value in values.items())}" if values else name
    try:
        return argument if parse_argument(argument) == {name: values} else None
    except OptionError:
        return None


def _short(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list):
        parts = [_short(part) for part in value]
        return None if None in parts else ",".join(map(str, parts))
    return None


def value_text(value: Any) -> str:
    """An option's value. Of a long list, such as the axis of each rotary frequency, how many of each there are."""
    if not isinstance(value, list):
        return str(value)
    if len(value) <= 16:
        return ", ".join(map(str, value))
    return f"({len(value)} values: {', '.join(f'{count} x {each}' for each, count in sorted(Counter(value).items()))})"
