"""A patched demo model answers the same with its kernels, interpreted, as without them."""

from pathlib import Path
from typing import Any

import torch

from exporters.kernels.cuda import mixin, pvm
from patching import apply
from surgeon import models
from surgeon.inputs import Inputs, Prompt
from surgeon.memory.graft import Graft

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo"
STEPS = 3


class Kernels:
    """A form that calls what the operators are on a GPU, and counts."""

    devices: tuple[str, ...] = ("cpu",)

    def __init__(self, module: Any, kind: str) -> None:
        self.module, self.kind, self.calls = module, kind, 0

    def forward(
        self, graft: Any, hidden_states: Any, keys: Any, values: Any, mask: Any, visual: Any, rotary: Any, residual: Any
    ) -> torch.Tensor:
        self.calls += 1
        if self.kind == "mixin":
            return mixin.fused(hidden_states, keys, values, mask, *rotary, *graft.weights(), graft.eps)
        return pvm.fused(hidden_states, keys, values, mask, visual, *graft.weights(), graft.eps, residual)

    def project(self, graft: Any, visual_embeds: Any, rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module.fused_memory(visual_embeds, *(rotary or ()), *graft.memory_weights(), graft.eps)


def test_greedy_tokens_are_the_same(tmp_path: Path) -> None:
    checkpoint = tmp_path / "patched"
    apply(DEMO / "qwen3-vl-tiny", checkpoint, "pvm:layers=3,latent=32", "mixin:layers=5,num_heads=2,intermediate=64")
    model: Any = models.load(checkpoint, dtype=torch.float32)
    grafts = [module for module in model.modules() if isinstance(module, Graft)]
    torch.manual_seed(0)
    with torch.no_grad():
        for graft in grafts:
            for name, parameter in graft.named_parameters():
                parameter.fill_(0.6) if name in graft.gates else parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = Inputs.from_directory(checkpoint)
    image = DEMO / "images" / "red-triangle-green-circle.png"
    prompt = inputs.prepare([Prompt("Describe the picture.", [image]), Prompt("Hello")])

    def answer() -> Any:
        return model.generate(
            **prompt.model_kwargs(),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    with torch.inference_mode():
        want = answer()
        forms = {"pvm": Kernels(pvm, "pvm"), "mixin": Kernels(mixin, "mixin")}
        for graft in grafts:
            graft.fused = forms[graft.kind]
        got = answer()
    assert forms["pvm"].calls == STEPS and forms["mixin"].calls == STEPS
    assert torch.equal(got.sequences, want.sequences)
    for logits, expected in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
