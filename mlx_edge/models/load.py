"""From a name to a model that runs: find the folder, read the configuration, map the weights, load the text side."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.assembly import Assembler, find_splits
from mlx_edge.models.bridge import BRIDGES, load_bridged
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Decoder, find_arrays
from mlx_edge.models.interface import LanguageModel, ModelLimits
from mlx_edge.models.packing import Packer
from mlx_edge.models.warm_up import warm_up
from mlx_edge.ops.cpu import has_cpu_only, trim_memory
from mlx_edge.ops.cpu import missing as find_missing
from mlx_edge.runtime import connect_blas, convert_float
from mlx_edge.text import Tokenizer, load_tokenizer
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.hub import DEFAULT_MODEL, find_model

logger = logging.getLogger(__name__)


@overload
def load(
    path_or_hf_repo: str = ...,
    *,
    lazy: bool = ...,
    return_config: Literal[False] = ...,
    revision: str | None = ...,
    precision: ops.Precision = ...,
    use_mmap: bool = ...,
    mlock: bool = ...,
    bridge: None = ...,
) -> tuple[Decoder, Tokenizer]: ...


@overload
def load(
    path_or_hf_repo: str = ...,
    *,
    lazy: bool = ...,
    return_config: Literal[True],
    revision: str | None = ...,
    precision: ops.Precision = ...,
    use_mmap: bool = ...,
    mlock: bool = ...,
    bridge: None = ...,
) -> tuple[Decoder, Tokenizer, ModelConfig]: ...


@overload
def load(
    path_or_hf_repo: str = ...,
    *,
    lazy: bool = ...,
    return_config: Literal[False] = ...,
    revision: str | None = ...,
    precision: ops.Precision = ...,
    use_mmap: bool = ...,
    mlock: bool = ...,
    bridge: str | None,
) -> tuple[LanguageModel[Any], Tokenizer]: ...


@overload
def load(
    path_or_hf_repo: str = ...,
    *,
    lazy: bool = ...,
    return_config: Literal[True],
    revision: str | None = ...,
    precision: ops.Precision = ...,
    use_mmap: bool = ...,
    mlock: bool = ...,
    bridge: str | None,
) -> tuple[LanguageModel[Any], Tokenizer, ModelLimits]: ...


def load(
    path_or_hf_repo: str = DEFAULT_MODEL,
    *,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    bridge: str | None = None,
    precision: ops.Precision = "int8",
    use_mmap: bool = True,
    mlock: bool = False,
) -> tuple[LanguageModel[Any], Tokenizer] | tuple[LanguageModel[Any], Tokenizer, ModelLimits]:
    """Load a model and its tokenizer from the bundled model's name, a folder or a hub id.

    What is returned may be used from any thread, and from several at once. `lazy` leaves the weights to be brought
    in by the first step, which must then run in the thread that loaded; `return_config` adds the configuration.
    `bridge="mlx-lm"` runs the model by mlx-lm's definition of its architecture, for one that is not defined here.
    On a CPU, `precision` is that of the activations that meet quantized weights: int8 codes in groups, or floats, which
    is several times slower. `use_mmap=False` copies the weights, so that nothing of the files is needed any more;
    `mlock` keeps them in memory.

    Raises: ModelFormatError for a folder that is missing or broken, UnsupportedModelError for a model that
    needs mathematics which are not here, InvalidRequestError for a name, revision or bridge that does not exist,
    MemoryBudgetError when the system does not let memory be locked.
    """
    if bridge is not None and bridge not in BRIDGES:
        raise InvalidRequestError(f"bridge is {bridge!r}, expected {' or '.join(BRIDGES)}")
    if bridge is not None and (precision, use_mmap, mlock) != ("int8", True, False):
        raise InvalidRequestError(
            "precision, use_mmap and mlock are for models that are defined here; "
            f"{bridge} loads its weights in its own way"
        )
    if has_cpu_only() and (lacking := find_missing()):
        logger.warning(f"runs on plain MLX ops, which are slow on a CPU: {lacking}")
    if reason := connect_blas():
        logger.info(reason)
    folder = find_model(str(path_or_hf_repo), revision=revision)
    model: LanguageModel[Any]
    if bridge is None:
        config = ModelConfig.from_folder(folder)
        tokenizer = load_tokenizer(folder)
        trim_memory()  # before the weights are mapped, so that the two never add up
        model = _load_weights(
            folder, config, lazy=lazy, precision=precision, use_mmap=use_mmap, mlock=mlock
        )
    else:
        model = load_bridged(folder, lazy=lazy)
        tokenizer = load_tokenizer(folder)
    return (model, tokenizer, model.config) if return_config else (model, tokenizer)


def load_model(
    folder: Path,
    *,
    lazy: bool = False,
    precision: ops.Precision = "int8",
    use_mmap: bool = True,
    mlock: bool = False,
) -> Decoder:
    """The model in a folder, without its tokenizer; options and errors as for `load`."""
    config = ModelConfig.from_folder(folder)
    return _load_weights(
        folder, config, lazy=lazy, precision=precision, use_mmap=use_mmap, mlock=mlock
    )


def _load_weights(
    folder: Path,
    config: ModelConfig,
    *,
    lazy: bool,
    precision: ops.Precision,
    use_mmap: bool,
    mlock: bool,
) -> Decoder:
    with Checkpoint.open(folder, use_mmap=use_mmap) as checkpoint:
        packer = None
        if ops.uses_cpu_kernels():
            packer = Packer(
                checkpoint,
                config.quantization,
                precision=precision,
                use_file=use_mmap,
                on_progress=show_progress("Packing weights for this CPU, once"),
                splits=find_splits(checkpoint, config),
            )
        model = Assembler(checkpoint, config, convert_float, packer).assemble()
        start = time.perf_counter()
        if not lazy:
            # All of them, also the packed ones and the views: what stays lazy can be used in this thread only.
            mx.eval(list(find_arrays(model)))
        if mlock:
            checkpoint.lock_memory()
            if packer is not None:
                packer.lock_memory()
        report = replace(
            checkpoint.report,
            convert_s=time.perf_counter() - start,
            packed=packer.report if packer is not None else None,
        )
    model = replace(model, load_report=report)
    if ops.uses_metal_kernels() and not lazy:
        warm_up(model)
    return model


def show_progress(title: str, unit: str = "B") -> Callable[[int, int], None]:
    """A bar of bytes, or of other units, on a terminal's stderr, for work that takes more than a moment."""
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            from tqdm import tqdm

            bar = tqdm(
                total=total,
                desc=title,
                unit=unit,
                unit_scale=unit == "B",
                initial=done,
                leave=False,
                delay=0.5,
                disable=None,
            )
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show
