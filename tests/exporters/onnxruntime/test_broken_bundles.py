"""Whatever is wrong with a bundle's files, it is reported in one line."""

from collections.abc import Callable
from pathlib import Path

from bundle_mutations import broken, outcome
from config_mutations import is_internal
from pairs import Pair


def test_mistakes_drawn_by_a_seed_are_told_in_one_line(export: Callable[..., Pair], tmp_path: Path) -> None:
    refused = 0
    for _, what in broken({"qwen3_vl": export("qwen3_vl").bundle}, tmp_path / "broken", 12, seed=3):
        error = outcome(tmp_path / "broken")
        assert not is_internal(error), (what, repr(error))
        assert "\n" not in str(error)
        refused += error is not None
    assert refused > 6  # or nothing was broken
