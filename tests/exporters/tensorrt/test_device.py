"""What the library says while an engine is loaded and run: errors are kept for whoever asks why, chatter is not."""

from enum import IntEnum
from types import SimpleNamespace

from exporters.tensorrt.device import _logger


class Severity(IntEnum):
    """As TensorRT numbers them."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


def test_the_last_error_is_told_and_nothing_else() -> None:
    interface = type("ILogger", (), dict(Severity.__members__))
    logger = _logger(SimpleNamespace(ILogger=interface))
    for severity in (Severity.WARNING, Severity.INFO, Severity.VERBOSE):
        logger.log(severity, "chatter")
    assert logger.last() == "the library gave no reason"
    logger.log(Severity.ERROR, "shape  of\ninput x " + "y" * 400)
    assert logger.last().startswith("shape of input x yyy") and len(logger.last()) == 300
    logger.log(Severity.INTERNAL_ERROR, "worse")
    logger.log(Severity.INFO, "chatter")
    assert logger.last() == "worse"
