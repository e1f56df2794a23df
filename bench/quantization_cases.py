"""The formats and methods that bench/quantization.py compares, and the folders it makes with `mlx_edge.conversion`.

Every folder is made as `python -m mlx_edge.convert` makes it. Knows no scores.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench.peer_models import Shape, config_json
from bench.quantization_report import INT8, UNIFORM
from mlx_edge.calibration.text import Samples
from mlx_edge.conversion.converter import Conversion, convert
from mlx_edge.conversion.pipeline import Rounding
from mlx_edge.conversion.request import Request
from mlx_edge.conversion.source import FolderSource
from mlx_edge.quant import Packing


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    request: Request
    is_sampled: bool = False  # its method reads text: done for every calibration sample
    is_quick: bool = False  # part of --quick


def _rounded(name: str, packing: Packing, *, is_quick: bool = False, **rounding: Any) -> Case:
    request = Request(action="quantize", packing=packing, rounding=Rounding(**rounding))
    return Case(name, request, is_quick=is_quick)


def _calibrated(
    method: Any, bits: int, group_size: int, *, is_quick: bool = False, **options: Any
) -> Case:
    request = Request(
        action="quantize", packing=Packing(group_size, bits), method=method, **options
    )
    name = f"{method} {bits} bit g{group_size}"
    return Case(name, request, is_sampled=True, is_quick=is_quick)


def _mixed(method: Any, *, is_quick: bool = False) -> Case:
    request = Request(action="quantize", method=method, target_bpw=4.5)
    return Case(f"{method} mixed 4.5", request, is_sampled=True, is_quick=is_quick)


FLOAT32 = Case("float32", Request(dtype=mx.float32), is_quick=True)
CASES: tuple[Case, ...] = (
    FLOAT32,
    Case("float16", Request(dtype=mx.float16)),
    _rounded(INT8, Packing(64, 8), is_quick=True),
    _rounded("rtn 8 bit symmetric per group", Packing(64, 8), is_symmetric=True),
    _rounded("rtn 8 bit symmetric per channel", Packing(64, 8), is_symmetric=True, per="channel"),
    _rounded("rtn 8 bit asymmetric per channel", Packing(64, 8), per="channel"),
    _rounded("rtn 8 bit symmetric per tensor", Packing(64, 8), is_symmetric=True, per="tensor"),
    _calibrated("smooth", 8, 64),
    _rounded("mxfp8", Packing(32, 8, "mxfp8")),
    _rounded("rtn 6 bit g64", Packing(64, 6)),
    _rounded("rtn 5 bit g64", Packing(64, 5)),
    _rounded("rtn 4 bit g32", Packing(32, 4)),
    _rounded(UNIFORM, Packing(64, 4), is_quick=True),
    _rounded("rtn 4 bit g128", Packing(128, 4)),
    _rounded("mxfp4", Packing(32, 4, "mxfp4")),
    _rounded("nvfp4", Packing(16, 4, "nvfp4")),
    _calibrated("gptq", 4, 64, is_quick=True),
    _calibrated("awq", 4, 64, is_quick=True),
    _calibrated("dwq", 4, 64, is_quick=True),
    _calibrated("gptq", 4, 32),
    _calibrated("awq", 4, 32),
    _calibrated("dwq", 4, 32),
    _mixed("rtn", is_quick=True),
    _mixed("gptq"),
    _rounded("rtn 3 bit g64", Packing(64, 3)),
    _calibrated("gptq", 3, 64),
    _calibrated("dwq", 3, 64),
    _rounded("rtn 2 bit g64", Packing(64, 2)),
    _calibrated("gptq", 2, 64),
)


def make_folder(
    source: Path,
    case: Case,
    target: Path,
    samples: Samples | None = None,
    table: Path | None = None,
) -> Conversion:
    """Convert the float folder `source`; `samples` calibrate the methods that need text, `table` keeps damages."""
    assert samples is not None or not case.is_sampled
    request = replace(case.request, has_receipt=False, sensitivities=table)
    return convert(FolderSource(source), target, request, samples=samples, is_forced=True)


def make_random_model(shape: Shape, folder: Path) -> None:
    """A float32 model of a real shape with random weights, for speeds alone; it has no tokenizer."""
    mx.random.seed(0)
    arrays = {"model.norm.weight": mx.ones((shape.hidden_size,))}

    def add_linear(name: str, rows: int, columns: int) -> None:
        arrays[f"{name}.weight"] = mx.random.normal((rows, columns)) * columns**-0.5

    add_linear("model.embed_tokens", shape.vocab_size, shape.hidden_size)
    for index in range(shape.num_layers):
        for name, (rows, columns) in shape.linears().items():
            add_linear(f"model.layers.{index}.{name}", rows, columns)
        for name, length in shape.norms().items():
            arrays[f"model.layers.{index}.{name}.weight"] = mx.ones((length,))
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    config = config_json(shape) | {"torch_dtype": "float32"}
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
