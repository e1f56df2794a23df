"""Saved prompt caches: what a model remembers of a prompt, in one safetensors file, with mlx-lm's names.

Here and not in `cache/`, because only this floor may look at both sides: a file is written by `weights/`, and
whether it belongs to a model is said by the model. A file tells its format, the model and the chat template by
their fingerprints, and the tokens; loading trusts nothing of it before it was compared. Knows no command line.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn, Protocol, overload

import mlx.core as mx
import numpy as np

from mlx_edge import ops
from mlx_edge.cache import AnyKVCache, CacheFacts, CacheState, KVCache
from mlx_edge.errors import InvalidRequestError, MLXEdgeError, ModelFormatError
from mlx_edge.models.decoder import KEPT_PREFIX, Decoder, find_weights
from mlx_edge.runtime import own_version
from mlx_edge.text.tokenizer_config import read_tokenizer_config
from mlx_edge.weights import SafetensorsFile, TensorEntry, write_safetensors
from mlx_edge.weights.dtypes import ELEMENT_TYPES

FORMAT = "mlx_edge prompt cache"
FORMAT_VERSION = "1"
NO_TEMPLATE = "none"  # instead of a fingerprint: the prompt was stored as it is
MAKE_AGAIN = "make it again with python -m mlx_edge.cache_prompt"

_DESCRIBED = ("fingerprint", "chat_template", "tokens")  # what `describe_prompt` says
_WRITTEN = ("format", "format_version", "mlx_edge_version", "caches")  # what saving adds


def describe_prompt(
    model: Decoder,
    tokens: Sequence[Sequence[int]],
    *,
    uses_chat_template: bool = False,
    name: str | None = None,
    revision: str | None = None,
) -> dict[str, str]:
    """The metadata of a prompt cache: to whom it belongs, and the tokens stored, per row of the batch.

    `name` and `revision` are what to load when nobody names a model.
    """
    template = fingerprint_template(model) if uses_chat_template else NO_TEMPLATE
    described = {
        "fingerprint": fingerprint_model(model),
        "chat_template": template,
        "tokens": json.dumps([[int(token) for token in row] for row in tokens]),
    }
    named = {"model": name, "revision": revision}
    return described | {key: value for key, value in named.items() if value is not None}


def save_prompt_cache(
    path: str | Path, caches: Sequence[AnyKVCache], metadata: Mapping[str, str]
) -> None:
    """Write what `caches` hold to one file, whole or not at all; `metadata` begins with `describe_prompt`'s.

    Raises: InvalidRequestError when the metadata does not belong to the caches, when they hold nothing, or when
    the file cannot be written; an older file then stays.
    """
    missing = [key for key in _DESCRIBED if key not in metadata]
    if missing or set(_WRITTEN) & set(metadata):
        raise InvalidRequestError(
            f"metadata of a prompt cache needs {', '.join(_DESCRIBED)}, as describe_prompt makes them, "
            f"and may not set {', '.join(_WRITTEN)}"
        )
    if any(cache.holds_images for cache in caches):
        raise InvalidRequestError(
            "the caches hold images, which a prompt cache has no place for; store a prompt of text alone"
        )
    states = [cache.state() for cache in caches]
    rows = json.loads(metadata["tokens"])
    lengths = tuple(len(row) for row in rows)
    if not any(lengths) or any(state.facts.offsets != lengths for state in states):
        held = states[0].facts.offsets if states else ()
        raise InvalidRequestError(
            f"the caches hold {held} positions, the metadata tells {lengths} tokens; "
            "both must be alike, and more than none"
        )
    written = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mlx_edge_version": own_version(),
        "caches": json.dumps([state.facts.to_json() for state in states]),
    }
    write_safetensors(Path(path), name_planes(states), metadata={**metadata, **written})


@overload
def load_prompt_cache(
    path: str | Path, model: Decoder, *, return_metadata: Literal[False] = ...
) -> list[AnyKVCache]: ...


@overload
def load_prompt_cache(
    path: str | Path, model: Decoder, *, return_metadata: Literal[True]
) -> tuple[list[AnyKVCache], dict[str, str]]: ...


def load_prompt_cache(
    path: str | Path, model: Decoder, *, return_metadata: bool = False
) -> list[AnyKVCache] | tuple[list[AnyKVCache], dict[str, str]]:
    """The caches of a file, ready to be continued by `model`; `return_metadata` adds what the file tells.

    Raises: ModelFormatError for a file that is broken, of another kind or version, or holds what does not fit;
    InvalidRequestError when it was made with another model or chat template.
    """
    path = Path(path)
    with SafetensorsFile(path) as file:
        metadata = _check_metadata(path, file.metadata)
        _check_owner(path, metadata, model)
        try:
            layers = _read_facts(metadata)
            lengths = _token_counts(metadata["tokens"], model)
            caches = restore_caches(file, layers, model, lengths)
        except MLXEdgeError as error:
            _fail(path, str(error))
    return (caches, metadata) if return_metadata else caches


def read_prompt_metadata(path: str | Path) -> dict[str, str]:
    """What a prompt cache tells of itself, before its model is loaded.

    Raises: ModelFormatError for a file that is broken, or of another kind or version.
    """
    path = Path(path)
    with SafetensorsFile(path) as file:
        return _check_metadata(path, file.metadata)


class PlaneSource(Protocol):
    """Where the planes of a saved state are: a `SafetensorsFile`, or what has its two doors."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Type and shape of each, under the names of `name_planes`."""

    def read(self, name: str) -> mx.array:
        """One of them."""


def name_planes(states: Sequence[CacheState], first: int = 0) -> dict[str, mx.array]:
    """Every plane that the states of a model's layers from `first` on hold, under the name that it has in a file."""
    return {
        _tensor_name(layer, row, part, index): plane
        for layer, state in enumerate(states, first)
        for row, part, planes in state.planes()
        for index, plane in enumerate(planes)
    }


def restore_caches(
    source: PlaneSource, layers: Sequence[CacheFacts], model: Decoder, lengths: tuple[int, ...]
) -> list[AnyKVCache]:
    """Evaluated caches that go on where those with these facts, one per layer, and these planes were saved.

    `lengths` is how many tokens each row of the batch is told to have.

    Raises: ModelFormatError for facts or planes that this model's caches do not have, or of other lengths.
    """
    _check_layers(layers, model, lengths)
    return _read_caches(source, layers, model)


def fingerprint_model(model: Decoder) -> str:
    """A hash of the configuration, of all tensors' names, shapes and types, and of numbers from every tensor.

    About a thousand numbers of each tensor are taken, spread over it, as they are computed with: training notices
    itself; a single changed number may not. The same model on a machine with other float types is another one.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    for name in sorted(model.checkpoint.names()):
        entry = model.checkpoint.entry(name)
        digest.update(repr((name, entry.dtype, entry.shape)).encode())
    samples = [_sample(weight) for weight in find_weights(model)]
    mx.eval(samples)
    for sample in samples:
        digest.update(np.asarray(sample).tobytes())
    return digest.hexdigest()


def fingerprint_template(model: Decoder) -> str:
    """A hash of the chat templates in the model's folder: of their source, since what they write may have dates."""
    templates = read_tokenizer_config(model.checkpoint.folder).chat_templates
    return hashlib.sha256(json.dumps(dict(templates), sort_keys=True).encode()).hexdigest()


def _sample(weight: mx.array | ops.Packed) -> mx.array:
    """At most a few thousand numbers from all over a weight, as bytes."""
    if isinstance(weight, ops.Packed):
        rows = mx.arange(0, weight.shape[0], max(1, weight.shape[0] // 64), dtype=mx.int32)
        table = ops.embed(rows, ops.Embedding(weight))
        return _sample(table)
    table = weight.reshape(-1, weight.shape[-1] if weight.ndim > 1 else 1)
    row_step, column_step = (max(1, n // 64) for n in table.shape)
    return mx.contiguous(table[::row_step, ::column_step]).reshape(-1).view(mx.uint8)


def _tensor_name(layer: int, row: int, part: str, index: int) -> str:
    return f"layers.{layer}.rows.{row}.{part}.{index}"


def _fail(path: Path, found: str) -> NoReturn:
    raise ModelFormatError(f"{path}: {found}; the prompt cache cannot be used, {MAKE_AGAIN}")


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    if metadata.get("format") != FORMAT:
        _fail(path, "this is no prompt cache of mlx_edge")
    version = metadata.get("format_version", "")[:20]
    if version != FORMAT_VERSION:
        writer = metadata.get("mlx_edge_version", "?")[:20]
        _fail(
            path,
            f"format version {version!r}, written by mlx_edge {writer!r}; expected {FORMAT_VERSION!r}",
        )
    missing = [key for key in (*_DESCRIBED, *_WRITTEN) if key not in metadata]
    if missing:
        _fail(path, f"the metadata lacks {', '.join(missing)}")
    return dict(metadata)


def _check_owner(path: Path, metadata: Mapping[str, str], model: Decoder) -> None:
    if metadata["fingerprint"] != fingerprint_model(model):
        name = f" ({metadata['model'][:200]!r})" if "model" in metadata else ""
        raise InvalidRequestError(
            f"{path}: the prompt cache was made with another model{name}, other weights, or by another version "
            f"(mlx_edge {metadata['mlx_edge_version'][:20]!r}); load that model, or {MAKE_AGAIN}"
        )
    template = metadata["chat_template"]
    if template not in (NO_TEMPLATE, fingerprint_template(model)):
        raise InvalidRequestError(
            f"{path}: the prompt cache was made with another chat template; {MAKE_AGAIN}"
        )


def _read_facts(metadata: Mapping[str, str]) -> list[CacheFacts]:
    try:
        layers = json.loads(metadata["caches"])
    except (ValueError, RecursionError):
        raise ModelFormatError("the facts of its layers are not JSON") from None
    if not isinstance(layers, list):
        raise ModelFormatError("the facts of its layers are no list")
    return [CacheFacts.from_json(layer) for layer in layers]


def _check_layers(layers: Sequence[CacheFacts], model: Decoder, lengths: tuple[int, ...]) -> None:
    """The caches are such as this model makes, alike in all layers, and hold the tokens that are told."""
    if len(layers) != len(model.layers):
        raise ModelFormatError(f"it has {len(layers)} layers, the model {len(model.layers)}")
    first = layers[0]
    shared = {(x.row_format, x.float_until, x.is_float, x.offsets) for x in layers}
    if len(shared) > 1:
        raise ModelFormatError("its layers differ in format or length")
    limits = {x.window + x.keep for x in layers if x.window is not None and x.keep}
    max_kv_size = max(limits, default=None)
    if max_kv_size is not None and max_kv_size <= KEPT_PREFIX:
        raise ModelFormatError(f"its window with the kept positions is {max_kv_size}")
    wanted = [(c.window, c.keep) for c in model.make_cache(max_kv_size=max_kv_size)]
    if wanted != [(x.window, x.keep) for x in layers]:
        raise ModelFormatError("its windows are not those of the model's layers")
    if max(first.offsets) > model.config.context_size:
        raise ModelFormatError(
            f"it holds {max(first.offsets)} positions, the model's context {model.config.context_size}"
        )
    if not max(first.offsets) or lengths != first.offsets:
        raise ModelFormatError(f"it holds {first.offsets} positions, and tells of other tokens")


def _token_counts(text: str, model: Decoder) -> tuple[int, ...]:
    """How many tokens each row has; () unless all are of the vocabulary."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return ()
    size = model.config.vocab_size
    if not all(type(token) is int and 0 <= token < size for row in rows for token in row):
        return ()
    return tuple(len(row) for row in rows)


def _read_caches(
    source: PlaneSource, layers: Sequence[CacheFacts], model: Decoder
) -> list[AnyKVCache]:
    """The caches, once every tensor is there with the shape and type that the model itself gives its rows."""
    probe = model.make_cache(row_format=layers[0].current_format)
    model(mx.zeros((1, 1), mx.int32), probe)  # lazy: only shapes and types are looked at
    unread = set(source.tensors)
    states = []
    for index, (facts, example) in enumerate(zip(layers, probe, strict=True)):
        like = example.state().rows[0]["tail"]
        measure = KVCache(window=facts.window, keep=facts.keep)
        rows = []
        for row, offset in enumerate(facts.offsets):
            parts = {}
            for part, count in measure.held_slots(offset).items():
                if count:
                    names = [_tensor_name(index, row, part, i) for i in range(len(like))]
                    unread -= set(names)
                    parts[part] = tuple(
                        _read_plane(source, name, plane, count)
                        for name, plane in zip(names, like, strict=True)
                    )
            rows.append(parts)
        states.append(CacheState(facts, tuple(rows)))
    if unread:
        raise ModelFormatError(f"{len(unread)} tensors belong to nothing")
    caches = [type(like).from_state(state) for like, state in zip(probe, states, strict=True)]
    mx.eval([array for cache in caches for array in cache.arrays])  # before a file is closed
    return caches


def _read_plane(source: PlaneSource, name: str, like: mx.array, count: int) -> mx.array:
    shape = (*like.shape[:3], count, like.shape[4])
    entry = source.tensors.get(name)
    if entry is None:
        raise ModelFormatError(f"tensor {name} is missing")
    if entry.shape != shape or ELEMENT_TYPES[entry.dtype].mlx != like.dtype:
        wanted = next(key for key, element in ELEMENT_TYPES.items() if element.mlx == like.dtype)
        raise ModelFormatError(
            f"tensor {name} is {entry.dtype} {list(entry.shape)[:8]}, expected {wanted} {list(shape)}"
        )
    return source.read(name)
