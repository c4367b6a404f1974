"""Formulas of sizes, written as data, evaluate to what the arithmetic gives."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from exporters.fusion.formula import Size, evaluate, formula
from exporters.kernels.kernel import cdiv

sizes = st.integers(0, 1000)


@given(sizes, sizes, st.sampled_from([1, 16, 64]), st.sampled_from([1, 4]))
def test_a_formula_gives_what_the_numbers_give(batch: int, length: int, block: int, splits: int) -> None:
    def grid(batch: Any, length: Any) -> Any:
        return cdiv(batch * length, block) * splits + 3

    data = json.loads(json.dumps(formula(grid(Size.of(0, 0), Size.of(2, 1)))))
    dims = {(0, 0): batch, (2, 1): length}
    assert evaluate(data, lambda place, axis: dims[place, axis]) == grid(batch, length)


def test_what_changes_nothing_is_left_out() -> None:
    size = Size.of(1, 2)
    assert formula(cdiv(size, 1) * 1 + 0) == ("dim", 1, 2)
    assert formula(2 * size) == formula(size * 2) == ("*", ("dim", 1, 2), 2)
