"""Writes a checkpoint whose tensors come one by one, in any order and in pieces, into shards planned beforehand.

Names, types and shapes are known before the first tensor is, so every byte has its place: a piece is written there and
forgotten. The files are those that `write_checkpoint` makes, byte for byte. A shard has its final name only when it is
whole; shards that an earlier run has finished are recognised and left alone. Knows no model and no quantization.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from types import TracebackType

import mlx.core as mx

from mlx_edge.weights.writer import (
    DEFAULT_METADATA,
    TYPE_NAMES,
    TensorPlan,
    disk_errors,
    is_temporary,
    make_header,
    make_room,
    name_temporary,
    order_tensors,
    plan_shards,
    sync_folder,
    view_bytes,
    write_index,
)


class StreamWriter:
    """The shards of one checkpoint while they fill. Use it as a context manager: leaving it drops unfinished files."""

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[TensorPlan],
        *,
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        """Makes the folder, removes what a killed run left unfinished, and keeps the shards that are whole.

        Raises: InvalidRequestError as `write_checkpoint` does.
        """
        self._folder = folder
        self._plans = plan_shards(tensors, max_shard_bytes)
        make_room(folder, self._plans)
        _remove_temporaries(folder)
        metadata = DEFAULT_METADATA if metadata is None else metadata
        self._shards = [_Shard(folder / n, plans, metadata) for n, plans in self._plans.items()]
        self._shard_of = {name: shard for shard in self._shards for name in shard.left}

    @property
    def written_bytes(self) -> int:
        """Bytes of tensors that are in their files, those of earlier runs included."""
        return sum(shard.num_bytes - sum(shard.left.values()) for shard in self._shards)

    @property
    def num_whole_shards(self) -> int:
        """Shards that have their final names."""
        return sum(shard.is_whole for shard in self._shards)

    def is_written(self, name: str) -> bool:
        """Whether a tensor is complete, in this run or in an earlier one."""
        shard = self._shard_of[name]
        return shard.is_whole or not shard.left[name]

    def put(self, name: str, array: mx.array, first_row: int = 0) -> None:
        """Writes a tensor, or those of its rows that begin with `first_row`; each row once.

        Of a piece with fewer axes than its tensor the tensor's first ones are one run of rows.
        What is in a whole shard already is skipped. Raises: InvalidRequestError if the disk refuses.
        """
        self._shard_of[name].put(name, array, first_row)

    def finish(self) -> None:
        """Writes the index; every tensor must have been put."""
        for shard in self._shards:
            if not shard.is_whole:  # with no byte in it, nobody was there to complete it
                missing = [name for name, left in shard.left.items() if left]
                assert not missing, f"never put: {missing[:3]}"
                shard.complete()
        write_index(self._folder, self._plans)

    def close(self) -> None:
        """Drops the files that are not whole."""
        for shard in self._shards:
            shard.drop()

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Shard:
    """One file of the checkpoint: under a temporary name until its last byte is there."""

    def __init__(self, path: Path, plans: Sequence[TensorPlan], metadata: Mapping[str, str]):
        self._path = path
        ordered = order_tensors(plans)
        self._header = make_header(ordered, metadata)
        self._plans = {plan.name: plan for plan in ordered}
        self.left = {plan.name: plan.num_bytes for plan in ordered}
        self.num_bytes = sum(self.left.values())
        self._begins: dict[str, int] = {}
        begin = len(self._header)
        for plan in ordered:
            self._begins[plan.name] = begin
            begin += plan.num_bytes
        self._file: tuple[int, Path] | None = None  # open, and its temporary name
        self.is_whole = self._find_whole()
        if self.is_whole:
            self.left = dict.fromkeys(self.left, 0)

    def _find_whole(self) -> bool:
        """Whether the file has its final name already: then only its header can tell that it is another's."""
        try:
            if self._path.stat().st_size != len(self._header) + self.num_bytes:
                return False
            with self._path.open("rb") as file:
                return file.read(len(self._header)) == self._header
        except FileNotFoundError:
            return False

    def put(self, name: str, array: mx.array, first_row: int) -> None:
        if self.is_whole:
            return
        plan = self._plans[name]
        shape = plan.shape
        if 0 < array.ndim < len(shape):
            inner = len(shape) + 1 - array.ndim
            shape = (prod(shape[:inner]), *shape[inner:])
        rows = shape[0] if shape else 1
        found = TYPE_NAMES.get(array.dtype), array.shape[1:], array.shape[:1] <= shape[:1]
        assert found == (plan.dtype, shape[1:], True), f"{name}: {array.dtype} {array.shape}"
        assert array.nbytes <= self.left[name], f"{name}: put twice"
        begin = self._begins[name] + (first_row * (plan.num_bytes // rows) if rows else 0)
        with disk_errors(self._path):
            _write_at(self._open(), view_bytes(array), begin)
        self.left[name] -= array.nbytes
        if not any(self.left.values()):
            self.complete()

    def complete(self) -> None:
        with disk_errors(self._path):
            descriptor = self._open()
            assert self._file is not None
            os.fsync(descriptor)  # or a power cut could leave the new name on unwritten bytes
            self._file[1].replace(self._path)
            os.close(descriptor)
            self._file = None
            sync_folder(self._path.parent)
        self.is_whole = True

    def drop(self) -> None:
        if self._file is not None:
            descriptor, temporary = self._file
            os.close(descriptor)
            with suppress(OSError):
                temporary.unlink()
            self._file = None

    def _open(self) -> int:
        if self._file is None:
            temporary = name_temporary(self._path)
            descriptor = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
            )
            self._file = descriptor, temporary
            _write_at(descriptor, memoryview(self._header), 0)
        return self._file[0]


def _write_at(descriptor: int, data: memoryview, begin: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], begin + done)


def _remove_temporaries(folder: Path) -> None:
    with disk_errors(folder):
        for path in folder.iterdir():
            if is_temporary(path.name):
                path.unlink(missing_ok=True)
