"""The items of `metal_items.py` in a process of their own, for `mac_check.py`: their sources, or their results.

    PYTHONPATH=. python scripts/mac_cases.py sources FOLDER   # a file for each text that MLX would compile; their list
    PYTHONPATH=. python scripts/mac_cases.py run LOG          # each item on the kernels beside its golden; a line each

Sources need no GPU: MLX prints them when a launch is exported, and nothing is computed. A result's error is in units
of what the contract allows. Bits are compared with those of the emulator; what differs is counted, not judged: exp,
sin and roots may be rounded otherwise on a GPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from metal_items import Array, Golden, Item, list_items, load_goldens, read_bits, run_on

from mlx_edge.ops import metal, metal_launch

Result = dict[str, Any]
Size = tuple[int, int, int]


class SourceRecorder:
    """A device that keeps what MLX would compile and computes nothing: results are zeros."""

    def __init__(self) -> None:
        self.sources: dict[str, Result] = {}  # by text

    def metal_kernel(self, **arguments: Any) -> Callable[..., list[mx.array]]:
        """As `mx.fast.metal_kernel`."""
        from metal_emulator.generated import generated_source  # this part's alone

        made: Any = mx.fast.metal_kernel(**arguments)

        def launch(
            *, inputs: Sequence[mx.array], grid: Size, threadgroup: Size, **others: Any
        ) -> list[mx.array]:
            text = generated_source(made, inputs, **others)
            source = {
                "name": arguments["name"],
                "template": [f"{name}={value}" for name, value in others["template"]],
                "grid": grid,
                "threadgroup": threadgroup,
                "bytes": len(text),
            }
            self.sources.setdefault(text, source)
            outputs = zip(others["output_shapes"], others["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in outputs]

        return launch


def record_sources(items: Sequence[Item], folder: Path) -> Result:
    """Writes a file for every text; the list of them, and the items that failed."""
    recorder = SourceRecorder()
    failures: dict[str, str] = {}
    for item in items:
        try:
            arguments = item.inputs.arguments()
            compute, refuse, _ = metal.OPS[item.op]
            if metal.leave(item.op, arguments) or refuse(*arguments):
                continue
            with metal_launch.on(recorder):
                compute(*arguments)
        except Exception as error:  # of one item; the others go on
            failures[str(item)] = f"{type(error).__name__}: {error}"
    sources = []
    for index, (text, source) in enumerate(recorder.sources.items()):
        file = f"{index:03d}_{source['name']}.metal"
        (folder / file).write_text(text, encoding="utf-8")
        sources.append({"file": file, **source})
    return {"sources": sources, "failures": failures}


def order_bits(bits: Array, digits: int) -> Array:
    """Floats' bits as integers in the order of the floats, one apart from the next."""
    sign = np.int64(1) << (digits - 1)
    magnitude = bits.astype(np.int64) & (sign - 1)
    return np.where(bits & sign, -magnitude, magnitude)


def compare(found: mx.array, golden: Golden) -> Result:
    """The error in units of the bound, and how far the emulator's bits are."""
    values = np.array(found.astype(mx.float32)).astype(np.float64).ravel()
    if values.size != golden.wanted.size:
        return {"failure": f"{values.size} numbers; the golden has {golden.wanted.size}"}
    if not np.isfinite(values).all():
        return {
            "failure": f"{(~np.isfinite(values)).sum()} of {values.size} numbers are not finite"
        }
    errors = np.abs(values - golden.wanted) / golden.bound
    worst = int(errors.argmax())
    result: Result = {
        "error": float(errors[worst]),
        "worst": worst,
        "found": float(values[worst]),
        "wanted": float(golden.wanted[worst]),
        "numbers": values.size,
    }
    digits = 8 * found.dtype.size
    apart = np.abs(order_bits(read_bits(found), digits) - order_bits(golden.bits, digits))
    result |= {"other_bits": int((apart > 0).sum()), "most_units_apart": int(apart.max())}
    if result["error"] > 1:
        result["failure"] = f"off by {result['error']:.3g} times what the contract allows"
    return result


def run_item(item: Item, backend: str, golden: Golden) -> Result:
    """One item on the backend, or why no kernel serves it."""
    if item.inputs.checksum != golden.checksum:
        return {
            "failure": "the inputs drawn here are not those of the golden: nothing was compared"
        }
    found = run_on(item, backend)
    if isinstance(found, str):
        return {"left": found}
    return compare(found, golden)


def run_items(items: Sequence[Item], backend: str, log: Path) -> None:
    """A line before each item, for the case that it ends this process, and one behind it."""
    goldens = load_goldens()
    with log.open("a", encoding="utf-8") as lines:
        for item in items:
            print(json.dumps({"begun": str(item)}), file=lines, flush=True)
            try:
                result = run_item(item, backend, goldens[str(item)])
            except Exception as error:  # of one item; the others go on
                result = {"failure": f"{type(error).__name__}: {error}"}
            print(json.dumps({"name": str(item), **result}), file=lines, flush=True)


def main() -> int:
    """Sources or results of the items."""
    parser = argparse.ArgumentParser(prog="mac_cases")
    parser.add_argument("what", choices=("sources", "run"))
    parser.add_argument("target", type=Path, help="folder of the sources, or file of the results")
    parser.add_argument("--backend", default="metal")
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", type=Path, help="a JSON list of names")
    args = parser.parse_args()
    skipped = json.loads(args.skip.read_text(encoding="utf-8")) if args.skip else []
    items = [i for i in list_items() if args.only in str(i) and str(i) not in skipped]
    if args.what == "sources":
        print(json.dumps(record_sources(items, args.target)))
    else:
        run_items(items, args.backend, args.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
