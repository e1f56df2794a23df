"""A checkpoint's tensors as the records that ops take: each found by name, checked, and asked for once.

A missing tensor, a wrong shape or dtype, and a tensor that nobody asked for are errors that name it. Knows how a weight
may be stored (packed or not, alone, fused with others, or as one of many experts); which there are is for the others.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from itertools import accumulate, pairwise

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.errors import ModelFormatError
from mlx_edge.models.packing import Packer, pack_weight
from mlx_edge.models.quantization import Quantization
from mlx_edge.quant import Packing
from mlx_edge.weights import Checkpoint

FLOATS = ("F32", "F16", "BF16")

# What stands in files of models that also see where text models have "model." and "lm_head".
PREFIXES = (
    ("model.", "lm_head"),
    ("model.language_model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head"),
    ("language_model.", "lm_head"),
)


def find_prefix(names: Iterable[str], embedding: str) -> tuple[str, str]:
    """How the files begin the names of the text's tensors, and how they call the head; `embedding` as in families."""
    names = frozenset(names)
    wanted = embedding.removeprefix("model.")
    found = (pair for pair in PREFIXES if f"{pair[0]}{wanted}.weight" in names)
    return next(found, PREFIXES[0])


def stored_name(name: str, prefix: tuple[str, str]) -> str:
    """A family's name of a tensor or a layer as the files spell it."""
    if name.startswith("model."):
        return prefix[0] + name.removeprefix("model.")
    return prefix[1] + name.removeprefix("lm_head") if name.startswith("lm_head") else name


class Tensors:
    """Reads a model's tensors from a checkpoint, each once; names are those of its family."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: Quantization,
        convert: Callable[[mx.array], mx.array],
        packer: Packer | None = None,
        prefix: tuple[str, str] = PREFIXES[0],
    ) -> None:
        """`convert` is applied to every float tensor: the dtype that this machine computes in. With a `packer`
        weights are taken in the layout of the CPU kernels, as far as these serve them."""
        self.checkpoint = checkpoint
        self._quantization = quantization
        self._convert = convert
        self._packer = packer
        self._prefix = prefix
        self._unused = set(checkpoint.names())
        self._unused_scales = set(quantization.input_scales)

    def as_stored(self) -> "Tensors":
        """The same tensors, asked for by their names in the files."""
        twin = copy(self)  # what is unused is one set for both
        twin._prefix = PREFIXES[0]
        return twin

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name that nobody has asked for yet."""
        return self._stored(name) in self._unused

    def skip(self, name: str) -> None:
        """Leave a layer's tensors alone, where there are any."""
        self._unused -= {f"{self._stored(name)}.{part}" for part in ("weight", "scales", "biases")}

    def array(self, name: str, shape: tuple[int, ...]) -> mx.array:
        """A float tensor."""
        name = self._stored(name)
        self._check(name, FLOATS, shape)
        return self._float(name)

    def norm(self, name: str, size: int, eps: float, offset: float = 0.0) -> ops.Norm:
        """A norm's weight (size,), and `offset` added."""
        weight = self.array(f"{name}.weight", (size,))
        return ops.Norm(weight + offset if offset else weight, eps)

    def linear(self, name: str, rows: int, columns: int, *, has_bias: bool = False) -> ops.Linear:
        """One matrix."""
        return self.parts(name, [rows], columns, has_bias=has_bias)[0]

    def table(self, name: str, rows: int, columns: int) -> ops.Linear:
        """A matrix that is looked up in: nothing is multiplied, a scale of its input would be without meaning."""
        name = self._stored(name)
        return self._slice(name, self._check_matrix(name, (rows,), columns), None, 0, rows, None)

    def parts(
        self, name: str, rows: Sequence[int], columns: int, *, has_bias: bool = False
    ) -> list[ops.Linear]:
        """The matrices that lie one below another in one tensor, of so many rows each."""
        name = self._stored(name)
        packing = self._check_matrix(name, (sum(rows),), columns)
        if has_bias:
            self._check(f"{name}.bias", FLOATS, (sum(rows),))
        bias = self._float(f"{name}.bias") if has_bias else None
        ends = [0, *accumulate(rows)]
        scale = self._input_scale(name)
        return [self._slice(name, packing, bias, a, b, scale) for a, b in pairwise(ends)]

    def stacked(
        self, name: str, count: int, rows: int, columns: int, *, has_bias: bool = False
    ) -> ops.Linear:
        """A tensor (count, rows, columns) as one matrix (count * rows, columns)."""
        name = self._stored(name)
        packing = self._check_matrix(name, (count, rows), columns)
        if has_bias:
            self._check(f"{name}.bias", FLOATS, (count, rows))
        bias = self._float(f"{name}.bias").reshape(-1) if has_bias else None
        return self._slice(name, packing, bias, 0, count * rows, self._input_scale(name))

    def joined(self, names: Sequence[str], rows: int, columns: int) -> ops.Linear:
        """The matrices of these names (rows, columns), one below another. They are copied."""
        names = [self._stored(name) for name in names]
        packings = {self._check_matrix(name, (rows,), columns) for name in names}
        if packings != {None}:
            raise ModelFormatError(
                f"{self.checkpoint.folder}: {names[0]} is quantized and one of many; expected the experts of a layer "
                "stacked, as mlx_lm.convert writes them"
            )
        weights = [self.checkpoint.read(f"{name}.weight") for name in names]
        return self.place(mx.stack(weights), None)

    def fused(
        self, name: str, count: int, rows: int, columns: int, is_transposed: bool
    ) -> mx.array:
        """A float tensor (count, rows, columns), which may be stored with its last two axes exchanged. As stored."""
        name = self._stored(name)
        shape = (count, columns, rows) if is_transposed else (count, rows, columns)
        self._check(name, FLOATS, shape)
        array = self.checkpoint.read(name)
        return array.swapaxes(1, 2) if is_transposed else array

    def place(self, stack: mx.array, bias: mx.array | None) -> ops.Linear:
        """Matrices (count, rows, columns) that were put together here as one, with their biases (count, rows)."""
        matrix = mx.contiguous(stack.reshape(-1, stack.shape[-1]))
        flat = None if bias is None else bias.reshape(-1)
        if self._packer is None:
            return ops.Dense(self._convert(matrix), flat)
        return pack_weight(ops.Dense(matrix, flat))

    def input_scale(self, name: str) -> float | None:
        """The fixed step in which the inputs of a layer are rounded."""
        return self._input_scale(self._stored(name))

    def _slice(
        self,
        name: str,
        packing: Packing | None,
        bias: mx.array | None,
        first: int,
        end: int,
        input_scale: float | None,
    ) -> ops.Linear:
        """Rows of a tensor that was checked; more than two axes are one run of rows."""
        bias = None if bias is None else bias[first:end]
        if self._packer is not None and input_scale is None:
            packed = self._packer.pack(name, bias, (first, end))
            if packed is not None:
                return packed

        def read(part: str) -> mx.array:
            array = self.checkpoint.read(f"{name}.{part}")
            array = array.reshape(-1, array.shape[-1])
            return array if end - first == array.shape[0] else array[first:end]

        if packing is None:
            return ops.Dense(self._convert(read("weight")), bias, input_scale)
        is_affine = packing.mode == "affine"
        scales = read("scales")
        return ops.Quantized(
            read("weight"),
            self._convert(scales) if is_affine else scales,
            self._convert(read("biases")) if is_affine else None,
            packing.group_size,
            packing.bits,
            packing.mode,
            bias,
            input_scale,
        )

    def _input_scale(self, name: str) -> float | None:
        self._unused_scales.discard(name)
        return self._quantization.input_scales.get(name)

    def _check_matrix(self, name: str, rows: tuple[int, ...], columns: int) -> Packing | None:
        """The packing of a weight (..., columns), all of whose tensors are as they should be."""
        packing = self._quantization.packing(name)
        # A default packing covers what could be packed; MLX leaves other layers as floats.
        if packing is None or f"{name}.scales" not in self._unused:
            self._check(f"{name}.weight", FLOATS, (*rows, columns))
            return None
        if columns % packing.group_size:
            raise ModelFormatError(
                f"{name}: {columns} columns do not divide into groups of {packing.group_size}; "
                "config.json's quantization does not belong to these weights"
            )
        groups = columns // packing.group_size
        is_affine = packing.mode == "affine"
        self._check(f"{name}.weight", ("U32",), (*rows, columns * packing.bits // 32))
        self._check(f"{name}.scales", FLOATS if is_affine else ("U8",), (*rows, groups))
        if is_affine:
            self._check(f"{name}.biases", FLOATS, (*rows, groups))
        return packing

    def _stored(self, name: str) -> str:
        return stored_name(name, self._prefix)

    def _float(self, name: str) -> mx.array:
        return self._convert(self.checkpoint.read(name))

    def _check(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """A tensor that is used: there, of this type and shape, and asked for once."""
        if name not in self._unused:
            raise ModelFormatError(
                f"{self.checkpoint.folder}: tensor {name} is missing; "
                "the download is not complete, or config.json belongs to another model"
            )
        self._unused.discard(name)
        entry = self.checkpoint.entry(name)
        if entry.dtype not in dtypes or tuple(entry.shape) != shape:
            raise ModelFormatError(
                f"{self.checkpoint.folder}: tensor {name} is {entry.dtype} {list(entry.shape)}, "
                f"expected {' or '.join(dtypes)} {list(shape)}"
            )

    def refuse_unused(self, suffixes: tuple[str, ...], prefixes: tuple[str, ...]) -> None:
        """Raise ModelFormatError for what nobody asked for, but for names that begin or end like these."""
        if self._unused_scales:
            raise ModelFormatError(
                f"{self.checkpoint.folder}/config.json: activation_quantization names "
                f"{', '.join(sorted(self._unused_scales)[:3])}, which no input of this model goes into; "
                "it belongs to another model"
            )
        left = sorted(
            name
            for name in self._unused
            if not name.endswith(suffixes) and not name.startswith(prefixes)
        )
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ModelFormatError(
                f"{self.checkpoint.folder}: tensors that this model does not use: "
                f"{', '.join(left[:3])}{more}; config.json belongs to another model"
            )
