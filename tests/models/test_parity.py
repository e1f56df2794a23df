"""Logits against mlx-lm's, in float32: both families, dense and quantized, whole prompts and chunks."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_edge.cache import QuantizedRows
from mlx_edge.models.load import load_model
from tests.models.tiny import CONFIGS, make_model, save_model

TOLERANCE = 1e-4  # of the largest logit
QUANTIZED = """llama3 llama-tied llama-bias qwen3 glm4 gemma3 phi3 qwen3_moe mixtral olmo2 gpt_oss""".split()
TOKENS = 75  # more than two tails of the cache


def logits_in_chunks(model: Any, tokens: mx.array, cuts: list[int]) -> np.ndarray:
    cache = model.make_cache()
    bounds = [0, *cuts, tokens.shape[1]]
    parts = [model(tokens[:, a:b], cache) for a, b in pairwise(bounds)]
    return np.array(mx.concatenate(parts, axis=1))


def assert_same_logits(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    ours = load_model(save_model(model, config, folder), precision="float")
    tokens = mx.random.randint(0, config["vocab_size"], (2, TOKENS))
    wanted = np.array(model(tokens))
    for cuts in ([], [1], [31, 32, 33], [20, 64], list(range(60, TOKENS))):
        found = logits_in_chunks(ours, tokens, cuts)
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max(), cuts


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_logits_equal_mlx_lm(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    assert_same_logits(make_model(config), config, tmp_path)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64), (3, 32)])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_logits_equal_mlx_lm(
    name: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    model = make_model(config)
    # The feed-forward's inner width does not divide into groups of 64: such layers stay floats.
    nn.quantize(
        model,
        group_size,
        bits,
        class_predicate=lambda _, m: (
            hasattr(m, "to_quantized") and not m.weight.shape[-1] % group_size
        ),
    )
    packed = {**config, "quantization": {"group_size": group_size, "bits": bits}}
    assert_same_logits(model, packed, tmp_path)


def test_layer_overrides_equal_mlx_lm(tmp_path: Path) -> None:
    config = CONFIGS["qwen3"]
    model = make_model(config)
    overrides: dict[str, Any] = {
        "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 8},
        "model.layers.1.self_attn.q_proj": False,
        "lm_head": {"group_size": 64, "bits": 6},
    }
    nn.quantize(
        model,
        32,
        4,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and overrides.get(path, True),
    )
    packed = {**config, "quantization": {"group_size": 32, "bits": 4, **overrides}}
    assert_same_logits(model, packed, tmp_path)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_quantized_logits_equal_mlx_lm(mode: str, tmp_path: Path) -> None:
    config = CONFIGS["qwen3"]
    model = make_model(config)
    nn.quantize(model, mode=mode)
    group_size, bits = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    packed = {**config, "quantization": {"group_size": group_size, "bits": bits, "mode": mode}}
    assert_same_logits(model, packed, tmp_path)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_stored_dtypes_are_read(dtype: mx.Dtype, tmp_path: Path) -> None:
    config = CONFIGS["llama2"]
    model = make_model(config)
    model.set_dtype(dtype)
    folder = save_model(model, config, tmp_path)
    ours = load_model(folder, precision="float")
    model.set_dtype(mx.float32)  # what a CPU computes in
    tokens = mx.array([[1, 2, 3, 4]])
    # The CPU kernels store keys and values of such models as halves.
    assert np.allclose(np.array(ours(tokens)), np.array(model(tokens)), atol=2e-3)


def one_by_one(model: Any, tokens: mx.array, cache: Any) -> np.ndarray:
    steps = [model(tokens[:, i : i + 1], cache) for i in range(tokens.shape[1])]
    return np.array(mx.concatenate(steps, axis=1))


@pytest.mark.parametrize("kind", ["limited", "8 bit", "4 bit"])
@pytest.mark.parametrize("name", ["llama3", "qwen3", "qwen2", "smollm3"])
def test_cache_kinds_equal_mlx_lms(name: str, kind: str, tmp_path: Path) -> None:
    from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

    config = {**CONFIGS[name], "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model(config)
    ours = load_model(save_model(model, config, tmp_path), precision="float")
    if kind == "limited":
        theirs: Any = [RotatingKVCache(max_size=40, keep=4) for _ in ours.layers]
        cache = ours.make_cache(max_kv_size=40)
    else:
        bits = int(kind[0])
        theirs = [QuantizedKVCache(group_size=32, bits=bits) for _ in ours.layers]
        cache = ours.make_cache(row_format=QuantizedRows(bits, 32))
    tokens = mx.random.randint(0, config["vocab_size"], (2, TOKENS))
    wanted = one_by_one(model, tokens, theirs)
    error = np.abs(one_by_one(ours, tokens, cache) - wanted) / np.abs(wanted).max()
    # Where the last bit of a key differs, rounding may choose the neighbouring code: few values, by little.
    assert error.max() <= (TOLERANCE if kind == "limited" else 2e-2)
    assert np.mean(error <= TOLERANCE) >= (1 if kind == "limited" else 0.9)
    assert np.median(error) <= TOLERANCE / 10
