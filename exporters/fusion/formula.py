"""Sizes that depend on a node's inputs, as data: a number, ["dim", input, axis], or ["+" | "*" | "//", a, b]."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Formula = Any
"""JSON."""
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {"+": operator.add, "*": operator.mul, "//": operator.floordiv}


@dataclass(frozen=True)
class Size:
    """A formula under construction, by arithmetic with numbers and other sizes."""

    formula: Formula

    @classmethod
    def of(cls, place: int, axis: int) -> "Size":
        return cls(("dim", place, axis))

    def __add__(self, other: "Size | int") -> "Size":
        return self if other == 0 else self._with("+", other)

    def __mul__(self, other: "Size | int") -> "Size":
        return self if other == 1 else self._with("*", other)

    def __floordiv__(self, other: "Size | int") -> "Size":
        return self if other == 1 else self._with("//", other)

    def __radd__(self, other: int) -> "Size":
        return self + other

    def __rmul__(self, other: int) -> "Size":
        return self * other

    def _with(self, operation: str, other: "Size | int") -> "Size":
        return Size((operation, self.formula, formula(other)))


def formula(size: "Size | int") -> Formula:
    return size.formula if isinstance(size, Size) else size


def evaluate(
    expression: Formula,
    dimension: Callable[[int, int], Any],
    number: Callable[[int], Any] = int,
    apply: Callable[[str, Any, Any], Any] = lambda operation, a, b: OPERATIONS[operation](a, b),
) -> Any:
    """A formula's value, of whatever type the functions give: numbers, or a library's own expressions."""
    if isinstance(expression, int):
        return number(expression)
    if expression[0] == "dim":
        return dimension(expression[1], expression[2])
    a, b = (evaluate(operand, dimension, number, apply) for operand in expression[1:])
    return apply(expression[0], a, b)
