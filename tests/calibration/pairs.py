"""Models to compare in tests: tiny random ones, and the bundled one in fewer bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.models.config import ModelConfig
from mlx_edge.quant import Packing, quantize, stored_tensors
from mlx_edge.weights import Checkpoint, write_safetensors
from mlx_edge.weights.hub import find_model
from tests.models.tiny import CONFIGS, make_model, save_model


def open_model(folder: Path) -> LayerwiseModel:
    return LayerwiseModel(Checkpoint.open(folder), ModelConfig.from_folder(folder))


def tiny_folder(folder: Path, name: str = "llama2", seed: int = 0, noise: float = 0.0) -> Path:
    """A tiny random model; `noise` is added to each weight, for a second one beside it."""
    model = make_model(CONFIGS[name], seed)
    save_model(model, CONFIGS[name], folder)
    if noise:
        change_weights(
            folder, lambda _, w: w + noise * mx.random.normal(w.shape, key=mx.random.key(7))
        )
    return folder


def change_weights(folder: Path, change: Callable[[str, mx.array], mx.array]) -> None:
    """Write the folder's tensors of two dimensions anew."""
    with Checkpoint.open(folder, use_mmap=False) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in sorted(checkpoint.names())}
    mx.eval(list(tensors.values()))
    changed = {n: change(n, w) if w.ndim == 2 else w for n, w in tensors.items()}
    mx.eval(list(changed.values()))
    write_safetensors(folder / "model.safetensors", changed)


def pocket_folder(folder: Path, packing: Packing | None = None) -> Path:
    """The bundled model, round-to-nearest where a packing is given."""
    source = find_model("pocket")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if packing is None:
        return folder
    tensors = {}
    with Checkpoint.open(source) as checkpoint:
        for name in sorted(checkpoint.names()):
            weight = checkpoint.read(name)
            if weight.ndim == 2:
                layer = name.removesuffix(".weight")
                tensors |= stored_tensors(layer, quantize(weight, packing, mx.float16))
            else:
                tensors[name] = weight
        write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": packing.group_size, "bits": packing.bits}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
