"""Language models on Apple Silicon through MLX, and well where there is no Apple GPU.

    from mlx_edge import load, generate
    model, tokenizer = load()                     # the bundled model; or a folder, or a hub id
    print(generate(model, tokenizer, "Once upon a time"))

These are the public names. Importing the package is cheap: MLX is loaded when one of them is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlx_edge.errors import (
    EngineClosedError,
    HardwareNotSupportedError,
    InvalidRequestError,
    MemoryBudgetError,
    MLXEdgeError,
    ModelFormatError,
    QueueFullError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from mlx_edge.decoding.batch import batch_generate as batch_generate
    from mlx_edge.decoding.multimodal import MultimodalGenerator as MultimodalGenerator
    from mlx_edge.decoding.processors import make_logits_processors as make_logits_processors
    from mlx_edge.decoding.sampling import make_sampler as make_sampler
    from mlx_edge.decoding.stream import GenerationResponse as GenerationResponse
    from mlx_edge.decoding.stream import generate as generate
    from mlx_edge.decoding.stream import stream_generate as stream_generate
    from mlx_edge.engine.blocking import BlockingEngine as BlockingEngine
    from mlx_edge.engine.config import EngineConfig as EngineConfig
    from mlx_edge.engine.engine import Engine as Engine
    from mlx_edge.engine.request import Completion as Completion
    from mlx_edge.engine.request import Grammar as Grammar
    from mlx_edge.engine.request import Request as Request
    from mlx_edge.engine.request import Sampling as Sampling
    from mlx_edge.models.load import load as load

_HOMES = {
    "BlockingEngine": "mlx_edge.engine.blocking",
    "Completion": "mlx_edge.engine.request",
    "Engine": "mlx_edge.engine.engine",
    "EngineConfig": "mlx_edge.engine.config",
    "GenerationResponse": "mlx_edge.decoding.stream",
    "Grammar": "mlx_edge.engine.request",
    "MultimodalGenerator": "mlx_edge.decoding.multimodal",
    "Request": "mlx_edge.engine.request",
    "Sampling": "mlx_edge.engine.request",
    "batch_generate": "mlx_edge.decoding.batch",
    "generate": "mlx_edge.decoding.stream",
    "load": "mlx_edge.models.load",
    "make_logits_processors": "mlx_edge.decoding.processors",
    "make_sampler": "mlx_edge.decoding.sampling",
    "stream_generate": "mlx_edge.decoding.stream",
}

__version__ = "0.1.0"

__all__ = [
    "BlockingEngine",
    "Completion",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "GenerationResponse",
    "Grammar",
    "HardwareNotSupportedError",
    "InvalidRequestError",
    "MLXEdgeError",
    "MemoryBudgetError",
    "ModelFormatError",
    "MultimodalGenerator",
    "QueueFullError",
    "Request",
    "Sampling",
    "UnsupportedModelError",
    "__version__",
    "batch_generate",
    "generate",
    "load",
    "make_logits_processors",
    "make_sampler",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mlx_edge' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """This package. A command's module, when it is imported, does not hide the function of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
