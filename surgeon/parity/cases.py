"""What is asked of both runners: images and prompts that cover what a model does, or the user's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.inputs import Prompt

IMAGES = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """One batch of prompts."""

    name: str
    prompts: tuple[Prompt, ...]


def default_cases() -> list[Case]:
    """One image; three images in one prompt; text alone; a batch whose rows have one, none and two."""
    chart, landscape, page = (IMAGES / f"{name}.png" for name in ("chart", "landscape", "page"))
    describe = Prompt("Describe the picture in detail.", (chart,))
    return [
        Case("one image", (describe,)),
        Case("three images", (Prompt("Describe each picture.", (chart, landscape, page)),)),
        Case("text only", (Prompt("Hello! What can you do?"),)),
        Case(
            "batch",
            (describe, Prompt("Hello!"), Prompt("What is the difference between these pictures?", (page, landscape))),
        ),
    ]


def own_case(images: Sequence[Path], prompt: str | None) -> list[Case]:
    """The user's images with the user's prompt."""
    return [Case("yours", (Prompt(prompt or "Describe the picture in detail.", tuple(images)),))]
