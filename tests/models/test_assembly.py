"""A model folder whose tensors do not fit its configuration: one line that names the tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_edge.errors import ModelFormatError
from mlx_edge.models.load import load_model
from mlx_edge.weights import write_safetensors
from tests.models.tiny import CONFIGS, make_model, save_model

Tensors = dict[str, mx.array]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = CONFIGS["llama2"]
    return save_model(make_model(config), config, tmp_path)


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    mx.eval(list(tensors.values()))
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(DOWN), f"tensor {DOWN} is missing"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (lambda t: t.update({DOWN: t[DOWN].T}), f"tensor {DOWN} is F32 [96, 64], expected"),
        (lambda t: t.update({DOWN: mx.zeros((0, 96))}), f"tensor {DOWN} is F32 [0, 96], expected"),
        (lambda t: t.update({DOWN: t[DOWN].astype(mx.int8)}), f"tensor {DOWN} is I8 [64, 96]"),
        (
            lambda t: t.update({"model.layers.3.mlp.down_proj.weight": t[DOWN]}),
            "tensors that this model does not use: model.layers.3.mlp.down_proj.weight",
        ),
        (lambda t: t.update({f"x{i}": t[DOWN] for i in range(9)}), "x0, x1, x2 and 6 more"),
    ],
    ids=["missing", "no head", "transposed", "empty", "integers", "extra", "many extra"],
)
def test_tensors_that_do_not_fit(
    folder: Path, change: Callable[[Tensors], Any], named: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelFormatError) as raised:
        load_model(folder)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_stored_rotary_frequencies_are_ignored(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((16,))}
    rewrite(folder, lambda tensors: tensors.update(extra))
    load_model(folder)


def test_a_saved_tied_head_is_accepted(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = load_model(folder)
    assert model.head.projection is model.embedding.table


def test_half_weights_are_computed_in_float32_on_a_cpu(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({k: v.astype(mx.bfloat16) for k, v in t.items()}))
    model = load_model(folder)
    logits = model(mx.array([[1, 2, 3]]))
    wanted = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else mx.bfloat16
    assert logits.dtype == wanted
    assert model.load_report.total_bytes > 0


def test_quantization_of_other_weights_is_said(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    packed = {**config, "quantization": {"group_size": 64, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(packed))
    rewrite(folder, lambda t: t.update({DOWN: mx.zeros((64, 12), mx.uint32)}))
    with pytest.raises(ModelFormatError, match=r"down_proj\.weight is U32 \[64, 12\]"):
        load_model(folder)
