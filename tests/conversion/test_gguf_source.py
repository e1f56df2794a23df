"""A GGUF file as a conversion reads it: the weights it was made from, the configuration, and nothing guessed."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.config import ModelConfig
from mlx_edge.quant import Packing, dequantize
from mlx_edge.weights.hub import find_model
from mlx_edge.weights.safetensors import SafetensorsFile
from tests.models.tiny import CONFIGS, make_model
from tests.weights.files import same

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the extra mlx-edge[gguf]")

from mlx_edge.conversion.gguf.repack import repack  # noqa: E402 (after the skip)
from mlx_edge.conversion.gguf.source import GGUFSource  # noqa: E402
from tests.conversion.gguf_files import add_sentencepiece, permute, write_model  # noqa: E402

POCKET = find_model("pocket")
WANTED = (
    *("llama2", "llama3", "llama-tied", "llama-bias", "mistral", "linear", "yarn"),
    *("qwen2", "qwen3", "qwen3-tied"),
)
# Sizes that fill blocks of 32.
WIDE = CONFIGS["llama-tied"] | {"intermediate_size": 128, "vocab_size": 160}


def weights_of(config: dict[str, Any]) -> dict[str, mx.array]:
    return {
        name: value.astype(mx.float16)
        for name, value in tree_flatten(make_model(config).parameters())
    }


def pocket_weights() -> dict[str, mx.array]:
    with SafetensorsFile(POCKET / "model.safetensors") as file:
        return {name: file.read(name) for name in file.tensors}


def write_pocket(path: Path, kind: str = "F16") -> Path:
    config = json.loads((POCKET / "config.json").read_text())
    return write_model(
        path, config, pocket_weights(), kind=kind, tokenizer=add_sentencepiece(POCKET)
    )


@pytest.mark.parametrize("kind", ["F16", "F32", "BF16"])
@pytest.mark.parametrize("wanted", WANTED)
def test_floats_are_those_the_file_was_made_from(tmp_path: Path, wanted: str, kind: str) -> None:
    config = CONFIGS[wanted]
    weights = weights_of(config)
    with GGUFSource(write_model(tmp_path / "m.gguf", config, weights, kind=kind)) as source:
        assert set(source.names()) == set(weights)
        for name in source.names():
            read = source.read(name)
            wanted_value = weights[name].astype(source.dtype(name))
            assert source.shape(name) == weights[name].shape
            assert source.quantized(name.removesuffix(".weight")) is None
            assert same(read, wanted_value), name


@pytest.mark.parametrize("wanted", WANTED)
def test_config_says_what_the_original_says(tmp_path: Path, wanted: str) -> None:
    config = CONFIGS[wanted]
    with GGUFSource(write_model(tmp_path / "m.gguf", config, weights_of(config))) as source:
        made = ModelConfig.from_hf(source.config)
    expected = ModelConfig.from_hf(config | {"model_type": made.model_type})
    assert made == expected


def test_names_are_in_the_order_of_use(tmp_path: Path) -> None:
    config = CONFIGS["qwen3"] | {"num_hidden_layers": 11}
    with GGUFSource(write_model(tmp_path / "m.gguf", config, weights_of(config))) as source:
        names = source.names()
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_values_are_those_of_the_package(tmp_path: Path, kind: str) -> None:
    weights = weights_of(WIDE)
    with GGUFSource(write_model(tmp_path / "m.gguf", WIDE, weights, kind=kind)) as source:
        for name in source.names():
            values = np.array(weights[name].astype(mx.float32))
            if values.ndim == 2:
                stored = gguf.GGMLQuantizationType[kind]
                blocks = gguf.quants.quantize(values, stored)
                values = gguf.quants.dequantize(blocks, stored)
            assert np.array_equal(np.array(source.read(name)), values), name


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_blocks_become_packs_without_another_rounding(
    tmp_path: Path, kind: str, bits: int, dtype: mx.Dtype
) -> None:
    path = write_model(tmp_path / "m.gguf", WIDE, weights_of(WIDE), kind=kind)
    with GGUFSource(path) as source:
        for name in source.names():
            layer = name.removesuffix(".weight")
            if len(source.shape(name)) == 2:
                stored = source.stored(layer, Packing(32, bits), dtype)
                assert stored is not None
                assert stored.scales.dtype == dtype
                assert np.array_equal(np.array(dequantize(stored)), np.array(source.read(name)))
                assert source.stored(layer, Packing(64, bits), dtype) is None
            else:
                assert source.stored(layer, Packing(32, bits), dtype) is None


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_repacked_values_are_exact_or_refused(kind: str, bits: int, dtype: mx.Dtype) -> None:
    """One row for each finite half as a scale, codes random."""
    scales = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    scales = scales[np.isfinite(scales)]
    codes = np.random.default_rng(0).integers(0, 256, (len(scales), 4 * bits), np.uint8)
    rows = np.concatenate([scales.view(np.uint8).reshape(-1, 2), codes], axis=1)
    offsets = scales.astype(np.float32) * -(1 << (bits - 1))
    as_stored = np.array(mx.array(offsets).astype(dtype).astype(mx.float32))
    half = np.array(mx.array(scales).astype(dtype).astype(mx.float32))
    fits = np.isfinite(as_stored) & (as_stored == offsets) & (half == scales)
    assert dtype != mx.float32 or fits.all()
    stored = repack(kind, rows[fits], dtype)
    assert stored is not None
    expected = gguf.quants.dequantize(rows[fits], gguf.GGMLQuantizationType[kind])
    assert np.array_equal(np.array(dequantize(stored)), expected)
    for row in rows[~fits][:: max(1, int((~fits).sum()) // 20)]:
        assert repack(kind, row[None], dtype) is None
    infinite = rows[:1].copy()
    infinite[:, :2] = np.array([np.inf], np.float16).view(np.uint8)
    assert repack(kind, infinite, dtype) is None


def test_rows_are_turned_back() -> None:
    """The two directions are each other's inverse, on heads of more than one size."""
    from mlx_edge.conversion.gguf.names import Place
    from mlx_edge.conversion.gguf.source import _row_order

    for heads, head_dim in ((1, 2), (4, 32), (3, 10)):
        rows = np.arange(heads * head_dim * 3).reshape(-1, 3)
        order = _row_order(Place("q", rows.shape, heads))
        assert order is not None
        assert np.array_equal(permute(rows, heads)[order], rows)


def test_pocket_reads_back_to_the_bit(tmp_path: Path) -> None:
    weights = pocket_weights()
    with GGUFSource(write_pocket(tmp_path / "pocket.gguf")) as source:
        for name, value in weights.items():
            assert same(source.read(name).astype(mx.float16), value), name
        own = json.loads((POCKET / "config.json").read_text())
        assert source.config["torch_dtype"] == "float16"
        assert {key: source.config[key] for key in own} == own


def add(method: str, *values: Any):
    return lambda writer: getattr(writer, method)(*values)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (add("add_sliding_window", 100), "attention.sliding_window = 100"),
        (add("add_expert_count", 8), "expert_count = 8"),
        (add("add_rope_scaling_type", gguf.RopeScalingType.LONGROPE), "'longrope'"),
        (add("add_logit_scale", 0.5), "logit_scale = 0.5"),
        (add("add_attention_scale", 0.5), "attention.scale"),
        (add("add_uint32", "llama.split_brain", 2), "split_brain = 2"),
        (add("add_uint16", "split.count", 3), "one of 3 parts.*llama-gguf-split --merge"),
        (add("add_rope_scaling_yarn_ext_factor", 0.5), "yarn_ext_factor"),
    ],
)
def test_other_mathematics_is_refused(tmp_path: Path, facts: Any, message: str) -> None:
    path = write_model(tmp_path / "m.gguf", WIDE, weights_of(WIDE), facts=facts)
    with pytest.raises(UnsupportedModelError, match=message):
        GGUFSource(path)


def test_a_window_as_wide_as_the_context_is_none(tmp_path: Path) -> None:
    facts = add("add_sliding_window", WIDE["max_position_embeddings"])
    with GGUFSource(write_model(tmp_path / "m.gguf", WIDE, weights_of(WIDE), facts=facts)) as read:
        assert "sliding_window" not in read.config


@pytest.mark.parametrize("change", ["missing", "left over", "shape", "no table", "no facts"])
def test_tensors_and_metadata_that_do_not_fit(tmp_path: Path, change: str) -> None:
    weights, config = weights_of(WIDE), dict(WIDE)
    if change == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif change == "left over":
        weights["model.layers.1.self_attn.q_proj.bias"] = mx.zeros((128,))
    elif change == "shape":
        weights["model.layers.2.mlp.up_proj.weight"] = mx.zeros((64, 64))
    elif change == "no table":
        del weights["model.embed_tokens.weight"]
    path = write_model(tmp_path / "m.gguf", config, weights)
    if change == "no facts":
        path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"other.block_count"))
    messages = {
        "missing": "blk.1.ffn_up.weight is missing",
        "left over": "1 tensors .* 'blk.1.attn_q.bias'",
        "shape": r"blk.2.ffn_up.weight is \[64, 64\], expected \[128, 64\]",
        "no table": "token_embd.weight is missing",
        "no facts": "block_count is missing",
    }
    with pytest.raises((ModelFormatError, UnsupportedModelError), match=messages[change]):
        GGUFSource(path)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedModelError, match="'gemma3', expected one of llama, qwen2, qwen3"
    ):
        GGUFSource(tmp_path / "m.gguf")


@pytest.mark.parametrize("spoil", [lambda f: f * 1.01, lambda f: f[:-1], lambda f: f * np.nan])
def test_factors_that_no_known_rule_makes(tmp_path: Path, spoil: Any, monkeypatch) -> None:
    from tests.conversion import gguf_files

    config = CONFIGS["llama3"]
    factors = spoil(gguf_files.llama3_factors(config))
    monkeypatch.setattr(gguf_files, "llama3_factors", lambda _config: factors)
    path = write_model(tmp_path / "m.gguf", config, weights_of(config))
    with pytest.raises((ModelFormatError, UnsupportedModelError), match=r"rope_freqs\.weight"):
        GGUFSource(path)


def test_llama_3_2_factors_are_recognised(tmp_path: Path) -> None:
    """Those of a released model: head of 64, factor 32, 8192 positions at first."""
    rope = CONFIGS["llama3"]["rope_scaling"] | {
        "factor": 32.0,
        "original_max_position_embeddings": 8192,
    }
    config = CONFIGS["llama3"] | {"rope_scaling": rope, "head_dim": 64}
    with GGUFSource(write_model(tmp_path / "m.gguf", config, weights_of(config))) as source:
        assert source.config["rope_scaling"] == rope
