"""Errors that a user can act on: each message names the value, the expectation and the way out."""


class SPFastError(ValueError):
    """Base class of the package's own errors."""


class ConfigError(SPFastError):
    """A projector configuration that cannot be built."""


class CheckpointError(SPFastError):
    """A checkpoint that cannot be loaded as a projector, whole and unchanged."""


class OfficialModelError(SPFastError):
    """A model of the official code that cannot be accelerated, or no longer is what was accelerated."""


class ImageError(SPFastError):
    """An image that cannot be read, or that is too large to decode safely."""


class BackendError(SPFastError):
    """A backend was forced that cannot run here."""


class ResourceError(SPFastError):
    """The machine lacks the memory that a command needs."""


class DataError(SPFastError):
    """Training data that cannot be used: a file, or a sample, which is named by its id."""


class TrainingError(SPFastError):
    """A training run that cannot begin, go on, or be resumed."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
