"""Model cards in tests, read as the hub reads them."""

import re
from pathlib import Path

from huggingface_hub import ModelCard


def card_of(directory: Path) -> ModelCard:
    return ModelCard.load(directory / "README.md")


def section(directory: Path, heading: str) -> str:
    """The text under a heading, up to the next."""
    text: str = card_of(directory).text
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """The content of its code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
