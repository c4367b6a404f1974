"""What a request remembers of a row so that memory can be formed, as `surgeon.memory.invoked_memory` does in torch."""

from dataclasses import dataclass, field

import numpy as np

from surgeon.families import Grid
from surgeon.memory.vismem import evenly_spaced


@dataclass
class Remembered:
    """Hidden states of a row's images and of its latest text, and its images. Columns count the row's own tokens."""

    window: int
    """Tokens of text that a query is built of at most."""
    most_visual: int
    """Hidden states of images that a query is built of at most."""
    length: int = 0
    since: int = 0
    """The column of the last end token, or the first of all."""
    visual: list[np.ndarray] = field(default_factory=list)
    text: list[np.ndarray] = field(default_factory=list)
    text_columns: list[np.ndarray] = field(default_factory=list)
    images: list[tuple[np.ndarray, Grid]] = field(default_factory=list)
    """Pixel values and grid, as `Family.process_image` gives them."""

    forming_seconds: list[float] = field(default_factory=list)
    """How long the memory of each invocation took to form."""

    def add(self, hidden_states: np.ndarray, is_visual: np.ndarray, is_text: np.ndarray) -> None:
        """The row's next tokens: hidden_states fp32 [n, d]; is_visual, is_text bool [n]."""
        columns = self.length + np.arange(len(hidden_states))
        if is_visual.any():
            self.visual.append(hidden_states[is_visual])
        kept = np.flatnonzero(is_text)[-self.window :]
        if len(kept):
            self.text.append(hidden_states[kept])
            self.text_columns.append(columns[kept])
        self.length += len(hidden_states)
        if len(self.text) > 2 * self.window:
            self._join()

    def seen_and_said(self) -> np.ndarray:
        """H, fp32 [L, d]: of the images as many, evenly spaced, as a query is built of, and the text since the last
        invocation, the latest of it."""
        self._join()
        parts = []
        if self.visual:
            self.visual = [np.concatenate(self.visual)]
            visual = self.visual[0]
            parts.append(
                visual[evenly_spaced(len(visual), self.most_visual)] if len(visual) > self.most_visual else visual
            )
        if self.text:
            parts.append(self.text[0][self.text_columns[0] >= self.since])
        return np.concatenate(parts)

    def _join(self) -> None:
        if self.text:
            latest = slice(-self.window, None)
            self.text = [np.concatenate(self.text)[latest]]
            self.text_columns = [np.concatenate(self.text_columns)[latest]]
