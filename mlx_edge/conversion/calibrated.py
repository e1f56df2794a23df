"""The part of a conversion that runs the model: its text, the allocation of bits, the calibrating methods.

A method is looked for by its name, when it is asked for: `quantize_gptq` in `calibration/gptq.py`. Works on a folder of
floats; who has a model in another form writes one first.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_edge.calibration.activations import describe_scales, static_scales
from mlx_edge.calibration.allocation import allocate
from mlx_edge.calibration.comparison import compare
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.calibration.rounding import RoundedModel
from mlx_edge.calibration.sensitivity import (
    CANDIDATES,
    Sensitivity,
    join_shapes,
    layer_shapes,
    measure_sensitivity,
)
from mlx_edge.calibration.text import BUILT_IN, Samples, cut_samples, read_text
from mlx_edge.conversion.naming import StoredNames
from mlx_edge.conversion.pipeline import Progress, Stored
from mlx_edge.conversion.plan import Packings
from mlx_edge.conversion.request import Bars, Request, TextRequest
from mlx_edge.errors import InvalidRequestError, UnsupportedModelError
from mlx_edge.models.config import ModelConfig
from mlx_edge.text import load_tokenizer
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.writer import replacing

SEQUENCE_LENGTH = 256
TABLE_NAME = "sensitivity.json"
MAX_AIMS = 6  # of an allocation for a damage; each measures the whole model


@contextmanager
def open_model(folder: Path) -> Iterator[LayerwiseModel]:
    """The model in a folder, a layer in memory at a time; nothing is mapped.

    Raises: MLXEdgeError when it is broken or of a family that is not defined here.
    """
    config = ModelConfig.from_folder(folder)
    with Checkpoint.open(folder, use_mmap=False) as checkpoint:
        yield LayerwiseModel(checkpoint, config)


def read_samples(folder: Path, request: TextRequest) -> Samples:
    """Rows to calibrate with and rows held out, in the tokens of the model in `folder`.

    Raises: MLXEdgeError when the model has no tokenizer, or the text is too short or cannot be read.
    """
    context = ModelConfig.from_folder(folder).context_size
    length = request.sequence_length or min(SEQUENCE_LENGTH, context)
    if length > context:
        raise InvalidRequestError(
            f"--sequence-length {length} is beyond the {context} positions of {folder.name}; give a smaller one"
        )
    tokenizer = load_tokenizer(folder)
    text, name = read_text(request.source or BUILT_IN)
    return cut_samples(
        tokenizer, text, name, num_rows=request.num_samples, length=length, seed=request.seed
    )


def allocate_bits(
    model: LayerwiseModel, rows: mx.array, request: Request, dtype: mx.Dtype, kept: Path, bars: Bars
) -> Packings:
    """The packing of each layer by its measured damage.

    The table of damages is read from the file of the request, or from `kept`, where an earlier run left it; else it is
    measured. Afterwards it is in `kept`.
    """
    _refuse_experts(model, "measuring layers")
    names = StoredNames(model)
    given = request.sensitivities
    known = next((p for p in (given, kept) if p is not None and p.is_file()), None)
    if known is not None:
        table = Sensitivity.from_json(_read(known))
        table = table.select(join_shapes(layer_shapes(model), names.parts), table.candidates, dtype)
    else:
        on_progress = bars("Measuring each layer's sensitivity", "it")
        measured = measure_sensitivity(model, rows, CANDIDATES, dtype, on_progress=on_progress)
        table = measured.join(names.parts)
    if known != kept:
        write_table(kept, table.to_json())
    if request.max_kl is None:
        return allocate(table, target_bpw=request.target_bpw, max_kl=None)
    return _keep_below(model, rows, table, request.max_kl, dtype)


def _keep_below(
    model: LayerwiseModel, rows: mx.array, table: Sensitivity, max_kl: float, dtype: mx.Dtype
) -> Packings:
    """An allocation whose measured damage is at most `max_kl`.

    The sum of the layers' damages is a guess, and a hopeful one, as the least of many noisy figures was chosen: what it
    misses by, the next guess aims lower.
    """
    names, aim = StoredNames(model), max_kl
    for _ in range(MAX_AIMS):
        packings = allocate(table, target_bpw=None, max_kl=aim)
        rounded = RoundedModel(model, names.spread(packings), dtype)
        measured = compare(model, rounded, rows).kl_mean
        if measured <= max_kl:
            return packings
        aim *= 0.95 * max_kl / measured
    return allocate(table, target_bpw=None, max_kl=0.0)


def calibrate(
    model: LayerwiseModel,
    rows: mx.array,
    packings: Packings,
    dtype: mx.Dtype,
    request: Request,
    bars: Bars,
) -> Stored:
    """The tensors that the request's method chooses, layer by layer, as they are stored.

    Raises: UnsupportedModelError for a mixture of experts.
    """
    _refuse_experts(model, request.method)
    module = import_module(f"mlx_edge.calibration.{request.method}")
    method = getattr(module, f"quantize_{request.method}")
    on_progress = bars(f"Calibrating ({request.method})", "it")
    names = StoredNames(model)
    stored: Iterator[Mapping[str, mx.array]] = method(
        model, rows, names.spread(packings), dtype, on_progress=on_progress
    )
    return map(names.join, stored)


def _refuse_experts(model: LayerwiseModel, method: str) -> None:
    """Each expert sees few rows of a text, and no method here counts them."""
    family = model.config.family
    if family.experts is not None:
        raise UnsupportedModelError(
            f"{method} does not know experts, which {family.model_type} has; leave the method out: rtn serves it"
        )


def fix_inputs(
    model: LayerwiseModel, rows: mx.array, packings: Packings, on_progress: Progress
) -> dict[str, Any]:
    """The entry of config.json with the int8 steps of the inputs of every quantized layer but the down projections.

    Those keep floats: a few of their inputs are a hundred times the others, and one fixed step loses the rest.
    """
    _refuse_experts(model, "fixing inputs")
    family, names = model.config.family, StoredNames(model)
    kept: dict[str, float] = {}
    for name, scale in static_scales(model, rows, on_progress=on_progress).items():
        is_tied_head = name == family.head and model.is_tied
        owner = names.of(family.embedding if is_tied_head else name)
        if packings.get(owner) is not None and not name.endswith(family.down):
            kept[names.of(name)] = scale  # linears in one tensor have the same inputs
    return {"activation_quantization": describe_scales(kept)}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}") from None


def write_table(path: Path, text: str) -> None:
    """Keeps a table of damages for another conversion."""
    with replacing(path) as file:
        file.write(text.encode())
