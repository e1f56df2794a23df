"""A model with what a method yields in place of its own tensors, as a conversion writes it; rtn for the rest.

And texts for the bundled model: of its training stream to calibrate with, of its held-out items to measure on.
"""

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path

import mlx.core as mx

from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.models.config import ModelConfig
from mlx_edge.quant import Packing, quantize, stored_tensors
from mlx_edge.text import load_tokenizer
from mlx_edge.weights import Checkpoint, write_safetensors
from mlx_edge.weights.hub import find_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
corpus = import_module("pocket_corpus")


def layer_names(model: LayerwiseModel) -> list[str]:
    """All linears, the embedding and the head."""
    names = sorted(model.checkpoint.names())
    return [n.removesuffix(".weight") for n in names if len(model.checkpoint.entry(n).shape) == 2]


def uniform(model: LayerwiseModel, packing: Packing) -> dict[str, Packing | None]:
    """The same packing for every layer."""
    return dict.fromkeys(layer_names(model), packing)


def convert(
    model: LayerwiseModel,
    packings: Mapping[str, Packing | None],
    tensors: Mapping[str, mx.array],
    dtype: mx.Dtype,
    folder: Path,
) -> LayerwiseModel:
    """The model from a folder that holds `tensors`, and the others of `model` as `packings` has them."""
    stored = dict(tensors)
    for name in sorted(model.checkpoint.names()):
        layer = name.removesuffix(".weight")
        if name in tensors:
            continue
        packing = packings.get(layer)
        if packing is None:
            stored[name] = model.checkpoint.read(name).astype(dtype)
        else:
            stored |= stored_tensors(layer, quantize(model.checkpoint.read(name), packing, dtype))
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", stored)
    config = json.loads((model.checkpoint.folder / "config.json").read_text())
    sizes = {
        layer: {"group_size": p.group_size, "bits": p.bits, "mode": p.mode} if p else False
        for layer, p in packings.items()
    }
    config["quantization"] = {"group_size": 64, "bits": 4, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return LayerwiseModel(Checkpoint.open(folder), ModelConfig.from_folder(folder))


def logits(model: LayerwiseModel, rows: mx.array) -> mx.array:
    """(R, L, V) float32."""
    return mx.concatenate(list(model.logits(model.run(rows))))


def divergence(model: LayerwiseModel, other: LayerwiseModel, rows: mx.array) -> float:
    """Mean KL(model || other) of a token, in nats."""
    first, second = (
        x - mx.logsumexp(x, axis=-1, keepdims=True)
        for x in (logits(model, rows), logits(other, rows))
    )
    return float((mx.exp(first) * (first - second)).sum(-1).mean())


def pocket_rows(num_rows: int, *, is_held_out: bool) -> mx.array:
    """Rows (R, 128) of documents one after the other, in the bundled model's tokens."""
    if is_held_out:
        suites = corpus.draw_tests({"command": 40, "paraphrase": 40, "qa": 40})
        found = [item for items in zip(*suites.values(), strict=True) for item in items]
    else:
        found = list(islice((d for d in corpus.documents(5) if d.prompt), 40 * num_rows))
    tokenizer = load_tokenizer(find_model("pocket"))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens: list[int | None] = []
    for item in found:
        text = f"<user>{item.prompt}<assistant>{item.answer}"
        tokens += [begin, *tokenizer.encode(text, add_special_tokens=False), end]
    assert len(tokens) >= num_rows * 128
    return mx.array(tokens[: num_rows * 128], dtype=mx.int32).reshape(num_rows, 128)
