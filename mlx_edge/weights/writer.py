"""Writes safetensors files that can be mapped: data from a page on, never half a file.

The layout needs no holes, which the format forbids. The header is padded with spaces to a multiple
of 16 KiB, Apple's page size. Tensors are ordered by the largest power of two, up to 64, that
divides their size: those of 64 first, so that each begins on a multiple of 64, then those of 32,
and so on. As an element's size divides its tensor's size, every tensor is at least aligned to its
own elements. What is written loads with `mx.load` and mlx-lm.

Knows names and arrays, not what they mean.
"""

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from mlx_edge.errors import InvalidRequestError
from mlx_edge.weights.checkpoint import INDEX_NAME, SINGLE_NAME
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.header import MAX_HEADER_BYTES, METADATA_KEY, show

DATA_ALIGNMENT = 16 * 1024
TENSOR_ALIGNMENT = 64
DEFAULT_METADATA: Mapping[str, str] = {
    "format": "mlx"
}  # without it mlx-lm and transformers take it for another's
TEMPORARY_SUFFIX = ".tmp"

TYPE_NAMES = {element.mlx: name for name, element in ELEMENT_TYPES.items() if name != "F64"}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: all that the header says of it except its place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def write_safetensors(
    path: Path, tensors: Mapping[str, mx.array], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `tensors` to `path`, whole or not at all.

    An old file stays untouched until the new one is complete. Tensors are evaluated and written one
    by one, so that a mapping which makes them on demand needs memory for one (it is asked twice for
    each: first for type and shape). `metadata` defaults to {"format": "mlx"}. Raises
    InvalidRequestError for what the format or MLX's loader cannot hold (float64, complex64) and if
    the disk refuses.
    """
    _write_file(path, plan_tensors(tensors), tensors, metadata=metadata)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, mx.array],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` with an index.

    The index has the form that transformers and mlx-lm read. Shards are filled in the order of
    `tensors`; a tensor that is larger alone gets its own. The index comes last. Raises as
    `write_safetensors`, and before anything is written if weights of another shape would remain in
    the folder, which other loaders would mix with these.
    """
    shards = plan_shards(plan_tensors(tensors), max_shard_bytes)
    make_room(folder, shards)
    for name, shard in shards.items():
        _write_file(folder / name, shard, tensors, metadata=metadata)
    write_index(folder, shards)


def plan_tensors(tensors: Mapping[str, mx.array]) -> list[TensorPlan]:
    """What the header says of each array."""
    return [plan_tensor(name, tensors[name]) for name in tensors]


def plan_tensor(name: str, array: mx.array) -> TensorPlan:
    """What the header says of an array under this name."""
    return describe_tensor(name, array.dtype, array.shape)


def describe_tensor(name: str, dtype: mx.Dtype, shape: tuple[int, ...]) -> TensorPlan:
    """A tensor that is still to be made; InvalidRequestError for what the format or MLX's loader cannot hold."""
    if name == METADATA_KEY or not _is_text(name):
        raise InvalidRequestError(
            f"{show(name)} cannot name a tensor in a safetensors file; rename it"
        )
    spelling = TYPE_NAMES.get(dtype)
    if spelling is None:
        raise InvalidRequestError(
            f"tensor {show(name)} is {dtype}, which MLX's loader cannot read; cast it first"
        )
    return TensorPlan(name, spelling, shape, math.prod(shape) * dtype.size)


def _is_text(value: object) -> bool:
    """True for a str that UTF-8 can hold (no lone surrogates)."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _write_file(
    path: Path,
    planned: list[TensorPlan],
    tensors: Mapping[str, mx.array],
    *,
    metadata: Mapping[str, str] | None,
) -> None:
    ordered = order_tensors(planned)
    header = make_header(ordered, DEFAULT_METADATA if metadata is None else metadata)
    with replacing(path) as file:
        file.write(header)
        for plan in ordered:
            _write_tensor(file, plan, tensors[plan.name])


def order_tensors(planned: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Largest dividing power of two first; equals keep the caller's order, often that of use."""
    return sorted(planned, key=lambda plan: -math.gcd(plan.num_bytes, TENSOR_ALIGNMENT))


def make_header(ordered: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """Length, JSON and spaces: all bytes in front of the data."""
    if not all(_is_text(text) for pair in metadata.items() for text in pair):
        raise InvalidRequestError(f"metadata {show(dict(metadata))} is not a table of strings")
    table: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    begin = 0
    for plan in ordered:
        end = begin + plan.num_bytes
        table[plan.name] = {"dtype": plan.dtype, "shape": plan.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    num_bytes = -(-(len(text) + 8) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    if num_bytes > MAX_HEADER_BYTES:
        raise InvalidRequestError(
            f"{len(ordered)} tensors need a header of {num_bytes} bytes, "
            f"the limit is {MAX_HEADER_BYTES}; write more shards or less metadata"
        )
    return num_bytes.to_bytes(8, "little") + text.ljust(num_bytes)


def _write_tensor(file: BinaryIO, plan: TensorPlan, array: mx.array) -> None:
    if plan_tensor(plan.name, array) != plan:
        raise InvalidRequestError(
            f"tensor {show(plan.name)} changed while it was written: {array.dtype} {array.shape}, "
            f"before {plan.dtype} {plan.shape}"
        )
    file.write(view_bytes(array))


def view_bytes(array: mx.array) -> memoryview:
    """The bytes of an array, on MLX's own memory where it is contiguous."""
    import numpy as np  # slow to import, and a start writes nothing

    if array.dtype == mx.bfloat16:  # numpy has none; the bytes are the same
        array = array.view(mx.uint16)
    data = np.ascontiguousarray(np.asarray(array))
    return data.data.cast("B") if data.nbytes else memoryview(b"")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, else vanishes."""
    temporary = name_temporary(path)
    with disk_errors(path):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(
                    file.fileno()
                )  # or a power cut could leave the new name on unwritten bytes
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def name_temporary(path: Path) -> Path:
    """A hidden name beside `path` for the time while it is written; `is_temporary` knows it again."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def is_temporary(name: str) -> bool:
    """Whether a file has a name of `name_temporary`."""
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Whatever the system refuses while `path` is written, as InvalidRequestError."""
    try:
        yield
    except OSError as error:
        raise InvalidRequestError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "check folder, rights and free space"
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def plan_shards(planned: Sequence[TensorPlan], max_shard_bytes: int) -> dict[str, list[TensorPlan]]:
    """File name -> its tensors: at least one shard, each filled in turn until the next tensor would not fit."""
    if max_shard_bytes <= 0:
        raise InvalidRequestError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in planned:
        if shards[-1] and filled + plan.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(plan)
        filled += plan.num_bytes
    count = len(shards)
    if count == 1:
        return {SINGLE_NAME: shards[0]}
    numbered = enumerate(shards, 1)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": shard for i, shard in numbered}


def make_room(folder: Path, shards: Mapping[str, list[TensorPlan]]) -> None:
    """Creates the folder; refuses one with weights that would stay beside the new ones."""
    names = [*shards, INDEX_NAME] if len(shards) > 1 else [*shards]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InvalidRequestError(
            f"{folder}: cannot be used as a folder ({error.strerror})"
        ) from error
    for name in present:
        is_weights = name == INDEX_NAME or (
            name.startswith("model") and name.endswith(".safetensors")
        )
        if is_weights and name not in names:
            raise InvalidRequestError(
                f"{folder}: found {name} of another checkpoint, which loaders would mix "
                "with the new one; remove it or write to an empty folder"
            )


def write_index(folder: Path, shards: Mapping[str, list[TensorPlan]]) -> None:
    """Says which tensor is in which shard; nothing where there is only one."""
    if len(shards) == 1:
        return
    weight_map = {plan.name: name for name, shard in shards.items() for plan in shard}
    total_bytes = sum(plan.num_bytes for shard in shards.values() for plan in shard)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    with replacing(folder / INDEX_NAME) as file:
        file.write((json.dumps(index, indent=4, ensure_ascii=False) + "\n").encode("utf-8"))
