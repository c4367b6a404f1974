"""Errors that a user can act on: each message says what was wrong, what was found and what to do."""


class SurgeonError(Exception):
    """An error in the user's request or input, with a one-line message. The command line prints it and exits with
    `exit_code`."""

    exit_code = 2


class CheckpointError(SurgeonError):
    """A checkpoint that is missing, damaged, or not what its index or config says."""


class FamilyError(SurgeonError):
    """A model family that is not supported."""


class OptionError(SurgeonError):
    """A recipe, pass or option that does not exist or has an unusable value."""


class TargetError(SurgeonError):
    """An output that cannot be written where it was asked for."""


class InputError(SurgeonError):
    """An image or prompt that cannot be used."""


class BundleError(SurgeonError):
    """A bundle that is missing, damaged, or cannot do what was asked of it."""


class TooLongError(BundleError):
    """A prompt, with what is to follow it, that is longer than what the model was exported for."""
