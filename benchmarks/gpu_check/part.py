"""The settings and the report of every part."""

import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks._measure import Report, Spread

T = TypeVar("T")
_VERSIONS = ("triton", "numpy", "safetensors", "tensorrt-rtx", "tensorrt")
NOT_MEASURED = "not measured: a rehearsal"


class Skipped(Exception):
    """A part, or what is left of it, cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Setting:
    dry: bool
    """A rehearsal: the CPU, small sizes, kernels interpreted, timers that run everything once, nothing written."""
    out: Path

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def pick(self, real: T, rehearsed: T) -> T:
        return rehearsed if self.dry else real


class PartReport(Report):
    """A report that is written after every figure, so that a part that is killed keeps what it had. In a rehearsal it
    names its figures without their values and writes nothing."""

    def __init__(self, part: str, setting: Setting, gpu: Mapping[str, Any], ceilings: Mapping[str, Any]) -> None:
        self.setting = setting
        super().__init__(f"gpu-check {part}", {"part": part})
        for name in _VERSIONS:
            if importlib.util.find_spec(name.replace("-", "_")) is not None:
                try:
                    self.content["machine"]["versions"][name] = importlib.metadata.version(name)
                except importlib.metadata.PackageNotFoundError:
                    continue
        self.content |= {"gpu": dict(gpu), "ceilings": dict(ceilings), "complete": False}
        self.path = setting.out / f"{gpu['slug']}-{part}.json"
        for name, value in ceilings.items():
            print(f"  ceiling, {name}: {NOT_MEASURED if setting.dry else f'{value:,.5g}'}")

    def figure(self, name: str, value: Any, unit: str = "") -> None:
        if self.setting.dry:
            print(f"  {name}: ({NOT_MEASURED})", flush=True)
            return
        super().figure(name, value, unit)
        self.save()

    def check(self, name: str, value: Spread | float | int, relation: str, target: float, unit: str = "") -> None:
        if self.setting.dry:
            print(f"  {name}, target {relation} {target:g} {unit}: ({NOT_MEASURED})", flush=True)
            return
        super().check(name, value, relation, target, unit)
        self.save()

    def note(self, name: str, content: Any) -> None:
        """What is kept beside the figures, JSON; nothing is printed."""
        self.content.setdefault("notes", {})[name] = content
        self.save()

    def save(self, complete: bool = False) -> None:
        self.content["complete"] = complete
        if not self.setting.dry:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
            if complete:
                print(f"  written to {self.path}")


def difference(above: Spread, below: Spread) -> Spread:
    """Of two things measured in turns, repetition by repetition."""
    return Spread(tuple(a - b for a, b in zip(above.values, below.values, strict=True)))
