"""The bridge: an architecture that is not defined here, run by mlx-lm's definition inside our loop.

mlx-lm is an optional package, imported when a bridged model is loaded. It builds the model and reads the weights;
config.json and the headers of the weight files are checked here before it sees them. No code from a model folder
is ever executed. Knows no architecture.
"""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_edge.cache import RowFormat
from mlx_edge.errors import (
    InvalidRequestError,
    MLXEdgeError,
    ModelFormatError,
    UnsupportedModelError,
)
from mlx_edge.models.config import MAX_LAYERS, read_json_object
from mlx_edge.models.fields import Fields
from mlx_edge.models.rope import MAX_CONTEXT
from mlx_edge.runtime import convert_float
from mlx_edge.text.message import one_line
from mlx_edge.weights import Checkpoint, LoadReport

logger = logging.getLogger(__name__)

BRIDGES = ("mlx-lm",)
KEPT_PREFIX = 4  # what mlx-lm's rotating cache never drops
# How the families spell the positions that they were made for.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)


@dataclass(frozen=True)
class BridgedConfig:
    """What the loop needs to know; mlx-lm reads the rest itself."""

    model_type: str
    vocab_size: int
    context_size: int  # MAX_CONTEXT where config.json states none: such a model has no positions


@dataclass
class BridgedCache:
    """One layer's cache of mlx-lm, counted here because some of its kinds do not count."""

    inner: Any
    offset: int = 0  # positions stored

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate after a step."""
        return _find_arrays(self.inner.state)

    @property
    def num_trimmable(self) -> int:
        """How many positions the next step may bring that `trim` could take back; 0 where it cannot."""
        if not self.inner.is_trimmable():
            return 0
        # A ring of mlx-lm can be trimmed until it is full.
        max_size = getattr(self.inner, "max_size", None)
        return MAX_CONTEXT if max_size is None else max(0, max_size - self.offset - 1)

    @property
    def num_until_packed(self) -> int:
        """0: mlx-lm's caches are not quantized here."""
        return 0

    def reserve(self, capacity: int) -> None:
        """Nothing: mlx-lm's caches grow by themselves."""

    def trim(self, count: int) -> None:
        """Forget the newest `count` positions.

        Raises: InvalidRequestError for more than are stored, or a kind of cache that cannot go back.
        """
        if not 0 <= count <= self.offset or (count and not self.inner.is_trimmable()):
            raise InvalidRequestError(
                f"{count} of {self.offset} positions cannot be forgotten by mlx-lm's {type(self.inner).__name__}"
            )
        if count:
            self.inner.trim(count)
        self.offset -= count

    def fork(self, length: int | None = None) -> "BridgedCache":
        """Never.

        Raises: InvalidRequestError: mlx-lm's caches are written in place, in ways of each kind's own.
        """
        raise InvalidRequestError(
            f"mlx-lm's {type(self.inner).__name__} cannot be forked; process the text anew in a new cache"
        )


@dataclass(frozen=True)
class BridgedModel:
    """A model of mlx-lm with the face of our decoder: tokens in, logits out."""

    config: BridgedConfig
    load_report: LoadReport
    module: Any = field(repr=False)  # mlx-lm's, an mlx.nn.Module

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[BridgedCache] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        logits_to_keep: int | None = None,
    ) -> mx.array:
        """Logits (B, L, V) of the int32 tokens (B, L) that follow what the cache holds; they are stored in it.

        Raises: InvalidRequestError for `lengths`: mlx-lm's definitions know no rows of different lengths.
        """
        if lengths is not None:
            raise InvalidRequestError(
                f"{self.config.model_type} runs by mlx-lm's definition, which takes no rows of different lengths; "
                "generate one prompt at a time"
            )
        if cache is None:
            cache = self.make_cache()
        surplus = 0 if logits_to_keep is None else tokens.shape[1] - logits_to_keep
        # A definition gives logits for all columns; those of a call that nobody reads cost nothing.
        if surplus > 0:
            self(tokens[:, :surplus], cache)
            tokens = tokens[:, surplus:]
        logits: mx.array = self.module(tokens, cache=[layer.inner for layer in cache])
        for layer in cache:
            layer.offset += tokens.shape[1]
        return logits

    def check_unchanged(self) -> None:
        """Nothing: mlx-lm has read its files to the end."""

    def make_cache(
        self,
        capacity: int = 0,
        *,
        max_kv_size: int | None = None,
        row_format: RowFormat | None = None,
        float_until: int = 0,
    ) -> list[BridgedCache]:
        """An empty cache per layer, of the kinds that the definition asks for; `capacity` is of no use here.

        With `max_kv_size` it is mlx-lm's rotating cache: what a longer prompt gives depends there on its chunks.

        Raises: InvalidRequestError for a `row_format`, and for a `max_kv_size` that is too small or that a
        definition with caches of its own would ignore.
        """
        name = self.config.model_type
        if row_format is not None:
            raise InvalidRequestError(
                f"{name} runs by mlx-lm's definition, whose caches are not quantized here; leave out kv-bits"
            )
        if max_kv_size is not None and hasattr(self.module, "make_cache"):
            raise InvalidRequestError(
                f"mlx-lm's definition of {name} makes caches of its own, which max_kv_size does not limit; leave it out"
            )
        if max_kv_size is not None and max_kv_size <= KEPT_PREFIX:
            raise InvalidRequestError(
                f"max_kv_size is {max_kv_size}, expected more than the {KEPT_PREFIX} positions always kept"
            )
        return [BridgedCache(inner) for inner in _make_inner_caches(self.module, max_kv_size)]


def load_bridged(folder: Path, *, lazy: bool = False) -> BridgedModel:
    """The model in a folder, by mlx-lm's definition of its `model_type`; says so in a warning.

    `lazy` leaves the weights to be read by the first step.

    Raises: InvalidRequestError without mlx-lm, UnsupportedModelError for what mlx-lm does not define either or for a
    folder that brings its own code, ModelFormatError for one that is broken or that the definition does not fit.
    """
    path = folder / "config.json"
    fields = Fields(read_json_object(path), str(path))
    model_type = _check_config(fields)
    context_size = _read_context_size(fields)
    with Checkpoint.open(folder) as checkpoint:
        report = checkpoint.report  # headers are sound; the tensors are read by mlx-lm
    utils = _import_mlx_lm("mlx_lm.utils")
    start = time.perf_counter()
    try:
        module, _ = utils.load_model(folder, lazy=True, get_model_classes=_find_classes)
        module.apply(_convert)
        vocab_size = _measure_vocabulary(module)
        if not lazy:
            mx.eval(_module_arrays(module))
    except MLXEdgeError:
        raise
    except (
        Exception
    ) as error:  # a foreign definition fails in any way it likes on values that do not fit
        raise ModelFormatError(
            f"{folder}: mlx-lm's definition of {model_type} does not fit these files: {_describe(error)}"
        ) from None
    logger.warning("%s: %s runs by mlx-lm's definition", folder, model_type)
    report = replace(
        report,
        copied_bytes=0 if lazy else report.total_bytes,
        materialise_s=time.perf_counter() - start,
        reasons=("read by mlx-lm",),
    )
    return BridgedModel(BridgedConfig(model_type, vocab_size, context_size), report, module)


def _check_config(fields: Fields) -> str:
    """The model type, once nothing in the configuration would run code or run for ever."""
    model_type = fields.string("model_type")
    # It becomes part of a module's name.
    if not re.fullmatch(r"[A-Za-z0-9_-]+", model_type):
        raise UnsupportedModelError(f"{fields.name}: model_type {model_type!r} is not a name")
    if fields.raw.get("model_file") is not None:
        raise UnsupportedModelError(
            f"{fields.name}: model_file {fields.raw['model_file']!r} is code in the model folder, which is never run; "
            "remove the key if mlx-lm defines this model_type itself"
        )
    if fields.raw.get("activation_quantization") is not None:
        raise UnsupportedModelError(
            f"{fields.name}: activation_quantization rounds the inputs of layers, which mlx-lm does not do; "
            "load the model without a bridge, or remove the key"
        )
    fields.integer("num_hidden_layers", 1, high=MAX_LAYERS)
    _check_packing(fields.nested("quantization"))
    return model_type


def _check_packing(fields: Fields | None) -> None:
    """Refuse group sizes and bits, also those of single layers, by which MLX would divide: a zero ends the process."""
    if fields is None:
        return
    fields.integer("group_size", 1, high=1 << 16)
    fields.integer("bits", 1, high=64)
    for key, value in fields.raw.items():
        if isinstance(value, dict):
            _check_packing(fields.nested(key))


def _read_context_size(fields: Fields) -> int:
    """The positions that the model was made for; for one that also sees, those of its text part."""
    text = fields.nested("text_config")
    for part in [fields, text] if text else [fields]:
        for key in CONTEXT_KEYS:
            if part.raw.get(key) is not None:
                return part.integer(key, high=MAX_CONTEXT)
    return MAX_CONTEXT


def _import_mlx_lm(name: str) -> Any:
    """A module of mlx-lm.

    Raises: InvalidRequestError where it cannot be imported.
    """
    try:
        return import_module(name)
    except (
        ImportError,
        ValueError,
        OSError,
    ) as error:  # it also sets a limit of the process, which may be refused
        raise InvalidRequestError(
            f"the bridge needs mlx-lm, which cannot be imported ({_describe(error)}): pip install 'mlx-edge[bridge]'"
        ) from None


def _find_classes(config: Mapping[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes of a model and its arguments, as its loader finds them."""
    utils = _import_mlx_lm("mlx_lm.utils")
    try:
        model, arguments = utils._get_classes(config)
    except (ValueError, AttributeError):
        version = _import_mlx_lm("mlx_lm").__version__
        raise UnsupportedModelError(
            f"model_type {config['model_type']!r} is not defined by mlx-lm {version} either"
        ) from None
    return model, arguments


def _make_inner_caches(module: Any, max_kv_size: int | None = None) -> list[Any]:
    caches: list[Any] = _import_mlx_lm("mlx_lm.models.cache").make_prompt_cache(module, max_kv_size)
    return caches


def _convert(array: mx.array) -> mx.array:
    """A float in the dtype that this machine computes in; packed weights stay as they are."""
    return convert_float(array) if mx.issubdtype(array.dtype, mx.floating) else array


def _measure_vocabulary(module: Any) -> int:
    """The width of the logits, which shows as well that the definition can be called; computes nothing."""
    logits = module(mx.array([[0]], dtype=mx.int32), cache=_make_inner_caches(module))
    return int(logits.shape[-1])


def _module_arrays(module: Any) -> list[mx.array]:
    """Parameters and the tables beside them, as RoPE's: what stays lazy can be used in this thread only."""
    return [array for part in module.modules() for array in _find_arrays(list(part.values()))]


def _find_arrays(state: Any) -> list[mx.array]:
    """The arrays in nested lists and tuples, which also hold numbers and None."""
    if isinstance(state, mx.array):
        return [state]
    if isinstance(state, list | tuple):
        return [array for part in state for array in _find_arrays(part)]
    return []


def _describe(error: Exception) -> str:
    """A foreign error in one line; a KeyError alone would say no more than the key."""
    return f"{type(error).__name__}: {one_line(error)}"
