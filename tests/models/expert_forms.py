"""The forms in which a model's experts are saved, made of each other; and golden models in them."""

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_edge.weights.writer import write_checkpoint
from tests.models.test_goldens import FOLDER, read_golden, write_model

Tensors = dict[str, mx.array]


def write_changed(name: str, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The golden's model with its tensors in another form."""
    golden = read_golden(FOLDER / f"{name}.json")
    write_model(golden, "saved", folder)
    tensors = mx.load(str(next(folder.glob("*.safetensors"))))
    assert isinstance(tensors, dict)
    mx.eval(list(tensors.values()))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(folder, change(tensors))
    return folder


def collect(tensors: Tensors) -> dict[tuple[str, str], list[mx.array]]:
    """Takes the matrices of single experts out: by what stands before `experts.`, and their own name."""
    found: dict[tuple[str, str], dict[int, mx.array]] = {}
    for key in list(tensors):
        if match := re.fullmatch(r"(.*)experts\.(\d+)\.(\w+)\.weight", key):
            before, index, name = match.groups()
            found.setdefault((before, name), {})[int(index)] = tensors.pop(key)
    assert found
    return {key: [by_index[i] for i in sorted(by_index)] for key, by_index in found.items()}


MLX_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def stack_experts(tensors: Tensors) -> Tensors:
    """As mlx-lm saves them."""
    for (before, name), matrices in collect(tensors).items():
        word = MLX_NAMES.get(name, name)
        tensors[f"{before}switch_mlp.{word}.weight"] = mx.stack(matrices)
    return tensors


def fuse_experts(tensors: Tensors) -> Tensors:
    """As transformers 5 holds them."""
    found = collect(tensors)
    for before in {before for before, _ in found}:
        own = {MLX_NAMES.get(n, n): mx.stack(found[b, n]) for b, n in found if b == before}
        both = mx.concatenate([own["gate_proj"], own["up_proj"]], axis=1)
        tensors[f"{before}experts.gate_up_proj"] = both
        tensors[f"{before}experts.down_proj"] = own["down_proj"]
    return tensors
