"""Scaled models compute the same, and rounded ones err less; what has changed is stored, and nothing else."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.calibration.awq import quantize_awq, scale_layer, search_scales
from mlx_edge.calibration.grid_fitting import narrow_grid
from mlx_edge.calibration.hessian import InputSums, output_error, sum_inputs
from mlx_edge.calibration.layerwise import LayerwiseModel, forward_layer
from mlx_edge.calibration.scaling import (
    Fold,
    ScaledLayer,
    find_folds,
    gather_channels,
    spread_channels,
)
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.config import ModelConfig
from mlx_edge.quant import Packing, dequantize, make_grid, quantize, quantize_onto
from mlx_edge.weights.hub import find_model
from tests.calibration.converted import convert, logits, pocket_rows, uniform
from tests.calibration.pairs import open_model, tiny_folder
from tests.models.tiny import CONFIGS

ROWS = mx.random.randint(0, 131, (6, 24), key=mx.random.key(1)).astype(mx.int32)
DOWN = Fold(("down",), "up")
CONFIG = ModelConfig.from_hf(CONFIGS["llama2"])


def sums_of(x: mx.array) -> InputSums:
    sums = InputSums.empty(x.shape[-1])
    sums.add(x)
    return sums


def inputs_with_outliers(num_channels: int) -> mx.array:
    x = mx.random.normal((400, num_channels), key=mx.random.key(4))
    return x * mx.where(mx.arange(num_channels) % 16 == 0, 20.0, 1.0)


def random_weight(num_rows: int, num_columns: int) -> mx.array:
    return mx.random.normal((num_rows, num_columns), key=mx.random.key(9))


def random_scales(size: int, seed: int) -> mx.array:
    return mx.exp(mx.random.normal((size,), key=mx.random.key(seed)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama2", "llama-bias", "qwen2", "qwen3", "gemma3", "granite", "olmo2"]
)
def test_a_scaled_layer_computes_the_same(name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    """Also where norms are rounded: their weights make up for it."""
    model = open_model(tiny_folder(tmp_path / "m", name))
    layer, hidden = model.read_layer(0), model.embed(ROWS)
    before = model.find_linears(layer, 0)
    scaled = ScaledLayer(model, layer, 0, dtype)
    config = model.config
    sizes = [64, config.num_kv_heads * config.head_dim, 64, 96]
    for seed, (fold, size) in enumerate(zip(find_folds(config, 0), sizes, strict=True)):
        if fold.source is not None:
            scaled.fold(fold, random_scales(size, seed))
    assert name == "olmo2" or None not in (fold.source for fold in find_folds(config, 0))
    touched = [n for fold in find_folds(config, 0) if fold.source for n in fold.targets]
    for linear in touched:
        assert not mx.allclose(scaled.linears()[linear].weight, before[linear].weight, rtol=0.1)
    wanted, found = forward_layer(layer, hidden), forward_layer(scaled.layer, hidden)
    change = mx.abs(wanted - hidden).max()
    assert mx.abs(found - wanted).max() < 2e-5 * change


@pytest.mark.parametrize("name", ["llama2", "llama-bias", "qwen2", "qwen3-tied"])
def test_a_scaled_model_that_is_kept_in_floats_has_the_same_logits(
    name: str, tmp_path: Path
) -> None:
    model = open_model(tiny_folder(tmp_path / "m", name))
    tensors: dict[str, mx.array] = {}
    for index in range(model.num_layers):
        scaled = ScaledLayer(model, model.read_layer(index), index, mx.float32)
        size = model.config.num_kv_heads * model.config.head_dim
        folds = zip(find_folds(model.config, index), [64, size, 64, 96], strict=True)
        for seed, (fold, size) in enumerate(folds):
            scaled.fold(fold, random_scales(size, seed + index))
        kept = dict.fromkeys(scaled.linears())
        tensors |= scaled.store(kept, lambda *_: pytest.fail("nothing is to be quantized"))
    norms = [n for n in tensors if "layernorm" in n]
    assert len(norms) == 2 * model.num_layers
    other = convert(model, {}, tensors, mx.float32, tmp_path / "q")
    wanted, found = logits(model, ROWS), logits(other, ROWS)
    assert mx.abs(found - wanted).max() < 1e-4 * mx.abs(wanted).max()


def test_a_norm_of_zero_and_one_that_would_vanish_keep_their_channels(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m"))
    layer = model.read_layer(0)
    layer.attention.norm.weight[0] = 0.0
    fold = find_folds(model.config, 0)[0]
    scaled = ScaledLayer(model, layer, 0, mx.float16)
    wanted = scaled.fold(fold, mx.where(mx.arange(64) == 1, 1e9, 2.0))
    stored = scaled.layer.attention.norm.weight
    assert stored[0] == 0
    assert wanted[0] == 1
    assert abs(wanted[1].item() - 1) < 1e-3  # 1e9 would leave nothing of the norm in half precision
    assert abs(wanted[2].item() - 2) < 2e-3


def test_scales_lower_the_error_where_channels_differ() -> None:
    sums, weight, packing = sums_of(inputs_with_outliers(96)), random_weight(48, 96), Packing(32, 3)
    scales = search_scales(CONFIG, DOWN, sums, [(weight, packing)], mx.float16)
    assert scales is not None
    assert scales[0] > 3 * scales[1]
    seen = sums.mean_hessian()
    better = dequantize(quantize(weight * scales, packing, mx.float16)) / scales - weight
    plain = dequantize(quantize(weight, packing, mx.float16)) - weight
    assert output_error(better, seen) < 0.4 * output_error(plain, seen)


def test_no_scales_are_taken_that_do_not_help() -> None:
    packing = Packing(32, 4)

    def search(x: mx.array, *weights: mx.array) -> mx.array | None:
        return search_scales(CONFIG, DOWN, sums_of(x), [(w, packing) for w in weights], mx.float16)

    on_grid = mx.random.randint(-8, 8, (16, 64), key=mx.random.key(2)).astype(mx.float32)
    on_grid[:, ::32], on_grid[:, 1::32] = -8, 7  # no error but that of a scale
    assert search(inputs_with_outliers(64), on_grid) is None
    assert search(mx.ones((9, 64)), random_weight(16, 64)) is None  # all are fed the same
    assert search(mx.zeros((3, 64)), random_weight(16, 64)) is None
    assert search(inputs_with_outliers(64)) is None


def test_channels_that_were_never_fed_are_not_scaled() -> None:
    x = inputs_with_outliers(64) * (mx.arange(64) % 5 != 1)
    scales = search_scales(
        CONFIG, DOWN, sums_of(x), [(random_weight(32, 64), Packing(32, 3))], mx.float16
    )
    assert scales is not None
    assert mx.array_equal(scales[1::5], mx.ones(13))


def test_values_that_query_heads_share_have_one_scale() -> None:
    fold = Fold(("o",), "v", repeats=2)  # 2 kv heads of 32, 4 query heads
    spread = spread_channels(CONFIG, fold, mx.arange(64))
    first, second = list(range(32)), list(range(32, 64))
    assert spread.tolist() == first + first + second + second
    sizes = mx.concatenate([mx.zeros(32), mx.ones(32), 3 * mx.ones(32), 2 * mx.ones(32)])
    assert gather_channels(CONFIG, fold, sizes).tolist() == [1.0] * 32 + [3.0] * 32


def test_scaled_linears_are_clipped_for_what_they_are_then_given(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m"))
    layer, hidden = model.read_layer(1), model.embed(ROWS)
    sums, _ = sum_inputs(model, layer, 1, hidden)
    scaled = ScaledLayer(model, layer, 1, mx.float32)
    packings = uniform(model, Packing(32, 2))
    hessians = scale_layer(scaled, model.config, 1, sums, packings, mx.float32, 20)
    after, _ = sum_inputs(model, scaled.layer, 1, hidden)
    moved = 0
    for name, hessian in hessians.items():
        wanted = after[name].hessian
        off = ~np.eye(len(wanted), dtype=bool)  # the diagonal is damped
        np.testing.assert_allclose(hessian[off], wanted[off], atol=1e-3 * np.abs(wanted).max())
        moved += not np.allclose(sums[name].hessian, wanted, rtol=1e-2)
    assert moved > 3


def test_narrow_grids_are_never_worse_for_their_group() -> None:
    weight, packing = random_weight(24, 64), Packing(32, 3)
    weight = weight * mx.where(
        mx.random.uniform(shape=weight.shape, key=mx.random.key(3)) < 0.02, 6, 1
    )
    sums = sums_of(inputs_with_outliers(64))
    narrow = narrow_grid(weight, packing, mx.float16, sums.hessian)
    plain = make_grid(weight, packing, mx.float16)
    for group in (0, 1):
        span = slice(32 * group, 32 * group + 32)
        block = np.array(sums.mean_hessian())[span, span]

        def errors(grid, span=span, block=block) -> np.ndarray:
            lost = dequantize(quantize_onto(weight, grid, packing, mx.float16)) - weight
            lost = np.array(lost)[:, span]
            return ((lost @ block) * lost).sum(1)

        assert (errors(narrow) <= errors(plain) * 1.0001).all()
        assert errors(narrow).sum() < 0.85 * errors(plain).sum()


def layer_error(model: LayerwiseModel, other: LayerwiseModel, rows: mx.array = ROWS) -> float:
    """Mean square error of the first layer's outputs."""
    hidden = model.embed(rows)
    wanted = model.run_layer(model.read_layer(0), 0, hidden)
    return float(mx.square(other.run_layer(other.read_layer(0), 0, hidden) - wanted).mean())


@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_a_layer_with_outliers_errs_less_than_rounded(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", name)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    for key in [key for key in tensors if "layernorm" in key]:
        tensors[key] = tensors[key] * mx.where(mx.arange(64) % 16 == 3, 12.0, 1.0)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    model = open_model(folder)
    packings = uniform(model, Packing(32, 4))
    stored: dict[str, mx.array] = {}
    for part in quantize_awq(model, ROWS, packings, mx.float16):
        stored |= part
    chosen = convert(model, packings, stored, mx.float16, tmp_path / "awq")
    rounded = convert(model, packings, {}, mx.float16, tmp_path / "rtn")
    assert layer_error(model, chosen) < 0.6 * layer_error(model, rounded)


def test_layers_are_stored_as_asked(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m", "llama-bias"))
    packings = uniform(model, Packing(32, 4))
    kept = "model.layers.0.self_attn.k_proj"
    packings |= {kept: None, "model.layers.1.mlp.down_proj": Packing(32, 8)}
    parts = list(quantize_awq(model, ROWS, packings, mx.bfloat16))
    assert len(parts) == model.num_layers + 1
    assert {n.rpartition(".")[0] for n in parts[-1]} == {"lm_head"}
    stored = {key: value for part in parts for key, value in part.items()}
    assert f"{kept}.scales" not in stored
    assert "model.embed_tokens.weight" not in stored
    floats = [n for n, value in stored.items() if not n.endswith(("scales", "biases"))]
    assert {stored[n].dtype for n in floats} == {mx.uint32, mx.bfloat16}
    assert stored["model.layers.1.mlp.down_proj.weight"].shape == (64, 96 * 8 // 32)
    convert(model, packings, stored, mx.bfloat16, tmp_path / "q").run(ROWS)  # all shapes fit


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m", "qwen3-tied"))
    packings = uniform(model, Packing(32, 3))
    first, second = (list(quantize_awq(model, ROWS, packings, mx.float16)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert list(one) == list(other)
        assert all(mx.array_equal(one[name], other[name]) for name in one)


def test_other_modes_are_refused(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m"))
    packings = uniform(model, Packing(32, 4)) | {"lm_head": Packing(32, 8, "mxfp8")}
    with pytest.raises(InvalidRequestError, match="lm_head is to be mxfp8; awq serves affine"):
        list(quantize_awq(model, ROWS, packings, mx.float16))


def test_the_first_layer_of_pocket_errs_less_than_rounded_on_unseen_text(tmp_path: Path) -> None:
    model = open_model(find_model("pocket"))
    packings = uniform(model, Packing(64, 4))
    stored = next(quantize_awq(model, pocket_rows(8, is_held_out=False), packings, mx.float16))
    chosen = convert(model, packings, stored, mx.float16, tmp_path / "awq")
    rounded = convert(model, packings, {}, mx.float16, tmp_path / "rtn")
    rows = pocket_rows(8, is_held_out=True)
    assert layer_error(model, chosen, rows) < 0.8 * layer_error(model, rounded, rows)
