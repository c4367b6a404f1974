"""Whatever is wrong with a tokenizer, chat template or image processor, it is reported in one line."""

from pathlib import Path

import pytest

from checkpoints import has_tokenizer
from config_mutations import is_internal
from processor_mutations import broken, make_sources, outcome


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
def test_mistakes_drawn_by_a_seed_are_told_in_one_line(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    (place := tmp_path / "broken").mkdir()
    refused = 0
    for _, what in broken(sources, place, 60, seed=2):
        error = outcome(place)
        assert not is_internal(error), (what, repr(error))
        assert "\n" not in str(error)
        refused += error is not None
    assert refused > 20  # or nothing was broken
