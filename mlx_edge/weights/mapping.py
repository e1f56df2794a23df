"""Arrays that are views of a mapped file: the plan, and the cutting.

Plans which byte ranges of a file become one buffer (pure functions), has them adopted when a tensor
in them is first asked for, and cuts tensors out of them. Knows no header, no folder, and not how
MLX adopts pages on this machine: that is `adoption.py`.

How a tensor becomes a view (nothing below moves a byte; all of it is slices, views and reshapes of
contiguous arrays):

    file    | header | q_proj | k_proj |  ...  |          one mapping of the whole file, read-only
    run     [page            ...           page)          whole pages, <= 4 GiB: one buffer
    base    uint32[(end - begin) / 4]                     because MLX counts elements in int32
    tensor  base[words].view(its type)[lead:].reshape     `lead`: elements before it in its word

Lifetimes. MLX's buffer keeps the pages, whatever becomes of the mapping and of the file's name. The
base array is kept as well, by whoever holds `SharedRuns`: only then is it sure that MLX, which may
write a result into an input that nobody else holds, leaves these pages alone. Where that happens
all the same, Linux gives it a copy of the page, and Metal has no such guard.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from mmap import PAGESIZE

import mlx.core as mx

from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.header import MAX_DIM, TensorEntry

logger = logging.getLogger(__name__)

MAX_RUN_BYTES = 4 * 2**30
UNALIGNED = "not aligned in the file, `convert --realign` mends that"
TOO_LARGE = "larger than one buffer"
NOT_A_VIEW = "F64 and BOOL are always copied"
REFUSED = "MLX refused to adopt the mapped pages"

_WORD_BYTES = 4  # the base arrays are uint32


@dataclass(frozen=True)
class Run:
    """A range of whole pages of a file that becomes one buffer; `end` may lie behind the file."""

    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the run, a multiple of the page size."""
        return self.end - self.begin

    def holds(self, entry: TensorEntry) -> bool:
        """True if the whole tensor lies in this run."""
        return self.begin <= entry.begin and entry.end <= self.end


def why_copy(entry: TensorEntry, *, max_run_bytes: int = MAX_RUN_BYTES) -> str | None:
    """Returns why a tensor cannot be a view of its mapped file, or None if it can.

    File offsets stand for addresses: a mapping begins on a page, and a page is a multiple of every
    element size.
    """
    # Metal has no float64; a bool byte other than 0 and 1 must be mended.
    if entry.dtype in {"F64", "BOOL"}:
        return NOT_A_VIEW
    element_size = ELEMENT_TYPES[entry.dtype].size
    if entry.begin % element_size:
        return UNALIGNED
    # On the way the tensor is one axis, with up to a word of other bytes at each side.
    if (entry.num_bytes + 2 * _WORD_BYTES) // element_size > MAX_DIM:
        return TOO_LARGE
    begin, end = _page_span(entry, PAGESIZE)
    return TOO_LARGE if end - begin > max_run_bytes else None


def plan_runs(
    entries: Iterable[TensorEntry],
    *,
    page_bytes: int = PAGESIZE,
    max_run_bytes: int = MAX_RUN_BYTES,
) -> list[Run]:
    """Returns ranges of whole pages, in file order, such that each tensor lies wholly in one.

    As few as can be. Tensors without bytes, and those that alone span more than `max_run_bytes`,
    are left out. Two runs share a page where one tensor ends and the next begins on it.
    """
    runs: list[Run] = []
    for entry in sorted(entries, key=lambda entry: entry.begin):
        begin, end = _page_span(entry, page_bytes)
        if entry.num_bytes == 0 or end - begin > max_run_bytes:
            continue
        if runs and end - runs[-1].begin <= max_run_bytes:
            runs[-1] = Run(runs[-1].begin, max(end, runs[-1].end))
        else:
            runs.append(Run(begin, end))
    return runs


class SharedRuns:
    """The buffers over one mapped file, each adopted when a tensor in it is first asked for.

    Keep this object as long as any array that came out of it. Not thread-safe.
    """

    def __init__(
        self,
        entries: Iterable[TensorEntry],
        adopt: Callable[[Run], mx.array],
        *,
        max_run_bytes: int = MAX_RUN_BYTES,
    ) -> None:
        """`adopt` returns the bytes of a run as a uint32 array without copying them, or raises."""
        self._max_run_bytes = max_run_bytes
        self._adopt = adopt
        shareable = (e for e in entries if why_copy(e, max_run_bytes=max_run_bytes) is None)
        self._runs = plan_runs(shareable, max_run_bytes=max_run_bytes)
        self._bases: dict[Run, mx.array | None] = {}  # None: MLX refused, do not ask again

    def view(self, entry: TensorEntry) -> mx.array | str:
        """Returns the tensor as a view of the mapped file, or in words why it must be copied."""
        reason = why_copy(entry, max_run_bytes=self._max_run_bytes)
        if reason is not None:
            return reason
        run = next(run for run in self._runs if run.holds(entry))
        if run not in self._bases:
            self._bases[run] = self._make_base(run)
        base = self._bases[run]
        return REFUSED if base is None else cut_tensor(base, entry, run_begin=run.begin)

    @property
    def bases(self) -> list[mx.array]:
        """The buffers that were adopted so far: uint32 arrays, each one run."""
        return [base for base in self._bases.values() if base is not None]

    def _make_base(self, run: Run) -> mx.array | None:
        try:
            return self._adopt(run)
        except (ValueError, RuntimeError, TypeError) as error:
            logger.warning(
                "cannot share %d mapped bytes, they will be copied: %s", run.num_bytes, error
            )
            return None


def cut_tensor(base: mx.array, entry: TensorEntry, *, run_begin: int) -> mx.array:
    """Returns the tensor that lies in a uint32 array over the file's bytes from `run_begin` on.

    The tensor must be aligned to its element size and not empty. Only slices, views and reshapes:
    none copies.
    """
    element = ELEMENT_TYPES[entry.dtype]
    # Widened to whole elements, or an 8-byte type would start in the middle of one.
    step = max(_WORD_BYTES, element.size)
    begin = (entry.begin - run_begin) // step * step
    end = -(-(entry.end - run_begin) // step) * step
    lead = (entry.begin - run_begin - begin) // element.size
    flat = base[begin // _WORD_BYTES : end // _WORD_BYTES].view(element.mlx)
    return flat[lead : lead + entry.num_bytes // element.size].reshape(entry.shape)


def _page_span(entry: TensorEntry, page_bytes: int) -> tuple[int, int]:
    """The whole pages that a tensor touches, as (begin, end) in bytes."""
    return entry.begin // page_bytes * page_bytes, -(-entry.end // page_bytes) * page_bytes
