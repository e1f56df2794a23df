"""From a name to a model that runs: find the folder, read the configuration, map the weights, load the text side."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.assembly import Assembler
from mlx_edge.models.bridge import BRIDGES, load_bridged
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Decoder, find_arrays
from mlx_edge.models.interface import LanguageModel, ModelLimits
from mlx_edge.models.packing import Packer
from mlx_edge.runtime import convert_float, missing_native_part
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
    bridge: None = ...,
) -> tuple[Decoder, Tokenizer]: ...


@overload
def load(
    path_or_hf_repo: str = ...,
    *,
    lazy: bool = ...,
    return_config: Literal[True],
    revision: str | None = ...,
    bridge: None = ...,
) -> tuple[Decoder, Tokenizer, ModelConfig]: ...


@overload
def load(
    path_or_hf_repo: str = ...,
    *,
    lazy: bool = ...,
    return_config: Literal[False] = ...,
    revision: str | None = ...,
    bridge: str | None,
) -> tuple[LanguageModel[Any], Tokenizer]: ...


@overload
def load(
    path_or_hf_repo: str = ...,
    *,
    lazy: bool = ...,
    return_config: Literal[True],
    revision: str | None = ...,
    bridge: str | None,
) -> tuple[LanguageModel[Any], Tokenizer, ModelLimits]: ...


def load(
    path_or_hf_repo: str = DEFAULT_MODEL,
    *,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    bridge: str | None = None,
) -> tuple[LanguageModel[Any], Tokenizer] | tuple[LanguageModel[Any], Tokenizer, ModelLimits]:
    """Load a model and its tokenizer from the bundled model's name, a folder or a hub id.

    What is returned may be used from any thread, and from several at once. `lazy` leaves the weights to be brought
    in by the first step, which must then run in the thread that loaded; `return_config` adds the configuration.
    `bridge="mlx-lm"` runs the model by mlx-lm's definition of its architecture, for one that is not defined here.

    Raises: ModelFormatError for a folder that is missing or broken, UnsupportedModelError for a model that
    needs mathematics which are not here, InvalidRequestError for a name, revision or bridge that does not exist.
    """
    if bridge is not None and bridge not in BRIDGES:
        raise InvalidRequestError(f"bridge is {bridge!r}, expected {' or '.join(BRIDGES)}")
    notice = missing_native_part()
    if notice:
        logger.warning(notice)
    folder = find_model(str(path_or_hf_repo), revision=revision)
    model: LanguageModel[Any]
    model = load_model(folder, lazy=lazy) if bridge is None else load_bridged(folder, lazy=lazy)
    tokenizer = load_tokenizer(folder)
    return (model, tokenizer, model.config) if return_config else (model, tokenizer)


def load_model(folder: Path, *, lazy: bool = False) -> Decoder:
    """The model in a folder, without its tokenizer; raises as `load` does."""
    config = ModelConfig.from_folder(folder)
    with Checkpoint.open(folder) as checkpoint:
        packer = Packer(checkpoint, config.quantization) if ops.uses_cpu_kernels() else None
        model = Assembler(checkpoint, config, convert_float, packer).assemble()
        start = time.perf_counter()
        if not lazy:
            # All of them, also the packed ones and the views: what stays lazy can be used in this thread only.
            mx.eval(list(find_arrays(model)))
        report = replace(
            checkpoint.report,
            convert_s=time.perf_counter() - start,
            packed=packer.file.report if packer is not None and packer.file is not None else None,
        )
    return replace(model, load_report=report)
