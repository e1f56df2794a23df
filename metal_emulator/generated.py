"""The source that `mx.fast.metal_kernel` generates, as MLX itself prints it.

While a function is exported MLX records a kernel even where it cannot run one, and with `verbose` it prints the text
that a Mac would compile. So the signature, the template and the address space of small inputs are MLX's, not imitated.
"""

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

_FENCE = "```"
_PRINTING = threading.Lock()  # the process's standard output is redirected while MLX prints


def generated_source(
    kernel: Callable[..., Any],
    inputs: Sequence[mx.array],
    *,
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, Any]],
) -> str:
    """The text for these arguments: header, template, signature, body, instantiation.

    `kernel` is what `mx.fast.metal_kernel` gave. Errors of MLX about the arguments pass through.
    """

    def launch(*arrays: mx.array) -> tuple[mx.array, ...]:
        return tuple(
            kernel(
                inputs=list(arrays),
                template=list(template),
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
                output_shapes=[tuple(shape) for shape in output_shapes],
                output_dtypes=list(output_dtypes),
                verbose=True,
            )
        )

    printed = _printed(launch, inputs)
    parts = printed.split(_FENCE + "\n")
    if len(parts) < 3:
        message = (
            f"MLX printed no kernel source where it was expected; it printed {printed[:200]!r}"
        )
        raise RuntimeError(message)
    return _FENCE.join(parts[1:-1]).removesuffix("\n")


def _printed(launch: Callable[..., Any], inputs: Sequence[mx.array]) -> str:
    """What the process writes to its standard output while MLX exports the launch."""
    with _PRINTING, tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        saved = os.dup(1)
        printed = Path(folder) / "printed"
        try:
            with printed.open("wb") as file:
                os.dup2(file.fileno(), 1)
            mx.export_function(str(Path(folder) / "launch.mlxfn"), launch, *inputs)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        return printed.read_text(encoding="utf-8")
