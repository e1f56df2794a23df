"""One GGUF file: its metadata, its table of tensors, and each as an array of floats when asked for.

Data are read, not mapped: what is used once and dropped shall not stay in memory. Values come from the `gguf` package
(`pip install 'mlx-edge[gguf]'`), imported when a file is opened. Knows no model: neither what a key means, nor how
tensors are called elsewhere.
"""

import mmap
import os
import stat
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_edge.errors import InvalidRequestError
from mlx_edge.weights.gguf_header import GGUFTensor, Value, parse_gguf_header
from mlx_edge.weights.header import GET_AGAIN, fail, show
from mlx_edge.weights.identity import FileIdentity, fingerprint_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_CHUNK_VALUES = 1 << 22  # dequantized at a time: the package needs several times what it returns

Dequantize = Callable[["NDArray[Any]", str], "NDArray[Any]"]


class GGUFFile:
    """An open GGUF file. Use it as a context manager, or call `close`. Not thread-safe.

    Opening checks the whole header and touches no tensor. A broken file raises ModelFormatError and nothing else, a
    missing `gguf` package InvalidRequestError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dequantize = _import_dequantize()
        try:
            # Asked before opening: to open a pipe is to wait for its writer, maybe forever.
            if not stat.S_ISREG(path.stat().st_mode):
                fail(str(path), "something that is not a file", "a GGUF file", "check the path")
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            fail(str(path), f"that it cannot be opened ({reason})", "a file", "check the path")
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._identity = FileIdentity.of(os.fstat(self._descriptor))
        with self._map() as mapping:
            self._header = parse_gguf_header(str(path), mapping)

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The values by key."""
        return self._header.metadata

    @property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        """What the file holds, in the order of its header."""
        return self._header.tensors

    def fingerprint(self) -> str:
        """A text that is another one when the file is, see `fingerprint_file`."""
        with self._map() as mapping:
            header_bytes = self._header.data_begin
            return fingerprint_file(self._identity, mapping, header_bytes=header_bytes).hex()

    def dtype(self, name: str) -> mx.Dtype:
        """What `read` returns: a float type as it is stored, float32 for a quantized tensor."""
        return _FLOATS.get(self._find(name).type.name, mx.float32)

    def read(self, name: str, row_order: "NDArray[Any] | None" = None) -> mx.array:
        """A tensor as a new array, its rows in the given order.

        Bit for bit what `gguf.quants.dequantize` returns. Memory: the tensor as stored and as returned, and a chunk.
        Raises ModelFormatError if there is no such tensor or the file became shorter.
        """
        tensor = self._find(name)
        rows = self.read_rows(name, row_order)
        dtype = _FLOATS.get(tensor.type.name)
        if dtype is not None:
            return mx.array(rows.view(f"<u{dtype.size}")).view(dtype).reshape(tensor.shape)
        import numpy as np

        num_rows, num_columns = tensor.num_rows, tensor.shape[-1]
        values = mx.zeros((num_rows, num_columns), mx.float32)
        mx.eval(values)
        view = np.asarray(values)  # MLX's own memory
        step = max(1, _CHUNK_VALUES // num_columns)
        for begin in range(0, num_rows, step):
            chunk = slice(begin, begin + step)
            with np.errstate(all="ignore"):  # whether a value may be infinite is for others to say
                view[chunk] = self._dequantize(rows[chunk], tensor.type.name)
        return values.reshape(tensor.shape)

    def read_rows(self, name: str, row_order: "NDArray[Any] | None" = None) -> "NDArray[Any]":
        """A tensor's rows as they are stored, (rows, bytes of a row) uint8. Raises as `read` does."""
        import numpy as np

        if not self._close.alive:
            raise InvalidRequestError(f"{self.path}: the file is closed; read tensors before that")
        tensor = self._find(name)
        raw = bytearray(tensor.end - tensor.begin)
        flat, done = memoryview(raw), 0
        while done < len(flat):
            try:
                count = os.preadv(self._descriptor, [flat[done:]], tensor.begin + done)
            except OSError as error:
                found = f"that it cannot be read ({error.strerror})"
                fail(str(self.path), found, "a readable file", "check the disk")
            if count == 0:
                fail(str(self.path), "that it became shorter", "an unchanged file", GET_AGAIN)
            done += count
        rows = np.frombuffer(raw, np.uint8).reshape(tensor.num_rows, tensor.row_bytes)
        return rows if row_order is None else rows[row_order]

    def close(self) -> None:
        """Ends reading."""
        self._close()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _map(self) -> mmap.mmap:
        if self._identity.num_bytes == 0:  # an empty file cannot be mapped
            fail(str(self.path), "an empty file", "a GGUF file", GET_AGAIN)
        return mmap.mmap(self._descriptor, self._identity.num_bytes, access=mmap.ACCESS_READ)

    def _find(self, name: str) -> GGUFTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            found = f"no tensor {show(name)} among {len(self.tensors)}"
            fail(str(self.path), found, "it to be there", "take a whole model's file")
        return tensor


def _import_dequantize() -> Dequantize:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise InvalidRequestError(
            "GGUF files are read through the package gguf, which is not installed; "
            "pip install 'mlx-edge[gguf]'"
        ) from None
    return lambda rows, name: dequantize(rows, GGMLQuantizationType[name])
