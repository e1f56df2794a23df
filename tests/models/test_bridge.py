"""The bridge: architectures not defined here give mlx-lm's own tokens, and everything else is one line."""

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copy
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.generate import generate_step as their_steps
from mlx_lm.models.cache import make_prompt_cache

from mlx_edge import batch_generate, generate, load
from mlx_edge.cache import QuantizedRows
from mlx_edge.decoding.loop import generate_step
from mlx_edge.errors import InvalidRequestError, ModelFormatError, UnsupportedModelError
from mlx_edge.generate import main
from mlx_edge.models.bridge import load_bridged
from mlx_edge.models.load import load_model
from mlx_edge.models.rope import MAX_CONTEXT
from mlx_edge.weights.hub import find_model
from tests.models.tiny import CONFIGS, SIZES, make_model, save_model

POCKET = find_model("pocket")
FOREIGN: dict[str, dict[str, Any]] = {
    "gemma": {"model_type": "gemma", **SIZES},
    "phi3": {"model_type": "phi3", **SIZES, "hidden_size": 128},
    "phi3-long": {  # tables that are no parameters
        "model_type": "phi3",
        **SIZES,
        "hidden_size": 128,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 16, "short_factor": [1.0] * 16},
    },
    "olmo2": {"model_type": "olmo2", **SIZES},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "mamba": {  # no positions, and a cache that does not count them
        "model_type": "mamba",
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}
PROMPT = mx.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], dtype=mx.int32)
NUM_TOKENS = 40


def their_tokens(model: nn.Module, max_kv_size: int | None = None) -> list[int]:
    cache = make_prompt_cache(model, max_kv_size)
    steps = their_steps(PROMPT, model, max_tokens=NUM_TOKENS, prompt_cache=cache)
    return [token for token, _ in steps]


def our_tokens(model: Any, **options: Any) -> list[int]:
    return [token for token, _ in generate_step(PROMPT, model, max_tokens=NUM_TOKENS, **options)]


def save_foreign(folder: Path, name: str = "olmo2", **changes: Any) -> Path:
    """A folder with a tokenizer."""
    config = {**FOREIGN[name], "vocab_size": 4096, **changes}
    save_model(make_model(config), config, folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        copy(POCKET / file, folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", FOREIGN)
def test_greedy_tokens_equal_mlx_lms(name: str, tmp_path: Path) -> None:
    config = FOREIGN[name]
    model = make_model(config)
    bridged = load_bridged(save_model(model, config, tmp_path))
    assert bridged.config.vocab_size == 131
    assert bridged.config.context_size == config.get("max_position_embeddings", MAX_CONTEXT)
    wanted = their_tokens(model)
    assert our_tokens(bridged) == wanted
    assert our_tokens(bridged, prefill_step_size=5) == wanted


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_the_bridge_and_our_decoder_agree(name: str, tmp_path: Path) -> None:
    folder = save_model(make_model(CONFIGS[name]), CONFIGS[name], tmp_path)
    assert our_tokens(load_bridged(folder)) == our_tokens(load_model(folder))


def test_quantized_layers_are_read(tmp_path: Path) -> None:
    config = FOREIGN["olmo2"]
    model = make_model(config)
    nn.quantize(model, 32, 4)
    packed = {**config, "quantization": {"group_size": 32, "bits": 4}}
    bridged = load_bridged(save_model(model, packed, tmp_path))
    assert bridged.module.lm_head.weight.dtype == mx.uint32
    assert our_tokens(bridged) == their_tokens(model)


def test_weights_take_the_dtype_of_this_machine(tmp_path: Path) -> None:
    config = FOREIGN["olmo2"]
    model = make_model(config)
    model.set_dtype(mx.bfloat16)
    bridged = load_bridged(save_model(model, config, tmp_path))
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    assert bridged.module.lm_head.weight.dtype == (mx.float32 if on_cpu else mx.bfloat16)
    assert bridged.load_report.copied_bytes == bridged.load_report.total_bytes > 0


def test_a_limited_cache_rotates_as_mlx_lms(tmp_path: Path) -> None:
    # The prompt fits: where it does not, mlx-lm's tokens depend on where the prompt was cut.
    limit = PROMPT.size + 2
    config = FOREIGN["olmo2"]
    model = make_model(config)
    bridged = load_bridged(save_model(model, config, tmp_path))
    cache = bridged.make_cache(max_kv_size=limit)
    assert our_tokens(bridged, prompt_cache=cache) == their_tokens(model, max_kv_size=limit)
    assert cache[0].offset == PROMPT.size + NUM_TOKENS - 1
    assert max(array.shape[2] for array in cache[0].arrays) == limit


def test_a_cache_is_continued(tmp_path: Path) -> None:
    config = FOREIGN["qwen3_moe"]
    bridged = load_bridged(save_model(make_model(config), config, tmp_path))
    cache = bridged.make_cache()
    bridged(PROMPT[None, :7], cache)
    found = [t for t, _ in generate_step(PROMPT[7:], bridged, max_tokens=9, prompt_cache=cache)]
    assert found == our_tokens(bridged)[:9]


@pytest.mark.parametrize("name", ["phi3-long", "mamba"])
def test_another_thread_may_generate(name: str, tmp_path: Path) -> None:
    model = make_model(FOREIGN[name])
    bridged = load_bridged(save_model(model, FOREIGN[name], tmp_path))
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(our_tokens, bridged).result()
    assert found == our_tokens(bridged) == their_tokens(model)


def test_what_a_definition_cannot_serve_is_said(tmp_path: Path) -> None:
    folder = save_foreign(tmp_path)
    model, tokenizer = load(str(folder), bridge="mlx-lm")
    with pytest.raises(InvalidRequestError, match="kv-bits"):
        model.make_cache(row_format=QuantizedRows(4, 32))
    with pytest.raises(InvalidRequestError, match="expected more than the 4"):
        model.make_cache(max_kv_size=4)
    with pytest.raises(InvalidRequestError, match="one prompt at a time"):
        batch_generate(model, tokenizer, ["Once", "Once"])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="the model's context 512"):
        generate(model, tokenizer, "word " * 600)


def test_a_definition_with_its_own_caches_is_not_limited(tmp_path: Path) -> None:
    bridged = load_bridged(save_model(make_model(FOREIGN["mamba"]), FOREIGN["mamba"], tmp_path))
    with pytest.raises(InvalidRequestError, match="makes caches of its own"):
        bridged.make_cache(max_kv_size=32)


def test_load_says_who_defines_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_foreign(tmp_path, "gemma")
    with caplog.at_level(logging.WARNING):
        model, tokenizer, config = load(str(folder), bridge="mlx-lm", return_config=True)
    assert "gemma runs by mlx-lm's definition" in caplog.text
    assert config is model.config
    assert generate(model, tokenizer, "Once upon a time", max_tokens=4)


def test_the_command_takes_the_flag(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(save_foreign(tmp_path, "gemma")), "--max-tokens", "4"]
    assert main([*arguments, "--bridge", "mlx-lm", "--max-kv-size", "8"]) == 0
    assert "read by mlx-lm" in capfd.readouterr().out
    assert main(arguments) == 2
    assert "--bridge mlx-lm" in capfd.readouterr().err
    assert main([*arguments, "--bridge", "mlx-lm", "--kv-bits", "4"]) == 2
    assert capfd.readouterr().err.count("\n") <= 1
    assert main([*arguments, "--bridge", "mlx-lm", "--profile", "ops"]) == 2
    assert "--profile ops" in capfd.readouterr().err


def test_an_unknown_bridge_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="expected mlx-lm"):
        load("pocket", bridge="transformers")


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"model_type": "nothing_at_all"}, UnsupportedModelError, "not defined by mlx-lm"),
        ({"model_type": "cache"}, UnsupportedModelError, "not defined by mlx-lm"),
        ({"model_type": "..utils"}, UnsupportedModelError, "is not a name"),
        ({"model_type": None}, ModelFormatError, "model_type is missing"),
        ({"model_type": "gemma"}, ModelFormatError, "does not fit these files"),
        ({"hidden_size": 32}, ModelFormatError, "does not fit these files"),
        ({"hidden_size": None}, ModelFormatError, "does not fit these files"),
        ({"hidden_size": "wide"}, ModelFormatError, "does not fit these files"),
        ({"num_attention_heads": 0}, ModelFormatError, "does not fit these files"),
        ({"num_hidden_layers": 10**9}, ModelFormatError, "num_hidden_layers"),
        ({"max_position_embeddings": -1}, ModelFormatError, "max_position_embeddings"),
        ({"quantization": {"bits": 4}}, ModelFormatError, "does not fit these files"),
        (  # by which MLX divides
            {"quantization": {"group_size": 32, "bits": 4, "lm_head": {"group_size": 0}}},
            ModelFormatError,
            "lm_head: group_size is 0",
        ),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_one_line(
    changes: dict[str, Any], kind: type[Exception], named: str, tmp_path: Path
) -> None:
    config = FOREIGN["olmo2"]
    folder = save_model(make_model(config), config, tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(kind) as caught:
        load_bridged(folder)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    folder = save_foreign(tmp_path / "model")
    trace = tmp_path / "was_run"
    code = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
    (folder / "custom.py").write_text(code)
    (folder / "mlx_lm.py").write_text(code)
    edit_config(folder, auto_map={"AutoModel": "custom.Model", "AutoTokenizer": "custom.Tokenizer"})
    model, _ = load(str(folder), bridge="mlx-lm")  # mlx-lm's definition reads no auto_map
    assert our_tokens(model)
    edit_config(folder, model_file="custom.py")
    with pytest.raises(UnsupportedModelError, match="never run"):
        load(str(folder), bridge="mlx-lm")
    assert not trace.exists()


def test_broken_weights_are_a_format_error(tmp_path: Path) -> None:
    config = FOREIGN["olmo2"]
    folder = save_model(make_model(config), config, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        load_bridged(folder)
    path.rename(folder / "weights.safetensors")
    with pytest.raises(ModelFormatError):
        load_bridged(folder)


def test_without_mlx_lm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FOREIGN["olmo2"]
    folder = save_model(make_model(config), config, tmp_path)
    for name in ("mlx_lm", "mlx_lm.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidRequestError, match=r"mlx-edge\[bridge\]"):
        load_bridged(folder)
