"""Errors of building and running engines, of one line each."""

from surgeon.errors import SurgeonError


class EngineError(SurgeonError):
    """An engine that cannot be built as asked, is missing or damaged, or is of another bundle, version or target."""


class BuildError(EngineError):
    """TensorRT could not build an engine."""

    exit_code = 3


class LayerError(EngineError):
    """An engine whose attention fell apart into primitives, where that was not to be."""

    exit_code = 1
