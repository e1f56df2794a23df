"""Folders that mlx-lm's own tools write: loaded here as they are, with the logits that mlx-lm has.

The tools are called as functions, on tiny models and random text: what is tested is the folder, not the quality.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, optimizers

import mlx_edge
from mlx_edge import ops
from mlx_edge.models.load import load_model
from mlx_edge.quant.tree import find_weights
from mlx_edge.weights.hub import find_model
from tests.models.tiny import CONFIGS, make_model, save_model

mlx_lm_utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")

TOLERANCE = 1e-4  # of the largest logit
VOCAB_SIZE = 2048  # that of the pocket model, whose tokenizer stands in the folders
LLAMA = {**CONFIGS["llama3"], "vocab_size": VOCAB_SIZE, "intermediate_size": 128}
TIED = {**CONFIGS["qwen3-tied"], "vocab_size": VOCAB_SIZE, "intermediate_size": 128}


def save_source(config: dict[str, Any], folder: Path) -> Path:
    """A float model with a tokenizer, as a hub would have it."""
    save_model(make_model(config), config, folder)
    for file in find_model("pocket").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def load_theirs(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    model, config = mlx_lm_utils.load_model(folder)
    model.set_dtype(
        mx.float32
    )  # MLX's sums in half on a CPU are off by more than anything tested here
    return model, config


def assert_same_logits(
    folder: Path, wanted_modes: set[tuple[str, int]], *, has_halves: bool = False
) -> None:
    """`wanted_modes`: the packings that must be found. The kernels keep keys and values of halves as halves."""
    theirs, _ = load_theirs(folder)
    tokens = mx.random.randint(0, VOCAB_SIZE, (2, 9), key=mx.random.key(3))
    wanted = np.array(theirs(tokens))
    largest = np.abs(wanted).max()
    with ops.reference():
        model = load_model(folder)
        found = [one.weight for one in find_weights(model)]
        assert np.abs(np.array(model(tokens)) - wanted).max() <= TOLERANCE * largest
    assert wanted_modes <= {(w.mode, w.bits) for w in found if isinstance(w, ops.Quantized)}
    error = np.abs(np.array(load_model(folder, precision="float")(tokens)) - wanted).max()
    assert error <= (5e-3 if has_halves else TOLERANCE) * largest


CONVERSIONS: dict[str, tuple[dict[str, Any], set[tuple[str, int]]]] = {
    "4 bit": ({"q_bits": 4}, {("affine", 4)}),
    "8 bit": ({"q_bits": 8, "q_group_size": 32}, {("affine", 8)}),
    "3 bit": ({"q_bits": 3, "q_group_size": 32}, {("affine", 3)}),
    "mixed_2_6": (
        {"quant_predicate": "mixed_2_6", "q_group_size": 32},
        {("affine", 2), ("affine", 6)},
    ),
    "mixed_3_4": (
        {"quant_predicate": "mixed_3_4", "q_group_size": 64},
        {("affine", 3), ("affine", 4)},
    ),
    "mxfp4": ({"q_mode": "mxfp4"}, {("mxfp4", 4)}),
    "mxfp8": ({"q_mode": "mxfp8"}, {("mxfp8", 8)}),
    "nvfp4": ({"q_mode": "nvfp4"}, {("nvfp4", 4)}),
    "predicate": (
        {"quant_predicate": lambda path, _: "down" not in path and {"bits": 5, "group_size": 32}},
        {("affine", 5)},
    ),
    "half": ({"q_bits": 4, "dtype": "bfloat16"}, {("affine", 4)}),
    "float": ({"quantize": False, "dtype": "float16"}, set()),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_what_convert_writes(name: str, tmp_path: Path) -> None:
    from mlx_lm.convert import convert

    options, modes = CONVERSIONS[name]
    source = save_source(TIED if name in ("4 bit", "nvfp4") else LLAMA, tmp_path / "source")
    convert(str(source), str(tmp_path / "made"), **{"quantize": True, **options})
    assert_same_logits(tmp_path / "made", modes, has_halves=name in ("half", "float"))


def test_load_takes_the_folder_with_its_tokenizer(tmp_path: Path) -> None:
    from mlx_lm.convert import convert

    source = save_source(LLAMA, tmp_path / "source")
    convert(str(source), str(tmp_path / "made"), quantize=True, q_bits=4)
    model, tokenizer = mlx_edge.load(str(tmp_path / "made"))
    assert tokenizer.encode("Once") == mlx_edge.load("pocket")[1].encode("Once")
    assert len(mlx_edge.generate(model, tokenizer, "Once", max_tokens=3)) > 0


Tool = Callable[
    [nn.Module, dict[str, Any]], dict[str, Any]
]  # changes the model, returns its config


def run_gptq(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    from mlx_lm.quant.gptq import gptq_quantize

    data = mx.random.randint(0, VOCAB_SIZE, (4, 32))
    _, quantization = gptq_quantize(model, data, 4, 32, 6, 64, batch_size=2)
    return {**config, "quantization": quantization}


def run_awq(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config

    data = mx.random.randint(0, VOCAB_SIZE, (2, 16))
    awq_config = AWQ_MODEL_CONFIGS[config["model_type"]]
    awq_quantize(model, data, awq_config, bits=3, group_size=32, embed_bits=4, n_grid=2)
    written: dict[str, Any] = update_config(model, config)
    return written


def run_dwq(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    import copy

    from mlx_lm.quant.dwq import dwq_quantize

    teacher = copy.deepcopy(model)
    _, config = mlx_lm_utils.quantize_model(model, config, 32, 4)
    rows = [(np.random.default_rng(i).integers(0, VOCAB_SIZE, 12).tolist(), 0) for i in range(4)]
    options = {"batch_size": 2, "max_seq_length": 12, "seed": 1}
    optimizer = optimizers.Adam(learning_rate=1e-4)
    dwq_quantize(
        model, lambda batch, _index, split: teacher(batch), optimizer, rows, rows[:2], **options
    )
    return config


def run_dynamic_quant(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold

    widths = {"low_bits": 4, "low_group_size": 32, "high_bits": 8, "high_group_size": 64}
    data = mx.random.randint(0, VOCAB_SIZE, (2, 12))
    damage = dict(estimate_sensitivities(model, data, **widths, batch_size=2))
    threshold = estimate_threshold(model, damage, target_bpw=6.5, **widths)

    def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": 8, "group_size": 64} if damage[path] > threshold else True

    _, written = mlx_lm_utils.quantize_model(model, config, 32, 4, quant_predicate=predicate)
    return dict(written)


TOOLS: dict[str, tuple[Tool, dict[str, Any], set[tuple[str, int]]]] = {
    "gptq": (run_gptq, LLAMA, {("affine", 4), ("affine", 6)}),
    "gptq, tied": (run_gptq, TIED, {("affine", 4), ("affine", 6)}),
    "awq": (run_awq, LLAMA, {("affine", 3), ("affine", 4)}),
    "awq, tied": (run_awq, TIED, {("affine", 3), ("affine", 4)}),
    "dwq": (run_dwq, LLAMA, {("affine", 4)}),
    "dynamic_quant": (run_dynamic_quant, LLAMA, {("affine", 4), ("affine", 8)}),
}


@pytest.mark.filterwarnings("ignore")  # the tools' own
@pytest.mark.parametrize("name", TOOLS)
def test_what_learned_quantization_writes(name: str, tmp_path: Path) -> None:
    tool, config, modes = TOOLS[name]
    source = save_source(config, tmp_path / "source")
    mx.random.seed(1)
    model, tokenizer, config = mlx_lm_utils.load(str(source), return_config=True)
    written = tool(model, config)
    mlx_lm_utils.save(tmp_path / "made", source, model, tokenizer, written)
    # dwq casts whatever is not frozen to bfloat16, norms too.
    assert_same_logits(tmp_path / "made", modes, has_halves=name == "dwq")


def save_static(folder: Path, entry: object, config: dict[str, Any] = LLAMA) -> Path:
    """An 8 bit folder with the steps of its inputs in config.json."""
    model = make_model(config)
    nn.quantize(model, group_size=32, bits=8)
    packed = {**config, "quantization": {"group_size": 32, "bits": 8}}
    return save_model(model, {**packed, "activation_quantization": entry}, folder)


def round_inputs(model: nn.Module, scales: dict[str, float]) -> None:
    """mlx-lm's model with the same rounding before each named linear."""

    class Rounding(nn.Module):
        def __init__(self, inner: nn.Module, scale: float) -> None:
            super().__init__()
            self.inner, self.scale = inner, scale

        def __call__(self, x: mx.array) -> mx.array:
            return self.inner(mx.clip(mx.round(x / self.scale), -127, 127) * self.scale)

    for name, scale in scales.items():
        *path, last = name.split(".")
        parent: Any = model
        for key in path:
            parent = parent[int(key)] if key.isdigit() else getattr(parent, key)
        setattr(parent, last, Rounding(getattr(parent, last), scale))


SCALES = {"model.layers.0.mlp.down_proj": 0.02, "model.layers.2.self_attn.q_proj": 0.03}


@pytest.mark.parametrize("scales", [SCALES, {**SCALES, "lm_head": 0.04}], ids=["some", "head"])
def test_fixed_input_steps_are_read_and_mlx_lm_leaves_them_alone(
    scales: dict[str, float], tmp_path: Path
) -> None:
    folder = save_static(tmp_path, {"bits": 8, "scales": scales})
    theirs, _ = load_theirs(folder)
    tokens = mx.array([[3, 1, 4, 1, 5, 9]])
    floats = np.array(theirs(tokens))
    round_inputs(theirs, scales)
    wanted = np.array(theirs(tokens))
    model = load_model(folder, precision="float")
    found = np.array(model(tokens))
    # Where the last bit of an input differs, rounding may choose the neighbouring code.
    assert np.median(np.abs(found - wanted)) <= TOLERANCE * np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 0.3 * np.abs(floats - wanted).max()
    steps = {one.name: getattr(one.weight, "input_scale", None) for one in find_weights(model)}
    assert steps["layers.0.mlp.down"] == 0.02 and steps["layers.1.mlp.down"] is None


def test_a_tied_head_has_a_step_of_its_own(tmp_path: Path) -> None:
    model = load_model(save_static(tmp_path, {"bits": 8, "scales": {"lm_head": 0.05}}, TIED))
    head = model.head.projection
    assert isinstance(head, ops.Quantized) and head.input_scale == 0.05
    assert getattr(model.embedding.table, "input_scale", None) is None
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"bits": 4, "scales": SCALES}, "bits is 4, expected a whole number from 8 to 8"),
        ({"scales": SCALES}, "bits is missing"),
        ({"bits": 8}, "scales is missing or empty"),
        ({"bits": 8, "scales": {"lm_head": 0}}, "lm_head is 0, expected a finite number above 0"),
        ({"bits": 8, "scales": {"lm_head": "x"}}, "lm_head is 'x', expected a number"),
        ({"bits": 8, "scales": {"lm_head": 1e-40}}, "lm_head is 1e-40, expected 1e-30 to 1e\\+30"),
        ({"bits": 8, "scales": [1.0]}, "scales is \\[1.0\\], expected an object"),
        ({"bits": 8, "scales": SCALES, "per": "token"}, "not supported: per = 'token'"),
        ([8], "activation_quantization is \\[8\\], expected an object"),
        ({"bits": 8, "scales": {"lm_tail": 1.0}}, "names lm_tail, which no input"),
        ({"bits": 8, "scales": {"model.embed_tokens": 1.0}}, "names model.embed_tokens, which no"),
    ],
)
def test_broken_steps_are_refused(entry: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(mlx_edge.MLXEdgeError, match=said) as raised:
        load_model(save_static(tmp_path, entry))
    assert "\n" not in str(raised.value)


def test_an_empty_table_changes_nothing(tmp_path: Path) -> None:
    model = load_model(save_static(tmp_path, {}))
    assert not model.config.quantization.input_scales
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_scheme": "static"}))
    with pytest.raises(mlx_edge.UnsupportedModelError, match="activation_scheme"):
        load_model(tmp_path)
