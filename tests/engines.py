"""What engines are built of in tests: every family, every pass, both dtypes."""

from dataclasses import dataclass

from pairs import MIXIN, PLAIN, PVM

DHR = ("rope-dhr",)


@dataclass(frozen=True)
class Case:
    model_type: str
    recipe: tuple[str, ...]
    dtype: str

    def __str__(self) -> str:
        kinds = "+".join(step.partition(":")[0] for step in self.recipe)
        return f"{self.model_type} {kinds or 'plain'} {self.dtype}"


CASES = (
    Case("qwen3_vl", PVM, "float16"),
    Case("qwen2_5_vl", PVM, "bfloat16"),
    Case("internvl", MIXIN + PVM + DHR, "bfloat16"),
    Case("ovis2", MIXIN, "float16"),
    Case("llava_onevision", PLAIN, "float16"),
)
