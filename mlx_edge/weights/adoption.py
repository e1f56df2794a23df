"""How the pages of a file become an MLX array on this machine, or in words why they cannot.

    Metal    a buffer may wrap pages: `mx.asarray(copy=False)` on a mapping
    Linux    MLX's CPU allocator knows only its own memory: the extension maps the file so that it looks like that
    else     everything is copied

Knows no tensor and no header: it is given a file and a run of whole pages.
"""

import sys
from collections.abc import Callable
from mmap import mmap
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_edge.weights.mapping import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

Adopt = Callable[[mmap, int, Run], mx.array]
"""(mapping of the whole file, its descriptor, run of pages) -> uint32 array on these pages; raises if it cannot."""

NOT_ASKED_FOR = "as asked for"

_NOT_HERE = "this platform cannot map into MLX"
_WORD_BYTES = 4  # the base arrays are uint32


def find_adoption() -> Adopt | str:
    """Returns how MLX adopts pages for the device in use, or why it does not."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return _adopt_on_metal if mx.metal.is_available() else _NOT_HERE
    if sys.platform != "linux":
        return _NOT_HERE
    # Only now: the extension takes time to load.
    from mlx_edge.ops.cpu import find_extension

    extension = find_extension()
    if isinstance(extension, str):
        return f"needs the native CPU part: {extension}"
    if not hasattr(extension, "adopt_pages"):
        return "the native CPU part is older than this; install mlx_edge again"

    def adopt(mapping: mmap, descriptor: int, run: Run) -> mx.array:
        array: mx.array = extension.adopt_pages(descriptor, run.begin, run.num_bytes)
        return array

    return adopt


def _adopt_on_metal(mapping: mmap, descriptor: int, run: Run) -> mx.array:
    """MLX's deleter owns the numpy array, that owns the mapping."""
    import numpy as np  # slow to import: not where it is of no use

    pages: NDArray[np.uint32] = np.asarray(_Pages(mapping, run))
    return mx.asarray(pages, copy=False)


class _Pages:
    """Pages of a mapping for numpy, rounded up past the file's end (where they read as zero).

    Python's own buffer of a mapping ends with the file, but Metal adopts only whole pages. The
    numpy array holds this object and this object holds the mapping, so that the pages live as long
    as the array.
    """

    def __init__(self, mapping: mmap, run: Run) -> None:
        import numpy as np

        self._whole_file = np.frombuffer(
            mapping, dtype=np.uint8
        )  # an export: the mapping cannot be closed under it
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (self._whole_file.ctypes.data + run.begin, True),  # True: read-only
            "shape": (run.num_bytes // _WORD_BYTES,),
            "typestr": np.dtype(np.uint32).str,
        }
