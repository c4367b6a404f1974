"""The arithmetic of launches."""

import pytest

from exporters.kernels.kernel import cdiv, chains_of, power_of_two


@pytest.mark.parametrize("least", [1, 16])
def test_the_smallest_power_of_two_that_holds_a_size(least: int) -> None:
    powers = [2**n for n in range(12)]
    for size in range(1, 1025):
        assert power_of_two(size, least) == next(p for p in powers if p >= max(size, least))


def test_blocks_cover_a_size_with_none_to_spare() -> None:
    for size in range(1, 70):
        for block in (1, 16, 64):
            assert (cdiv(size, block) - 1) * block < size <= cdiv(size, block) * block


def test_chains_are_found_by_the_kind_of_graft() -> None:
    for kind in ("pvm", "mixin"):
        chains = chains_of(kind)
        assert chains is not None
        assert chains.attend(1e-6).name == kind and chains.write_memory(1e-6, 32).name == f"{kind}_memory"
    assert chains_of("attend") is None and chains_of("no such") is None  # a kernel of its own, and nothing
