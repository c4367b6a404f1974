"""What engines are built of in tests: every family, every pass, both dtypes, both visibilities of the memory."""

from dataclasses import dataclass

from pairs import MIXIN, PLAIN, PVM, VISMEM
from surgeon.memory.visibility import Visibility

DHR = ("rope-dhr",)
ONE_OF_EACH = ("mixin:layers=1,num_heads=3,intermediate=48,rope_theta=5000", "pvm:layers=2,latent=32")


@dataclass(frozen=True)
class Case:
    model_type: str
    recipe: tuple[str, ...]
    dtype: str
    visibility: Visibility | None = None

    def __str__(self) -> str:
        kinds = "+".join(step.partition(":")[0] for step in self.recipe)
        return " ".join(filter(None, (self.model_type, kinds or "plain", self.dtype, self.visibility)))


CASES = (
    Case("qwen3_vl", (*PVM, *VISMEM), "float16", "causal"),
    Case("qwen2_5_vl", ONE_OF_EACH, "bfloat16", "causal"),
    Case("internvl", MIXIN + PVM + DHR, "bfloat16", "all"),
    Case("ovis2", MIXIN, "float16", "causal"),
    Case("llava_onevision", PLAIN, "float16"),
)
