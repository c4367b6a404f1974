"""surgeon: surgery on pretrained vision-language models, proof that it did no damage, and export.

    model = surgeon.graft("Qwen3-VL-8B-Instruct", surgeon.PVM(layers=[8, 16, 24], latent=512))
    surgeon.unfreeze_grafts(model)
    ...  # train
    surgeon.save(model, "trained", "Qwen3-VL-8B-Instruct")
    surgeon.validate("Qwen3-VL-8B-Instruct", "trained").verdict
    surgeon.export("trained", "bundle", dtype=torch.bfloat16, max_length=8192)
    surgeon.generate("bundle", "What does the chart show?", ["chart.png"]).text

Everything is imported when it is first used: torch and transformers take seconds. The rest is in docs/usage.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

from surgeon.version import __version__

if TYPE_CHECKING:
    from exporters.export import export_bundle as export
    from exporters.generation import generate, stream
    from exporters.validation.validate import validate_pair as validate
    from passes.memory_tokens import MemoryTokens
    from passes.mixin import Mixin
    from passes.pvm import PVM
    from passes.rope_dhr import RopeDHR
    from surgeon.generation import Sampling
    from surgeon.live import graft, graft_parameters, unfreeze_grafts
    from surgeon.models import load
    from surgeon.saving import save

_PUBLIC = {
    "load": "surgeon.models:load",
    "graft": "surgeon.live:graft",
    "graft_parameters": "surgeon.live:graft_parameters",
    "unfreeze_grafts": "surgeon.live:unfreeze_grafts",
    "save": "surgeon.saving:save",
    "PVM": "passes.pvm:PVM",
    "Mixin": "passes.mixin:Mixin",
    "RopeDHR": "passes.rope_dhr:RopeDHR",
    "MemoryTokens": "passes.memory_tokens:MemoryTokens",
    "validate": "exporters.validation.validate:validate_pair",
    "export": "exporters.export:export_bundle",
    "generate": "exporters.generation:generate",
    "stream": "exporters.generation:stream",
    "Sampling": "surgeon.generation:Sampling",
}
"""What stands here for what is used from Python, wherever it is."""

__all__ = [
    "PVM",
    "MemoryTokens",
    "Mixin",
    "RopeDHR",
    "Sampling",
    "__version__",
    "export",
    "generate",
    "graft",
    "graft_parameters",
    "load",
    "save",
    "stream",
    "unfreeze_grafts",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'surgeon' has no attribute {name!r}; there are {', '.join(sorted(_PUBLIC))}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
