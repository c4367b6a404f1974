"""Classes created at run time whose instances can still be pickled and copied."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

Class = TypeVar("Class", bound=type)


class Rebuilt:
    """A base of classes that a function creates. Instances are pickled as that function and its arguments, because no
    module holds the class by name."""

    made_by: ClassVar[tuple[Callable[..., type], tuple[Any, ...]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "made_by" not in vars(type(self)):  # a subclass that somebody wrote has a name
            return super().__reduce_ex__(protocol)
        return _bare, self.made_by, self.__getstate__()


def _bare(maker: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """An instance without its state."""
    rebuilt = maker(*arguments)
    return rebuilt.__new__(rebuilt)


def named_after(base: type, patched: Class) -> Class:
    """`patched` under the name and module of `base`, by which transformers, accelerate and PEFT look for classes: FSDP
    for decoder layers to shard, device maps for what is not to be split, recorders for whose outputs to keep."""
    patched.__name__, patched.__qualname__, patched.__module__ = base.__name__, base.__qualname__, base.__module__
    return patched
