"""What sets families apart: how weights are saved, names with prefixes, and configurations that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_edge import ops
from mlx_edge.errors import MLXEdgeError, ModelFormatError, UnsupportedModelError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Decoder, Layer
from mlx_edge.models.load import load_model
from tests.models.expert_forms import Tensors, fuse_experts, stack_experts, write_changed
from tests.models.test_goldens import FOLDER, read_golden
from tests.models.tiny import CONFIGS, make_model, save_model

TOKENS = mx.array([[5, 3, 8, 1, 9, 2, 30, 7]])


def load_changed(name: str, folder: Path, change: Callable[[Tensors], Tensors]) -> Decoder:
    """The golden's model with its tensors in another form."""
    return load_model(write_changed(name, folder, change))


@pytest.mark.parametrize("form", [stack_experts, fuse_experts])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_are_read_in_every_form(
    name: str, form: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    wanted = np.array(load_changed(name, tmp_path / "one", dict)(TOKENS))
    found = np.array(load_changed(name, tmp_path / "other", form)(TOKENS))
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("model.", "lm_head"),
        ("model.language_model.", "lm_head"),
        ("language_model.model.", "language_model.lm_head"),
        ("language_model.", "lm_head"),
    ],
)
def test_names_of_models_that_also_see(body: str, head: str, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> Tensors:
        renamed = {key.replace("model.language_model.", body): v for key, v in tensors.items()}
        return {key.replace("lm_head", head): v for key, v in renamed.items()}

    wanted = load_changed("glm4v_text", tmp_path / "one", dict)(TOKENS)
    assert mx.array_equal(load_changed("glm4v_text", tmp_path / "other", rename)(TOKENS), wanted)


def save_quantized(name: str, folder: Path, bits: int = 4) -> Path:
    model = make_model(CONFIGS[name])
    nn.quantize(model, 32, bits)
    return save_model(
        model, {**CONFIGS[name], "quantization": {"group_size": 32, "bits": bits}}, folder
    )


def linears(layer: Layer) -> dict[str, ops.Linear]:
    parts = {**vars(layer.attention), **vars(layer.mlp)}
    kinds = (ops.Dense, ops.Quantized, ops.Packed)
    return {name: part for name, part in parts.items() if isinstance(part, kinds)}


@pytest.mark.parametrize("name", ["phi3", "glm4", "qwen3_moe", "gpt_oss"])
def test_fused_and_stacked_weights_come_back_as_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed for the CPU or not, the rows are those of the files; and the packed ones multiply alike."""
    monkeypatch.setenv("MLX_EDGE_CACHE", str(tmp_path / "cache"))
    folder = save_quantized(name, tmp_path / "model")
    with ops.reference():
        plain = load_model(folder)
    model = load_model(folder, precision="float")
    for layer, same in zip(model.layers, plain.layers, strict=True):
        for field, linear in linears(layer).items():
            stored = linear.restore() if isinstance(linear, ops.Packed) else linear
            wanted = linears(same)[field]
            assert isinstance(stored, ops.Quantized) and isinstance(wanted, ops.Quantized)
            for a, b in zip(
                (stored.weight, stored.scales, stored.offsets, stored.bias),
                (wanted.weight, wanted.scales, wanted.offsets, wanted.bias),
                strict=True,
            ):
                assert (a is None and b is None) or mx.array_equal(a, b)
            x = mx.random.normal((3, wanted.shape[1]))
            with ops.reference():
                y = np.array(ops.linear(x, wanted))
            assert np.abs(np.array(ops.linear(x, linear)) - y).max() <= 1e-5 * np.abs(y).max()


def test_a_packed_file_of_split_weights_is_mapped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_EDGE_CACHE", str(tmp_path / "cache"))
    folder = save_quantized("phi3", tmp_path / "model")
    first, second = load_model(folder), load_model(folder)
    if first.load_report.packed is None:
        pytest.skip("no CPU kernels here: nothing is packed")
    assert second.load_report.packed is not None
    assert second.load_report.packed.how == "reused"
    assert mx.array_equal(first(TOKENS), second(TOKENS))


@pytest.mark.parametrize(
    ("name", "changes", "error", "named"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 7}, ModelFormatError, "num_experts_per_tok is 7"),
        ("qwen3_moe", {"num_local_experts": 0}, ModelFormatError, "num_local_experts is 0"),
        ("qwen3_moe", {"moe_intermediate_size": None}, ModelFormatError, "moe_intermediate_size"),
        ("mixtral", {"num_local_experts": "8"}, ModelFormatError, "num_local_experts is '8'"),
        ("mixtral", {"num_experts_per_tok": 5}, ModelFormatError, "num_local_experts is 4"),
        ("gpt_oss", {"swiglu_limit": 5.0}, UnsupportedModelError, "swiglu_limit is 5.0"),
        ("gpt_oss", {"sliding_window": None}, ModelFormatError, "sliding_window is not set"),
        ("gemma2", {"sliding_window": None}, ModelFormatError, "sliding_window is not set"),
        ("gemma3", {"sliding_window": None}, ModelFormatError, "sliding_window is not set"),
        ("gemma3", {"attn_logit_softcapping": 9.0}, UnsupportedModelError, "attn_logit_softcap"),
        ("gemma3", {"use_bidirectional_attention": True}, UnsupportedModelError, "bidirectional"),
        ("gemma2", {"query_pre_attn_scalar": 0}, ModelFormatError, "query_pre_attn_scalar is 0"),
        ("gemma2", {"hidden_activation": "gelu"}, UnsupportedModelError, "'gelu'"),
        ("granite", {"logits_scaling": -1}, ModelFormatError, "logits_scaling is -1"),
        ("olmo2", {"clip_qkv": 8.0}, UnsupportedModelError, "clip_qkv = 8.0"),
        ("glm4", {"query_pre_attn_scalar": 9}, UnsupportedModelError, "query_pre_attn_scalar = 9"),
    ],
)
def test_configurations_that_do_not_fit(
    name: str, changes: dict[str, Any], error: type[MLXEdgeError], named: str
) -> None:
    saved = read_golden(FOLDER / f"{name}.json")["saved"] | changes
    with pytest.raises(error) as raised:
        ModelConfig.from_hf(saved)
    assert named in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("phi3-long", {"long_factor": None}, "longrope needs short_factor and long_factor"),
        ("phi3-long", {"long_factor": [1.0] * 5}, "5 factors for 12 pairs"),
        ("phi3-long", {"long_factor": ["a"] * 12}, "long_factor: 0 is 'a', expected a number"),
        ("phi3-long", {"partial_rotary_factor": 0.3}, "turns 0.3 of head_dim 32; 9 is odd"),
        ("glm4", {"partial_rotary_factor": 1.5}, "turns 1.5 of head_dim 32"),
        ("glm4v_text", {"mrope_section": [2, 2, 2]}, "expected three runs of 8 pairs together"),
        ("glm4v_text", {"mrope_section": [4, 4]}, "expected three runs of 8 pairs together"),
    ],
)
def test_ropes_that_do_not_fit(name: str, changes: dict[str, Any], named: str) -> None:
    saved = read_golden(FOLDER / f"{name}.json")["saved"]
    saved["rope_parameters"] = saved["rope_parameters"] | changes
    with pytest.raises(ModelFormatError) as raised:
        ModelConfig.from_hf(saved)
    assert named in str(raised.value) and "\n" not in str(raised.value)


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {k: v for k, v in t.items() if k != EXPERT}, f"tensor {EXPERT} is missing"),
        (lambda t: t | {EXPERT: t[EXPERT][:, :-1]}, f"tensor {EXPERT} is F32 [64, 47], expected"),
        (lambda t: t | {EXPERT.replace(".2.", ".4."): t[EXPERT]}, "experts.4.w2.weight"),
        (lambda t: stack_experts(t) | {EXPERT: mx.zeros((64, 48))}, EXPERT),
    ],
    ids=["missing", "shape", "too many", "two forms"],
)
def test_experts_that_do_not_fit(
    change: Callable[[Tensors], Tensors], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFormatError) as raised:
        load_changed("mixtral", tmp_path, change)
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_a_stack_of_another_number_of_experts_is_said(tmp_path: Path) -> None:
    folder = save_quantized("mixtral", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 3}))
    with pytest.raises(ModelFormatError) as raised:
        load_model(folder)
    assert "block_sparse_moe.gate.weight is U32 [4, 8], expected U32 [3, 8]" in str(raised.value)


def test_a_nested_text_part_says_what_the_whole_does_not() -> None:
    saved = read_golden(FOLDER / "gemma3-sees.json")["saved"]
    config = ModelConfig.from_hf(saved)
    assert config.hidden_size == saved["text_config"]["hidden_size"]
    assert config.is_tied is True
    untied = {**saved, "tie_word_embeddings": False}
    untied["text_config"] = {**saved["text_config"], "tie_word_embeddings": False}
    assert ModelConfig.from_hf(untied).is_tied is False
    assert (
        ModelConfig.from_hf({**untied, "tie_word_embeddings": True}).is_tied is None
    )  # the files tell
    with pytest.raises(UnsupportedModelError, match="surprise = 1"):
        ModelConfig.from_hf({**saved, "text_config": {**saved["text_config"], "surprise": 1}})


def test_the_context_decides_between_longropes_factors() -> None:
    saved = read_golden(FOLDER / "phi3-long.json")["saved"]
    rope = saved["rope_parameters"]
    assert ModelConfig.from_hf(saved).rope.stretches == tuple(rope["long_factor"])
    short = {**saved, "max_position_embeddings": 32}
    assert ModelConfig.from_hf(short).rope.stretches == tuple(rope["short_factor"])
