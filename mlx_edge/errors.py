"""The exceptions that mlx_edge raises on purpose. A message says what was found, what was expected and what to do.

    MLXEdgeError
    ├── ModelFormatError            a file or a value in a model folder is broken, missing or contradicts another
    ├── UnsupportedModelError       the model is sound, but asks for mathematics that this runtime does not have
    ├── HardwareNotSupportedError   this machine lacks what was asked for by name
    ├── MemoryBudgetError           the request would not fit into the memory that it may use
    ├── InvalidRequestError         a prompt, an option or an argument that cannot be served
    ├── QueueFullError              more requests are waiting than the engine lets wait; come back later
    └── EngineClosedError           the engine is closing or closed, and takes no more requests

The command line turns every one of them into one line and exit code 2.
"""


class MLXEdgeError(Exception):
    """Base of all errors that a user can cause and mend."""


class ModelFormatError(MLXEdgeError):
    """A model folder holds a broken, missing or contradictory file, tensor or value."""


class UnsupportedModelError(MLXEdgeError):
    """A well-formed model needs something that this runtime does not compute."""


class HardwareNotSupportedError(MLXEdgeError):
    """A device or kernel was asked for by name and cannot run on this machine."""


class MemoryBudgetError(MLXEdgeError):
    """A request needs more memory than it may use."""


class InvalidRequestError(MLXEdgeError):
    """A prompt, an option or an argument is outside what can be served."""


class QueueFullError(MLXEdgeError):
    """As many requests as may wait are waiting already."""


class EngineClosedError(MLXEdgeError):
    """The engine takes no more requests, or was closed before this one ended."""
