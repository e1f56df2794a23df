"""Model folders for the tests of conversions: tiny, with what the tests need to go wrong in them."""

import json
from pathlib import Path

import mlx.core as mx

from mlx_edge.conversion.converter import Conversion, convert
from mlx_edge.conversion.request import Request
from mlx_edge.conversion.source import FolderSource
from mlx_edge.weights import write_checkpoint
from tests.models.tiny import CONFIGS, make_model, save_model


def make_folder(folder: Path, name: str = "llama2", **changes) -> Path:
    """A tiny float32 model of mlx-lm's, without a tokenizer."""
    config = CONFIGS[name] | changes
    return save_model(make_model(config), config, folder)


def edit_tensors(folder: Path, **changes: mx.array) -> Path:
    """The folder with other tensors in place of its own; in names __ stands for a dot."""
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.eval(tensors)
    tensors |= {name.replace("__", "."): array for name, array in changes.items()}
    write_checkpoint(folder, tensors)
    return folder


def run(source: Path, target: Path, **options) -> Conversion:
    """A conversion without a receipt, unless it is asked for."""
    is_forced = options.pop("is_forced", False)
    with FolderSource(source) as opened:
        return convert(
            opened, target, Request(**{"has_receipt": False} | options), is_forced=is_forced
        )


def read_config(folder: Path):
    return json.loads((folder / "config.json").read_text())


def read_weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}
