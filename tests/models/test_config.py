"""config.json: what is read, what is refused, and that nothing else ever escapes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.families import FAMILIES
from mlx_edge.quant import Packing
from tests.models.tiny import CONFIGS, LLAMA3_ROPE

LLAMA = CONFIGS["llama2"]


def changed(**changes: Any) -> dict[str, Any]:
    """The llama configuration with some keys changed; None removes one."""
    return {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}


def test_defaults_of_an_old_llama_config() -> None:
    config = ModelConfig.from_hf(
        changed(num_key_value_heads=None, head_dim=None, rope_theta=None, tie_word_embeddings=None)
    )
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (4, 16, 10000.0)
    assert config.is_tied is None


def test_rope_of_transformers_4_and_5_is_the_same() -> None:
    old = changed(rope_theta=500000.0, rope_scaling=LLAMA3_ROPE)
    new = changed(rope_theta=None, rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0})
    assert ModelConfig.from_hf(old).rope == ModelConfig.from_hf(new).rope
    assert ModelConfig.from_hf(old).rope.kind == "llama3"


def test_quantization_default_and_overrides() -> None:
    quantization = ModelConfig.from_hf(
        changed(
            quantization={
                "group_size": 64,
                "bits": 4,
                "lm_head": False,
                "model.embed_tokens": True,
                "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8},
            }
        )
    ).quantization
    assert quantization.packing("lm_head") is None
    assert quantization.packing("model.embed_tokens") == Packing(64, 4)
    assert quantization.packing("model.layers.0.mlp.up_proj") == Packing(32, 8)
    assert quantization.packing("anything else") == Packing(64, 4)


def test_keys_that_change_nothing_are_accepted() -> None:
    neutral = {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "transformers_version": "4.50.0",
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "layer_types": ["full_attention"] * 3,
        "eos_token_id": [1, 2],
        "hidden_act": "silu",
        "an_unknown_switch_that_is_off": False,
        "an_unknown_value_that_is_absent": None,
    }
    assert ModelConfig.from_hf({**LLAMA, **neutral}) == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"model_type": "mamba"},
            "'mamba' is not one of those defined here (gemma2, gemma3, gemma3_text, glm4,",
        ),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types chunked_attention"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"rope_scaling": {"type": "proportional"}}, "rope type 'proportional'"),
        ({"rope_scaling": {"type": "mrope"}}, "rope type 'mrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"text_config": {"hidden_size": 32}}, "text_config = {'hidden_size': 32}"),
        ({"rope_scaling": {**LLAMA3_ROPE, "mscale": 2}}, "mscale = 2"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "int4"}}, "mode 'int4'"),
        ({"num_experts": 8}, "num_experts = 8"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unsupported_mathematics_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        ModelConfig.from_hf(changed(**changes))
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1"),
        ({"num_hidden_layers": 999}, "num_hidden_layers is 999"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": 1e300}, "hidden_size"),
        ({"hidden_size": [64]}, "hidden_size is [64]"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"vocab_size": None, "model_type": "llama"}, "vocab_size is missing"),
        ({"model_type": None}, "model_type is missing"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', expected an object"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 9}}, "must be above"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is not set"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries for 3 layers"),
        ({"quantization": {"bits": 8, "mode": "mxfp4"}}, "8 bits in groups of 32; mxfp4 has"),
        ({"quantization": {"group_size": 64, "bits": 7}}, "7 bits in groups of 64"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_broken_values_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFormatError) as raised:
        ModelConfig.from_hf(changed(**changes))
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1, 2]", "found a JSON list, expected an object"),
        (b"[" * 100000, "is not valid JSON"),
        (b'{"model_type": 1' + b"0" * 5000 + b"}", "is not valid JSON"),
        (b" " * ((1 << 25) + 1), "at most 32 MiB"),
    ],
    ids=["empty", "cut", "encoding", "list", "deep", "digits", "huge"],
)
def test_files_that_are_no_configuration(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFormatError) as raised:
        ModelConfig.from_folder(tmp_path)
    assert named in str(raised.value)


def test_missing_config_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"config\.json is missing"):
        ModelConfig.from_folder(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
LISTS = ["layer_types", "no_rope_layers"]
SWITCHES = ["sliding_window", "use_sliding_window", "max_window_layers", "no_rope_layer_interval"]
NESTED = ["rope_scaling", "rope_parameters", "quantization"]
KEYS = st.sampled_from([*LLAMA, *LISTS, *SWITCHES, *NESTED])


@pytest.mark.parametrize("change", [{"rope_scaling": {"\n": []}}, {"layer_types": ["a\nb"]}])
def test_a_strangers_words_stay_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        ModelConfig.from_hf({**LLAMA, "model_type": "llama", **change})
    assert "\n" not in str(raised.value)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=5), st.sampled_from(sorted(FAMILIES)))
def test_fuzz_values(changes: dict[str, Any], model_type: str) -> None:
    raw = {**LLAMA, "model_type": model_type, **changes}
    try:
        config = ModelConfig.from_hf(raw)
    except (ModelFormatError, UnsupportedModelError) as error:
        assert "\n" not in str(error)
    else:
        assert config.num_layers <= 512
        assert config.num_heads % config.num_kv_heads == 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_fuzz_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A valid file with a few bytes changed."""
    content = bytearray(json.dumps(CONFIGS["llama3"]).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        ModelConfig.from_folder(folder)
    except (ModelFormatError, UnsupportedModelError) as error:
        assert "\n" not in str(error)
